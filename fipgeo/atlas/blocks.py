"""The vectors of one parameter tensor, stacked, and their weighted sum with its derivative.

Axis letters: n vectors, K parts of the tensor, m weights of a part, P weights of the tensor, k stacked coefficients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

_PIECE = 2**17
"""Stored numbers that are widened at a time where storage is narrower than the sums."""


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
    """

    data: Tensor
    order: Tensor | None

    def __init__(self, vectors: Tensor, order: Tensor | None = None, parts: int = 1) -> None:
        super().__init__()
        self.shape, flat = vectors.shape[1:], vectors.reshape(len(vectors), -1)
        if order is not None and parts > 1:
            width = -(-flat.shape[1] // parts)
            table = flat.new_zeros(len(flat), parts * width)
            table.index_copy_(1, order.long().to(flat.device), flat)
            flat, order = table.view(len(flat), parts, width).transpose(0, 1).contiguous(), order.to(flat.device)
        else:
            flat, order = flat.unsqueeze(0), None
        self.register_buffer("data", flat, persistent=False)
        self.register_buffer("order", order, persistent=False)

    def compose(self, weights: Tensor, base: Tensor | None = None) -> Tensor:
        """Weighted sums of the vectors, plus the base.

        Args:
            weights: `[..., n, K]`.
            base: `[*shape]`, added in the dtype of the weights.

        Returns:
            `[..., *shape]` in the dtype of the weights.
        """
        lead = weights.shape[:-2]
        rows = weights.reshape(-1, *weights.shape[-2:]).permute(2, 0, 1)  # [K, k, n]
        start = None if base is None else base.reshape(1, -1).to(weights.dtype)
        if self.order is None and self.data.dtype == weights.dtype:
            out = rows[0] @ self.data[0] if start is None else torch.addmm(start, rows[0], self.data[0])
        else:
            out = _product(rows, self.data).transpose(0, 1).flatten(1)  # [k, K m]
            out = out if self.order is None else out.index_select(1, self.order)
            out = out if start is None else out.add_(start)
        return out.reshape((*lead, *self.shape))

    def project(self, gradient: Tensor) -> Tensor:
        """Inner products of gradients `[..., *shape]` with the vectors, `[..., n, K]`: the adjoint of `compose`."""
        lead = gradient.shape[: gradient.dim() - len(self.shape)]
        rows = gradient.reshape(lead.numel(), -1)
        if self.order is not None:
            table = rows.new_zeros(len(rows), self.data.shape[0] * self.data.shape[2])
            rows = table.index_copy_(1, self.order.long(), rows)
        rows = rows.view(len(rows), self.data.shape[0], -1).transpose(0, 1)  # [K, k, m]
        return _product_transposed(rows, self.data).permute(1, 2, 0).reshape((*lead, *self.data.shape[1::-1]))


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


@dataclass(frozen=True, eq=False)
class Sums:
    """The weighted sums of all blocks, as one linear map from flat coefficients `[..., r]` to tensors.

    Attributes:
        blocks: The blocks.
        index: Places of all blocks' weights among the coefficients, one block after the other.
        sizes: How many of them each block has.
        bases: What is added to each sum; None for nothing.
        dtypes: Of the tensors.
    """

    blocks: Sequence[Block]
    index: Tensor
    sizes: Sequence[int]
    bases: Sequence[Tensor] | None
    dtypes: Sequence[torch.dtype]

    def parts(self, flat: Tensor) -> list[Tensor]:
        """The weights `[..., n, K]` of each block."""
        pieces = flat.index_select(-1, self.index).split(list(self.sizes), -1)
        return [piece.unflatten(-1, block.data.shape[1::-1]) for block, piece in zip(self.blocks, pieces, strict=True)]

    def compose(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The sums `[..., *shape]`."""
        bases = [None] * len(self.blocks) if self.bases is None else self.bases
        rows = zip(self.blocks, self.parts(flat), bases, self.dtypes, strict=True)
        return tuple(block.compose(weights, base).to(dtype) for block, weights, base, dtype in rows)

    def project(self, grads: Sequence[Tensor | None], size: int, dtype: torch.dtype) -> Tensor:
        """The adjoint, `[..., r]`; None stands for zero."""
        lead = next(
            (g.shape[: g.dim() - len(b.shape)] for b, g in zip(self.blocks, grads, strict=True) if g is not None), ()
        )
        like = self.index.new_zeros((), dtype=dtype)
        found = [
            like.new_zeros((*lead, n)) if g is None else b.project(g.to(dtype)).flatten(-2)
            for b, g, n in zip(self.blocks, grads, self.sizes, strict=True)
        ]
        out = like.new_zeros((*lead, size))
        return out.index_add_(-1, self.index, torch.cat(found, -1)) if found else out


class Compose(Function):
    """All sums in one node of the graph, linear in the coefficients.

    Nothing of the size of the vectors is kept for the backward pass, which takes inner products with them. Works under
    torch.func's jvp, vjp and vmap over the coefficients, and for derivatives of any order.
    """

    @staticmethod
    def forward(flat: Tensor, sums: Sums) -> tuple[Tensor, ...]:
        """`[r]` to tensors `[*shape]`."""
        return sums.compose(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember where the vectors are."""
        flat, ctx.sums = inputs
        ctx.size, ctx.wide = flat.shape[-1], flat.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Inner products of the gradients with the vectors."""
        return Project.apply(ctx.sums, ctx.size, ctx.wide, *grads), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The sums for the tangent of the coefficients, without what is added to them."""
        return Compose.apply(tangents[0], replace(ctx.sums, bases=None))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Stacks of coefficients are one product."""
        del info
        flat, sums = args
        return Compose.apply(flat.movedim(in_dims[0], 0), sums), (0,) * len(sums.blocks)


class Project(Function):
    """Inner products of tensors with all blocks' vectors, `[r]`: the adjoint of `Compose`."""

    @staticmethod
    def forward(sums: Sums, size: int, dtype: torch.dtype, *grads: Tensor | None) -> Tensor:
        """Tensors `[*shape]` to `[r]`."""
        return sums.project(grads, size, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember where the vectors are, and which tensors there were."""
        ctx.sums, ctx.size, ctx.wide, *grads = inputs
        ctx.given = [g is not None for g in grads]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The sums again."""
        found = Compose.apply(grads[0], replace(ctx.sums, bases=None))
        return None, None, None, *(t if given else None for t, given in zip(found, ctx.given, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Inner products of the tangents."""
        return Project.apply(ctx.sums, ctx.size, ctx.wide, *tangents[3:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Stacks of tensors are one product."""
        sums, size, dtype, *grads = args
        moved = [
            g if g is None else g.expand(info.batch_size, *g.shape) if dim is None else g.movedim(dim, 0)
            for g, dim in zip(grads, in_dims[3:], strict=True)
        ]
        return Project.apply(sums, size, dtype, *moved), 0
