"""Plots of paths: what the artists hold, and what bad input is told."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.patches import Rectangle

from fipgeo.plotting import plot_path

from .plots import PathStub, blank, draw, legend, lines, make_path, texts, x_of, y_of


def test_path_panels_hold_the_columns():
    path = make_path(budget=0.2, best_step=4)
    axes = plot_path(path)
    assert list(axes) == ["drift", "changed", "objective"]
    for panel, ax in axes.items():
        line = lines(ax, "fipgeo-path-values")[0]
        np.testing.assert_allclose(x_of(line), [point.arc_length for point in path.points])
        np.testing.assert_allclose(y_of(line), [getattr(point, panel) for point in path.points])
        star = lines(ax, "fipgeo-path-best")[0]
        assert (x_of(star)[0], y_of(star)[0]) == (2.0, getattr(path.points[4], panel))
    assert axes["objective"].get_ylabel() == "new-task loss"
    assert "arc length" in axes["objective"].get_xlabel() and not axes["drift"].get_xlabel()
    assert axes["drift"].get_shared_x_axes().joined(axes["drift"], axes["objective"])
    assert axes["drift"].get_ylim()[0] == 0 and axes["changed"].get_ylim()[0] == 0
    assert legend(axes["objective"]) == ["best point (step 4)"] and not legend(axes["drift"])


def test_path_shows_sparsity_where_there_is_some():
    path = make_path(sparse=True)
    assert list(plot_path(path)) == ["drift", "changed", "sparsity"]
    for point in path.points:  # zeros that were there before are not what was won
        point.sparsity = 0.3
    assert list(plot_path(path)) == ["drift", "changed", "objective"]


def test_path_shades_the_budget_once_for_each_value():
    axes = plot_path(make_path(budget=0.3))
    for budget in (0.3, 0.4, None):
        plot_path(make_path(budget=budget), axes=axes)
    ax = axes["drift"]
    spans = [patch for patch in ax.patches if patch.get_gid() == "fipgeo-path-budget"]
    assert len(spans) == 1 and isinstance(spans[0], Rectangle)
    np.testing.assert_allclose((spans[0].get_y(), spans[0].get_height()), (0.0, 0.3))
    assert [y_of(line)[0] for line in lines(ax, "fipgeo-path-budget")] == [0.3, 0.4]
    assert texts(ax) == ["budget 0.3", "budget 0.4"]
    assert ax.get_ylim()[1] > 0.4


def test_path_band_reaches_the_upper_bound():
    path = make_path()
    path.points[2].changed_upper = None
    ax = plot_path(path)["changed"]
    band = next(child for child in ax.collections if isinstance(child, PolyCollection))
    corners = np.concatenate([poly.vertices for poly in band.get_paths()])
    assert corners[:, 1].max() == pytest.approx(path.points[-1].changed_upper)
    assert len(band.get_paths()) == 2  # a gap where the bound is not known
    assert legend(ax) == ["up to the upper bound"]


def test_path_rejected_points_stand_beside_the_line():
    path = make_path()
    path.points[3].accepted = False
    for panel, ax in plot_path(path).items():
        assert 1.5 not in x_of(lines(ax, "fipgeo-path-values")[0])
        other = lines(ax, "fipgeo-path-rejected")[0]
        np.testing.assert_allclose([x_of(other), y_of(other)], [[1.5], [getattr(path.points[3], panel)]])
        assert other.get_markerfacecolor() == "none"


def test_path_overlay_names_each_thing_once():
    axes = plot_path(make_path(best_step=1), label="a")
    for label in "bc":
        assert plot_path(make_path(5, best_step=2), axes=axes, label=label) == axes
    assert legend(axes["drift"]) == ["a", "b", "c"]
    assert legend(axes["changed"]) == ["up to the upper bound"]
    assert legend(axes["objective"]) == ["best points"]
    series = lines(axes["drift"], "fipgeo-path-values")
    assert len({line.get_color() for line in series}) == len({str(line.get_marker()) for line in series}) == 3


def test_path_takes_a_row_of_axes_or_some_panels():
    grid = plt.subplots(1, 3)[1]
    axes = plot_path(make_path(), axes=grid)
    assert [axes[name] for name in ("drift", "changed", "objective")] == list(grid)
    assert all(ax.get_xlabel() for ax in grid)
    ax = blank()
    only = plot_path(make_path(), axes={"objective": ax}, label="a", color="k", lw=3)
    assert only == {"objective": ax} and legend(ax) == ["a"]
    assert lines(ax, "fipgeo-path-values")[0].get_linewidth() == 3


def test_path_without_numbers_says_so():
    path = make_path()
    for point in path.points:
        point.changed = None
    ax = plot_path(path)["changed"]
    assert texts(ax) == ["changed: not recorded"]
    assert np.isnan(y_of(lines(ax, "fipgeo-path-values")[0])).all()


@pytest.mark.parametrize("error", [LookupError("none"), ValueError("none")])
def test_path_without_a_best_point_has_no_star(error):
    axes = plot_path(make_path(error=error))
    assert not any(lines(ax, "fipgeo-path-best") for ax in axes.values())


def test_path_best_can_be_given():
    path = make_path(best_step=1)
    assert x_of(lines(plot_path(path, best=3)["drift"], "fipgeo-path-best")[0])[0] == 1.5
    assert x_of(lines(plot_path(path, best=path.points[2])["drift"], "fipgeo-path-best")[0])[0] == 1.0


@pytest.mark.parametrize("num", [1, 2])
def test_short_path(num):
    draw(plot_path(make_path(num, budget=0.1, best_step=0))["drift"])  # without a warning


def test_path_accepts_tensors_in_points():
    path = make_path()
    for point in path.points:
        point.drift = torch.tensor(point.drift, requires_grad=True)  # type: ignore[assignment]
    assert y_of(lines(plot_path(path)["drift"], "fipgeo-path-values")[0])[2] == pytest.approx(0.04)


@pytest.mark.parametrize(
    "path, kwargs, error, message",
    [
        ([1.0], {}, TypeError, "list came; pass a PathResult"),
        (PathStub([]), {}, ValueError, "path.points is empty"),
        (make_path(), {"axes": {"loss": None}}, ValueError, r"\['loss'\] came"),
        (make_path(), {"axes": {}}, ValueError, "must name some of the panels"),
        (make_path(), {"axes": {"drift": 3}}, TypeError, r"axes\['drift'\] must be a matplotlib Axes"),
        (make_path(), {"axes": [blank()]}, ValueError, "axes has 1 entries for the 3 panels"),
        (make_path(), {"axes": blank()}, TypeError, "a single one came"),
        (make_path(), {"best": 99}, ValueError, "best is step 99, but the path has the steps 0 to 5"),
    ],
)
def test_path_bad_input(path, kwargs, error, message):
    with pytest.raises(error, match=message):
        plot_path(path, **kwargs)
    assert not plt.get_fignums()
