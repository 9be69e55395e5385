"""The function that a path keeps: the start's outputs on the protected inputs, cached once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipgeo.data import ListBatches, TensorBatches
from fipgeo.jacobian import EmbeddedOutputs, Survey
from fipgeo.model import NotFiniteError
from fipgeo.outputs import over_entries


@dataclass(frozen=True, eq=False)
class Position:
    """Where a path stands: the flat weights `[D]` and the normalisation statistics that it has moved."""

    theta: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


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


@dataclass(frozen=True, eq=False)
class Kept:
    """|z(theta) - z(theta_0)|^2 on the protected inputs: what correctors make small again.

    Masked positions are zero in both, so a path does not depend on padding, as long as the protected inputs are at most
    `max_rows` embedded outputs (padding included) and are not sampled. Nor does it depend on whether the metric is a
    mean over examples or over positions: damping is relative to the metric and drift to the spread of the outputs.

    Attributes:
        function: Embedded outputs on the protected inputs.
        batches: Those inputs, in memory.
        reference: z(theta_0), one tensor `[n, M]` a batch.
        start: theta_0, `[D]`.
        live: Which entries of the reference are not masked, one boolean tensor `[n, M]` a batch; None without a mask.
    """

    function: EmbeddedOutputs
    batches: TensorBatches | ListBatches
    reference: tuple[Tensor, ...]
    start: Tensor
    live: tuple[Tensor, ...] | None = None

    @classmethod
    def of(cls, function: EmbeddedOutputs, start: Tensor) -> Kept:
        """Cache the outputs at the start theta_0 `[D]`; a loader's batches are read into memory."""
        batches = function.batches.hold()
        assert isinstance(batches, TensorBatches | ListBatches)
        function = replace(function, batches=batches)
        reference, live = [], []
        for batch, outputs in function.outputs(start):
            reference.append(function.embedded(outputs, batch))
            live.append(live_entries(function, outputs, batch))
        masked = function.mask is not None
        return cls(function, batches, tuple(reference), start, tuple(live) if masked else None)

    @property
    def num_examples(self) -> int:
        """N."""
        return sum(len(z) for z in self.reference)

    @cached_property
    def scale(self) -> float:
        """Mean over inputs of |z(theta_0)|^2; 1 if that is 0."""
        return sum(float(z.double().square().sum()) for z in self.reference) / self.num_examples or 1.0

    @property
    def survey(self) -> Survey:
        """Rows and examples of every batch, known from the reference; rows of masked positions are lost."""
        lost = sum(int((~live).sum()) for live in self.live or ())
        return Survey(tuple(z.numel() for z in self.reference), tuple(len(z) for z in self.reference), lost)

    def at(self, position: Position) -> EmbeddedOutputs:
        """The function z of the weights, under the position's normalisation statistics."""
        return replace(self.function, map=self.function.map.with_buffers(position.buffers))

    def residual(self, position: Position) -> Tensor:
        """The difference z(theta) - z(theta_0), flat `[N * M]` in the order of the root's rows."""
        function = self.at(position)
        found = zip(function.outputs(position.theta), self.reference, strict=True)
        parts = [function.embedded(f, batch) - z0 for (batch, f), z0 in found]
        return torch.cat([part.reshape(-1) for part in parts])

    def loss(self, position: Position) -> float:
        """Mean over inputs of |z(theta) - z(theta_0)|^2; infinite where outputs are not finite."""
        try:
            return float(self.residual(position).double().square().sum()) / self.num_examples
        except NotFiniteError:
            return float("inf")

    def draw(self, size: int, generator: torch.Generator) -> Part:
        """A random minibatch of protected inputs."""
        if isinstance(self.batches, TensorBatches):
            index = torch.randperm(self.num_examples, generator=generator)[:size]
            here = index.to(self._joined.device)
            live = None if self._joined_live is None else self._joined_live[here]
            return Part(self.batches.take(index), self._joined[here], live)
        which = int(torch.randint(len(self.reference), (), generator=generator))
        live = None if self.live is None else self.live[which]
        return Part(self.batches.batches[which], self.reference[which], live)

    def subset(self, max_rows: int, generator: torch.Generator) -> Kept:
        """The same on random inputs with at most `max_rows` embedded outputs, and at least one input or batch."""
        size = max(max_rows // max(z.shape[1] for z in self.reference), 1)
        if size >= self.num_examples:
            return self
        if isinstance(self.batches, TensorBatches):
            tree, z0, mask = self.draw(size, generator)
            batches: TensorBatches | ListBatches = TensorBatches(tree, self.batches.batch_size)
            reference = z0.split(self.batches.batch_size)
            live = None if mask is None else mask.split(self.batches.batch_size)
        else:
            order = torch.randperm(len(self.reference), generator=generator).tolist()
            counts = torch.tensor([len(self.reference[i]) for i in order]).cumsum(0)
            picked = order[: max(int((counts <= size).sum()), 1)]
            batches = ListBatches([self.batches.batches[i] for i in picked])
            reference = [self.reference[i] for i in picked]
            live = None if self.live is None else [self.live[i] for i in picked]
        function = replace(self.function, batches=batches)
        return Kept(function, batches, tuple(reference), self.start, None if live is None else tuple(live))

    def renormalised(self, position: Position) -> Position:
        """The position with BatchNorm statistics re-estimated on the protected inputs; itself without BatchNorm."""
        function_map = self.at(position).map
        if not function_map.normalisers:
            return position
        shuffled = self.batches.shuffled(1)
        return replace(position, buffers=dict(position.buffers) | function_map.statistics(position.theta, shuffled))

    @cached_property
    def _joined(self) -> Tensor:
        return torch.cat(self.reference)

    @cached_property
    def _joined_live(self) -> Tensor | None:
        return None if self.live is None else torch.cat(self.live)


def live_entries(function: EmbeddedOutputs, outputs: tuple[Tensor, ...], batch: Any) -> Tensor:
    """Which entries of z belong to positions that count: boolean `[n, M]`, laid out like the embedded outputs."""
    parts = []
    for f, mask in zip(outputs, function.masks(outputs, batch), strict=True):
        width = function.geometry.embed(f.reshape(-1, f.shape[-1])[:1]).shape[-1]
        live = torch.ones_like(f[..., 0], dtype=torch.bool) if mask is None else over_entries(mask, f[..., 0])
        parts.append(live.expand_as(f[..., 0]).unsqueeze(-1).expand(*f.shape[:-1], width).reshape(len(f), -1))
    return torch.cat(parts, 1)
