"""Linear algebra on operators that are known by their products: it imports torch only and knows no model.

Vectors are rows of stacks `[k, n]`. Letters: `A: R^n -> R^m` an operator, R a root (`R^T R` is psd), k
stacked vectors or eigenpairs. Methods return records with a verdict and residuals measured by true products.
"""

from fipgeo.linalg._precision import doubled
from fipgeo.linalg._stacks import as_generator
from fipgeo.linalg.angles import overlap, principal_angles
from fipgeo.linalg.density import Density
from fipgeo.linalg.estimate import diagonal, trace
from fipgeo.linalg.factor import DualFactor, cholesky, woodbury
from fipgeo.linalg.krylov import lanczos
from fipgeo.linalg.nodes import Dense, Diagonal, Function, Gram, Identity, Stack, from_scipy
from fipgeo.linalg.nystrom import LowRank, nystrom
from fipgeo.linalg.operator import Adjoint, LinearOperator, Product, Scaled, Sum
from fipgeo.linalg.probes import adjoint_gap, dense_gap, psd_gap, symmetry_gap
from fipgeo.linalg.quadrature import lanczos_density
from fipgeo.linalg.result import Estimate, Outcome, Solution, SolveError, Spectrum, TensorEstimate
from fipgeo.linalg.solve import cg, lsmr
from fipgeo.linalg.spectrum import dense_eigh, dual_eigh, root_lanczos

__all__ = [
    "Adjoint",
    "Dense",
    "Density",
    "Diagonal",
    "DualFactor",
    "Estimate",
    "Function",
    "Gram",
    "Identity",
    "LinearOperator",
    "LowRank",
    "Outcome",
    "Product",
    "Scaled",
    "Solution",
    "SolveError",
    "Spectrum",
    "Stack",
    "Sum",
    "TensorEstimate",
    "adjoint_gap",
    "as_generator",
    "cg",
    "cholesky",
    "dense_eigh",
    "dense_gap",
    "diagonal",
    "doubled",
    "dual_eigh",
    "from_scipy",
    "lanczos",
    "lanczos_density",
    "lsmr",
    "nystrom",
    "overlap",
    "principal_angles",
    "psd_gap",
    "root_lanczos",
    "symmetry_gap",
    "trace",
    "woodbury",
]
