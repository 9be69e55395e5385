"""Differential geometry of trained networks.

Weight space is a space with a metric: how much a network's outputs change when its weights move. fipgeo computes that
metric without forming it, shows its spectrum, and walks functionally invariant paths through it.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import TYPE_CHECKING

from fipgeo import atlas, attacks, basis, between, geodesics, linalg, memory, optim, outputs, shrink, tangent
from fipgeo.adapters import load_adapter
from fipgeo.atlas import Composition
from fipgeo.between import Connection, align, connect
from fipgeo.data import as_batches
from fipgeo.field import MetricField, metric
from fipgeo.geodesics import Chart, Frames, Geodesic, Shot, geodesic, shoot, track
from fipgeo.heads import grow_head
from fipgeo.jacobian import Sketched, sketch_error, sketch_trace
from fipgeo.linalg import Density, LinearOperator, Outcome, Solution, Spectrum, principal_angles
from fipgeo.low_rank import LowRank
from fipgeo.merging import merge_checkpoints
from fipgeo.metrics import Metric
from fipgeo.model import OutputMap
from fipgeo.outputs import Bernoulli, Categorical, Cosine, Euclidean, Gaussian, Geometry, Logits
from fipgeo.paths import (
    Blocks,
    Certificate,
    Columns,
    Diversity,
    FirstOrder,
    GaussNewton,
    Groups,
    LayerLocal,
    Leg,
    Method,
    Mixed,
    NewTask,
    NofM,
    PathEnsemble,
    PathPoint,
    PathResult,
    Replay,
    Robustness,
    Rows,
    SaturationWarning,
    Sparsity,
    StepControl,
    adapt,
    changed_upper_bound,
    diversity,
    robustify,
    sparsify,
    walk,
)
from fipgeo.sequences import adapt_tasks
from fipgeo.shrink import as_masks, channel_groups, to_dense_, to_prune_
from fipgeo.space import WeightSpace
from fipgeo.tangent import Component, TangentModel, compose, fit_square_, rescaled_square_loss
from fipgeo.task_vectors import TaskVector
from fipgeo.tasks import AccuracyMatrix

if TYPE_CHECKING:
    from fipgeo import manifold, plotting

try:
    __version__ = version("fipgeo")
except PackageNotFoundError:  # running from a folder that was never installed
    __version__ = "0+unknown"

__all__ = [
    "AccuracyMatrix",
    "Bernoulli",
    "Blocks",
    "Categorical",
    "Certificate",
    "Chart",
    "Columns",
    "Component",
    "Composition",
    "Connection",
    "Cosine",
    "Density",
    "Diversity",
    "Euclidean",
    "FirstOrder",
    "Frames",
    "GaussNewton",
    "Gaussian",
    "Geodesic",
    "Geometry",
    "Groups",
    "LayerLocal",
    "Leg",
    "LinearOperator",
    "Logits",
    "LowRank",
    "Method",
    "Metric",
    "MetricField",
    "Mixed",
    "NewTask",
    "NofM",
    "Outcome",
    "OutputMap",
    "PathEnsemble",
    "PathPoint",
    "PathResult",
    "Replay",
    "Robustness",
    "Rows",
    "SaturationWarning",
    "Shot",
    "Sketched",
    "Solution",
    "Sparsity",
    "Spectrum",
    "StepControl",
    "TangentModel",
    "TaskVector",
    "WeightSpace",
    "__version__",
    "adapt",
    "adapt_tasks",
    "align",
    "as_batches",
    "as_masks",
    "atlas",
    "attacks",
    "basis",
    "between",
    "changed_upper_bound",
    "channel_groups",
    "compose",
    "connect",
    "diversity",
    "fit_square_",
    "geodesic",
    "geodesics",
    "grow_head",
    "linalg",
    "load_adapter",
    "manifold",
    "memory",
    "merge_checkpoints",
    "metric",
    "optim",
    "outputs",
    "plotting",
    "principal_angles",
    "rescaled_square_loss",
    "robustify",
    "shoot",
    "shrink",
    "sketch_error",
    "sketch_trace",
    "sparsify",
    "tangent",
    "to_dense_",
    "to_prune_",
    "track",
    "walk",
]


def __getattr__(name: str) -> ModuleType:
    """Load `fipgeo.plotting` and `fipgeo.manifold` when first used: matplotlib and geoopt cost more than the rest."""
    if name in ("plotting", "manifold"):
        return import_module(f"fipgeo.{name}")
    raise AttributeError(f"module 'fipgeo' has no attribute {name!r}")
