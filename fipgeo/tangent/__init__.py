"""Networks that are linear in their weights: trained, composed of components, and relieved of them."""

from fipgeo.tangent.component import Component, digest, fingerprint
from fipgeo.tangent.compose import Entry, Pool, compose
from fipgeo.tangent.fit import Fit, fit_square_
from fipgeo.tangent.losses import rescaled_square_loss, tangent_norm
from fipgeo.tangent.model import TangentModel

__all__ = [
    "Component",
    "Entry",
    "Fit",
    "Pool",
    "TangentModel",
    "compose",
    "digest",
    "fingerprint",
    "fit_square_",
    "rescaled_square_loss",
    "tangent_norm",
]
