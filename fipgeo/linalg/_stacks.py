"""Arithmetic on stacks of vectors `[k, n]`: sums in float64, orthonormal complements, seeded draws."""

import torch
from torch import Tensor

_BLOCK = 2**16  # columns summed in the dtype of the vectors


def wide(device: torch.device) -> torch.dtype:
    """The dtype in which scalars are accumulated: float64, or float32 where `device` has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Row by row `<x_i, y_i>`, `[k, n]` twice to `[k]`, accumulated in float64."""
    return torch.sum(x * y, dim=-1, dtype=wide(x.device))


def norms(x: Tensor) -> Tensor:
    """Row by row `|x_i|`, `[k, n]` to `[k]` in float64."""
    return dots(x, x).sqrt()


def scaled(factors: Tensor, x: Tensor) -> Tensor:
    """Row by row `factors_i x_i` in the dtype of `x`."""
    return factors.to(x.dtype).unsqueeze(-1) * x


def inner(x: Tensor, y: Tensor) -> Tensor:
    """All products `x y^T` of `[j, n]` and `[k, n]`, `[j, k]`, sums of column blocks added in float64."""
    if len(x) > len(y):  # matrix products are several times faster with the short side on the left
        return inner(y, x).T
    dtype = wide(x.device)
    if x.dtype == dtype:
        return x @ y.T
    total = torch.zeros(len(x), len(y), dtype=dtype, device=x.device)
    for start in range(0, x.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        total += (x[:, columns] @ y[:, columns].T).to(dtype)
    return total


def orthonormal_complement(block: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal rows spanning `block` `[b, n]` outside the orthonormal rows of `basis` `[j, n]`.

    Two passes of projection and QR, so that the answer is orthogonal to working precision even when little of
    a row was left by the first pass. Rows that lie in the span (or are zero) are dropped: `[b', n]`, b' <= b.
    """
    floor = 100 * torch.finfo(block.dtype).eps
    for _ in range(2):
        lengths = norms(block)
        usable = torch.isfinite(lengths) & (lengths > 0)
        block = scaled(1 / lengths[usable], block[usable])
        block = block - inner(block, basis).to(block.dtype) @ basis
        q, r = torch.linalg.qr(block.T)
        block = q.T[r.diagonal().abs() > floor]
    return block


def as_generator(generator: torch.Generator | int | None) -> torch.Generator:
    """A generator from a generator (itself), a seed, or None (the fixed seed 0); global state is not touched.

    Example:
        >>> as_generator(3).initial_seed(), as_generator(None).initial_seed()
        (3, 0)
    """
    if isinstance(generator, torch.Generator):
        return generator
    return torch.Generator().manual_seed(0 if generator is None else generator)


def gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal draws in the dtype and on the device of `like`, made on the generator's own device."""
    draws = torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype)
    return draws.to(like.device)


def rademacher(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    """Independent signs +1 and -1 in the dtype and on the device of `like`."""
    bits = torch.randint(0, 2, shape, generator=generator, device=generator.device)
    return (2 * bits - 1).to(dtype=like.dtype, device=like.device)
