"""Networks of one shape: hidden channels in one order, paths of low drift, and planes of weights through them."""

from fipgeo.between.channels import align
from fipgeo.between.energy import connect
from fipgeo.between.plane import Plane, Projection, project
from fipgeo.between.record import Connection

__all__ = ["Connection", "Plane", "Projection", "align", "connect", "project"]
