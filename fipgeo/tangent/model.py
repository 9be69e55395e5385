"""A network that is linear in its trainable weights: the first-order expansion of any module about its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.model import OutputMap, unwrapped
from fipgeo.space import WeightSpace, Where
from fipgeo.tangent.push import Expansion, called


class TangentModel(nn.Module):
    """f(x; theta_0) + J(x; theta_0) tau for any module, with tau as the parameters that are trained.

    One forward-mode pass gives the value and J tau together, for three products where a plain forward has one; parts
    of the network before the first trainable tensor carry no tangent and no graph. A loss that is convex in the outputs
    is convex in tau. With tau = 0, the start, outputs equal those of the module in eval mode with torch's plain
    attention kernels.

    The module is evaluated as `OutputMap` does it, whatever `train()` says: BatchNorm by its running statistics, which
    never move, and no dropout. Every floating tensor of its output is linearised, in the structure that it returns.
    Inputs go to it as they are given, so the call is the module's own.

    Args:
        module: Any module; wrappers of `DistributedDataParallel` and `torch.compile` are looked through. It stays as it
            is.
        trainable: Which parameters get a tangent (see `WeightSpace.of`): globs such as "layer4.*", a predicate, or None
            for all that require a gradient.
        copy: Expand about a copy of the weights. False shares their memory with the module; then leave its weights
            alone as long as the tangent model is in use.

    Attributes:
        base: The frozen copy of the module that carries theta_0.
        tau: The tangents, modules nested as the network's are; `tangents()` gives them by name.
        space: The trainable tensors as coordinates.

    Raises:
        ValueError: Bad patterns, or a BatchNorm without running statistics; and from a call if the module returns a
            scalar that depends on the weights, such as a loss, whose expansion is not the loss of expanded outputs.
        NotImplementedError: From a call: the module has no second derivative rule, which training by reverse mode or
            J tau itself needs.

    Source: Liu & Soatto, Tangent Model Composition for Ensembling and Continual Fine-tuning, ICCV 2023; Liu, Golatkar &
    Soatto, Tangent Transformers for Composition, Privacy and Removal, ICLR 2024.

    Examples:
        >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> model = TangentModel(net, "2.*")
        >>> x = torch.ones(5, 3)
        >>> bool((model(x) == net(x)).all()), [name for name, p in model.named_parameters() if p.requires_grad]
        (True, ['tau.2.weight', 'tau.2.bias'])
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> model(x).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(self, module: nn.Module, trainable: Where = None, *, copy: bool = True) -> None:
        super().__init__()
        if not isinstance(module, nn.Module):
            raise TypeError(f"module: got {type(module).__name__}, expected a torch.nn.Module")
        if isinstance(module, TangentModel):
            raise TypeError("module: got a TangentModel, which is linear already; pass its .base, or deepcopy it")
        module = unwrapped(module)
        space = WeightSpace.of(module, trainable)
        self.base = frozen_copy(module, share=not copy)
        self.tau = nn.Module()
        self._names = tuple(space.shapes)
        named = dict(self.base.named_parameters())
        for name in self._names:
            _place(self.tau, name, nn.Parameter(torch.zeros_like(named[name], memory_format=torch.contiguous_format)))
        self._expanded = self._expansion()

    @property
    def space(self) -> WeightSpace:
        """The trainable tensors as coordinates."""
        return self._expanded.map.space

    @property
    def names(self) -> list[str]:
        """Names of the trainable tensors, as the module calls them."""
        return list(self._names)

    def tangents(self) -> dict[str, nn.Parameter]:
        """The trained tensors tau by the names of the module's parameters."""
        return {name: _found(self.tau, name) for name in self._names}

    def assign_(self, tangents: Mapping[str, Tensor]) -> TangentModel:
        """Write tau in place and return the model: named tensors are copied, those without a name become zero.

        Raises:
            ValueError: A name is not trainable here, or a shape differs; nothing is written then.
        """
        own = self.tangents()
        unknown = [name for name in tangents if name not in own]
        if unknown:
            raise ValueError(
                f"tangents: {unknown[0]!r} is not among the {len(own)} trainable tensors; choose it with trainable=..."
            )
        for name, t in tangents.items():
            if t.shape != own[name].shape:
                raise ValueError(f"tangents: {name} has shape {list(t.shape)}, expected {list(own[name].shape)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tangents[name]) if name in tangents else parameter.zero_()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these inputs, with every floating tensor linearised in the weights."""
        return self._expanded(self.tangents(), (args, kwargs))

    def base_outputs(self, *args: Any, **kwargs: Any) -> Any:
        """f(x; theta_0), without a graph and evaluated as the expansion is."""
        with self._expanded.contexts(), torch.no_grad():
            return self._expanded.map.raw({}, (args, kwargs))

    def train(self, mode: bool = True) -> TangentModel:
        """Set the mode of this module and its tangents; the base stays in eval mode."""
        self.training = mode
        self.tau.train(mode)
        return self

    def _expansion(self) -> Expansion:
        names = frozenset(self._names)
        return Expansion(OutputMap(self.base, lambda name, _: name in names, forward_fn=called))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> TangentModel:
        """Casts and moves, as for any module; the expansion is made anew for the new dtype and device."""
        super()._apply(fn, recurse)
        self._expanded = self._expansion()
        return self

    def extra_repr(self) -> str:
        """Size of tau."""
        return f"trainable: {self.space.dim:,} of {sum(p.numel() for p in self.base.parameters()):,} weights"


def frozen_copy(module: nn.Module, *, share: bool = False) -> nn.Module:
    """A deep copy in eval mode without gradients; with `share`, its parameters and buffers use the same memory.

    Tensors that a forward left on the module, which have a graph and cannot be deep-copied, come along detached.
    """
    memo: dict[int, Any] = {}
    for part in module.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
        for p in part.parameters(recurse=False):
            if share:
                memo[id(p)] = nn.Parameter(p.detach(), requires_grad=False)
        for b in part.buffers(recurse=False):
            if share:
                memo[id(b)] = b.detach()
    with torch.inference_mode(False):
        out = copy.deepcopy(module, memo)
    for p in out.parameters():
        p.grad = None
    return out.requires_grad_(False).eval()


def _found(tree: nn.Module, name: str) -> nn.Parameter:
    """The parameter under a dotted name, or what a functional call put in its place."""
    path, _, last = name.rpartition(".")
    return getattr(tree.get_submodule(path), last)


def _place(tree: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Register a parameter under a dotted name, with empty modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if part not in tree._modules:
            tree.add_module(part, nn.Module())
        tree = tree.get_submodule(part)
    tree.register_parameter(last, parameter)
