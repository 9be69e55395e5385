"""The root R = dz/dtheta of the metric: one operator, one file an engine."""

from fipgeo.jacobian.autodiff import AutodiffRoot
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.factored import FactoredRoot
from fipgeo.jacobian.gram import inner_products
from fipgeo.jacobian.linearised import LinearisedRoot
from fipgeo.jacobian.materialised import materialised_root
from fipgeo.jacobian.root import ENGINES, MAX_BYTES, JacobianRoot, column_squares
from fipgeo.jacobian.second import SecondOrder, Taylor, second_derivative, taylor
from fipgeo.jacobian.second_check import SecondDerivativeGap, second_derivative_gap
from fipgeo.jacobian.sketch import Sketched, drawn, replicates, sketch_error, sketch_trace

__all__ = [
    "ENGINES",
    "MAX_BYTES",
    "AutodiffRoot",
    "EmbeddedOutputs",
    "FactoredRoot",
    "JacobianRoot",
    "LinearisedRoot",
    "SecondDerivativeGap",
    "SecondOrder",
    "Sketched",
    "Survey",
    "Taylor",
    "column_squares",
    "drawn",
    "inner_products",
    "materialised_root",
    "replicates",
    "second_derivative",
    "second_derivative_gap",
    "sketch_error",
    "sketch_trace",
    "taylor",
]
