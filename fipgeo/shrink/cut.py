"""Removal: which units do nothing, and a module without them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.model import ForwardFn, OutputFn, OutputMap, default_forward
from fipgeo.shrink.attention import NarrowAttention
from fipgeo.shrink.flow import Seen, Tracer, Use, tensors_in
from fipgeo.shrink.layers import LAYERS
from fipgeo.shrink.rules import RULES
from fipgeo.trees import FEW, copied, head

FamilyKey = frozenset[tuple[str, int]]
"""The axes of tensors on which a unit lies; units that share them are a family."""


@dataclass(frozen=True)
class Calling:
    """How modules are called, and which of their outputs count.

    Attributes:
        batch: What they are called on.
        forward_fn: (module, batch) -> raw outputs.
        output_fn: raw outputs -> those that count; None for all.
    """

    batch: Any
    forward_fn: ForwardFn = default_forward
    output_fn: OutputFn | None = None

    def function(self, module: nn.Module) -> OutputMap:
        """The module as a map."""
        return OutputMap(module, "*", forward_fn=self.forward_fn, output_fn=self.output_fn)

    def outputs(self, module: nn.Module) -> tuple[Tensor, ...]:
        """Outputs on the whole batch in eval mode."""
        function = self.function(module)
        return function(function.point(), self.batch)


def look(module: nn.Module, calling: Calling) -> Seen:
    """Follow the channels of a module through one forward pass in eval mode, on a few examples."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    tracer = Tracer({id(t): name for name, t in tensors}, RULES | LAYERS)
    stack: list[str] = []

    def enter(m: nn.Module, args: Any, *, name: str) -> None:
        del m, args
        stack.append(tracer.module)
        tracer.module = name

    def leave(m: nn.Module, args: Any, out: Any) -> None:
        del m, args, out
        tracer.module = stack.pop()

    with ExitStack() as hooks:
        for name, m in module.named_modules():
            if name:
                hooks.callback(m.register_forward_pre_hook(partial(enter, name=name)).remove)
                hooks.callback(m.register_forward_hook(leave).remove)
        with calling.function(module).frozen(), tracer:
            raw = calling.forward_fn(module, copied(head(calling.batch, FEW)))
            out = raw if calling.output_fn is None else calling.output_fn(raw)
    tracer.pin(tensors_in([out]), "the outputs of the model")
    tracer.units.settle()
    return tracer.seen


def families(seen: Seen) -> dict[FamilyKey, list[int]]:
    """Units by the axes on which they lie, the fixed ones included; in the order of the forward pass."""
    out: dict[FamilyKey, list[int]] = defaultdict(list)
    for unit, members in sorted(seen.units.members().items()):
        out[frozenset(axis for axis, _ in members)].append(unit)
    return dict(out)


def idle(seen: Seen, weights: Mapping[str, Tensor]) -> set[int]:
    """The units that can go: whatever reads them reads a constant that its bias can take, or multiplies by zero.

    On every axis at least one index stays.
    """
    read, blocked = set(), set(seen.units.reasons)
    for use in seen.uses:
        labels = seen.units.roots(use.labels)
        nothing = _column_is_zero(use, weights) | (use.constant & ((use.values == 0) | _foldable(use, seen)))
        read |= set(labels.tolist())
        blocked |= set(labels[~nothing].tolist())
    found = read - blocked - {-1, 0}
    for labels in seen.units.axes.values():
        if set(labels.tolist()) <= found:
            found.discard(int(labels[0]))
    return found


def _column_is_zero(use: Use, weights: Mapping[str, Tensor]) -> Tensor:
    """Which indices a weight multiplies by zero; each may stand for a whole group of a grouped convolution."""
    return (weights[use.weight].movedim(use.axis, 0).flatten(1) == 0).all(1).cpu()


def _foldable(use: Use, seen: Seen) -> Tensor:
    """Whether constants can go into the bias: it has one, and both tensors are used here only."""
    once = use.bias is not None and seen.units.uses[use.bias] == 1 and _readings(use, seen) == 1
    return torch.tensor(once)


def _readings(use: Use, seen: Seen) -> int:
    return max(sum(other.weight == use.weight for other in seen.uses), seen.units.uses[use.weight])


def cut_(module: nn.Module, seen: Seen, units: Collection[int]) -> nn.Module:
    """Take units out of a module, in place; returns the module, which is a new one if it was an attention itself."""
    gone = torch.tensor(sorted(units))
    named = dict(module.named_parameters()) | dict(module.named_buffers())
    with torch.no_grad():
        _fold(named, seen, gone)
    keep = {axis: ~torch.isin(labels, gone) for axis, labels in seen.units.axes.items()}
    new: dict[int, Tensor] = {}
    for (name, axis), mask in keep.items():
        if not mask.all():
            old = named[name]
            now = new.get(id(old), old.detach()).index_select(axis, mask.nonzero().flatten().to(old.device))
            if old.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
                now = now.contiguous(memory_format=torch.channels_last)
            new[id(old)] = nn.Parameter(now, old.requires_grad) if isinstance(old, nn.Parameter) else now
    for prefix, m in module.named_modules():
        for tensors in (m._parameters, m._buffers):
            for key, t in tensors.items():
                if t is not None and id(t) in new:
                    tensors[key] = new[id(t)]  # type: ignore[assignment]
        weight = f"{prefix}.weight".lstrip(".")
        if isinstance(m, nn.modules.conv._ConvNd) and weight in seen.groups:
            m.groups = int(keep[weight, 0].unflatten(0, (m.groups, -1)).any(1).sum())
        _resize(m)
    return _narrowed(module, seen, gone)


def _fold(named: dict[str, Tensor], seen: Seen, gone: Tensor) -> None:
    """Add what removed constants contributed to the biases of those that read them."""
    for use in seen.uses:
        taken = torch.isin(seen.units.roots(use.labels), gone) & use.constant & (use.values != 0)
        if use.bias is not None and taken.any():
            weight, bias = named[use.weight], named[use.bias]
            columns = weight.movedim(use.axis, 0)[taken.to(weight.device)].double()
            columns = columns.flatten(2).sum(-1) if columns.dim() > 2 else columns
            bias += (use.values[taken].to(columns.device) @ columns).to(bias.dtype)


def _resize(m: nn.Module) -> None:
    """Make the sizes that a module tells agree with its tensors."""
    weight = m._parameters.get("weight")
    if isinstance(m, nn.modules.conv._ConvNd) and weight is not None:
        first, second = weight.shape[0], weight.shape[1] * m.groups
        m.out_channels, m.in_channels = (second, first) if m.transposed else (first, second)
    elif isinstance(m, nn.Linear):
        m.out_features, m.in_features = m.weight.shape
    elif isinstance(m, nn.modules.batchnorm._NormBase):
        tensor = next((t for t in (weight, m._buffers.get("running_mean")) if t is not None), None)
        m.num_features = m.num_features if tensor is None else len(tensor)
    elif isinstance(m, nn.Embedding):
        m.embedding_dim = m.weight.shape[1]
    elif isinstance(m, nn.PReLU):
        m.num_parameters = len(m.weight)
    elif weight is not None and weight.dim() == 2 and all(isinstance(getattr(m, k, None), int) for k in ("nf", "nx")):
        vars(m).update(nx=weight.shape[0], nf=weight.shape[1])  # the transposed linear layer of GPT-2


def _narrowed(module: nn.Module, seen: Seen, gone: Tensor) -> nn.Module:
    """Attentions that lost heads as `NarrowAttention`; nested tensors, which know no such module, switched off."""
    for name, labels in seen.heads.items():
        kept = (~torch.isin(seen.units.roots(labels), gone)).nonzero().flatten()
        if len(kept) == len(labels):
            continue
        path = name.removesuffix("out_proj.weight").rstrip(".")
        old = module.get_submodule(path)
        assert isinstance(old, nn.MultiheadAttention)
        new = NarrowAttention.of(old, kept.to(old.out_proj.weight.device))
        for m in list(module.modules()):
            for key, child in m._modules.items():
                if child is old:
                    m._modules[key] = new
            if isinstance(m, nn.TransformerEncoder):
                m.enable_nested_tensor = m.use_nested_tensor = False
        module = new if old is module else module
    return module
