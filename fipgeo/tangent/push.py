"""f + J tau in the structure that a module returns, by forward mode, or by reverse mode through reverse mode."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.autograd.graph import disable_saved_tensors_hooks

from fipgeo.jacobian.graphs import HOOKS
from fipgeo.model import OutputMap
from fipgeo.tangent.rules import Rules, usable
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

        with Rules() if usable(weights.values()) else nullcontext():
            raw = output_map.raw(duals, batch)
        return over_outputs(raw, summed)


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


class Expansion:
    """F + J tau of a module at its present weights, as a function of tau: differentiable in it, in what the caller set.

    Args:
        output_map: The module, and which weights have tangents.

    Attributes:
        map: The same.
    """

    def __init__(self, output_map: OutputMap) -> None:
        self.map = output_map
        self._rules: dict[torch.dtype | None, Callable[..., Any]] = {}

    def __call__(self, tangents: Named, batch: Any) -> Any:
        """What the module returns for a batch, every floating tensor linearised; tangents by name, in any dtype."""
        compiler = sys.modules.get("torch._dynamo")  # there once anything was compiled; it cannot trace dual numbers
        run = self._linearised if compiler is None else compiler.disable(self._linearised)
        return run(tangents, batch)

    def _linearised(self, tangents: Named, batch: Any) -> Any:
        named = dict(self.map.module.named_parameters())
        weights = {name: named[name].detach() for name in self.map.space.names}
        moves = {name: tangents[name].to(weight.dtype) for name, weight in weights.items()}
        with self.contexts() as precision:
            if precision in self._rules:
                return self._rules[precision](self.map, weights, moves, batch)
            return self._first(precision, weights, moves, batch)

    def _first(
        self, precision: torch.dtype | None, weights: dict[str, Tensor], tangents: dict[str, Tensor], call: Any
    ) -> Any:
        """The first evaluation at a precision: forward mode where the module has it, else reverse mode through itself.

        Forward mode fails under autocast where torch gives values and tangents different dtypes (BatchNorm).
        """
        first: Exception | None = None
        for rule in (pushed, pushed_transposed):
            try:
                out = rule(self.map, weights, tangents, call)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, NotImplementedError) as error:
                first = first or error
                continue
            self._rules[precision] = rule
            return out
        assert first is not None
        raise first

    @contextmanager
    def contexts(self) -> Iterator[torch.dtype | None]:
        """The map's own, with the caller's grad mode and autocast, whose dtype is given, or None without."""
        kind = self.map.space.device.type
        autocast, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        grad = torch.is_grad_enabled()
        with ExitStack() as stack:
            stack.enter_context(self.map.frozen())
            stack.enter_context(torch.set_grad_enabled(grad))
            if autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield dtype if autocast else None


def called(module: nn.Module, call: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    """The module's call on positional and keyword inputs."""
    args, kwargs = call
    return module(*args, **kwargs)
