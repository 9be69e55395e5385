"""Functionally invariant paths: predictor, corrector, verdict."""

from fipgeo.paths.certificate import Certificate
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import Correction, Corrector, FirstOrder, GaussNewton
from fipgeo.paths.driver import Method, walk
from fipgeo.paths.fronts import SaturationWarning, adapt, sparsify
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives import NewTask, Objective, Proposal, Sparsity
from fipgeo.paths.record import Leg, PathPoint, PathResult
from fipgeo.paths.verdict import Verdict, changed_upper_bound

__all__ = [
    "Certificate",
    "Compensation",
    "Correction",
    "Corrector",
    "FirstOrder",
    "GaussNewton",
    "Kept",
    "Leg",
    "Method",
    "NewTask",
    "Objective",
    "PathPoint",
    "PathResult",
    "Position",
    "Proposal",
    "SaturationWarning",
    "Sparsity",
    "StepControl",
    "Verdict",
    "adapt",
    "changed_upper_bound",
    "sparsify",
    "walk",
]
