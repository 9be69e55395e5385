"""A path of low energy between two networks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.between.channels import align as aligned
from fipgeo.between.channels import check_alike
from fipgeo.between.record import Connection, Way
from fipgeo.constraints import Constraints
from fipgeo.data import Batches, Generator, as_batches, as_generator
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.model import ForwardFn, OutputFn, OutputMap, unwrapped
from fipgeo.outputs import Geometry, as_geometry, between, changed_predictions, squared_distance
from fipgeo.paths.verdict import spread_of


def connect(
    a: nn.Module,
    b: nn.Module,
    keep: Any,
    *,
    held_out: Any = 0.2,
    geometry: str | Geometry = "logits",
    align: bool | str = False,
    bends: int = 3,
    points: int = 3,
    steps: int = 300,
    lr: float = 1e-3,
    batch_size: int | None = None,
    num_measured: int = 11,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    generator: Generator = None,
) -> Connection:
    """A path of weights from a to b along which the outputs go as straight as they can. No labels are needed.

    Straight is the geodesic z*(t) of the geometry between the outputs of a and of b: a line for logits, and for
    "categorical" the great circle of the Fisher-Rao metric between sqrt(p_a) and sqrt(p_b).

    The path is a polygon with `bends` free corners, which start on the straight line of the weights. With r_i the
    difference of the embedded outputs z_i to z*(t_i), the energy

        E = sum_i |r_{i+1} - r_i|^2 / (t_{i+1} - t_i), a mean over inputs,

    is minimised by Adam on minibatches, at `points` times between the ends that change from step to step. Where the
    geometry is flat, E + |z_b - z_a|^2 is the same sum over z. A path without drift passes through networks which are
    ensembles of the two.

    BatchNorm normalises by the minibatch while the path is being found; its statistics are re-estimated on the kept
    inputs wherever the path, or the straight line that it is compared with, is measured.

    Args:
        a: The first network; not changed.
        b: A network of the same shape; not changed.
        keep: Inputs without labels: a tensor, list of batches or re-iterable loader.
        held_out: The share of them that is set apart for the measurement, or other inputs.
        geometry: How outputs are compared (see `MetricField`).
        align: First put the hidden channels of b in the order of a's, by "activations" on the kept inputs (True) or by
            "weights" (see `align`); the path then ends in that copy, which computes what b does.
        bends: Free corners of the path.
        points: Networks between the ends that are evaluated in a step.
        steps: Minibatches.
        lr: Of Adam, on a cosine down to zero.
        batch_size: Examples in a minibatch, 128 by default, when `keep` is tensors.
        num_measured: Points, ends included, at which the path and the straight line are measured.
        forward_fn: (model, batch) -> raw outputs.
        output_fn: raw outputs -> the tensor or tensors to compare.
        generator: Minibatches, times and what is held out.

    Returns:
        The path with its measured drift; `str` of it is the statement.

    Raises:
        ValueError: The networks differ in shape, or a number is out of range.
        NotImplementedError: A weight is kept on a manifold (a `geoopt.ManifoldParameter`).

    Source: Garipov et al., Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs (2018), for paths of low loss;
    Tan et al., Geodesic Mode Connectivity (2023), for paths of low energy.

    Examples:
        >>> a, b = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> found = connect(a, b, torch.randn(20, 2), steps=2)
        >>> found.largest_drift < 0.1, found.straight_largest_drift < 1e-5  # linear models: the line is the best path
        (True, True)
    """
    if min(bends, points, steps) < 1 or num_measured < 3 or not lr > 0:
        raise ValueError(
            f"connect: got bends={bends}, points={points}, steps={steps}, lr={lr}, num_measured={num_measured};"
            " expected at least 1, 1, 1, more than 0, and at least 3"
        )
    check_alike(a, b)
    source = as_generator(generator)
    kept, held = _inputs(keep, held_out, batch_size, source)
    if align:
        way = "activations" if align is True else align
        b = aligned(a, b, kept, by=way, forward_fn=forward_fn, output_fn=output_fn, generator=source)
    map_ = OutputMap(a, "*", forward_fn=forward_fn, output_fn=output_fn)
    map_.check(kept.first())
    why, cure = (
        "would leave their manifolds between the networks",
        "make them plain torch.nn.Parameters in copies first",
    )
    Constraints.of(map_.module, map_.space).refuse("a", why, cure)
    function = EmbeddedOutputs(map_, as_geometry(geometry), kept)
    ends = torch.stack([map_.point(), map_.space.point(unwrapped(b))])
    line = Way(function, ends, (_buffers(a), _buffers(b)))
    time = torch.linspace(0, 1, bends + 2)
    start = replace(line, corners=torch.stack([line.at(float(t)) for t in time]))
    way, history = _straighten(start, points, steps, lr, batch_size or 128, source)
    times = torch.linspace(0, 1, num_measured, dtype=torch.float64)
    spread = spread_of(function.renewed(held), ends[0])
    reached, straight = (_Profile.of(path, held, times.tolist(), spread) for path in (way, line))
    return Connection(
        way,
        times,
        reached.drift,
        straight.drift,
        reached.changed,
        straight.changed,
        reached.energy,
        straight.energy,
        reached.least,
        history,
        reached.count,
    )


def _straighten(
    way: Way, points: int, steps: int, lr: float, batch_size: int, source: torch.Generator
) -> tuple[Way, Tensor]:
    """The path with its inner corners moved to less energy, and the energies on the way."""
    function = way.function
    inner = way.corners[1:-1].clone().requires_grad_(True)
    optimizer = torch.optim.Adam([inner], lr=lr)
    history = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        batch = function.batches.sample(batch_size, source)
        shift = float(torch.rand((), generator=source)) - 0.5
        times = [(i + shift / 2) / (points + 1) for i in range(1, points + 1)]
        with function.map.frozen():
            ends = [_evaluated(way, t, batch) for t in (0, 1)]
            goals = [between(function.geometry, ends[0], ends[1], t).reshape(-1) for t in (0.0, *times, 1.0)]
        with function.map.frozen(batch_statistics=True), torch.enable_grad():
            moved = replace(way, corners=torch.cat([way.corners[:1], inner, way.corners[-1:]]))
            z = function.on(batch)
            found = [goals[0], *(z(function.map.named(moved.at(t))) for t in times), goals[-1]]
            gaps = [f - goal for f, goal in zip(found, goals, strict=True)]
            energy = _energy(gaps, [0.0, *times, 1.0]) / len(ends[0][0])
            optimizer.zero_grad()
            energy.backward()
        optimizer.step()
        history.append(float(energy.detach()))
    return replace(way, corners=torch.cat([way.corners[:1], inner.detach(), way.corners[-1:]])), torch.tensor(history)


def _evaluated(way: Way, t: float, batch: Any) -> tuple[Tensor, ...]:
    """Outputs of a network on the way under its own buffers; inside `frozen()`."""
    map_ = way.function.map.with_buffers(way.buffers_at(t))
    return map_.call(map_.named(way.at(t)), batch)


def _energy(found: list[Tensor], times: list[float]) -> Tensor:
    steps = zip(found[:-1], found[1:], times[:-1], times[1:], strict=True)
    return torch.stack([(q - p).square().sum() / (u - t) for p, q, t, u in steps]).sum()


@dataclass(frozen=True)
class _Profile:
    """What is measured along a path on held-out inputs."""

    drift: Tensor
    changed: Tensor
    energy: float
    least: float
    count: int

    @classmethod
    def of(cls, way: Way, held: Batches, times: list[float], spread: float) -> _Profile:
        geometry = way.function.geometry
        ends = [list(_outputs(way, t, held)) for t in (0.0, 1.0)]
        pairs = [(f, g) for (_, f), (_, g) in zip(*ends, strict=True)]
        count = sum(len(f[0]) for f, _ in pairs)
        before, energy, drift, changed = ends[0], 0.0, [], []
        for t, step in zip(times, [1.0, *torch.tensor(times).diff().tolist()], strict=True):
            found = ends[int(t)] if t in (0, 1) else list(_outputs(way, t, held))
            goals = [between(geometry, f, g, t) for f, g in pairs]
            gaps = [way.function.embedded(f, batch) - goal for (batch, f), goal in zip(found, goals, strict=True)]
            away = sum(float(gap.double().square().sum()) for gap in gaps)
            drift.append(0.0 if t in (0, 1) else (away / count) ** 0.5 / spread)
            energy += _apart(geometry, [(f, g) for (_, f), (_, g) in zip(before, found, strict=True)]) / step / count
            before = found
            moves = [
                [changed_predictions(geometry, f, g) for (_, f), (_, g) in zip(found, end, strict=True)] for end in ends
            ]
            shares = [_neither(x, y) for x, y in zip(*moves, strict=True)]
            changed.append(sum(shares) / count)
        least = _apart(geometry, pairs) / count
        return cls(torch.tensor(drift).double(), torch.tensor(changed).double(), energy, least, count)


def _outputs(way: Way, t: float, held: Batches) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
    function = replace(way.function, map=way.function.map.with_buffers(way.buffers_at(t)), batches=held)
    return function.outputs(way.at(t))


def _apart(geometry: Geometry, pairs: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]) -> float:
    """The sum over all inputs of the squared distances of two outputs."""
    return sum(float(squared_distance(geometry, f, g).double().sum()) for f, g in pairs)


def _neither(x: Tensor | None, y: Tensor | None) -> float:
    """Examples whose prediction differs from those of both ends."""
    return math.nan if x is None or y is None else float((x & y).sum())


def _inputs(keep: Any, held_out: Any, batch_size: int | None, source: torch.Generator) -> tuple[Batches, Batches]:
    kept = as_batches(keep, batch_size, "keep").hold()
    if isinstance(held_out, int | float):
        return kept.split(float(held_out), source)
    return kept, as_batches(held_out, argument="held_out")


def _buffers(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach().clone() for n, t in unwrapped(module).named_buffers() if t.is_floating_point()}
