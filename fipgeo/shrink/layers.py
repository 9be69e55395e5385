"""What functions with weights do to channels: they read some along one axis of the weight and make others."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fipgeo.shrink.flow import Call, Rule, Tracer, Use, along, barrier
from fipgeo.shrink.units import FIXED


def linear(tracer: Tracer, call: Call) -> Any:
    """`x W^T + b`."""
    a = call.bound("input weight bias")
    return _product(tracer, call, a["input"], a["weight"], a["bias"], into=1, out=0)


def addmm(tracer: Tracer, call: Call) -> Any:
    """`b + x W`, the weight transposed."""
    a = call.bound("input mat1 mat2")
    if a.keys() & {"alpha", "beta"} or a["input"].dim() != 1:
        return barrier(tracer, call)
    return _product(tracer, call, a["mat1"], a["mat2"], a["input"], into=0, out=1)


def matmul(tracer: Tracer, call: Call) -> Any:
    """`x W` with a weight; products of activations are barriers."""
    x, weight = [*call.args, *call.kwargs.values()][:2]
    return _product(tracer, call, x, weight, None, into=0, out=1)


def _product(tracer: Tracer, call: Call, x: Tensor, weight: Tensor, bias: Any, *, into: int, out: int) -> Any:
    name = tracer.name(weight)
    if name is None or weight.dim() != 2 or tracer.name(x) is not None or not x.dim():
        return barrier(tracer, call)
    flow = tracer.flow(x)
    value = call.run()
    _read(tracer, call, x, name, into, bias, axis=-1)
    labels = _make(tracer, call, name, out, bias, weight.shape[out])
    live = (weight != 0).cpu().double()
    reached = F.linear((~flow.constant).double(), live if into == 1 else live.T)
    tracer.note(value, labels, reached < 0.5)
    return value


def convolution(tracer: Tracer, call: Call) -> Any:
    """A convolution of one to three axes, grouped or not."""
    a = call.bound("input weight bias stride padding dilation groups")
    x, weight, groups = a["input"], a["weight"], a["groups"] or 1
    name, positions = tracer.name(weight), weight.dim() - 2
    if name is None:
        return barrier(tracer, call)
    value, channel = call.run(), x.dim() - positions - 1
    reached = _reached(tracer, a, {k: a[k] for k in ("stride", "padding", "dilation") if a[k] is not None}, call)
    labels = _make(tracer, call, name, 0, a["bias"], weight.shape[0])
    if groups == 1:
        whole = a["padding"] in (None, 0, "valid") or (isinstance(a["padding"], tuple) and not any(a["padding"]))
        _read(tracer, call, x, name, 1, a["bias"], axis=channel, foldable=whole)
    else:
        _couple(tracer, call, x, name, labels, groups, channel)
    tracer.note(value, tracer.units.roots(labels).reshape(-1, *[1] * positions), reached < 0.5)
    return value


def transposed(tracer: Tracer, call: Call) -> Any:
    """A transposed convolution without groups."""
    a = call.bound("input weight bias stride padding output_padding groups dilation")
    x, weight = a["input"], a["weight"]
    name, positions = tracer.name(weight), weight.dim() - 2
    if name is None or (a["groups"] or 1) > 1:
        return barrier(tracer, call)
    value = call.run()
    keys = ("stride", "padding", "output_padding", "dilation")
    reached = _reached(tracer, a, {k: a[k] for k in keys if a[k] is not None}, call)
    _read(tracer, call, x, name, 0, a["bias"], axis=x.dim() - positions - 1, foldable=False)
    labels = _make(tracer, call, name, 1, a["bias"], weight.shape[1])
    tracer.note(value, labels.reshape(-1, *[1] * positions), reached < 0.5)
    return value


def _reached(tracer: Tracer, a: dict[str, Any], options: dict[str, Any], call: Call) -> Tensor:
    """How many varying entries each entry of a convolution's output depends on."""
    moving, live = (~tracer.flow(a["input"]).constant).double(), (a["weight"] != 0).cpu().double()
    return call.func(moving, live, None, **options, groups=a["groups"] or 1)


def _couple(tracer: Tracer, call: Call, x: Tensor, name: str, labels: Tensor, groups: int, channel: int) -> None:
    """The channels that go into a group of a convolution and those that come out are one unit."""
    units, found = tracer.units, along(tracer.flow(x).labels, channel)
    if found is None or bool((found <= 0).any()):
        tracer.pin([x], call.where)
        units.pin(labels, f"{call.where}, whose groups read channels that have to stay")
        return
    tracer.seen.groups[name] = groups
    for ins, outs in zip(found.chunk(groups), labels.chunk(groups), strict=True):
        together = torch.cat([ins, outs])
        units.join(together, together[:1].expand_as(together), call.where)


def _read(
    tracer: Tracer,
    call: Call,
    x: Tensor,
    name: str,
    axis_of_weight: int,
    bias: Any,
    *,
    axis: int,
    foldable: bool = True,
) -> None:
    """Note that a weight reads the channels of x."""
    flow = tracer.flow(x)
    found = along(flow.labels, axis)
    if found is None:
        tracer.pin([x], f"{call.where}, where channels of several kinds lie in one place")
        found = torch.full((x.shape[axis],), FIXED)
    tracer.units.bind(name, axis_of_weight, found, row=False)
    values = x.detach().double().cpu().movedim(axis, 0).flatten(1)
    constant = flow.constant.movedim(axis, 0).flatten(1).all(1) & (values == values[:, :1]).all(1)
    home = tracer.name(bias) if foldable and bias is not None else None
    tracer.seen.uses.append(Use(name, axis_of_weight, found, constant, values[:, 0], home))


def _make(tracer: Tracer, call: Call, name: str, axis: int, bias: Any, size: int) -> Tensor:
    """Labels of the channels that a weight makes."""
    labels = tracer.units.produce(name, axis, size)
    if bias is not None:
        home = tracer.name(bias)
        if home is None:
            tracer.units.pin(labels, f"{call.where}, whose bias is computed")
        else:
            tracer.units.uses[home] += 1
            tracer.units.bind(home, 0, labels, row=True)
    return labels


def batch_norm(tracer: Tracer, call: Call) -> Any:
    """A scale and a shift of every channel."""
    a = call.bound("input running_mean running_var weight bias training momentum eps")
    x, flow = a["input"], tracer.flow(a["input"])
    own = [a[key] for key in ("running_mean", "running_var", "weight", "bias") if a[key] is not None]
    found = along(flow.labels, 1) if x.dim() > 1 else None
    if found is None or a["training"] or any(tracer.name(t) is None for t in own):
        return barrier(tracer, call)
    out = call.run()
    for t in own:
        name = tracer.names[id(t)]
        tracer.units.uses[name] += 1
        tracer.units.bind(name, 0, found, row=True)
    shape = [-1, *[1] * (x.dim() - 2)]
    off = torch.zeros(len(found), dtype=torch.bool) if a["weight"] is None else (a["weight"] == 0).cpu()
    labels = tracer.units.roots(found).reshape(shape)
    tracer.note(out, labels, flow.constant | off.reshape(shape))
    return out


def prelu(tracer: Tracer, call: Call) -> Any:
    """Leaky rectification with a slope for every channel, or one for all."""
    a = call.bound("input weight")
    x, name = a["input"], tracer.name(a["weight"])
    flow = tracer.flow(x)
    found = along(flow.labels, 1) if x.dim() > 1 else None
    if name is None or found is None:
        return barrier(tracer, call)
    out = call.run()
    tracer.units.uses[name] += 1
    if a["weight"].numel() > 1:
        tracer.units.bind(name, 0, found, row=True)
    tracer.note(out, tracer.flow(x).labels, flow.constant)
    return out


def embedding(tracer: Tracer, call: Call) -> Any:
    """A table of vectors makes channels."""
    a = call.bound("input weight padding_idx max_norm")
    name = tracer.name(a["weight"])
    if name is None or a["max_norm"] is not None:
        return barrier(tracer, call)
    out = call.run()
    tracer.note(out, tracer.units.produce(name, 1, a["weight"].shape[1]), (a["weight"] == 0).all(0).cpu())
    return out


ATTENTION = """query key value embed_dim_to_check num_heads in_proj_weight in_proj_bias bias_k bias_v add_zero_attn
dropout_p out_proj_weight out_proj_bias training key_padding_mask need_weights attn_mask use_separate_proj_weight
q_proj_weight k_proj_weight v_proj_weight static_k static_v average_attn_weights is_causal"""


def attention(tracer: Tracer, call: Call) -> Any:
    """`nn.MultiheadAttention`: every head is a unit; what goes in and what comes out has to stay."""
    a = call.bound(ATTENTION)
    split = bool(a["use_separate_proj_weight"])
    inner = [a[f"{key}_proj_weight"] for key in "qkv"] if split else [a["in_proj_weight"]]
    own = [t for t in [*inner, a["in_proj_bias"], a["out_proj_weight"], a["out_proj_bias"]] if t is not None]
    odd = a["bias_k"] is not None or a["add_zero_attn"] or a["static_k"] is not None
    if odd or any(tracer.name(t) is None for t in own):
        return barrier(tracer, call)
    tracer.pin([a["query"], a["key"], a["value"]], f"{call.where}, whose width is fixed")
    out = call.run()
    tracer.forget(out)
    units, heads, width = tracer.units, a["num_heads"], a["out_proj_weight"].shape[1]
    name = tracer.names[id(a["out_proj_weight"])]
    for t in own:
        units.uses[tracer.names[id(t)]] += 1
    before = tracer.seen.heads.get(name)
    labels = units.fresh(heads) if before is None else before
    tracer.seen.heads[name] = labels
    rows = units.roots(labels).repeat_interleave(width // heads)
    for t in inner:
        units.bind(tracer.names[id(t)], 0, rows if split else rows.repeat(3), row=True)
    value, bias = inner[-1].detach()[-width:].double().cpu(), torch.zeros(width, dtype=torch.float64)
    if a["in_proj_bias"] is not None:
        units.bind(tracer.names[id(a["in_proj_bias"])], 0, rows.repeat(3), row=True)
        bias = a["in_proj_bias"].detach()[-width:].double().cpu()
    units.bind(name, 1, rows, row=True)
    home = tracer.name(a["out_proj_bias"]) if a["out_proj_bias"] is not None else None
    tracer.seen.uses.append(Use(name, 1, rows, (value == 0).all(1), bias, home))
    return out


LAYERS: dict[str, Rule] = {
    "linear": linear,
    "addmm": addmm,
    **dict.fromkeys(("matmul", "mm"), matmul),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), transposed),
    "batch_norm": batch_norm,
    "prelu": prelu,
    "embedding": embedding,
    "multi_head_attention_forward": attention,
}
