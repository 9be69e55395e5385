"""Numbers over two coordinates, and weights seen in a plane."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from fipgeo.plotting._common import check_axes, label_axes, new_axes, refresh_legend, series_style
from fipgeo.plotting._contours import GridRecord, draw_contours, draw_curves
from fipgeo.plotting._notes import artists

_CURVE, _POINT, _RAY, _SERIES, _START = (
    f"fipgeo-plane-{part}" for part in ("curve", "point", "ray", "series", "start")
)
_UNIT = "weight units"


def plot_plane(
    grid: GridRecord, curves: Mapping[str, Any] | None = None, *, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Draw contours of what was measured on a plane of weights, with curves on top.

    Both axes have one scale, so that lengths are lengths of weights. Levels are spaced by factors where the values are
    positive and span more than a decade, else evenly; points that were not measured are hatched.

    Args:
        grid: Numbers on a plane, such as `fipgeo.between.Plane.scan` returns.
        curves: Coordinates `[n, 2]` in the plane by name, such as ``Projection.curves``; a hollow mark where each
            begins, a filled one where it ends. A single point `[2]` is a mark.
        ax: Where to draw; None makes a new figure. One grid goes on one Axes.
        **kwargs: Properties of the filled contours (`matplotlib.axes.Axes.contourf`), such as levels or cmap.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``grid`` has no x, y and values, or ``ax`` is not one Axes.
        ValueError: If shapes do not fit, no value is finite, or the Axes carries contours already.

    Examples:
        >>> from types import SimpleNamespace as Record
        >>> from matplotlib.figure import Figure
        >>> grid = Record(x=[0.0, 1.0], y=[0.0, 1.0], values=[[0.0, 1.0], [1.0, 2.0]], name="loss")
        >>> plot_plane(grid, {"line": [[0, 0], [1, 1]]}, ax=Figure().subplots()).get_title()
        'loss'
    """
    ax = new_axes() if ax is None else check_axes(ax)
    draw_contours(ax, grid, kwargs)
    draw_curves(ax, curves, _CURVE)
    ax.set_aspect("equal")
    return _finished(ax, grid, f"along the first axis ({_UNIT})", f"along the second ({_UNIT})")


def plot_contours(
    grid: GridRecord,
    points: Mapping[str, Any] | None = None,
    *,
    names: Sequence[str] = ("first coefficient", "second coefficient"),
    ray: bool = True,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw contours of what was measured over two coefficients, with points that somebody or something chose.

    Args:
        grid: Numbers over two coefficients, such as `fipgeo.grids.Grid.of` returns.
        points: Pairs `[2]` by name, such as learned coefficients; paths `[n, 2]` are joined by a line.
        names: Of the coefficients, on the axes.
        ray: Draw the line on which both coefficients are equal, where a common scale has to stay.
        ax: Where to draw; None makes a new figure. One grid goes on one Axes.
        **kwargs: Properties of the filled contours (`matplotlib.axes.Axes.contourf`), such as levels or cmap.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``grid`` has no x, y and values, or ``ax`` is not one Axes.
        ValueError: If shapes do not fit, no value is finite, there are not two names, or the Axes carries contours
            already.

    Examples:
        >>> from types import SimpleNamespace as Record
        >>> from matplotlib.figure import Figure
        >>> grid = Record(x=[0.0, 1.0], y=[0.0, 1.0], values=[[0.0, 1.0], [1.0, 2.0]])
        >>> ax = plot_contours(grid, {"learned": [0.2, 0.6]}, names=("of a", "of b"), ax=Figure().subplots())
        >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('of a', ['equal coefficients', 'learned'])
    """
    if len(names) != 2:
        raise ValueError(f"names must be two, one for each axis, but {list(names)} came")
    ax = new_axes() if ax is None else check_axes(ax)
    draw_contours(ax, grid, kwargs)
    if ray:
        style: dict[str, Any] = {"color": "black", "linestyle": (0, (4, 3)), "linewidth": 1.1, "zorder": 2.0}
        ax.axline((0, 0), slope=1, label="equal coefficients", gid=_RAY, **style)
    draw_curves(ax, points, _POINT)
    return _finished(ax, grid, *names)


def plot_path_projection(projection: Any, *, ax: Axes | None = None, label: str | None = None, **kwargs: Any) -> Axes:
    """Draw curves of weights in the plane of their two principal directions.

    A hollow mark is where a curve begins. Both axes have one scale, in units of weights, and say which share of the
    variance of all points lies along them; what the two leave out is not seen.

    Args:
        projection: A record such as `fipgeo.between.project` returns (``curves`` by name, `[n, 2]`, and
            ``explained [2]``), or such curves alone.
        ax: Where to draw; None makes a new figure.
        label: Put before the names in the legend.
        **kwargs: Properties of the lines (`matplotlib.lines.Line2D`).

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If there are no curves, or ``ax`` is not one Axes.
        ValueError: If a curve is not `[n, 2]`.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_path_projection({"path": [[0, 0], [1, 2]]}, ax=Figure().subplots())
        >>> [line.get_label() for line in ax.lines][0]
        'path'
    """
    curves = getattr(projection, "curves", projection)
    if not isinstance(curves, Mapping) or not curves:
        raise TypeError(f"projection must hold curves by name, but a {type(projection).__name__} came; see project")
    ax = new_axes() if ax is None else check_axes(ax)
    for name, points in curves.items():
        flat = np.array(points.tolist() if hasattr(points, "tolist") else points, dtype=np.float64)
        if flat.ndim != 2 or flat.shape[1] != 2:
            raise ValueError(f"curve {name!r} must be points [n, 2], but shape {flat.shape} came")
        title = str(name) if label is None else f"{label}: {name}"
        style = series_style(ax, _SERIES, kwargs, {"markersize": 3.5, "linewidth": 1.3, "label": title})
        (line,) = ax.plot(flat[:, 0], flat[:, 1], **style)
        hollow = {"markerfacecolor": ax.get_facecolor(), "markeredgecolor": line.get_color(), "gid": _START}
        ax.plot(*flat[0], marker="o", markersize=7.0, linestyle="none", zorder=line.get_zorder() + 0.1, **hollow)
    ax.set_aspect("equal", adjustable="datalim")
    shares = getattr(projection, "explained", None)
    said = ["", ""] if shares is None else [f", {100 * float(share):.0f} % of the variance" for share in shares]
    label_axes(ax, f"first direction ({_UNIT}{said[0]})", f"second direction\n({_UNIT}{said[1]})")
    refresh_legend(ax)
    return ax


def _finished(ax: Axes, grid: GridRecord, x: str, y: str) -> Axes:
    label_axes(ax, x, y)
    if not ax.get_title() and getattr(grid, "name", ""):
        ax.set_title(str(getattr(grid, "name", "")), fontsize="medium")
    if artists(ax, _CURVE, _POINT, _RAY):
        refresh_legend(ax)
    return ax
