"""Composition of task vectors with learned coefficients, at the scale of vectors, layers, tensors or parts of them."""

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.kinds import Isotropic, Kind, Partitions, PerBlock, PerLayer, partition
from fipgeo.atlas.recipes import dare, elect, lines, ties, trim

__all__ = [
    "Composition",
    "Isotropic",
    "Kind",
    "Partitions",
    "PerBlock",
    "PerLayer",
    "dare",
    "elect",
    "lines",
    "partition",
    "ties",
    "trim",
]
