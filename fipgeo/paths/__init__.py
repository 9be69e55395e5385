"""Functionally invariant paths: predictor, corrector, verdict."""

from fipgeo.paths.certificate import Certificate
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import Correction, Corrector, FirstOrder, GaussNewton, LayerLocal, Mixed, NoCorrection
from fipgeo.paths.driver import Method, walk
from fipgeo.paths.ensemble import Diversity, PathEnsemble, diversity
from fipgeo.paths.fronts import adapt, sparsify
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives import (
    Blocks,
    Columns,
    Groups,
    NewTask,
    NofM,
    Objective,
    Pattern,
    Proposal,
    Replay,
    Robustness,
    Rows,
    Score,
    Sparsity,
    Unstructured,
)
from fipgeo.paths.protected import Protected, Several, Tangent
from fipgeo.paths.record import Leg, PathPoint, PathResult
from fipgeo.paths.robust import robustify
from fipgeo.paths.saturation import SaturationWarning
from fipgeo.paths.verdict import Verdict, changed_upper_bound

__all__ = [
    "Blocks",
    "Certificate",
    "Columns",
    "Compensation",
    "Correction",
    "Corrector",
    "Diversity",
    "FirstOrder",
    "GaussNewton",
    "Groups",
    "Kept",
    "LayerLocal",
    "Leg",
    "Method",
    "Mixed",
    "NewTask",
    "NoCorrection",
    "NofM",
    "Objective",
    "PathEnsemble",
    "PathPoint",
    "PathResult",
    "Pattern",
    "Position",
    "Proposal",
    "Protected",
    "Replay",
    "Robustness",
    "Rows",
    "SaturationWarning",
    "Score",
    "Several",
    "Sparsity",
    "StepControl",
    "Tangent",
    "Unstructured",
    "Verdict",
    "adapt",
    "changed_upper_bound",
    "diversity",
    "robustify",
    "sparsify",
    "walk",
]
