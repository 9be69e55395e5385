"""The root as rows in memory, and the Gram matrix of rows that need not all be in memory at once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vjp, vmap

from fipgeo.data import ListBatches, TensorBatches, map_tensors
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.linalg import Dense

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**28
"""Rows are made in blocks of about this size."""


def materialised_root(function: EmbeddedOutputs, theta: Tensor, survey: Survey) -> Dense:
    """R as a dense operator `[N * M, D]`; the caller has checked that it fits."""
    out = torch.empty(survey.num_rows, len(theta), dtype=theta.dtype, device=theta.device)
    start = 0
    for rows in _row_blocks(function, theta, survey):
        out[start : start + len(rows)] = rows
        start += len(rows)
    return Dense(out)


def gram(function: EmbeddedOutputs, theta: Tensor, survey: Survey, max_bytes: int) -> Tensor:
    """K = R R^T in float64, `[N * M, N * M]`, from rows held block-wise within `max_bytes`.

    Blocks of batches are paired, so rows are made again for every pair: b blocks cost b (b + 1) / 2 passes instead of 1.
    """
    per_batch = [rows * len(theta) * theta.element_size() for rows in survey.rows]
    out = torch.zeros(survey.num_rows, survey.num_rows, dtype=torch.float64, device=theta.device)
    groups = _groups(per_batch, max_bytes // 2)
    batches = list(function.batches) if len(groups) > 1 else []
    offsets = [0]
    for rows in survey.rows:
        offsets.append(offsets[-1] + rows)

    def block(group: list[int]) -> Tensor:
        if len(groups) == 1:
            return materialised_root(function, theta, survey).matrix
        part = EmbeddedOutputs(function.map, function.geometry, ListBatches([batches[i] for i in group]))
        sub = Survey(tuple(survey.rows[i] for i in group), tuple(survey.examples[i] for i in group))
        return materialised_root(part, theta, sub).matrix

    for i, left in enumerate(groups):
        a, rows_a = block(left), slice(offsets[left[0]], offsets[left[-1] + 1])
        for j in range(i, len(groups)):
            b = a if i == j else block(groups[j])
            rows_b = slice(offsets[groups[j][0]], offsets[groups[j][-1] + 1])
            out[rows_a, rows_b] = inner_products(a, b)
            out[rows_b, rows_a] = out[rows_a, rows_b].T
    return out


def inner_products(a: Tensor, b: Tensor) -> Tensor:
    """A B^T accumulated in float64 over column blocks, without a float64 copy of A or B."""
    out = torch.zeros(len(a), len(b), dtype=torch.float64, device=a.device)
    width = max(BLOCK_BYTES // (8 * max(len(a), len(b))), 1)
    for start in range(0, a.shape[1], width):
        left = a[:, start : start + width].double()
        out += left @ (left if a is b else b[:, start : start + width].double()).T
    return out


def _groups(sizes: list[int], budget: int) -> list[list[int]]:
    """Consecutive indices gathered while their sizes fit the budget; a single one always does."""
    groups: list[list[int]] = [[]]
    used = 0
    for index, size in enumerate(sizes):
        if groups[-1] and used + size > budget:
            groups.append([])
            used = 0
        groups[-1].append(index)
        used += size
    return groups


def _row_blocks(function: EmbeddedOutputs, theta: Tensor, survey: Survey) -> Iterator[Tensor]:
    """Rows of the root `[rows, D]`, block after block, in order."""
    weights = function.map.named(theta)
    apart: bool | None = None
    with function.map.frozen():
        for batch, examples, rows in zip(function.batches, survey.examples, survey.rows, strict=True):
            if apart is None:
                apart = _examples_stand_alone(function, weights, batch, examples)
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
        yield vmap(rows, randomness="same")(part).flatten(0, 1)


def _rows_by_cotangent(
    function: EmbeddedOutputs, weights: Weights, batch: Any, rows: int, height: int
) -> Iterator[Tensor]:
    """Rows as R^T e_i over the whole batch, for models whose examples cannot be set apart."""
    space = function.map.space
    z, pull = vjp(function.on(batch), weights)
    basis = torch.eye(rows, dtype=z.dtype, device=z.device)
    for part in basis.split(min(height, 64)):
        try:
            yield vmap(lambda u: space.ravel(pull(u)[0]), randomness="same")(part)
        except (RuntimeError, ValueError) as error:
            log.info("rows are made one by one, since the model cannot be vectorised: %s", error)
            yield torch.stack([space.ravel(pull(u)[0]) for u in part])


def _examples_stand_alone(function: EmbeddedOutputs, weights: Weights, batch: Any, examples: int) -> bool:
    """Whether the rows of single examples equal those of the batch: tried on the first two, checked by one pullback."""
    tree = _as_tree(batch)
    if tree is None:
        return False
    try:
        whole = TensorBatches(tree, 2)
    except ValueError:
        return False
    if len(whole) != examples:
        return False
    few = whole.take(torch.arange(min(2, examples)))
    try:
        rows = torch.cat(list(_rows_by_example(function, weights, few, 2)))
        z, pull = vjp(function.on(few), weights)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        log.info("rows are made from whole batches, since examples cannot be vectorised: %s", error)
        return False
    if len(rows) != z.numel():
        return False
    u = torch.linspace(-1.0, 1.3, z.numel(), dtype=z.dtype, device=z.device)
    expected = function.map.space.ravel(pull(u)[0])
    gap = (u.to(rows.dtype) @ rows - expected).norm()
    return bool(gap <= 1e-3 * expected.norm())


def _as_tree(batch: Any) -> Any:
    """The batch as tensors, dicts and tuples of tensors, or None if anything else is in it."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        parts = {key: _as_tree(value) for key, value in batch.items()}
        return None if any(p is None for p in parts.values()) else parts
    if isinstance(batch, list | tuple):
        items = tuple(_as_tree(value) for value in batch)
        return None if any(p is None for p in items) else items
    return None
