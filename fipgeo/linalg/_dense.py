"""Operators as matrices and as scipy operators: behind the methods of `LinearOperator`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fipgeo.linalg._stacks import inner, wide

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    from fipgeo.linalg.operator import LinearOperator

_CHUNK_BYTES = 2**28
_ROWS_BYTES = 2**31


def basis_blocks(operator: LinearOperator, size: int) -> Iterator[tuple[slice, Tensor]]:
    """The rows of the identity `[size, size]` in blocks of bounded memory, with their positions."""
    step = max(1, _CHUNK_BYTES // max(1, operator.dtype.itemsize * max(operator.shape)))
    for start in range(0, size, step):
        stop = min(size, start + step)
        rows = torch.zeros(stop - start, size, dtype=operator.dtype, device=operator.device)
        rows[:, start:stop].fill_diagonal_(1)
        yield slice(start, stop), rows


@torch.no_grad()
def to_dense(operator: LinearOperator, max_bytes: int) -> Tensor:
    """See `LinearOperator.to_dense`."""
    m, n = operator.shape
    num_bytes = m * n * operator.dtype.itemsize
    if num_bytes > max_bytes:
        raise ValueError(
            f"to_dense would make a {m} x {n} matrix of {num_bytes:,} bytes, max_bytes is {max_bytes:,}; use "
            f"products (cg, lanczos), or pass max_bytes={num_bytes}"
        )
    dense = torch.empty(m, n, dtype=operator.dtype, device=operator.device)
    if m < n:
        for block, rows in basis_blocks(operator, m):
            dense[block] = operator.adjoint(rows)
    else:
        for block, rows in basis_blocks(operator, n):
            dense[:, block] = operator(rows).T
    return dense


@torch.no_grad()
def diagonal(operator: LinearOperator) -> Tensor:
    """See `LinearOperator.diagonal`."""
    m, n = operator.shape
    if m != n:
        raise ValueError(f"diagonal() needs a square operator, not {operator.shape}; for R^T R take Gram(R)")
    entries = torch.empty(n, dtype=operator.dtype, device=operator.device)
    for block, rows in basis_blocks(operator, n):
        entries[block] = operator(rows)[:, block].diagonal()
    return entries


@torch.no_grad()
def gram(operator: LinearOperator) -> Tensor:
    """See `LinearOperator.gram`."""
    m, n = operator.shape
    if m * n * operator.dtype.itemsize <= _ROWS_BYTES:
        rows = to_dense(operator, _ROWS_BYTES)
        return inner(rows, rows)
    products = torch.empty(m, m, dtype=wide(operator.device), device=operator.device)
    for block, rows in basis_blocks(operator, m):
        products[block] = operator(operator.adjoint(rows)).to(products.dtype)
    return (products + products.T) / 2


def to_scipy(operator: LinearOperator) -> ScipyOperator:
    """See `LinearOperator.to_scipy`."""
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    if operator.dtype == torch.bfloat16:
        raise TypeError("numpy has no bfloat16; build the operator in float32 to export it to scipy")

    def product(call: Callable[[Tensor], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
        def columns(x: np.ndarray) -> np.ndarray:
            stack = torch.from_numpy(np.array(x.T, order="C")).to(operator.device, operator.dtype)
            return call(stack).detach().cpu().numpy().T

        return columns

    forward, backward = product(operator), product(operator.adjoint)
    dtype = torch.empty(0, dtype=operator.dtype).numpy().dtype
    products = {"matvec": forward, "rmatvec": backward, "matmat": forward, "rmatmat": backward}
    return ScipyOperator(shape=operator.shape, dtype=dtype, **products)  # pyright: ignore[reportCallIssue]
