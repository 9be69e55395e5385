"""The function that a path keeps: the start's outputs on the protected inputs, cached once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from fipgeo.constraints import Constraints
from fipgeo.data import ListBatches, TensorBatches
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot, Survey
from fipgeo.linalg import LinearOperator
from fipgeo.outputs import over_entries
from fipgeo.paths.protected import Position, Protected, Tangent
from fipgeo.paths.taps import TappedOutputs, Taps, tapped_outputs
from fipgeo.space import WeightSpace

__all__ = ["Kept", "Part", "Position", "Recomputed"]

MAX_BYTES = 2**29
"""Most memory for outputs and hidden outputs at the start of a path."""


class Part(NamedTuple):
    """A minibatch of protected inputs.

    Attributes:
        batch: The inputs.
        reference: z(theta_0) of them, `[n, M]`.
        live: Boolean `[n, M]`, the entries of z that are not masked; None where nothing is.
    """

    batch: Any
    reference: Tensor
    live: Tensor | None


class Recomputed(Sequence[Tensor]):
    """A reference too large to be kept: z(theta_0) of a batch is made whenever it is asked for.

    Args:
        function: z on the protected inputs.
        start: theta_0, `[D]`.
        shapes: `(n, M)` of every batch.
    """

    def __init__(self, function: EmbeddedOutputs, start: Tensor, shapes: Sequence[tuple[int, int]]) -> None:
        self.function, self.start, self.shapes = function, start, tuple(shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __getitem__(self, index: Any) -> Any:
        """The reference of one batch, or the tuple of those of several."""
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.of(next(islice(self.function.batches, index % len(self), None)))

    def __iter__(self) -> Iterator[Tensor]:
        """All references, one pass over the inputs."""
        for batch, outputs in self.function.outputs(self.start):
            yield self.function.embedded(outputs, batch)

    def of(self, batch: Any) -> Tensor:
        """z(theta_0) of a batch, `[n, M]`."""
        return self.function.embedded(self.function.map(self.start, self.function.inputs(batch)), batch)


@dataclass(frozen=True, eq=False)
class Kept(Protected):
    """|z(theta) - z(theta_0)|^2 on the protected inputs: what correctors make small again.

    Masked positions are zero in both, so a path does not depend on padding, as long as the protected inputs are at most
    `max_rows` embedded outputs (padding included) and are not sampled. Nor does it depend on whether the metric is a
    mean over examples or over positions: damping is relative to the metric and drift to the spread of the outputs.

    Attributes:
        function: Embedded outputs on the protected inputs.
        batches: Those inputs, in memory.
        reference: z(theta_0), one tensor `[n, M]` a batch; `Recomputed` where that is too large to keep.
        start: theta_0, `[D]`.
        live: Which entries of the reference are not masked, one boolean tensor `[n, M]` a batch; None without a mask,
            or where the reference is recomputed.
    """

    function: EmbeddedOutputs
    batches: TensorBatches | ListBatches
    reference: Sequence[Tensor]
    start: Tensor
    live: Sequence[Tensor] | None = None
    _tapped: dict[Any, Kept] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        function: EmbeddedOutputs,
        start: Tensor,
        *,
        taps: Taps = None,
        tap_weight: float = 2.0,
        tap_width: int | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Kept:
        """Cache the outputs at the start; a loader's batches are read into memory.

        Args:
            function: z on the protected inputs.
            start: theta_0, `[D]`.
            taps: Hidden outputs that are protected beside the outputs (see `Taps`); None for the outputs alone.
            tap_weight: Weight of all taps together (see `TappedOutputs`).
            tap_width: Most numbers a tap and input (see `TappedOutputs`).
            max_bytes: Most memory for the outputs at the start; beyond, they are recomputed whenever they are needed.
        """
        batches = function.batches.hold()
        assert isinstance(batches, TensorBatches | ListBatches)
        function = tapped_outputs(replace(function, batches=batches), start, taps, tap_weight, tap_width)
        reference, live, shapes, held = [], [], [], 0
        for batch, outputs in function.outputs(start):
            z = function.embedded(outputs, batch)
            shapes.append(tuple(z.shape))
            held += z.nbytes
            if held <= max_bytes:
                reference.append(z)
            if held <= max_bytes and function.mask is not None:
                live.append(live_entries(function, outputs, batch))
        if held > max_bytes:
            return cls(function, batches, Recomputed(function, start, shapes), start)
        return cls(function, batches, tuple(reference), start, tuple(live) if function.mask is not None else None)

    def tapped(self, taps: Taps, weight: float = 2.0, width: int | None = None) -> Kept:
        """The same with hidden outputs protected beside the outputs; made once for every choice of taps.

        Args:
            taps: See `Taps`; None for this one itself.
            weight: Weight of all taps together.
            width: Most numbers a tap and input.

        Raises:
            ValueError: A tap names no module, or this function has taps already.
        """
        if taps is None:
            return self
        key = (taps if isinstance(taps, str) else tuple(taps), weight, width)
        if key not in self._tapped:
            made = Kept.of(self.function, self.start, taps=taps, tap_weight=weight, tap_width=width)
            self._tapped[key] = made if isinstance(made.function, TappedOutputs) else self
        return self._tapped[key]

    @property
    def space(self) -> WeightSpace:
        """The model's weight space."""
        return self.function.map.space

    @cached_property
    def constraints(self) -> Constraints:
        """The manifolds on which some weights are kept."""
        return Constraints.of(self.function.map.module, self.space)

    def moved(self, position: Position, theta: Tensor) -> Position:
        """The position with other weights `[D]`, those that are kept on manifolds brought back to them."""
        return replace(position, theta=self.constraints.brought_back(theta))

    @property
    def num_examples(self) -> int:
        """N."""
        return sum(n for n, _ in self.shapes)

    @property
    def num_rows(self) -> int:
        """N times M: embedded outputs, masked ones included."""
        return sum(n * width for n, width in self.shapes)

    @property
    def cost(self) -> float:
        """Model evaluations of one residual: one an input."""
        return float(self.num_examples)

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """`(n, M)` of every batch."""
        if isinstance(self.reference, Recomputed):
            return self.reference.shapes
        return tuple((len(z), z.shape[1]) for z in self.reference)

    @cached_property
    def scale(self) -> float:
        """What |z - z_0|^2 is divided by to have no unit: the mean over inputs of |z(theta_0)|^2.

        1 if that is 0, or where z is normalised already because there are taps.
        """
        if isinstance(self.function, TappedOutputs):
            return 1.0
        return sum(float(z.double().square().sum()) for z in self.reference) / self.num_examples or 1.0

    @property
    def survey(self) -> Survey:
        """Rows and examples of every batch, known from the reference; rows of masked positions are lost."""
        lost = sum(int((~live).sum()) for live in self.live or ())
        return Survey(tuple(n * width for n, width in self.shapes), tuple(n for n, _ in self.shapes), lost)

    def at(self, position: Position) -> EmbeddedOutputs:
        """The function z of the weights, under the position's normalisation statistics."""
        return replace(self.function, map=self.function.map.with_buffers(position.buffers))

    def residual(self, position: Position) -> Tensor:
        """The difference z(theta) - z(theta_0), flat `[N * M]` in the order of the root's rows."""
        function = self.at(position)
        found = zip(function.outputs(position.theta), self.reference, strict=True)
        parts = [function.embedded(f, batch) - z0 for (batch, f), z0 in found]
        return torch.cat([part.reshape(-1) for part in parts])

    def tangent(self, position: Position, max_bytes: int = 2**30) -> Tangent:
        """The Jacobian of the embedded outputs, `[N * M, D]`, along the manifolds that weights are kept on."""
        root = JacobianRoot(self.at(position), position.theta, max_bytes=max_bytes, survey=self.survey)
        found = JacobianTangent(root)
        return ConstrainedTangent(found, self.constraints.projection(position.theta)) if self.constraints else found

    def gap(self, function: EmbeddedOutputs, outputs: tuple[Tensor, ...], part: Part) -> Tensor:
        """Mean over a minibatch of |z - z_0|^2, a scalar that can be differentiated.

        Args:
            function: z, from `at`.
            outputs: Outputs on the minibatch, from `function.map.call`.
            part: The minibatch, from `draw`.
        """
        tapped = isinstance(function, TappedOutputs)
        parts = function.parts(outputs, part.batch) if tapped else [function.embedded(outputs, part.batch)]
        wanted = part.reference.split([p.shape[1] for p in parts], 1)
        return torch.stack([mse_loss(p, z, reduction="sum") for p, z in zip(parts, wanted, strict=True)]).sum() / len(
            part.reference
        )

    def gradient(self, position: Position, part: Part, *, batch_statistics: bool = False) -> Tensor:
        """Gradient `[D]` of `gap`, the mean over a minibatch of |z - z_0|^2.

        Args:
            position: Where.
            part: The minibatch, from `draw`.
            batch_statistics: Let BatchNorm normalise by the minibatch.
        """
        function = self.at(position)
        model = function.map
        with model.frozen(batch_statistics=batch_statistics and bool(model.normalisers)), torch.enable_grad():
            theta = position.theta.detach().requires_grad_()
            outputs = model.call(model.named(theta), function.inputs(part.batch))
            return torch.autograd.grad(self.gap(function, outputs, part), theta)[0]

    def draw(self, size: int, generator: torch.Generator) -> Part:
        """A random minibatch of protected inputs."""
        if isinstance(self.batches, TensorBatches):
            index = torch.randperm(self.num_examples, generator=generator)[:size]
            batch = self.batches.take(index)
            if isinstance(self.reference, Recomputed):
                return Part(batch, self.reference.of(batch), None)
            here = index.to(self._joined.device)
            live = None if self._joined_live is None else self._joined_live[here]
            return Part(batch, self._joined[here], live)
        which = int(torch.randint(len(self.reference), (), generator=generator))
        live = None if self.live is None else self.live[which]
        return Part(self.batches.batches[which], self.reference[which], live)

    def subset(self, max_rows: int, generator: torch.Generator) -> Kept:
        """The same on random inputs with at most `max_rows` embedded outputs, and at least one input or batch."""
        size = max(max_rows // max(width for _, width in self.shapes), 1)
        if size >= self.num_examples:
            return self
        if isinstance(self.batches, TensorBatches):
            tree, z0, mask = self.draw(size, generator)
            batches: TensorBatches | ListBatches = TensorBatches(tree, self.batches.batch_size)
            reference = z0.split(self.batches.batch_size)
            live = None if mask is None else mask.split(self.batches.batch_size)
        else:
            order = torch.randperm(len(self.reference), generator=generator).tolist()
            counts = torch.tensor([self.shapes[i][0] for i in order]).cumsum(0)
            picked = order[: max(int((counts <= size).sum()), 1)]
            batches = ListBatches([self.batches.batches[i] for i in picked])
            reference = [self.reference[i] for i in picked]
            live = None if self.live is None else [self.live[i] for i in picked]
        function = replace(self.function, batches=batches)
        return Kept(function, batches, tuple(reference), self.start, None if live is None else tuple(live))

    def renormalised(self, position: Position, most: float = float("inf")) -> Position:
        """The position with BatchNorm statistics re-estimated on the protected inputs; itself without BatchNorm.

        Args:
            position: Where.
            most: Inputs that are looked at, rounded up to whole batches.
        """
        function_map = self.at(position).map
        if not function_map.normalisers:
            return position
        wanted = next((i for i, n in enumerate(accumulate(n for n, _ in self.shapes), 1) if n >= most), None)
        seen = islice(self.batches.shuffled(1), wanted)
        return replace(position, buffers=dict(position.buffers) | function_map.statistics(position.theta, seen))

    def better_normalised(self, position: Position) -> Position:
        """The position with re-estimated BatchNorm statistics if that leaves the outputs nearer to the start's."""
        renewed = self.renormalised(position)
        return renewed if renewed is position or self.loss(renewed) <= self.loss(position) else position

    @cached_property
    def _joined(self) -> Tensor:
        return torch.cat(tuple(self.reference))

    @cached_property
    def _joined_live(self) -> Tensor | None:
        return None if self.live is None else torch.cat(tuple(self.live))


class JacobianTangent(Tangent):
    """The Jacobian of embedded outputs as steps use it.

    Args:
        root: The Jacobian.
    """

    def __init__(self, root: JacobianRoot) -> None:
        self.jacobian = root
        self.rank_bound = root.rank_bound

    @property
    def root(self) -> LinearOperator:
        """R by whichever engine has paid so far."""
        return self.jacobian

    def columns(self, free: Tensor) -> Tensor:
        """R_F as rows; the other columns are never all in memory."""
        return self.jacobian.chosen(free).matrix

    def gram(self) -> Tensor:
        """R R^T from what the layers hold, or in parts, whatever D is."""
        return self.jacobian.gram(single=True)

    def prepare(self) -> LinearOperator:
        """R by the engine that pays for many products."""
        return self.jacobian.prepare()

    def cost(self, *, columns: bool) -> float:
        """Two evaluations a row, or sixteen an input for products."""
        return 2.0 * self.jacobian.shape[0] if columns else 16.0 * self.jacobian.survey.num_examples


class ConstrainedTangent(Tangent):
    """R P, of which steps are tangent to the manifolds that weights are kept on; a tensor moves as a whole or not.

    Args:
        inner: R.
        projection: P.
    """

    def __init__(self, inner: Tangent, projection: LinearOperator) -> None:
        self.inner, self.projection, self.rank_bound = inner, projection, inner.rank_bound

    @property
    def root(self) -> LinearOperator:
        """R P."""
        return self.inner.root @ self.projection

    def columns(self, free: Tensor) -> Tensor:
        """(R P)_F, from R_F: P mixes no free weight with another that is not."""
        found = self.inner.columns(free)
        rows = found.new_zeros(len(found), len(free))
        rows[:, free] = found
        return self.projection(rows)[:, free]

    def prepare(self) -> LinearOperator:
        """R P with R made ready."""
        return self.inner.prepare() @ self.projection

    def cost(self, *, columns: bool) -> float:
        """That of R."""
        return self.inner.cost(columns=columns)


def live_entries(function: EmbeddedOutputs, outputs: tuple[Tensor, ...], batch: Any) -> Tensor:
    """Which entries of z belong to positions that count: boolean `[n, M]`, laid out like the embedded outputs."""
    taps = function.live(outputs, batch) if isinstance(function, TappedOutputs) else []
    plain, masks = outputs[: len(outputs) - len(taps)], function.masks(outputs, batch)
    parts = []
    for f, mask in zip(plain, masks, strict=False):
        width = function.geometry.embed(f.reshape(-1, f.shape[-1])[:1]).shape[-1]
        live = torch.ones_like(f[..., 0], dtype=torch.bool) if mask is None else over_entries(mask, f[..., 0])
        parts.append(live.expand_as(f[..., 0]).unsqueeze(-1).expand(*f.shape[:-1], width).reshape(len(f), -1))
    return torch.cat(parts + taps, 1)
