"""The root R = dz/dtheta of the metric: one operator, one file an engine."""

from fipgeo.jacobian.autodiff import AutodiffRoot
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.materialised import gram, inner_products, materialised_root
from fipgeo.jacobian.root import ENGINES, MAX_BYTES, JacobianRoot

__all__ = [
    "ENGINES",
    "MAX_BYTES",
    "AutodiffRoot",
    "EmbeddedOutputs",
    "JacobianRoot",
    "Survey",
    "gram",
    "inner_products",
    "materialised_root",
]
