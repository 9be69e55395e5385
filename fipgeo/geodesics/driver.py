"""Following a geodesic: steps, error control and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fipgeo.field import MetricField
from fipgeo.geodesics.chart import Chart, as_chart
from fipgeo.geodesics.flow import Flow, Slope
from fipgeo.geodesics.record import Geodesic
from fipgeo.geodesics.tableaux import TABLEAUX, Tableau
from fipgeo.linalg import Outcome
from fipgeo.metrics import Metric

SHARE = 1e-3
"""Damping where none is given, as a share of the mean of the eigenvalues of g that can be positive."""

SHORTEST = 1e-9
"""Steps below this share of the length are a failure."""


def geodesic(
    field: MetricField | Chart,
    theta: Tensor | None,
    velocity: Tensor,
    length: float,
    *,
    damping: float | None = None,
    method: str = "dopri5",
    steps: int | None = None,
    rtol: float | None = None,
    max_steps: int = 1000,
    carry: Tensor | None = None,
) -> Geodesic:
    r"""The geodesic of h = g + lambda I from a point in a direction.

        theta'' = -(g + lambda)^{-1} R^T z''[theta', theta'] / N,    |theta'|_h = 1

    No Christoffel symbols are formed: a slope takes one second derivative of the outputs along theta', and one damped
    solve. Vectors that are carried along cost a second derivative and a right-hand side each:
    w' = -(g + lambda)^{-1} R^T z''[theta', w] / N keeps their lengths and angles in h.

    Where outputs have a kink (ReLU, max pooling) the metric jumps, which no derivative sees: the curve goes on with its
    velocity, and |theta'|_h jumps with the metric. `Geodesic.speed_error` says by how much; between kinks it is
    conserved.

    Args:
        field: The metric as a function of the weights, or in the coordinates of a `Chart`.
        theta: The start, `[D]` (or coefficients `[r]`); None for the model's present weights (or zero coefficients).
        velocity: The direction at the start, `[D]` or `[r]`; its length does not matter.
        length: Arc length in h to be followed, in the units of the embedded outputs.
        damping: lambda >= 0, in the units of g's eigenvalues; None for a thousandth of the mean of those that can be
            positive, at the start. 0 takes the minimum-norm solution and needs R as rows.
        method: "dopri5" (order 5, with an error estimate) or "rk4" (order 4, fixed steps).
        steps: Equal steps; None for steps chosen so that the error of each stays below `rtol`.
        rtol: Error of a step in h, for a velocity of length 1; solves are asked for a hundredth of it. None for 1e-6,
            or 1e-4 in float32.
        max_steps: Most steps, rejected ones included.
        carry: Vectors `[k, D]` or `[k, r]` at the start, to be transported.

    Returns:
        The record. Its `outcome` is MAX_ITERATIONS, STAGNATED or NOT_FINITE where the length was not reached; what was
        followed until then is there.

    Raises:
        ValueError: Shapes, a zero velocity, a length, damping or number of steps that is not positive, an unknown
            method, or "rk4" without `steps`.
        TypeError: `field` is neither a `MetricField` nor a `Chart`.
        NotImplementedError: A module of the model has no second derivative.

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> path = geodesic(MetricField(net, torch.eye(2).double(), "euclidean"), None, torch.ones(2), 1.0)
        >>> path.ok, len(path), path.speed_error < 1e-12  # a linear model is flat: one step, straight
        (True, 2, True)
    """
    chart = as_chart(field)
    _check(method, steps, length, damping, max_steps)
    c = chart.start if theta is None else theta.detach()
    stack = _stack(chart, c, velocity, carry)
    c = c.to(stack)
    rtol = (1e-6 if stack.dtype == torch.float64 else 1e-4) if rtol is None else rtol
    here = chart.at(c)
    damping = default_damping(here) if damping is None else damping
    flow = Flow(chart, float(damping), rtol / 100 if stack.dtype == torch.float64 else None)
    speed = float(flow.norm(here, stack[0]))
    if not speed > 0:
        raise ValueError("velocity: its length in the metric is 0; give a direction that is not zero")
    stack[0] /= speed
    walk = _Walk(flow, TABLEAUX[method], length, rtol)
    outcome, message = walk.run(torch.cat([c[None], stack]), steps, max_steps)
    return walk.record(chart, outcome, message)


def default_damping(metric: Metric) -> float:
    """Lambda where none is given: a share of the mean of the eigenvalues that can be positive.

    Raises:
        ValueError: The metric is zero.
    """
    damping = SHARE * metric.trace().value / metric.rank_bound
    if not damping > 0:
        raise ValueError("damping: the metric is zero at the start, so it gives no scale; pass a positive number")
    return damping


@dataclass
class _Walk:
    """The state of an integration; y `[2 + k, r]` holds the point, the velocity and what is carried."""

    flow: Flow
    tableau: Tableau
    length: float
    rtol: float
    done: list[tuple[float, Tensor, Tensor]] = field(default_factory=list)
    num_evaluations: int = 0
    num_rejected: int = 0
    _last: tuple[Tensor, Slope] | None = None

    def run(self, y: Tensor, steps: int | None, max_steps: int) -> tuple[Outcome, str]:
        """Go on until the length is reached or a step fails."""
        at, slope = 0.0, self._look(y)
        h = self.length / steps if steps else self._first(slope)
        for count in range(1 + (steps or max_steps)):
            sound = _sound(slope, self.rtol)
            if not self.done or (sound and self.done[-1][0] != at):
                self.done.append((at, y, slope.gram))
            if not sound:
                return _failure(slope, at, self.rtol)
            left = self.length - at
            if left <= SHORTEST * self.length:
                return Outcome.CONVERGED, f"the whole length {self.length:.4g} was followed"
            if count == (steps or max_steps):
                break
            h = left if steps is None and h > left * (1 - 1e-6) else h
            new, gap = self.tableau.step(self._derivative, y, self._whole(y, slope), h)
            size = self._size(slope, y, gap) if steps is None else 0.0
            then = self._look(new) if size <= self.rtol else None
            if then is not None and (steps is not None or _sound(then, self.rtol)):
                at = self.length * (count + 1) / steps if steps else self.length if h == left else at + h
                y, slope = new, then
            else:
                self.num_rejected += 1
                size = math.inf if then is not None else size
            if steps is None:
                h *= min(max(0.9 * (self.rtol / size) ** (1 / self.tableau.order), 0.2), 5) if size else 5
                if h < SHORTEST * self.length:
                    return Outcome.STAGNATED, (
                        f"steps fell below {SHORTEST:g} of the length at arc length {at:.4g}: the outputs have a kink"
                        " there, or their curvature grows without bound; raise rtol or damping, or pass steps="
                    )
        return Outcome.MAX_ITERATIONS, (
            f"arc length {at:.4g} of {self.length:.4g} was reached in {max_steps} steps; raise max_steps, rtol or"
            " damping"
        )

    def record(self, chart: Chart, outcome: Outcome, message: str) -> Geodesic:
        """What was followed."""
        lengths = torch.tensor([at for at, _, _ in self.done], dtype=torch.float64)
        ys = torch.stack([y for _, y, _ in self.done])
        squares = torch.stack([gram[0, 0] for _, _, gram in self.done]).cpu()
        flat = ys[:, 1].double().square().sum(-1).cpu()
        return Geodesic(
            chart,
            self.flow.damping,
            lengths,
            ys[:, 0],
            ys[:, 1],
            (squares + self.flow.damping * flat).sqrt(),
            squares.sqrt(),
            ys[:, 2:],
            outcome,
            message,
            self.num_evaluations,
            self.num_rejected,
        )

    def _look(self, y: Tensor) -> Slope:
        """The equation at y; a pair has just evaluated it there."""
        if self._last is not None and torch.equal(self._last[0], y):
            return self._last[1]
        self.num_evaluations += 1
        slope = self.flow(y[0], y[1:])
        self._last = (y, slope)
        return slope

    def _derivative(self, y: Tensor) -> Tensor:
        return self._whole(y, self._look(y))

    def _whole(self, y: Tensor, slope: Slope) -> Tensor:
        return torch.cat([y[1:2], slope.change])

    def _size(self, slope: Slope, y: Tensor, gap: Tensor) -> float:
        """The largest error of a step in h: of the point, and of every vector beside its own length."""
        if not bool(torch.isfinite(gap).all()):
            return math.inf
        lengths = self.flow.norm(slope.metric, y[1:])
        return float((self.flow.norm(slope.metric, gap) / torch.cat([lengths[:1], lengths])).max())

    def _first(self, slope: Slope) -> float:
        """A first step over which the velocity turns little."""
        turn = float(self.flow.norm(slope.metric, slope.change[0])) if _sound(slope, self.rtol) else 0.0
        return min(self.length, self.rtol ** (1 / self.tableau.order) / turn) if turn > 0 else self.length


def _sound(slope: Slope, rtol: float) -> bool:
    """Whether the solve is good enough for the errors that are asked for."""
    return bool(torch.isfinite(slope.change).all()) and (slope.outcome.ok or slope.residual <= rtol)


def _failure(slope: Slope, at: float, rtol: float) -> tuple[Outcome, str]:
    if not bool(torch.isfinite(slope.change).all()):
        return Outcome.NOT_FINITE, (
            f"derivatives of the outputs are not finite at arc length {at:.4g}; take shorter steps or more damping"
        )
    return slope.outcome, (
        f"the damped solve at arc length {at:.4g} has a relative residual of {slope.residual:.1e}, above rtol"
        f" {rtol:.1e}: {slope.outcome.message}"
    )


def _stack(chart: Chart, c: Tensor, velocity: Tensor, carry: Tensor | None) -> Tensor:
    """The velocity and what is carried, `[1 + k, r]`, in the dtype of the coordinates."""
    for name, x in (("theta", c), ("velocity", velocity)):
        if x.shape != (chart.dim,):
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected [{chart.dim}]")
    if carry is not None and (carry.dim() != 2 or carry.shape[1] != chart.dim):
        raise ValueError(f"carry: got shape {list(carry.shape)}, expected [k, {chart.dim}]")
    like = chart.start
    rows = [velocity[None]] if carry is None else [velocity[None], carry]
    return torch.cat([row.detach().to(like) for row in rows])


def _check(method: str, steps: int | None, length: float, damping: float | None, max_steps: int) -> None:
    if method not in TABLEAUX:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, TABLEAUX))}")
    if steps is None and TABLEAUX[method].embedded is None:
        raise ValueError(f"steps: {method!r} has no error estimate; pass a number of steps, or method='dopri5'")
    if not (math.isfinite(length) and length > 0):
        raise ValueError(f"length: got {length}, expected a positive number; turn the velocity round to go back")
    if damping is not None and not (math.isfinite(damping) and damping >= 0):
        raise ValueError(f"damping: got {damping}, expected a number that is not negative, or None")
    if (steps is not None and steps < 1) or max_steps < 1:
        raise ValueError(f"steps: got steps={steps} and max_steps={max_steps}, expected at least 1")
