"""Several correctors, of which each gets as much of the work as it has earned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.paths.compensate import Compensation
from fipgeo.paths.correctors.base import Correction, Corrector, State
from fipgeo.paths.kept import Kept, Position


@dataclass(frozen=True)
class Mixed(Corrector):
    """Spends model evaluations where the drift fell most for them when it was last measured.

    A call of a member earns the rate log(loss before / loss after) / model evaluations, with the mean over all
    protected inputs of |z - z_0|^2 as the loss. In the first correction each member is called once, in the given order.
    Later ones spend as much as that did: the member with the highest rate is called, its rate is measured anew, and so
    on, so that one whose returns diminish makes room for another. A call that does not lower the loss is undone. The
    last correction calls all members in the given order, round after round, until a round removes too little.

    Attributes:
        members: The correctors, the one that should begin first.
        tolerance: Share of the loss that a round of the last correction must remove for another one to follow.
        max_rounds: Most rounds in the last correction.

    Raises:
        ValueError: There is no member, or an option is out of range.
    """

    members: tuple[Corrector, ...]
    tolerance: float = 0.02
    max_rounds: int = 2

    def __post_init__(self) -> None:
        """Check the options."""
        if not self.members:
            raise ValueError("members: got none, expected at least one corrector, such as (LayerLocal(), FirstOrder())")
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance: got {self.tolerance}, expected a share in [0, 1)")
        if self.max_rounds < 1:
            raise ValueError(f"max_rounds: got {self.max_rounds}, expected at least 1")

    def correct(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        state: State,
        generator: torch.Generator,
        *,
        moves: Compensation | None = None,
        final: bool = False,
    ) -> Correction:
        """Call members by what they have earned (see `Corrector.correct`)."""
        count = len(self.members)
        run = _Run(kept, position, free, generator, moves, final, loss=kept.loss(position), cost=kept.num_examples)
        run.states = [_part(state, i) for i in range(count)]
        rates, costs = (
            state[key].clone() if key in state else torch.full((count,), torch.nan, dtype=torch.float64)
            for key in EARNED
        )
        if final or bool(rates.isnan().any()):
            for _ in range(self.max_rounds if final else 1):
                before = run.loss
                for i, member in enumerate(self.members):
                    rate, cost = run.call(i, member)
                    if not final:
                        rates[i], costs[i] = rate, cost
                if not run.loss < (1 - self.tolerance) * before:
                    break
        else:
            self._spend(run, rates, costs)
        flat = {f"{i}.{key}": value for i, part in enumerate(run.states) for key, value in part.items()}
        return Correction(run.position, flat | dict(zip(EARNED, (rates, costs), strict=True)), run.cost)

    def _spend(self, run: _Run, rates: Tensor, costs: Tensor) -> None:
        """Calls by the present rates; both tensors are brought up to date."""
        budget, now = run.cost + float(costs.sum()), rates.clone()
        called = torch.zeros(len(rates), dtype=torch.bool)
        while bool((now > 0).any()):
            i = int(now.argmax())
            if run.cost + float(costs[i]) > 1.05 * budget:
                break
            rate, cost = run.call(i, self.members[i])
            if not called[i]:  # how well a member does on a fresh drift, not on what another call of it has left
                rates[i] = 0.5 * (rates[i] + rate)
            now[i], costs[i], called[i] = rate, cost, True
        rates[~called & (rates <= 0)] = float(rates.clamp_min(0).mean())  # what once failed gets another chance


EARNED = ("rates", "costs")
"""Entries of the state beside the members' own."""


@dataclass(eq=False)
class _Run:
    """Where one correction stands."""

    kept: Kept
    position: Position
    free: Tensor
    generator: torch.Generator
    moves: Compensation | None
    final: bool
    loss: float
    cost: float

    def __post_init__(self) -> None:
        self.states: list[State] = []

    def call(self, index: int, member: Corrector) -> tuple[float, float]:
        """One call of a member; its rate and its cost."""
        found = member.correct(
            self.kept,
            self.position,
            self.free,
            self.states[index],
            self.generator,
            moves=self.moves,
            final=self.final,
        )
        self.moves = None  # a chord step is taken once
        now, cost = self.kept.loss(found.position), found.cost + self.kept.num_examples
        self.cost += cost
        if now <= self.loss:  # equal: the member itself refused, and has learnt from that
            self.states[index] = found.state
        if not now < self.loss:
            return 0.0, cost
        before, self.loss, self.position = self.loss, now, found.position
        if not math.isfinite(before):  # from outputs that overflow, everything finite is worth the same
            return 1.0 / cost, cost
        return math.log(before / max(now, 1e-12 * before)) / cost, cost


def _part(state: State, index: int) -> Mapping[str, Tensor]:
    """The state of one member."""
    start = f"{index}."
    return {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
