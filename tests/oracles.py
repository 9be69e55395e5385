"""Dense references by another route: plain reverse mode, one output at a time, on a float64 copy of the module."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

Embed = Callable[[Tensor], Tensor]


def leaves(raw: Any) -> list[Tensor]:
    """The outputs that a metric compares, out of what the module returned."""
    if isinstance(raw, Tensor):
        return [raw]
    if hasattr(raw, "logits"):
        return [raw.logits]
    return list(raw.values()) if isinstance(raw, Mapping) else list(raw)


def embedded(module: nn.Module, inputs: Any, embed: Embed) -> Tensor:
    """z `[N, M]` of a module in its present mode, with an autograd graph."""
    private = {k: v.clone() for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.clone()
    raw = module(**private) if isinstance(private, dict) else module(private)
    return torch.cat([embed(f).flatten(1) for f in leaves(raw)], 1)


def wide(inputs: Any) -> Any:
    """Inputs with their floats in float64."""
    if isinstance(inputs, Mapping):
        return {key: wide(value) for key, value in inputs.items()}
    return inputs.double() if inputs.is_floating_point() else inputs


def coordinates(module: nn.Module, where: Callable[[str], bool] | None = None) -> list[nn.Parameter]:
    """The parameters that span weight space, in order, shared ones once."""
    named = module.named_parameters()
    return [p for name, p in named if (p.requires_grad if where is None else where(name))]


def root(
    module: nn.Module, inputs: Any, embed: Embed = lambda f: f, where: Callable[[str], bool] | None = None
) -> Tensor:
    """R = dz/dtheta `[N * M, D]` in eval mode and float64."""
    module = copy.deepcopy(module).double().eval()
    for part in module.modules():
        if isinstance(part, nn.Embedding):  # a gradient that training is not to use is a derivative all the same
            part.padding_idx = None
    weights = coordinates(module, where)
    for p in weights:
        p.requires_grad_(True)
    rows = []
    with torch.enable_grad():
        z = embedded(module, wide(inputs), embed).flatten()
        for entry in z:
            slopes = torch.autograd.grad(entry, weights, retain_graph=True, allow_unused=True)
            parts = [torch.zeros_like(p) if s is None else s for p, s in zip(weights, slopes, strict=True)]
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).detach()


def fisher(module: nn.Module, inputs: Any, temperature: float = 1.0) -> Tensor:
    """The Fisher metric of a classifier, mean over examples of J^T (diag p - p p^T) J / T^2, `[D, D]`.

    Outputs are `[N, C]` or `[N, positions, C]`; positions are summed.
    """
    jacobian = root(module, inputs)
    with torch.no_grad():
        copied = copy.deepcopy(module).double().eval()
        private = {k: v.clone() for k, v in inputs.items()} if isinstance(inputs, Mapping) else inputs.clone()
        logits = leaves(copied(**private) if isinstance(private, dict) else copied(wide(private)))[0]
    classes = logits.shape[-1]
    out = torch.zeros(jacobian.shape[1], jacobian.shape[1])
    for block, f in zip(jacobian.split(classes), logits.reshape(-1, classes), strict=True):
        p = torch.softmax(f / temperature, 0)
        out += block.T @ (torch.diag(p) - torch.outer(p, p)) @ block / temperature**2
    return out / len(logits)


def slope(function: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-5) -> Tensor:
    """The Jacobian of a function of a vector by central differences, error about step^2: `[m, n]`."""
    columns = []
    for direction in torch.eye(len(x), dtype=x.dtype):
        columns.append((function(x + step * direction) - function(x - step * direction)) / (2 * step))
    return torch.stack(columns, 1)


def relative(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the Frobenius norm, in float64; absolute where expected is zero."""
    size = float(expected.double().norm())
    return float((found.double() - expected.double()).norm()) / (size or 1.0)
