"""Stand-ins for records that plots read, and what their artists hold."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D


@dataclass
class SpectrumStub:
    values: Any
    rank_bound: int | None = None
    held_out: Any = None
    captured: float | None = None
    complete: bool = False
    num_doubtful: int = 0

    def tolerance(self) -> float:
        return 1e-4

    def rank(self, tol: float | None = None) -> int:
        assert tol is None
        return sum(float(value) > 1e-4 for value in self.values) - self.num_doubtful


@dataclass
class PointStub:
    step: int
    arc_length: float
    drift: float
    changed: float | None = 0.0
    changed_upper: float | None = 0.01
    objective: float | None = 1.0
    sparsity: float | None = None
    accepted: bool = True


@dataclass
class PathStub:
    points: list[PointStub]
    budget: float | None = None
    objective_name: str = "new-task loss"
    best_step: int | None = None
    error: Exception | None = field(default=None)

    def best(self, max_changed: float | None = None) -> PointStub | None:
        if self.error is not None:
            raise self.error
        return None if self.best_step is None else self.points[self.best_step]


def make_path(num: int = 6, *, sparse: bool = False, **kwargs: Any) -> PathStub:
    points = [
        PointStub(i, 0.5 * i, 0.01 * i**2, 0.002 * i, 0.002 * i + 0.01, 2.0 - 0.1 * i, 0.1 * i if sparse else None)
        for i in range(num)
    ]
    return PathStub(points, **kwargs)


LAYERS = {"conv": (30, 40), "bn": (0, 8), "fc": (50, 100)}


def blank() -> Axes:
    return Figure(layout="constrained").subplots()


def draw(ax: Axes) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()


def lines(ax: Axes, gid: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_gid() == gid]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def y_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def x_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), dtype=float)
