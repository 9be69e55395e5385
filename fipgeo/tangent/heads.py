"""Attention's tangent without tables that outlive it: they are made in pieces, and made again in the backward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

TABLE = 2**20
"""Most entries of a piece's table of shares."""

Tangents = tuple[Tensor, Tensor, Tensor]


class Heads(torch.autograd.Function):
    r"""Softmax attention of heads and its tangent, a function of the tangents alone that is linear in them.

    With P = softmax(q k^T) and T = P * (q' k^T + q k'^T) by entries, the value is P v and the tangent

        T v + P v' - rowsum(T) P v

    of which the transpose is attention's ordinary backward pass. Neither keeps P, `[n, L, M]`: q, k and v are held, of
    which P is made again for heads at a time, as in FlashAttention (Dao et al., arXiv:2205.14135) without its kernels.

    Call `apply` with tangents dq `[n, L, E]`, dk `[n, M, E]`, dv `[n, M, V]` and q, k, v of the same shapes, which
    have no graph. It gives the tangent and the value, `[n, L, V]`, the latter without a graph.

    Examples:
        >>> q, dv = torch.zeros(1, 2, 3), torch.tensor([[[1.0], [3.0]]])
        >>> Heads.apply(q, q, dv, q, q, torch.zeros(1, 2, 1))[0].tolist()
        [[[2.0], [2.0]]]
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor, q: Tensor, k: Tensor, v: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tangent and value."""
        ctx.save_for_backward(q, k, v)
        out = v.new_empty(*q.shape[:2], v.shape[-1])
        change = torch.empty_like(out)
        for i in pieces(q, k):
            shares = (q[i] @ k[i].mT).softmax(-1)
            value = torch.bmm(shares, v[i], out=out[i])
            table = (dq[i] @ k[i].mT).baddbmm_(q[i], dk[i].mT).mul_(shares)
            moved = torch.bmm(shares, dv[i], out=change[i]).baddbmm_(table, v[i])
            moved.addcmul_(table.sum(-1, keepdim=True), value, value=-1)
        ctx.mark_non_differentiable(out)
        return change, out

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """The transpose, differentiable in its own right."""
        return *_Pulled.apply(grad, *ctx.saved_tensors), None, None, None  # type: ignore[misc]


class _Pulled(torch.autograd.Function):
    """The transpose of `Heads`, of which the transpose is `Heads` again."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tangents:  # type: ignore[override]
        ctx.save_for_backward(q, k, v)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        for i in pieces(q, k):
            shares = (q[i] @ k[i].mT).softmax(-1)
            torch.bmm(shares.mT, grad[i], out=dv[i])
            table = (grad[i] @ v[i].mT).mul_(shares)
            table.addcmul_(shares, table.sum(-1, keepdim=True), value=-1)
            torch.bmm(table, k[i], out=dq[i])
            torch.bmm(table.mT, q[i], out=dk[i])
        return dq, dk, dv

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return Heads.apply(dq, dk, dv, *ctx.saved_tensors)[0], None, None, None  # type: ignore[index]


def pieces(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Heads that are done at once."""
    step = max(TABLE // max(q.shape[1] * k.shape[1], 1), 1)
    return (slice(start, start + step) for start in range(0, len(q), step))
