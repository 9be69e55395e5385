"""f + J tau in the structure that a module returns, by forward mode, or by reverse mode through reverse mode."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from fipgeo.jacobian.graphs import HOOKS
from fipgeo.model import OutputMap
from fipgeo.trees import floats, rebuilt

Named = Mapping[str, Tensor]


def pushed(output_map: OutputMap, weights: Named, tangents: Named, batch: Any) -> Any:
    """The value f + J tau of every floating tensor that a module returns, by one forward-mode pass.

    Differentiable in the tangents by reverse mode where grad mode is on. Call it inside `output_map.frozen()`.

    Args:
        output_map: The module.
        weights: theta_0 by name, without a graph.
        tangents: tau by name.
        batch: What the module gets.
    """
    with forward_ad.dual_level(), disable_saved_tensors_hooks(HOOKS):
        duals = {name: forward_ad.make_dual(t, tangents[name]) for name, t in weights.items()}

        def summed(out: Tensor) -> Tensor:
            value, tangent = forward_ad.unpack_dual(out)
            return value if tangent is None else _checked(value) + tangent

        return over_outputs(output_map.raw(duals, batch), summed)


def pushed_transposed(output_map: OutputMap, weights: Named, tangents: Named, batch: Any) -> Any:
    """The same for modules without forward-mode rules: J tau as the derivative of u -> tau^T J^T u."""
    grad = torch.is_grad_enabled()
    onward = grad and any(t.requires_grad for t in floats(batch))
    leaves = {name: t.detach().requires_grad_() for name, t in weights.items()}
    with torch.enable_grad(), disable_saved_tensors_hooks(HOOKS):
        raw = output_map.raw(leaves, batch)
        values: list[Tensor] = []
        over_outputs(raw, lambda t: values.append(_checked(t)) if t.requires_grad else None)
        seeds = [torch.zeros_like(v).requires_grad_() for v in values]
        pulled = torch.autograd.grad(values, list(leaves.values()), seeds, create_graph=True, allow_unused=True)
        used = [
            (g, tangents[name]) for name, g in zip(leaves, pulled, strict=True) if g is not None and g.requires_grad
        ]
        pushes = torch.autograd.grad(
            [g for g, _ in used], seeds, [t for _, t in used], create_graph=grad, allow_unused=True
        )
    found = {id(v): p for v, p in zip(values, pushes, strict=True) if p is not None}

    def summed(out: Tensor) -> Tensor:
        value = out if onward else out.detach()
        return value + found[id(out)] if id(out) in found else value

    return over_outputs(raw, summed)


def over_outputs(raw: Any, function: Callable[[Tensor], Any]) -> Any:
    """The structure that a module returned with every floating tensor replaced by function(tensor)."""

    def replaced(t: Tensor) -> Any:
        return function(t) if t.is_floating_point() else t

    if not isinstance(raw, Mapping | list | tuple) and isinstance(getattr(raw, "logits", None), Tensor):
        out = copy.copy(raw)  # a record with named outputs
        for key, value in vars(raw).items():
            setattr(out, key, rebuilt(value, replaced))
        return out
    return rebuilt(raw, replaced)


def _checked(value: Tensor) -> Tensor:
    """The output itself, unless it is a scalar that depends on the weights."""
    if not value.dim():
        raise ValueError(
            "outputs: the module returned a scalar that depends on its weights; the expansion of a loss is not the loss"
            " of expanded outputs, so leave labels out of the call and compute the loss from what it returns"
        )
    return value
