"""Numbers over a rectangle of two coordinates: a loss over a plane of weights, or over two coefficients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True, eq=False)
class Grid:
    """What was measured at every pair of two coordinates.

    Attributes:
        x: The first coordinate, increasing, `[n]`.
        y: The second one, increasing, `[m]`.
        values: What was measured at (x_j, y_i), `[m, n]`; NaN where nothing was.
        name: What it is, with its unit.

    Raises:
        ValueError: Shapes do not fit, or a coordinate does not increase.

    Examples:
        >>> bowl = Grid.of(lambda a, b: (a - 1) ** 2 + b**2, [0, 0.5, 1], [-1, 0], name="loss")
        >>> bowl.values.tolist(), bowl.least
        ([[2.0, 1.25, 1.0], [1.0, 0.25, 0.0]], (1.0, 0.0))
    """

    x: Tensor
    y: Tensor
    values: Tensor
    name: str = ""

    def __post_init__(self) -> None:
        """Everything in float64; shapes and order checked."""
        for key in ("x", "y", "values"):
            object.__setattr__(self, key, torch.as_tensor(getattr(self, key)).detach().double().cpu())
        if self.x.dim() != 1 or self.y.dim() != 1 or self.values.shape != (len(self.y), len(self.x)):
            shapes = [list(tensor.shape) for tensor in (self.x, self.y, self.values)]
            raise ValueError(
                f"x, y, values: got shapes {shapes[0]}, {shapes[1]}, {shapes[2]}, expected [n], [m], [m, n]"
            )
        for key, axis in (("x", self.x), ("y", self.y)):
            if len(axis) < 2 or not bool((axis.diff() > 0).all()):
                raise ValueError(f"{key}: got {axis.tolist()}, expected two or more increasing numbers")

    @classmethod
    def of(
        cls,
        measure: Callable[[float, float], Any],
        x: Tensor | Sequence[float],
        y: Tensor | Sequence[float],
        name: str = "",
    ) -> Grid:
        """Call measure(x_j, y_i) once for every pair; it returns a number."""
        x, y = torch.as_tensor(x, dtype=torch.float64), torch.as_tensor(y, dtype=torch.float64)
        rows = [[float(measure(a, b)) for a in x.tolist()] for b in y.tolist()]
        return cls(x, y, torch.tensor(rows, dtype=torch.float64), name)

    @property
    def least(self) -> tuple[float, float]:
        """The pair (x, y) with the least value."""
        row, column = divmod(int(self.values.nan_to_num(torch.inf).argmin()), len(self.x))
        return float(self.x[column]), float(self.y[row])

    def plot(self, points: Any = None, ax: Axes | None = None, **kwargs: Any) -> Axes:
        """Draw contours with `fipgeo.plotting.plot_contours`."""
        from fipgeo import plotting

        return plotting.plot_contours(self, points, ax=ax, **kwargs)
