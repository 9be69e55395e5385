"""Spectral densities and spectral sums of symmetric operators, by stochastic Lanczos quadrature."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, dots, gaussian, inner, norms, scaled, wide
from fipgeo.linalg._system import require_damping, require_spectrum
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Estimate, Outcome, Spectrum, TensorEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NO_WEIGHT = 1e-28  # share of all eigenvalues; below it a weight is the square of a rounding error


@dataclass(frozen=True)
class Density:
    """The distribution of the n eigenvalues of A, as a random quadrature rule: weights count eigenvalues.

    Each of p probes is a rule of its own, `tr f(A) ~ sum_exact f(lambda) + sum_s w_js f(x_js)`; results are
    means over the probes, errors come from their spread. The probes are orthonormal, so with N eigenvalues
    outside `exact` the squared error is `var / p (1 - p / N)`: zero once they span everything. What a rule of
    s steps cannot resolve (gaps between inner nodes) is no part of the error, nor is rounding; all on the CPU.

    Attributes:
        nodes: `[p, s]` float64, Ritz values of each probe, ascending.
        weights: `[p, s]` float64; each row sums to N.
        exact: `[k]` float64, eigenvalues that were given and left out of the quadrature, descending.
        dim: n.
        num_products: vectors multiplied by the operator.
        outcome: the verdict; `NOT_FINITE` makes every result NaN.
        eps: machine epsilon of the products.
        residuals: `[p, s]` float64, or None: an eigenvalue lies within this distance of each node.

    Example:
        >>> from fipgeo.linalg import Diagonal
        >>> found = lanczos_density(Diagonal(torch.tensor([4.0, 1.0, 1.0, 0.0], dtype=torch.float64)), num_probes=4)
        >>> round(found.trace().value, 6), round(found.cumulative(0.5, above=True).value.item(), 6)
        (6.0, 3.0)
    """

    nodes: Tensor = field(repr=False)
    weights: Tensor = field(repr=False)
    exact: Tensor = field(repr=False)
    dim: int
    num_products: int = 0
    outcome: Outcome = Outcome.CONVERGED
    eps: float = torch.finfo(torch.float64).eps
    residuals: Tensor | None = field(default=None, repr=False)

    @property
    def ok(self) -> bool:
        """Whether all products were finite."""
        return self.outcome.ok

    @property
    def num_probes(self) -> int:
        """How many rules there are, p."""
        return len(self.nodes)

    def tolerance(self) -> float:
        """The size below which an eigenvalue is rounding: `eps max(10, s) max |lambda|`."""
        sizes = torch.cat([self.nodes[self.weights > 0].abs(), self.exact.abs()])
        return self.eps * max(10, *self.nodes.shape[1:]) * (float(sizes.max()) if len(sizes) else 0.0)

    def spectral_sum(self, function: Callable[[Tensor], Tensor]) -> Estimate:
        """`tr f(A) = sum_i f(lambda_i)`.

        Args:
            function: f, elementwise on a float64 tensor of eigenvalues.

        Source: Ubaru, Chen & Saad, Fast estimation of tr f(A) via stochastic Lanczos quadrature (2017).
        """
        f = torch.where(self.weights > 0, function(self.nodes), 0.0)
        value, error = self._mean((self.weights * f).sum(1))
        value = value + function(self.exact).sum()
        return self._estimate(float(value), float(error))

    def trace(self) -> Estimate:
        """`tr A`; each probe contributes its Rayleigh quotient exactly."""
        return self.spectral_sum(lambda x: x)

    def log_det(self, damping: float = 0.0) -> Estimate:
        """`log det (A + damping I)`; `BREAKDOWN` if an eigenvalue is not above `-damping`.

        Raises:
            ValueError: if damping is negative or not finite.
        """
        require_damping(damping)
        found = self.spectral_sum(lambda x: torch.log(x + damping))
        if self.ok and not found.ok:
            return Estimate(found.value, math.nan, self.num_probes, self.num_products, Outcome.BREAKDOWN)
        return found

    def effective_dimension(self, damping: float) -> Estimate:
        """`tr A (A + damping I)^-1`: how many directions the data fix against the damping, for psd A.

        Raises:
            ValueError: if damping is not positive and finite.
        """
        require_damping(damping)
        if damping == 0:
            raise ValueError("damping is 0, expected more; for the rank take cumulative(tol, above=True)")
        return self.spectral_sum(lambda x: x / (x + damping))

    def effective_rank(self) -> Estimate:
        """`exp(- sum p_i log p_i)`, `p_i = lambda_i / sum lambda`, over the positive eigenvalues.

        Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007.
        """
        return self._of_sums(lambda x: x, lambda x: torch.xlogy(x, x), lambda a, b: torch.exp(torch.log(a) - b / a))

    def participation_ratio(self) -> Estimate:
        """`(sum lambda)^2 / sum lambda^2` over the positive eigenvalues."""
        return self._of_sums(lambda x: x, torch.square, lambda a, b: a.square() / b)

    def cumulative(self, x: Tensor | float, *, above: bool = False) -> TensorEstimate:
        """How many eigenvalues are at most x, or above x.

        Args:
            x: one bound or many `[...]`.
            above: count those above instead.
        """
        x = torch.as_tensor(x, dtype=torch.float64, device=self.nodes.device)
        bounds = x.reshape(-1, 1)

        def count(values: Tensor) -> Tensor:
            return (values > bounds if above else values <= bounds).double()

        samples = [count(nodes) @ w for nodes, w in zip(self.nodes, self.weights, strict=True)]
        return self._tensor(samples, count(self.exact).sum(1), x.shape)

    def on(self, grid: Tensor, width: float, *, log: bool = False, include_exact: bool = True) -> TensorEstimate:
        """The density on a grid, smoothed by a Gaussian: eigenvalues per unit, or per decade.

        A node that is no eigenvalue yet (its residual is more than `width`) stands for all in the gaps around
        it, and is spread by half their mean where that is more than `width`.

        Args:
            grid: where, `[g]`; positive if `log`.
            width: standard deviation of the Gaussian, in units of the grid, or in decades if `log`.
            log: smooth in `log10 lambda`. Eigenvalues that are not positive have no place there.
            include_exact: whether the given eigenvalues take part.

        Returns:
            TensorEstimate `[g]`; over a line it integrates to n (to the number of positive ones if `log`).

        Raises:
            ValueError: if width is not positive, the grid not one-dimensional, or not positive with `log`.
        """
        grid = torch.as_tensor(grid, dtype=torch.float64, device=self.nodes.device)
        if grid.ndim != 1 or not width > 0:
            raise ValueError(f"grid has shape {tuple(grid.shape)}, width is {width}; expected [g] and width > 0")
        if log and not bool((grid > 0).all()):
            raise ValueError("grid holds values that are not positive; with log=True take torch.logspace")
        places = (grid.log10() if log else grid).unsqueeze(1)

        def kernel(values: Tensor, spread: Tensor) -> Tensor:
            shown = values > 0 if log else torch.ones_like(values, dtype=torch.bool)
            at = torch.where(shown, values, 1.0).log10() if log else values
            return torch.exp(-((places - at) / spread).square() / 2) * shown / (spread * math.tau**0.5)

        samples = [
            kernel(nodes, self._spread(i, width, log)) @ w
            for i, (nodes, w) in enumerate(zip(self.nodes, self.weights, strict=True))
        ]
        exact = kernel(self.exact, torch.full_like(self.exact, width)).sum(1)
        return self._tensor(samples, exact if include_exact else torch.zeros_like(exact), grid.shape)

    def plot(self, ax: "Axes | None" = None, **kwargs: Any) -> "Axes":
        """Draw the density on a logarithmic axis; `kwargs` go to `fipgeo.plotting.plot_density`."""
        from fipgeo import plotting

        return plotting.plot_density(self, ax=ax, **kwargs)

    @property
    def _share(self) -> float:
        """The part of the squared error that a frame of p out of N orthonormal probes leaves."""
        outside = self.dim - len(self.exact)
        return 1 - self.num_probes / outside if outside else 0.0

    def _mean(self, samples: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard error over the probes, `[p, ...]` to `[...]`."""
        if not len(samples):
            return samples.sum(0), samples.sum(0)
        if self._share == 0:
            return samples.mean(0), torch.zeros_like(samples[0])
        if len(samples) == 1:
            return samples[0], torch.full_like(samples[0], math.nan)
        return samples.mean(0), samples.std(0) * (self._share / len(samples)) ** 0.5

    def _of_sums(self, f: Callable, g: Callable, combine: Callable) -> Estimate:
        """A function of two spectral sums over positive eigenvalues; its error by the jackknife over probes."""
        exact, nodes = self.exact.clamp(min=0), self.nodes.clamp(min=0)
        a, b = ((self.weights * h(nodes)).sum(1) for h in (f, g))
        a0, b0 = f(exact).sum(), g(exact).sum()
        p = self.num_probes
        whole_a, whole_b = a0 + a.sum() / max(1, p), b0 + b.sum() / max(1, p)
        if float(whole_a) == 0:
            return self._estimate(0.0, 0.0)
        if p > 1:
            without = combine(a0 + (a.sum() - a) / (p - 1), b0 + (b.sum() - b) / (p - 1))
            error = float(without.std(correction=0)) * (self._share * (p - 1)) ** 0.5
        else:
            error = 0.0 if self._share == 0 else math.nan
        return self._estimate(float(combine(whole_a, whole_b)), error)

    def _estimate(self, value: float, error: float) -> Estimate:
        if not self.ok:
            return Estimate(math.nan, math.nan, self.num_probes, self.num_products, self.outcome)
        if not math.isfinite(value):
            return Estimate(value, math.nan, self.num_probes, self.num_products, Outcome.NOT_FINITE)
        return Estimate(value, error, self.num_probes, self.num_products)

    def _spread(self, probe: int, width: float, log: bool) -> Tensor:
        """Widths for the nodes of one probe, `[s]`: half the mean gap around nodes that are no eigenvalues yet."""
        spread = torch.full_like(self.nodes[probe], width)
        if self.residuals is None:
            return spread
        shown = (self.weights[probe] > 0) & ((self.nodes[probe] > 0) | (not log))
        at, residuals = self.nodes[probe, shown], self.residuals[probe, shown]
        if log:
            at, residuals = at.log10(), residuals / (at * math.log(10))
        if len(at) > 1:
            gaps = at.diff()
            around = (torch.cat([gaps[:1], gaps]) + torch.cat([gaps, gaps[-1:]])) / 2
            spread[shown] = torch.minimum(residuals, around / 2).clamp(min=width)
        return spread

    def _tensor(self, parts: list[Tensor], exact: Tensor, shape: torch.Size) -> TensorEstimate:
        """The record for what each probe sums to, `[g]` each, and the part of the known eigenvalues."""
        samples = torch.stack(parts) if parts else exact.new_zeros(0, len(exact))
        value, error = self._mean(samples)
        value, error = (value + exact).reshape(shape), error.reshape(shape)
        if not self.ok:
            value = error = torch.full_like(value, math.nan)
        return TensorEstimate(value, error, self.num_probes, self.num_products, self.outcome)


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

    Example:
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
