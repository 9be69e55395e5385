"""More outputs for a trained network: new classes get rows of their own in the last linear layer."""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fipgeo.linalg import as_generator
from fipgeo.model import OutputMap, unwrapped
from fipgeo.trees import FEW, head

Init = Literal["zeros", "normal", "mean"]


def grow_head(
    model: nn.Module,
    num_outputs: int,
    *,
    name: str | None = None,
    inputs: Any = None,
    init: Init = "zeros",
    std: float = 0.01,
    generator: torch.Generator | int | None = None,
) -> nn.Module:
    """A copy of a network whose output layer has more outputs; the rows that it had stay bit for bit.

    W `[C, d]` becomes `[num_outputs, d]`, and the bias, if there is one, goes along. With "zeros" the logits of new
    classes are 0 everywhere; with "mean" they are the mean of the old logits, so that new classes start on a par with
    the old ones; with "normal" the new rows are drawn from N(0, std^2) and their biases are 0.

    Args:
        model: Any module; not changed. `DistributedDataParallel` and `torch.compile` are looked through: what comes
            back is a copy of the module inside.
        num_outputs: How many outputs the layer is to have in the end, old ones included.
        name: Of the `nn.Linear` that makes the outputs, as in `model.named_modules()`. None takes the only one, or
            with `inputs` the one whose output is the network's.
        inputs: A batch to find that layer by; only its first examples are used.
        init: How new rows begin.
        std: Standard deviation of new rows with "normal".
        generator: Where these are drawn from; None for a fixed seed.

    Returns:
        The copy, in the mode the model was in.

    Raises:
        ValueError: There is no such layer or more than one, its weight is shared with another module or computed by a
            parametrisation, it has as many outputs already, or `init` is unknown.

    Examples:
        >>> old = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> new, x = grow_head(old, 5, name="2"), torch.randn(4, 3)
        >>> new(x).shape, torch.allclose(new(x)[:, :2], old(x)), bool(new(x)[:, 2:].any())
        (torch.Size([4, 5]), True, False)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if init not in ("zeros", "normal", "mean"):
        raise ValueError(f"init: got {init!r}, expected 'zeros', 'normal' or 'mean'")
    if not std > 0:
        raise ValueError(f"std: got {std}, expected a positive number")
    grown = copy.deepcopy(unwrapped(model))
    name = _found(grown, name, inputs)
    layer = grown.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    _check(grown, name, layer)
    more = num_outputs - layer.out_features
    if more <= 0:
        raise ValueError(
            f"num_outputs: got {num_outputs}, expected more than the {layer.out_features} that {name!r} has; it is the"
            " number of outputs in the end, not of those to add"
        )
    random = as_generator(generator)
    for key, old in [("weight", layer.weight), ("bias", layer.bias)]:
        if old is not None:
            rows = _rows(old.detach(), more, init if key == "weight" or init != "normal" else "zeros", std, random)
            fresh = nn.Parameter(torch.cat([old.detach(), rows]), requires_grad=old.requires_grad)
            setattr(layer, key, fresh)
    layer.out_features = num_outputs
    return grown


def _rows(old: Tensor, more: int, init: str, std: float, generator: torch.Generator) -> Tensor:
    """New rows `[more, ...]` for a weight `[C, d]` or a bias `[C]`."""
    if init == "mean":
        return old.mean(0, keepdim=True).expand(more, *old.shape[1:])
    rows = old.new_zeros(more, *old.shape[1:])
    if init == "normal":
        drawn = torch.randn(rows.shape, generator=generator, device=generator.device, dtype=torch.float32)
        rows = (std * drawn).to(rows)
    return rows


def _found(model: nn.Module, name: str | None, inputs: Any) -> str:
    """The name of the layer that makes the outputs."""
    modules = dict(model.named_modules(remove_duplicate=False))
    once = {id(m): n for n, m in reversed(modules.items())}
    # the projection inside nn.MultiheadAttention is a subclass that is never called as a module
    linear = [n for n, m in modules.items() if isinstance(m, nn.Linear) and once[id(m)] == n]
    linear = [n for n in linear if "NonDynamically" not in type(modules[n]).__name__]
    known = ", ".join(repr(n) for n in linear) or "none"
    if name is not None:
        if not isinstance(modules.get(name), nn.Linear):
            what = f"a {type(modules[name]).__name__}" if name in modules else "no module of this model"
            raise ValueError(f"name: {name!r} is {what}, expected an nn.Linear; there are {known}")
        return name
    if inputs is not None:
        return _last(model, linear, inputs)
    if len(linear) != 1:
        raise ValueError(
            f"name: the model has {len(linear)} nn.Linear ({known}), so which of them makes the outputs is to be said:"
            " pass name=..., or inputs=... to find it"
        )
    return linear[0]


def _last(model: nn.Module, linear: list[str], inputs: Any) -> str:
    """The linear layer whose output is the network's output, seen on a few examples."""
    output_map, few = OutputMap(model), head(inputs, FEW)
    weights = output_map.named(output_map.point())
    for name in reversed(linear):
        with output_map.frozen():
            outputs, hidden = output_map.tapped(weights, few, [name])
        if any(h.shape == f.shape and torch.equal(h, f) for h in hidden for f in outputs):
            return name
    raise ValueError(
        "inputs: no nn.Linear puts out what the model puts out; grow the layer that makes the outputs by hand, or take"
        " what comes after it (a softmax, say) out of the model"
    )


def _check(model: nn.Module, name: str, layer: nn.Linear) -> None:
    """Whether the layer's tensors are its own."""
    if isinstance(layer, nn.LazyLinear):
        raise ValueError(f"name: {name!r} has no weights yet; call the model on a batch first")
    own = {id(p): key for key, p in layer.named_parameters(recurse=False)}
    if "weight" not in own.values():
        raise ValueError(
            f"name: the weight of {name!r} is computed by a parametrisation; remove it first, with"
            " torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    for other, module in model.named_modules():
        for key, p in module.named_parameters(recurse=False):
            if module is not layer and id(p) in own:
                raise ValueError(
                    f"name: the {own[id(p)]} of {name!r} is tied to {key!r} of {other or 'the model'!r}, which would"
                    " grow with it; untie them first, with a copy: layer.weight = nn.Parameter(layer.weight.clone())"
                )
