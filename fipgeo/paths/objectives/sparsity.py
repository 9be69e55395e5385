"""Sparsity: weights set to zero, a share at a time, and held there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.model import OutputMap
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives.allocation import Allocation, Units, check_allocation, choose, limits
from fipgeo.paths.objectives.base import Objective, Predictor, Proposal, State, sparse_mask
from fipgeo.paths.objectives.patterns import Pattern, Unstructured
from fipgeo.paths.objectives.scores import Score, Survivors, as_score, summed, with_budget
from fipgeo.space import Where


@dataclass(frozen=True)
class Sparsity(Objective):
    """Zeros among the chosen weights, one by one or in the units of a pattern.

    Units are chosen by `score`, the least loss for each zero first: by default the change of the outputs that the
    metric predicts for setting a unit to zero, |sum_j w_j R_j|^2 / N, re-estimated at every step. Once chosen they are
    held. A step of size h zeroes the share h of the weights that are left; with a predictor, the others make up for it
    within the tangent space. No step goes over a waypoint by more than the last unit: single weights hit every one
    exactly. Each is a landmark, where the corrector does its full work.

    Attributes:
        target: Share of zeros to reach among the counted weights, in [0, 1); several, increasing, are the waypoints of
            one path; None for patterns that fix it themselves (`NofM`, which no target takes further).
        exclude: Which tensors stay dense (globs or a predicate), besides biases and normalisation scales and shifts.
            A group with a member in such a tensor stays as a whole.
        score: What decides which units go first: a name ("metric", "magnitude", "lamp", "local", "obs"; see `scores`)
            or a `Score`.
        pattern: Which weights become zero together.
        allocation: "global" (one ranking), "uniform" (the same share in every tensor), or the largest share of zeros in
            the tensors that globs choose, such as {"conv1*": 0.5}, under one ranking.
        min_keep: Share of each tensor, and at least one weight, that stays; 0 to allow that a tensor is emptied.
        samples: Random output directions for each estimate of score "metric".
        batch_size: Inputs that share a random output direction.

    Raises:
        ValueError: A target is not in [0, 1), waypoints do not increase, or a score or allocation is unknown; at the
            start of a path, if pattern, exclusions and limits leave too few weights that may become zero.

    Examples:
        >>> from torch import nn
        >>> from fipgeo import MetricField
        >>> from fipgeo.paths.objectives import NofM
        >>> net = MetricField(nn.Linear(8, 3), torch.eye(8)).map
        >>> int(Sparsity(None, pattern=NofM(2, 4)).counted(net).sum())
        24
    """

    target: float | tuple[float, ...] | None
    exclude: Where = None
    score: str | Score = "metric"
    pattern: Pattern = Unstructured()
    allocation: Allocation = "global"
    min_keep: float = 0.005
    samples: int = 128
    batch_size: int = 8
    name = "sparsity"
    maximise = True

    def __post_init__(self) -> None:
        """Check target, score and allocation."""
        if self.target is None:
            if not self.pattern.fixed:
                raise ValueError(f"sparsity: got None, but {self.pattern} has no share of zeros of its own; give one")
        else:
            self._check_target(self.target)
        as_score(self.score)
        check_allocation(self.allocation, self.min_keep)

    def _check_target(self, target: float | tuple[float, ...]) -> None:
        targets = (target,) if isinstance(target, int | float) else tuple(target)
        if not targets or not all(0 <= t < 1 for t in targets):
            raise ValueError(
                f"sparsity: got {target}, expected a share of zeros in [0, 1), such as 0.9 for 90 % zeros, or several"
                " such as (0.7, 0.8, 0.9)"
            )
        if any(b <= a for a, b in zip(targets, targets[1:], strict=False)):
            raise ValueError(f"sparsity: got waypoints {targets}, expected them to increase, such as (0.7, 0.8, 0.9)")
        if not isinstance(target, int | float):
            object.__setattr__(self, "target", targets)  # a list would be neither hashable nor safe from changes

    def counted(self, model: OutputMap) -> Tensor:
        """The weights that may become zero (see `sparse_mask`)."""
        return sparse_mask(model, self.exclude)

    def begin(self, kept: Kept, position: Position) -> State:
        """Weights that are zero already count and are held, and so are the other members of groups that are zero."""
        counted = self.counted(kept.function.map)
        zero = position.theta == 0
        groups = self._groups(kept, counted)
        partly = groups[(groups >= 0) & ~zero].unique()
        held = zero & (counted | ((groups >= 0) & ~torch.isin(groups, partly)))
        members = self.pattern.members(groups, torch.where(held, -1, position.theta.abs()))
        units = Units.among(groups, members, held, counted)
        have, every = int((held & counted).sum()), units.gain.double()
        most = have + int((self._choose(kept, units, every, len(held), held, counted) & counted).sum())
        state = {"counted": counted, "held": held, "before": torch.tensor(have)}
        state |= {"most": torch.tensor(most), "ended": torch.tensor(-1)}
        if (goal := self._goals(state)[-1]) > max(most, have):
            total = int(counted.sum())
            raise ValueError(
                f"sparsity: {self.target} asks for {goal} zeros among {total} weights, but {most} can become zero under"
                f" {self.pattern}, exclude={self.exclude!r}, allocation={self.allocation!r}, min_keep={self.min_keep};"
                f" ask for at most {most / total:.3f}, or loosen these"
            )
        return state

    def propose(
        self,
        kept: Kept,
        position: Position,
        state: State,
        size: float,
        predictor: Predictor,
        generator: torch.Generator,
    ) -> Proposal:
        """Zero the share `size` of the weights that are left, and move the others to make up for it."""
        counted, held = state["counted"], state["held"]
        total, have = int(counted.sum()), self._have(state)
        goals = [g for g in self._goals(state) if g > have]
        wanted = min(goals[0] - have, max(round(size * (total - have)), 1)) if goals else 0
        units, values, cost = self._valued(kept, position, state, generator)
        chosen = self._choose(kept, units, values, wanted, held, counted)
        held = held | chosen
        moves, predicted = predictor(position, ~held), None
        step = torch.where(chosen, -position.theta, 0)
        if moves is not None:
            before = moves.kept.residual(position)
            r = before + moves.root(step)
            fix = moves(r)
            after = r + moves.root(fix)
            predicted = float(after.double().norm() - before.double().norm()) / moves.num_examples**0.5
            step = step + fix
            cost += moves.cost
        theta = torch.where(held, 0, position.theta + step)
        new = {"counted": counted, "held": held, "before": torch.tensor(have), "most": state["most"]}
        short = int((chosen & counted).sum()) < wanted
        new["ended"] = torch.tensor(self._goals(state)[-1] if short else -1)
        return Proposal(replace(position, theta=theta), ~held, new, moves, cost, predicted)

    def value(self, position: Position, state: State) -> float:
        """Exact zeros among the counted weights, as a share."""
        return float((position.theta[state["counted"]] == 0).double().mean())

    def reached(self, state: State) -> bool:
        """Whether the last waypoint is reached, or limits leave no unit that could lead there."""
        goal = self._goals(state)[-1]
        return self._have(state) >= goal or int(state["ended"]) == goal

    def landmark(self, state: State) -> bool:
        """Whether the step that made this state arrived at a waypoint, or at the end."""
        before, have, goals = int(state["before"]), self._have(state), self._goals(state)
        return any(before < goal <= have for goal in goals) or int(state["ended"]) == goals[-1]

    def _valued(
        self, kept: Kept, position: Position, state: State, generator: torch.Generator
    ) -> tuple[Units, Tensor, float]:
        """The units that may become zero, what each is worth, and what it cost to find out."""
        counted, held = state["counted"], state["held"]
        groups = self._groups(kept, counted)
        score = as_score(self.score)
        score = with_budget(score, self.samples, self.batch_size) if isinstance(self.score, str) else score
        at = Survivors(kept, position, (groups >= 0) & ~held, counted)
        units = Units.among(groups, groups >= 0, held, counted)
        if not self.pattern.fixed and units.count < int((units.of >= 0).sum()):
            return units, score.units(at, units.of, units.count, generator), score.cost(at)
        worth = score.weights(at, generator)
        members = self.pattern.members(groups, torch.where(held, -1, worth))
        units = Units.among(groups, members, held, counted)
        return units, summed(worth, units.of, units.count), score.cost(at)

    def _choose(self, kept: Kept, units: Units, values: Tensor, wanted: int, held: Tensor, counted: Tensor) -> Tensor:
        space, uniform = kept.function.map.space, self.allocation == "uniform"
        most = limits(space, counted, self.allocation, self.min_keep)
        return choose(units, values, wanted, space=space, held=held, counted=counted, most=most, uniform=uniform)

    def _groups(self, kept: Kept, counted: Tensor) -> Tensor:
        """The pattern's groups less those with a member in an excluded tensor."""
        model = kept.function.map
        groups = self.pattern.groups(model, counted, kept.batches.first())
        if self.exclude is None:
            return groups
        kept_dense = model.space.mask(self.exclude, argument="exclude") & (groups >= 0)
        return torch.where(torch.isin(groups, groups[kept_dense].unique()), -1, groups)

    def _have(self, state: State) -> int:
        return int((state["held"] & state["counted"]).sum())

    def _goals(self, state: State) -> list[int]:
        """Zeros at every waypoint; a pattern that fixes its own share is not taken further."""
        total, most = int(state["counted"].sum()), int(state["most"])
        targets = (self.target,) if isinstance(self.target, int | float) else self.target
        goals = [most] if targets is None else [round(target * total) for target in targets]
        return [min(goal, most) for goal in goals] if self.pattern.fixed else goals
