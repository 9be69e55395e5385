"""Patterns of zeros: which weights become zero together.

A pattern sorts weights into groups, and may say which members of a group become zero (by default all). Whatever
becomes zero together is a unit: it does so as a whole, and stays so.

Matrices are read as `[out, in, k]`: k = 1 for a linear layer, the kernel's positions for a convolution. Transposed
convolutions and layers that store `[in, out]` are turned round; an embedding is the matrix of a one-hot input.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fipgeo.model import OutputMap

IN_FIRST = (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvTransposeNd)
"""Modules with weights `[in, out, ...]`, beside those of a class called Conv1D that is not torch's."""


class Pattern(ABC):
    """Which weights become zero together.

    Attributes:
        fixed: Whether the pattern itself says how many zeros there are in the end.
    """

    fixed = False

    @abstractmethod
    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """The group of every coordinate, `[D]` int64; -1 in none.

        Args:
            model: The model.
            counted: Boolean `[D]`, the weights that may become zero. Members that are not among them (biases, scales
                of normalisation layers) become zero with their group, but are not counted as sparsity.
            batch: One batch of protected inputs, for patterns that watch a forward.
        """

    def members(self, groups: Tensor, values: Tensor) -> Tensor:
        """Which members of each group become zero, boolean `[D]`; `values` `[D]` are smaller for what is worth less."""
        del values
        return groups >= 0


@dataclass(frozen=True)
class Unstructured(Pattern):
    """Every weight by itself."""

    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """A group each."""
        del model, batch
        return torch.where(counted, torch.arange(len(counted), device=counted.device), -1)


@dataclass(frozen=True)
class NofM(Pattern):
    """At most n weights that are not zero in every run of m along the input axis; 2 of 4 is what GPUs can use.

    Runs are aligned and follow the inputs of a linear layer, and the input channels of a convolution at each position
    of its kernel; flattened in channels-last order such a kernel is a matrix with runs along its rows, as
    `torch.sparse.to_sparse_semi_structured` wants them. A shorter run at the end keeps n too, as if it were padded with
    zeros. Tensors with fewer than m inputs, and embeddings, stay dense: they have no such run.

    Attributes:
        n: Weights kept in a run.
        m: Length of a run.

    Raises:
        ValueError: Not 1 <= n < m.
    """

    n: int = 2
    m: int = 4
    fixed = True

    def __post_init__(self) -> None:
        """Check n and m."""
        if not 1 <= self.n < self.m:
            raise ValueError(f"pattern: got NofM(n={self.n}, m={self.m}), expected 1 <= n < m, such as NofM(2, 4)")

    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """A group for every run with more than n weights."""
        del batch
        out, first = torch.full_like(counted, -1, dtype=torch.long), 0
        for matrix in matrices(model, counted):
            rows, width, kernel = matrix.entries.shape
            if width < self.m or isinstance(matrix.owner, nn.Embedding | nn.EmbeddingBag):
                continue
            runs = -(-width // self.m)
            row, column, place = _axes(matrix.entries)
            run = (row * kernel + place) * runs + column // self.m
            length = (width - column // self.m * self.m).clamp_max(self.m)
            out[matrix.entries] = torch.where(length > self.n, first + run, -1)
            first += rows * kernel * runs
        return out

    def members(self, groups: Tensor, values: Tensor) -> Tensor:
        """All but the n of each run that are worth most; of equals the later ones stay."""
        inside = (groups >= 0).nonzero()[:, 0]
        order = inside[values[inside].argsort(stable=True)]
        order = order[groups[order].argsort(stable=True)]
        sizes = torch.bincount(groups[order])
        place = torch.arange(len(order), device=order.device) - (sizes.cumsum(0) - sizes)[groups[order]]
        out = torch.zeros_like(groups, dtype=torch.bool)
        out[order] = place < sizes[groups[order]] - self.n
        return out


@dataclass(frozen=True)
class Blocks(Pattern):
    """Blocks of the matrix `[out, in * k]`; those at the far edges may be smaller.

    Attributes:
        rows: Outputs in a block.
        cols: Inputs (times kernel positions) in a block.

    Raises:
        ValueError: A side is shorter than 1.
    """

    rows: int
    cols: int

    def __post_init__(self) -> None:
        """Check the sides."""
        if self.rows < 1 or self.cols < 1:
            raise ValueError(f"pattern: got Blocks({self.rows}, {self.cols}), expected sides of 1 or more")

    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """A group for every block."""
        del batch
        out, first = torch.full_like(counted, -1, dtype=torch.long), 0
        for matrix in matrices(model, counted):
            flat = matrix.entries.flatten(1)
            rows, columns = (torch.arange(s, device=flat.device) for s in flat.shape)
            across = -(-flat.shape[1] // self.cols)
            out[flat] = first + (rows // self.rows)[:, None] * across + columns // self.cols
            first += -(-flat.shape[0] // self.rows) * across
        return out


@dataclass(frozen=True)
class Rows(Pattern):
    """Outputs of a matrix, filters of a convolution, with their biases."""

    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """A group for every output of every matrix."""
        del batch
        out, first = torch.full_like(counted, -1, dtype=torch.long), 0
        for matrix in matrices(model, counted):
            count = len(matrix.entries)
            out[matrix.entries] = first + torch.arange(count, device=out.device)[:, None, None]
            if matrix.bias is not None:
                out[matrix.bias] = first + torch.arange(count, device=out.device)
            first += count
        return out


@dataclass(frozen=True)
class Columns(Pattern):
    """Inputs of a matrix, input channels of a convolution (of each of its groups)."""

    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """A group for every input of every matrix."""
        del batch
        out, first = torch.full_like(counted, -1, dtype=torch.long), 0
        for matrix in matrices(model, counted):
            count = matrix.entries.shape[1]
            out[matrix.entries] = first + torch.arange(count, device=out.device)[:, None]
            first += count
        return out


@dataclass(frozen=True, eq=False)
class Groups(Pattern):
    """Groups given one by one: channels with everything that reads and writes them, heads, whole layers.

    Attributes:
        ids: The group of every coordinate, `[D]` int64 with -1 for none, or a callable (map, batch) that gives it.

    Raises:
        ValueError: When asked for the groups, if they are not `[D]` whole numbers.
    """

    ids: Tensor | Callable[[OutputMap, Any], Tensor] = field(repr=False)

    def groups(self, model: OutputMap, counted: Tensor, batch: Any) -> Tensor:
        """The groups as given."""
        ids = self.ids if isinstance(self.ids, Tensor) else self.ids(model, batch)
        if ids.shape != counted.shape or ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(
                f"pattern: got group numbers of {ids.dtype} and shape {list(ids.shape)}, expected one whole number for"
                f" each of the {len(counted)} coordinates (space.ravel's order), -1 for none"
            )
        return ids.to(counted.device, torch.long).clamp_min(-1)


class Matrix(NamedTuple):
    """Coordinates of one matrix: its entries `[out, in, k]`, its bias `[out]` if it has one, and whose they are."""

    name: str
    owner: nn.Module
    entries: Tensor
    bias: Tensor | None


def matrices(model: OutputMap, counted: Tensor) -> Iterator[Matrix]:
    """The tensors in which all weights are counted."""
    space, modules = model.space, dict(model.module.named_modules())
    where = space.slices()
    for name, shape in space.shapes.items():
        if len(shape) < 2 or 0 in shape or not counted[where[name]].all():
            continue
        path, _, leaf = name.rpartition(".")
        index = torch.arange(where[name].start, where[name].stop, device=counted.device).reshape(shape)
        turned = isinstance(modules[path], IN_FIRST)
        turned |= type(modules[path]).__name__ == "Conv1D" and not isinstance(modules[path], nn.Conv1d)
        index = index.transpose(0, 1) if turned else index
        bias = f"{path}.{leaf.replace('weight', 'bias')}".lstrip(".")
        at = where.get(bias) if bias != name and space.shapes.get(bias) == (len(index),) else None
        entries = None if at is None else torch.arange(at.start, at.stop, device=counted.device)
        yield Matrix(name, modules[path], index.flatten(2) if index.dim() > 2 else index[:, :, None], entries)


def _axes(index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row, column and kernel position of every entry, ready to broadcast."""
    out, width, kernel = (torch.arange(size, device=index.device) for size in index.shape)
    return out[:, None, None], width[:, None], kernel
