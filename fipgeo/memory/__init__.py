"""What is remembered of earlier tasks: inputs worth keeping, or sketches in place of inputs."""

from fipgeo.memory.buffer import select
from fipgeo.memory.hidden import HiddenFeatures
from fipgeo.memory.layer_sketch import LayerSketch
from fipgeo.memory.readout import Readout, ReadoutSketch
from fipgeo.memory.sketch import Sketch
from fipgeo.memory.views import Affine, views

__all__ = ["Affine", "HiddenFeatures", "LayerSketch", "Readout", "ReadoutSketch", "Sketch", "select", "views"]
