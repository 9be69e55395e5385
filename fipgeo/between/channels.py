"""Hidden channels of one network in the order of another's."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fipgeo.data import Batches, Generator, as_batches, as_generator
from fipgeo.model import ForwardFn, OutputFn, default_forward, unwrapped
from fipgeo.shrink.cut import Calling, families, look

Places = dict[tuple[str, int], Tensor]
"""For every axis of a tensor that carries the channels of a family: their indices along it, `[n, m]`."""


def align(
    a: nn.Module,
    b: nn.Module,
    inputs: Any,
    *,
    by: str = "weights",
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    max_sweeps: int = 100,
    generator: Generator = None,
) -> nn.Module:
    """A copy of b that computes the same function with its hidden channels in the order that is nearest to a.

    Channels are followed through the forward pass as `channel_groups` does, residual streams included. A family of them
    is left alone where the outputs do not stand a permutation of it.

    By weights, family after family, in random order, takes the permutation that maximises the inner product of the
    weights of a and of the copy (a linear assignment), until none of them changes any more: a local maximum. By
    activations, every family takes the permutation that maximises the sum of the covariances, over inputs and
    positions, of the channels of a and of b in what convolutions and linear layers read of them, which depends on no
    other family; those that no such layer reads are matched by weights. It needs data, and is the better one for
    networks whose weights have scales of no meaning, before a BatchNorm say.

    Args:
        a: The network to be near to; not changed.
        b: A network of the same shape; not changed.
        inputs: Inputs as the models take them (see `as_batches`): a few, or about a thousand to match activations.
        by: "weights" or "activations".
        forward_fn: (model, batch) -> raw outputs.
        output_fn: Raw outputs -> those that count.
        max_sweeps: Most passes over all families.
        generator: Order of the families.

    Raises:
        ValueError: The networks differ in names or shapes of their parameters, or `by` is unknown.

    Source: Ainsworth, Hayase & Srinivasa, Git Re-Basin: Merging Models modulo Permutation Symmetries (2023), weight
    matching; Li, Yosinski, Clune, Lipson & Hopcroft, Convergent Learning (2016), activations.

    Examples:
        >>> a = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> b = copy.deepcopy(a)
        >>> b[0].weight.data, b[0].bias.data = a[0].weight.data.flip(0), a[0].bias.data.flip(0)
        >>> b[2].weight.data = a[2].weight.data.flip(1)
        >>> bool((align(a, b, torch.zeros(2, 2))[0].weight == a[0].weight).all())
        True
    """
    if by not in ("weights", "activations"):
        raise ValueError(f"by: got {by!r}, expected 'weights' or 'activations'")
    check_alike(a, b)
    out, batches = copy.deepcopy(unwrapped(b)), as_batches(inputs)
    calling = Calling(batches.first(), forward_fn or default_forward, output_fn)
    found = [places for places in _families(out, calling) if _stands(out, places, calling)]
    mine = {n: p.detach().double() for n, p in unwrapped(a).named_parameters()}
    tensors = _tensors(out)
    source = as_generator(generator)
    if by == "activations":
        gains = _covariances(unwrapped(a), out, found, batches, calling)
        for places, gain in zip(found, gains, strict=True):
            if gain is not None:
                _permute(tensors, places, _assigned(gain))
        found = [places for places, gain in zip(found, gains, strict=True) if gain is None]
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
    count = len(next(iter(places.values())))
    gain = torch.zeros(count, count, dtype=torch.float64)
    for (name, axis), index in places.items():
        if name in mine:
            one, two = (
                t.double().cpu().movedim(axis, 0)[index.flatten()].reshape(count, -1)
                for t in (mine[name], tensors[name])
            )
            gain += one @ two.T
    order = _assigned(gain)
    better = float(gain[torch.arange(count), order].sum() - gain.diagonal().sum())
    if better <= 1e-9 * float(gain.abs().sum()):
        return False
    _permute(tensors, places, order)
    return True


def _assigned(gain: Tensor) -> Tensor:
    """Which column goes to each row so that the sum of the gains is largest."""
    from scipy.optimize import linear_sum_assignment

    return torch.from_numpy(np.asarray(linear_sum_assignment(gain.numpy(), maximize=True)[1]))


def _covariances(
    a: nn.Module, b: nn.Module, families: list[Places], batches: Batches, calling: Calling
) -> list[Tensor | None]:
    """Covariances `[n, n]` of the channels of each family in a and in b, summed over its readers; None without any."""
    readers = [_readers(b, places) for places in families]
    names = {name for found in readers for name, _ in found}
    products: list[Tensor | None] = [None] * len(families)
    sums: dict[tuple[int, str], list[Any]] = {}
    for batch in batches:
        one, two = (_read(module, names, replace(calling, batch=batch)) for module in (a, b))
        for i, found in enumerate(readers):
            for name, index in found:
                if name in one and name in two:
                    x, y = (_rows(seen[name], index, b.get_submodule(name)) for seen in (one, two))
                    total = sums.setdefault((i, name), [0, 0, 0, 0])
                    for k, term in enumerate((x @ y.T, x.sum(1), y.sum(1), x.shape[1])):
                        total[k] = total[k] + term
    for (i, _), (xy, x, y, count) in sums.items():
        gain = (xy / count - torch.outer(x, y) / count**2).cpu()
        products[i] = gain if products[i] is None else products[i] + gain
    return products


def _readers(module: nn.Module, places: Places) -> list[tuple[str, Tensor]]:
    """Names of the convolutions and linear layers that read the channels of a family, with the places there."""
    out = []
    for (name, axis), index in places.items():
        owner, _, key = name.rpartition(".")
        reader = module.get_submodule(owner)
        plain = isinstance(reader, nn.Linear | nn.modules.conv._ConvNd) and getattr(reader, "groups", 1) == 1
        if key == "weight" and plain and axis == int(not getattr(reader, "transposed", False)):
            out.append((owner, index))
    return out


def _read(module: nn.Module, names: Collection[str], calling: Calling) -> dict[str, Tensor]:
    """What some modules read when the whole is called on a batch; of several calls the first."""
    found: dict[str, Tensor] = {}

    def note(m: nn.Module, args: Any, *, name: str) -> None:
        del m
        found.setdefault(name, args[0].detach())

    with ExitStack() as hooks:
        for name in names:
            hook = module.get_submodule(name).register_forward_pre_hook(partial(note, name=name))
            hooks.callback(hook.remove)
        calling.outputs(module)
    return found


def _rows(x: Tensor, index: Tensor, reader: nn.Module) -> Tensor:
    """What a layer reads as one row for each channel, float64."""
    channels = x.movedim(-1 if isinstance(reader, nn.Linear) else 1, 0)
    return channels[index.flatten().to(x.device)].reshape(len(index), -1).double()
