"""What is remembered of earlier tasks: inputs worth keeping, or a sketch of the metric in place of inputs."""

from fipgeo.memory.buffer import select
from fipgeo.memory.sketch import Sketch
from fipgeo.memory.views import Affine, views

__all__ = ["Affine", "Sketch", "select", "views"]
