"""What each engine would cost for a model, data and point: an estimate that can be printed, made from one small batch.

Costs are in operations (multiply-adds count two), with memory traffic converted at `BYTE` operations a byte. They are
the same on every run, so that a choice made by them is, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.jacobian.factored.plan import BYTE, STACK, Plan, plan, trace

WIDE = 2
"""Single-precision operations that take as long as one in float64, on CPUs."""

SYMMETRIC = 0.65
"""Share of the products that a symmetric matrix takes."""


@dataclass(frozen=True)
class Cost:
    """What one engine takes, over all the data.

    Attributes:
        setup: Operations before the first product.
        product: Operations of one product R^T R v, `STACK` of which are taken together.
        num_bytes: Memory held.
        read: Bytes of it that R and R^T read for every stack, whatever the number of its vectors.
    """

    setup: float
    product: float
    num_bytes: float
    read: float = 0.0

    def total(self, products: float, together: float = STACK) -> float:
        """Operations for a number of products, so many of which are taken together."""
        return self.setup + products * (self.product + 2 * BYTE * self.read * (1 / together - 1 / STACK))


@dataclass(frozen=True)
class Costs:
    """Estimates for all engines.

    Attributes:
        forward: Operations of one forward pass over the data.
        engines: Cost by engine.
        making: Operations that make all factors once, group by group where they do not fit together.
        inner: Operations of the products K = R R^T, half of which are saved by its symmetry.
        bytes_by_name: Least memory of the factors of every parameter, over all the data.
    """

    forward: float
    engines: Mapping[str, Cost]
    making: float
    inner: float
    bytes_by_name: Mapping[str, float]

    @property
    def gram(self) -> float:
        """Operations that make K = R R^T in float64, differentiation included."""
        return self.making + WIDE * self.inner

    def dual(self, products: float, max_bytes: float, *, single: bool = False) -> float:
        """Operations that make K, in float64 or from products in single precision, and take a number of products.

        The factors of which K was made serve the products as well, where they stay in memory.
        """
        inner = self.inner * (1 if single else WIDE)
        ways = [self.making + self.least(products, max_bytes)]
        if self.engines["factored"].num_bytes <= max_bytes:
            ways.append(self.engines["factored"].total(products))
        return inner + min(ways)

    def cheapest(self, products: float, max_bytes: float) -> str:
        """The engine that takes least for a number of products, among those that fit."""
        fitting = {name: cost for name, cost in self.engines.items() if cost.num_bytes <= max_bytes}
        return min(fitting, key=lambda name: fitting[name].total(products))

    def least(self, products: float, max_bytes: float, together: float = STACK) -> float:
        """Operations for a number of products, so many together, by the engine that is cheapest for stacks of them."""
        return self.engines[self.cheapest(products, max_bytes)].total(products, together)

    def table(self, max_bytes: float) -> str:
        """One line an engine."""
        lines = []
        for name, cost in self.engines.items():
            fit = "" if cost.num_bytes <= max_bytes else ", does not fit"
            gain = self.engines["autodiff"].product - cost.product
            paid = f", paid back after {cost.setup / gain:,.0f} products" if gain > 0 else ", never paid back"
            after = paid if cost.setup else ""
            lines.append(
                f"  {name:<12} set-up {cost.setup / self.forward:8.1f}, a product {cost.product / self.forward:6.2f}"
                f" forward passes; holds {size(cost.num_bytes)}{fit}{after}"
            )
        return "\n".join(lines)


def size(num_bytes: float) -> str:
    """Bytes for people."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"


def estimate(function: EmbeddedOutputs, weights: Weights, survey: Survey, max_bytes: float) -> Costs:
    """Estimate from the first batch, or a few examples of it; inside `function.map.frozen()`."""
    batch = function.few(weights)
    height = survey.rows[0] // survey.examples[0]
    itemsize, count = function.map.space.dtype.itemsize, survey.num_examples
    with FlopCounterMode(display=False) as counter:
        few = max(1, function.on(batch)(weights).numel() // height)
    tracing = trace(function, weights, batch, few)
    dim = sum(t.numel() for t in weights.values())
    shapes = {name: t.shape for name, t in weights.items()}
    activations = itemsize * sum(site.numel for site in tracing.sites) / few
    forward = max(counter.get_total_flops() / few, 2 * dim) + 2 * BYTE * activations
    mixed = plan(tracing, shapes, height, itemsize, max_bytes / count)
    small = plan(tracing, shapes, height, itemsize, 0)
    rows = survey.num_rows * dim * itemsize
    making = height * forward * 1.2
    engines = {
        "autodiff": Cost(0.0, 6 * forward * count, 0.0),
        "linearised": Cost(18 * forward * count, 3.6 * forward * count, 3 * activations * count),
        "factored": Cost(
            setup=(making + 8 * forward + _rows_flops(mixed)) * count,
            product=mixed.cost * count,
            num_bytes=mixed.num_bytes * count,
            read=mixed.num_bytes * count,
        ),
        "materialised": Cost(
            3 * making * count + BYTE * rows, (4 + 2 * BYTE * itemsize / STACK) * survey.num_rows * dim, rows, rows
        ),
    }
    by_name = _bytes_by_name(small, shapes, height * itemsize, count)
    groups = max(1.0, sum(by_name.values()) / max(max_bytes, 1))
    making, inner = groups * engines["factored"].setup, SYMMETRIC * mixed.pair * survey.num_rows**2
    return Costs(forward * count, engines, making, inner, by_name)


def _rows_flops(chosen: Plan) -> float:
    """Operations that turn factors into rows, roughly those of a product on each."""
    return sum(form.flops for form in chosen.chosen.values())


def _bytes_by_name(small: Plan, shapes: Mapping[str, torch.Size], row: int, count: int) -> dict[str, float]:
    out = dict.fromkeys(shapes, 0.0)
    for (_, name), form in small.chosen.items():
        out[name] += form.num_bytes * count
    for name in small.uncovered:
        out[name] = float(row * shapes[name].numel() * count)
    return out
