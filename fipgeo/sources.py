"""Named tensors of a network, wherever they are: in a module, in a state dict, or in a safetensors file.

Tied tensors count once, under their first name. What holds a tensor is asked for it only when its values are needed, so
a file is never in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from fipgeo.io import TensorFile
from fipgeo.space import Where, select

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A module, a state dict, or the path of a safetensors file."""

Buffers = Literal["keep", "move"]
"""What a difference of networks does with buffers: leave them as they are, or make them part of it."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Last parts of names that are buffers, where no module says which tensors are."""


@dataclass(frozen=True, eq=False)
class Named:
    """Tensors by name, tied ones once.

    Attributes:
        values: Where the tensors are; of a file they are read at each access.
        shapes: Shape by name, in order; parameters and buffers, each tensor once.
        aliases: Further names of tied tensors, each mapped to the first.
        buffers: Names that are buffers: known of a module, told by `STATISTICS` otherwise.
        integers: Names of the tensors that hold no real numbers.
    """

    values: Mapping[str, Tensor]
    shapes: Mapping[str, torch.Size]
    aliases: Mapping[str, str] = field(default_factory=dict)
    buffers: frozenset[str] = frozenset()
    integers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, source: Source, *, argument: str = "source") -> Named:
        """Look at a source without reading values.

        Raises:
            TypeError: It is no module, mapping of names to tensors, or path.
        """
        if isinstance(source, nn.Module):
            return _of_module(source)
        if isinstance(source, TensorFile):
            return _of_file(source)
        if isinstance(source, str | os.PathLike):
            return _of_file(TensorFile(source))
        if not isinstance(source, Mapping):
            raise TypeError(
                f"{argument}: got a {type(source).__name__}, expected a module, a state dict or the path of a"
                " .safetensors file"
            )
        wrong = [f"{name} ({type(t).__name__})" for name, t in source.items() if not isinstance(t, Tensor)]
        if wrong:
            raise TypeError(f"{argument}: these entries are no tensors: {', '.join(wrong[:6])}; pass a state dict")
        return _of_tensors(dict(source), lambda name: name.rpartition(".")[2] in STATISTICS)

    def names_of(self, name: str) -> list[str]:
        """A tensor's first name and all its others."""
        return [name, *(alias for alias, first in self.aliases.items() if first == name)]

    def find(self, name: str) -> str | None:
        """The first name of a tensor that is known by any of its names; None if there is no such tensor."""
        first = self.aliases.get(name, name)
        return first if first in self.shapes else None

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)


def _of_module(module: nn.Module) -> Named:
    persistent = module.state_dict(keep_vars=True)
    tensors: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    buffers = {n: b for n, b in module.named_buffers(remove_duplicate=False) if n in persistent}
    return _of_tensors(tensors | buffers, buffers.__contains__)


def _of_tensors(tensors: dict[str, Tensor], is_buffer) -> Named:  # noqa: ANN001
    first: dict[object, str] = {}
    aliases: dict[str, str] = {}
    for name, tensor in tensors.items():
        owner = first.setdefault(_place(tensor), name)
        if owner != name:
            aliases[name] = owner
    own = {name: tensor.detach() for name, tensor in tensors.items() if name not in aliases}
    integers = frozenset(name for name, tensor in own.items() if not tensor.is_floating_point())
    return Named(own, {n: t.shape for n, t in own.items()}, aliases, frozenset(filter(is_buffer, own)), integers)


def _of_file(file: TensorFile) -> Named:
    buffers = frozenset(name for name in file if name.rpartition(".")[2] in STATISTICS)
    return Named(file, file.shapes, {}, buffers, frozenset(n for n, real in file.floating.items() if not real))


def _place(tensor: Tensor) -> object:
    """Equal for two tensors that are the same numbers in memory; tensors without memory are told apart by identity."""
    if tensor.is_meta or tensor.layout is not torch.strided or not tensor.numel():
        return id(tensor)
    return (str(tensor.device), tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


def pairs(
    base: Named, tuned: Named, params: Where, policy: Buffers
) -> tuple[dict[str, tuple[str, list[str]]], frozenset[str], dict[str, str], list[str]]:
    """Which tensors of the two networks belong together.

    Returns:
        By name, the base's name and the names of the tensors in tuned that stand for it; which of them are buffers;
        what is skipped and why; and what does not fit.
    """
    matches = {name: list(dict.fromkeys(filter(None, map(tuned.find, base.names_of(name))))) for name in base}
    buffers = base.buffers | {name for name, found in matches.items() if tuned.buffers & set(found)}
    chosen = _chosen(base, buffers, params)
    out: dict[str, tuple[str, list[str]]] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    for name, found in matches.items():
        integers = (name in base.integers, any(other in tuned.integers for other in found))
        if name in buffers and policy == "keep":
            skipped[name] = "a buffer, kept as it is in the base"
        elif name not in chosen and name not in buffers:
            skipped[name] = "not chosen"
        elif all(integers) or (integers[0] and not found):
            skipped[name] = "integers, which have no difference to scale"
        elif not found:
            problems.append(f"{name} is missing in tuned")
        elif any(integers):
            problems.append(f"{name} holds integers in one of the two and real numbers in the other")
        elif wrong := [list(tuned.shapes[other]) for other in found if tuned.shapes[other] != base.shapes[name]]:
            problems.append(f"{name} has shape {list(base.shapes[name])} in base and {wrong[0]} in tuned")
        else:
            out[name] = (name, found)
    if params is None:
        known = {other for found in matches.values() for other in found}
        left = [name for name in tuned if name not in known]
        problems += [f"{name} is in tuned alone" for name in left if policy == "move" or name not in tuned.buffers]
    return out, frozenset(buffers & out.keys()), skipped, problems


def _chosen(base: Named, buffers: frozenset[str] | set[str], params: Where) -> set[str]:
    """First names of the parameters that are asked for by any of their names."""
    owners = {name: name for name in base if name not in buffers}
    owners |= {alias: first for alias, first in base.aliases.items() if first in owners}
    shown = {name: torch.empty(base.shapes[first], device="meta") for name, first in owners.items()}
    return {owners[name] for name in select(shown, params)}
