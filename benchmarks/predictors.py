"""Steps that keep a network's outputs: how much farther one goes that knows the curvature.

A network is moved by a given length along a wish d that is projected at every step to what its outputs do not feel,
v = mu (g + mu)^{-1} d brought to length 1, in n equal steps h:

| method | step | solves a step |
| --- | --- | --- |
| first order | h v | 1 |
| second order | h v + h^2 a / 2, a = -(g + mu)^{-1} R^T z''[v, v] / N, the acceleration of the geodesic | 2 |
| rough second order | the same, with a solved by conjugate gradients to a relative residual of 0.1 only | 2 |
| chord | h v + w, w = -(g + mu)^{-1} R^T (z(theta + h v) - z(theta) - h R v) / N | 2 |
| rough chord | the same, with w solved as roughly | 2 |

`drift` is that of the outputs on the inputs which the metric is made of, at the end of the way, in units of their
spread. A metric product is one product of g with a vector: those that conjugate gradients take for each solve at the
start of the way (to a relative residual of 1e-3), and two more for each z''[v, v] or z(theta + h v). The length is the
one at which a single step of first order drifts by a tenth of the spread. `saved_products` compares a method,
with as many steps as the name says, to first order at the same drift: the number of its steps is interpolated
between those measured, and where even the most of them drift by more, the figure is a lower bound and `bound` is true.
`saved_metrics` counts the points at which a metric is made, where a factor of it makes every further solve cheap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks import pretrained
from fipgeo.linalg import Gram, cg
from fipgeo.paths import Kept, Position
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.verdict import spread_of

NETWORKS = {
    "predictor/lenet5": "sfd_mnist_lenet5",
    "predictor/resnet8": "kd_cifar10_resnet8",
    "predictor/mnist_vit": "gaurav_mnist_vit",
    "predictor/cifar10_vit": "smmk47_cifar10_vit",
}
SETTINGS = {"random, null space": ("random", 0.0), "task, null space": ("task", 0.0), "task, damped": ("task", 1e-3)}
"""Wishes, and dampings as multiples of the mean non-zero eigenvalue of g."""
STEPS = {
    "first order": (2, 8, 32),
    **dict.fromkeys(("second order", "rough second order", "chord", "rough chord"), (2, 4)),
}
TIGHT, ROUGH = 1e-3, 0.1
"""Relative residuals of the solves that are counted."""


class Mover:
    """One network and one wish.

    Args:
        name: The network's file.
        count: Unlabelled training inputs whose outputs are kept.
        wish: "random", or "task" for the descent of the cross entropy on other labels: those of the next class.
        damping: mu, as a multiple of the mean non-zero eigenvalue.
        seed: Of the random wish.
    """

    def __init__(self, name: str, count: int, wish: str, damping: float, seed: int) -> None:
        model, x, *_ = pretrained.load(name, count)
        self.field = fipgeo.MetricField(model, x, batch_size=count)
        self.start = self.field.map.point()
        self.kept = Kept.of(self.field.function, self.start)
        self.chart, self.damping = fipgeo.Chart(self.field), damping
        self.spread = spread_of(self.field.function, self.start)
        self.free = torch.ones_like(self.start, dtype=torch.bool)
        d = torch.randn(len(self.start), generator=torch.Generator().manual_seed(seed))
        if wish == "task":
            labels = model(x).argmax(1).add(1) % 10
            named = dict(model.named_parameters())
            chosen = [named[n] for n in self.field.space.names]
            gradients = torch.autograd.grad(cross_entropy(model(x), labels), chosen)
            d = -self.field.space.ravel(dict(zip(self.field.space.names, gradients, strict=True)))
        self.first = self.moves(self.start)
        self.wish, self.counted = d / d.norm(), dict[str, list[int]]()

    def moves(self, theta: Tensor) -> Compensation:
        """Solves with the metric at some weights."""
        return Compensation(self.kept, Position(theta), self.free, damping=self.damping)

    def drift(self, theta: Tensor) -> float:
        """Root mean square change of the outputs, in units of their spread."""
        return self.kept.loss(Position(theta)) ** 0.5 / self.spread

    def walk(self, method: str, steps: int, length: float) -> float:
        """The drift at the end of the way."""
        theta, h = self.start, length / steps
        for k in range(steps):
            moves = self.first if k == 0 else self.moves(theta)
            v = moves.passed(self.wish)
            v = h * v / v.norm()
            new = theta + v
            if method != "first order":
                bend = self.bend(method, moves, theta, v)
                new = new + (self.rough(method, moves, bend) if method.startswith("rough") else moves(bend))
            theta = new
        return self.drift(theta)

    def bend(self, method: str, moves: Compensation, theta: Tensor, v: Tensor) -> Tensor:
        """What a method believes a step v to change beyond R v: half of z''[v, v], or what it was."""
        if method.endswith("second order"):
            return self.chart.taylor(theta, v[None], v).second[0].to(v) / 2
        before, after = (self.kept.residual(Position(at)) for at in (theta, theta + v))
        return after - before - moves.root(v)

    def rough(self, method: str, moves: Compensation, bend: Tensor) -> Tensor:
        """The move that takes most of a change of the outputs back, by conjugate gradients; counts their products."""
        rhs = moves.root.adjoint(bend) / moves.num_examples
        found = cg(Gram(moves.root, 1 / moves.num_examples), rhs, damping=self.shift, rtol=ROUGH)
        self.counted.setdefault(method, []).append(found.num_products)
        return -found.value

    @property
    def shift(self) -> float:
        """The damping of solves by conjugate gradients; a ten-thousandth of the mean eigenvalue in the null space."""
        return max(self.damping, 1e-4) * self.first.scale

    def length(self, wanted: float = 0.1) -> float:
        """The length at which one step of first order drifts by so much."""
        low, high = 1e-4, 1e3
        for _ in range(30):
            middle = math.sqrt(low * high)
            low, high = (low, middle) if self.walk("first order", 1, middle) > wanted else (middle, high)
        return low

    def products(self) -> tuple[int, int]:
        """Products that conjugate gradients take for the projection of the wish, and for the acceleration."""
        metric = self.field.at()
        v = self.first.passed(self.wish)
        v = v / v.norm()
        bend = self.chart.taylor(self.start, v[None], v).second[0].to(v)
        rhs = metric.matvec(self.wish), metric.root.adjoint(bend) / metric.num_examples
        found = [metric.solve(b, self.shift, method="cg", rtol=TIGHT) for b in rhs]
        return found[0].num_products, found[1].num_products + 2


def measured(case: str, seed: int, count: int, settings: Sequence[str]) -> Iterator[list[dict[str, Any]]]:
    """Drifts of all methods, and what the second order saves at equal drift, one setting after the other."""
    for setting in settings:
        wish, damping = SETTINGS[setting]
        records = []
        begun = time.process_time()
        mover = Mover(NETWORKS[case], count, wish, damping, seed)
        length, (one, two) = mover.length(), mover.products()
        drifts = {m: {n: mover.walk(m, n, length) for n in counts} for m, counts in STEPS.items()}
        more = {m: 2 + sum(mover.counted[m]) / len(mover.counted[m]) if m in mover.counted else two for m in STEPS}
        notes = {
            "inputs": count,
            "length": length,
            "weights": float(mover.start.norm()),
            "products": {"step": one} | more,
        }
        notes |= {"seconds": round(time.process_time() - begun, 1)}
        notes |= {"drifts": {m: {str(n): round(v, 6) for n, v in of.items()} for m, of in drifts.items()}}
        for method in list(STEPS)[1:]:
            for n, drift in drifts[method].items():
                needed, bound = steps_for(drifts["first order"], drift)
                record = {"method": f"{method}, {n} steps, {setting}", "unit": "times", "drift": drift}
                record |= {"steps_first": needed, "bound": bound}
                for figure, value in (("products", needed * one / (n * (one + more[method]))), ("metrics", needed / n)):
                    records.append(notes | record | {"figure": f"saved_{figure}", "value": value})
        yield records


def steps_for(drifts: dict[int, float], wanted: float) -> tuple[float, bool]:
    """Steps after which drifts fall to what is wanted, interpolated on logarithms; the most and True if they never do.

    Examples:
        >>> steps_for({1: 0.4, 2: 0.2, 4: 0.1}, 0.1), steps_for({1: 0.4, 2: 0.2}, 0.1)
        ((4.0, False), (2.0, True))
    """
    steps = sorted(drifts)
    if drifts[steps[0]] <= wanted:
        return float(steps[0]), False  # or fewer
    for few, many in zip(steps, steps[1:], strict=False):
        if drifts[many] <= wanted:
            share = math.log(drifts[few] / wanted) / math.log(drifts[few] / drifts[many])
            return few * (many / few) ** share, False
    return float(steps[-1]), True
