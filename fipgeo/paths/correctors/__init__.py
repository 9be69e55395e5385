"""What brings a position back to where the function is."""

from fipgeo.paths.correctors.base import Correction, Corrector, NoCorrection, State
from fipgeo.paths.correctors.first_order import FirstOrder
from fipgeo.paths.correctors.gauss_newton import GaussNewton
from fipgeo.paths.correctors.local import LayerLocal
from fipgeo.paths.correctors.mixed import Mixed

__all__ = ["Correction", "Corrector", "FirstOrder", "GaussNewton", "LayerLocal", "Mixed", "NoCorrection", "State"]
