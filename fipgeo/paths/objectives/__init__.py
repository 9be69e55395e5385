"""What a path walks towards."""

from fipgeo.paths.objectives.base import Objective, Predictor, Proposal, State, weight_mask
from fipgeo.paths.objectives.new_task import NewTask
from fipgeo.paths.objectives.scores import metric_diagonal
from fipgeo.paths.objectives.sparsity import Sparsity

__all__ = ["NewTask", "Objective", "Predictor", "Proposal", "Sparsity", "State", "metric_diagonal", "weight_mask"]
