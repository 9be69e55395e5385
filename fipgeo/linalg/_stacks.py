"""Arithmetic on stacks of vectors `[k, n]`: sums in float64, orthonormal complements, seeded draws."""

from collections.abc import Callable

import torch
from torch import Tensor

_BLOCK = 2**16  # columns multiplied in the dtype of the vectors
_PIECE = 2**10  # columns summed in the dtype of the vectors
_SHORT = 4  # rows that are multiplied faster from the left, up to three times; with eight it is slower


def wide(device: torch.device) -> torch.dtype:
    """The dtype in which scalars are accumulated: float64, or float32 where `device` has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def dots(x: Tensor, y: Tensor) -> Tensor:
    """Row by row `<x_i, y_i>`, `[k, n]` twice to `[k]`: short sums in their own dtype, added in float64."""
    if x is y:
        return norms(x).square()
    if len(x) == 1:  # without the products written out; for more rows that is slower
        return _added(lambda a, b: torch.einsum("kpn,kpn->kp", a, b), x, y)
    return _added(lambda part: part.sum(-1), x * y)


def norms(x: Tensor) -> Tensor:
    """Row by row `|x_i|`, `[k, n]` to `[k]`: short sums in the dtype of x, added in float64."""
    return _added(lambda part: torch.linalg.vector_norm(part, dim=-1), x, power=2).sqrt()


def _added(reduce: Callable[..., Tensor], *stacks: Tensor, power: int = 1) -> Tensor:
    """Rows reduced in short pieces, several times faster than a sum that converts every number, then added."""
    whole = stacks[0].shape[-1] // _PIECE * _PIECE
    long = reduce(*(x[:, :whole].unflatten(-1, (-1, _PIECE)) for x in stacks))
    rest = reduce(*(x[:, whole:].unsqueeze(1) for x in stacks))
    return sum(part.to(wide(part.device)).pow(power).sum(-1) for part in (long, rest))  # type: ignore[return-value]


def scaled(factors: Tensor, x: Tensor) -> Tensor:
    """Row by row `factors_i x_i` in the dtype of `x`."""
    return factors.to(x.dtype).unsqueeze(-1) * x


def inner(x: Tensor, y: Tensor) -> Tensor:
    """All products `x y^T` of `[j, n]` and `[k, n]`, `[j, k]`, sums of column blocks added in float64."""
    if len(x) > len(y) and len(y) <= _SHORT:
        return inner(y, x).T
    dtype = wide(x.device)
    if x.dtype == dtype:
        return x @ y.T
    total = torch.zeros(len(x), len(y), dtype=dtype, device=x.device)
    for start in range(0, x.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        total += (x[:, columns] @ y[:, columns].T).to(dtype)
    return total


def orthonormal_complement(block: Tensor, basis: Tensor, passes: int = 2) -> Tensor:
    """Orthonormal rows spanning `block` `[b, n]` outside the orthonormal rows of `basis` `[j, n]`.

    The block is made orthonormal before every projection, so the last pass finds rows of length one and leaves
    them orthogonal to working precision. Rows that lie in the span (or are zero) are dropped: `[b', n]`,
    b' <= b. One pass is enough for a block that has been projected once. The device is waited for once a pass.
    """
    block, kept, _ = _orthonormal_rows(block, 0.0)
    shortest, step = 1.0, 0
    while step < passes or (shortest < 0.5 and step < passes + 2):  # what shrank must be projected again
        block = torch.addmm(block, inner(block, basis).to(block.dtype), basis, alpha=-1)
        block, alive, shortest = _orthonormal_rows(block, 100 * torch.finfo(block.dtype).eps)
        kept, step = kept & alive, step + 1
    return block if bool(kept.all()) else block[kept.to(block.device)]


def _orthonormal_rows(block: Tensor, floor: float) -> tuple[Tensor, Tensor, float]:
    """Orthonormal rows of the same span, which of them (on the host) were longer than `floor`, the least such length.

    By a Cholesky factor of the small Gram matrix where the rows are well apart, else by Gram-Schmidt, twice each;
    rows of which only rounding is left become zero.
    """
    gram = inner(block, block).cpu().double()
    lengths = gram.diagonal().sqrt()
    alive = torch.isfinite(lengths) & (lengths > floor)
    if len(block) and bool(torch.isfinite(gram).all()) and bool(alive.all()):
        cosines = gram / torch.outer(lengths, lengths)
        if float(torch.linalg.eigvalsh(cosines)[0]) > 0.01:
            inverse = torch.linalg.inv(torch.linalg.cholesky(cosines)) / lengths
            return inverse.to(block.device, block.dtype) @ block, alive, float(lengths.min())
    out = torch.zeros_like(block)
    for i in alive.nonzero().squeeze(-1).tolist():
        row = scaled(1 / norms(block[i : i + 1]), block[i : i + 1])
        for _ in range(2):
            row = torch.addmm(row, inner(row, out[:i]).to(row.dtype), out[:i], alpha=-1)
        length = float(norms(row))
        alive[i] = length > 100 * torch.finfo(block.dtype).eps
        if alive[i]:
            out[i] = row[0] / length
    return out, alive, float(lengths[alive].min()) if bool(alive.any()) else 1.0


def as_generator(generator: torch.Generator | int | None) -> torch.Generator:
    """A generator from a generator (itself), a seed, or None (the fixed seed 0); global state is not touched.

    Examples:
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
