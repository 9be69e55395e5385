"""The coefficients of a composition as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from fipgeo.plotting._common import GREY, PALETTE, check_axes, colour_scale, new_axes


def plot_coefficients(
    coefficients: Any,
    labels: Sequence[str] | None = None,
    *,
    names: Sequence[str] | None = None,
    ax: Axes | None = None,
    **kwargs: Any,
) -> Axes:
    """Draw coefficients `[n, S]` as a heat map: a row for each vector, a column for each label; white is zero.

    Args:
        coefficients: Numbers, or a `fipgeo.atlas.Composition`, whose own labels are then used.
        labels: What the columns scale.
        names: Of the vectors; numbers if None.
        ax: Where to draw; a new figure if None.
        **kwargs: Passed to `Axes.imshow`.

    Returns:
        The Axes.

    Raises:
        ValueError: The coefficients have not two axes, or labels or names do not fit them.
    """
    values, labels = _read(coefficients, labels)
    if names is not None and len(names) != len(values):
        raise ValueError(f"names: got {len(names)}, expected {len(values)}")
    ax = new_axes() if ax is None else check_axes(ax)
    finite = np.abs(values[np.isfinite(values)])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    image = ax.imshow(values, **{"cmap": "RdBu", "vmin": -most, "vmax": most, "aspect": "auto"} | kwargs)
    ax.set_yticks(range(values.shape[0]), [str(i) for i in range(values.shape[0])] if names is None else list(names))
    _label(ax, labels)
    ax.set_ylabel("task vector")
    colour_scale(ax, image, "coefficient")
    return ax


def plot_coefficient_depth(
    coefficients: Any, labels: Sequence[str] | None = None, *, ax: Axes | None = None, **kwargs: Any
) -> Axes:
    """Draw how coefficients `[n, S]` spread over the n vectors, a box for each label in the order of depth.

    A box holds the middle half of a column, its line is the median, whiskers reach 1.5 times the box, and points are
    what lies beyond. The dashed line is zero, a vector that is not used.

    Args:
        coefficients: Numbers, or a `fipgeo.atlas.Composition`, whose own labels are then used.
        labels: What the columns scale.
        ax: Where to draw; a new figure if None.
        **kwargs: Passed to `Axes.boxplot`.

    Returns:
        The Axes.

    Raises:
        ValueError: The coefficients have not two axes, or labels do not fit them.
    """
    values, labels = _read(coefficients, labels)
    ax = new_axes() if ax is None else check_axes(ax)
    columns = [column[np.isfinite(column)] for column in values.T]
    ax.axhline(0.0, color=GREY, linestyle="--", linewidth=0.8, zorder=0)
    line = {"color": PALETTE[1]}
    ax.boxplot(columns, **{"positions": range(len(columns)), "widths": 0.6, "medianprops": line} | kwargs)
    ax.set_xticks([])
    _label(ax, labels)
    ax.set_ylabel("coefficient")
    return ax


def _read(coefficients: Any, labels: Sequence[str] | None) -> tuple[np.ndarray, Sequence[str] | None]:
    """Numbers `[n, S]` and what their columns scale."""
    numbers = getattr(coefficients, "coefficients", coefficients)
    values = (
        numbers.detach().double().cpu().numpy() if isinstance(numbers, torch.Tensor) else np.asarray(numbers, float)
    )
    labels = getattr(coefficients, "labels", None) if labels is None else labels
    if values.ndim != 2:
        raise ValueError(f"coefficients: got shape {list(values.shape)}, expected [vectors, columns]")
    if labels is not None and len(labels) != values.shape[1]:
        raise ValueError(f"labels: got {len(labels)}, expected {values.shape[1]}")
    return values, labels


def _label(ax: Axes, labels: Sequence[str] | None) -> None:
    """Names under the columns, at most sixty of them."""
    if labels is not None:
        step = max(1, -(-len(labels) // 60))
        ax.set_xticks(range(0, len(labels), step), list(labels)[::step], rotation=90, fontsize="x-small")
