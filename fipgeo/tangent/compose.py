"""One linearised model of many components, and the same function by a model for each of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor, nn

from fipgeo.tangent.component import Component, base_of, fingerprint
from fipgeo.tangent.model import TangentModel, frozen_copy
from fipgeo.tangent.push import over_outputs

Factor = float | Mapping[str, float]
"""Of a component: one number, or one for each of its tensors."""

Weights = str | float | Mapping[str, float] | Mapping[str, Mapping[str, float]] | Sequence[float] | Tensor
"""How components are weighted: "mean" (1/n each), "sum" (1 each), one number for all, a number by name or one by name
and tensor, or numbers (a tensor of them) in the order of the components. Negative ones subtract what was learned."""


def compose(
    base: nn.Module, components: Iterable[Component], weights: Weights = "mean", *, copy: bool = True
) -> TangentModel:
    r"""f(x; theta_0) + J(x; theta_0) sum_i w_i tau_i: one linearised model, whatever the number of components.

    With weights that sum to one its outputs are the weighted mean of the outputs of the components' own models, at the
    price of one of them. The sum is taken in float64 in the order of the names and rounded once, so that it depends on
    which components there are and on nothing else: without a component it has the bits of the sum that never had it.

    Args:
        base: The module with theta_0, or a tangent model about it.
        components: With different names. A component without a tensor that another one has counts as zero there.
        weights: See `Weights`.
        copy: See `TangentModel`.

    Returns:
        The model. Its tau can be trained further; that does not reach the components.

    Raises:
        ValueError: A component belongs to another base, names repeat, or weights do not fit.

    Source: Liu & Soatto, Tangent Model Composition for Ensembling and Continual Fine-tuning, ICCV 2023.

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> one, two = ({"bias": net.bias.detach().new_tensor(b)} for b in ([1.0, 0.0], [3.0, 2.0]))
        >>> parts = [Component(name, tau, fingerprint(net)) for name, tau in (("a", one), ("b", two))]
        >>> compose(net, parts).tangents()["bias"].tolist()
        [2.0, 1.0]
        >>> compose(net, parts, {"a": 1.0, "b": -1.0}).tangents()["bias"].tolist()
        [-2.0, -2.0]
    """
    parts = list(components)
    code = fingerprint(base)
    for part in parts:
        part.check(code)
    total = combined(parts, weights)
    model = TangentModel(base_of(base), list(total) or "*", copy=copy)
    return model.assign_(total)


def combined(components: Sequence[Component], weights: Weights = "mean") -> dict[str, Tensor]:
    """sum_i w_i tau_i by parameter names in float64, added in the order of the components' names.

    Raises:
        ValueError: Names of components repeat, weights do not fit, or shapes of a tensor differ between components.
    """
    numbers = weights_by_name(components, weights)
    total: dict[str, Tensor] = {}
    for part in sorted(components, key=lambda c: c.name):
        for name, t in part.tangents.items():
            scaled = factor_of(numbers[part.name], name) * t.detach().double()
            if name in total and total[name].shape != t.shape:
                raise ValueError(
                    f"components: {part.name!r} has {name} of shape {list(t.shape)}, others {list(total[name].shape)}"
                )
            total[name] = total[name] + scaled.to(total[name].device) if name in total else scaled
    return total


def factor_of(factor: Factor, tensor: str) -> float:
    """The number that a tensor of a component is multiplied with."""
    return factor[tensor] if isinstance(factor, Mapping) else factor


def weights_by_name(components: Sequence[Component], weights: Weights) -> dict[str, Factor]:
    """One number for each component, or one for each of its tensors, by name.

    Raises:
        ValueError: Names of components repeat, an unknown word, missing or unknown names, a wrong count, or a number
            that is not finite.
    """
    names = [part.name for part in components]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"components: two are called {twice[0]!r}; names tell them apart, so give each its own")
    if isinstance(weights, Tensor):
        weights = weights.tolist()
    if isinstance(weights, str):
        words = {"mean": 1 / max(len(names), 1), "sum": 1.0}
        if weights not in words:
            raise ValueError(f"weights: got {weights!r}, expected 'mean', 'sum', a number, or numbers by name")
        return dict.fromkeys(names, words[weights])
    found: dict[str, Factor]
    if isinstance(weights, int | float | Real):
        found = dict.fromkeys(names, float(weights))
    elif isinstance(weights, Mapping):
        if set(weights) != set(names):
            odd = sorted(set(weights) ^ set(names))
            raise ValueError(
                f"weights: {odd[0]!r} is {'a weight' if odd[0] in weights else 'a component'} alone; "
                "expected one number for each component and no others"
            )
        found = {part.name: _factor(part, weights[part.name]) for part in components}
    else:
        if len(weights) != len(names):
            raise ValueError(f"weights: got {len(weights)} numbers for {len(names)} components; expected one for each")
        found = {name: float(w) for name, w in zip(names, weights, strict=True)}
    for name, factor in found.items():
        for w in factor.values() if isinstance(factor, Mapping) else [factor]:
            if not math.isfinite(w):
                raise ValueError(f"weights: {name!r} has {w}; expected finite numbers")
    return found


def _factor(part: Component, factor: float | Mapping[str, float]) -> Factor:
    """One number, or one for each tensor that the component has."""
    if not isinstance(factor, Mapping):
        return float(factor)
    odd = sorted(set(factor) ^ set(part.tangents))
    if odd:
        raise ValueError(
            f"weights: of {part.name!r}, {odd[0]!r} is {'a weight' if odd[0] in factor else 'a tensor'} alone; expected"
            " one number for each of its tensors and no others"
        )
    return {name: float(w) for name, w in factor.items()}


class Ensemble(nn.Module):
    r"""f_0 + sum_i w_i (f_i - f_0) with a forward of each component's own model: what `compose` gives in one.

    With weights that sum to one it is their weighted mean. For comparison, and for a look at the members one by one.

    Args:
        base: The module with theta_0, or a tangent model about it.
        components: See `compose`.
        weights: See `Weights`.
        copy: See `TangentModel`; the members share one base.

    Attributes:
        members: A tangent model for each component, in the order of the names.
        weights: Their weights, in this order; one where tensors of a member were multiplied with theirs.

    Raises:
        ValueError: As `compose`; or there is no component.

    Examples:
        >>> import torch
        >>> net = nn.Linear(3, 2)
        >>> parts = [Component(n, {"bias": torch.full((2,), t)}, fingerprint(net)) for n, t in (("a", 1.0), ("b", 3.0))]
        >>> x = torch.zeros(1, 3)
        >>> torch.allclose(Ensemble(net, parts)(x), compose(net, parts)(x))
        True
    """

    def __init__(
        self, base: nn.Module, components: Iterable[Component], weights: Weights = "mean", *, copy: bool = True
    ) -> None:
        super().__init__()
        parts = list(components)
        numbers = weights_by_name(parts, weights)
        if not parts:
            raise ValueError("components: got none; expected at least one")
        code = fingerprint(base)
        for part in parts:
            part.check(code)
        parts = sorted(parts, key=lambda c: c.name)
        shared = frozen_copy(base_of(base), share=not copy)
        self.members, self.weights = nn.ModuleList(), []
        for part in parts:
            factor, tangents = numbers[part.name], part.tangents
            if isinstance(factor, Mapping):
                factor, tangents = 1.0, {name: factor[name] * t for name, t in tangents.items()}
            self.members.append(TangentModel(shared, list(tangents), copy=False).assign_(tangents))
            self.weights.append(factor)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these inputs, every floating tensor summed over the members."""
        total = sum(self.weights)
        first = self.members[0]
        assert isinstance(first, TangentModel)
        sums: list[Tensor] = []
        pieces = [(w, member(*args, **kwargs)) for w, member in zip(self.weights, self.members, strict=True)]
        if abs(total - 1) > 1e-12:
            pieces.append((1 - total, first.base_outputs(*args, **kwargs)))
        for w, out in pieces:
            found: list[Tensor] = []
            over_outputs(out, lambda t, w=w, found=found: found.append(w * t))
            sums = [a + b for a, b in zip(sums, found, strict=True)] if sums else found
        rest = iter(sums)
        return over_outputs(pieces[0][1], lambda _: next(rest))
