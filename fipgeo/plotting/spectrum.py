"""Spectra: sorted eigenvalues on a logarithmic axis, with the numerical rank and the zeros in sight."""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from fipgeo.plotting._common import (
    GREY,
    as_numpy,
    check_axes,
    float_eps,
    label_axes,
    new_axes,
    refresh_legend,
    scientific,
    series_style,
)
from fipgeo.plotting._notes import arrange_floor_notes, arrange_top_notes, artists, note

_SERIES, _FLOOR, _RANK, _BOUND, _HELD_OUT, _NOT_FINITE = (
    f"fipgeo-spectrum-{part}" for part in ("values", "floor", "rank", "bound", "held-out", "not-finite")
)


@runtime_checkable
class SpectrumRecord(Protocol):
    """What `plot_spectrum` reads of a spectrum: ``values [k]``, descending, and what is known of the rest.

    ``held_out [k]`` (or None) are Rayleigh quotients of the same vectors under another operator. If they
    are there, ``dim``, ``complete``, ``captured`` and ``rank()`` are read too.
    """

    @property
    def values(self) -> Any:
        """The eigenvalues ``[k]``."""

    @property
    def rank_bound(self) -> int | None:
        """An upper bound of the rank that is known beforehand."""

    @property
    def held_out(self) -> Any:
        """Rayleigh quotients ``[k]`` of the same vectors under another operator, or None."""


@dataclass(frozen=True)
class _Content:
    """The numbers of one spectrum, sorted, with the decisions taken before drawing."""

    values: np.ndarray  # [k] descending, NaN and infinities last
    held_out: np.ndarray | None  # [k], in the order of values
    tol: float
    rank: int | None  # None: all k values exceed tol, and there may be more
    rank_bound: int | None
    captured: float | None


def plot_spectrum(
    spectrum: SpectrumRecord | Any,
    *,
    ax: Axes | None = None,
    rank: int | None = None,
    tol: float | None = None,
    rank_bound: int | None = None,
    held_out: Any = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw eigenvalues against their index, largest first, on a logarithmic axis.

    Values at or below ``tol`` (zeros and negative ones among them) have no place of their
    own on such an axis: they stand as hollow markers on a labelled floor line, at ``tol`` itself, or a
    decade below the smallest positive value when ``tol`` is 0. NaN and infinities stand as grey crosses at
    the bottom. A vertical line marks the numerical rank, the number of values above ``tol``; it is left out
    when all values are above and more may exist (a partial spectrum). A dotted line marks ``rank_bound``,
    or a note at the right edge when it lies far outside. The number of values on the floor is written at
    its line, or in the legend for a labelled spectrum.

    Args:
        spectrum: A record such as `fipgeo.linalg.Spectrum`, or the eigenvalues ``[k]`` as a tensor, array
            or list.
        ax: Where to draw; None makes a new figure. Call again with the same ax to overlay another spectrum.
        rank: The numerical rank to mark; None counts the values above ``tol``,
            or asks ``spectrum.rank()`` where ``tol`` is None too.
        tol: Values up to here count as zero. None: ``spectrum.tolerance()`` for a record,
            else ``eps * max(10, k) * max|values|`` with the machine epsilon of the dtype that came.
        rank_bound: An upper bound of the rank, such as min(D, N M); None takes the record's.
        held_out: Rayleigh quotients ``[k]`` of the same vectors under another operator, in the order of the
            values, drawn as a second series; None takes the record's.
        label: Name in the legend.
        **kwargs: Properties of the main line (`matplotlib.lines.Line2D`), such as color or marker.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If the values are not real numbers or ``ax`` is not one Axes.
        ValueError: If the values are empty or not one-dimensional, ``held_out`` has another length, or
            ``tol``, ``rank`` or ``rank_bound`` is negative.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_spectrum([4.0, 1.0, 0.0], ax=Figure().subplots())
        >>> ax.lines[0].get_ydata().tolist()
        [4.0, 1.0]
    """
    content = _read(spectrum, rank=rank, tol=tol, rank_bound=rank_bound, held_out=held_out)
    ax = new_axes() if ax is None else check_axes(ax)
    first = not artists(ax, _SERIES)
    if ax.get_yscale() == "linear":
        ax.set_yscale("log")
    if first:
        ax.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
    label_axes(ax, "index $i$, largest first", r"eigenvalue $\lambda_i$")

    color = _draw_values(ax, content, label, kwargs)
    _draw_not_finite(ax, content)
    _draw_rank(ax, content, color)
    _draw_bound(ax, content)
    bottom, top = arrange_floor_notes(ax, _FLOOR), arrange_top_notes(ax, _RANK, _BOUND)
    refresh_legend(ax, markerscale=1.4, loc="best", bbox_to_anchor=(0.0, bottom, 1.0, max(top - bottom, 0.1)))
    return ax


def _read(spectrum: Any, *, rank: Any, tol: Any, rank_bound: Any, held_out: Any) -> _Content:
    record = spectrum if isinstance(spectrum, SpectrumRecord) and not isinstance(spectrum, torch.Tensor) else None
    raw = spectrum if record is None else record.values
    values = as_numpy(raw, "spectrum" if record is None else "spectrum.values")
    if record is not None:
        rank_bound = record.rank_bound if rank_bound is None else rank_bound
        held_out = record.held_out if held_out is None else held_out
    for name, number in (("tol", tol), ("rank", rank), ("rank_bound", rank_bound)):
        if number is not None and not number >= 0:
            raise ValueError(f"{name} must be a number >= 0 or None, but {number!r} came")

    if held_out is not None:
        held_out = as_numpy(held_out, "held_out")
        if held_out.shape != values.shape:
            raise ValueError(
                f"held_out has {held_out.size} values for {values.size} eigenvalues; "
                "give one Rayleigh quotient for each eigenvector, in the order of the eigenvalues"
            )
    finite = np.isfinite(values)
    order = np.argsort(np.where(finite, -values, np.inf), kind="stable")
    values, held_out = values[order], None if held_out is None else held_out[order]
    known = values[: int(finite.sum())]

    own: Any = getattr(record, "rank", None) if tol is None else None  # a record may also doubt values above tol
    tol = _default_tol(record, known, float_eps(raw)) if tol is None else float(tol)
    above = int((known > tol).sum())
    if rank is None and (above < known.size or bool(getattr(record, "complete", False))):
        rank = above if own is None else min(above, int(own()))
    captured = getattr(record, "captured", None)
    captured = None if captured is None else float(captured)
    return _Content(values, held_out, tol, rank, rank_bound, captured)


def _default_tol(record: Any, known: np.ndarray, eps: float) -> float:
    """The record's own tolerance, else eps * max(10, k) * largest absolute value."""
    if callable(getattr(record, "tolerance", None)):
        return float(record.tolerance())
    return eps * max(10, known.size) * float(np.abs(known).max(initial=0.0))


def _floor_of(content: _Content) -> float:
    """Where values without a place on the axis stand: at tol, or below everything when tol is 0."""
    if content.tol > 0:
        return content.tol
    positive = [
        series[np.isfinite(series) & (series > 0)]
        for series in (content.values, content.held_out)
        if series is not None
    ]
    return float(min((part.min() for part in positive if part.size), default=1.0)) / 10


def _draw_values(ax: Axes, content: _Content, label: str | None, kwargs: dict[str, Any]) -> Any:
    """Draw the eigenvalues, those on the floor and the held-out series; return the colour of the series."""
    size = float(np.clip(5.5 - 1.6 * np.log10(content.values.size), 1.9, 4.5))
    defaults = {"linestyle": "none", "markersize": size, "markeredgewidth": 0.0, "zorder": 2.5}
    style = series_style(ax, _SERIES, kwargs, defaults)
    main_label = label or ("_eigenvalues" if content.held_out is None else "eigenvalues")
    line, low = _draw_split(ax, content, content.values, {"label": main_label, **style}, _FLOOR)
    color = line.get_color()
    if content.held_out is not None:
        name = "held out" if label is None else f"{label}, held out"
        if content.captured is not None:
            name += f" ({100 * content.captured:.0f} % of trace)"
        second = {
            "linestyle": "none",
            "marker": "_",
            "markersize": 1.9 * size,
            "markeredgewidth": 0.9,
            "color": _pale(color),
            "zorder": 2.2,
            "label": name,
            "gid": _HELD_OUT,
        }
        low += _draw_split(ax, content, content.held_out, second, _HELD_OUT)[1]
    if low:
        floor = _floor_of(content)
        ax.axhline(floor, color=color, linewidth=0.6, linestyle=(0, (1, 2)), zorder=1.5, gid=_FLOOR)
        if label:  # several labelled spectra: the legend has room, the floors may be close to each other
            line.set_label(f"{label} ({_floor_text(content, noun='')})")
        else:
            xy, look = (0.0, floor), {"color": color, "va": "bottom", "zorder": 2.0}
            note(ax, _floor_text(content), xy, ("axes fraction", "data"), gid=_FLOOR, **look)
    return color


def _draw_split(
    ax: Axes, content: _Content, values: np.ndarray, style: dict[str, Any], floor_gid: str
) -> tuple[Line2D, int]:
    """Draw values above tol as they are and the others hollow on the floor; return the line and their number.

    Rings closer than 2.5 % of the diagonal would run together: they stay in the data of the line, which
    joins them.
    """
    index = np.arange(1, values.size + 1)
    finite = np.isfinite(values)
    up, low = finite & (values > content.tol), finite & (values <= content.tol)
    (line,) = ax.plot(index[up], values[up], **style)
    if low.any():
        marker = "o" if line.get_marker() in ("_", ".", ",", "None", None, "") else line.get_marker()
        ax.plot(
            index[low],
            np.full(int(low.sum()), _floor_of(content)),
            marker=marker,
            markevery=0.025,
            markersize=4.0 if floor_gid == _FLOOR else 6.0,
            markerfacecolor=ax.get_facecolor(),
            markeredgewidth=0.8,
            color=line.get_color(),
            linewidth=0.8,
            gid=floor_gid,
            label="_at or below tol",
            zorder=line.get_zorder() - 0.05,
        )
    return line, int(low.sum())


def _pale(color: Any) -> tuple[float, ...]:
    """The colour half way to a light grey: the same hue, clearly apart in lightness."""
    return tuple(0.5 * channel + 0.5 * 0.9 for channel in to_rgb(color))


def _floor_text(content: _Content, noun: str = "value") -> str:
    """How many values stand on the floor, how high it is, how many are negative beyond the tolerance."""
    known = content.values[np.isfinite(content.values)]
    low, negative = int((known <= content.tol).sum()), int((known < -content.tol).sum())
    if not low and content.held_out is not None:
        low, noun = int((content.held_out <= content.tol).sum()), noun and f"held-out {noun}"
    limit = "0" if content.tol == 0 else scientific(content.tol)
    name = f" {noun}{'' if low == 1 else 's'}" if noun else ""
    return f"{low}{name} ≤ {limit}" + (f", {negative} negative" if negative else "")


def _draw_not_finite(ax: Axes, content: _Content) -> None:
    index = np.arange(1, content.values.size + 1)
    bad = ~np.isfinite(content.values)
    if content.held_out is not None:
        bad |= ~np.isfinite(content.held_out)
    if not bad.any():
        return
    # add_artist leaves the y limits alone: heights in axes units would confuse a log autoscale.
    look: dict[str, Any] = {"linestyle": "none", "marker": "x", "markersize": 5, "color": GREY, "clip_on": False}
    crosses = Line2D(index[bad], np.full(int(bad.sum()), 0.02), transform=ax.get_xaxis_transform(), **look)
    crosses.set_gid(_NOT_FINITE)
    crosses.set_label(f"{int(bad.sum())} not finite (NaN, inf)")
    ax.add_artist(crosses)
    ax.update_datalim(np.column_stack([index[bad], np.ones(int(bad.sum()))]), updatey=False)
    ax.autoscale_view(scaley=False)


def _draw_rank(ax: Axes, content: _Content, color: Any) -> None:
    if content.rank is None:
        return
    ax.axvline(content.rank + 0.5, color=color, linewidth=0.9, linestyle=(0, (5, 2)), zorder=1.6, gid=_RANK)
    note(
        ax,
        f"numerical rank {content.rank}",
        (content.rank + 0.5, 1.0),
        ("data", "axes fraction"),
        gid=_RANK,
        color=color,
        va="top",
    )


def _draw_bound(ax: Axes, content: _Content) -> None:
    bound = content.rank_bound
    if bound is None:
        return
    if bound <= 1.3 * max(content.values.size, ax.get_xlim()[1]):
        ax.axvline(bound + 0.5, color=GREY, linewidth=0.9, linestyle=(0, (1, 1.5)), zorder=1.4, gid=_BOUND)
        xy, text = (bound + 0.5, 1.0), f"rank bound {bound}"
    else:
        xy, text = (1.0, 1.0), f"rank bound {bound} →"
    if any(isinstance(one, Text) and one.get_text() == text for one in artists(ax, _BOUND)):
        return  # the bound that another spectrum has
    note(
        ax,
        text,
        xy,
        ("data" if text[-1] != "→" else "axes fraction", "axes fraction"),
        gid=_BOUND,
        color=GREY,
        va="top",
    )
