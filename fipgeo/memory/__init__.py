"""What is remembered of earlier tasks: inputs worth keeping, or sketches in place of inputs."""

from fipgeo.memory.buffer import select
from fipgeo.memory.layer_sketch import LayerSketch
from fipgeo.memory.sketch import Sketch
from fipgeo.memory.views import Affine, views

__all__ = ["Affine", "LayerSketch", "Sketch", "select", "views"]
