"""The coefficients of a composition as a picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes

from fipgeo.plotting._common import check_axes, colour_scale, new_axes


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
    numbers = getattr(coefficients, "coefficients", coefficients)
    values = (
        numbers.detach().double().cpu().numpy() if isinstance(numbers, torch.Tensor) else np.asarray(numbers, float)
    )
    labels = getattr(coefficients, "labels", None) if labels is None else labels
    if values.ndim != 2:
        raise ValueError(f"coefficients: got shape {list(values.shape)}, expected [vectors, columns]")
    for argument, given, count in (("labels", labels, values.shape[1]), ("names", names, values.shape[0])):
        if given is not None and len(given) != count:
            raise ValueError(f"{argument}: got {len(given)}, expected {count}")
    ax = new_axes() if ax is None else check_axes(ax)
    finite = np.abs(values[np.isfinite(values)])
    most = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    image = ax.imshow(values, **{"cmap": "RdBu", "vmin": -most, "vmax": most, "aspect": "auto"} | kwargs)
    ax.set_yticks(range(values.shape[0]), [str(i) for i in range(values.shape[0])] if names is None else list(names))
    if labels is not None:
        step = max(1, -(-len(labels) // 60))
        ax.set_xticks(range(0, len(labels), step), list(labels)[::step], rotation=90, fontsize="x-small")
    ax.set_ylabel("task vector")
    colour_scale(ax, image, "coefficient")
    return ax
