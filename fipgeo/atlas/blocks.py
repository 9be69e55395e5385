"""The vectors of one parameter tensor, stacked, and their weighted sum and inner products.

Axis letters: n vectors, K parts of the tensor, m weights of a part, P weights of the tensor, k stacked coefficients,
T tensors side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from fipgeo.lazy import Entry, Factors, value, write

_PIECE = 2**17
"""Stored numbers that are widened at a time where storage is narrower than the sums."""

TALL = 4096
"""Rows from which on a matrix may be one of embeddings, of which a batch looks up few: other rows have no gradient."""


class Block(nn.Module):
    """n vectors `[n, P]` over one parameter tensor, divided into K parts.

    The sum `sum_i w_ik tau_ip` (p in part k) is a product of matrices, whose adjoint takes a gradient to its inner
    products with the vectors. Sums are in the dtype of the coefficients, whatever the vectors are stored in.

    Args:
        vectors: `[n, *shape]`, in the dtype of the storage.
        order: Places `[P]` of the weights among the parts (`partition`), or None for one part.
        parts: K.

    Attributes:
        data: The vectors `[K, n, m]`, each weight at its place, zero where a part is one weight short.
        shape: Of the tensor.
        size: n and K.
        rows: The vectors `[n, P]` where they are one part and in memory, else None.
    """

    data: Tensor
    order: Tensor | None
    rows: Tensor | None

    def __init__(self, vectors: Tensor, order: Tensor | None = None, parts: int = 1) -> None:
        super().__init__()
        self._describe(vectors.shape[1:], len(vectors), order, parts, vectors.device)
        self.register_buffer("data", self._parted(vectors), persistent=False)
        self.rows = self.data[0] if self.order is None else None

    def _describe(self, shape: torch.Size, count: int, order: Tensor | None, parts: int, device: torch.device) -> None:
        parted = order is not None and parts > 1
        self.shape, self.size = shape, (count, parts if parted else 1)
        order = order.to(device) if order is not None and parted else None
        self.register_buffer("order", order, persistent=False)
        self.rows = None

    def _parted(self, vectors: Tensor) -> Tensor:
        """Vectors `[n, *shape]` as `[K, n, m]`."""
        flat = vectors.reshape(len(vectors), -1)
        if self.order is None:
            return flat.unsqueeze(0)
        parts = self.size[1]
        width = -(-flat.shape[1] // parts)
        table = flat.new_zeros(len(flat), parts * width)
        table.index_copy_(1, self.order.long(), flat)
        return table.view(len(flat), parts, width).transpose(0, 1).contiguous()

    def compose(self, weights: Tensor, base: Tensor | None = None) -> Tensor:
        """Weighted sums of the vectors, plus the base.

        Args:
            weights: `[..., n, K]`.
            base: `[*shape]`, added in the dtype of the weights.

        Returns:
            `[..., *shape]` in the dtype of the weights.
        """
        lead, data = weights.shape[:-2], self.data
        plain = len(data) == 1 and self.order is None and data.dtype == weights.dtype
        rows = weights.reshape(-1, *weights.shape[-2:]).permute(2, 0, 1).contiguous()  # [K, k, n]
        start = None if base is None else base.reshape(1, -1).to(weights.dtype)
        if plain:
            out = rows[0] @ data[0] if start is None else torch.addmm(start, rows[0], data[0])
        else:
            out = _product(rows, data).transpose(0, 1).flatten(1)  # [k, K m]
            out = out if self.order is None else out.index_select(1, self.order)
            out = out if start is None else out.add_(start)
        return out.reshape((*lead, *self.shape))

    def compose_one(self, weights: Tensor, base: Tensor) -> Tensor:
        """The sum `[*shape]` for flat weights `[n K]`, plus the base: `compose` without detours where there are none.

        Networks have hundreds of small tensors, on which the way to a sum takes as long as the sum.
        """
        rows = self._plain(weights.dtype)
        if rows is None or base.dtype != weights.dtype:
            return self.compose(weights.view(self.size), base)
        return torch.addmv(base.reshape(-1), rows.t(), weights).view(self.shape)

    def project_one(self, gradient: Tensor) -> Tensor:
        """Inner products `[n K]` with one gradient `[*shape]`: `project` without detours where there are none."""
        rows = self._plain(gradient.dtype)
        if rows is None:
            return self.project(gradient).reshape(-1)
        if len(self.shape) == 2 and self.shape[0] >= TALL and not gradient.is_cuda:
            live = torch.linalg.vector_norm(gradient, ord=1, dim=1).nonzero()[:, 0]
            if 4 * len(live) < len(gradient):
                some = rows.view(-1, *self.shape).index_select(1, live)
                return torch.mv(some.flatten(1), gradient.index_select(0, live).flatten())
        return torch.mv(rows, gradient.reshape(-1))

    def _plain(self, dtype: torch.dtype) -> Tensor | None:
        """The vectors `[n, P]` where they are not divided and lie in this dtype."""
        return self.rows if self.rows is not None and self.rows.dtype == dtype else None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Block:
        """Casts and moves, as for any module."""
        super()._apply(fn, recurse)
        self.rows = None if self.rows is None else self.data[0]
        return self

    def project(self, gradient: Tensor) -> Tensor:
        """Inner products of gradients `[..., *shape]` with the vectors, `[..., n, K]`: the adjoint of `compose`."""
        lead, data = gradient.shape[: gradient.dim() - len(self.shape)], self.data
        rows = gradient.reshape(lead.numel(), -1)
        if self.order is not None:
            table = rows.new_zeros(len(rows), data.shape[0] * data.shape[2])
            rows = table.index_copy_(1, self.order.long(), rows)
        rows = rows.view(len(rows), data.shape[0], -1).transpose(0, 1)  # [K, k, m]
        return _product_transposed(rows, data).permute(1, 2, 0).reshape((*lead, *self.size))


class StreamedBlock(Block):
    """A block whose vectors are made when it is used, and then forgotten: one block at a time is in memory.

    Args:
        entries: The vectors, each read, multiplied or computed when it is asked for.
        dtype: In which they are stacked; None for the widest of theirs.
        device: Where sums are taken; the module's moves are followed.
        order: As in `Block`.
        parts: As in `Block`.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        dtype: torch.dtype,
        device: torch.device,
        order: Tensor | None = None,
        parts: int = 1,
    ) -> None:
        nn.Module.__init__(self)
        self.entries, self.dtype = list(entries), dtype
        self._describe(entries[0].shape, len(entries), order, parts, device)
        self.register_buffer("_here", torch.empty(0, device=device), persistent=False)
        self._here: Tensor

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The vectors `[K, n, m]`, made anew."""
        out = torch.empty(len(self.entries), *self.shape, dtype=self.dtype, device=self._here.device)
        for row, entry in zip(out, self.entries, strict=True):
            write(entry, row)
        return self._parted(out)

    def _plain(self, dtype: torch.dtype) -> Tensor | None:
        """As for a block in memory."""
        return self.data[0] if self.order is None and self.dtype == dtype else None


class FactoredBlock(Block):
    """A block of vectors that are products of narrow factors, which are never multiplied: sum_i w_i L_i R_i.

    Args:
        entries: The vectors, of one shape.
        dtype: To store the factors in; None for their own.
        device: Where they are kept.
    """

    def __init__(self, entries: Sequence[Factors], dtype: torch.dtype | None, device: torch.device) -> None:
        nn.Module.__init__(self)
        self._describe(entries[0].shape, len(entries), None, 1, device)
        owner = torch.cat([torch.full((entry.rank,), i) for i, entry in enumerate(entries)])
        kept = [entry.to(device) if dtype is None else entry.to(device, dtype) for entry in entries]
        self.register_buffer("left", torch.cat([entry.left for entry in kept], 1), persistent=False)
        self.register_buffer("right", torch.cat([entry.right for entry in kept], 0), persistent=False)
        self.register_buffer("owner", owner.to(device), persistent=False)
        self.left: Tensor
        self.right: Tensor
        self.owner: Tensor

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """The vectors `[1, n, P]`, multiplied anew."""
        wide = torch.promote_types(self.left.dtype, torch.float32)
        return self.compose(torch.eye(self.size[0], dtype=wide, device=self.left.device)[..., None]).flatten(1)[None]

    def compose(self, weights: Tensor, base: Tensor | None = None) -> Tensor:
        """The sum as one product of all factors, those on the left scaled."""
        lead = weights.shape[:-2]
        rows = weights.reshape(-1, self.size[0]).index_select(1, self.owner)  # [k, R]
        left, right = self.left.to(weights.dtype), self.right.to(weights.dtype)
        out = ((left * rows.unsqueeze(1)) @ right).reshape((*lead, *self.shape))
        return out if base is None else out.add_(base.to(weights.dtype))

    def project(self, gradient: Tensor) -> Tensor:
        """Inner products l^T G r of gradients with every pair of factors, gathered by vector."""
        lead = gradient.shape[: gradient.dim() - len(self.shape)]
        left, right = self.left.to(gradient.dtype), self.right.to(gradient.dtype)
        matrix = gradient.reshape(lead.numel(), len(left), right.shape[1])
        met = ((left.mT @ matrix) * right).sum(-1)  # [k, R]
        return met.new_zeros(len(met), self.size[0]).index_add_(1, self.owner, met).reshape((*lead, *self.size))


class JoinedBlock(Block):
    """Blocks of equal size as one block, whose tensor `[T P]` is theirs, one after the other.

    Networks have hundreds of small tensors, on each of which the way to a sum takes longer than the sum.

    Args:
        blocks: T blocks of equal n, K and P. Their vectors are copied; streamed ones are read here.
        dtype: To keep the vectors in, which is that of the sums, so that nothing is widened later.
    """

    def __init__(self, blocks: Sequence[Block], dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        (count, parts), first = blocks[0].size, blocks[0]
        data = torch.cat([block.data.to(dtype) for block in blocks])
        step = parts * data.shape[2]
        orders = [block.order + i * step for i, block in enumerate(blocks) if block.order is not None]
        self.shape = torch.Size([len(blocks) * first.shape.numel()])
        self.size, self.rows = (count, len(data)), None
        self.register_buffer("data", data, persistent=False)
        self.register_buffer("order", torch.cat(orders) if orders else None, persistent=False)


def block_of(
    entries: Sequence[Entry],
    dtype: torch.dtype | None,
    device: torch.device,
    order: Tensor | None,
    parts: int,
    stream: bool = False,
) -> Block:
    """The block for n vectors: in memory, as factors, or streamed where asked or where one of them is not in memory."""
    factored = [entry for entry in entries if isinstance(entry, Factors)]
    if len(factored) == len(entries) and parts == 1 and all(factored[0].matches(entry) for entry in factored):
        return FactoredBlock(factored, dtype, device)
    widest = dtype or reduce(torch.promote_types, [value(entry).dtype for entry in entries])
    if stream or any(not isinstance(entry, Tensor) for entry in entries):
        return StreamedBlock(entries, widest, device, order, parts)
    return Block(torch.stack([value(entry).to(device, widest) for entry in entries]), order, parts)


def _product(rows: Tensor, data: Tensor) -> Tensor:
    """Rows `[K, k, n]` times data `[K, n, m]`, in the dtype of the rows; the data is widened piece by piece."""
    if data.dtype == rows.dtype:
        return rows @ data
    out = rows.new_empty(len(data), rows.shape[1], data.shape[2])
    for piece in _pieces(data):
        out[piece[0], :, piece[1]] = rows[piece[0]] @ data[piece[0], :, piece[1]].to(rows.dtype)
    return out


def _product_transposed(rows: Tensor, data: Tensor) -> Tensor:
    """Rows `[K, k, m]` times the transposed data `[K, m, n]`, in the dtype of the rows."""
    if data.dtype == rows.dtype:
        return rows @ data.mT
    out = rows.new_zeros(len(data), rows.shape[1], data.shape[1])
    for parts, places in _pieces(data):
        out[parts] += rows[parts, :, places] @ data[parts, :, places].to(rows.dtype).mT
    return out


def _pieces(data: Tensor) -> list[tuple[slice, slice]]:
    """The data `[K, n, m]` in pieces of about `_PIECE` numbers: of the weights where K is 1, of the parts otherwise."""
    parts, vectors, width = data.shape
    if parts == 1:
        step = max(1, _PIECE // max(1, vectors))
        return [(slice(0, 1), slice(start, start + step)) for start in range(0, width, step)]
    step = max(1, _PIECE // max(1, vectors * width))
    return [(slice(start, start + step), slice(0, width)) for start in range(0, parts, step)]
