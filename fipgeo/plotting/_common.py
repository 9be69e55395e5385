"""What the plots share: reading numbers, finding the Axes, the look of a series."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cbook import normalize_kwargs
from matplotlib.colorbar import Colorbar
from matplotlib.lines import Line2D

from fipgeo.plotting._notes import artists

# Okabe and Ito (2008), "Color universal design", without yellow, which is too pale for lines on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "0.5"  # readable on light and dark backgrounds alike


def as_numpy(values: Any, name: str) -> np.ndarray:
    """Copy a sequence of real numbers into a one-dimensional float64 array.

    Tensors of any floating or integer dtype, device and ``requires_grad`` are taken, and lists of such
    scalars. ``None`` entries become NaN.
    """
    if isinstance(values, torch.Tensor):
        if values.is_complex():
            raise TypeError(_complex_message(name, str(values.dtype)))
        array = values.detach().cpu().to(torch.float64).numpy().copy()
    else:
        if isinstance(values, (list, tuple)):
            values = [_scalar(value) for value in values]
        array = np.asarray(values)
        if np.iscomplexobj(array):
            raise TypeError(_complex_message(name, str(array.dtype)))
        try:
            array = np.array(array, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must hold real numbers (a tensor, an array or a list), "
                f"but a {type(values).__name__} came that numpy cannot read as float64: {error}"
            ) from error
    if array.ndim != 1:
        raise ValueError(
            f"{name} must be one-dimensional, but shape {array.shape} came; "
            "flatten it with .ravel(), or call once for each row with the same ax to overlay the rows"
        )
    if array.size == 0:
        raise ValueError(f"{name} is empty; at least one value is needed to draw")
    return array


def _scalar(value: Any) -> Any:
    if value is None:
        return math.nan
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        return value.detach().item()
    return value


def _complex_message(name: str, dtype: str) -> str:
    return (
        f"{name} must be real, but dtype {dtype} came; a symmetric operator has real eigenvalues: "
        f"use eigvalsh, or pass {name}.real"
    )


def float_eps(values: Any) -> float:
    """Machine epsilon of the floating dtype that the values came in (float64 for lists and integers)."""
    if isinstance(values, torch.Tensor):
        return torch.finfo(values.dtype).eps if values.dtype.is_floating_point else float(np.finfo(float).eps)
    dtype = getattr(values, "dtype", None)
    if isinstance(dtype, np.dtype) and np.issubdtype(dtype, np.floating):
        return float(np.finfo(dtype).eps)
    return float(np.finfo(float).eps)


def check_axes(ax: Any, name: str = "ax") -> Axes:
    """Return ``ax`` if it is one Axes, else say what came and what to pass."""
    if isinstance(ax, Axes):
        return ax
    remedy = "pass one Axes, e.g. the second value of plt.subplots()"
    if isinstance(ax, (np.ndarray, list, tuple, Mapping)):
        remedy = "pick one of them, e.g. axes[0, 1]"
    elif hasattr(ax, "add_subplot"):
        remedy = "pass figure.add_subplot() or one of figure.axes"
    raise TypeError(f"{name} must be a matplotlib Axes, but a {type(ax).__name__} came; {remedy}")


def new_axes(figsize: tuple[float, float] | None = None) -> Axes:
    """One Axes on a new figure with constrained layout."""
    import matplotlib.pyplot as plt

    return plt.subplots(layout="constrained", figsize=figsize)[1]


def series_style(ax: Axes, gid: str, kwargs: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Line properties of the next series: the caller's, else those of the next place."""
    place = len(artists(ax, gid))
    style = {"marker": MARKERS[place % len(MARKERS)], "gid": gid, **defaults}
    if default_cycle():
        style["color"] = PALETTE[place % len(PALETTE)]
    return {**style, **normalize_kwargs(dict(kwargs), Line2D)}


def default_cycle() -> bool:
    """Whether the property cycle is the one that matplotlib ships."""
    return matplotlib.rcParams["axes.prop_cycle"] == matplotlib.rcParamsDefault["axes.prop_cycle"]


def label_axes(ax: Axes, x: str | None, y: str | None) -> None:
    """Name the axes that have no name yet."""
    if x is not None and not ax.get_xlabel():
        ax.set_xlabel(x)
    if y is not None and not ax.get_ylabel():
        ax.set_ylabel(y)


def scientific(value: float) -> str:
    r"""A positive number with two digits, as mathtext where powers of ten help.

    Examples:
        >>> scientific(0.05), scientific(1.1e-13)
        ('0.05', '$1.1\\times10^{-13}$')
    """
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.2g}" if abs(value) < 100 else f"{value:.0f}"
    mantissa, exponent = f"{value:.1e}".split("e")
    power = f"10^{{{int(exponent)}}}"
    return f"${power}$" if mantissa == "1.0" else rf"${mantissa}\times{power}$"


def refresh_legend(ax: Axes, handles: Sequence[Any] | None = None, **kwargs: Any) -> None:
    """Draw the legend anew if there is anything to name."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        look = {"fontsize": "small", "frameon": True, "framealpha": 0.85, "edgecolor": "none"}
        ax.legend(handles=handles, **{**look, "borderpad": 0.3, "handlelength": 1.6, **kwargs})


def colour_scale(ax: Axes, image: Any, label: str) -> Colorbar:
    """A colour bar right of an Axes, as a part of it: no Axes of the figure is added or made narrower."""
    figure = ax.get_figure()
    assert figure is not None
    return figure.colorbar(image, cax=ax.inset_axes((1.02, 0.0, 0.03, 1.0)), label=label)


def new_stack(rows: int) -> list[Axes]:
    """Axes in one column on a new figure, with one x-axis for all and their labels in line."""
    import matplotlib.pyplot as plt

    width, height = matplotlib.rcParams["figure.figsize"]
    row = max(0.42 * height, 14 * matplotlib.rcParams["font.size"] / 72)
    size = (width, row * rows)
    figure, grid = plt.subplots(rows, 1, sharex=True, squeeze=False, layout="constrained", figsize=size)
    column = list(grid[:, 0])
    figure.align_ylabels(column)
    return column
