"""Records of a sequence of tasks: what is known of each after each was learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class AccuracyMatrix:
    r"""Accuracies after each of a sequence of tasks: a_{ij} is that on task j after task i was learned.

    Rows come one by one, as tasks are learned (`after`); a task that was not measured is NaN.

    Attributes:
        values: `[t, T]` shares in [0, 1], t tasks learned of T.
        tasks: Names of the T tasks, in the order in which they are learned; "1", "2", ... where none are given.

    Raises:
        ValueError: The shape is not `[t, T]` with t <= T, a value lies outside [0, 1], or names do not fit.

    Examples:
        >>> seen = AccuracyMatrix([[0.9, 0.1], [0.7, 0.8]], ["digits", "clothes"])
        >>> round(seen.average_accuracy(), 3), round(seen.average_forgetting(), 3), round(seen.backward_transfer(), 3)
        (0.75, 0.2, -0.2)
    """

    values: Tensor
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Check shapes and shares."""
        values = torch.as_tensor(self.values, dtype=torch.float64).detach().cpu().clone()
        if values.dim() != 2 or not values.shape[1] or values.shape[0] > values.shape[1]:
            raise ValueError(
                f"values: got shape {list(values.shape)}, expected [t, T]: a row after each of t tasks learned, a"
                " column for each of T >= t tasks"
            )
        bad = (values < 0) | (values > 1)
        if bad.any():
            raise ValueError(f"values: got {float(values[bad][0]):g}, expected shares in [0, 1]; 80 % is 0.8")
        names = tuple(str(name) for name in self.tasks) or tuple(str(1 + j) for j in range(values.shape[1]))
        if len(names) != values.shape[1] or len(set(names)) != len(names):
            raise ValueError(f"tasks: got {list(names)}, expected {values.shape[1]} different names, one a column")
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "tasks", names)

    @classmethod
    def of(cls, tasks: Sequence[str] | int) -> AccuracyMatrix:
        """The record of a sequence in which nothing was learned yet: tasks are names, or how many there are."""
        count = tasks if isinstance(tasks, int) else len(tasks)
        return cls(torch.empty(0, count, dtype=torch.float64), () if isinstance(tasks, int) else tasks)

    def after(self, row: Sequence[float] | Tensor) -> AccuracyMatrix:
        """With one more task learned: accuracies `[T]` on all tasks, or on the first of them (the rest NaN)."""
        row = torch.as_tensor(row, dtype=torch.float64).detach().cpu().flatten()
        width = len(self.tasks)
        if len(row) > width:
            raise ValueError(f"row: got {len(row)} accuracies for {width} tasks")
        row = torch.cat([row, row.new_full((width - len(row),), torch.nan)])
        return AccuracyMatrix(torch.cat([self.values, row[None]]), self.tasks)

    def __len__(self) -> int:
        """How many tasks were learned, t."""
        return len(self.values)

    def average_accuracy(self) -> float:
        r"""A_t = (1/t) sum_{j <= t} a_{tj}: over the tasks learned, after the last of them; NaN before the first."""
        t = len(self)
        return float(self.values[t - 1, :t].mean()) if t else torch.nan

    def forgetting(self) -> Tensor:
        r"""f_j = max_{i < t} a_{ij} - a_{tj} for each task j < t, `[t - 1]`: below zero where it became better.

        The best is looked for in all earlier rows, those before task j was learned included, as far as they were
        measured (Chaudhry, Dokania, Ajanthan & Torr, Riemannian Walk for Incremental Learning, ECCV 2018, section
        3.2).
        """
        t = len(self)
        if t < 2:
            return self.values.new_empty(0)
        before = self.values[: t - 1, : t - 1]
        best = before.nan_to_num(nan=-torch.inf).amax(0)
        return torch.where(best.isfinite(), best, torch.nan) - self.values[t - 1, : t - 1]

    def average_forgetting(self) -> float:
        """F_t = (1/(t - 1)) sum_{j < t} f_j (see `forgetting`); 0 while fewer than two tasks were learned."""
        return float(self.forgetting().mean()) if len(self) > 1 else 0.0

    def backward_transfer(self) -> float:
        r"""BWT = (1/(t - 1)) sum_{j < t} (a_{tj} - a_{jj}); 0 while fewer than two tasks were learned.

        Below zero where tasks were forgotten since each was learned (Lopez-Paz & Ranzato, Gradient Episodic Memory for
        Continual Learning, NeurIPS 2017, section 2).
        """
        t = len(self)
        if t < 2:
            return 0.0
        return float((self.values[t - 1, : t - 1] - self.values.diagonal()[: t - 1]).mean())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, NaN as None, for json."""
        rows = [[None if a != a else a for a in row] for row in self.values.tolist()]
        return {"tasks": list(self.tasks), "values": rows}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> AccuracyMatrix:
        """What `to_dict` gave."""
        rows = [[torch.nan if a is None else a for a in row] for row in plain["values"]]
        return cls(torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(plain["tasks"])), plain["tasks"])

    def plot(self, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw it, see `fipgeo.plotting.plot_accuracy`."""
        from fipgeo import plotting

        return plotting.plot_accuracy(self, ax=ax, **kwargs)
