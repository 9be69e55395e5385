"""The plot of numbers along a curve."""

import pytest
import torch

from fipgeo.plotting import ProfileRecord, plot_profile

from .plots import blank, draw, legend, lines, x_of, y_of


class Stub:
    def profile(self) -> dict[str, torch.Tensor]:
        t = torch.linspace(0, 1, 5)
        return {"position": t, "drift": t * (1 - t), "drift of the straight line": 3 * t * (1 - t)}


def test_every_series_is_a_line_and_records_overlay() -> None:
    record, ax = Stub(), blank()
    assert isinstance(record, ProfileRecord)
    assert plot_profile(record, ax=ax) is ax and ax.get_xlabel() == "position"
    plot_profile(record, ax=ax, label="again", linestyle=":")
    found = lines(ax, "fipgeo-profile")
    assert legend(ax) == [
        "drift", "drift of the straight line", "again: drift", "again: drift of the straight line",
    ]  # fmt: skip
    assert len({line.get_color() for line in found}) == 4
    assert x_of(found[0]).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert y_of(found[1]).tolist() == pytest.approx([0, 0.5625, 0.75, 0.5625, 0])
    draw(ax)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="one length"):
        plot_profile({"x": [0.0, 1.0], "y": [0.0]}, ax=blank())
    with pytest.raises(ValueError, match="two or more"):
        plot_profile({"x": [0.0, 1.0]}, ax=blank())
    with pytest.raises(TypeError, match="profile"):
        plot_profile([1.0], ax=blank())
