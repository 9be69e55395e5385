"""Accuracies along a sequence of tasks, as a table of coloured cells."""

from typing import Any, Protocol, runtime_checkable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from fipgeo.plotting._common import GREY, check_axes, label_axes, new_axes
from fipgeo.plotting._notes import artists

_CELLS = "fipgeo-accuracy"


@runtime_checkable
class AccuracyRecord(Protocol):
    """What `plot_accuracy` reads: ``values [t, T]`` after each of t tasks on each of T, and the T names."""

    @property
    def values(self) -> Any:
        """Shares in [0, 1]; NaN where nothing was measured."""

    @property
    def tasks(self) -> Any:
        """Names of the columns."""


def plot_accuracy(record: AccuracyRecord | Any, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw an accuracy matrix: rows after each task learned, columns on each task, per cent in the cells.

    Darker cells are more accurate, on a scale from 0 to 100 %, so that matrices beside each other compare. What a task
    came to when it was learned stands on the diagonal, which is framed; below it is what is left of it, above it what
    was known beforehand. Cells that were not measured stay empty.

    Args:
        record: An `AccuracyMatrix`, or shares `[t, T]` as a tensor, array or nested list.
        ax: Where to draw; None makes a new figure. One matrix goes on one Axes.
        **kwargs: Properties of the cells (`matplotlib.axes.Axes.imshow`), such as cmap.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``ax`` is not one Axes.
        ValueError: If the values are no matrix of shares, or the Axes carries a matrix already.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_accuracy([[0.98, 0.02], [0.95, 0.88]], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['98.0', '2.0', '95.0', '88.0']
    """
    values, names = _read(record)
    if ax is None:
        width, font = matplotlib.rcParams["figure.figsize"][0], matplotlib.rcParams["font.size"]
        ax = new_axes((width, (len(values) + 2) * 2.2 * font / 72 + 0.5))
    elif artists(check_axes(ax), _CELLS):
        raise ValueError("ax carries an accuracy matrix already; pass an Axes of its own for each")
    style = {"cmap": "Blues", "vmin": 0.0, "vmax": 1.0, "aspect": "auto", "interpolation": "nearest", "gid": _CELLS}
    cells = ax.imshow(np.ma.masked_invalid(values), **{**style, **kwargs})
    for (row, column), share in np.ndenumerate(values):
        if np.isfinite(share):
            red, green, blue, _ = cells.cmap(cells.norm(share))
            dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
            ax.text(column, row, f"{100 * share:.1f}", ha="center", va="center", color="white" if dark else "black")
        if row == column:
            box = Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor=GREY, zorder=2)
            ax.add_patch(box)
    ax.set_xticks(range(values.shape[1]), labels=names)
    ax.set_yticks(range(len(values)), labels=names[: len(values)])
    ax.tick_params(length=0)
    room = ax.get_window_extent().width * 72 / ax.figure.dpi / values.shape[1]  # points a column
    if 0.62 * matplotlib.rcParams["font.size"] * max(map(len, names)) > room:
        for text in ax.get_xticklabels():
            text.set(rotation=30, horizontalalignment="right", rotation_mode="anchor")
    for spine in ax.spines.values():
        spine.set_visible(False)
    label_axes(ax, "accuracy on (%)", "after learning")
    return ax


def _read(record: Any) -> tuple[np.ndarray, list[str]]:
    values = getattr(record, "values", record) if not isinstance(record, dict) else record["values"]
    array = np.array(values.tolist() if hasattr(values, "tolist") else values, dtype=np.float64)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"record must hold a matrix [t, T], but shape {array.shape} came; learn a task first")
    if (array < 0).any() or (array > 1).any():
        raise ValueError("record must hold shares between 0 and 1, but others came; 80 % is 0.8")
    names = getattr(record, "tasks", None) or [str(1 + column) for column in range(array.shape[1])]
    return array, [str(name) for name in names]
