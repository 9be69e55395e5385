"""The record of a spectral density: counts, sums and ranks with their errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fipgeo.linalg._system import require_damping
from fipgeo.linalg.result import Estimate, Outcome, TensorEstimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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

    Examples:
        >>> from fipgeo.linalg import Diagonal, lanczos_density
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
        """The size below which an eigenvalue is rounding or is not told from zero.

        That is `eps max(10, s) max |lambda|`, or more where the smallest positive node of a probe has a residual
        that reaches zero: it may stand for zeros.
        """
        shown = self.weights > 0
        sizes = torch.cat([self.nodes[shown].abs(), self.exact.abs()])
        floor = self.eps * max(10, *self.nodes.shape[1:]) * (float(sizes.max()) if len(sizes) else 0.0)
        if self.residuals is None or not self.nodes.numel():
            return floor
        positive = torch.where(shown & (self.nodes > 0), self.nodes, math.inf)
        least, index = positive.min(1)
        reach = self.residuals.gather(1, index[:, None])[:, 0] >= least
        return max(floor, float(torch.where(reach & least.isfinite(), least, 0.0).max()))

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

        A node next to x that is no eigenvalue yet (its residual reaches x) may stand for some on the other side.
        The rule bounds the count by the weights of the two neighbours; the error holds `weight / 12^1/2` of
        those in doubt besides the spread of the probes.

        Args:
            x: one bound or many `[...]`.
            above: count those above instead.
        """
        x = torch.as_tensor(x, dtype=torch.float64, device=self.nodes.device)
        bounds = x.reshape(-1, 1)

        def count(values: Tensor) -> Tensor:
            return (values > bounds if above else values <= bounds).double()

        samples = [count(nodes) @ w for nodes, w in zip(self.nodes, self.weights, strict=True)]
        doubt = [self._doubt(i, bounds[:, 0]) for i in range(self.num_probes)]
        return self._tensor(samples, count(self.exact).sum(1), x.shape, doubt)

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

    def _doubt(self, probe: int, bounds: Tensor) -> Tensor:
        """Weights next to each bound `[g]`, on either side, of nodes whose residuals reach it."""
        if self.residuals is None:
            return torch.zeros_like(bounds)
        shown = self.weights[probe] > 0
        at, weights, residuals = (part[probe, shown] for part in (self.nodes, self.weights, self.residuals))
        index = torch.searchsorted(at, bounds, right=True)
        ends = at.new_tensor([math.inf])
        at, none = torch.cat([-ends, at, ends]), torch.zeros_like(ends)
        weights, residuals = (torch.cat([none, part, none]) for part in (weights, residuals))
        reached = torch.stack([(bounds - at[i]).abs() <= residuals[i] for i in (index, index + 1)])
        return weights[index] * reached[0] + weights[index + 1] * reached[1]

    def _tensor(
        self, parts: list[Tensor], exact: Tensor, shape: torch.Size, doubt: list[Tensor] | None = None
    ) -> TensorEstimate:
        """The record for what each probe sums to, `[g]` each, and the part of the known eigenvalues."""
        samples = torch.stack(parts) if parts else exact.new_zeros(0, len(exact))
        value, error = self._mean(samples)
        if doubt:
            error = (error.square() + torch.stack(doubt).square().mean(0) / 12).sqrt()
        value, error = (value + exact).reshape(shape), error.reshape(shape)
        if not self.ok:
            value = error = torch.full_like(value, math.nan)
        return TensorEstimate(value, error, self.num_probes, self.num_products, self.outcome)
