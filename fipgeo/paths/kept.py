"""The function that a path keeps: the start's outputs on the protected inputs, cached once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import ListBatches, TensorBatches
from fipgeo.jacobian import EmbeddedOutputs, Survey
from fipgeo.model import NotFiniteError
from fipgeo.outputs import embed


@dataclass(frozen=True, eq=False)
class Position:
    """Where a path stands: the flat weights `[D]` and the normalisation statistics that it has moved."""

    theta: Tensor
    buffers: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Kept:
    """|z(theta) - z(theta_0)|^2 on the protected inputs: what correctors make small again.

    Attributes:
        function: Embedded outputs on the protected inputs.
        batches: Those inputs, in memory.
        reference: z(theta_0), one tensor `[n, M]` a batch.
        start: theta_0, `[D]`.
    """

    function: EmbeddedOutputs
    batches: TensorBatches | ListBatches
    reference: tuple[Tensor, ...]
    start: Tensor

    @classmethod
    def of(cls, function: EmbeddedOutputs, start: Tensor) -> Kept:
        """Cache the outputs at the start theta_0 `[D]`; a loader's batches are read into memory."""
        batches = function.batches.hold()
        assert isinstance(batches, TensorBatches | ListBatches)
        function = replace(function, batches=batches)
        reference = tuple(embed(function.geometry, outputs) for _, outputs in function.outputs(start))
        return cls(function, batches, reference, start)

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
        """Rows and examples of every batch, known from the reference."""
        return Survey(tuple(z.numel() for z in self.reference), tuple(len(z) for z in self.reference))

    def at(self, position: Position) -> EmbeddedOutputs:
        """The function z of the weights, under the position's normalisation statistics."""
        return replace(self.function, map=self.function.map.with_buffers(position.buffers))

    def residual(self, position: Position) -> Tensor:
        """The difference z(theta) - z(theta_0), flat `[N * M]` in the order of the root's rows."""
        found = self.at(position).outputs(position.theta)
        parts = [embed(self.function.geometry, f) - z0 for (_, f), z0 in zip(found, self.reference, strict=True)]
        return torch.cat([part.reshape(-1) for part in parts])

    def loss(self, position: Position) -> float:
        """Mean over inputs of |z(theta) - z(theta_0)|^2; infinite where outputs are not finite."""
        try:
            return float(self.residual(position).double().square().sum()) / self.num_examples
        except NotFiniteError:
            return float("inf")

    def draw(self, size: int, generator: torch.Generator) -> tuple[Any, Tensor]:
        """A random minibatch of protected inputs and its reference `[n, M]`."""
        if isinstance(self.batches, TensorBatches):
            index = torch.randperm(self.num_examples, generator=generator)[:size]
            return self.batches.take(index), self._joined[index.to(self._joined.device)]
        which = int(torch.randint(len(self.reference), (), generator=generator))
        return self.batches.batches[which], self.reference[which]

    def subset(self, max_rows: int, generator: torch.Generator) -> Kept:
        """The same on random inputs with at most `max_rows` embedded outputs, and at least one input or batch."""
        size = max(max_rows // max(z.shape[1] for z in self.reference), 1)
        if size >= self.num_examples:
            return self
        if isinstance(self.batches, TensorBatches):
            tree, z0 = self.draw(size, generator)
            batches: TensorBatches | ListBatches = TensorBatches(tree, self.batches.batch_size)
            reference = z0.split(self.batches.batch_size)
        else:
            order = torch.randperm(len(self.reference), generator=generator).tolist()
            counts = torch.tensor([len(self.reference[i]) for i in order]).cumsum(0)
            picked = order[: max(int((counts <= size).sum()), 1)]
            batches = ListBatches([self.batches.batches[i] for i in picked])
            reference = tuple(self.reference[i] for i in picked)
        return Kept(replace(self.function, batches=batches), batches, tuple(reference), self.start)

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
