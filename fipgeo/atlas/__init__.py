"""Composition of task vectors with learned coefficients, at the scale of vectors, layers, tensors or parts of them."""

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.kinds import Isotropic, Kind, Partitions, PerBlock, PerLayer, partition
from fipgeo.atlas.losses import Loss, square
from fipgeo.atlas.recipes import dare, elect, lines, ties, trim
from fipgeo.atlas.solve import Fit, Goal, fit_

__all__ = [
    "Composition",
    "Fit",
    "Goal",
    "Isotropic",
    "Kind",
    "Loss",
    "Partitions",
    "PerBlock",
    "PerLayer",
    "dare",
    "elect",
    "fit_",
    "lines",
    "partition",
    "square",
    "ties",
    "trim",
]
