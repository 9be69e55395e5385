"""Two functions held together in a correction: the old one, and what an objective has won."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fipgeo.data import ListBatches, TensorBatches
from fipgeo.paths.kept import Kept, Part, Position, Recomputed, live_entries
from fipgeo.paths.taps import Taps


@dataclass(frozen=True, eq=False)
class Joined(Kept):
    """The outputs of the start on protected inputs, and those of a position on other inputs.

    A correction that knows the old outputs alone takes back what was learned where both are felt by the same weights.
    With both as its goal it looks for weights where the old outputs are what they were and the new ones what they are.
    Random rows come half from the one and half from the other. Both are outputs of one model, so that they have one
    Jacobian, with the engines of one; `Several` is for functions that have nothing but the weights in common.

    Attributes:
        halves: The one and the other.
        position: Where the other one was taken.
    """

    halves: tuple[Kept, Kept] = field(kw_only=True)
    position: Position = field(kw_only=True)

    @classmethod
    def here(cls, kept: Kept, others: Sequence[Any], position: Position) -> Kept:
        """A protected function beside the outputs on other inputs, as they are at a position.

        Args:
            kept: The protected function. Where its outputs are too large to be kept in memory, it comes back alone.
            others: Batches of the other inputs.
            position: Where their outputs are taken.
        """
        if isinstance(kept.reference, Recomputed):
            return kept
        batches = ListBatches(list(others)).hold()
        assert isinstance(batches, TensorBatches | ListBatches)
        function = replace(kept.at(position), batches=batches)
        reference, live = [], []
        for batch, outputs in function.outputs(position.theta):
            reference.append(function.embedded(outputs, batch))
            if function.mask is not None:
                live.append(live_entries(function, outputs, batch))
        function = replace(kept.function, batches=batches)
        marks = tuple(live) if function.mask is not None else None
        return cls._of(kept, Kept(function, batches, tuple(reference), position.theta, marks), position)

    @classmethod
    def _of(cls, one: Kept, other: Kept, position: Position) -> Joined:
        batches = ListBatches([*one.batches, *other.batches])
        live = None if one.live is None or other.live is None else (*one.live, *other.live)
        function = replace(one.function, batches=batches)
        reference = (*one.reference, *other.reference)
        return cls(function, batches, reference, one.start, live, halves=(one, other), position=position)

    def tapped(self, taps: Taps, weight: float = 2.0, width: int | None = None) -> Kept:
        """The same with hidden outputs beside the outputs, those of the start and those of the position."""
        if taps is None:
            return self
        one, other = self.halves
        return Joined.here(one.tapped(taps, weight, width), list(other.batches), self.position)

    def draw(self, size: int, generator: torch.Generator) -> Part:
        """A random minibatch of the one or the other."""
        return self.halves[int(torch.randint(2, (), generator=generator))].draw(size, generator)

    def subset(self, max_rows: int, generator: torch.Generator) -> Kept:
        """Random inputs of both, each with half of the rows."""
        if self.num_rows <= max_rows:
            return self
        one, other = (half.subset(max(max_rows // 2, 1), generator) for half in self.halves)
        return Joined._of(one, other, self.position)

    def renormalised(self, position: Position, most: float = float("inf")) -> Position:
        """The position with BatchNorm statistics re-estimated on the protected inputs (see `Kept.renormalised`)."""
        return self.halves[0].renormalised(position, most)
