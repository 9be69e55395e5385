"""Sparsity of the layers of one network."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import PercentFormatter

from fipgeo.plotting._common import (
    GREY,
    PALETTE,
    as_numpy,
    check_axes,
    default_cycle,
    label_axes,
    new_axes,
    refresh_legend,
    series_style,
)
from fipgeo.plotting._notes import artists, note, turn_to_room

_BAR = "fipgeo-layer:"  # followed by the name of the layer, so that a later call finds its row
_SERIES, _TRACK, _UNKNOWN, _SIZE, _GLOBAL, _TARGET = (
    f"fipgeo-layers-{part}" for part in ("series", "track", "unknown", "size", "global", "target")
)


@dataclass(frozen=True)
class _Content:
    names: list[str]
    sizes: np.ndarray  # [L] weights per layer
    shares: np.ndarray  # [L] zeros / size, NaN where unknown or the layer is empty
    total: float  # zeros / size summed over the layers that are known


def plot_layer_sparsity(
    layers: Mapping[str, tuple[Any, Any]],
    *,
    ax: Axes | None = None,
    target: float | None = None,
    label: str | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw the share of zero weights of each layer as horizontal bars, the first layer on top.

    Bars of layers with more weights are darker (on a logarithmic scale of the size), and the sizes stand at
    the right edge. A dashed line marks the share over all weights (the sum of zeros over the sum of sizes,
    not the mean of the bars), a dotted one the target. Layers whose share is unknown (NaN) or that have no
    weight are hatched. A further call on the same Axes draws its network as markers on the rows of the
    first.

    Args:
        layers: Number of zero weights and number of weights by layer name, in the order to draw.
        ax: Where to draw; None makes a new figure, high enough for the names.
        target: The share of zeros that was asked for, between 0 and 1.
        label: Name in the legend and at the line of the whole network.
        **kwargs: Properties of the bars (`matplotlib.patches.Rectangle`), or of the markers
            (`matplotlib.lines.Line2D`) in a further call.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``layers`` is not a mapping to pairs of numbers or ``ax`` is not one Axes.
        ValueError: If it is empty, zeros lie outside 0 to size, the target lies outside 0 to 1, or a
            further call brings layers that have no row.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_layer_sparsity({"conv": (30, 40), "fc": (5, 10)}, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['conv', 'fc']
    """
    content = _read(layers)
    if target is not None and not 0 <= target <= 1:
        raise ValueError(f"target must be a share between 0 and 1, but {target!r} came; 80 % is 0.8")
    if ax is None:
        width, font = matplotlib.rcParams["figure.figsize"][0], matplotlib.rcParams["font.size"]
        ax = new_axes((width, (len(content.names) + 2) * 1.5 * font / 72 + 0.7))
    else:
        check_axes(ax)

    rows = _rows(ax)
    if rows:
        color = _draw_markers(ax, content, rows, label, kwargs)
    else:
        color = _draw_bars(ax, content, label, kwargs)
        rows = _rows(ax)
        _draw_names(ax, content)
    name = "all layers" if label is None else label
    if math.isfinite(content.total):
        _draw_line(ax, content.total, name, color, _GLOBAL)
    drawn = [float(np.asarray(line.get_xdata())[0]) for line in ax.lines if line.get_gid() == _TARGET]
    if target is not None and target not in drawn:
        _draw_line(ax, float(target), "target", matplotlib.rcParams["text.color"], _TARGET)
    _arrange(ax, len(rows))
    return ax


def _read(layers: Any) -> _Content:
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must map names to (zeros, size), but a {type(layers).__name__} came; pass a dict")
    if not layers:
        raise ValueError("layers is empty; at least one layer is needed to draw")
    names = [str(name) for name in layers]
    pairs = np.empty((len(names), 2))
    for row, (name, pair) in enumerate(zip(names, layers.values(), strict=True)):
        values = as_numpy(pair, f"layers[{name!r}]") if hasattr(pair, "__len__") else np.empty(0)
        if values.size != 2:
            raise TypeError(f"layers[{name!r}] must be a pair (zeros, size), but {pair!r} came")
        pairs[row] = values
        if values[0] < 0 or values[1] < 0 or values[0] > values[1]:
            raise ValueError(
                f"layers[{name!r}] has {values[0]:g} zeros of {values[1]:g} weights; zeros must lie "
                "between 0 and the size: pass counts (zeros, size), in this order"
            )
    zeros, sizes = pairs.T
    known = np.isfinite(zeros) & np.isfinite(sizes) & (sizes > 0)
    shares = np.divide(zeros, sizes, out=np.full(len(names), np.nan), where=known)
    total = float(zeros[known].sum() / sizes[known].sum()) if known.any() else math.nan
    return _Content(names, sizes, shares, total)


def _rows(ax: Axes) -> dict[str, float]:
    """The height of each layer that an earlier call drew, by name."""
    bars = [patch for patch in ax.patches if (patch.get_gid() or "").startswith(_BAR)]
    return {
        str(bar.get_gid())[len(_BAR) :]: bar.get_y() + bar.get_height() / 2
        for bar in bars
        if isinstance(bar, Rectangle)
    }


def _draw_bars(ax: Axes, content: _Content, label: str | None, kwargs: dict[str, Any]) -> Any:
    """Draw a bar for each layer over a pale track from 0 to 1; return the colour of the bars."""
    places = np.arange(len(content.names))
    style = {"height": 0.72, "zorder": 2.0, "label": label or "_layers"}
    if default_cycle():
        style["color"] = PALETTE[0]
    style |= normalize_kwargs(kwargs, Rectangle)
    # The track comes with a colour of its own and thus leaves the property cycle at its first place.
    for track in ax.barh(places, 1.0, height=style["height"], color=GREY, alpha=0.13, linewidth=0, zorder=1.0):
        track.set_gid(_TRACK)
    bars = ax.barh(places, np.nan_to_num(content.shares), **style)
    color = bars.patches[0].get_facecolor()
    size = np.log(np.maximum(np.nan_to_num(content.sizes), 1.0))
    depth = (size - size.min()) / max(float(np.ptp(size)), 1e-12) if np.ptp(size) > 0 else np.ones_like(size)
    for name, bar, share, part in zip(content.names, bars.patches, content.shares, depth, strict=True):
        bar.set_gid(_BAR + name)
        if not {"color", "facecolor", "alpha"} & set(normalize_kwargs(kwargs, Rectangle)):
            bar.set_facecolor((*to_rgb(color), 0.4 + 0.6 * float(part)))
        if not math.isfinite(share):
            place = bar.get_y()
            ax.add_patch(
                Rectangle(
                    (0, place),
                    1.0,
                    bar.get_height(),
                    facecolor="none",
                    edgecolor=GREY,
                    hatch="/////",
                    linewidth=0,
                    zorder=1.5,
                    gid=_UNKNOWN,
                )
            )
    return to_rgb(color)


def _draw_names(ax: Axes, content: _Content) -> None:
    """Name the rows, with the number of weights at the right edge, and the axes."""
    places = np.arange(len(content.names))
    names, pattern = _short(content.names)
    ax.set_yticks(places, names, fontsize="small")
    ax.tick_params(axis="y", length=0)
    ax.set_xlim(0.0, 1.0)
    ax.xaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=" %"))
    for place, size in [*zip(places, content.sizes, strict=True), (-1, None)]:
        text = "weights" if size is None else "?" if math.isnan(size) else f"{size:,.0f}"
        note(
            ax,
            text,
            (1.0, place),
            ("axes fraction", "data"),
            gid=_SIZE,
            color=GREY,
            va="center_baseline",
            xytext=(5, 0),
            annotation_clip=False,
        )
    label_axes(ax, "zero weights (share of the layer)", pattern or None)


def _short(names: list[str], limit: int = 28) -> tuple[list[str], str]:
    """Names that fit beside the bars, and the pattern that was taken off them.

    Where some are long, the dotted parts in front and behind that all names share go into the pattern. The
    middle of what is still long is left out, unless two names would then look alike.
    """
    pattern = ""
    if len(names) > 1 and max(map(len, names)) > limit:
        parts = [name.split(".") for name in names]
        room = min(map(len, parts)) - 1
        front = _shared(parts, room)
        behind = _shared([part[::-1] for part in parts], room - front)
        if front or behind:
            pattern = ".".join([*parts[0][:front], "*", *parts[0][len(parts[0]) - behind :]])
        names = [".".join(part[front : len(part) - behind]) for part in parts]
    half = (limit - 1) // 2
    short = [name if len(name) <= limit else f"{name[:half]}…{name[-half:]}" for name in names]
    return [one if short.count(one) == 1 else name for one, name in zip(short, names, strict=True)], pattern


def _shared(parts: list[list[str]], room: int) -> int:
    """How many leading parts all names share, at most ``room``."""
    count = 0
    while count < room and len({part[count] for part in parts}) == 1:
        count += 1
    return count


def _draw_markers(
    ax: Axes, content: _Content, rows: Mapping[str, float], label: str | None, kwargs: dict[str, Any]
) -> Any:
    """Draw a further network as markers on the rows of the first; return the colour."""
    strangers = [name for name in content.names if name not in rows]
    if strangers:
        raise ValueError(
            f"layers {strangers} have no row on this Axes, which shows {list(rows)}; draw on a new Axes, "
            "or name the layers alike"
        )
    place = 1 + len(artists(ax, _SERIES))  # the bars took the first colour
    defaults = {
        "linestyle": "none",
        "markersize": 4.5,
        "markeredgecolor": ax.get_facecolor(),
        "markeredgewidth": 0.6,
    }
    if default_cycle():
        defaults["color"] = PALETTE[place % len(PALETTE)]
    style = series_style(ax, _SERIES, {**defaults, **kwargs}, {"zorder": 3.0, "label": label or "_layers"})
    heights = [rows[name] for name in content.names]
    (line,) = ax.plot(content.shares, heights, **style)
    return line.get_color()


def _draw_line(ax: Axes, share: float, name: str, color: Any, gid: str) -> None:
    solid = gid == _TARGET
    dashes = "-" if solid else (0, (4, 3))
    line = ax.axvline(share, color=color, gid=gid, linestyle=dashes, linewidth=0.8 if solid else 1.3)
    line.set_zorder(2.6 if solid else 2.7)  # dashes over the target, which they often meet
    line.set_path_effects([withStroke(linewidth=3.0, foreground=ax.get_facecolor())])
    text = f"{name} {100 * share:.3g} %"
    note(ax, text, (share, 0.0), "data", gid=gid, color=color, va="center_baseline")


def _arrange(ax: Axes, rows: int) -> None:
    """Give each line's note a row of its own above the bars, and the legend the strip above the frame."""
    notes = [text for text in ax.texts if isinstance(text, Annotation) and text.get_gid() in (_GLOBAL, _TARGET)]
    for place, text in enumerate(notes):
        text.xy = (text.xy[0], -1.0 - place)
        turn_to_room(ax, text)
    ax.set_ylim(rows - 0.4, -1.6 - max(len(notes) - 1, 0))
    handles, _ = ax.get_legend_handles_labels()
    handles.sort(key=lambda handle: not isinstance(handle, BarContainer))
    place = {"loc": "lower right", "bbox_to_anchor": (1.0, 1.0), "borderaxespad": 0.2}
    refresh_legend(ax, handles, ncols=max(len(handles), 1), frameon=False, **place)
