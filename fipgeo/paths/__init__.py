"""Functionally invariant paths: predictor, corrector, verdict."""

from fipgeo.paths.certificate import Certificate
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import Correction, Corrector, FirstOrder, GaussNewton, LayerLocal, Mixed
from fipgeo.paths.driver import Method, walk
from fipgeo.paths.fronts import SaturationWarning, adapt, sparsify
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives import (
    Blocks,
    Columns,
    Groups,
    NewTask,
    NoCorrection,
    NofM,
    Objective,
    Pattern,
    Proposal,
    Replay,
    Rows,
    Score,
    Sparsity,
    Unstructured,
)
from fipgeo.paths.protected import Protected, Several, Tangent
from fipgeo.paths.record import Leg, PathPoint, PathResult
from fipgeo.paths.verdict import Verdict, changed_upper_bound

__all__ = [
    "Blocks",
    "Certificate",
    "Columns",
    "Compensation",
    "Correction",
    "Corrector",
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
    "PathPoint",
    "PathResult",
    "Pattern",
    "Position",
    "Proposal",
    "Protected",
    "Replay",
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
    "sparsify",
    "walk",
]
