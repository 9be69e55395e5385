"""Components that come and go, and leave no bit behind."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from fipgeo.tangent.component import Component, base_of, fingerprint
from fipgeo.tangent.compose import Ensemble, Weights, combined
from fipgeo.tangent.evidence import Evidence, Learned, learned_weights
from fipgeo.tangent.model import TangentModel, frozen_copy


@dataclass(frozen=True)
class Entry:
    """One line of a pool's record.

    Attributes:
        action: "add" or "forget" of a component, "hear" or "unhear" of a shard's evidence.
        name: Of the component or the shard.
        digest: Of its values (see `Component.digest`, `Evidence.digest`).
    """

    action: str
    name: str
    digest: str


class Pool:
    """Components of one base that come and go, what shards say about them, and a record of it.

    Nothing is kept of what was forgotten but its lines in the record, which hold a name and a hash: models and weights
    are made of the components and the evidence at hand, not of running sums, so they have the bits of a pool that never
    had it, learned weights included.

    Args:
        base: The module with theta_0, or a tangent model about it. A frozen copy is kept.
        components: Added in order.

    Attributes:
        components: What is in the pool, by name.
        evidence: What shards said, by shard.
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
        self.evidence: dict[str, Evidence] = {}
        self.record: list[Entry] = []
        for component in components:
            self.add(component)

    def add(self, component: Component) -> None:
        """Take a component in.

        Learned weights need it measured on every shard that has spoken: one forward-mode pass over each, where its
        examples are. Components alone need nothing of each other.

        Raises:
            ValueError: It belongs to another base, or one of its name is there.
        """
        component.check(self.fingerprint)
        if component.name in self.components:
            raise ValueError(f"component: {component.name!r} is in the pool already; forget it first, or rename it")
        self.components[component.name] = component
        self.record.append(Entry("add", component.name, component.digest()))

    def hear(self, evidence: Evidence) -> None:
        """Take in what a shard measured, in place of what it said before; rows of components that are not here go.

        Raises:
            ValueError: It is about another base, or about other values of a component than those here.
        """
        if evidence.base != self.fingerprint:
            raise ValueError(
                f"evidence: shard {evidence.shard!r} measured on weights with the fingerprint {evidence.base}, the"
                f" pool's base has {self.fingerprint}; measure again on the pool's base"
            )
        for name in sorted(set(evidence.digests) & set(self.components)):
            if evidence.digests[name] != self.components[name].digest():
                raise ValueError(
                    f"evidence: shard {evidence.shard!r} measured other values of component {name!r} than the pool's;"
                    " measure again"
                )
        if evidence.shard in self.evidence:
            self._unhear(evidence.shard)
        kept = evidence.restricted([name for name in evidence.digests if name in self.components])
        self.evidence[kept.shard] = kept
        self.record.append(Entry("hear", kept.shard, kept.digest()))

    def measure(self, data: Any, shard: str, **options: Any) -> Evidence:
        """Measure all components on a shard at hand and take it in; options are those of `Evidence.of`."""
        found = Evidence.of(self.base, self.components.values(), data, shard, **options)
        self.hear(found)
        return found

    def forget(self, name: str) -> None:
        """Let a component go, with the evidence of the shard of its name and its rows in that of others.

        A name that only evidence has lets that evidence go.

        Raises:
            KeyError: There is neither of that name.
        """
        if name not in self.components and name not in self.evidence:
            held = ", ".join(dict.fromkeys([*self.components, *self.evidence])) or "nothing"
            raise KeyError(f"name: {name!r} is not in the pool, which holds {held}")
        if name in self.evidence:
            self._unhear(name)
        if name in self.components:
            component = self.components.pop(name)
            for shard, found in self.evidence.items():
                self.evidence[shard] = found.restricted([n for n in found.digests if n != name])
            self.record.append(Entry("forget", name, component.digest()))

    def _unhear(self, shard: str) -> None:
        self.record.append(Entry("unhear", shard, self.evidence.pop(shard).digest()))

    def weights(self, *, ridge: float | None = None) -> Learned:
        """Weights learned from the evidence (see `learned_weights`).

        Raises:
            ValueError: There is no evidence, or a shard has not measured all components.
        """
        return learned_weights(self.components, self.evidence.values(), ridge=ridge)

    def model(self, weights: Weights = "mean") -> TangentModel:
        """The composed model of what is in the pool (see `compose`); it shares the memory of the pool's base.

        Args:
            weights: See `Weights`; `pool.weights()` for learned ones.
        """
        total = combined(list(self.components.values()), weights)
        return TangentModel(self.base, list(total) or "*", copy=False).assign_(total)

    def as_ensemble(self, weights: Weights = "mean") -> Ensemble:
        """The same function by a forward of every component (see `Ensemble`)."""
        return Ensemble(self.base, self.components.values(), weights, copy=False)

    def __len__(self) -> int:
        return len(self.components)
