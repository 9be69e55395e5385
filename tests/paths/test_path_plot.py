"""What the figure of a real path shows: its bands, its legs, its layers."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fipgeo import Sparsity
from fipgeo.plotting import plot_layer_sparsity

from .test_legs import leg, task
from .toys import inputs, mlp, sparse_path


def band(ax: Any, gid: str) -> np.ndarray:
    """The corners of the only band of a kind."""
    (found,) = [c for c in ax.collections if c.get_gid() == gid]
    return np.concatenate([path.vertices for path in found.get_paths()])


def test_the_interval_of_every_point_is_a_band() -> None:
    path = sparse_path(mlp(0), inputs(1, 60), 0.5)
    axes = path.plot()
    assert list(axes) == ["drift", "changed", "sparsity"]
    corners = {tuple(np.round(v, 12)) for v in band(axes["drift"], "fipgeo-path-interval")}
    for p in path:
        assert p.certificate is not None
        for end in (p.certificate.drift_low, p.certificate.drift_high):
            assert tuple(np.round([p.arc_length, end], 12)) in corners
    upper = band(axes["changed"], "fipgeo-path-bound")[:, 1].max()
    assert upper == pytest.approx(max(p.changed_upper for p in path))


def test_legs_are_marked_and_the_last_objective_has_a_panel() -> None:
    both = leg(task(), mlp(0), after=leg(Sparsity(0.5, samples=2), mlp(0)))
    axes = both.plot()
    assert list(axes) == ["drift", "changed", "sparsity", "objective"]
    joint = both[both.legs[1].begin]
    for ax in axes.values():
        (line,) = [one for one in ax.lines if one.get_gid() == "fipgeo-path-leg"]
        assert line.get_xdata()[0] == joint.arc_length
    (series,) = [one for one in axes["objective"].lines if one.get_gid() == "fipgeo-path-values"]
    known = np.isfinite(series.get_ydata())
    assert known.tolist() == [p.step > joint.step for p in both]


def test_the_layers_of_a_point_can_be_drawn() -> None:
    path = sparse_path(mlp(0), inputs(1, 40), 0.5)
    ax = plot_layer_sparsity(path[-1].layer_sparsity(), ax=Figure().subplots(), target=0.5)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["0.weight", "2.weight"]
