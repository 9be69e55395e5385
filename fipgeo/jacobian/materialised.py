"""The root as rows in memory, and the Gram matrix of rows that need not all be in memory at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from fipgeo.data import ListBatches, TensorBatches
from fipgeo.jacobian.autodiff import pull_back, vectorised
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.linalg import Dense
from fipgeo.outputs import embed
from fipgeo.trees import map_tensors

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**28
"""Rows are made in blocks of about this size."""


def materialised_root(function: EmbeddedOutputs, theta: Tensor, survey: Survey) -> Dense:
    """R as a dense operator `[N * M, D]`; the caller has checked that it fits."""
    start = 0
    with function.map.frozen():
        out = torch.empty(survey.num_rows, len(theta), dtype=theta.dtype, device=theta.device)
        for rows in _row_blocks(function, theta, survey):
            out[start : start + len(rows)] = rows
            start += len(rows)
    return Dense(out)


def gram(function: EmbeddedOutputs, theta: Tensor, survey: Survey, max_bytes: int) -> Tensor:
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


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """A B^T accumulated in float64 over column blocks, without a float64 copy of A or B."""
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    width = max(BLOCK_BYTES // (8 * max(len(a), len(b))), 1)
    for start in range(0, a.shape[1], width):
        left = a[:, start : start + width].double()
        out += left @ (left if a is b else b[:, start : start + width].double()).T
    return out


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
        out.append((EmbeddedOutputs(function.map, function.geometry, ListBatches(list(pieces))), Survey(rows, counts)))
    return out


def _pieces(function: EmbeddedOutputs, theta: Tensor, batch: Any, examples: int, step: int) -> list[tuple[Any, int]]:
    """A batch in pieces of `step` examples with their counts; whole if it cannot be cut or its outputs would change."""
    step = max(step, 1)
    if step >= examples:
        return [(batch, examples)]
    try:
        pieces = list(TensorBatches(_as_tree(batch), step))
        whole = embed(function.geometry, function.map(theta, batch))
        split = torch.cat([embed(function.geometry, function.map(theta, piece)) for piece in pieces])
        if split.shape == whole.shape and bool((split - whole).norm() <= 1e-4 * whole.norm()):
            return [(piece, min(step, examples - i * step)) for i, piece in enumerate(pieces)]
    except Exception as error:  # whatever a model says to a smaller batch, the whole one is at hand
        log.info("a batch stays whole, since the model does not take pieces of it: %s", error)
    return [(batch, examples)]


def _row_blocks(function: EmbeddedOutputs, theta: Tensor, survey: Survey) -> Iterator[Tensor]:
    """Rows of the root `[rows, D]`, block after block, in order; to be consumed inside `function.map.frozen()`."""
    weights = function.map.named(theta)
    apart, tried = False, 0
    for batch, examples, rows in zip(function.batches, survey.examples, survey.rows, strict=True):
        if tried < min(examples, 2):  # a batch of one shows nothing about larger ones
            apart, tried = _examples_stand_alone(function, weights, batch, examples), examples
        height = max(BLOCK_BYTES // (len(theta) * theta.element_size()), 1)
        if apart:
            yield from _rows_by_example(function, weights, batch, max(height * examples // rows, 1))
        else:
            yield from _rows_by_cotangent(function, weights, batch, rows, height)


def _rows_by_example(function: EmbeddedOutputs, weights: Weights, batch: Any, step: int) -> Iterator[Tensor]:
    """Rows of each example from its own outputs: one vectorised reverse pass per output, on that example alone."""
    space = function.map.space

    def rows(example: Any) -> Tensor:
        single = map_tensors(example, lambda t: t[None])
        return space.ravel(jacrev(function.on(single))(weights))

    for part in TensorBatches(_as_tree(batch), step):
        yield vectorised(rows)(part).flatten(0, 1)


def _rows_by_cotangent(
    function: EmbeddedOutputs, weights: Weights, batch: Any, rows: int, height: int
) -> Iterator[Tensor]:
    """Rows as R^T e_i over the whole batch, for models whose examples cannot be set apart."""
    space = function.map.space
    z, pull = pull_back(function.on(batch), weights)
    for index in torch.arange(rows, device=z.device).split(min(height, 64)):
        part = z.new_zeros(len(index), rows).scatter_(1, index[:, None], 1.0)
        try:
            block = vectorised(lambda u: space.ravel(pull(u)[0]))(part)
        except (RuntimeError, ValueError) as error:
            log.info("rows are made one by one, since the model cannot be vectorised: %s", error)
            block = torch.stack([space.ravel(pull(u)[0]) for u in part])
        yield block


def _examples_stand_alone(function: EmbeddedOutputs, weights: Weights, batch: Any, examples: int) -> bool:
    """Whether the rows of single examples equal those of the batch: tried on the first two, checked by one pullback."""
    try:
        whole = TensorBatches(_as_tree(batch), 2)
        few = whole.take(torch.arange(min(2, examples)))
        rows = torch.cat(list(_rows_by_example(function, weights, few, 2)))
        z, pull = pull_back(function.on(few), weights)
    except Exception as error:  # whatever a model says to a single example under vmap, whole batches are at hand
        log.info("rows are made from whole batches, since examples cannot be vectorised: %s", error)
        return False
    if len(whole) != examples or len(rows) != z.numel():
        return False
    u = torch.linspace(-1.0, 1.3, z.numel(), dtype=z.dtype, device=z.device)
    expected = function.map.space.ravel(pull(u)[0])
    gap = (u.to(rows.dtype) @ rows - expected).norm()
    coarse = max(torch.finfo(t.dtype).eps for t in weights.values())
    return bool(gap <= max(1e-3, 8 * coarse) * expected.norm())


def _as_tree(batch: Any) -> Any:
    """The batch as tensors, dicts and tuples of tensors.

    Raises:
        TypeError: Anything else is in it.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: _as_tree(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(_as_tree(value) for value in batch)
    raise TypeError(f"the batch holds a {type(batch).__name__}")
