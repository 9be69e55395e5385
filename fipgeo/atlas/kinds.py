"""Which coefficient scales what: one for a vector, its layers, its tensors, their channels, or random parts of them.

Every kind has a table of coefficients `[n, S]`: n vectors, S columns. A weight of a tensor belongs to one column, the
same for all vectors. Axis letters: n vectors, S columns, K parts of a tensor.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn


class Kind(ABC):
    """How coefficients are shared among weights."""

    @abstractmethod
    def labels(self, sizes: Mapping[str, int]) -> list[str]:
        """What each of the S columns scales, for tensors of these names and numbers of weights."""

    @abstractmethod
    def columns(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """The columns `[K]` that each tensor's K parts use; K is 1 where a tensor is not divided."""

    def order(self, name: str, size: int) -> Tensor | None:
        """The place `[size]` of each weight among the parts, see `partition`; None where a tensor is one part."""
        del name, size
        return None

    def describe(self) -> dict[str, Any]:
        """The kind in plain values, to be stored beside coefficients."""
        return {"name": type(self).__name__}


@dataclass(frozen=True)
class Isotropic(Kind):
    """One coefficient a vector: theta_0 + sum_i c_i tau_i (task arithmetic with learned scales)."""

    def labels(self, sizes: Mapping[str, int]) -> list[str]:
        """One column for everything."""
        del sizes
        return ["all"]

    def columns(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Every tensor uses the one column."""
        return {name: torch.zeros(1, dtype=torch.long) for name in sizes}


@dataclass(frozen=True)
class PerLayer(Kind):
    """One coefficient for each vector and layer.

    Attributes:
        layer_of: Name of a tensor -> name of its layer; None for the module that owns the tensor.

    Examples:
        >>> PerLayer().labels({"0.weight": 6, "0.bias": 2, "2.weight": 4})
        ['0', '2']
    """

    layer_of: Callable[[str], str] | None = None

    def labels(self, sizes: Mapping[str, int]) -> list[str]:
        """The layers, in the order of their first tensors."""
        return list(dict.fromkeys(map(self._layer, sizes)))

    def columns(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Every tensor uses its layer's column."""
        index = {layer: i for i, layer in enumerate(self.labels(sizes))}
        return {name: torch.tensor([index[self._layer(name)]]) for name in sizes}

    def _layer(self, name: str) -> str:
        return name.rpartition(".")[0] if self.layer_of is None else self.layer_of(name)


@dataclass(frozen=True)
class PerBlock(Kind):
    """One coefficient for each vector and parameter tensor.

    Learned anisotropic scaling (Zhang et al., Knowledge Composition using Task Vectors with Learned Anisotropic
    Scaling, NeurIPS 2024).
    """

    def labels(self, sizes: Mapping[str, int]) -> list[str]:
        """The tensors."""
        return list(sizes)

    def columns(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Every tensor has a column of its own."""
        return {name: torch.tensor([i]) for i, name in enumerate(sizes)}


@dataclass(frozen=True)
class PerChannel(Kind):
    """One coefficient for each vector and output channel of a weight; one for each vector and tensor with one axis.

    Between `PerBlock` and `Partitions`: what a channel is made of stays together, so that coefficients of related tasks
    turn whole features up and down.

    Attributes:
        channels: Length of the first axis of every tensor that is divided; those that it lacks have one coefficient.

    Raises:
        ValueError: A tensor has no such number of equal slices.

    Examples:
        >>> kind = PerChannel.of(torch.nn.Linear(3, 2))
        >>> kind.labels({"weight": 6, "bias": 2})
        ['weight[0]', 'weight[1]', 'bias']
    """

    channels: Mapping[str, int]

    @classmethod
    def of(cls, module: nn.Module) -> PerChannel:
        """The channels of a module's parameters of two axes or more."""
        return cls({name: len(p) for name, p in module.named_parameters() if p.dim() > 1})

    def labels(self, sizes: Mapping[str, int]) -> list[str]:
        """The tensors with the numbers of their channels."""
        parts = [(name, self._parts(name, size)) for name, size in sizes.items()]
        return [f"{name}[{k}]" if count > 1 else name for name, count in parts for k in range(count)]

    def columns(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Every channel of every tensor has a column of its own."""
        return _in_turn({name: self._parts(name, size) for name, size in sizes.items()})

    def order(self, name: str, size: int) -> Tensor | None:
        """Channels lie one after the other."""
        return torch.arange(size, dtype=torch.int32) if self._parts(name, size) > 1 else None

    def describe(self) -> dict[str, Any]:
        """The kind with the channels of each tensor."""
        return {"name": type(self).__name__, "channels": dict(self.channels)}

    def _parts(self, name: str, size: int) -> int:
        count = self.channels.get(name, 1)
        if count < 1 or size % count:
            raise ValueError(f"channels: got {count} of {name}, whose {size} weights cannot be cut into as many slices")
        return count


@dataclass(frozen=True)
class Partitions(Kind):
    """One coefficient for each vector and each of K random parts of every parameter tensor.

    The division depends on the seed and the tensor's name alone, not on the machine or the version of torch, so
    coefficients keep their meaning when they are read again. A tensor of fewer than K weights has one part a weight.

    Attributes:
        count: K, the number of parts of a tensor.
        seed: What the parts are drawn with.

    Raises:
        ValueError: K is not positive.
    """

    count: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"count: got {self.count} parts of a tensor, expected at least 1")

    def labels(self, sizes: Mapping[str, int]) -> list[str]:
        """The tensors with the numbers of their parts."""
        return [f"{name}[{k}]" for name, size in sizes.items() for k in range(self._parts(size))]

    def columns(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Every part of every tensor has a column of its own."""
        return _in_turn({name: self._parts(size) for name, size in sizes.items()})

    def order(self, name: str, size: int) -> Tensor | None:
        """The place of each weight among the parts."""
        return partition(size, self._parts(size), self.seed, name)

    def describe(self) -> dict[str, Any]:
        """The kind with what its parts are drawn from."""
        return {"name": type(self).__name__, "count": self.count, "seed": self.seed}

    def _parts(self, size: int) -> int:
        return max(1, min(self.count, size))


def _in_turn(parts: Mapping[str, int]) -> dict[str, Tensor]:
    """Columns for tensors of so many parts, one after the other."""
    ends = accumulate(parts.values())
    return {name: torch.arange(end - count, end) for end, (name, count) in zip(ends, parts.items(), strict=True)}


def partition(size: int, parts: int, seed: int, name: str) -> Tensor:
    """A random division of `size` weights into parts whose sizes differ by one at most.

    Weights are sorted by a hash of seed, name and position (splitmix64), and dealt to the parts in turn.

    Args:
        size: Number of weights P.
        parts: Number of parts K, at most P.
        seed: Any integer.
        name: Of the tensor, so that tensors of equal size are divided in different ways.

    Returns:
        Places `[P]` int32 in a table `[K, ceil(P / K)]` read row by row: weight p is in part place // ceil(P / K).

    Raises:
        ValueError: There are more parts than weights.

    Examples:
        >>> (partition(5, 2, 0, "weight") // 3).bincount().tolist()
        [3, 2]
    """
    if not 1 <= parts <= max(1, size):
        raise ValueError(f"parts: got {parts}, expected between 1 and the {size} weights of {name}")
    start = int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little", signed=True)
    keys = torch.arange(1, size + 1, dtype=torch.long) * _signed(0x9E3779B97F4A7C15) + start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        keys = (keys ^ ((keys >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    rank = torch.empty(size, dtype=torch.long)
    rank[keys.argsort(stable=True)] = torch.arange(size)
    return (rank % parts * -(-size // parts) + rank // parts).int()


def _signed(number: int) -> int:
    """64 bits as torch's signed integers hold them; products wrap around."""
    return number - (1 << 64) if number >= 1 << 63 else number
