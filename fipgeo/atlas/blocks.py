"""The vectors of one parameter tensor, stacked, and their weighted sum with its derivative.

Axis letters: n vectors, K parts of the tensor, m weights of a part, P weights of the tensor, k stacked coefficients.
"""

from __future__ import annotations

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


class Compose(Function):
    """base + the weighted sum of a block's vectors, in a given dtype; linear in the weights `[n, K]`.

    Nothing of the size of the vectors is kept for the backward pass, which takes inner products with them. Works under
    torch.func's jvp, vjp and vmap over the weights, and for derivatives of any order.
    """

    @staticmethod
    def forward(weights: Tensor, block: Block, base: Tensor | None, dtype: torch.dtype) -> Tensor:
        """`[n, K]` to `[*shape]`."""
        return block.compose(weights, base).to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remember where the vectors are."""
        weights, ctx.block, _, ctx.dtype = inputs
        ctx.wide = weights.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Inner products of the gradient with the vectors."""
        return Project.apply(grads[0], ctx.block, ctx.wide), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The weighted sum for the tangent of the weights."""
        return Compose.apply(tangents[0], ctx.block, None, ctx.dtype)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Stacks of weights are one product."""
        del info
        return Compose.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0


class Project(Function):
    """Inner products of a gradient `[*shape]` with a block's vectors, `[n, K]`: the adjoint of `Compose`."""

    @staticmethod
    def forward(gradient: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
        """`[*shape]` to `[n, K]`."""
        return block.project(gradient.to(dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Remember where the vectors are."""
        gradient, ctx.block, ctx.wide = inputs
        ctx.dtype = gradient.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The weighted sum again."""
        return Compose.apply(grads[0], ctx.block, None, ctx.dtype), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Inner products of the tangent."""
        return Project.apply(tangents[0], ctx.block, ctx.wide)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Stacks of gradients are one product."""
        del info
        return Project.apply(args[0].movedim(in_dims[0], 0), *args[1:]), 0
