"""Square matrices: how task vectors or layers stand to one another, and a metric with the borders of its layers."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, SymLogNorm

from fipgeo.plotting._common import GREY, check_axes, colour_scale, label_axes, new_axes, scientific
from fipgeo.plotting._notes import artists

_CELLS, _BORDER = "fipgeo-matrix", "fipgeo-matrix-border"
_ANNOTATED = 12
_DECADES = 3


def plot_interference(
    matrix: Any, names: Sequence[str] | None = None, *, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Draw numbers between -1 and 1 for all pairs, such as cosines of task vectors: white is 0, no interference.

    Up to twelve rows carry their numbers in the cells, more a scale of colours beside them.

    Args:
        matrix: Square, `[n, n]`, such as `fipgeo.atlas.cosines` returns.
        names: Of the rows and columns; numbers if None.
        ax: Where to draw; None makes a new figure. One matrix goes on one Axes.
        **kwargs: Properties of the cells (`matplotlib.axes.Axes.imshow`), such as cmap, vmin and vmax.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``ax`` is not one Axes.
        ValueError: If the matrix is not square, names do not fit, or the Axes carries a matrix already.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_interference([[1.0, 0.25], [0.25, 1.0]], ["zeros", "ones"], ax=Figure().subplots())
        >>> [text.get_text() for text in ax.texts]
        ['1.00', '0.25', '0.25', '1.00']
    """
    values = _square(matrix)
    if names is not None and len(names) != len(values):
        raise ValueError(f"names must be {len(values)}, one a row, but {len(names)} came")
    ax = _free(ax)
    style = {"cmap": "RdBu_r", "vmin": -1.0, "vmax": 1.0, "interpolation": "nearest", "gid": _CELLS}
    cells = ax.imshow(np.ma.masked_invalid(values), **{**style, **kwargs})
    if len(values) <= _ANNOTATED:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                red, green, blue, _ = cells.cmap(cells.norm(value))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.55
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": "small"}
                ax.text(column, row, f"{value:.2f}", color="white" if dark else "black", **look)
    shown = [str(i) for i in range(len(values))] if names is None else [str(name) for name in names]
    turned = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if max(map(len, shown)) > 4 else {}
    ax.set_xticks(range(len(shown)), labels=shown, **turned)
    ax.set_yticks(range(len(shown)), labels=shown)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    if len(values) > _ANNOTATED:
        colour_scale(ax, cells, "")
    return ax


def plot_metric(matrix: Any, sizes: Any = None, *, ax: Axes | None = None, **kwargs: Any) -> Axes:
    """Draw a metric, or another matrix on the weights, as an image with a line where one tensor ends.

    Red is positive and blue negative; colours are logarithmic over three decades below the largest entry and linear
    nearer to zero, since entries of a metric differ by orders of magnitude.

    Args:
        matrix: Square, `[D, D]`, such as ``metric.operator.to_dense()``; D up to a few thousand.
        sizes: How many rows belong to each tensor: a mapping from names to numbers in the order of the rows, or a
            `WeightSpace`.
        ax: Where to draw; None makes a new figure. One matrix goes on one Axes.
        **kwargs: Properties of the image (`matplotlib.axes.Axes.imshow`), such as norm or cmap; pass the norm of one
            image to the next to compare them.

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``ax`` is not one Axes.
        ValueError: If the matrix is not square, sizes do not add up to D, or the Axes carries a matrix already.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_metric([[1.0, 0.1], [0.1, 2.0]], {"a": 1, "b": 1}, ax=Figure().subplots())
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['a', 'b']
    """
    values = _square(matrix)
    blocks = _blocks(sizes, len(values))
    ax = _free(ax)
    finite = np.abs(values[np.isfinite(values)])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    norm: Normalize = SymLogNorm(linthresh=most * 10.0**-_DECADES, vmin=-most, vmax=most)
    style = {"cmap": "RdBu_r", "interpolation": "nearest", "gid": _CELLS}
    style |= {} if {"vmin", "vmax"} & set(kwargs) else {"norm": norm}
    image = ax.imshow(np.ma.masked_invalid(values), **{**style, **kwargs})
    edges = np.cumsum([0, *blocks.values()])
    for edge in edges[1:-1]:
        for line in (ax.axhline(edge - 0.5), ax.axvline(edge - 0.5)):
            line.set(color=GREY, linewidth=0.6, gid=_BORDER)
    centres = {name: (a + b - 1) / 2 for name, a, b in zip(blocks, edges[:-1], edges[1:], strict=True)}
    tall = [name for name, size in blocks.items() if size >= 0.045 * len(values)]  # smaller ones have no room for it
    ax.set_yticks([centres[name] for name in tall], labels=tall, fontsize="small")
    ax.set_xticks([centres[name] for name in tall], labels=tall, fontsize="small", rotation=90)
    ax.tick_params(length=0)
    label_axes(ax, None if tall else "weight", None if tall else "weight")
    scale = colour_scale(ax, image, "entry")
    if image.norm is norm:
        power = math.floor(math.log10(most))
        tens = [10.0**k for k in range(power, power - _DECADES + 1, -1)]
        marks = [-ten for ten in tens] + [0.0, *tens]
        scale.set_ticks(marks, labels=[f"{'−' if mark < 0 else ''}{scientific(abs(mark))}" for mark in marks])
        scale.minorticks_off()
    return ax


def _square(matrix: Any) -> np.ndarray:
    if isinstance(matrix, torch.Tensor):
        matrix = matrix.detach().double().cpu().numpy()
    values = np.array(matrix, dtype=np.float64)
    if values.ndim != 2 or values.shape[0] != values.shape[1] or not values.size:
        raise ValueError(f"matrix must be square, [n, n], but shape {values.shape} came")
    return values


def _blocks(sizes: Any, dim: int) -> dict[str, int]:
    """Numbers of rows by name; none at all where nothing is known."""
    if sizes is None:
        return {}
    if not isinstance(sizes, Mapping):
        sizes = dict(zip(sizes.names, sizes.sizes, strict=True))
    blocks = {str(name): int(size) for name, size in sizes.items()}
    if sum(blocks.values()) != dim:
        raise ValueError(f"sizes add up to {sum(blocks.values())}, but the matrix has {dim} rows")
    return blocks


def _free(ax: Axes | None) -> Axes:
    if ax is None:
        return new_axes()
    if artists(check_axes(ax), _CELLS):
        raise ValueError("ax carries a matrix already; pass an Axes of its own for each")
    return ax
