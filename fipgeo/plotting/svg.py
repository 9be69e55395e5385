"""Figures as reproducible inline images for documentation and notebooks."""

import base64
import html
import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

_MAX_DRAWINGS = 4
_SMALLEST = 0.55  # of its natural width: below, a narrow page scrolls instead of shrinking letters further
_HASH = r"\b[a-z][0-9a-f]{10}\b"  # clip paths p..., markers m..., hatches h...
_HASHED_ID = re.compile(rf'id="({_HASH})"')


def figure_svg(ax_or_fig: Axes | Figure | Mapping[str, Axes], alt: str) -> str:
    """Write a figure as one ``<img>`` element with an SVG data URI.

    Equal figures give equal text: ids are numbered in order of appearance and no date is written. As an image
    of its own, each figure keeps its ids to itself, so that several can stand on one page. The figure stays
    open; only its layout is settled, as by any drawing.

    Args:
        ax_or_fig: A figure, any Axes on it, or the mapping that `plot_path` returns.
        alt: What the figure shows, in a sentence, for readers who cannot see it.

    Returns:
        ``<img alt="..." src="data:image/svg+xml;base64,...">`` without line breaks.

    Raises:
        TypeError: If there is no figure in ``ax_or_fig``.
        ValueError: If ``alt`` is empty.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = Figure().subplots()
        >>> figure_svg(ax, "An empty frame")[:45]
        '<img alt="An empty frame" style="max-width: 1'
    """
    if not isinstance(alt, str) or not alt.strip():
        raise ValueError(f"alt must say in words what the figure shows, but {alt!r} came")
    figure = _root_figure(ax_or_fig)
    # A layout engine starts from the positions of the last drawing: draw until it changes nothing, or the
    # text would depend on how often the figure was drawn before.
    image, last = _render(figure), b""
    for _ in range(_MAX_DRAWINGS):
        if image == last or figure.get_layout_engine() is None:
            break
        image, last = _render(figure), image
    data = base64.b64encode(image).decode("ascii")
    smallest = round(_SMALLEST * 96 * figure.get_figwidth())
    style = f"max-width: 100%; min-width: {smallest}px"
    return f'<img alt="{html.escape(alt)}" style="{style}" src="data:image/svg+xml;base64,{data}">'


def _render(figure: Figure) -> bytes:
    """Draw once, with the ids numbered in order: matplotlib hashes them from coordinates to the last bit."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fipgeo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue().decode()
    place = {name: f"f{i}" for i, name in enumerate(dict.fromkeys(_HASHED_ID.findall(text)))}
    return re.sub(_HASH, lambda match: place.get(match[0], match[0]), text).encode()


def _root_figure(source: Any) -> Figure:
    if isinstance(source, Mapping) and source:
        source = next(iter(source.values()))
    if isinstance(source, (Axes, SubFigure)):
        source = source.get_figure(root=True)
    if not isinstance(source, Figure):
        raise TypeError(
            f"ax_or_fig must be a matplotlib Axes or Figure, but a {type(source).__name__} came; "
            "pass what the plot function returned"
        )
    return source
