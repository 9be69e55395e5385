"""What a path walks towards."""

from fipgeo.paths.objectives.base import Objective, Predictor, Proposal, State, weight_mask
from fipgeo.paths.objectives.new_task import NewTask
from fipgeo.paths.objectives.patterns import Blocks, Columns, Groups, NofM, Pattern, Rows, Unstructured
from fipgeo.paths.objectives.replay import Replay
from fipgeo.paths.objectives.robustness import Robustness
from fipgeo.paths.objectives.scores import (
    SCORES,
    Lamp,
    Local,
    LocalInverse,
    Magnitude,
    MetricScore,
    Score,
    Survivors,
    metric_diagonal,
)
from fipgeo.paths.objectives.sparsity import Sparsity

__all__ = [
    "SCORES",
    "Blocks",
    "Columns",
    "Groups",
    "Lamp",
    "Local",
    "LocalInverse",
    "Magnitude",
    "MetricScore",
    "NewTask",
    "NofM",
    "Objective",
    "Pattern",
    "Predictor",
    "Proposal",
    "Replay",
    "Robustness",
    "Rows",
    "Score",
    "Sparsity",
    "State",
    "Survivors",
    "Unstructured",
    "metric_diagonal",
    "weight_mask",
]
