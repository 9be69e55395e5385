"""The best tau for square loss, without epochs or learning rates: one linear system, solved to a stated gap."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import as_batches
from fipgeo.jacobian import MAX_BYTES, EmbeddedOutputs, JacobianRoot
from fipgeo.jacobian.dual import Dual
from fipgeo.jacobian.routes import cheapest_solver
from fipgeo.linalg import Gram, LinearOperator, Outcome, Solution, cg
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.outputs import Euclidean
from fipgeo.tangent.losses import scaled_targets
from fipgeo.tangent.model import TangentModel


@dataclass(frozen=True)
class Fit:
    """How a fit ended.

    Attributes:
        objective: Loss and ridge together at the tau that was found.
        gap: No tau has an objective below `objective - gap`; measured at the end, infinite without a ridge.
        start: The objective at tau = 0.
        outcome: Of the solve; its message says what helps if it did not converge.
        num_products: Products with J^T J, each about five forward passes over the data or less.
        method: "cg", or "dual" where J J^T was factored; J is made for that by as many backward passes over the data
            as an example has outputs.
    """

    objective: float
    gap: float
    start: float
    outcome: Outcome
    num_products: int
    method: str

    @property
    def ok(self) -> bool:
        """Whether the gap that was asked for is reached."""
        return self.outcome.ok


def fit_square_(
    model: TangentModel,
    data: Any,
    *,
    kappa: float = 15.0,
    ridge: float = 1e-5,
    gap: float = 1e-3,
    method: str = "auto",
    max_iters: int | None = None,
    penalty: LinearOperator | None = None,
    batch_size: int | None = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    max_bytes: int = MAX_BYTES,
) -> Fit:
    r"""Write the tau into a model that minimises `rescaled_square_loss` on all data, plus ridge |tau|^2.

    P(tau) = 1/(N C) |f_0 + J tau - kappa e_y|^2 + ridge |tau|^2 is quadratic with its minimum where
    (J^T J / (N C) + ridge) tau = J^T (kappa e_y - f_0) / (N C). Conjugate gradients find it by products with J and its
    transpose, preconditioned by the diagonal of the system where the root holds it; or J J^T `[NC, NC]` is factored
    (the dual system), and products with J refine the solution.
    P is strongly convex by 2 ridge, so with the residual r of that system P - min P <= |r|^2 / ridge: the iteration
    stops where this bound is below what was asked for.

    A penalty adds tau^T M tau. With M the metric of other inputs a component leaves the outputs there as they are, and
    the sum of components does what each of them does alone. Where M stands for the data of all others,
    M = sum_{j != i} J_j^T J_j / (N_i C), the sum is the tangent model of all data together with the ridge N_i / N of
    the components': every component solves the joint system for its own right-hand side.

    Args:
        model: A tangent model; its tau is where the search starts, and is overwritten.
        data: Examples with labels: `(x, y)` tensors, a list of batches `(x, y)`, or a re-iterable loader of them. x is
            what the module takes, a mapping for keywords. y as in `rescaled_square_loss`.
        kappa: Score of the right class.
        ridge: Weight of |tau|^2.
        gap: Share of the objective at tau = 0 that P may lie above its minimum; without a ridge there is no such bound,
            and it is the size of r relative to the right-hand side at which the iteration stops.
        method: "cg", "dual" (which needs a ridge), or "auto": what the estimates of `JacobianRoot.explain` call
            cheaper, the dual system with a ridge and without `max_iters` only.
        max_iters: Most iterations of "cg"; see `fipgeo.linalg.cg`.
        penalty: M, a positive semi-definite operator on the trainable coordinates `[D]`, such as
            `beta * fipgeo.metric(model.base, inputs, params=model.names).operator`; "cg" then.
        batch_size: Examples in a batch when `data` is tensors.
        forward_fn: (module, batch) -> raw outputs, for a module with a signature of its own.
        output_fn: Raw outputs -> the tensor `[n, ..., C]` that is compared with the labels.
        max_bytes: Most memory that products may hold between iterations.

    Returns:
        What was reached, and whether it is what was asked for; tau is written in any case.

    Raises:
        ValueError: ridge is negative, gap is not positive, the method is unknown or fits neither ridge nor penalty, the
            penalty is no psd operator on these coordinates, the data has no labels, or the module returns several
            tensors.

    Examples:
        >>> x = torch.eye(3)
        >>> model = TangentModel(torch.nn.Linear(3, 3).to(x.dtype))
        >>> fit = fit_square_(model, (x, torch.arange(3)), kappa=1.0, gap=1e-6)
        >>> fit.ok, model(x).argmax(1)
        (True, tensor([0, 1, 2]))
    """
    if not (ridge >= 0 and math.isfinite(ridge)) or not gap > 0:
        raise ValueError(f"ridge, gap: got {ridge} and {gap}, expected a ridge of at least 0 and a gap above 0")
    if method not in ("auto", "cg", "dual") or (method == "dual" and not ridge):
        raise ValueError(
            f"method: got {method!r} with ridge={ridge:g}; expected 'auto', 'cg', or 'dual' with a ridge > 0"
        )
    dim = model.space.dim
    if penalty is not None and (method == "dual" or not penalty.psd or penalty.shape != (dim, dim)):
        raise ValueError(
            f"penalty: got a {'psd ' if penalty.psd else ''}operator {list(penalty.shape)} with method={method!r};"
            f" expected a psd operator [{dim}, {dim}] and 'cg', for instance"
            " beta * fipgeo.metric(model.base, inputs, params=model.names).operator"
        )
    names = frozenset(model.names)
    output_map = OutputMap(model.base, lambda n, _: n in names, forward_fn=forward_fn, output_fn=output_fn)
    function = EmbeddedOutputs(output_map, Euclidean(), as_batches(data, batch_size, "data"))
    theta = output_map.point()
    root = JacobianRoot(function, theta, max_bytes=max_bytes)
    wanted = torch.cat([part.reshape(-1) for part in lacking(function, theta, kappa)]).to(root.dtype)
    count = len(wanted)
    rhs = root.adjoint(wanted) / count
    begin, size = float(wanted.double().square().sum()) / count, float(rhs.norm())
    rtol = min(math.sqrt(ridge * gap * begin) / size if size and ridge else gap, 1.0)
    if method == "auto":
        method = "cg" if not ridge or max_iters is not None or penalty is not None else _cheaper(root, rhs, ridge, rtol)
    if method == "dual":
        found = Dual(root, 1 / root.shape[0]).solve(rhs, ridge, rtol=rtol)
    else:
        found = _by_products(model, root, rhs, ridge, rtol, max_iters, penalty)
    tau = found.value
    model.assign_(model.space.unravel(tau.to(model.space.dtype)))
    rest = (wanted - root(tau)).double().square().sum() / count
    moved = ridge * tau.double().square().sum()
    if penalty is not None:
        moved = moved + tau.double() @ penalty(tau.to(penalty.dtype)).double()
    residual = float(found.residual) * size
    return Fit(
        float(rest + moved),
        residual**2 / ridge if ridge else math.inf,
        begin,
        found.outcome,
        found.num_products if method == "cg" else 0,
        method,
    )


def _cheaper(root: JacobianRoot, rhs: Tensor, ridge: float, rtol: float) -> str:
    """The cheaper method, if conjugate gradients take the sqrt(kappa) / 2 log(2 / rtol) iterations of their bound.

    kappa, the condition number, is known from below, by the curvature along the right-hand side.
    """
    size = float(rhs.norm())
    curvature = float(root(rhs).norm()) ** 2 / (root.shape[0] * size**2) if size else 0.0
    iterations = math.sqrt(1 + curvature / ridge) / 2 * math.log(2 / rtol)
    return "dual" if cheapest_solver(root, 1, 1, iterations) == "dual" else "cg"


def _by_products(
    model: TangentModel,
    root: JacobianRoot,
    rhs: Tensor,
    ridge: float,
    rtol: float,
    max_iters: int | None,
    penalty: LinearOperator | None,
) -> Solution:
    """Conjugate gradients from the tau that the model has."""
    start = model.space.ravel({n: t.detach() for n, t in model.tangents().items()})
    root.prepare()
    count = root.shape[0]
    system: LinearOperator = Gram(root, 1 / count)
    return cg(
        system if penalty is None else system + penalty,
        rhs,
        damping=ridge,
        rtol=rtol,
        max_iters=max_iters,
        preconditioner=_inverse_diagonal(root, count, ridge),
        x0=start.to(rhs) if bool(start.any()) else None,
    )


def _inverse_diagonal(root: JacobianRoot, count: int, ridge: float) -> Callable[[Tensor], Tensor] | None:
    """Division by the diagonal of J^T J / (N C) + ridge, where the engine in use holds it."""
    squares = root.column_squares()
    if squares is None:
        return None
    diagonal = squares / count + ridge
    least = max(1e-6 * float(diagonal.mean()), torch.finfo(root.dtype).tiny)
    diagonal = diagonal.clamp_min(least).to(root.dtype)
    return lambda r: r / diagonal


def lacking(function: EmbeddedOutputs, theta: Tensor, kappa: float) -> Iterator[Tensor]:
    """What outputs lack of their targets, batch by batch."""
    for batch, outputs in function.outputs(theta):
        if len(outputs) != 1:
            raise ValueError(
                f"data: the module returned {len(outputs)} tensors; pick one with output_fn=lambda out: ..."
            )
        if not (isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)):
            raise ValueError(f"data: got a batch of type {type(batch).__name__}; expected (x, y) with labels y")
        yield scaled_targets(batch[1].to(outputs[0].device), outputs[0], kappa) - outputs[0]
