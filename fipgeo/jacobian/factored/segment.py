"""The root on consecutive batches, held layer by layer as rows or factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fipgeo.jacobian.factored.factors import Block, RowsBlock

BLOCK_BYTES = 2**27
"""Rows are converted to another precision in blocks of about this size."""


@dataclass(frozen=True)
class Segment:
    """The root on consecutive batches whose layers have the same shapes.

    Products are taken in the precision of the vectors.

    Attributes:
        matrix: Rows of small parameters, side by side, `[n * M, columns]`.
        held: Coordinates and shape of these parameters, in order.
        blocks: Coordinates, shape and rows or factors of the other parameters.
        examples: n.
        height: M.
    """

    matrix: Tensor
    held: tuple[tuple[slice, torch.Size], ...]
    blocks: tuple[tuple[slice, torch.Size, Block], ...]
    examples: int
    height: int

    def apply(self, x: Tensor) -> Tensor:
        """R x: `[k, D]` to `[k, n * M]`."""
        out = x.new_zeros(len(x), len(self.matrix))
        if self.matrix.numel():
            own = x[:, self.spans[0]] if len(self.spans) == 1 else torch.cat([x[:, span] for span in self.spans], -1)
            for rows in self._rows(x.dtype):
                out[:, rows] = own @ self.matrix[rows].to(x.dtype).T
        for where, shape, block in self.blocks:
            tangent = x[:, where].reshape(len(x), *shape)
            out += block.to(x.dtype).apply(tangent).reshape(len(self.matrix), len(x)).T
        return out

    def chosen(self, free: Tensor) -> Tensor:
        """The columns of R at the true entries of a mask `[D]`, `[n * M, |free|]`; few others are made at a time."""
        parts: dict[int, Tensor] = {}
        start = 0
        for where, shape in self.held:
            own = self.matrix[:, start : start + shape.numel()]
            parts[where.start], start = own[:, free[where]], start + shape.numel()
        for where, shape, block in self.blocks:
            mask = free[where].reshape(shape[0], -1)
            size = len(self.matrix) * mask.shape[1] * self.matrix.itemsize
            entries = mask.any(1).nonzero()[:, 0].split(max(BLOCK_BYTES // (4 * size), 1))
            some = [block.rows(index)[:, mask[index].reshape(-1)] for index in entries if len(index)]
            found = torch.cat([self.matrix[:, :0], *some], 1)
            parts[where.start] = parts[where.start] + found if where.start in parts else found  # uses add up
        return torch.cat([parts[key] for key in sorted(parts)], 1)

    def adjoint(self, y: Tensor, out: Tensor, *, add: bool = True) -> None:
        """Add R^T y to `out`, or write it where `out` holds nothing yet: `[k, n * M]` to `[k, D]`."""
        written: set[int] = set()
        if not add and sum(where.stop - where.start for where in self._places) < out.shape[1]:
            out.zero_()
            add = True
        for rows in self._rows(y.dtype) if self.matrix.numel() else ():
            found, start = y[:, rows] @ self.matrix[rows].to(y.dtype), 0
            for span in self.spans:
                part = found[:, start : start + span.stop - span.start]
                out[:, span].add_(part) if add or rows.start else out[:, span].copy_(part)
                start += span.stop - span.start
        stack = y.reshape(len(y), self.examples, self.height).permute(1, 2, 0)
        for where, shape, block in self.blocks:
            target = out[:, where].view(len(y), *shape)
            block.to(y.dtype).write_adjoint(stack, target, add=add or where.start in written)
            written.add(where.start)

    @cached_property
    def _places(self) -> list[slice]:
        """Coordinates of all parameters."""
        found = [where for where, _ in self.held] + [where for where, _, _ in self.blocks]
        return list({where.start: where for where in found}.values())

    def restricted(self, places: Mapping[int, slice]) -> Segment:
        """Some parameters only, given by their first coordinate, with new places."""
        sizes = [shape.numel() for _, shape in self.held]
        kept = [
            (part, (places[where.start], shape))
            for part, (where, shape) in zip(self.matrix.split(sizes, -1), self.held, strict=True)
            if where.start in places
        ]
        matrix = torch.cat([part for part, _ in kept], -1) if kept else self.matrix[:, :0]
        blocks = tuple((places[w.start], shape, block) for w, shape, block in self.blocks if w.start in places)
        return Segment(matrix, tuple(held for _, held in kept), blocks, self.examples, self.height)

    @cached_property
    def spans(self) -> list[slice]:
        """Where the columns of the matrix lie among the D coordinates, neighbours put together."""
        out: list[slice] = []
        for where, _ in self.held:
            if out and out[-1].stop == where.start:
                out[-1] = slice(out[-1].start, where.stop)
            else:
                out.append(where)
        return out

    def parts(self) -> list[tuple[slice, torch.Size, Block]]:
        """Every parameter as a block, those that are held as rows too."""
        sizes = [shape.numel() for _, shape in self.held]
        rows = zip(self.held, self.matrix.split(sizes, -1), strict=True)
        plain = [
            (where, shape, RowsBlock(part.unflatten(-1, shape or (1,)), self.examples)) for (where, shape), part in rows
        ]
        return [*plain, *self.blocks]

    def _rows(self, dtype: torch.dtype) -> list[slice]:
        """All rows at once, or block-wise where they are converted."""
        count = len(self.matrix)
        step = count if dtype == self.matrix.dtype else max(1, BLOCK_BYTES // (dtype.itemsize * self.matrix.shape[1]))
        return [slice(start, min(start + step, count)) for start in range(0, count, step)]

    @property
    def row_bytes(self) -> int:
        """Memory of what is held as rows alone; those of a bias are a factor of its weight."""
        held = [block for _, _, block in self.blocks]
        factors = {t.data_ptr() for block in held if not isinstance(block, RowsBlock) for t in block.tensors()}
        rows = [block.matrix for block in held if isinstance(block, RowsBlock)]
        return self.matrix.nbytes + sum(t.nbytes for t in rows if t.data_ptr() not in factors)

    @property
    def num_bytes(self) -> int:
        """Memory held, activations that several layers share counted once."""
        held = {t.data_ptr(): t.nbytes for _, _, block in self.blocks for t in block.tensors()}
        return self.matrix.nbytes + sum(held.values())
