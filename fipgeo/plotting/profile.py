"""Numbers along a curve: speeds of a geodesic, drift between two networks."""

from typing import Any, Protocol, runtime_checkable

from matplotlib.axes import Axes

from fipgeo.plotting._common import as_numpy, check_axes, label_axes, new_axes, refresh_legend, series_style

_SERIES = "fipgeo-profile"


@runtime_checkable
class ProfileRecord(Protocol):
    """What `plot_profile` reads: named numbers along a curve, `[n]` each, those of the horizontal axis first."""

    def profile(self) -> Any:
        """A mapping from names to numbers."""


def plot_profile(
    record: ProfileRecord | Any, *, ax: Axes | None = None, label: str | None = None, **kwargs: Any
) -> Axes:
    """Draw what a record measured along a curve, one line for each of its series.

    Args:
        record: A `Geodesic` or a `Connection`, or a mapping as their `profile()` gives it.
        ax: Where to draw; None makes a new figure. Further records on the same Axes take the next colours.
        label: Put before the names in the legend, to tell several records apart.
        **kwargs: Properties of the lines (`matplotlib.lines.Line2D`).

    Returns:
        The Axes drawn on.

    Raises:
        TypeError: If ``ax`` is not one Axes, or the record has no profile.
        ValueError: If there is no series, or the lengths of the series differ.

    Examples:
        >>> from matplotlib.figure import Figure
        >>> ax = plot_profile({"arc length": [0.0, 1.0], "speed": [1.0, 1.0]}, ax=Figure().subplots())
        >>> ax.get_xlabel(), ax.get_ylabel(), [line.get_label() for line in ax.lines]
        ('arc length', 'speed', ['speed'])
    """
    profile = record.profile() if isinstance(record, ProfileRecord) else record
    if not hasattr(profile, "items"):
        raise TypeError(f"record must have a profile or be a mapping, but a {type(record).__name__} came")
    numbers = {name: as_numpy(values, name) for name, values in profile.items()}
    if len(numbers) < 2 or len({len(values) for values in numbers.values()}) > 1:
        sizes = ", ".join(f"{name} [{len(values)}]" for name, values in numbers.items())
        raise ValueError(f"record must hold two or more series of one length, but it holds: {sizes or 'none'}")
    ax = new_axes() if ax is None else check_axes(ax)
    (x_name, x), *series = numbers.items()
    for name, values in series:
        title = name if label is None else f"{label}: {name}"
        ax.plot(x, values, **series_style(ax, _SERIES, kwargs, {"markersize": 3, "label": title}))
    names = [name for name, _ in series]
    label_axes(ax, x_name, next((n for n in names if all(m.startswith(n) for m in names)), None))  # speed, speed of ...
    refresh_legend(ax)
    return ax
