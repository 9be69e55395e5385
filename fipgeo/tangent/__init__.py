"""Networks that are linear in their weights: trained, composed of components, and relieved of them."""

from fipgeo.tangent.component import Component, digest, fingerprint
from fipgeo.tangent.compose import Ensemble, compose
from fipgeo.tangent.evidence import Evidence, learned_weights
from fipgeo.tangent.fit import Fit, fit_square_
from fipgeo.tangent.losses import rescaled_square_loss, tangent_norm
from fipgeo.tangent.model import TangentModel
from fipgeo.tangent.pool import Entry, Pool

__all__ = [
    "Component",
    "Ensemble",
    "Entry",
    "Evidence",
    "Fit",
    "Pool",
    "TangentModel",
    "compose",
    "digest",
    "fingerprint",
    "fit_square_",
    "learned_weights",
    "rescaled_square_loss",
    "tangent_norm",
]
