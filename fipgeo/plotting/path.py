"""Paths through weight space: what was spent and what was won, against arc length."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from fipgeo.plotting._common import (
    GREY,
    as_numpy,
    check_axes,
    label_axes,
    new_stack,
    refresh_legend,
    scientific,
    series_style,
)
from fipgeo.plotting._notes import arrange_level_notes, artists, fits_above, note

_SERIES, _REJECTED, _BUDGET, _BOUND, _INTERVAL, _LEG, _BEST, _MISSING = (
    f"fipgeo-path-{part}" for part in ("values", "rejected", "budget", "bound", "interval", "leg", "best", "missing")
)
_PANELS = ("drift", "changed", "sparsity", "objective")


@runtime_checkable
class PathRecord(Protocol):
    """What `plot_path` reads of a path.

    Each of ``points`` carries the numbers ``step``, ``arc_length``, ``drift``, ``changed``,
    ``changed_upper``, ``objective`` and ``sparsity`` (NaN or None where unknown), and ``accepted``. If a point
    has a ``certificate`` with ``drift_low`` and ``drift_high``, or the record has ``objective_name``, ``legs`` or
    ``best()``, they are read too.
    """

    @property
    def points(self) -> Sequence[Any]:
        """The points in order."""
        ...

    @property
    def budget(self) -> float | None:
        """The drift at which the path had to end, or None."""


def plot_path(
    path: PathRecord,
    *,
    axes: Mapping[str, Axes] | Sequence[Axes] | np.ndarray | None = None,
    label: str | None = None,
    best: Any = None,
    **kwargs: Any,
) -> dict[str, Axes]:
    """Draw a path as small multiples over its arc length: drift, changed predictions, and what was won.

    The panels are ``"drift"`` (distance to the outputs at the start as a share of their spread, with the band of
    its interval, the budget shaded), ``"changed"`` (share of changed predictions with the band up to its upper
    confidence bound) and ``"sparsity"`` (share of zero weights) where that changes, else ``"objective"``. The
    line joins the accepted points; rejected ones, if the record has any, stand beside it, hollow. A star marks
    the best point. Where the path goes on with another objective, a line stands in every panel, and
    ``"objective"`` is a panel beside ``"sparsity"`` that shows the last of them. Numbers that are not finite leave
    a gap, and a panel without any finite number says so.

    Args:
        path: A record such as `fipgeo.paths.PathResult`.
        axes: None makes a new figure. Else the panels to draw, by name (what an earlier call returned, to
            overlay another path) or in the order above.
        label: Name in the legend.
        best: The point to mark: anything with ``.step``, or the number of a step. None asks
            ``path.best()``, and marks nothing where that finds no point (LookupError, ValueError).
        **kwargs: Properties of the main line of each panel (`matplotlib.lines.Line2D`), such as color or
            marker.

    Returns:
        The Axes drawn on, by panel.

    Raises:
        TypeError: If ``path`` has no points or budget, or ``axes`` holds something else than Axes.
        ValueError: If there is no point, a panel is unknown, the number of Axes does not fit, or no point
            has the step of ``best``.

    Examples:
        >>> from types import SimpleNamespace as Record
        >>> from matplotlib.figure import Figure
        >>> point = dict(changed=0.0, changed_upper=0.1, objective=1.0, sparsity=None, accepted=True)
        >>> points = [Record(step=i, arc_length=0.5 * i, drift=0.1 * i, **point) for i in range(3)]
        >>> axes = plot_path(Record(points=points, budget=0.2), axes={"drift": Figure().subplots()})
        >>> axes["drift"].lines[0].get_xdata().tolist()
        [0.0, 0.5, 1.0]
    """
    if not isinstance(path, PathRecord):
        raise TypeError(f"path must have .points and .budget, but a {type(path).__name__} came; pass a PathResult")
    if len(path.points) == 0:
        raise ValueError("path.points is empty; at least the starting point is needed to draw")
    column = {name: _column(path, name) for name in ("arc_length", "changed_upper", *_PANELS)}
    ends = [_column_of([getattr(p, "certificate", None) for p in path.points], n) for n in ("drift_low", "drift_high")]
    legs = [int(leg.begin) for leg in getattr(path, "legs", ())][1:]
    if legs:  # the objectives before are other quantities
        column["objective"][[int(point.step) <= legs[-1] for point in path.points]] = np.nan
    accepted = np.array([bool(getattr(point, "accepted", True)) for point in path.points])
    star = _best_index(path, best)
    gains = ["sparsity"] if _varies(column["sparsity"]) else []
    gains += ["objective"] if not gains or (legs and _differ(column["objective"], column["sparsity"])) else []
    panels = _panels(axes, gains)

    for panel, ax in panels.items():
        style = series_style(ax, _SERIES, kwargs, {"markersize": 3.0, "linewidth": 1.2, "zorder": 2.5})
        line = _draw_series(ax, column["arc_length"], column[panel], accepted, label, style)
        if panel == "drift" and path.budget is not None:
            _draw_budget(ax, float(path.budget), line.get_color())
        if panel == "drift":
            _draw_band(ax, column["arc_length"], (ends[0], ends[1]), accepted, line, "95 % interval", _INTERVAL)
        if panel == "changed":
            band = (column["changed"], column["changed_upper"])
            _draw_band(ax, column["arc_length"], band, accepted, line, "up to the upper bound", _BOUND)
        _draw_legs(ax, [column["arc_length"][i] for i, point in enumerate(path.points) if int(point.step) in legs])
        if star is not None:
            _draw_best(ax, column["arc_length"][star], column[panel][star], path.points[star].step, line)
        _finish(ax, panel, column[panel], str(getattr(path, "objective_name", "") or "objective"))
    _legends(panels)
    return panels


def _varies(values: np.ndarray) -> bool:
    known = values[np.isfinite(values)]
    return known.size > 0 and bool(known.min() < known.max())


def _differ(one: np.ndarray, other: np.ndarray) -> bool:
    known = np.isfinite(one) & np.isfinite(other)
    return bool((one[known] != other[known]).any())


def _column(path: PathRecord, name: str) -> np.ndarray:
    return as_numpy([getattr(point, name, None) for point in path.points], f"path.points[:].{name}")


def _column_of(records: Sequence[Any], name: str) -> np.ndarray:
    return as_numpy([getattr(record, name, None) for record in records], f"path.points[:].certificate.{name}")


def _panels(axes: Any, gains: Sequence[str]) -> dict[str, Axes]:
    """The Axes to draw on, by panel, made or checked."""
    names = ("drift", "changed", *gains)
    if axes is None:
        return dict(zip(names, new_stack(len(names)), strict=True))
    if isinstance(axes, Axes):
        raise TypeError("axes must hold one Axes for each panel, but a single one came; pass e.g. {'drift': ax}")
    if not isinstance(axes, Mapping):
        given = list(np.ravel(np.asarray(axes, dtype=object)))
        if len(given) != len(names):
            raise ValueError(
                f"axes has {len(given)} entries for the {len(names)} panels {names}; pass as many, "
                "or a mapping with the panels that you want, e.g. {'drift': ax}"
            )
        axes = dict(zip(names, given, strict=True))
    unknown = [name for name in axes if name not in _PANELS]
    if unknown or not axes:
        raise ValueError(f"axes must name some of the panels {_PANELS}, but {list(axes)} came")
    return {name: check_axes(ax, f"axes[{name!r}]") for name, ax in axes.items()}


def _best_index(path: Any, best: Any) -> int | None:
    """The place in the points of the step to mark, or None."""
    if best is None:
        if not callable(getattr(path, "best", None)):
            return None
        try:
            best = path.best()
        except (LookupError, ValueError):  # no point is good enough: nothing to mark
            return None
        if best is None:
            return None
    step = int(getattr(best, "step", best))
    steps = [int(point.step) for point in path.points]
    if step not in steps:
        raise ValueError(f"best is step {step}, but the path has the steps {steps[0]} to {steps[-1]} only")
    # A step can be tried more than once: the accepted try, which is the last one, is the point of the path.
    return len(steps) - 1 - steps[::-1].index(step)


def _draw_series(
    ax: Axes, x: np.ndarray, y: np.ndarray, accepted: np.ndarray, label: str | None, style: dict[str, Any]
) -> Line2D:
    name = label or "_path"
    (line,) = ax.plot(x[accepted], y[accepted], **{"label": name, **style})
    if not accepted.all():
        ax.plot(
            x[~accepted],
            y[~accepted],
            linestyle="none",
            marker=line.get_marker(),
            markersize=4.5,
            markerfacecolor="none",
            markeredgecolor=line.get_color(),
            markeredgewidth=0.8,
            gid=_REJECTED,
            label="_rejected" if artists(ax, _REJECTED) else "rejected steps",
        )
    return line


def _draw_budget(ax: Axes, budget: float, color: Any) -> None:
    """A dashed line at the budget, once for each value; what lies beneath the first one is shaded."""
    if not math.isfinite(budget):
        return
    earlier = [float(np.asarray(line.get_ydata())[0]) for line in artists(ax, _BUDGET) if isinstance(line, Line2D)]
    if budget in earlier:
        return
    if not earlier:
        color = GREY
        ax.axhspan(0.0, budget, color=GREY, alpha=0.12, linewidth=0, zorder=0.5, gid=_BUDGET)
    ax.axhline(budget, color=color, linewidth=0.9, linestyle=(0, (5, 2)), zorder=1.5, gid=_BUDGET)
    note(
        ax,
        f"budget {scientific(budget)}",
        (0.0, budget),
        ("axes fraction", "data"),
        gid=_BUDGET,
        color=color,
        va="bottom",
    )


def _draw_band(
    ax: Axes,
    x: np.ndarray,
    band: tuple[np.ndarray, np.ndarray],
    accepted: np.ndarray,
    line: Line2D,
    name: str,
    gid: str,
) -> None:
    """Fill between the two ends of a band where both are known."""
    low, high = (np.where(np.isfinite(band[0]) & np.isfinite(band[1]), end, np.nan)[accepted] for end in band)
    if np.isfinite(low).any():
        ax.fill_between(
            x[accepted],
            low,
            high,
            where=np.isfinite(low).tolist(),
            gid=gid,
            color=line.get_color(),
            alpha=0.2,
            linewidth=0,
            zorder=1.8,
            label=f"_{name}" if artists(ax, gid) else name,
        )


def _draw_legs(ax: Axes, places: Sequence[float]) -> None:
    """A thin line where the path goes on with another objective."""
    for place in places:
        name = "_next objective" if artists(ax, _LEG) else "next objective"
        ax.axvline(place, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1.4, gid=_LEG, label=name)


def _draw_best(ax: Axes, x: float, y: float, step: Any, line: Line2D) -> None:
    stars = [star for star in artists(ax, _BEST) if isinstance(star, Line2D)]
    if stars:
        stars[0].set_label("best points")
    ax.plot(
        [x],
        [y],
        linestyle="none",
        marker="*",
        markersize=11,
        color=line.get_color(),
        gid=_BEST,
        zorder=3,
        markeredgecolor=ax.get_facecolor(),
        markeredgewidth=0.7,
        label="_best point" if stars else f"best point (step {int(step)})",
    )


def _finish(ax: Axes, panel: str, values: np.ndarray, goal: str) -> None:
    """Name the axes, show shares in per cent, start shares and distances at zero, and say what is missing."""
    names = {
        "drift": "drift (share\nof spread)",
        "changed": "changed\npredictions",
        "sparsity": "zero weights",
    }
    place = ax.get_subplotspec()
    alone = len(ax.get_shared_x_axes().get_siblings(ax)) == 1
    x_label = "arc length (weight units)" if alone or place is None or place.is_last_row() else None
    label_axes(ax, x_label, names.get(panel, textwrap.fill(goal, 16)))
    known = np.isfinite(values)
    if panel in ("changed", "sparsity"):
        ax.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    if panel in ("drift", "changed") and ax.get_yscale() == "linear" and known.any():
        negative = any(np.nanmin(np.asarray(line.get_ydata(), float), initial=0.0) < 0 for line in ax.lines)
        if not negative:
            ax.set_ylim(bottom=0.0, auto=None)
    if not known.any() and not artists(ax, _MISSING):
        what = goal if panel == "objective" else panel
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": GREY, "fontsize": "small"}
        ax.text(0.5, 0.5, f"{what}: not recorded", transform=ax.transAxes, gid=_MISSING, **style)


def _legends(panels: Mapping[str, Axes]) -> None:
    """Name the series in the first panel, the band beside it, the marks in the last: each thing once.

    A legend that would fill a low panel becomes a strip above its frame, where that is wide enough.
    """
    order = list(panels.values())
    home = {
        _SERIES: order[0],
        _INTERVAL: panels.get("drift", order[0]),
        _BOUND: panels.get("changed", order[0]),
        _LEG: order[-1],
        _BEST: order[-1],
        _REJECTED: order[-1],
    }
    for panel, ax in panels.items():
        handles = [one for one in ax.get_legend_handles_labels()[0] if home.get(str(one.get_gid()), ax) is ax]
        level = arrange_level_notes(ax, _BUDGET) if panel == "drift" else 1.0
        level = level if level > 0.5 else 1.0
        if fits_above(ax, [str(handle.get_label()) for handle in handles], level):
            strip = {"ncols": len(handles), "frameon": False, "borderaxespad": 0.1, "columnspacing": 1.2}
            refresh_legend(ax, handles, loc="lower right", bbox_to_anchor=(1.0, 1.0), **strip)
        else:
            where = "lower right" if panel == "sparsity" else "best"  # zeros rise, and a star is larger than its point
            refresh_legend(ax, handles, loc=where, bbox_to_anchor=(0.0, 0.0, 1.0, level))
