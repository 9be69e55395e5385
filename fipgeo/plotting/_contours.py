"""What plots over two coordinates share: reading the grid, filled contours, curves on top of them."""

import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.patheffects import AbstractPathEffect, withStroke

from fipgeo.plotting._common import GREY, MARKERS, PALETTE, as_numpy, scientific
from fipgeo.plotting._notes import artists

FILLED, LINES, UNKNOWN = (f"fipgeo-contours-{part}" for part in ("filled", "lines", "unknown"))
_LEVELS = 9
_DECADES = 1.0  # a range of values beyond which levels are spaced by factors


@runtime_checkable
class GridRecord(Protocol):
    """What contour plots read: ``values [m, n]`` at the pairs of ``x [n]`` and ``y [m]``, perhaps a ``name``."""

    @property
    def x(self) -> Any:
        """The first coordinate, increasing, `[n]`."""

    @property
    def y(self) -> Any:
        """The second coordinate, increasing, `[m]`."""

    @property
    def values(self) -> Any:
        """What was measured, `[m, n]`; NaN where nothing was."""


def read_grid(grid: GridRecord) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, y and the values with what is not finite masked."""
    if not isinstance(grid, GridRecord) or callable(grid.values):
        raise TypeError(
            f"grid must have .x, .y and .values, but a {type(grid).__name__} came; pass a fipgeo.grids.Grid"
        )
    x, y = as_numpy(grid.x, "grid.x"), as_numpy(grid.y, "grid.y")
    rows = grid.values.tolist() if hasattr(grid.values, "tolist") else grid.values
    values = np.ma.masked_invalid(np.array(rows, dtype=np.float64))
    if values.shape != (y.size, x.size) or min(values.shape) < 2:
        raise ValueError(f"grid.values has shape {values.shape}, expected ({y.size}, {x.size}), two or more each way")
    if not values.count():
        raise ValueError("grid.values holds no finite number; there is nothing to draw")
    return x, y, values


def draw_contours(ax: Axes, grid: GridRecord, kwargs: Mapping[str, Any]) -> None:
    """Fill between levels and write the levels on lines; points without a number are hatched.

    Levels are spaced by factors where all values are positive and span more than a decade, else evenly.
    """
    if artists(ax, FILLED):
        raise ValueError("ax carries contours already; pass an Axes of its own for each grid")
    x, y, values = read_grid(grid)
    if np.ma.is_masked(values):
        box = Rectangle((x[0], y[0]), x[-1] - x[0], y[-1] - y[0], facecolor="none", edgecolor=GREY, linewidth=0)
        box.set(hatch="////", zorder=0.5, gid=UNKNOWN)
        ax.add_patch(box)
    low, high = float(values.min()), float(values.max())
    style: dict[str, Any] = {"cmap": "viridis", "alpha": 0.75, "zorder": 0.8}
    if low > 0 and math.log10(high / low) > _DECADES:
        style |= {"levels": np.geomspace(low, high, _LEVELS + 1), "norm": LogNorm(low, high)}
    elif high > low:
        style["levels"] = _LEVELS
    else:
        style["levels"] = [low - 1, low + 1]
    filled = ax.contourf(x, y, values, **{**style, **kwargs})
    filled.set_gid(FILLED)
    if high > low:
        lines = ax.contour(
            x, y, values, levels=np.asarray(filled.levels)[1:-1], colors="white", linewidths=0.6, zorder=1.0
        )
        lines.set_gid(LINES)
        halo: list[AbstractPathEffect] = [withStroke(linewidth=2.0, foreground="white")]
        short = {level: scientific(float(level)) for level in lines.levels}
        names = short if len(set(short.values())) == len(short) else {level: f"{level:.3g}" for level in short}
        for text in ax.clabel(lines, fontsize="x-small", fmt=names, colors="black"):
            text.set_path_effects(halo)
    ax.autoscale(False)


def draw_curves(ax: Axes, curves: Mapping[str, Any] | None, gid: str) -> list[Line2D]:
    """Lines through points `[n, 2]` by name, the first point hollow and the last filled; a single point is a mark."""
    drawn = []
    for name, points in (curves or {}).items():
        rows = points.tolist() if hasattr(points, "tolist") else points
        flat = np.array(rows, dtype=np.float64)
        flat = flat[None] if flat.ndim == 1 else flat
        if flat.ndim != 2 or flat.shape[1] != 2:
            raise ValueError(f"{name!r} must be points [n, 2] or one point [2], but shape {flat.shape} came")
        place = len(artists(ax, gid))
        color, mark = PALETTE[(place + 1) % len(PALETTE)], MARKERS[place % len(MARKERS)]
        style = {"color": color, "gid": gid, "zorder": 3.0, "linewidth": 1.5, "marker": mark, "markersize": 5.5}
        style |= {"markeredgecolor": "white", "markeredgewidth": 0.7, "markevery": [len(flat) - 1], "label": str(name)}
        style["linestyle"] = "-" if len(flat) > 1 else "none"
        (line,) = ax.plot(flat[:, 0], flat[:, 1], **style)
        line.set_path_effects([withStroke(linewidth=2.6, foreground="white")])
        if len(flat) > 1:
            ax.plot(*flat[0], marker=mark, markersize=5.5, markerfacecolor="white", color=color, zorder=3.1)
        drawn.append(line)
    return drawn
