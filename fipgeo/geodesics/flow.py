r"""The right-hand side of the geodesic equation.

With the damping, the metric is that of a graph: h = g + lambda I is what the map

    theta  ->  (z(theta) / sqrt(N), sqrt(lambda) theta)        in R^(N M + D)

pulls back from the Euclidean metric. A vector field w along a curve theta(t) is parallel where the derivative of its
image has no tangential part, R^T (z''[theta', w] + R w') / N + lambda w' = 0:

    w' = -(g + lambda)^{-1} R^T z''[theta', w] / N

A geodesic carries its own velocity, theta' = w. Along it |theta'|_h and every `<w, w'>_h` are constant, since both are
Euclidean in the image; |theta'|_g alone is not, the damping takes part in the exchange.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fipgeo.geodesics.chart import Chart
from fipgeo.linalg import Outcome
from fipgeo.metrics import Metric


class Slope(NamedTuple):
    """What the equation says at a point.

    Attributes:
        metric: g there.
        change: w' of every vector of the stack, `[k, r]`.
        gram: Inner products of the stack in g, `[k, k]`.
        outcome: The verdict of the solve.
        residual: Its largest relative residual.
    """

    metric: Metric
    change: Tensor
    gram: Tensor
    outcome: Outcome
    residual: float


class Flow:
    """Parallel transport along a velocity, and so the geodesic equation.

    Args:
        chart: Coordinates.
        damping: lambda, in the units of g's eigenvalues; with 0 the minimum-norm solution is taken, which needs R as
            rows.
        rtol: Relative residual asked of the solves; None for what `Metric.solve` asks.
    """

    def __init__(self, chart: Chart, damping: float, rtol: float | None = None) -> None:
        self.chart, self.damping, self.rtol = chart, damping, rtol

    def __call__(self, c: Tensor, stack: Tensor) -> Slope:
        """How vectors `[k, r]` at c change as they are carried along the first of them."""
        taylor = self.chart.taylor(c, stack, stack[0])
        metric = self.chart.at(c)
        count = metric.num_examples
        first = taylor.first.double()
        gram = first @ first.T / count
        if not bool(torch.isfinite(taylor.second).all()):
            return Slope(metric, torch.full_like(stack, torch.nan), gram, Outcome.NOT_FINITE, torch.nan)
        if self.damping == 0:
            rows = metric.root.to_dense().double()
            change = -(torch.linalg.pinv(rows, rtol=max(rows.shape) * 1e-15) @ taylor.second.double().T).T
            return Slope(metric, change.to(stack), gram, Outcome.CONVERGED, 0.0)
        push = metric.root.adjoint(taylor.second.to(metric.root.dtype)) / count
        found = metric.solve(push, self.damping, rtol=self.rtol)
        return Slope(metric, -found.value.to(stack), gram, found.outcome, float(found.residual.max()))

    def norm(self, metric: Metric, v: Tensor) -> Tensor:
        """|v|_h at the metric's point, `[..., r]` to `[...]`."""
        squares = metric.norm(v).double().square() + self.damping * v.double().square().sum(-1)
        return squares.sqrt()
