r"""The metric of weight space: how much the outputs change when the weights move.

    z = phi(F(theta)) [N, M]      R = dz/dtheta [N * M, D]      g = R^T R / N [D, D]

`<u, v>_g` is the mean over the N inputs of the inner product of the output changes along u and v. `MetricField` is g as
a function of the weights; `Metric` is its value at one point, and is closed under pullback to a basis.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import Batches, Generator, as_batches, as_generator
from fipgeo.jacobian import MAX_BYTES, EmbeddedOutputs, JacobianRoot, inner_products
from fipgeo.linalg import (
    Dense,
    DualFactor,
    Estimate,
    Gram,
    LinearOperator,
    Solution,
    Spectrum,
    cg,
    cholesky,
    dense_eigh,
    dual_eigh,
    lanczos,
)
from fipgeo.linalg import trace as hutchinson_trace
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.outputs import Geometry, as_geometry
from fipgeo.space import WeightSpace, Where

SMALL = 4096
"""Dense factorisations are made up to this size (a float64 matrix of 128 MiB)."""


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
        self._factor: DualFactor | None = None
        self._gram: Tensor | None = None
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

    def solve(self, rhs: Tensor, damping: float, *, method: str = "auto", rtol: float | None = None) -> Solution:
        """(g + damping I) x = rhs.

        Args:
            rhs: `[..., D]`; a stack is solved at once.
            damping: Positive, in the units of g's eigenvalues.
            method: "dual" (factor the N M x N M Gram, then any damping and right-hand side is cheap), "dense" (factor
                g), "cg", or "auto": the smaller factorisation if one is at most 4096 wide, else conjugate gradients.
            rtol: For "cg", the relative residual asked for; None for 1e-6, or what single precision allows.

        Returns:
            A record with the solution, a verdict and the true relative residual.

        Raises:
            ValueError: damping is not positive (g is singular), or the method is unknown.

        Examples:
            >>> g = Metric(Dense(torch.tensor([[3.0, 0.0]])), num_examples=1)
            >>> g.solve(torch.tensor([10.0, 1.0]), damping=1.0).value
            tensor([1., 1.])
        """
        if not damping > 0:
            raise ValueError(
                f"damping: got {damping}, expected a positive number: g has rank at most {self.rank_bound} in"
                f" {self.dim} dimensions, so g alone has no inverse"
            )
        if method not in ("auto", "dual", "dense", "cg"):
            raise ValueError(f"method: got {method!r}, expected 'auto', 'dual', 'dense' or 'cg'")
        if method == "auto":
            method = "cg" if min(self.root.shape) > SMALL else "dual" if self.root.shape[0] <= self.dim else "dense"
        if method == "dual":
            return self.dual_factor().solve(rhs, damping)
        self._prepare()
        if method == "dense":
            return cholesky(self.operator, rhs, damping=damping)
        return cg(self.operator, rhs, damping=damping, rtol=rtol)

    def riemannian_gradient(self, covector: Tensor, damping: float) -> Solution:
        """The steepest direction in the damped metric: (g + damping I)^{-1} covector, for an ordinary gradient.

        Natural gradient when g is the Fisher (Amari, Natural Gradient Works Efficiently in Learning, 1998).
        """
        return self.solve(covector, damping)

    def dual_factor(self) -> DualFactor:
        """The eigen-decomposed Gram R R^T, made once: damped solves and null-space projections for any damping."""
        if self._factor is None:
            self._factor = DualFactor(self.root, gram=self._dual_gram(), scale=1 / self.num_examples)
        return self._factor

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
            rtol: For "lanczos", the residual asked for, relative to the largest eigenvalue; None as for `solve`.
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
            method = (
                "lanczos" if min(self.root.shape) > SMALL else "dual" if self.root.shape[0] <= self.dim else "dense"
            )
        self._prepare()
        if method == "dual":
            found = dual_eigh(self.root, scale=1 / self.num_examples, k=k, gram=self._dual_gram())
        elif method == "dense":
            found = dense_eigh(self.operator, k)
        elif k is not None:
            found = lanczos(self.operator, k, rtol=rtol, generator=as_generator(generator))
        else:
            raise ValueError(
                f"k: all of up to {self.rank_bound} eigenvalues would need a {min(self.root.shape)}-wide factorisation;"
                " pass k, or method='dual' if there is memory for it"
            )
        found = replace(found, rank_bound=self.rank_bound)
        return found if held_out is None else self._with_held_out(found, held_out)

    def trace(self, *, num_samples: int = 32, generator: Generator = None) -> Estimate:
        """The trace of g, the mean over inputs of |dz/dtheta|^2: exact where R fits, else by random probes."""
        self._prepare()
        squares = _column_squares(self.root)
        if squares is not None:
            return Estimate(float(squares.sum()) / self.num_examples, 0.0, 0)
        return hutchinson_trace(self.operator, num_samples=num_samples, generator=as_generator(generator))

    def rank(self, tol: float | None = None) -> int:
        """Eigenvalues above tol (absolute; None for the rounding level of the largest one).

        Raises:
            ValueError: The metric is too large for a whole spectrum; ask `spectrum(k).rank(tol)` instead.
        """
        if self.root.shape[0] > min(self.dim, SMALL):
            return self.spectrum(None).rank(tol)
        self._prepare()
        found = dual_eigh(self.root, scale=1 / self.num_examples, gram=self._dual_gram(), vectors=False)
        return found.rank(tol)

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
        if rows * r * 8 <= MAX_BYTES and r <= min(self.dim, SMALL):
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
        if not isinstance(self.root, JacobianRoot):
            raise ValueError("on: this metric was made from a root, not from a model, so it knows no other inputs")
        f = self.root.function
        other = EmbeddedOutputs(f.map, f.geometry, as_batches(inputs, batch_size))
        root = JacobianRoot(other, self.root.theta, engine=self.root.engine, max_bytes=self.root.max_bytes)
        return Metric(root, root.survey.num_examples)

    def explain(self) -> str:
        """How products are computed, what that takes, and how far the rank is bounded."""
        return self.root.explain() if isinstance(self.root, JacobianRoot) else repr(self)

    def __repr__(self) -> str:
        return f"Metric(D={self.dim:,}, N={self.num_examples:,}, rank <= {self.rank_bound:,})"

    def _prepare(self) -> None:
        if isinstance(self.root, JacobianRoot):
            self.root.prepare()

    def _dual_gram(self) -> Tensor:
        if self._gram is None:
            if isinstance(self.root, JacobianRoot):
                return self.root.gram()
            rows = _rows(self.root)
            rows = self.root.to_dense() if rows is None else rows
            self._gram = inner_products(rows, rows)
        return self._gram

    def _with_held_out(self, found: Spectrum, held_out: Any) -> Spectrum:
        other = held_out if isinstance(held_out, Metric) else self.on(held_out)
        if other.dim != self.dim:
            raise ValueError(f"held_out: a metric in {other.dim} dimensions, expected {self.dim}")
        assert found.vectors is not None
        other._prepare()
        values = other.norm(found.vectors).square()
        captured = float(values.sum() / other.trace().value)
        return replace(found, held_out=values, captured=captured)


class MetricField:
    """g as a function of the weights: model, inputs and geometry, with the point left open.

    Args:
        model: Any module; evaluated in eval mode, never changed.
        inputs: Tensor `[N, ...]`, list of batches, or re-iterable loader (see `as_batches`). No labels are needed.
        geometry: How outputs are compared: "logits" (default), "categorical" (the Fisher), "bernoulli", "euclidean",
            "gaussian", "cosine", or a `Geometry`.
        params: Which parameters are coordinates: glob, globs, predicate, or None for all that require a gradient.
        batch_size: Examples in a batch when `inputs` is a tensor.
        forward_fn: (model, batch) -> raw outputs, for models with a signature of their own.
        output_fn: raw outputs -> the tensor or tensors to compare.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        geometry: str | Geometry = "logits",
        params: Where = None,
        *,
        batch_size: int | None = None,
        forward_fn: ForwardFn | None = None,
        output_fn: OutputFn | None = None,
    ) -> None:
        self.map = OutputMap(model, params, forward_fn=forward_fn, output_fn=output_fn)
        self.geometry = as_geometry(geometry)
        self.function = EmbeddedOutputs(self.map, self.geometry, as_batches(inputs, batch_size))

    @property
    def space(self) -> WeightSpace:
        """The weight space."""
        return self.map.space

    def at(self, theta: Tensor | None = None, *, engine: str = "auto", max_bytes: int = MAX_BYTES) -> Metric:
        """The metric at a flat point `[D]`; at the model's present weights when None."""
        theta = self.map.point() if theta is None else theta
        root = JacobianRoot(self.function, theta, engine=engine, max_bytes=max_bytes)
        return Metric(root, root.survey.num_examples)

    def on(self, batches: Batches) -> MetricField:
        """The same field on other inputs."""
        out = object.__new__(MetricField)
        out.map, out.geometry = self.map, self.geometry
        out.function = EmbeddedOutputs(self.map, self.geometry, batches)
        return out


def metric(
    model: nn.Module,
    inputs: Any,
    *,
    geometry: str | Geometry = "logits",
    params: Where = None,
    batch_size: int | None = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    engine: str = "auto",
    max_bytes: int = MAX_BYTES,
) -> Metric:
    """The metric of a model at its present weights, g = R^T R / N with R = d phi(F(theta)) / d theta.

    Args:
        model: See `MetricField`.
        inputs: See `MetricField`.
        geometry: See `MetricField`.
        params: See `MetricField`.
        batch_size: See `MetricField`.
        forward_fn: See `MetricField`.
        output_fn: See `MetricField`.
        engine: How products are computed, "auto", "autodiff" or "materialised" (see `JacobianRoot`).
        max_bytes: Most memory that rows of R may take.

    Returns:
        The metric. Later changes of the chosen weights do not move it; the model's other parameters and its buffers are
        read at every product, so leave those alone while the metric is in use.

    Raises:
        ValueError: Bad inputs, patterns, outputs or modes; the message names the cure.
        TypeError: `model` is no module, or `inputs` can be passed over only once.

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> g = metric(net, torch.eye(3), geometry="euclidean")
        >>> round(g.trace().value, 6), g.rank()
        (4.0, 6)
    """
    field = MetricField(
        model, inputs, geometry, params, batch_size=batch_size, forward_fn=forward_fn, output_fn=output_fn
    )
    return field.at(engine=engine, max_bytes=max_bytes)


def _column_squares(root: LinearOperator) -> Tensor | None:
    """The diagonal of R^T R where R is held in memory."""
    if isinstance(root, JacobianRoot):
        return root.column_squares()
    return root.matrix.double().square().sum(0) if isinstance(root, Dense) else None


def _rows(root: LinearOperator) -> Tensor | None:
    """R as a matrix if it is in memory already."""
    if isinstance(root, JacobianRoot):
        root = root.rows if root.rows is not None else root
    return root.matrix if isinstance(root, Dense) else None
