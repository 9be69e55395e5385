"""Which indices of which tensors go together: a partition of the axes of weights into units, some of them fixed.

A *unit* is what one channel is to the whole network: a row of its producers, an entry of its normalisations, a column
of its consumers. Units start as single rows and are joined where the network adds, multiplies or otherwise pairs them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED, BLANK = -1, 0
"""Labels that are no unit: an entry that has to stay, and one that padding put there."""

Axis = tuple[str, int]
"""A tensor of the module and one of its axes."""


@dataclass
class Units:
    """A union-find structure over labels 1, 2, ..., with the tensor axes that carry them.

    Attributes:
        axes: Label of every index along an axis of a named tensor.
        rows: The axes whose entries make a channel (rows of producers, entries of normalisations); the others use it.
        reasons: Why a unit has to stay, by label.
        uses: How often each tensor was used.
    """

    axes: dict[Axis, Tensor] = field(default_factory=dict)
    rows: set[Axis] = field(default_factory=set)
    reasons: dict[int, str] = field(default_factory=dict)
    uses: Counter[str] = field(default_factory=Counter)
    _parents: list[int] = field(default_factory=lambda: [0])
    _table: Tensor | None = None  # what every label stands under, made when asked for
    _whole: dict[str, str] = field(default_factory=dict)  # tensors that have to stay as they are, and why

    def fresh(self, count: int) -> Tensor:
        """New labels `[count]`."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        self._table = None
        return torch.arange(first, first + count)

    def find(self, label: int) -> int:
        """The label that stands for a unit."""
        while self._parents[label] != label:
            self._parents[label] = self._parents[self._parents[label]]
            label = self._parents[label]
        return label

    def roots(self, labels: Tensor) -> Tensor:
        """Labels with every unit under the one label that stands for it."""
        if self._table is None:
            self._table = torch.tensor([FIXED, *map(self.find, range(len(self._parents)))])
        return self._table[labels + 1]

    def join(self, a: Tensor, b: Tensor, reason: str) -> Tensor:
        """Make two arrangements of labels (of one shape) the same; returns it.

        A unit that meets a fixed entry has to stay, for the reason given; one that meets padding is unharmed.
        """
        many = len(self._parents) + 1
        for code in torch.unique((a.flatten() + 1) * many + b.flatten() + 1).tolist():
            x, y = code // many - 1, code % many - 1
            if x > 0 and y > 0:
                self._unite(x, y)
            elif FIXED in (x, y) and max(x, y) > 0:
                self.pin(torch.tensor([max(x, y)]), reason)
        return torch.where(a > 0, a, torch.where(b > 0, b, torch.minimum(a, b)))

    def pin(self, labels: Tensor, reason: str) -> None:
        """These units have to stay."""
        for label in torch.unique(labels).tolist():
            if label > 0:
                self.reasons.setdefault(self.find(label), reason)

    def produce(self, name: str, axis: int, size: int) -> Tensor:
        """The labels along an axis of a tensor whose entries make channels; new ones if it has none yet."""
        self.uses[name] += 1
        self.rows.add((name, axis))
        return self.roots(self.axes.setdefault((name, axis), self.fresh(size)))

    def bind(self, name: str, axis: int, labels: Tensor, *, row: bool) -> None:
        """Say that an axis of a tensor carries these labels `[size]`; what it carried before is joined with them."""
        before = self.axes.get((name, axis))
        self.axes[name, axis] = labels if before is None else self.join(before, labels, f"the other uses of {name}")
        if row:
            self.rows.add((name, axis))

    def pin_tensor(self, name: str, reason: str) -> None:
        """No axis of this tensor may be cut; holds for what is bound later too."""
        self.uses[name] += 1
        self._whole.setdefault(name, reason)

    def settle(self) -> None:
        """Bring everything under the labels that stand for the units."""
        for (name, _), labels in self.axes.items():
            if name in self._whole:
                self.pin(labels, self._whole[name])
        for label, reason in list(self.reasons.items()):
            self.reasons.setdefault(self.find(label), reason)
        self.axes = {axis: self.roots(labels) for axis, labels in self.axes.items()}

    def members(self) -> dict[int, list[tuple[Axis, int]]]:
        """For every unit, fixed or not, the indices along axes that belong to it; `settle` comes first."""
        out: dict[int, list[tuple[Axis, int]]] = defaultdict(list)
        for axis, labels in self.axes.items():
            for index, label in enumerate(labels.tolist()):
                if label > 0:
                    out[label].append((axis, index))
        return out

    def _unite(self, x: int, y: int) -> None:
        low, high = sorted((self.find(x), self.find(y)))
        if low != high:
            self._parents[high], self._table = low, None
            if high in self.reasons:
                self.reasons.setdefault(low, self.reasons[high])
