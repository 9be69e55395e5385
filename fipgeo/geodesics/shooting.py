"""The geodesic between two points: shots from the one, each aimed by where the last one ended."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fipgeo.field import MetricField
from fipgeo.geodesics.chart import Chart, as_chart
from fipgeo.geodesics.driver import default_damping, geodesic
from fipgeo.geodesics.flow import Flow
from fipgeo.geodesics.record import Geodesic
from fipgeo.linalg import Outcome
from fipgeo.metrics import Metric

SMALLEST = 2.0**-6
"""Steps of the aim below this share are a failure."""

STEPS_BACK = 2
"""On the way back few steps do: on them depends how many shots are needed, and not where they end."""


@dataclass(frozen=True, eq=False)
class Shot:
    """The geodesic of a boundary problem, or the nearest that was found.

    Attributes:
        path: The geodesic.
        velocity: theta' at its start for unit time, `[r]`: |velocity|_h is the length.
        gap: |end - target|_h, over the length.
        history: The gap of every shot.
        outcome: CONVERGED where the gap is at most what was asked for.
        message: What ended it, with the remedy.
        num_evaluations: Times that the geodesic equation was evaluated in all shots.
    """

    path: Geodesic
    velocity: Tensor = field(repr=False)
    gap: float
    history: Tensor = field(repr=False)
    outcome: Outcome
    message: str
    num_evaluations: int

    @property
    def ok(self) -> bool:
        """Whether the target was hit."""
        return self.outcome.ok

    @property
    def length(self) -> float:
        """Arc length in h from the start to the end; of the shortest geodesic the distance of the two points."""
        return float(self.path.lengths[-1])


def shoot(
    field: MetricField | Chart,
    start: Tensor | None,
    target: Tensor,
    *,
    damping: float | None = None,
    velocity: Tensor | None = None,
    tol: float = 1e-6,
    rtol: float | None = None,
    steps: int | None = None,
    max_shots: int = 40,
    max_steps: int = 1000,
) -> Shot:
    r"""The geodesic of h = g + lambda I from a point to another.

    With exp(v) the end of the geodesic that starts with velocity v, a shot misses by e = target - exp(v); e is carried
    back to the start by parallel transport along the same geodesic, P^{-1} e, and added to v. Where the metric is flat
    that hits at once. Where it is curved the misses of the last shots are combined (Anderson acceleration), and a shot
    that misses by more than the best one is taken back and half of the step is tried.

    There may be several geodesics between two points; found is the one near `velocity`, and it need not be the
    shortest. Where the weights of the two networks are far apart in h, raise the damping or go in pieces.

    Args:
        field: The metric as a function of the weights, or in the coordinates of a `Chart`.
        start: `[D]` (or coefficients `[r]`); None for the model's present weights (or zero coefficients).
        target: Where the geodesic is to end, `[D]` or `[r]`.
        damping: lambda (see `geodesic`).
        velocity: The first aim, its length included; None for target - start.
        tol: The gap to be reached, |end - target|_h over the length.
        rtol: Error of a step of the integrator (see `geodesic`); None for a hundredth of tol.
        steps: Equal steps of a shot; None for steps chosen by rtol.
        max_shots: Most shots.
        max_steps: Most steps of one.

    Returns:
        The geodesic and how it was found. Its `outcome` is MAX_ITERATIONS, STAGNATED or that of the geodesic that could
        not be followed where the target was not hit; the best shot is there.

    Raises:
        ValueError: Shapes, a target that is the start, or tol or max_shots that is not positive.
        TypeError: `field` is neither a `MetricField` nor a `Chart`.

    Source: Anderson, Iterative Procedures for Nonlinear Integral Equations (1965).

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> field = MetricField(net, torch.eye(2).double(), "euclidean")  # g = I / 2
        >>> found = shoot(field, torch.zeros(2), torch.tensor([3.0, 4.0]), damping=0.5)
        >>> found.ok, len(found.history), round(found.length, 6)  # flat: one shot
        (True, 1, 5.0)
    """
    chart = as_chart(field)
    c = (chart.start if start is None else start.detach()).to(chart.start)
    target = target.detach().to(c)
    for name, x in (("start", c), ("target", target), ("velocity", target if velocity is None else velocity)):
        if x.shape != (chart.dim,):
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected [{chart.dim}]")
    if not (tol > 0 and max_shots >= 1):
        raise ValueError(f"tol, max_shots: got {tol} and {max_shots}, expected a positive number and at least 1")
    here = chart.at(c)
    damping = default_damping(here) if damping is None else float(damping)
    flow = Flow(chart, damping)
    rtol = tol / 100 if rtol is None else rtol
    aim = (target - c if velocity is None else velocity.detach()).to(c)
    if not float(flow.norm(here, aim)) > 0:
        raise ValueError("target: it is the start, or the first velocity is zero; there is no direction to shoot in")
    options = {"rtol": rtol, "steps": steps, "max_steps": max_steps}
    return _Range(flow, here, c, target, options).search(aim, tol, max_shots)


@dataclass
class _Range:
    """Where shots are taken: both points, and what all shots have in common."""

    flow: Flow
    here: Metric
    start: Tensor
    target: Tensor
    options: dict[str, Any]
    num_evaluations: int = 0

    def search(self, aim: Tensor, tol: float, max_shots: int) -> Shot:
        """Shots until one hits, or none comes nearer."""
        best: tuple[float, Geodesic, Tensor] | None = None
        aims: list[Tensor] = []
        misses: list[Tensor] = []
        history, share = [], 1.0
        outcome, message = Outcome.MAX_ITERATIONS, f"{max_shots} shots were taken; raise max_shots, tol or damping"
        while len(history) < max_shots:
            path, gap = self._shot(aim)
            history.append(gap)
            if best is None or gap < best[0]:
                best = gap, path, aim
                if gap <= tol or not math.isfinite(gap):
                    break
                aims, misses = [*aims[-5:], aim], [*misses[-5:], self._carried_back(path)]
                share = min(2 * share, 1.0)
                aim = self._combined(aims, misses, share)
            else:
                share /= 2
                if share < SMALLEST:
                    outcome = Outcome.STAGNATED
                    message = (
                        "no shot near the best one comes nearer: the integrator's error is as large as the gap, or the"
                        " points are too far apart; lower rtol, raise tol or damping, or go in pieces"
                    )
                    break
                aims, misses = aims[-1:], misses[-1:]
                aim = self._combined(aims, misses, share)
        assert best is not None
        gap, path, aim = best
        if gap <= tol:
            outcome, message = Outcome.CONVERGED, f"the target was hit to {gap:.1e} of the length"
        elif not path.ok:
            outcome, message = path.outcome, f"the first shot could not be followed: {path.message}"
        return Shot(path, aim, gap, torch.tensor(history).double(), outcome, message, self.num_evaluations)

    def _shot(self, aim: Tensor) -> tuple[Geodesic, float]:
        """A geodesic, and by how much of its length it misses; infinite where it could not be followed."""
        length = float(self.flow.norm(self.here, aim))
        path = self._followed(self.start, aim, length, **self.options)
        if not path.ok:
            return path, math.inf
        off = self.flow.norm(self.flow.chart.at(path.end), self.target - path.end)
        return path, float(off) / length

    def _carried_back(self, path: Geodesic) -> Tensor:
        """The miss of a shot at its end, as a tangent at the start; as it is where the way back cannot be followed."""
        miss = self.target - path.end
        length = float(path.lengths[-1])
        back = self._followed(path.end, -path.velocities[-1], length, carry=miss[None], method="rk4", steps=STEPS_BACK)
        return back.carried[-1][0] if back.ok else miss

    def _followed(self, c: Tensor, velocity: Tensor, length: float, **options: Any) -> Geodesic:
        path = geodesic(self.flow.chart, c, velocity, length, damping=self.flow.damping, **options)
        self.num_evaluations += path.num_evaluations
        return path

    def _combined(self, aims: list[Tensor], misses: list[Tensor], share: float) -> Tensor:
        """The aim at which the misses would cancel if they were linear in it, and a share of what then is left."""
        aim, miss = aims[-1], misses[-1]
        if len(aims) == 1:
            return aim + share * miss
        moves, changes = (torch.stack([b - a for a, b in zip(x, x[1:], strict=False)]) for x in (aims, misses))
        rows = torch.cat([changes, miss[None]])
        images = self.here.root(rows).double()
        gram = images @ images.T / self.here.num_examples + self.flow.damping * rows.double() @ rows.double().T
        weights = torch.linalg.lstsq(gram[:-1, :-1], gram[:-1, -1:], driver="gelsd").solution[:, 0].to(aim)
        return aim - weights @ moves + share * (miss - weights @ changes)
