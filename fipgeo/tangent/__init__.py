"""Networks that are linear in their weights: trained, composed of components, and relieved of them."""

from fipgeo.tangent.component import Component, digest, fingerprint
from fipgeo.tangent.compose import Ensemble, compose
from fipgeo.tangent.evidence import Evidence, learned_weights
from fipgeo.tangent.fit import Fit, fit_square_
from fipgeo.tangent.losses import rescaled_square_loss, tangent_norm
from fipgeo.tangent.model import TangentModel
from fipgeo.tangent.parallel import PartError, train_parts
from fipgeo.tangent.pool import Entry, Pool
from fipgeo.tangent.private import Privacy, fit_private_, gaussian_noise

__all__ = [
    "Component",
    "Ensemble",
    "Entry",
    "Evidence",
    "Fit",
    "PartError",
    "Pool",
    "Privacy",
    "TangentModel",
    "compose",
    "digest",
    "fingerprint",
    "fit_private_",
    "fit_square_",
    "gaussian_noise",
    "learned_weights",
    "rescaled_square_loss",
    "tangent_norm",
    "train_parts",
]
