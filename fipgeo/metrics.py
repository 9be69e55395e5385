r"""The metric of weight space: how much the outputs change when the weights move.

    z = phi(F(theta)) [N, M]      R = dz/dtheta [N * M, D]      g = R^T R / N [D, D]

`<u, v>_g` is the mean over the N inputs of the inner product of the output changes along u and v. `Metric` is g at one
point, closed under pullback to a basis; `MetricField` is g as a function of the weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Generator, as_batches, as_generator
from fipgeo.jacobian import MAX_BYTES, JacobianRoot, column_squares, routes
from fipgeo.jacobian.dual import Dual
from fipgeo.linalg import (
    Dense,
    Density,
    DualFactor,
    Estimate,
    Gram,
    LinearOperator,
    Outcome,
    Solution,
    Spectrum,
    TensorEstimate,
    cg,
    cholesky,
    dense_eigh,
    dual_eigh,
    lanczos_density,
    nystrom,
    root_lanczos,
)
from fipgeo.linalg import diagonal as estimate_diagonal
from fipgeo.linalg import trace as estimate_trace
from fipgeo.space import Where

METHODS = ("auto", "dual", "dense", "cg", "nystrom")
"""Ways to solve."""


class Metric:
    """g = R^T R / N at one point, on fixed inputs.

    Args:
        root: R, `[N * M, D]`.
        num_examples: N.

    Attributes:
        root: R.
        num_examples: N.
        operator: g as a `LinearOperator`, symmetric and positive semi-definite.

    Examples:
        >>> g = Metric(Dense(torch.tensor([[3.0, 0.0], [0.0, 4.0]])), num_examples=1)
        >>> float(g.norm(torch.tensor([1.0, 1.0])))
        5.0
    """

    def __init__(self, root: LinearOperator, num_examples: int) -> None:
        self.root, self.num_examples = root, num_examples
        self.operator: LinearOperator = Gram(root, 1 / num_examples)
        self._dual = Dual(root, 1 / num_examples)
        self._iterated = 0  # right-hand sides so far: a factor is made once these would have paid for it
        self._origin: tuple[Metric, LinearOperator] | None = None

    @property
    def dim(self) -> int:
        """D, or r after a pullback."""
        return self.root.shape[1]

    @property
    def rank_bound(self) -> int:
        """The rank cannot exceed the dimension, nor the dimensions along which the embedded outputs can change."""
        return self.root.rank_bound

    def matvec(self, v: Tensor) -> Tensor:
        """The product g v for a vector or a stack, `[..., D]` to `[..., D]`; a covector."""
        return self.operator(v)

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """`<u, v>_g = (R u) . (R v) / N`, a mean over inputs; `[D]`, `[D]` to a scalar."""
        ru, rv = self.root(torch.stack([u, v])).double()
        return (ru @ rv / self.num_examples).to(u.dtype)

    def norm(self, v: Tensor) -> Tensor:
        """|v|_g: root mean square, over inputs, of the change of the embedded outputs; `[..., D]` to `[...]`."""
        return self.root(v).norm(dim=-1) / self.num_examples**0.5

    def solve(
        self, rhs: Tensor, damping: float | Sequence[float] | Tensor, *, method: str = "auto", rtol: float | None = None
    ) -> Solution:
        """(g + damping I) x = rhs.

        Args:
            rhs: `[..., D]`; a stack is solved at once. In float64 on a float32 metric the algebra is float64, over rows
                of the float32 model where they are held.
            damping: Positive, in the units of g's eigenvalues; several `[p]` are solved from one factorisation or
                Krylov space, p being the first axis of the solution.
            method: "dual" (factor the N M x N M Gram, then any damping and right-hand side is cheap), "dense" (factor
                g), "cg" (conjugate gradients), "nystrom" (with a randomised low-rank preconditioner), or "auto": what
                `explain` calls cheapest for all right-hand sides so far; long iterations turn to a factor.
            rtol: The relative residual asked for; None for 1e-6, or what single precision allows.

        Returns:
            A record with the solution, a verdict and the true relative residual.

        Raises:
            ValueError: damping is not positive (g is singular), or the method is unknown.

        Examples:
            >>> g = Metric(Dense(torch.tensor([[3.0, 0.0]])), num_examples=1)
            >>> g.solve(torch.tensor([10.0, 1.0]), damping=1.0).value
            tensor([1., 1.])
            >>> g.solve(torch.tensor([10.0, 1.0]), damping=[1.0, 4.0]).value.shape
            torch.Size([2, 2])
        """
        numbers = torch.as_tensor(damping, dtype=torch.float64).reshape(-1).tolist()
        if not numbers or not all(number > 0 for number in numbers):
            raise ValueError(
                f"damping: got {damping}, expected a positive number: g has rank at most {self.rank_bound} in"
                f" {self.dim} dimensions, so g alone has no inverse"
            )
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, METHODS))}")
        count, limit = max(rhs.numel() // self.dim, 1), None
        if method == "auto":
            method = self._solver(self._iterated + count, len(numbers))
            limit = routes.patience(self.root, self._iterated + count, len(numbers)) if method == "cg" else None
        if method == "dual":
            return self._dual.solve(rhs, damping, rtol=rtol)
        if method == "dense":
            self._prepare(self.dim)
            if len(numbers) > 1:
                raise ValueError("method: 'dense' factors one damped matrix at a time; use 'dual' or 'cg' for several")
            return cholesky(self.operator, rhs, damping=numbers[0], rtol=rtol)
        self._prepare(routes.ITERATIONS * count)
        self._iterated += count
        if method == "nystrom":
            near = nystrom(self.operator, min(routes.SKETCH, self.dim)).preconditioner(min(numbers))
            return cg(self.operator, rhs, damping=damping, rtol=rtol, preconditioner=near)
        found = cg(self.operator, rhs, damping=damping, rtol=rtol, max_iters=limit)
        if limit and found.outcome is Outcome.MAX_ITERATIONS:
            other = self._dual.solve(rhs, damping, rtol=rtol)
            return replace(other, num_products=found.num_products + other.num_products)
        return found

    def riemannian_gradient(self, covector: Tensor, damping: float) -> Solution:
        """The steepest direction in the damped metric: (g + damping I)^{-1} covector, for an ordinary gradient.

        Natural gradient when g is the Fisher (Amari, Natural Gradient Works Efficiently in Learning, 1998).
        """
        return self.solve(covector, damping)

    def dual_factor(self) -> DualFactor:
        """The eigen-decomposed Gram R R^T, made once: damped solves and null-space projections for any damping."""
        return self._dual.factor

    def spectrum(
        self,
        k: int | None = None,
        *,
        method: str = "auto",
        held_out: Any = None,
        rtol: float | None = None,
        generator: Generator = None,
    ) -> Spectrum:
        """Eigenvalues of g, largest first, with eigenvectors and the residual of every pair.

        Args:
            k: How many; None for all that can be non-zero, which needs a dual or dense factorisation.
            method: "dual" (eigenvectors of R R^T mapped back), "dense", "lanczos", or "auto".
            held_out: Other inputs, or a `Metric` at the same point: the record then also holds how strongly *their*
                outputs feel the same directions, and the share of their trace that the directions capture. The null
                space of a small buffer is not the null space of the data; this says by how much.
            rtol: The residual asked for, relative to the largest eigenvalue; None as for `solve`, or all digits of a
                factorisation.
            generator: Start vector of "lanczos".

        Returns:
            The spectrum.

        Raises:
            ValueError: k is out of range, the method is unknown, or all eigenvalues are asked of a large metric.
        """
        if k is not None and not 1 <= k <= self.rank_bound:
            raise ValueError(
                f"k: got {k}, expected between 1 and {self.rank_bound}, the most that the rank of this metric can be"
            )
        if method not in ("auto", "dual", "dense", "lanczos"):
            raise ValueError(f"method: got {method!r}, expected 'auto', 'dual', 'dense' or 'lanczos'")
        if method == "auto":
            method = self._spectral(k, rtol)
        if method == "dual":
            found = None if self._dual.exact else routes.few_digits(self.root, k, rtol, 1 / self.num_examples)
            if found is None:
                wanted = self.rank_bound if k is None else k
                found = dual_eigh(self.root, scale=1 / self.num_examples, k=wanted, gram=self._dual.gram, rtol=rtol)
        elif method == "dense":
            self._prepare(self.dim)
            found = dense_eigh(self.operator, k)
        elif k is not None:
            self._prepare(routes.searched(k))
            source = as_generator(generator)
            found = root_lanczos(self.root, k, scale=1 / self.num_examples, rtol=rtol, generator=source)
        else:
            raise ValueError(
                f"k: all of up to {self.rank_bound} eigenvalues would need a {min(self.root.shape)}-wide factorisation;"
                " pass k, or method='dual' if there is memory for it"
            )
        found = replace(found, rank_bound=self.rank_bound)
        return found if held_out is None else self._with_held_out(found, held_out)

    def density(
        self, *, num_probes: int = 8, num_steps: int = 64, deflate: Spectrum | None = None, generator: Generator = None
    ) -> Density:
        """The spectral density of g by stochastic Lanczos quadrature, with error bars (see `linalg.lanczos_density`).

        Its `log_det(damping)`, `effective_dimension(damping)`, `effective_rank()` and counts of eigenvalues are
        estimates with standard errors. Passing `spectrum(k)` as `deflate` takes those eigenvalues as exact, which
        narrows the errors much where a few stand out.
        """
        self._prepare(num_probes * num_steps)
        settings: dict[str, Any] = {"num_probes": num_probes, "num_steps": num_steps, "deflate": deflate}
        return lanczos_density(self.operator, **settings, generator=as_generator(generator))

    def log_det(self, damping: float, *, generator: Generator = None) -> Estimate:
        """Log det(g + damping I): exact through the dual where that is cheap, else by quadrature with a standard error.

        Raises:
            ValueError: damping is not positive.
        """
        if not damping > 0:
            raise ValueError(f"damping: got {damping}, expected a positive number: g alone is singular")
        if self._spectral(None) == "dual":
            values = self.dual_factor().eigenvalues
            rest = (self.dim - len(values)) * math.log(damping)
            return Estimate(float((values + damping).log().sum()) + rest, 0.0, 0)
        return self.density(generator=generator).log_det(damping)

    def trace(self, *, num_products: int = 32, method: str = "auto", generator: Generator = None) -> Estimate:
        """The trace of g, the mean over inputs of |dz/dtheta|^2: exact where R is held, else estimated with an error.

        Args:
            num_products: Products to spend on an estimate.
            method: See `linalg.trace`.
            generator: Random vectors.
        """
        self._prepare(num_products)
        squares = column_squares(self.root)
        if squares is not None:
            return Estimate(float(squares.sum()) / self.num_examples, 0.0, 0)
        settings: dict[str, Any] = {"num_products": num_products, "method": method}
        return estimate_trace(self.operator, **settings, generator=as_generator(generator))

    def diagonal(self, *, num_products: int = 32, method: str = "auto", generator: Generator = None) -> TensorEstimate:
        """The diagonal of g, `[D]`: exact where R is held, else estimated; arguments as those of `trace`."""
        self._prepare(num_products)
        squares = column_squares(self.root)
        if squares is not None:
            exact = (squares / self.num_examples).to(self.root.dtype)
            return TensorEstimate(exact, torch.zeros_like(exact), 0)
        settings: dict[str, Any] = {"num_products": num_products, "method": method}
        return estimate_diagonal(self.operator, **settings, generator=as_generator(generator))

    def rank(self, tol: float | None = None) -> int:
        """Eigenvalues above tol (absolute; None for the rounding level of the largest one).

        Raises:
            ValueError: The metric is too large for a whole spectrum; ask `spectrum(k).rank(tol)` instead.
        """
        if self._spectral(None) != "dual":
            return self.spectrum(None).rank(tol)
        found = dual_eigh(self.root, scale=1 / self.num_examples, gram=self._dual.gram, vectors=False)
        return found.rank(tol)

    def restrict(self, params: Where) -> Metric:
        """The metric on some of the weights with all others held fixed: diagonal blocks of g.

        Args:
            params: Glob, globs or predicate on parameter names (see `WeightSpace`).

        Raises:
            ValueError: No parameter fits, or this metric was not made from a model.
        """
        root = self._of_model("restrict")
        root.prepare()
        return Metric(root.restricted(params), self.num_examples)

    def blocks(self, by: str = "module") -> dict[str, Metric]:
        """One restricted metric for every module that owns weights, or for every parameter tensor.

        Args:
            by: "module" or "parameter".

        Raises:
            ValueError: `by` is neither, or this metric was not made from a model.

        Examples:
            >>> from fipgeo import metric
            >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
            >>> blocks = metric(net, torch.eye(3), geometry="euclidean").blocks()
            >>> {name: (g.dim, g.rank()) for name, g in blocks.items()}
            {'0': (16, 6), '2': (10, 6)}
        """
        if by not in ("module", "parameter"):
            raise ValueError(f"by: got {by!r}, expected 'module' or 'parameter'")
        groups: dict[str, list[str]] = {}
        for name in self._of_model("blocks").function.map.space.shapes:
            groups.setdefault(name.rpartition(".")[0] if by == "module" else name, []).append(name)
        return {key: self.restrict(lambda name, _, own=frozenset(names): name in own) for key, names in groups.items()}

    def pullback(self, basis: LinearOperator) -> Metric:
        """B^T g B, the metric on the coefficients of a basis B `[D, r]`.

        R B is formed before anything is squared: by r forward products when it fits in memory, else lazily.

        Raises:
            ValueError: B does not map into this metric's space.
        """
        if basis.shape[0] != self.dim:
            raise ValueError(f"basis: got shape {list(basis.shape)}, expected [{self.dim}, r]")
        rows, r = self.root.shape[0], basis.shape[1]
        product = self.root @ basis
        if rows * r * 8 <= MAX_BYTES and r <= min(self.dim, routes.SMALL):
            product = Dense(product.to_dense())
        pulled = Metric(product, self.num_examples)
        pulled._origin = (self, basis)
        return pulled

    def on(self, inputs: Any, *, batch_size: int | None = None) -> Metric:
        """The metric at the same point on other inputs, in the same geometry.

        Raises:
            ValueError: This metric was not made from a model.
        """
        if self._origin is not None:
            base, basis = self._origin
            return base.on(inputs, batch_size=batch_size).pullback(basis)
        own = self._of_model("on")
        other = own.function.renewed(as_batches(inputs, batch_size))
        root = JacobianRoot(other, own.theta, engine=own.engine, max_bytes=own.max_bytes)
        return Metric(root, root.survey.normaliser)

    def explain(self) -> str:
        """How products are computed, what every engine would take, and which way solves and spectra go."""
        if not isinstance(self.root, JacobianRoot):
            return repr(self)
        solve, few = self._solver(1, 1), self._spectral(min(20, self.rank_bound))
        return (
            f"{self.root.explain()}\nK = R R^T takes {self.root.costs.gram / self.root.costs.forward:.1f} forward"
            f" passes; a damped solve goes by {solve!r}, up to 20 eigenpairs by {few!r}"
        )

    def __repr__(self) -> str:
        return f"Metric(D={self.dim:,}, N={self.num_examples:,}, rank <= {self.rank_bound:,})"

    def _of_model(self, method: str) -> JacobianRoot:
        if not isinstance(self.root, JacobianRoot):
            raise ValueError(f"{method}: this metric was made from a root, not from a model, which it would need")
        return self.root

    def _prepare(self, products: int) -> None:
        if isinstance(self.root, JacobianRoot):
            self.root.prepare(products)

    def _solver(self, count: int, dampings: int) -> str:
        """The cheapest way to solutions; the dual one once its matrix is there."""
        return "dual" if self._dual.ready else routes.cheapest_solver(self.root, count, dampings)

    def _spectral(self, k: int | None, rtol: float | None = None) -> str:
        """The cheapest way to eigenpairs; the dual one once its matrix is there."""
        return "dual" if self._dual.exact else routes.cheapest_spectrum(self.root, k, rtol)

    def _with_held_out(self, found: Spectrum, held_out: Any) -> Spectrum:
        other = held_out if isinstance(held_out, Metric) else self.on(held_out)
        if other.dim != self.dim:
            raise ValueError(f"held_out: a metric in {other.dim} dimensions, expected {self.dim}")
        assert found.vectors is not None
        other._prepare(len(found.vectors))
        values = other.norm(found.vectors).square()
        captured = float(values.sum() / other.trace().value)
        return replace(found, held_out=values, captured=captured)
