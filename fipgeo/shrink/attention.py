"""Multi-head attention with fewer heads than its width would hold."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` after some of its heads were taken out.

    torch's own module wants heads times head width to be the width of its input; this one has the same parameters
    under the same names, with the rows and columns of the remaining heads only, and the same call. Attention weights
    that it returns are those of the remaining heads.

    Attributes:
        kept: Which of the heads of the first module are left, `[heads]`; masks for each head are cut accordingly.
        had: How many heads there were.
    """

    kept: Tensor
    had: int

    @classmethod
    def of(cls, module: nn.MultiheadAttention, kept: Tensor) -> NarrowAttention:
        """A module with the tensors and settings of another, whose tensors were cut already.

        Args:
            module: What it takes the place of.
            kept: Indices of the heads that are left, `[heads]`.
        """
        out = cls.__new__(cls)
        out.__dict__.update(module.__dict__)
        out.had, out.num_heads = module.num_heads, len(kept)
        out.register_buffer("kept", kept, persistent=False)
        out._qkv_same_embed_dim = (
            False  # torch's fused kernel for encoder layers asks for this and knows no such module
        )
        return out

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the remaining heads; arguments and shapes are those of `nn.MultiheadAttention`."""
        del is_causal  # a hint about attn_mask, which has to come with it
        single, turned = query.dim() == 2, not self.batch_first and query.dim() == 3
        x = [t[None] if single else t.transpose(0, 1) if turned else t for t in (query, key, value)]
        q, k, v = (
            F.linear(t, w, b).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
            for t, (w, b) in zip(x, self._projections(), strict=True)
        )
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout, weights = self.dropout if self.training else 0.0, None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-1, -2)
            weights = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights[0] if single else weights
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        return (out[0] if single else out.transpose(0, 1) if turned else out), weights

    def _projections(self) -> list[tuple[Tensor, Tensor | None]]:
        """Weight and bias of query, key and value."""
        if self.in_proj_weight is not None:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return list(zip(weights, biases, strict=True))

    def _mask(self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one to be added to the scores `[N, heads, L, S]`."""
        total = None
        if attn_mask is not None:
            total = _additive(attn_mask, q.dtype)
            if total.dim() == 3:  # one for each example and each head that there was
                total = total.unflatten(0, (-1, self.had)).index_select(1, self.kept)
        if padding is not None:
            pads = _additive(padding, q.dtype).reshape(-1, 1, 1, padding.shape[-1])
            total = pads if total is None else total + pads
        return total


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, -torch.inf)
    return mask.to(dtype)
