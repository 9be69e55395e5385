"""Composition of task vectors with learned coefficients, at the scale of vectors, layers, tensors or parts of them."""

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.diagnostics import cosines, disentanglement_error, interference
from fipgeo.atlas.few_shot import CacheAdapter, FewShot, LinearProbe, class_means, few_shot_
from fipgeo.atlas.forgetting import forget_
from fipgeo.atlas.goals import Goal
from fipgeo.atlas.hidden import HiddenClassifier, fit_hidden_
from fipgeo.atlas.kinds import Isotropic, Kind, Partitions, PerBlock, PerChannel, PerLayer, partition
from fipgeo.atlas.losses import Loss, square
from fipgeo.atlas.recipes import dare, elect, lines, ties, trim
from fipgeo.atlas.selection import choose_vectors, feature_similarity
from fipgeo.atlas.self_training import pseudo_labels, self_train_, trusted
from fipgeo.atlas.solve import Fit, fit_
from fipgeo.atlas.spectral import directions, isotropise, whiten

__all__ = [
    "CacheAdapter",
    "Composition",
    "FewShot",
    "Fit",
    "Goal",
    "HiddenClassifier",
    "Isotropic",
    "Kind",
    "LinearProbe",
    "Loss",
    "Partitions",
    "PerBlock",
    "PerChannel",
    "PerLayer",
    "choose_vectors",
    "class_means",
    "cosines",
    "dare",
    "directions",
    "disentanglement_error",
    "elect",
    "feature_similarity",
    "few_shot_",
    "fit_",
    "fit_hidden_",
    "forget_",
    "interference",
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
