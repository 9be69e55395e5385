"""Named tensors of a network, wherever they are: in a module, in a state dict, or in a safetensors file.

Tied tensors count once, under their first name. What holds a tensor is asked for it only when its values are needed, so
a file is never in memory as a whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fipgeo.io import TensorFile

Source = nn.Module | Mapping[str, Tensor] | str | os.PathLike[str]
"""A module, a state dict, or the path of a safetensors file."""

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
