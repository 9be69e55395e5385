"""Spectral densities: how many eigenvalues a decade holds, with what is uncertain and what stands out."""

from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from matplotlib.axes import Axes

from fipgeo.plotting._common import (
    MARKERS,
    as_numpy,
    check_axes,
    label_axes,
    new_axes,
    refresh_legend,
    scientific,
    series_style,
)
from fipgeo.plotting._notes import artists, note

_CURVE, _BAND, _EXACT, _REST = (f"fipgeo-density-{part}" for part in ("curve", "band", "exact", "rest"))
_POINTS = 400
_DECADES = 12  # shown at most, unless a floor is given


@runtime_checkable
class DensityRecord(Protocol):
    """What `plot_density` reads of a density (`fipgeo.linalg.Density` is one).

    ``on`` and ``cumulative`` return records with ``value [g]`` and ``std_error [g]``.
    """

    @property
    def nodes(self) -> Any:
        """Quadrature nodes ``[p, s]``."""

    @property
    def weights(self) -> Any:
        """Their weights ``[p, s]``; nodes without weight are ignored."""

    @property
    def exact(self) -> Any:
        """Eigenvalues ``[k]`` that are known one by one."""

    def tolerance(self) -> float:
        """The size below which an eigenvalue is rounding."""
        ...

    def on(self, grid: Any, width: float, *, log: bool, include_exact: bool) -> Any:
        """The smoothed density, eigenvalues per decade if ``log``."""

    def cumulative(self, x: Any, *, above: bool = False) -> Any:
        """How many eigenvalues are at most x."""


def plot_density(
    density: DensityRecord,
    *,
    ax: Axes | None = None,
    width: float | None = None,
    floor: float | None = None,
    num_errors: float = 2.0,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw how many eigenvalues each decade holds, on two logarithmic axes.

    The curve is the estimated density, smoothed by a Gaussian of ``width`` decades; the band around it is
    ``num_errors`` standard errors to either side. Eigenvalues that are known one by one (deflated before the
    quadrature) stand as dots, at the height of the bump that one eigenvalue makes. Those at or below ``floor``,
    zeros and negative ones among them, have no place on the axis: their number is written at the lower left, or
    in the legend for a labelled density.

    A rule of s steps does not resolve eigenvalues below about `1 / s^2` of the largest one left to it: a
    bump down there may stand for values spread over decades. More steps, or more deflated values, tell.

    Args:
        density: A record such as `fipgeo.linalg.Density`.
        ax: Where to draw; None makes a new figure. Call again with the same ax to overlay another density.
        width: Standard deviation of the smoothing, in decades; None for a fiftieth of the range shown, at
            least 0.06.
        floor: The smallest eigenvalue shown; None for the density's own ``tolerance()``, at most twelve
            decades below the largest.
        num_errors: Half the height of the band, in standard errors.
        label: Name in the legend.
        **kwargs: Properties of the curve (`matplotlib.lines.Line2D`), such as color.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``density`` has not what `DensityRecord` names or ``ax`` is not one Axes.
        ValueError: If no eigenvalue lies above ``floor`` or some are not finite, or ``width``, ``floor`` or
            ``num_errors`` is negative.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> from fipgeo.linalg import Diagonal, lanczos_density
        >>> found = lanczos_density(Diagonal(torch.linspace(1, 9, 50)), num_steps=20)
        >>> plot_density(found, ax=Figure().subplots()).get_ylabel()
        'eigenvalues per decade'
    """
    if not isinstance(density, DensityRecord):
        raise TypeError(f"density must be a record such as lanczos_density returns, but {type(density).__name__} came")
    for name, number in (("width", width), ("floor", floor), ("num_errors", num_errors)):
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must be a number >= 0 or None, but {number!r} came")
    inner, exact, floor = _range(density, floor)
    span = np.log10(max(inner.max(initial=0.0), exact.max(initial=0.0)) / floor)
    width = max(0.06, span / 50) if not width else width
    ax = new_axes() if ax is None else check_axes(ax)
    first = not artists(ax, _CURVE, _EXACT)
    if first:
        ax.set_xscale("log")
        ax.set_yscale("log")
    label_axes(ax, r"eigenvalue $\lambda$", "eigenvalues per decade")

    rest = _rest_text(density, floor)
    name = label if not (label and rest) else f"{label} ({rest})"
    color = _draw_curve(ax, density, (inner, floor, width), num_errors, name, kwargs)
    _draw_exact(ax, exact, 1 / (width * np.sqrt(2 * np.pi)), color, label)
    _fit(ax, first)
    if rest and not label:
        note(ax, rest, (0.0, 0.0), "axes fraction", gid=_REST, color=color, va="bottom", xytext=(4, 4))
    refresh_legend(ax, loc="upper right")
    return ax


def _range(density: DensityRecord, floor: float | None) -> tuple[np.ndarray, np.ndarray, float]:
    """Nodes with weight and known eigenvalues above the floor, and the floor."""
    nodes, weights = (as_numpy(torch.as_tensor(part).ravel(), "density.nodes") for part in _pair(density))
    exact = torch.as_tensor(density.exact)
    known = as_numpy(exact, "density.exact") if exact.numel() else np.empty(0)
    everything = np.concatenate([nodes[weights > 0], known])
    if not np.isfinite(everything).all():
        raise ValueError("density holds values that are not finite; look at density.outcome.message")
    largest = everything.max(initial=0.0)
    if floor is None:
        floor = max(density.tolerance(), largest * 10.0**-_DECADES)
    if not largest > floor or floor == 0:
        raise ValueError(
            f"no eigenvalue lies above the floor {floor:.3g} (the largest is {largest:.3g}); pass a lower one"
        )
    # weights that count a thousandth of an eigenvalue would stretch the axis for nothing
    seen = nodes[(weights > 1e-3) & (nodes > floor)]
    return seen, known[known > floor], float(floor)


def _pair(density: DensityRecord) -> tuple[Any, Any]:
    if torch.as_tensor(density.nodes).numel():
        return density.nodes, density.weights
    return torch.zeros(1), torch.zeros(1)


def _draw_curve(
    ax: Axes,
    density: DensityRecord,
    shape: tuple[np.ndarray, float, float],
    num_errors: float,
    label: str | None,
    kwargs: dict[str, Any],
) -> Any:
    """Draw the density from the floor to past the largest node, with its band; return the colour."""
    inner, floor, width = shape
    style = series_style(ax, _CURVE, kwargs, {"linestyle": "-", "marker": "none", "linewidth": 1.4, "zorder": 2.4})
    if not inner.size:
        (line,) = ax.plot([], [], label=label or "_density", **style)
        return line.get_color()
    low, high = np.log10(max(floor, inner.min() * 10 ** (-4 * width))), np.log10(inner.max()) + 4 * width
    grid = np.logspace(low, high, _POINTS)
    found = density.on(torch.from_numpy(grid), width, log=True, include_exact=False)
    value, error = (torch.as_tensor(part).double().numpy() for part in (found.value, found.std_error))
    (line,) = ax.plot(grid, np.where(value > 0, value, np.nan), label=label or "_density", **style)
    if np.isfinite(error).all():
        tiny = np.finfo(float).tiny
        lower, upper = np.maximum(value - num_errors * error, tiny), np.maximum(value + num_errors * error, tiny)
        color = line.get_color()
        ax.fill_between(grid, lower, upper, color=color, alpha=0.22, linewidth=0, zorder=2.1, gid=_BAND)
    return line.get_color()


def _draw_exact(ax: Axes, exact: np.ndarray, height: float, color: Any, label: str | None) -> None:
    if not exact.size:
        return
    text = f"{exact.size} found one by one"
    look = {"linestyle": "none", "markersize": 4.0, "markeredgewidth": 0.6, "markeredgecolor": ax.get_facecolor()}
    place = len(artists(ax, _EXACT))
    ax.plot(
        exact,
        np.full(exact.size, height),
        marker=MARKERS[place % len(MARKERS)],
        color=color,
        label=f"{label}: {text}" if label else text,
        gid=_EXACT,
        zorder=2.6,
        **look,
    )


def _rest_text(density: DensityRecord, floor: float) -> str:
    """How many eigenvalues lie at or below the floor, and how many of them are negative beyond it."""
    found = density.cumulative(torch.tensor([floor, -floor], dtype=torch.float64))
    (low, negative), (error, _) = torch.as_tensor(found.value).tolist(), torch.as_tensor(found.std_error).tolist()
    if low < 0.5:
        return ""
    doubt = f" ± {scientific(round(error))}" if error >= 0.5 else ""
    text = f"{_count(low)}{doubt} values ≤ {scientific(floor)}"
    return text + (f", {_count(negative)} negative" if negative >= 0.5 else "")


def _count(number: float) -> str:
    return f"{number:.0f}" if number < 1e4 else scientific(number)


def _fit(ax: Axes, first: bool) -> None:
    """Heights from a third of an eigenvalue per decade up (smoothed tails below say nothing), room for the legend."""
    lines = [line for line in ax.lines if line.get_gid() in (_CURVE, _EXACT)]
    heights = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines] + [np.ones(1)])
    named = sum(not str(line.get_label()).startswith("_") for line in lines)
    bottom = 0.3 if first else min(0.3, ax.get_ylim()[0])
    decades = np.log10(2 * np.nanmax(heights) / bottom)
    ax.set_ylim(bottom, bottom * 10 ** (decades / (1 - min(0.5, 0.08 * named))))
