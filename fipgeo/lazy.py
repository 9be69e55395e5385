"""Tensors that are not in memory as they are: read, multiplied from factors, or computed when they are asked for.

Axis letters: m x p a matrix, r its rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Factors:
    """A tensor as the product of two narrow matrices: left @ right, in some shape.

    Attributes:
        left: `[m, r]`.
        right: `[r, p]`.
        shape: Of the tensor, with m p entries in the order of the product's.

    Raises:
        ValueError: The three do not fit each other.

    Examples:
        >>> x = Factors(torch.ones(2, 1), torch.ones(1, 3), torch.Size([2, 3]))
        >>> x.dense().tolist(), x.dot(x)
        ([[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], 6.0)
    """

    left: Tensor
    right: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        fits = self.left.dim() == self.right.dim() == 2 and self.left.shape[1] == self.right.shape[0]
        if not fits or len(self.left) * self.right.shape[1] != math.prod(self.shape):
            raise ValueError(
                f"factors: got {list(self.left.shape)} and {list(self.right.shape)} for a tensor {list(self.shape)},"
                " expected [m, r] and [r, p] with m p entries"
            )

    @property
    def rank(self) -> int:
        """The number r of columns of left."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        """The tensor `[*shape]`, in float32 or float64."""
        wide = torch.promote_types(torch.promote_types(self.left.dtype, self.right.dtype), torch.float32)
        return (self.left.to(wide) @ self.right.to(wide)).view(self.shape)

    def to(self, *target: Any) -> Factors:
        """The factors in another dtype or on another device."""
        return Factors(self.left.to(*target), self.right.to(*target), self.shape)

    def scaled(self, factor: float) -> Factors:
        """A multiple."""
        return Factors(self.left * factor, self.right, self.shape)

    def added(self, other: Factors) -> Factors:
        """The sum with factors of the same matrix, of rank r + r'."""
        pairs = (self.left, other.left.to(self.left.device)), (self.right, other.right.to(self.right.device))
        return Factors(torch.cat(pairs[0], 1), torch.cat(pairs[1], 0), self.shape)

    def matches(self, other: object) -> bool:
        """Whether another thing is factors of a matrix of the same form."""
        return isinstance(other, Factors) and (len(self.left), self.right.shape[1]) == (
            len(other.left),
            other.right.shape[1],
        )

    def dot(self, other: Factors) -> float:
        """The inner product of the two matrices, by the r x r' products of their factors in float64."""
        left = self.left.double().T @ other.left.to(self.left.device).double()
        right = self.right.double() @ other.right.to(self.right.device).double().T
        return float((left * right).sum())


@dataclass(frozen=True, eq=False)
class Deferred:
    """A tensor that is made each time it is asked for, and not kept.

    Attributes:
        shape: Of the tensor.
        make: What reads or computes it.
        fill: What writes it into a tensor that is given, where that takes less memory.
    """

    shape: torch.Size
    make: Callable[[], Tensor]
    fill: Callable[[Tensor], object] | None = None


Entry = Tensor | Factors | Deferred


def value(entry: Entry) -> Tensor:
    """The tensor that an entry stands for."""
    if isinstance(entry, Tensor):
        return entry
    return entry.dense() if isinstance(entry, Factors) else entry.make()


def write(entry: Entry, out: Tensor) -> None:
    """Write the tensor that an entry stands for into another, in that one's dtype."""
    if isinstance(entry, Deferred) and entry.fill is not None:
        entry.fill(out)
    else:
        out.copy_(value(entry))


def mapped(entry: Entry, function: Callable[[Tensor], Tensor]) -> Entry:
    """A function of a tensor that keeps its shape: now where the tensor is there, later where it is not."""
    if isinstance(entry, Tensor):
        return function(entry)
    return Deferred(entry.shape, lambda: function(value(entry)))


class LazyTensors(Mapping[str, Tensor]):
    """A mapping of names to tensors over entries, each made when it is asked for and not kept.

    Args:
        entries: Tensors, factors, and what is deferred.
    """

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries = dict(entries)

    def __getitem__(self, name: str) -> Tensor:
        return value(self.entries[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        return name in self.entries


def entries_of(tensors: Mapping[str, Tensor]) -> dict[str, Entry]:
    """What a mapping holds, without making tensors."""
    return dict(tensors.entries if isinstance(tensors, LazyTensors) else tensors)


def gathered(entries: Mapping[str, Entry]) -> Mapping[str, Tensor]:
    """Entries as a mapping of tensors: a plain dictionary where all of them are tensors."""
    plain = {name: entry for name, entry in entries.items() if isinstance(entry, Tensor)}
    return plain if len(plain) == len(entries) else LazyTensors(entries)
