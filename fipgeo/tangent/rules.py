"""Tangents of the layers that networks spend their time in, with fewer passes over memory than torch's own rules.

torch pushes a tangent through a layer by general formulas: every product is written down and added in a pass of its
own, attention looks for masked rows that are not there, normalisation is taken apart into its steps. Here each of
these layers is a few calls of the kernels that it is made of. A layer in a form that is not covered takes torch's rule.

Value and tangent are those of a dual number at the level that is open. Where inputs have a graph, values have one too,
and gradients of inputs are exact, which those through torch's own rule for layer normalisation are not (torch 2.13).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fipgeo.tangent.heads import Heads

Dual = tuple[Tensor | None, Tensor | None]
"""A value and its tangent, or None for either."""


class Rules(TorchFunctionMode):
    """Inside it the layers below push tangents by the rules of this file; at an open level of forward mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The rule's result, or torch's own where there is no rule or it does not cover the call."""
        kwargs = kwargs or {}
        rule = RULES.get(func)
        found = None if rule is None else rule(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def usable(weights: Iterable[Tensor]) -> bool:
    """Whether the rules apply: not below another transform of torch.func, and not under autocast."""
    kinds = {t.device.type for t in weights}
    transforms: Any = getattr(torch._C, "_functorch")  # noqa: B009
    return transforms.peek_interpreter_stack() is None and not any(map(torch.is_autocast_enabled, kinds))


def split(t: Tensor | None) -> Dual:
    """Value and tangent.

    The value that torch unpacks is a view, which keeps the dual number and its tangent as long as a graph holds it.
    """
    if t is None:
        return None, None
    value, tangent = forward_ad.unpack_dual(t)
    return value if value.requires_grad else value.detach(), tangent


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """The value x W^T + b and the tangent x' W^T + b' + x W'^T, with sums inside of matrix products."""
    (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
    if dx is None and dw is None:
        return None
    out = F.linear(x, w, b)  # type: ignore[arg-type]
    if dx is None:
        return forward_ad.make_dual(out, F.linear(x, dw, db))  # type: ignore[arg-type]
    rows, turned = dx.reshape(-1, dx.shape[-1]), w.T  # type: ignore[union-attr]
    moved = rows @ turned if db is None else torch.addmm(db, rows, turned)
    if dw is not None:
        moved = moved.addmm_(x.reshape(-1, x.shape[-1]), dw.T)  # type: ignore[union-attr]
    return forward_ad.make_dual(out, moved.view(out.shape))


class _Convolved(torch.autograd.Function):
    """The convolution of a tangent with a kernel that has none and no graph: unlike torch's own it does not keep x'."""

    @staticmethod
    def forward(ctx: Any, dx: Tensor, w: Tensor, sizes: list[list[int]], groups: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(w)
        ctx.shape, ctx.options = dx.shape, (*sizes, False, [0] * len(sizes[0]), groups)
        stride, padding, dilation = sizes
        return torch.convolution(dx, w, None, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (w,) = ctx.saved_tensors
        like = grad.new_empty(1).expand(ctx.shape)  # only its shape is looked at
        whole = torch.ops.aten.convolution_backward
        return whole(grad, like, w, None, *ctx.options, [True, False, False])[0], None, None, None


def convolution(function: Callable[..., Tensor]) -> Callable[..., Tensor | None]:
    """The rule of a convolution, as that of `linear`."""

    def pushed(dx: Tensor, w: Tensor, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1) -> Tensor:
        dims = w.dim() - 2
        if isinstance(padding, str) or w.requires_grad or dx.dim() != w.dim():
            return function(dx, w, None, stride, padding, dilation, groups)
        sizes = [[o] * dims if isinstance(o, int) else [*o, *o][:dims] for o in (stride, padding, dilation)]
        return _Convolved.apply(dx, w, sizes, groups)  # type: ignore[return-value]

    def rule(input: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor | None:
        (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
        if (dx is None and dw is None) or w is None:
            return None
        out = function(x, w, b, *args, **kwargs)
        if dw is not None:
            moved = function(x, dw, db, *args, **kwargs)
            return forward_ad.make_dual(out, moved if dx is None else moved.add_(pushed(dx, w, *args, **kwargs)))
        moved = pushed(dx, w, *args, **kwargs)  # type: ignore[arg-type]
        return forward_ad.make_dual(out, moved if db is None else moved + db.view(-1, *[1] * (w.dim() - 2)))

    return rule


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """The value a x + c by channels and the tangent a x' + a' x + c', in two passes."""
    (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
    if training or dx is None or x is None or running_mean is None or running_var is None:
        return None
    out = F.batch_norm(x, running_mean, running_var, w, b, False, momentum, eps)
    shape = [1, -1] + [1] * (x.dim() - 2)
    inverse = (running_var + eps).rsqrt()
    slope = inverse if w is None else inverse * w
    if dw is None and db is None:
        return forward_ad.make_dual(out, dx * slope.view(shape))
    turn = None if dw is None else inverse * dw
    shift = torch.zeros_like(slope) if db is None else db
    shift = shift if turn is None else shift - running_mean * turn
    moved = torch.addcmul(shift.view(shape), dx, slope.view(shape))
    if turn is not None:
        moved = moved.addcmul_(x, turn.view(shape))
    return forward_ad.make_dual(out, moved)


def relu(input: Tensor, inplace: bool = False) -> Tensor | None:
    """The value max(x, 0) and the tangent x' where x > 0."""
    x, dx = split(input)
    if inplace or x is None or dx is None:
        return None
    out = torch.relu(x)
    return forward_ad.make_dual(out, torch.ops.aten.threshold_backward(dx, out, 0))


def gelu(input: Tensor, approximate: str = "none") -> Tensor | None:
    """The value and x' times the derivative at x."""
    x, dx = split(input)
    if x is None or dx is None:
        return None
    moved = torch.ops.aten.gelu_backward(dx, x, approximate=approximate)
    return forward_ad.make_dual(F.gelu(x, approximate=approximate), moved)


class _Standardised(torch.autograd.Function):
    """The Jacobian of (x - mean) / deviation times a tangent: a symmetric map, so backward is the same kernel."""

    @staticmethod
    def forward(ctx: Any, dx: Tensor, x: Tensor, shape: list[int], mean: Tensor, inverse: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, mean, inverse)
        ctx.shape = shape
        return _standardised(dx, x, shape, mean, inverse)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        x, mean, inverse = ctx.saved_tensors
        return _standardised(grad, x, ctx.shape, mean, inverse), None, None, None, None


def _standardised(dx: Tensor, x: Tensor, shape: list[int], mean: Tensor, inverse: Tensor) -> Tensor:
    whole = torch.ops.aten.native_layer_norm_backward
    return whole(dx.contiguous(), x, shape, mean, inverse, None, None, [True, False, False])[0]


def _by_parts(dx: Tensor, x: Tensor, shape: list[int], eps: float) -> Tensor:
    """The same with derivatives in x."""
    over = list(range(-len(shape), 0))
    centred = x - x.mean(over, keepdim=True)
    inverse = (centred.square().mean(over, keepdim=True) + eps).rsqrt()
    unit, moved = centred * inverse, dx - dx.mean(over, keepdim=True)
    return inverse * (moved - unit * (unit * moved).mean(over, keepdim=True))


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """The value w x^ + b, x^ standardised, and the tangent w J x' + w' x^ + b': three kernels."""
    (x, dx), (w, dw), (b, db) = split(input), split(weight), split(bias)
    if dx is None or x is None:
        return None
    shape, x = list(normalized_shape), x.contiguous()
    out, mean, inverse = torch.native_layer_norm(x, shape, w, b, eps)
    moved = _by_parts(dx, x, shape, eps) if x.requires_grad else _Standardised.apply(dx, x, shape, mean, inverse)
    if dw is None and db is None:
        return forward_ad.make_dual(out, moved if w is None else moved * w)  # type: ignore[operator]
    scale = torch.zeros_like(db) if dw is None else dw  # type: ignore[arg-type]
    own = torch.native_layer_norm(x, shape, scale, db, eps)[0]
    return forward_ad.make_dual(out, own + moved if w is None else torch.addcmul(own, moved, w))  # type: ignore[arg-type]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor | None:
    """The value P v, P = softmax(q k^T), and the tangent T v + P v' - rowsum(T) P v, T = P * (q' k^T + q k'^T).

    No mask is looked for, and no table of the size of P is kept where values have no graph (see `Heads`).
    """
    (q, dq), (k, dk), (v, dv) = split(query), split(key), split(value)
    if dropout_p or is_causal or attn_mask is not None or enable_gqa or q is None or k is None or v is None:
        return None
    if dq is None or dk is None or dv is None or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2]:
        return None
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    q, dq, k, dk, v, dv = (t.reshape(-1, *t.shape[-2:]) for t in (q * factor, dq * factor, k, dk, v, dv))
    if any(t.requires_grad for t in (q, k, v)):
        shares = (q @ k.mT).softmax(-1)
        out, moved = shares @ v, (dq @ k.mT).baddbmm(q, dk.mT) * shares
        change = (shares @ dv).baddbmm(moved, v).addcmul(moved.sum(-1, keepdim=True), out, value=-1)
    else:
        change, out = Heads.apply(dq, dk, dv, q, k, v)  # type: ignore[misc]
    shape = (*query.shape[:-1], v.shape[-1])
    return forward_ad.make_dual(out.view(shape), change.view(shape))


def multi_head(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    *more: Any,
    **rest: Any,
) -> tuple[Tensor, None] | None:
    """Self-attention without masks, whose weights nobody asked for, by the rules above."""
    if more:
        return None
    plain = {"average_attn_weights", "need_weights", "is_causal"}
    if query is not key or key is not value or query.dim() != 3 or in_proj_weight is None or add_zero_attn:
        return None
    odd = any(rest[name] is not None and rest[name] is not False for name in rest if name not in plain)
    if odd or rest.get("need_weights", True) or (training and dropout_p) or bias_k is not None or bias_v is not None:
        return None
    length, count, width = query.shape
    mixed = linear(query, in_proj_weight, in_proj_bias)
    if mixed is None or width != embed_dim_to_check:
        return None
    q, k, v = mixed.view(length, count, 3, num_heads, -1).permute(2, 1, 3, 0, 4).unbind()
    heads = attention(q, k, v)
    if heads is None:
        return None
    joined = heads.permute(2, 0, 1, 3).reshape(length, count, width)
    out = linear(joined, out_proj_weight, out_proj_bias)
    return None if out is None else (out, None)


RULES: dict[Any, Callable[..., Any]] = {
    F.linear: linear,
    torch.conv1d: convolution(torch.conv1d),
    torch.conv2d: convolution(torch.conv2d),
    F.batch_norm: batch_norm,
    F.relu: relu,
    torch.relu: relu,
    Tensor.relu: relu,
    F.gelu: gelu,
    F.layer_norm: layer_norm,
    F.scaled_dot_product_attention: attention,
    F.multi_head_attention_forward: multi_head,
}
"""By torch's functions."""
