"""Plots over two coordinates, curves in a plane, square matrices; and the numbers that they draw."""

import copy
from types import SimpleNamespace as Record
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import LogNorm, SymLogNorm
from torch import nn

import fipgeo
from fipgeo.between import Plane, project
from fipgeo.grids import Grid
from fipgeo.plotting import (
    GridRecord,
    plot_coefficients,
    plot_contours,
    plot_interference,
    plot_metric,
    plot_path_projection,
    plot_plane,
)

from .plots import blank, draw, legend, lines, texts, x_of, y_of

AXIS = torch.linspace(-1, 2, 7)


def bowl(name: str = "loss") -> Grid:
    return Grid.of(lambda a, b: (a - 1) ** 2 + (b - 0.5) ** 2, AXIS, AXIS, name)


def contours(ax: Any, gid: str = "fipgeo-contours-filled") -> Any:
    return [found for found in ax.get_children() if found.get_gid() == gid][0]


def test_a_grid_is_measured_once_everywhere_and_knows_its_least() -> None:
    calls = []
    grid = Grid.of(lambda a, b: calls.append((a, b)) or a + 10 * b, [0, 1, 2], [3, 4])
    assert len(calls) == 6 and grid.values.tolist() == [[30, 31, 32], [40, 41, 42]]
    assert grid.least == (0.0, 3.0) and isinstance(grid, GridRecord)
    holes = Grid(grid.x, grid.y, grid.values.where(grid.values > 30, torch.nan))
    assert holes.least == (1.0, 3.0)
    for x, values, match in (([0, 1], [[1, 2]], "shapes"), ([1, 1], [[1, 2], [3, 4]], "x: got")):
        with pytest.raises(ValueError, match=match):
            Grid(torch.tensor(x), torch.tensor([0, 1]), torch.tensor(values))


def test_contours_have_levels_spaced_by_what_is_there() -> None:
    even, factors = blank(), blank()
    assert plot_contours(bowl(), ax=even) is even and even.get_title() == "loss"
    assert np.ptp(np.diff(contours(even).levels)) < 1e-12
    wide = Grid(AXIS, AXIS, 10 ** (4 * torch.rand(7, 7, generator=torch.Generator().manual_seed(0))))
    plot_contours(wide, ax=factors)
    levels = contours(factors).levels
    assert isinstance(contours(factors).norm, LogNorm)
    assert levels[1] / levels[0] == pytest.approx(levels[-1] / levels[-2])
    near = plot_contours(Grid(AXIS, AXIS, 1.6 + bowl().values / 50), ax=blank())
    said = [text.get_text() for text in near.texts]
    assert len(set(said)) > 4  # digits enough to tell the levels apart
    plot_contours(Grid(AXIS[:2], AXIS[:2], torch.ones(2, 2)), ax=(flat := blank()))  # one value everywhere
    draw(flat)


def test_points_ray_and_holes_of_contours() -> None:
    grid = Grid(AXIS, AXIS, bowl().values.where(AXIS > -1, torch.nan))
    ax = plot_contours(grid, {"learned": torch.tensor([1.0, 0.5]), "way": [[0, 0], [1, 0.5]]}, ax=blank())
    assert legend(ax) == ["equal coefficients", "learned", "way"]
    assert ax.get_xlabel() == "first coefficient"
    point, way = lines(ax, "fipgeo-plane-point")
    assert (x_of(point).tolist(), y_of(point).tolist()) == ([1.0], [0.5]) and y_of(way).tolist() == [0, 0.5]
    assert [patch for patch in ax.patches if patch.get_hatch()]
    assert ax.get_xlim() == pytest.approx((-1, 2))
    draw(ax)
    with pytest.raises(ValueError, match="contours already"):
        plot_contours(grid, ax=ax)
    assert not legend(bowl().plot(ax=blank(), ray=False))


def test_a_plane_has_one_scale_and_its_curves_on_top() -> None:
    ax = plot_plane(bowl(), {"there": [[0, 0], [1, 1], [2, 0.5]]}, ax=blank(), levels=[0, 1, 2])
    assert ax.get_aspect() == 1 and contours(ax).levels.tolist() == [0, 1, 2]
    assert "weight units" in ax.get_xlabel() and legend(ax) == ["there"]
    assert x_of(lines(ax, "fipgeo-plane-curve")[0]).tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="one point"):
        plot_plane(bowl(), {"bad": torch.zeros(2, 3)}, ax=blank())
    with pytest.raises(TypeError, match="must have .x, .y and .values"):
        plot_plane([[1.0]], ax=blank())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no finite"):
        plot_plane(Grid(AXIS, AXIS, torch.full((7, 7), torch.nan)), ax=blank())


def test_projected_curves_name_their_variance() -> None:
    curves = {"path": torch.tensor([[0.0, 0.0], [1.0, 2.0]]), "line": [[0, 0], [2, 2]]}
    ax = plot_path_projection(Record(curves=curves, explained=torch.tensor([0.7, 0.2])), ax=blank())
    assert "70 % of the variance" in ax.get_xlabel() and "20 % of the variance" in ax.get_ylabel()
    found = lines(ax, "fipgeo-plane-series")
    assert [line.get_label() for line in found] == ["path", "line"] == legend(ax)
    assert y_of(found[0]).tolist() == [0, 2] and len({line.get_color() for line in found}) == 2
    plot_path_projection(curves, ax=ax, label="again")
    assert legend(ax)[2:] == ["again: path", "again: line"]
    draw(ax)
    for bad, kind in (({}, TypeError), ({"a": [[1.0]]}, ValueError)):
        with pytest.raises(kind):
            plot_path_projection(bad, ax=blank())


def test_interference_is_annotated_while_there_is_room() -> None:
    ax = plot_interference([[1.0, -0.5], [-0.5, 1.0]], ["left", "right"], ax=blank())
    assert texts(ax) == ["1.00", "-0.50", "-0.50", "1.00"] and ax.images[0].get_clim() == (-1, 1)
    assert [text.get_text() for text in ax.get_yticklabels()] == ["left", "right"]
    large = plot_interference(torch.eye(13), ax=blank())
    assert not texts(large) and len(large.child_axes) == 1
    draw(large)
    with pytest.raises(ValueError, match="already"):
        plot_interference(torch.eye(2), ax=ax)
    for bad, names in ((torch.zeros(2, 3), None), (torch.eye(2), ["one"])):
        with pytest.raises(ValueError, match="square|one a row"):
            plot_interference(bad, names, ax=blank())


def test_metric_image_has_a_line_between_tensors() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    space = fipgeo.WeightSpace.of(net)
    dense = fipgeo.metric(net, torch.eye(4)).operator.to_dense()
    ax = plot_metric(dense, space, ax=blank())
    image = ax.images[0]
    assert isinstance(image.norm, SymLogNorm) and np.array_equal(np.asarray(image.get_array()), dense.numpy())
    assert sorted({y_of(line)[0] for line in lines(ax, "fipgeo-matrix-border")} - {0.0}) == [11.5, 14.5, 20.5]
    assert [text.get_text() for text in ax.get_yticklabels()] == list(space.names)
    assert ax.child_axes and ax.figure.axes == [ax]
    draw(ax)
    plain = plot_metric(dense, ax=blank(), vmin=0, vmax=1)
    assert plain.images[0].get_clim() == (0, 1) and plain.get_xlabel() == "weight"
    with pytest.raises(ValueError, match="add up to 3, but the matrix has 23"):
        plot_metric(dense, {"a": 3}, ax=blank())


def test_the_colours_of_coefficients_are_part_of_their_axes() -> None:
    ax = plot_coefficients(torch.ones(2, 3), ["a", "b", "c"], ax=blank())
    assert ax.figure.axes == [ax] and len(ax.child_axes) == 1
    draw(ax)


@given(seed=st.integers(0, 2**20), n=st.integers(3, 8))
@settings(max_examples=6)
def test_principal_planes_are_those_of_the_singular_vectors(seed: int, n: int) -> None:
    points = torch.randn(n, 11, generator=torch.Generator().manual_seed(seed))
    plane = Plane.principal(points)
    torch.testing.assert_close(plane.axes @ plane.axes.T, torch.eye(2))
    _, values, vectors = torch.linalg.svd(points - points.mean(0), full_matrices=False)
    torch.testing.assert_close(plane.coordinates(points).square().sum(0), values[:2].square())
    torch.testing.assert_close(plane.axes.T @ plane.axes, vectors[:2].T @ vectors[:2], atol=1e-6, rtol=1e-6)
    there = torch.randn(5, 2, generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(plane.coordinates(plane.weights(there)), there)
    assert bool((plane.coordinates(points)[-1] >= plane.coordinates(points)[0]).all())


def test_planes_through_networks_measure_those_networks() -> None:
    nets = [nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)) for _ in range(3)]
    space = fipgeo.WeightSpace.of(nets[0], "*")
    corners = torch.stack([space.point(net) for net in nets])
    plane = Plane.through(corners)
    places = plane.coordinates(corners)
    assert places[0].tolist() == [0, 0] and float(places[1, 1].abs()) < 1e-12
    x = torch.randn(6, 3)
    before = copy.deepcopy(nets[0].state_dict())
    grid = plane.scan(nets[0], lambda net: net(x).sum(), places[:2], num=3, margin=0)
    assert float(grid.values[0, 0]) == pytest.approx(float(nets[0](x).sum().detach()))
    assert float(grid.values[0, -1]) == pytest.approx(float(nets[1](x).sum().detach()))
    assert all(torch.equal(t, before[name]) for name, t in nets[0].state_dict().items())
    for bad in (corners[:2], torch.stack([corners[0], corners[1], 2 * corners[1] - corners[0]])):
        with pytest.raises(ValueError, match="points"):
            Plane.through(bad)
        with pytest.raises(ValueError, match="points"):
            Plane.principal(bad)
    for seed in range(20):  # what is left beside a line by rounding is no direction
        start, way = torch.randn(2, 26, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with pytest.raises(ValueError, match="points"):
            Plane.principal(torch.stack([start + t * way for t in (0.0, 0.3, 1.7, 2.9)]))
    with pytest.raises(ValueError, match="around"):
        plane.scan(nets[0], lambda net: 0, places[0])


def test_every_kind_of_curve_is_projected() -> None:
    a, b = (nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)) for _ in range(2))
    x = torch.randn(40, 3)
    path = fipgeo.sparsify(a, x, 0.5, params="0.*", corrector="layer-local")
    way = fipgeo.connect(a, b, x, steps=2)
    geodesic = fipgeo.geodesic(fipgeo.MetricField(a, x), None, torch.ones(38), 0.1, damping=0.1)
    space = fipgeo.WeightSpace.of(a, "*")
    ends = torch.stack([space.point(a), space.point(b)])
    found = project(a, {"path": path, "way": way, "geodesic": geodesic, "nets": [a, b], "flat": ends})
    assert [len(curve) for curve in found.curves.values()] == [len(path), 5, len(geodesic), 2, 2]
    start = found.plane.coordinates(space.point(a))
    for curve in found.curves.values():
        torch.testing.assert_close(curve[0], start)
    end = path[-1].apply_(copy.deepcopy(a))
    torch.testing.assert_close(found.curves["path"][-1], found.plane.coordinates(space.point(end)))
    assert 0 < float(found.explained[1]) <= float(found.explained[0]) <= 1
    assert legend(found.plot(ax=blank())) == list(found.curves)
    with pytest.raises(TypeError, match="expected a PathResult"):
        project(a, {"one": a})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="got none"):
        project(a, {})
