"""Channels that can be taken out of a network, and the network without those that are zero."""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.model import ForwardFn, OutputFn, default_forward, unwrapped
from fipgeo.shrink.cut import Calling, FamilyKey, cut_, families, idle, look
from fipgeo.shrink.flow import Seen
from fipgeo.shrink.masks import dense_copy, dense_name
from fipgeo.space import WeightSpace, Where

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Channels that lie on the same axes of the same tensors, such as the hidden channels of one residual block.

    Attributes:
        name: The modules whose rows make the channels, joined by " + ".
        first: Group of its first channel; the others follow.
        size: Number of channels.
        readers: The weights that read them.
        weights: Coordinates of one channel in the weight space, its columns in the readers not counted.
    """

    name: str
    first: int
    size: int
    readers: tuple[str, ...]
    weights: int

    def __str__(self) -> str:
        """One line."""
        return f"{self.size:6,} x {self.weights:,} weights  {self.name} -> {', '.join(self.readers)}"


@dataclass(frozen=True, eq=False)
class ChannelGroups:
    """The removable channels of a network as groups of coordinates of its weight space.

    Attributes:
        ids: `[D]` int64, the group of each coordinate: rows of the weights that make the channel with their biases,
            and its scales and shifts in normalisations; of an attention head also the columns that read it. -1: none.
        columns: `[D]` int64, the group whose channel a coordinate reads; -1: none. Where group k is zero these weights
            do nothing, and removal takes them too.
        names: Of the groups, such as "layer1.0.conv1[3]".
        families: The groups by where they lie.
        barriers: Why the channels of other modules have to stay, by module.
    """

    ids: Tensor
    columns: Tensor
    names: tuple[str, ...] = field(repr=False)
    families: tuple[Family, ...] = field(repr=False)
    barriers: Mapping[str, str] = field(repr=False)

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.names)

    def __str__(self) -> str:
        """A table of the families and of what stays, with reasons."""
        lines = [f"{len(self):,} removable channels in {len(self.families)} families", *map(str, self.families)]
        return "\n".join([*lines, *(f"  stays: {name} ({why})" for name, why in self.barriers.items())])


def channel_groups(
    model: nn.Module,
    example_batch: Any,
    *,
    params: Where = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
) -> ChannelGroups:
    """Which weights belong to one channel (row, hidden unit, attention head) that can be taken out of a network.

    A channel is followed from the rows that make it through functions of single entries, pooling, flattening,
    concatenation and normalisation over examples to the columns that read it; sums and products couple the channels
    that meet. Inputs and outputs of the network stay, and so do channels that reach a function of which this module
    knows nothing (attention of one's own make, normalisation over channels): `barriers` names it. Then every family of
    channels is put to the test: one of them is set to zero in a copy and taken out, and the outputs have to agree;
    families that fail (a forward with sizes of its own in it) become barriers too.

    Args:
        model: Any module; not changed. Evaluated in eval mode.
        example_batch: A few inputs, as the model takes them; two are enough.
        params: Which parameters are coordinates (see `WeightSpace.of`); give what the metric or path is given.
        forward_fn: (model, batch) -> raw outputs.
        output_fn: raw outputs -> those that count.

    Returns:
        The groups, in the order of the coordinates of `WeightSpace.of(model, params)`.

    Raises:
        ValueError: Bad parameters; whatever the forward raises on the batch comes through.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> groups = channel_groups(net, torch.zeros(2, 4))
        >>> len(groups), groups.ids.tolist()[:12]
        (3, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2])
        >>> groups.ids.tolist()[12:], groups.columns.tolist()[15:]
        ([0, 1, 2, -1, -1, -1, -1, -1, -1, -1, -1], [0, 1, 2, 0, 1, 2, -1, -1])
    """
    own = unwrapped(model)
    space = WeightSpace.of(own, params)
    calling = Calling(example_batch, forward_fn or default_forward, output_fn)
    dense = dense_copy(own)
    seen = look(dense, calling)
    free, stay = {}, _reasons(seen)
    for key, units in families(seen).items():
        movable = [u for u in units if u not in seen.units.reasons]
        if len(movable) > 1 or (movable and len(movable) < len(units)):
            free[key] = movable
        elif movable:
            stay.setdefault(_name(seen, key), "the only channel")
    failed = _trial(dense, seen, free, calling)
    stay |= {_name(seen, key): why for key, why in failed.items()}
    return _collected(seen, {k: units for k, units in free.items() if k not in failed}, space, own, stay)


def shrink(
    model: nn.Module,
    example_batch: Any,
    *,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
) -> nn.Module:
    """The same function as a smaller dense network: channels, hidden units and heads that do nothing are taken out.

    A channel does nothing if all that reads it multiplies by zero or reads zeros, whatever the input: its rows and
    biases are zero, or its scale and shift, or what is left of it after a ReLU. One that is constant without being zero
    goes too if its readers have biases to take the constant and no padding that would show where it ends. At least one
    channel of every kind stays. The result is compared with the model on the batch before it is returned.

    Args:
        model: Any module; not changed. In the form of `torch.nn.utils.prune` it is read as the dense module it is.
        example_batch: A few inputs, as the model takes them.
        forward_fn: (model, batch) -> raw outputs.
        output_fn: raw outputs -> those that count.

    Returns:
        A copy with the same modules, whose tensors and sizes are smaller; attentions that lost heads are
        `NarrowAttention`. It computes what the model computes in eval mode, up to rounding. In train mode constant
        channels that pass a BatchNorm would not have been constant.

    Raises:
        RuntimeError: The smaller network does not compute the same function on the batch, even if only one kind of
            channel is taken out at a time.

    Examples:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].zero_(), net[0].bias[1].zero_()
        >>> shrink(net, torch.zeros(2, 4))
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU()
          (2): Linear(in_features=2, out_features=2, bias=True)
        )
    """
    calling = Calling(example_batch, forward_fn or default_forward, output_fn)
    small = dense_copy(unwrapped(model))
    wanted, refused = calling.outputs(small), set()
    while True:
        seen = look(small, calling)
        dead = idle(seen, dict(small.named_parameters()))
        kinds = {key: [u for u in units if u in dead] for key, units in families(seen).items()}
        kinds = {key: units for key, units in kinds.items() if units and key not in refused}
        if not kinds:
            return small
        smaller, why = _without(small, seen, kinds, calling, wanted)
        if smaller is None:
            good = {}
            for key, units in kinds.items():
                _, why = _without(small, seen, {key: units}, calling, wanted)
                if why:
                    refused.add(key)
                    _log.warning("shrink: channels of %s stay: %s", _name(seen, key), why)
                else:
                    good[key] = units
            smaller, why = _without(small, seen, good, calling, wanted)
        if smaller is None:
            raise RuntimeError(
                f"shrink: without {len(dead)} idle channels the outputs on example_batch are others ({why}), though"
                " each kind of them can go alone; look at channel_groups(model, example_batch) for how they are coupled"
            )
        small = smaller


def _without(
    module: nn.Module,
    seen: Seen,
    kinds: Mapping[FamilyKey, Collection[int]],
    calling: Calling,
    wanted: tuple[Tensor, ...],
) -> tuple[nn.Module | None, str]:
    """A copy without some units if it gives the wanted outputs; else None and the reason."""
    smaller = cut_(copy.deepcopy(module), seen, {u for units in kinds.values() for u in units})
    try:
        outputs = calling.outputs(smaller)
    except Exception as error:  # a forward may fail in any way once its sizes are others
        return None, f"the forward fails without them: {error}"
    why = _difference(outputs, wanted)
    return (None, why) if why else (smaller, "")


def _difference(outputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> str:
    """How outputs differ by more than rounding; empty if they do not."""
    for a, b in zip(outputs, wanted, strict=True):
        if a.shape != b.shape:
            return f"outputs of shape {list(a.shape)} in place of {list(b.shape)}"
        scale = float(b[torch.isfinite(b)].abs().max()) if torch.isfinite(b).any() else 0.0
        limit = 100 * torch.finfo(b.dtype).eps ** 0.75 * scale
        if not torch.allclose(a, b, rtol=0, atol=limit, equal_nan=True):
            return f"outputs move by {float((a - b).abs().max()):.2g}, with numbers up to {scale:.2g} among them"
    return ""


def _trial(dense: nn.Module, seen: Seen, free: Mapping[FamilyKey, list[int]], calling: Calling) -> dict[FamilyKey, str]:
    """Set one channel of every family to zero and take it out; the families that do not stand it, with reasons."""
    if not free or not _tried(dense, seen, {key: units[len(units) // 2] for key, units in free.items()}, calling):
        return {}
    tried = {key: _tried(dense, seen, {key: units[len(units) // 2]}, calling) for key, units in free.items()}
    return {key: why for key, why in tried.items() if why}


def _tried(dense: nn.Module, seen: Seen, picked: Mapping[FamilyKey, int], calling: Calling) -> str:
    """Why these units cannot go, one of each family; empty if they can."""
    zeroed, members = copy.deepcopy(dense), seen.units.members()
    named = dict(zeroed.named_parameters())
    with torch.no_grad():
        for (name, axis), index in (place for unit in picked.values() for place in members[unit]):
            if (name, axis) in seen.units.rows and name in named:
                named[name].select(axis, index).zero_()
    now = look(zeroed, calling)
    dead = idle(now, named)
    places = [min(place for place in members[unit] if place[0] in now.units.rows) for unit in picked.values()]
    units = {int(now.units.axes[axis][index]) for axis, index in places}
    if not units <= dead:
        return "set to zero it is not zero where it is read, and no bias can take the rest"
    return _without(zeroed, now, {frozenset(): units}, calling, calling.outputs(zeroed))[1]


def _reasons(seen: Seen) -> dict[str, str]:
    """Why channels have to stay, by the module that makes them."""
    out: dict[str, str] = {}
    made = {use.weight for use in seen.uses}
    for (name, axis), labels in seen.units.axes.items():
        if (name, axis) in seen.units.rows and (axis or name in made):
            found = next((seen.units.reasons[u] for u in labels.tolist() if u in seen.units.reasons), None)
            if found is not None:
                out.setdefault(name.rpartition(".")[0] or "the model", found)
    return out


def _name(seen: Seen, key: FamilyKey) -> str:
    """The modules whose weights make the channels, normalisations left out where there are others."""
    if heads := [name for name, _ in key if name in seen.heads]:
        return heads[0].removesuffix("out_proj.weight").rstrip(".") + " heads"
    order = [axis for axis in seen.units.axes if axis in key and axis in seen.units.rows]
    read = {use.weight for use in seen.uses}
    made = [name for name, _ in order if name in read] or [name for name, _ in order]
    return " + ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in made))


def _collected(
    seen: Seen, free: Mapping[FamilyKey, list[int]], space: WeightSpace, module: nn.Module, stay: Mapping[str, str]
) -> ChannelGroups:
    """Groups as ids of coordinates."""
    number = {unit: i for i, unit in enumerate(u for units in free.values() for u in units)}
    table = torch.full((1 + max([0, *seen.units.members()]),), -1)
    for unit, i in number.items():
        table[unit] = i
    ids, columns = (torch.full((space.dim,), -1) for _ in range(2))
    buffers = dict(module.named_buffers())
    dense = {dense_name(name, buffers): name for name in space.shapes}
    slices = space.slices()
    for (name, axis), labels in seen.units.axes.items():
        if name not in dense:
            continue
        shape, place = space.shapes[dense[name]], slices[dense[name]]
        groups = table[labels.clamp_min(0)].reshape([-1 if i == axis else 1 for i in range(len(shape))])
        target = ids if (name, axis) in seen.units.rows else columns
        old = target[place]
        target[place] = torch.where(old < 0, groups.expand(shape).flatten(), old)
    names, found = [], []
    for key, units in free.items():
        title = _name(seen, key)
        readers = tuple(name for name, axis in seen.units.axes if (name, axis) in key - seen.units.rows)
        weights = int((ids == number[units[0]]).sum())
        found.append(Family(title, len(names), len(units), readers, weights))
        names += [f"{title}[{i}]" for i in range(len(units))]
    return ChannelGroups(ids, columns, tuple(names), tuple(found), dict(stay))
