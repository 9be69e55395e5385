"""Zeros in the forms that others read: boolean masks, and the form of `torch.nn.utils.prune`."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fipgeo.space import Where, select


def as_masks(source: Any, where: Where = None) -> dict[str, Tensor]:
    """Which entries are not zero.

    Args:
        source: A module (its parameters), a mapping of tensors, or a point of a path that was stored.
        where: Which tensors: a glob or several, a predicate (name, tensor) -> bool, or None for the floating tensors
            with two axes or more, which is where biases, normalisations and statistics are left out.

    Returns:
        For every chosen tensor a boolean tensor of its shape, True where it is not zero. Modules in the form of
        `torch.nn.utils.prune` are read as the dense modules they stand for.

    Raises:
        ValueError: `where` chooses nothing, or the point was not stored.
        TypeError: The source is none of these.

    Examples:
        >>> net = nn.Linear(2, 1)
        >>> with torch.no_grad():
        ...     _ = net.weight.copy_(torch.tensor([[0.0, 2.0]]))
        >>> as_masks(net)
        {'weight': tensor([[False,  True]])}
    """
    tensors = getattr(source, "tensors", source)
    if isinstance(source, nn.Module):
        tensors = dict(_dense_named(source))
    elif tensors is None:
        raise ValueError("source: this point was not stored; walk with store='all' to keep every point")
    if not isinstance(tensors, Mapping):
        raise TypeError(f"source: got {type(source).__name__}, expected a module, a mapping or a path's point")
    names = select(tensors, _is_matrix if where is None else where, argument="where")
    return {name: tensors[name].detach() != 0 for name in names}


def to_prune_(model: nn.Module, where: Where = None) -> nn.Module:
    """Hold the zeros of a module by masks, in place, in the form of `torch.nn.utils.prune`.

    Every chosen parameter `w` that has zeros becomes a parameter `w_orig` and a buffer `w_mask`, whose product the
    module uses: whatever an optimiser does to `w_orig`, zeros stay. Nothing becomes faster. Undone by `to_dense_`.

    Args:
        model: Any module.
        where: Which parameters (see `as_masks`).

    Returns:
        The model.

    Raises:
        ValueError: A chosen parameter is in that form already, or is used by several modules under several names.

    Source: https://docs.pytorch.org/tutorials/intermediate/pruning_tutorial.html

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = net.weight[0].zero_()
        >>> sorted(to_prune_(net).state_dict())
        ['bias', 'weight_mask', 'weight_orig']
    """
    if held := [name for _, _, name in _held(model)]:
        raise ValueError(f"model: {held[0]} is held by a mask already; call to_dense_(model) first")
    named = dict(model.named_parameters(remove_duplicate=False))
    masks = as_masks(named, where)
    pruned = {name: mask for name, mask in masks.items() if not mask.all()}
    for name in pruned:
        others = [n for n, p in named.items() if p is named[name] and n != name]
        if others:
            raise ValueError(
                f"where: {name} is the same tensor as {others[0]}, which masks would tear apart; leave both out, with"
                f" where=lambda name, tensor: tensor.dim() > 1 and name not in {sorted([name, *others])}"
            )
    for name, mask in pruned.items():
        path, _, local = name.rpartition(".")
        module = model.get_submodule(path)
        order = list(module._parameters)
        prune.custom_from_mask(module, local, mask.to(named[name].dtype))
        _reorder(module, [f"{local}_orig" if key == local else key for key in order])
    return model


def to_dense_(model: nn.Module) -> nn.Module:
    """Undo the form of `torch.nn.utils.prune`, in place: masked parameters become plain ones with zeros in them.

    Also for modules that others brought into that form. Modules without masks stay as they are. Parameters keep
    their order.

    Returns:
        The model.

    Examples:
        >>> net = prune.l1_unstructured(nn.Linear(4, 1), "weight", amount=2)
        >>> int((to_dense_(net).weight == 0).sum()), sorted(net.state_dict())
        (2, ['bias', 'weight'])
    """
    for module, local, _ in list(_held(model)):
        order = [local if key == f"{local}_orig" else key for key in module._parameters]
        with torch.no_grad():
            prune.remove(module, local)
        _reorder(module, order)
    return model


def dense_copy(model: nn.Module) -> nn.Module:
    """A deep copy without masks; the model stays as it is."""
    memo: dict[int, Any] = {}
    for module, local, _ in _held(model):
        computed = getattr(module, local)  # no leaf of a graph, so it cannot be copied as it is
        memo[id(computed)] = computed.detach().clone()
    return to_dense_(copy.deepcopy(model, memo))


def dense_name(name: str, names: Mapping[str, Any]) -> str:
    """What a parameter is called once its mask is gone."""
    bare = name.removesuffix("_orig")
    return bare if f"{bare}_mask" in names else name


def _held(model: nn.Module) -> Iterator[tuple[nn.Module, str, str]]:
    """Modules with masked parameters: the module, the parameter's name in it, and its name in the model."""
    for prefix, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                local = hook._tensor_name
                yield module, local, f"{prefix}.{local}".lstrip(".")


def _dense_named(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by the names and with the values that they have in the dense module."""
    buffers = dict(model.named_buffers())
    for name, p in model.named_parameters():
        bare = dense_name(name, buffers)
        yield bare, p if bare == name else p * buffers[f"{bare}_mask"]


def _is_matrix(name: str, tensor: Tensor) -> bool:
    del name
    return tensor.is_floating_point() and tensor.dim() > 1


def _reorder(module: nn.Module, names: list[str]) -> None:
    """Bring a module's own parameters into an order."""
    rest = {name: module._parameters.pop(name) for name in list(module._parameters)}
    for name in [*names, *(n for n in rest if n not in names)]:
        module._parameters[name] = rest[name]
