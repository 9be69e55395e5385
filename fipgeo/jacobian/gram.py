"""The dual matrix K = R R^T in float64, from rows that need not all be in memory at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import ListBatches, TensorBatches
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.materialised import materialised_root
from fipgeo.jacobian.rows import as_tree

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**28
"""Temporary rows and wide copies are made in blocks of at most this size."""

STRIP = 160
"""Rows of a symmetric matrix that are multiplied or copied at once: enough for fast products, few enough for caches."""


def gram_by_pairs(function: EmbeddedOutputs, theta: Tensor, survey: Survey, max_bytes: int) -> Tensor:
    """K = R R^T in float64, `[N * M, N * M]`, from rows held block-wise within `max_bytes`.

    Two blocks are in memory at a time, and rows are made again for every pair: b blocks cost b (b + 1) / 2 passes
    instead of 1. A block is at least one example, or one batch if its examples cannot be set apart.
    """
    height = max_bytes // (2 * len(theta) * theta.element_size())
    if survey.num_rows <= 2 * height:
        rows = materialised_root(function, theta, survey).matrix
        return inner_products(rows, rows)
    out = torch.zeros(survey.num_rows, survey.num_rows, dtype=torch.float64, device=theta.device)
    blocks = _blocks(function, theta, survey, height)
    ends = torch.tensor([part.num_rows for _, part in blocks]).cumsum(0).tolist()
    places = [slice(end - part.num_rows, end) for end, (_, part) in zip(ends, blocks, strict=True)]
    for i, here in enumerate(places):
        left = materialised_root(blocks[i][0], theta, blocks[i][1]).matrix
        out[here, here] = inner_products(left, left)
        for j in range(i + 1, len(blocks)):
            right = materialised_root(blocks[j][0], theta, blocks[j][1]).matrix
            out[here, places[j]] = inner_products(left, right)
            out[places[j], here] = out[here, places[j]].T
    return out


def inner_products(a: Tensor, b: Tensor, *, single: bool = False) -> Tensor:
    """A B^T accumulated in float64 over column blocks, without a float64 copy of A or B.

    Args:
        a: `[m, n]`.
        b: `[k, n]`; half of the products are saved where it is `a` itself.
        single: Whether products inside a block are taken in the precision of A and B.
    """
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    if a is b:
        add_inner_products(out, a, single=single)
        return mirrored(out)
    for left, right in zip(_column_blocks(a, len(b), single), _column_blocks(b, len(a), single), strict=True):
        out += left @ right.T
    return out


def add_inner_products(out: Tensor, a: Tensor, *, single: bool = False) -> None:
    """Add the upper triangle of A A^T to `out` `[m, m]`; what is below the diagonal is left undefined."""
    height = max(STRIP, -(-len(a) // 4))
    for rows in _column_blocks(a, len(a), single):
        for here in range(0, len(a), height):
            out[here : here + height, here:] += rows[here : here + height] @ rows[here:].T


def mirrored(out: Tensor) -> Tensor:
    """The matrix itself, its upper triangle copied onto the lower one strip by strip."""
    for here in range(0, len(out), STRIP):
        strip = out[here : here + STRIP]
        corner = strip[:, here : here + STRIP]
        corner.copy_(corner.triu() + corner.triu(1).T)
        out[here + STRIP :, here : here + STRIP] = strip[:, here + STRIP :].T
    return out


def _column_blocks(a: Tensor, other: int, single: bool) -> Iterator[Tensor]:
    """A in column blocks, in float64 unless its own precision does; `other` rows stand opposite."""
    itemsize = a.itemsize if single else 8
    width = max(block_bytes(a.device) // (itemsize * max(len(a), other)), 1)
    for start in range(0, a.shape[1], width):
        part = a[:, start : start + width]
        yield part if single else part.double()


def block_bytes(device: torch.device) -> int:
    """Size of wide copies and temporary rows: what stays in the caches of a CPU, or keeps another device busy."""
    return min(BLOCK_BYTES, 2**24) if device.type == "cpu" else BLOCK_BYTES


def _blocks(
    function: EmbeddedOutputs, theta: Tensor, survey: Survey, height: int
) -> list[tuple[EmbeddedOutputs, Survey]]:
    """The data in order as parts of at most `height` rows, batches cut up or put together for it where possible."""
    parts: list[list[tuple[Any, int, int]]] = [[]]
    used = 0
    for batch, examples, rows in zip(function.batches, survey.examples, survey.rows, strict=True):
        width = rows // examples
        for piece, count in _pieces(function, theta, batch, examples, examples if rows <= height else height // width):
            if parts[-1] and used + count * width > height:
                parts.append([])
                used = 0
            parts[-1].append((piece, count, count * width))
            used += count * width
    out = []
    for part in parts:
        pieces, counts, rows = zip(*part, strict=True)
        out.append((function.over(ListBatches(list(pieces))), Survey(rows, counts)))
    return out


def _pieces(function: EmbeddedOutputs, theta: Tensor, batch: Any, examples: int, step: int) -> list[tuple[Any, int]]:
    """A batch in pieces of `step` examples with their counts; whole if it cannot be cut or its outputs would change."""
    step = max(step, 1)
    if step >= examples:
        return [(batch, examples)]
    try:
        pieces = list(TensorBatches(as_tree(batch), step))
        with function.map.frozen():
            weights = function.map.named(theta)
            whole = function.on(batch)(weights)
            split = torch.cat([function.on(piece)(weights) for piece in pieces])
        if split.shape == whole.shape and bool((split - whole).norm() <= 1e-4 * whole.norm()):
            return [(piece, min(step, examples - i * step)) for i, piece in enumerate(pieces)]
    except Exception as error:  # whatever a model says to a smaller batch, the whole one is at hand
        log.info("a batch stays whole, since the model does not take pieces of it: %s", error)
    return [(batch, examples)]
