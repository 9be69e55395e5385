"""One linearised model of many components, and components that come and go."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor, nn

from fipgeo.tangent.component import Component, base_of, fingerprint
from fipgeo.tangent.model import TangentModel, frozen_copy

Weights = str | float | Mapping[str, float] | Sequence[float] | Tensor
"""How components are weighted: "mean" (1/n each), "sum" (1 each), one number for all, a number by name, or numbers (a
tensor of them) in the order of the components. Negative ones subtract what was learned."""


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
            scaled = numbers[part.name] * t.detach().double()
            if name in total and total[name].shape != t.shape:
                raise ValueError(
                    f"components: {part.name!r} has {name} of shape {list(t.shape)}, others {list(total[name].shape)}"
                )
            total[name] = total[name] + scaled.to(total[name].device) if name in total else scaled
    return total


def weights_by_name(components: Sequence[Component], weights: Weights) -> dict[str, float]:
    """One number for each component, by name.

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
    if isinstance(weights, int | float | Real):
        found = dict.fromkeys(names, float(weights))
    elif isinstance(weights, Mapping):
        if set(weights) != set(names):
            odd = sorted(set(weights) ^ set(names))
            raise ValueError(
                f"weights: {odd[0]!r} is {'a weight' if odd[0] in weights else 'a component'} alone; "
                "expected one number for each component and no others"
            )
        found = {name: float(weights[name]) for name in names}
    else:
        if len(weights) != len(names):
            raise ValueError(f"weights: got {len(weights)} numbers for {len(names)} components; expected one for each")
        found = {name: float(w) for name, w in zip(names, weights, strict=True)}
    wrong = [name for name, w in found.items() if not math.isfinite(w)]
    if wrong:
        raise ValueError(f"weights: {wrong[0]!r} has {found[wrong[0]]}; expected finite numbers")
    return found


@dataclass(frozen=True)
class Entry:
    """One line of a pool's record.

    Attributes:
        action: "add" or "forget".
        name: Of the component.
        digest: Of its values (see `Component.digest`).
    """

    action: str
    name: str
    digest: str


class Pool:
    """Components of one base that come and go, with a record of it.

    Nothing is kept of a component that was forgotten but its lines in the record, which hold a name and a hash: models
    are made of the components at hand, not of a running sum, so they have the bits of a pool that never had it.

    Args:
        base: The module with theta_0, or a tangent model about it. A frozen copy is kept.
        components: Added in order.

    Attributes:
        components: What is in the pool, by name.
        record: What went in and out, in order.

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> pool = Pool(net, [Component.of(TangentModel(net), name) for name in "ab"])
        >>> pool.forget("a")
        >>> list(pool.components), [entry.action for entry in pool.record]
        (['b'], ['add', 'add', 'forget'])
    """

    def __init__(self, base: nn.Module, components: Iterable[Component] = ()) -> None:
        self.fingerprint = fingerprint(base)
        self.base = frozen_copy(base_of(base))
        self.components: dict[str, Component] = {}
        self.record: list[Entry] = []
        for component in components:
            self.add(component)

    def add(self, component: Component) -> None:
        """Take a component in.

        Raises:
            ValueError: It belongs to another base, or one of its name is there.
        """
        component.check(self.fingerprint)
        if component.name in self.components:
            raise ValueError(f"component: {component.name!r} is in the pool already; forget it first, or rename it")
        self.components[component.name] = component
        self.record.append(Entry("add", component.name, component.digest()))

    def forget(self, name: str) -> None:
        """Let a component go.

        Raises:
            KeyError: There is none of that name.
        """
        if name not in self.components:
            raise KeyError(f"name: {name!r} is not in the pool, which holds {', '.join(self.components) or 'nothing'}")
        component = self.components.pop(name)
        self.record.append(Entry("forget", name, component.digest()))

    def model(self, weights: Weights = "mean") -> TangentModel:
        """The composed model of what is in the pool (see `compose`); it shares the memory of the pool's base."""
        total = combined(list(self.components.values()), weights)
        return TangentModel(self.base, list(total) or "*", copy=False).assign_(total)

    def __len__(self) -> int:
        return len(self.components)
