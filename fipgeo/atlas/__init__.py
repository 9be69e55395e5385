"""Composition of task vectors with learned coefficients, at the scale of vectors, layers, tensors or parts of them."""

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.kinds import Isotropic, Kind, Partitions, PerBlock, PerLayer, partition
from fipgeo.atlas.losses import Loss, square
from fipgeo.atlas.recipes import dare, elect, lines, ties, trim
from fipgeo.atlas.self_training import pseudo_labels, self_train_, trusted
from fipgeo.atlas.solve import Fit, Goal, fit_
from fipgeo.atlas.spectral import directions, isotropise, whiten
from fipgeo.atlas.uses import choose_vectors, cosines, disentanglement_error, forget_

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
    "choose_vectors",
    "cosines",
    "dare",
    "directions",
    "disentanglement_error",
    "elect",
    "fit_",
    "forget_",
    "isotropise",
    "lines",
    "partition",
    "pseudo_labels",
    "self_train_",
    "square",
    "ties",
    "trim",
    "trusted",
    "whiten",
]
