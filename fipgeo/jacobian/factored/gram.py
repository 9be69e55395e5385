"""K = R R^T and the diagonal of R^T R in float64, from factors, one parameter after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fipgeo.jacobian.factored.factors import Block, LinearBlock, RowsBlock
from fipgeo.jacobian.factored.segment import Segment
from fipgeo.jacobian.gram import add_inner_products, block_bytes, mirrored

BLOCK_BYTES = 2**28
"""Temporary rows are made in blocks of about this size."""


def gram_of_segments(segments: Sequence[Segment], *, single: bool = False) -> Tensor:
    """K in float64 over all segments, `[N * M, N * M]`, one parameter after the other.

    Rows of a factored parameter are made for a few of its entries at a time and dropped again. Where it acts on one
    position an example no rows are needed: `K = (b b^T) o (x x^T)`, with its bias `(b b^T) o (x x^T + 1)`.

    Args:
        segments: The root.
        single: Whether products are taken in the precision in which it is held, and only sums in float64.
    """
    total = sum(len(s.matrix) for s in segments)
    out = torch.zeros(total, total, dtype=torch.float64, device=segments[0].matrix.device)
    if len(segments) == 1 and segments[0].matrix.numel():
        add_inner_products(out, segments[0].matrix, single=single)
    beside = _beside(segments[0]) if len(segments) == 1 else {}
    for _, _, parts in _by_parameter(segments, rows=len(segments) > 1):
        if len(parts) == 1 and len(parts[0]) == 1:
            block = parts[0][0]
            if id(block) in beside.values():
                continue
            shift = 1.0 if id(block) in beside else 0.0
            if isinstance(block, LinearBlock) and block.add_inner(out, shift, single=single):
                continue
        for _, rows in _row_chunks(parts):
            add_inner_products(out, rows, single=single)
    return mirrored(out)


def _beside(segment: Segment) -> dict[int, int]:
    """Weights whose bias is held by the same factor, with one position an example: `id` of block by `id` of block."""
    uses = Counter(where.start for where, _, _ in segment.blocks)
    single = [block for where, _, block in segment.blocks if uses[where.start] == 1]
    rows = {block.matrix.data_ptr(): id(block) for block in single if isinstance(block, RowsBlock)}
    weights = [block for block in single if isinstance(block, LinearBlock) and block.x.shape[1] == 1]
    return {id(block): rows[block.b.data_ptr()] for block in weights if block.b.data_ptr() in rows}


def column_squares(segments: Sequence[Segment], dim: int) -> Tensor:
    """The diagonal of R^T R in float64, `[D]`: sums of squares over all rows; its own sum is |R|_F^2."""
    out = torch.zeros(dim, dtype=torch.float64, device=segments[0].matrix.device)
    for start, shape, parts in _by_parameter(segments, rows=True):
        where = out[start : start + shape.numel()].view(shape or (1,))
        squares = [blocks[0].squares() if len(blocks) == 1 else None for blocks in parts]
        if all(found is not None for found in squares):
            where += torch.stack(squares).sum(0).view(where.shape)  # type: ignore[arg-type]
            continue
        for index, rows in _row_chunks(parts):
            where[index] += rows.double().square().sum(0).view(len(index), *where.shape[1:])
    return out


def _by_parameter(segments: Sequence[Segment], rows: bool) -> Iterator[tuple[int, torch.Size, list[list[Block]]]]:
    """Every parameter's first coordinate, shape and blocks, one list a segment; with those held as rows if wanted."""
    found: dict[int, list[list[Block]]] = {}
    shapes: dict[int, torch.Size] = {}
    for place, segment in enumerate(segments):
        for where, shape, block in segment.parts() if rows else segment.blocks:
            shapes[where.start] = shape
            found.setdefault(where.start, [[] for _ in segments])[place].append(block)
    for start, parts in found.items():
        yield start, shapes[start], parts


def _row_chunks(parts: list[list[Block]]) -> Iterator[tuple[Tensor, Tensor]]:
    """Entries, and dense rows of one parameter over all segments, for a few entries of its first axis at a time.

    The next rows may be written over these.
    """
    if len(parts) == 1 and len(parts[0]) == 1 and isinstance(parts[0][0], RowsBlock):
        yield parts[0][0].entries(), parts[0][0].rows()
        return
    entries = torch.unique(torch.cat([block.entries() for blocks in parts for block in blocks]))
    one = sum(blocks[0].rows(entries[:1]).nbytes for blocks in parts if blocks)
    if len(parts) == 1 and len(parts[0]) == 1 and isinstance(parts[0][0], LinearBlock):
        block = parts[0][0]
        step = max(1, min(len(entries), block_bytes(entries.device) // max(one, 1)))
        height, width = block.rows(entries[:1]).shape
        memory = torch.empty(height * width * step, dtype=block.b.dtype, device=entries.device)
        for index in entries.split(step):  # memory that was in use before is much faster than new memory
            yield index, block.rows(index, memory[: height * width * len(index)].view(height, -1))
        return
    for index in entries.split(max(1, BLOCK_BYTES // max(one, 1))):
        yield index, torch.cat([sum(block.rows(index) for block in blocks) for blocks in parts])  # type: ignore[misc]
