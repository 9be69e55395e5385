"""From one network to another of the same shape: hidden channels in one order, and a path of low drift."""

from fipgeo.between.channels import align
from fipgeo.between.energy import connect
from fipgeo.between.record import Connection

__all__ = ["Connection", "align", "connect"]
