"""What functions without weights do to channels: entry by entry, moving entries about, pooling over positions."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fipgeo.shrink.flow import Call, Flow, Rule, Tracer, along, barrier, tensors_in, varies
from fipgeo.shrink.units import BLANK, FIXED

UNARY = """relu relu6 gelu silu mish elu selu celu leaky_relu rrelu tanh sigmoid logsigmoid softplus softsign hardtanh
hardswish hardsigmoid hardshrink softshrink tanhshrink threshold abs neg exp expm1 log log1p sqrt rsqrt square sin cos
erf sign round floor ceil reciprocal clamp clip clamp_min clamp_max pow nan_to_num dropout dropout1d dropout2d dropout3d
alpha_dropout feature_alpha_dropout feature_dropout logical_not isnan isinf""".split()
NARY = """add sub rsub mul multiply div truediv true_divide divide maximum minimum where lerp addcmul addcdiv hypot
gt lt ge le eq ne and or xor logical_and logical_or fmod remainder floordiv masked_fill""".split()
SAME = "to float double half bfloat16 type type_as cpu cuda contiguous clone detach data positive requires_grad".split()
LIKE = "zeros_like ones_like full_like".split()
MOVING = """view reshape flatten unflatten permute transpose swapaxes movedim t T mT unsqueeze squeeze expand expand_as
repeat tile repeat_interleave chunk split split_with_sizes tensor_split unbind getitem narrow select index_select cat
concat concatenate stack hstack vstack flip roll pixel_shuffle pixel_unshuffle channel_shuffle view_as reshape_as
broadcast_to""".split()
REDUCING = "mean sum amax amin max min var std prod logsumexp norm any all".split()
POOLING = [f"{kind}_pool{d}d" for kind in ("max", "avg", "lp") for d in (1, 2, 3)]
POOLING += [f"adaptive_{kind}_pool{d}d" for kind in ("max", "avg") for d in (1, 2, 3)]
POOLING += [f"{name}_with_indices" for name in POOLING if "max" in name] + ["interpolate", "upsample"]
PRODUCTS = {"mul", "multiply"}


def entrywise(tracer: Tracer, call: Call) -> Any:
    """A function of corresponding entries: channels that meet become one unit."""
    tensors = [t for t in call.tensors() if t.dim()]
    flows = [tracer.flow(t) for t in tensors]
    zero = [
        f.constant & (t == 0).cpu() if call.name in PRODUCTS else torch.tensor(False) for t, f in _zip(tensors, flows)
    ]
    loose = [t for t in call.tensors() if not t.dim() and tracer.name(t) is None]
    out = call.run()
    if not isinstance(out, Tensor):
        return out
    shape = out.shape
    constant = torch.tensor(not loose)
    for f in flows:
        constant = constant & f.constant
    for z in zero:
        constant = constant | z
    labels = torch.full((), FIXED).expand(shape)
    plain = []
    for t, f in _zip(tensors, flows):
        if (f.labels > 0).any():
            labels = (
                f.labels.expand(shape)
                if not (labels > 0).any()
                else tracer.units.join(tracer.units.roots(labels), f.labels.expand(shape), call.where)
            )
        else:
            plain.append(t)
    for t in plain:
        _meet(tracer, t, tracer.units.roots(labels), call.where)
    tracer.note(out, tracer.units.roots(labels), constant.expand(shape))
    return out


def _meet(tracer: Tracer, t: Tensor, labels: Tensor, where: str) -> None:
    """A tensor without channels of its own meets channels: fine if it is the same for all; else its axis is theirs."""
    name, lead = tracer.name(t), labels.dim() - t.dim()
    shared = [axis for axis in range(t.dim()) if t.shape[axis] > 1 and varies(labels, lead + axis)]
    found = along(labels, lead + shared[0]) if len(shared) == 1 else None
    if name is not None and found is not None:
        tracer.units.uses[name] += 1
        tracer.units.bind(name, shared[0], found, row=True)
    else:
        if shared:
            tracer.units.pin(labels, where)
        if name is not None:
            tracer.units.pin_tensor(name, where)


def same(tracer: Tracer, call: Call) -> Any:
    """The same entries in another dtype, place or layout."""
    flow = _first_flow(tracer, call)
    out = call.run()
    if flow is not None:
        tracer.note(out, flow.labels, flow.constant)
    return out


def like(tracer: Tracer, call: Call) -> Any:
    """A constant in the shape of an activation."""
    flow, out = _first_flow(tracer, call), call.run()
    if flow is not None:
        tracer.note(out, flow.labels, torch.tensor(True))
    return out


def moving(tracer: Tracer, call: Call) -> Any:
    """Entries moved about: what is known of them moves along."""
    tensors = [t for t in call.tensors() if t.is_floating_point()]
    flows = {id(t): tracer.flow(t) for t in tensors}
    out = call.run()
    if not flows or not any(True for _ in tensors_in([out])):
        return out
    labels = _moved(call, {key: f.labels.double() for key, f in flows.items()})
    constant = _moved(call, {key: f.constant.double() for key, f in flows.items()})
    into = set().union(*(_units(f.labels) for f in flows.values()))
    outs = [_units(part) for part in labels]
    uneven = call.name != "chunk" and any(part != outs[0] for part in outs)
    if into - set().union(*outs) or uneven:
        tracer.units.pin(torch.tensor(sorted(into)), f"{call.where}, which takes some of the channels by their numbers")
    for t in tensors:
        if (name := tracer.name(t)) is not None:
            tracer.units.pin_tensor(name, call.where)
    for t, a, b in zip(tensors_in([out]), labels, constant, strict=True):
        tracer.note(t, a, b)
    return out


def _moved(call: Call, replaced: dict[int, Tensor]) -> list[Tensor]:
    """The call once more, on other tensors in the place of those with these identities."""

    def swap(value: Any) -> Any:
        if isinstance(value, Tensor):
            return replaced.get(id(value), value)
        if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
            return type(value)(swap(v) for v in value)
        return value

    out = call.func(*map(swap, call.args), **{key: swap(v) for key, v in call.kwargs.items()})
    return list(tensors_in([out]))


def pad(tracer: Tracer, call: Call) -> Any:
    """Padding: of positions it leaves channels what they are; added channels cannot be told apart by the code."""
    a = call.bound("input pad mode value")
    x, amounts, mode = a["input"], [int(p) for p in a["pad"]], a["mode"] or "constant"
    flow, out = tracer.flow(x), call.run()
    axes = [x.dim() - 1 - i // 2 for i, amount in enumerate(amounts) if amount]
    if any(varies(flow.labels, axis) for axis in axes):
        tracer.pin([x], f"{call.where}, which adds channels")
    fill = {"value": float(BLANK)} if mode == "constant" else {}
    labels = F.pad(flow.labels.double(), amounts, mode, **fill)
    constant = F.pad(flow.constant.double(), amounts, mode, **({"value": 1.0} if fill else {}))
    tracer.note(out, tracer.units.roots(labels.long()), constant)
    return out


def reducing(tracer: Tracer, call: Call) -> Any:
    """A sum, mean or extremum over axes: channels pass if it is not over them."""
    a = call.bound("input dim keepdim")
    dims = a["dim"] if a["dim"] is not None else call.kwargs.get("axis")
    if isinstance(dims, Tensor) or isinstance(a.get("other"), Tensor):
        return entrywise(tracer, call)
    x = a["input"]
    flow = tracer.flow(x)
    axes = [dims] if isinstance(dims, int) else list(range(x.dim())) if dims is None else list(dims)
    if call.name == "norm" or any(varies(flow.labels, axis) for axis in axes):
        return barrier(tracer, call)
    keep = bool(a["keepdim"]) if not isinstance(a["keepdim"], torch.dtype) else False
    out = call.run()
    first = next(tensors_in([out]), None)
    if first is not None and axes:
        constant = (~flow.constant).double().amax(axes, keepdim=keep) == 0
        tracer.note(first, flow.labels.amax(axes, keepdim=keep), constant)
    return out


def pooling(tracer: Tracer, call: Call) -> Any:
    """A mix of neighbouring positions within each channel."""
    x = call.args[0] if call.args else call.kwargs["input"]
    digits = re.search(r"(\d)d", call.name)
    positions = int(digits[1]) if digits else x.dim() - 2
    flow, channel = tracer.flow(x), x.dim() - positions - 1
    found = along(flow.labels, channel)
    if found is None:
        return barrier(tracer, call)
    out = call.run()
    spread = [1] * x.dim()
    spread[channel] = x.shape[channel]
    constant = flow.constant.flatten(channel + 1).all(-1).reshape(*x.shape[: channel + 1], *[1] * positions)
    tracer.note(next(tensors_in([out])), found.reshape(spread), constant)
    return out


def _units(labels: Tensor) -> set[int]:
    return {int(label) for label in torch.unique(labels).tolist() if label > 0}


def _first_flow(tracer: Tracer, call: Call) -> Flow | None:
    tensors = call.tensors()
    return tracer.flow(tensors[0]) if tensors and tensors[0].is_floating_point() else None


def _zip(tensors: list[Tensor], flows: list[Flow]) -> list[tuple[Tensor, Flow]]:
    return list(zip(tensors, flows, strict=True))


RULES: dict[str, Rule] = {
    **dict.fromkeys([*UNARY, *NARY], entrywise),
    **dict.fromkeys(SAME, same),
    **dict.fromkeys(LIKE, like),
    **dict.fromkeys(MOVING, moving),
    **dict.fromkeys(REDUCING, reducing),
    **dict.fromkeys(POOLING, pooling),
    "pad": pad,
}
