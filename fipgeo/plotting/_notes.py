"""Short texts on a plot and where they go, so that those of several calls do not cover each other."""

import math
from typing import Any

import matplotlib.patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.text import Annotation

_PAD = 4.0  # points between a line and its note


def artists(ax: Axes, *gids: str) -> list[Artist]:
    """The artists that earlier calls left on this Axes under these group ids."""
    return [artist for artist in ax.get_children() if artist.get_gid() in gids]


def note(ax: Axes, text: str, xy: tuple[float, float], coords: Any, *, gid: str, **kwargs: Any) -> Annotation:
    """Small text with a halo in the background colour, so that lines under it do not cross the letters."""
    halo = matplotlib.patheffects.withStroke(linewidth=2.5, foreground=ax.get_facecolor())
    style = {
        "fontsize": "small",
        "xytext": (_PAD, -_PAD),
        "textcoords": "offset points",
        "zorder": 4,
        **kwargs,
    }
    return ax.annotate(text, xy, xycoords=coords, gid=gid, path_effects=[halo], **style)


def arrange_top_notes(ax: Axes, inner: str, outer: str) -> float:
    """Set notes that hang from the top edge in rows; return the height below them as a fraction of the axes.

    A note stands right of its line if there is room, else left. Where an ``outer`` line is present,
    ``inner`` notes turn away from it, to the left. A row takes a note only where it touches no other.
    """
    width, height = _size_in_points(ax)
    outer_lines = [text for text in _notes(ax, outer) if _x_is_data(text)]
    rows: list[list[tuple[float, float]]] = []
    bottom = 1.0
    for text in [*_notes(ax, inner), *_notes(ax, outer)]:
        anchor = _x_in_points(ax, text)
        length = _length(text) + 2 * _PAD
        turned = bool(outer_lines) and text.get_gid() == inner
        to_left = anchor + length > width or (turned and anchor > length)
        extent = (anchor - length, anchor) if to_left else (anchor, anchor + length)
        row = next((i for i, taken in enumerate(rows) if all(_apart(extent, other) for other in taken)), len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(extent)
        text.set_horizontalalignment("right" if to_left else "left")
        text.set_position((-_PAD if to_left else _PAD, -_PAD - row * _line_height(text)))
        bottom = min(bottom, 1 - (_PAD + (row + 1) * _line_height(text)) / height)
    return max(bottom, 0.0)


def arrange_floor_notes(ax: Axes, gid: str) -> float:
    """Set notes above their horizontal lines, lowest first; return the height above them as a fraction."""
    _, height = _size_in_points(ax)
    top = 0.0
    for text in sorted(_notes(ax, gid), key=lambda text: text.xy[1]):
        line = _y_in_points(ax, text)
        base = max(line + _PAD, top)
        text.set_position((_PAD, base - line))
        top = base + _line_height(text)
    return min(top / height, 1.0)


def arrange_level_notes(ax: Axes, gid: str) -> float:
    """Set notes above their horizontal lines, side by side where lines are close; return the lowest height.

    The top limit moves up where the highest note would leave the frame. The height is a fraction of the
    axes.
    """
    notes = sorted(_notes(ax, gid), key=lambda text: text.xy[1])
    if not notes:
        return 1.0
    _, height = _size_in_points(ax)
    low, high = ax.get_ylim()
    need = min(1.2 * _line_height(notes[-1]) / height, 0.5)
    level = notes[-1].xy[1]
    if ax.get_yscale() == "linear" and high - level < need * (high - low):
        ax.set_ylim(top=(level - need * low) / (1 - need), auto=None)
    shift, last = _PAD, -math.inf
    for text in notes:
        line = _y_in_points(ax, text)
        shift = shift if line - last < _line_height(text) else _PAD
        text.set_position((shift, 0.5 * _PAD))
        shift, last = shift + _length(text) + 2 * _PAD, line
    return min(max(_y_in_points(ax, notes[0]) / height, 0.0), 1.0)


def turn_to_room(ax: Axes, text: Annotation) -> None:
    """Put a note right of its vertical line if there is room, else on the side that has more."""
    width, _ = _size_in_points(ax)
    anchor = _x_in_points(ax, text)
    to_left = anchor + _length(text) + _PAD > width and anchor > width - anchor
    text.set_horizontalalignment("right" if to_left else "left")
    text.set_position((-_PAD if to_left else _PAD, 0))


def fits_above(ax: Axes, labels: list[str], share: float) -> bool:
    """Whether a legend would fill a third of this share of the height, but one row of it fits above."""
    width, height = _size_in_points(ax)
    font = FontProperties(size="small").get_size_in_points()
    row = sum(0.53 * font * len(label) + 3.5 * font for label in labels)
    return 1.5 * font * len(labels) > 0.35 * share * height and row < width and not ax.get_title()


def _notes(ax: Axes, gid: str) -> list[Annotation]:
    return [artist for artist in artists(ax, gid) if isinstance(artist, Annotation)]


def _size_in_points(ax: Axes) -> tuple[float, float]:
    """Width and height of the Axes as laid out now; a layout engine may still change them a little."""
    box, dpi = ax.get_window_extent(), ax.get_figure(root=True).dpi  # type: ignore[union-attr]
    return max(box.width * 72 / dpi, 1.0), max(box.height * 72 / dpi, 1.0)


def _x_in_points(ax: Axes, text: Annotation) -> float:
    width, _ = _size_in_points(ax)
    if not _x_is_data(text):
        return width * text.xy[0]
    ax.get_xlim()  # settles a pending autoscale, which transData alone does not
    return width * float(ax.transAxes.inverted().transform(ax.transData.transform((text.xy[0], 1.0)))[0])


def _y_in_points(ax: Axes, text: Annotation) -> float:
    _, height = _size_in_points(ax)
    ax.get_ylim()
    return height * float(ax.transAxes.inverted().transform(ax.transData.transform((1.0, text.xy[1])))[1])


def _x_is_data(text: Annotation) -> bool:
    coords = text.xycoords
    return coords == "data" or (isinstance(coords, tuple) and coords[0] == "data")


def _font_size(text: Annotation) -> float:
    return float(text.get_fontsize())  # always in points, whatever was set


def _length(text: Annotation) -> float:
    """A rough width in points: exact extents need a renderer, and half an em is the mean of a letter."""
    return 0.56 * _font_size(text) * len(text.get_text())


def _line_height(text: Annotation) -> float:
    return 1.4 * _font_size(text)


def _apart(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[1] <= other[0] or other[1] <= one[0]
