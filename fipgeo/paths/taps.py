r"""Hidden outputs beside the outputs: a function with more numbers an input, so that few inputs constrain many weights.

    z' = [z / s_z, sqrt(w / T) h_1 / s_1, ..., sqrt(w / T) h_T / s_T]

with s_z^2 the mean over inputs of |z(theta_0)|^2 and s_t^2 that of |h_t - mean|^2, so that the mean over inputs of

    |z' - z'_0|^2  =  |z - z_0|^2 / s_z^2 + (w / T) sum_t |h_t - h_t0|^2 / s_t^2

weighs relative changes. z' is `EmbeddedOutputs` like any other: everything that knows the metric of z knows that of z'.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.jacobian.embedded import changeable
from fipgeo.jacobian.sketch import Sketched
from fipgeo.model import OutputMap
from fipgeo.outputs import embed, positions, widened
from fipgeo.trees import FEW, head

Taps = str | Sequence[str] | None
"""Modules whose outputs are protected: their names; "blocks" for the smallest modules that hold at least two weight
matrices (residual blocks, attention, MLPs); "layers" for what every convolution and linear layer but the last puts out,
before any normalisation and activation; or None."""

BESIDE = (nn.Linear, nn.modules.conv._ConvNd)


class TappedMap(OutputMap):
    """A model whose outputs are its own and, behind them, the outputs of some of its modules."""

    taps: tuple[str, ...]

    @classmethod
    def of(cls, inner: OutputMap, taps: Sequence[str]) -> TappedMap:
        """The same model with taps."""
        out = object.__new__(cls)
        vars(out).update(vars(inner))
        out.taps = tuple(taps)
        return out

    def call(self, weights: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, ...]:
        """The model's outputs and those of the taps (see `OutputMap.call`)."""
        outputs, hidden = self.tapped(weights, batch, list(self.taps))
        return (*outputs, *hidden)

    def tapped(
        self, weights: Mapping[str, Tensor], batch: Any, taps: list[str]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """See `OutputMap.tapped`."""
        plain = object.__new__(OutputMap)
        vars(plain).update(vars(self))
        return plain.tapped(weights, batch, taps)


@dataclass(frozen=True)
class Tap:
    """One hidden output.

    Attributes:
        name: The module.
        axis: Where its output has the examples.
        last: Whether channels (the axis behind the examples) are laid out last, as they lie in memory.
        scale: sqrt(w / T) / s_t.
    """

    name: str
    axis: int
    last: bool
    scale: float = 1.0

    def by_example(self, hidden: Tensor, count: int) -> Tensor:
        """The hidden output with its examples first, in at least float32."""
        moved = widened(hidden).movedim(self.axis, 0)
        return moved if len(moved) == count else moved.reshape(count, -1)

    def rows(self, hidden: Tensor, count: int, mask: Tensor | None) -> Tensor:
        """The hidden output as rows `[n, M]`, zero where it does not count."""
        hidden = positions(self.by_example(hidden, count), mask)
        return (hidden.movedim(1, -1) if self.last else hidden).reshape(count, -1)


@dataclass(frozen=True, eq=False)
class TappedOutputs(EmbeddedOutputs):
    """z' = [z / s_z, scaled hidden outputs], flattened to `[N * M]` like `EmbeddedOutputs`.

    Where the outputs are masked, hidden outputs that start with the mask's axes are too.

    Attributes:
        taps: The hidden outputs; `map` is a `TappedMap` of the same names.
        scale: s_z.
        width: At most so many numbers a tap and input, or None for all: the entries with random signs are summed into
            `width` interleaved groups. Over the signs E |S h|^2 = |h|^2 for every h, so squared distances and the
            metric keep their means; the variance of |S h|^2 is at most 2 |h|^4 / width if h is spread evenly.
        seed: Of the signs, which are the same at every evaluation.
    """

    taps: tuple[Tap, ...] = ()
    scale: float = 1.0
    width: int | None = None
    seed: int = 0

    def parts(self, outputs: tuple[Tensor, ...], batch: Any) -> list[Tensor]:
        """Z / s_z `[n, M_0]` and the scaled hidden outputs `[n, M_t]`."""
        plain = len(outputs) - len(self.taps)
        masks, count = self.masks(outputs, batch), len(outputs[0])
        found = [embed(self.geometry, outputs[:plain], masks[:plain]) / self.scale]
        for number, (tap, hidden, mask) in enumerate(zip(self.taps, outputs[plain:], masks[plain:], strict=True)):
            rows = tap.rows(hidden, count, mask)
            found.append((rows if self.width is None else self._summed(rows, number)) * tap.scale)
        return found

    def embedded(self, outputs: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The rows of z' `[n, M]` of one batch, from outputs and hidden outputs."""
        return torch.cat(self.parts(outputs, batch), 1)

    def masks(self, outputs: tuple[Tensor, ...], batch: Any) -> tuple[Tensor | None, ...]:
        """For each output and hidden output (examples first) which positions count, or None (see the parent)."""
        plain, count = len(outputs) - len(self.taps), len(outputs[0])
        own = super().masks(outputs[:plain], batch)
        mask = next((m for m in own if m is not None), None)
        if mask is None:
            return own + (None,) * len(self.taps)
        shaped = [tap.by_example(h, count) for tap, h in zip(self.taps, outputs[plain:], strict=True)]
        fits = (mask.dim() < h.dim() and h.shape[: mask.dim()] == mask.shape for h in shaped)
        return own + tuple(mask if fit else None for fit in fits)

    def changes(self, outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> Tensor:
        """Dimensions along which the rows of every example can change, `[n]`."""
        plain = len(outputs) - len(self.taps)
        total = changeable(self.geometry, outputs[:plain], masks[:plain])
        for tap, hidden, mask in zip(self.taps, outputs[plain:], masks[plain:], strict=True):
            total = total + self._live(tap, hidden, mask, len(outputs[0])).sum(1)
        return total

    def live(self, outputs: tuple[Tensor, ...], batch: Any) -> list[Tensor]:
        """Which entries of the hidden outputs count: boolean `[n, M_t]`, laid out like `parts`."""
        plain, masks = len(outputs) - len(self.taps), self.masks(outputs, batch)
        found = zip(self.taps, outputs[plain:], masks[plain:], strict=True)
        return [self._live(tap, hidden, mask, len(outputs[0])) for tap, hidden, mask in found]

    def _live(self, tap: Tap, hidden: Tensor, mask: Tensor | None, count: int) -> Tensor:
        rows = tap.rows(torch.ones_like(hidden), count, mask)
        if self.width is not None and rows.shape[1] > self.width:
            rows = _grouped(rows, self.width)
        return rows > 0

    def _summed(self, rows: Tensor, number: int) -> Tensor:
        if self.width is None or rows.shape[1] <= self.width:
            return rows
        source = torch.Generator().manual_seed(2**16 * self.seed + number)
        signs = torch.randint(2, (rows.shape[1],), generator=source) * 2 - 1
        return _grouped(rows * signs.to(rows), self.width)


def _grouped(rows: Tensor, width: int) -> Tensor:
    """Sums of every `width`-th entry: `[n, M]` to `[n, width]`."""
    rows = pad(rows, (0, -rows.shape[1] % width))
    return rows.reshape(len(rows), -1, width).sum(1)


def tapped_outputs(
    function: EmbeddedOutputs, theta: Tensor, taps: Taps, weight: float, width: int | None = None, seed: int = 0
) -> EmbeddedOutputs:
    """Z' of z, with the scales that outputs and hidden outputs have at theta; one or two passes over the data.

    Taps that put out no tensor with one entry or more an example, or the same at all inputs, are left out.

    Args:
        function: z on fixed inputs; where it has taps already, these are replaced.
        theta: theta_0, `[D]`.
        taps: See `Taps`.
        weight: w, the weight of all taps together beside the outputs.
        width: See `TappedOutputs`.
        seed: See `TappedOutputs`.

    Returns:
        z', or z itself where no taps are left.

    Raises:
        ValueError: A tap names no module, weight or width is not positive, or the geometry is a sketch.
    """
    if isinstance(function, TappedOutputs):
        raise ValueError("taps: the function has taps already; take those of the function without")
    names = tap_names(function.map, taps)
    if not names:
        return function
    if not weight > 0 or (width is not None and width < 1):
        raise ValueError(
            f"taps: got weight {weight} and width {width}, expected a positive weight and at least 1 or None"
        )
    if isinstance(function.geometry, Sketched):
        raise ValueError(f"taps: need outputs as they are, got geometry {function.geometry}; pass an exact geometry")
    found = _located(function, theta, names)
    given = {f.name: getattr(function, f.name) for f in fields(EmbeddedOutputs)}
    given["map"] = TappedMap.of(function.map, [tap.name for tap in found])
    return _scaled(TappedOutputs(**given, taps=tuple(found), width=width, seed=seed), theta, weight) or function


def tap_names(model: OutputMap, taps: Taps) -> list[str]:
    """The modules that `taps` means."""
    if taps == "blocks":
        return model.blocks()
    if taps == "layers":
        return [name for name, m in model.module.named_modules() if name and isinstance(m, BESIDE)][:-1]
    if isinstance(taps, str):
        raise ValueError(f"taps: got {taps!r}, expected 'blocks', 'layers', a tuple of module names, or None")
    return list(taps or ())


def _located(function: EmbeddedOutputs, theta: Tensor, names: list[str]) -> list[Tap]:
    """Where hidden outputs have their examples: along the axis that is shorter for fewer of them."""
    first = function.batches.first()
    model, weights = function.map, function.map.named(theta)
    with model.frozen():
        few = function.few(weights, head(first, FEW))
        names = [name for name in names if model.tapped(weights, function.inputs(first), [name])[1]]
        outputs, hidden = model.tapped(weights, function.inputs(first), names)
        fewer, short = model.tapped(weights, function.inputs(few), names)
    count, least, found = len(outputs[0]), len(fewer[0]), []
    for name, h, small in zip(names, hidden, short, strict=True):
        axes = [i for i in range(h.dim()) if count == least and h.shape[i] == count]
        if count != least and h.dim() == small.dim():
            axes = [i for i, (a, b) in enumerate(zip(h.shape, small.shape, strict=True)) if a != b and a % count == 0]
        if axes:
            axis = axes[0]
            spatial = axis == 0 and len(h) == count and h.dim() in (4, 5)
            form = torch.channels_last if h.dim() == 4 else torch.channels_last_3d
            last = spatial and h.is_contiguous(memory_format=form) and not h.is_contiguous()
            found.append(Tap(name, axis, last))
    return found


def _scaled(function: TappedOutputs, theta: Tensor, weight: float) -> TappedOutputs | None:
    """The function with the scales of z and of every tap over the data; None if no tap varies."""
    total, examples = 0.0, 0
    moments = [torch.zeros(3, dtype=torch.float64) for _ in function.taps]
    for batch, outputs in function.outputs(theta):
        plain, masks, count = len(outputs) - len(function.taps), function.masks(outputs, batch), len(outputs[0])
        total += float(embed(function.geometry, outputs[:plain], masks[:plain]).double().square().sum())
        examples += count
        for i, (tap, hidden, mask) in enumerate(zip(function.taps, outputs[plain:], masks[plain:], strict=True)):
            moments[i] = _merged(moments[i], tap.by_example(hidden, count), mask)
    squares = [float(m[2]) / examples for m in moments]
    floor = torch.finfo(theta.dtype).eps ** 2
    varied = [i for i, m in enumerate(moments) if squares[i] > floor * float(m[1]) ** 2 * float(m[0]) / examples]
    if not varied:
        return None
    share = weight / len(varied)
    taps = [
        Tap(t.name, t.axis, t.last, (share / squares[i]) ** 0.5) for i, t in enumerate(function.taps) if i in varied
    ]
    given = {f.name: getattr(function, f.name) for f in fields(EmbeddedOutputs)}
    given["map"] = TappedMap.of(function.map, [tap.name for tap in taps])
    scale = (total / examples) ** 0.5 or 1.0
    return TappedOutputs(**given, taps=tuple(taps), scale=scale, width=function.width, seed=function.seed)


def _merged(moments: Tensor, hidden: Tensor, mask: Tensor | None) -> Tensor:
    """Count, mean and sum of squared deviations of the entries that count, with those of another batch.

    Source: Chan, Golub & LeVeque, Algorithms for computing the sample variance (1983).
    """
    values = hidden if mask is None else hidden[mask]
    if not values.numel():
        return moments
    mean = values.mean(dtype=torch.float64)
    here = torch.linalg.vector_norm(values - mean.to(values), dtype=torch.float64).square()
    count, old = float(values.numel()), moments.tolist()
    whole, gap = count + old[0], float(mean) - old[1]
    deviations = old[2] + float(here) + gap**2 * old[0] * count / whole
    return torch.tensor([whole, old[1] + gap * count / whole, deviations], dtype=torch.float64)
