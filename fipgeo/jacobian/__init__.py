"""The root R = dz/dtheta of the metric: one operator, one file an engine."""

from fipgeo.jacobian.autodiff import AutodiffRoot
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.factored import FactoredRoot
from fipgeo.jacobian.gram import inner_products
from fipgeo.jacobian.materialised import materialised_root
from fipgeo.jacobian.root import ENGINES, MAX_BYTES, JacobianRoot

__all__ = [
    "ENGINES",
    "MAX_BYTES",
    "AutodiffRoot",
    "EmbeddedOutputs",
    "FactoredRoot",
    "JacobianRoot",
    "Survey",
    "inner_products",
    "materialised_root",
]
