"""Hidden channels of one network in the order of another's."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fipgeo.data import Generator, as_generator
from fipgeo.model import ForwardFn, OutputFn, default_forward, unwrapped
from fipgeo.shrink.cut import Calling, families, look

Places = dict[tuple[str, int], Tensor]
"""For every axis of a tensor that carries the channels of a family: their indices along it, `[n, m]`."""


def align(
    a: nn.Module,
    b: nn.Module,
    example_batch: Any,
    *,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    max_sweeps: int = 100,
    generator: Generator = None,
) -> nn.Module:
    """A copy of b that computes the same function with its hidden channels in the order that is nearest to a.

    Channels are followed through the forward pass as `channel_groups` does, residual streams included. Family after
    family, in random order, the permutation that maximises the inner product of the weights of a and of the copy is
    taken (a linear assignment), until none of them changes any more: a local maximum. A family is left alone where the
    outputs on the batch do not stand a permutation of it.

    Args:
        a: The network to be near to; not changed.
        b: A network of the same shape; not changed.
        example_batch: A few inputs, as the models take them.
        forward_fn: (model, batch) -> raw outputs.
        output_fn: Raw outputs -> those that count.
        max_sweeps: Most passes over all families.
        generator: Order of the families.

    Raises:
        ValueError: The networks differ in names or shapes of their parameters.

    Source: Ainsworth, Hayase & Srinivasa, Git Re-Basin: Merging Models modulo Permutation Symmetries (2023), weight
    matching.

    Examples:
        >>> a = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> b = copy.deepcopy(a)
        >>> b[0].weight.data, b[0].bias.data = a[0].weight.data.flip(0), a[0].bias.data.flip(0)
        >>> b[2].weight.data = a[2].weight.data.flip(1)
        >>> bool((align(a, b, torch.zeros(2, 2))[0].weight == a[0].weight).all())
        True
    """
    check_alike(a, b)
    out = copy.deepcopy(unwrapped(b))
    calling = Calling(example_batch, forward_fn or default_forward, output_fn)
    found = [places for places in _families(out, calling) if _stands(out, places, calling)]
    mine = {n: p.detach().double() for n, p in unwrapped(a).named_parameters()}
    tensors = _tensors(out)
    source = as_generator(generator)
    for _ in range(max_sweeps):
        moved = False
        for i in torch.randperm(len(found), generator=source).tolist():
            moved = _improve(mine, tensors, found[i]) or moved
        if not moved:
            break
    return out


def check_alike(a: nn.Module, b: nn.Module) -> None:
    """Refuse two networks of different shapes; all differences are listed.

    Raises:
        ValueError: Names or shapes of parameters or buffers differ.
    """
    one, two = _tensors(unwrapped(a)), _tensors(unwrapped(b))
    problems = [f"{n} is missing from {'a' if n in two else 'b'}" for n in sorted(one.keys() ^ two.keys())]
    problems += [
        f"{n} is {list(one[n].shape)} in a and {list(two[n].shape)} in b"
        for n in one
        if n in two and one[n].shape != two[n].shape
    ]
    if problems:
        raise ValueError(f"a and b: expected networks of one shape, but {'; '.join(problems[:8])}")


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in (*module.named_parameters(), *module.named_buffers())}


def _families(module: nn.Module, calling: Calling) -> list[Places]:
    """The families of free channels, two or more in each."""
    seen = look(module, calling)
    members = seen.units.members()
    out = []
    for units in families(seen).values():
        free = [u for u in units if u not in seen.units.reasons]
        if len(free) < 2:
            continue
        lists: dict[tuple[str, int], list[list[int]]] = {axis: [] for axis, _ in members[free[0]]}
        for unit in free:
            own: dict[tuple[str, int], list[int]] = {axis: [] for axis in lists}
            for axis, index in members[unit]:
                own[axis].append(index)
            for axis, indices in own.items():
                lists[axis].append(sorted(indices))
        if all(len(set(map(len, rows))) == 1 for rows in lists.values()):
            out.append({axis: torch.tensor(rows) for axis, rows in lists.items()})
    return out


def _permute(tensors: Mapping[str, Tensor], places: Places, order: Tensor) -> None:
    """Put channel order[i] in the place of channel i, in place."""
    for (name, axis), index in places.items():
        if name in tensors:
            index = index.to(tensors[name].device)
            values = tensors[name].index_select(axis, index[order.to(index.device)].flatten())
            tensors[name].index_copy_(axis, index.flatten(), values)


def _stands(module: nn.Module, places: Places, calling: Calling) -> bool:
    """Whether the outputs stay when the channels of a family are rotated; the module is as before afterwards."""
    order = torch.arange(len(next(iter(places.values())))).roll(1)
    before, tensors = calling.outputs(module), _tensors(module)
    _permute(tensors, places, order)
    after = calling.outputs(module)
    _permute(tensors, places, order.argsort())
    limits = [100 * torch.finfo(f.dtype).eps ** 0.75 * float(f.abs().max()) for f in before]
    return all(float((f - g).abs().max()) <= limit for f, g, limit in zip(before, after, limits, strict=True))


def _improve(mine: Mapping[str, Tensor], tensors: Mapping[str, Tensor], places: Places) -> bool:
    """The best order of one family with all others as they are; whether it is another than the present one."""
    from scipy.optimize import linear_sum_assignment

    count = len(next(iter(places.values())))
    gain = torch.zeros(count, count, dtype=torch.float64)
    for (name, axis), index in places.items():
        if name in mine:
            one, two = (
                t.double().cpu().movedim(axis, 0)[index.flatten()].reshape(count, -1)
                for t in (mine[name], tensors[name])
            )
            gain += one @ two.T
    order = torch.from_numpy(np.asarray(linear_sum_assignment(gain.numpy(), maximize=True)[1]))
    better = float(gain[torch.arange(count), order].sum() - gain.diagonal().sum())
    if better <= 1e-9 * float(gain.abs().sum()):
        return False
    _permute(tensors, places, order)
    return True
