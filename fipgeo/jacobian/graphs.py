"""Autograd graphs of z on one batch: kept for further products, measured, shared between both halves of a product."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch.autograd.graph import Node, disable_saved_tensors_hooks

from fipgeo.jacobian.embedded import Weights

Function = Callable[[Weights], Tensor]

HOOKS = "checkpointed modules run again in the backward pass, when their weights are not in place any more"


class Graph:
    """z on one batch with the graph from its weights, for any number of products u -> J^T u.

    Plain autograd instead of `torch.func.vjp`: the same numbers with less work per operator and less memory.

    Args:
        f: z as a function of named weights.
        weights: The point; the graph uses these tensors, not copies.
        tangent: When given, `pushed` is J v of this tangent v from the same forward pass.

    Raises:
        RuntimeError: An operator has no derivative rule, or the forward uses checkpoints.
    """

    def __init__(self, f: Function, weights: Weights, tangent: Weights | None = None) -> None:
        leaves = {name: t.detach().requires_grad_() for name, t in weights.items()}
        self.leaves = list(leaves.values())
        self.pushed: Tensor | None = None
        with torch.enable_grad(), disable_saved_tensors_hooks(HOOKS):
            if tangent is None:
                self.z = f(leaves)
            else:
                # Tangents are dropped with the level; a backward pass inside it would differentiate itself as well.
                with forward_ad.dual_level():
                    z, pushed = _dual(f, leaves, tangent)
                    self.pushed = pushed.detach()
                self.z = z

    def pull(self, u: Tensor, *, keep: bool = True) -> tuple[Tensor | None, ...]:
        """J^T u for u of the shape of z, one tensor per weight, None where z does not depend on it.

        Args:
            u: The cotangent.
            keep: Whether the graph is to serve again.
        """
        if not self.z.requires_grad:
            return (None,) * len(self.leaves)
        with torch.enable_grad():
            return torch.autograd.grad(self.z, self.leaves, u, retain_graph=keep, allow_unused=True)

    def transposed(self) -> Transposed:
        """The map v -> J v as the derivative of u -> J^T u, with its own graph kept as well."""
        return Transposed(self)

    def storages(self) -> dict[int, int]:
        """Bytes of everything that the graph holds, by address."""
        return storages([self.z, *saved(self.z)])


class Transposed:
    """v -> J v by reverse mode through u -> J^T u, which is linear in u."""

    def __init__(self, graph: Graph) -> None:
        with torch.enable_grad(), disable_saved_tensors_hooks(HOOKS):
            self.u = torch.zeros_like(graph.z).requires_grad_()
            pulled: tuple[Tensor | None, ...] = (None,) * len(graph.leaves)
            if graph.z.requires_grad:
                pulled = torch.autograd.grad(graph.z, graph.leaves, self.u, create_graph=True, allow_unused=True)
        used = [(i, t) for i, t in enumerate(pulled) if t is not None and t.requires_grad]
        self.index, self.pulled = [i for i, _ in used], [t for _, t in used]

    def __call__(self, *tangents: Tensor) -> Tensor:
        """J v for v as one tensor per weight."""
        if not self.pulled:
            return torch.zeros_like(self.u)
        parts = [tangents[i] for i in self.index]
        with torch.enable_grad():
            out = torch.autograd.grad(self.pulled, self.u, parts, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(self.u) if out is None else out

    def storages(self) -> dict[int, int]:
        """Bytes of everything that the second graph holds, by address."""
        return storages([t for root in self.pulled for t in [root, *saved(root)]])


def push_dual(f: Function, weights: Weights, tangent: Weights) -> Tensor:
    """J v by forward mode."""
    with forward_ad.dual_level():
        return _dual(f, weights, tangent)[1]


def _dual(f: Function, weights: Weights, tangent: Weights) -> tuple[Tensor, Tensor]:
    duals = {name: forward_ad.make_dual(t, tangent[name]) for name, t in weights.items()}
    z, pushed = forward_ad.unpack_dual(f(duals))
    return z, torch.zeros_like(z) if pushed is None else pushed


def saved(root: Tensor) -> list[Tensor]:
    """The tensors that backward formulas below `root` keep."""
    out: list[Tensor] = []
    seen: set[Node] = set()
    stack = [root.grad_fn] if root.grad_fn is not None else []
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
        for key in dir(node):
            if key.startswith("_saved_") or key == "saved_tensors":
                value = getattr(node, key)
                out.extend(t for t in (value if isinstance(value, list | tuple) else [value]) if isinstance(t, Tensor))
    return out


def storages(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the memory behind tensors, by address, so that memory which is shared counts once."""
    out: dict[int, int] = {}
    for t in tensors:
        if not t._is_zerotensor():
            storage = t.untyped_storage()
            out[storage.data_ptr()] = storage.nbytes()
    return out


def put(out: Mapping[str, Tensor], parts: Iterable[Tensor | None], add: bool) -> None:
    """Write one tensor per weight into the views of a flat vector, or add it to them; None is zero."""
    for view, part in zip(out.values(), parts, strict=True):
        if part is None:
            view.zero_() if not add else None
        else:
            view.add_(part) if add else view.copy_(part)
