"""Which units become zero next: how sparsity is shared out between tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.space import WeightSpace, select

Allocation = str | Mapping[str, float]
"""How zeros are shared out: "global", "uniform", or for globs of tensors the largest share of zeros in each."""


def check_allocation(allocation: Allocation, min_keep: float) -> None:
    """Refuse what is neither a name nor limits in [0, 1].

    Raises:
        ValueError: As said.
    """
    if not 0 <= min_keep <= 1:
        raise ValueError(f"min_keep: got {min_keep}, expected a share of weights in [0, 1]")
    if isinstance(allocation, Mapping):
        wrong = {glob: share for glob, share in allocation.items() if not 0 <= share <= 1}
        if wrong:
            raise ValueError(f"allocation: got {wrong}, expected the largest share of zeros of each tensor, in [0, 1]")
    elif allocation not in ("global", "uniform"):
        raise ValueError(
            f"allocation: got {allocation!r}, expected 'global', 'uniform', or limits such as {{'conv1*': 0.5}}"
        )


def limits(space: WeightSpace, counted: Tensor, allocation: Allocation, min_keep: float) -> dict[str, int]:
    """The most zeros in each tensor that has counted weights: at least `min_keep` of it, and one weight, is left.

    A tensor that several globs choose obeys the smallest share. With min_keep = 0 a tensor may be emptied.
    """
    sizes = {name: int(counted[where].sum()) for name, where in space.slices().items()}
    sizes = {name: size for name, size in sizes.items() if size}
    most = {name: size - math.ceil(min_keep * size) for name, size in sizes.items()}
    if isinstance(allocation, Mapping):
        named = {name: torch.empty(space.shapes[name], device="meta") for name in sizes}
        for glob, share in allocation.items():
            for name in select(named, glob, argument="allocation"):
                most[name] = min(most[name], math.floor(share * sizes[name] + 1e-9))
    return most


@dataclass(frozen=True, eq=False)
class Units:
    """What may become zero, sorted into units.

    Attributes:
        of: Number of every coordinate's unit, `[D]`; -1 for what cannot become zero now.
        gain: Counted weights in each unit, `[U]`.
        count: U.
    """

    of: Tensor
    gain: Tensor

    @classmethod
    def among(cls, groups: Tensor, members: Tensor, held: Tensor, counted: Tensor) -> Units:
        """The members that are not held, by group; groups that would gain nothing are left out.

        Args:
            groups: Group of every coordinate, `[D]`, -1 for none.
            members: Boolean `[D]`, which of them become zero with their group.
            held: Boolean `[D]`, what is zero already.
            counted: Boolean `[D]`, what counts as a weight.
        """
        of = torch.where(members & ~held, groups, -1)
        if not (of >= 0).any():
            return cls(of, torch.zeros(0, dtype=torch.long, device=of.device))
        size = int(groups.max()) + 1
        if size <= 2 * len(groups):
            gain = torch.bincount(of[(of >= 0) & counted], minlength=size)
            number = torch.where(gain > 0, (gain > 0).cumsum(0) - 1, -1)
            return cls(torch.where(of >= 0, number[of], -1), gain[gain > 0])
        found, inverse = of.unique(return_inverse=True)  # numbers of any size
        return cls.among(torch.where(of >= 0, inverse, -1), of >= 0, held, counted)

    @property
    def count(self) -> int:
        """U."""
        return len(self.gain)


def choose(
    units: Units,
    values: Tensor,
    wanted: int,
    *,
    space: WeightSpace,
    held: Tensor,
    counted: Tensor,
    most: Mapping[str, int],
    uniform: bool = False,
) -> Tensor:
    """The units to zero now, a boolean mask `[D]`: the least loss for each zero first, until `wanted` are won.

    At most one unit more than wanted is chosen, fewer zeros where the limits leave no more. Of equals the first go.

    Args:
        units: The candidates.
        values: What each is worth, `[U]`.
        wanted: Zeros to win.
        space: The weight space.
        held: Boolean `[D]`, what is zero already.
        counted: Boolean `[D]`, what counts as a weight.
        most: The most zeros of each tensor.
        uniform: Fill all tensors alike instead of ranking units across tensors.
    """
    chosen, won = torch.zeros_like(held), 0
    while won < wanted:  # a second round only where limits cut the first one short
        found = _round(units, values, wanted - won, chosen, held | chosen, space, counted, most, uniform)
        if not found.any():
            break
        chosen |= found
        won = int((chosen & counted).sum())
    return chosen


def _round(
    units: Units,
    values: Tensor,
    wanted: int,
    chosen: Tensor,
    zero: Tensor,
    space: WeightSpace,
    counted: Tensor,
    most: Mapping[str, int],
    uniform: bool,
) -> Tensor:
    """As many of the units that are left as surely fit into the limits, in order of their price."""
    of = torch.where(chosen, -1, units.of)
    left = torch.zeros(units.count, dtype=torch.bool, device=of.device)
    left[of[of >= 0]] = True
    order = (values.double() / units.gain).argsort(stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=of.device)
    parts = []
    for name, where in space.slices().items():
        own, weights = of[where], counted[where]
        if name in most and (own >= 0).any():
            mine, gain = own[(own >= 0) & weights].unique(return_counts=True)
            have = int((zero[where] & weights).sum())
            left[mine[have + gain > most[name]]] = False
            parts.append((mine, gain, have, most[name], int(weights.sum())))
    filled = torch.zeros(units.count, dtype=torch.float64, device=of.device)
    fits = left.clone()
    for mine, gain, have, limit, size in parts:
        mine, gain = mine[left[mine]], gain[left[mine]]
        turn = rank[mine].argsort()
        mine, reached = mine[turn], gain[turn].cumsum(0) + have
        fits[mine[reached > limit]] = False
        filled[mine] = torch.maximum(filled[mine], reached.double() / size)
    if uniform:
        order = order[filled[order].argsort(stable=True)]
    order = order[fits[order]]
    enough = int((units.gain[order].cumsum(0) < wanted).sum()) + 1
    now = torch.zeros_like(left)
    now[order[:enough]] = True
    return (of >= 0) & now[of.clamp_min(0)] if units.count else torch.zeros_like(chosen)
