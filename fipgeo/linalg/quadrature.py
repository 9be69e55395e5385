"""Spectral densities of symmetric operators, by stochastic Lanczos quadrature."""

import math

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, dots, gaussian, inner, norms, scaled, wide
from fipgeo.linalg._system import require_spectrum
from fipgeo.linalg.density import Density
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Spectrum

_NO_WEIGHT = 1e-28  # share of all eigenvalues; below it a weight is the square of a rounding error


@torch.no_grad()
def lanczos_density(
    operator: LinearOperator,
    *,
    num_probes: int = 8,
    num_steps: int = 64,
    deflate: Spectrum | None = None,
    max_bytes: int = 2**31,
    generator: torch.Generator | int | None = None,
) -> Density:
    """The spectral density of a symmetric operator from random probes, s Lanczos steps each.

    Every probe v starts a Lanczos recurrence of its own; the tridiagonal T it ends in gives the Gauss rule
    `v^T f(A) v ~ sum_s tau_s^2 f(theta_s)` (eigenvalues of T, first components of its eigenvectors), exact
    for polynomials of degree `2 s - 1`. All probes advance in one stack of products a step, `num_probes *
    num_steps` in all, fewer where every recurrence ends early.

    Vectors are orthogonalised twice against all earlier ones of their probe, `p s n` numbers; probes that do
    not fit `max_bytes` side by side go one group after the other. Where not even one fits, the plain
    recurrence is run: converged eigenvalues then appear as several nodes that share their weight, which
    leaves spectral sums right and costs resolution.

    Args:
        operator: A, symmetric, shape `(n, n)`.
        num_probes: p, random orthonormal vectors; at most as many as there are dimensions.
        num_steps: s.
        deflate: eigenpairs, as from `lanczos`: their values are taken as exact and the quadrature is run in
            the complement of their vectors, which lowers the variance much where a few values stand out.
        max_bytes: memory for the Lanczos vectors.
        generator: generator or seed; None for the fixed seed 0.

    Raises:
        ValueError: if A is not square or not declared symmetric, a number is less than 1, or `deflate` has
            no vectors or vectors of another size.

    Source: Bai, Fahey & Golub, Some large-scale matrix computation problems (1996); Ghorbani, Krishnan &
    Xiao, An investigation into neural net optimization via Hessian eigenvalue density (2019).

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> A = Diagonal(torch.linspace(1, 3, 500, dtype=torch.float64))
        >>> found = lanczos_density(A, num_probes=4, num_steps=20).log_det()
        >>> abs(found.value - float(torch.linspace(1, 3, 500, dtype=torch.float64).log().sum())) < 3 * found.std_error
        True
    """
    require_spectrum(operator, 1)
    n = operator.shape[0]
    for name, number in (("num_probes", num_probes), ("num_steps", num_steps)):
        if number < 1:
            raise ValueError(f"{name} is {number}, expected at least 1")
    known, exact = _deflated(operator, deflate)
    p, steps = min(num_probes, n - len(known)), min(num_steps, n - len(known))
    probes = _frame(operator, p, known, as_generator(generator))
    group = max_bytes // max(1, steps * n * operator.dtype.itemsize)
    parts, num_products = [], 0
    for start in probes.split(max(1, group) if group else max(1, p)):
        if len(start):
            alpha, beta, used = _recurrence(operator, start, steps, known, keep=group > 0)
            parts.append(_gauss(alpha, beta, steps, operator.psd))
            num_products += used
    nothing = torch.empty(0, 0, dtype=torch.float64)
    nodes, weights, residuals = (torch.cat([part[i] for part in parts] or [nothing]) for i in range(3))
    weights = torch.where(weights < _NO_WEIGHT, 0.0, weights * (n - len(known)))
    finite = bool(torch.isfinite(nodes).all()) and bool(torch.isfinite(exact).all())
    outcome = Outcome.CONVERGED if finite else Outcome.NOT_FINITE
    return Density(nodes, weights, exact, n, num_products, outcome, torch.finfo(operator.dtype).eps, residuals)


def _deflated(operator: LinearOperator, deflate: Spectrum | None) -> tuple[Tensor, Tensor]:
    """Known eigenvectors `[k, n]`, orthonormal to rounding, and their eigenvalues on the CPU."""
    n = operator.shape[0]
    if deflate is None:
        return torch.empty(0, n, dtype=operator.dtype, device=operator.device), torch.empty(0, dtype=torch.float64)
    if deflate.vectors is None:
        raise ValueError("deflate has no vectors; compute it with vectors, as lanczos(operator, k) does")
    if deflate.vectors.shape[1] != n:
        raise ValueError(f"deflate has vectors of size {deflate.vectors.shape[1]}, the operator acts on size {n}")
    return deflate.vectors.to(operator.device, operator.dtype), deflate.values.cpu().double()


def _frame(operator: LinearOperator, p: int, known: Tensor, generator: torch.Generator) -> Tensor:
    """Random orthonormal rows `[p, n]` outside `known`, uniform among all such."""
    dtype = operator.dtype if operator.dtype.itemsize >= 4 else torch.float32  # QR knows no shorter ones
    rows = gaussian((p, operator.shape[0]), torch.empty(0, dtype=dtype, device=operator.device), generator)
    for _ in range(2):
        rows = torch.linalg.qr(_outside(rows, known.to(dtype)).T).Q.T
    return rows.to(operator.dtype).contiguous()


def _outside(rows: Tensor, known: Tensor) -> Tensor:
    return rows - inner(rows, known).to(rows.dtype) @ known if len(known) else rows


def _recurrence(
    operator: LinearOperator, v: Tensor, steps: int, known: Tensor, *, keep: bool
) -> tuple[Tensor, Tensor, int]:
    """Diagonals and off-diagonals of T, `[p, s']` each, for each row of v, and the products used.

    The last off-diagonal couples T to what was not done.

    A recurrence that ends early goes on with zero vectors, whose rows of T are zero and decoupled; s' is less
    than `steps` if all have ended.
    """
    p, n = v.shape
    eps = torch.finfo(operator.dtype).eps
    basis = v.new_empty(p, steps, n) if keep else v[:, None]
    alphas, betas = [], []
    beta = scale = torch.zeros(p, dtype=wide(v.device), device=v.device)
    before = torch.zeros_like(v)
    for step in range(steps):
        w = _outside(operator(v), known)
        alpha = dots(v, w)
        alphas.append(alpha)
        w = w - scaled(alpha, v) - scaled(beta, before)
        if keep and step + 1 < steps:
            basis[:, step] = v
            earlier = basis[:, : step + 1]
            for _ in range(2):
                w = _outside(w, known)
                w = w - torch.bmm(torch.bmm(w[:, None], earlier.mT), earlier)[:, 0]
        beta = norms(w)
        scale = torch.maximum(scale, alpha.abs() + beta)
        going = beta > 10 * eps * scale  # false for NaN, which stays visible in alpha
        beta = torch.where(going, beta, 0.0)
        betas.append(beta)
        if step + 1 == steps or not bool(going.any()):
            break
        before, v = v, scaled(torch.where(going, 1 / beta, 0.0), torch.where(going[:, None], w, 0.0))
    num_products = p * len(alphas)
    return torch.stack(alphas, 1).cpu().double(), torch.stack(betas, 1).cpu().double(), num_products


def _gauss(alpha: Tensor, beta: Tensor, steps: int, psd: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, weights and residuals `[p, steps]`, filled up with nodes of no weight; NaN where T is not finite."""
    t = torch.diag_embed(alpha) + torch.diag_embed(beta[:, :-1], 1) + torch.diag_embed(beta[:, :-1], -1)
    finite = torch.isfinite(t).all(-1).all(-1, keepdim=True)
    theta, s = torch.linalg.eigh(torch.where(finite[..., None], t, 0.0))
    theta = torch.where(finite, theta.clamp(min=0) if psd else theta, math.nan)
    missing = (0, steps - alpha.shape[1])
    parts = (theta, s[:, 0].square(), beta[:, -1:] * s[:, -1].abs())
    nodes, weights, residuals = (torch.nn.functional.pad(part, missing) for part in parts)
    return nodes, weights, residuals
