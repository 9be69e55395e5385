"""Plots of all kinds: what is left untouched; bars of layers; figures as SVG."""

import base64
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from cycler import cycler
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.patches import Rectangle

from fipgeo.grids import Grid
from fipgeo.plotting import (
    figure_svg,
    plot_coefficient_depth,
    plot_coefficients,
    plot_contours,
    plot_interference,
    plot_layer_sparsity,
    plot_metric,
    plot_path,
    plot_path_projection,
    plot_plane,
    plot_profile,
    plot_spectrum,
)

from .plots import LAYERS, blank, legend, lines, make_path, texts, x_of, y_of

DRAW = {
    "spectrum": lambda ax: plot_spectrum([3.0, 1.0, 0.0], ax=ax, held_out=[2.0, 1.0, 0.1], rank_bound=3),
    "path": lambda ax: plot_path(make_path(budget=0.1, best_step=3), axes={"drift": ax})["drift"],
    "layers": lambda ax: plot_layer_sparsity(LAYERS, ax=ax, target=0.5),
    "profile": lambda ax: plot_profile({"arc length": [0.0, 1.0], "speed": [1.0, 1.0]}, ax=ax),
    "projection": lambda ax: plot_path_projection({"path": [[0.0, 0.0], [1.0, 1.0]]}, ax=ax),
}
GRID = Grid(torch.arange(2), torch.arange(2), torch.tensor([[0.0, 1.0], [1.0, 2.0]]))
CELLS = {  # in colours of their own, whatever the cycle is
    "plane": lambda ax: plot_plane(GRID, {"path": [[0, 0], [1, 1]]}, ax=ax),
    "contours": lambda ax: plot_contours(GRID, {"learned": [0.5, 0.5]}, ax=ax),
    "coefficients": lambda ax: plot_coefficients(np.eye(2), ax=ax),
    "coefficient depth": lambda ax: plot_coefficient_depth(np.eye(3), ax=ax),
    "interference": lambda ax: plot_interference(np.eye(13), ax=ax),
    "metric": lambda ax: plot_metric(np.eye(4), {"a": 2, "b": 2}, ax=ax),
}
NEW = {
    "spectrum": lambda: plot_spectrum([3.0, 1.0, 0.0]),
    "path": lambda: plot_path(make_path()),
    "layers": lambda: plot_layer_sparsity(LAYERS),
    "plane": lambda: plot_plane(GRID),
    "metric": lambda: plot_metric(np.eye(2)),
}


@pytest.mark.parametrize("name", [*DRAW, *CELLS])
def test_only_the_given_axes_is_touched(name):
    figure, grid = plt.subplots(2, 2)
    others = [grid[0, 0], grid[1, 0], grid[1, 1]]
    before = [(ax.get_xlim(), ax.get_ylim(), ax.get_yscale(), len(ax.get_children())) for ax in others]
    current, numbers = plt.gca(), plt.get_fignums()
    assert (DRAW | CELLS)[name](grid[0, 1]) is grid[0, 1]
    figure.draw_without_rendering()
    assert grid[0, 1].has_data() or grid[0, 1].images or grid[0, 1].patches
    assert before == [(ax.get_xlim(), ax.get_ylim(), ax.get_yscale(), len(ax.get_children())) for ax in others]
    assert not any(ax.has_data() for ax in others)
    assert plt.gca() is current and plt.get_fignums() == numbers
    assert len(figure.axes) == 4


@pytest.mark.parametrize("name", NEW)
def test_global_state_is_unchanged(name, monkeypatch):
    for function in ("show", "savefig", "close", "tight_layout"):
        monkeypatch.setattr(plt, function, lambda *_, function=function, **__: pytest.fail(f"plt.{function} called"))
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    NEW[name]()
    assert dict(matplotlib.rcParams) == before and matplotlib.get_backend() == backend
    assert len(plt.get_fignums()) == 1
    assert plt.gcf().get_layout_engine() is not None
    monkeypatch.undo()


@pytest.mark.parametrize("name", DRAW)
def test_axes_are_labelled_but_own_labels_stay(name):
    ax = DRAW[name](blank())
    assert ax.get_xlabel()
    ax = blank()
    ax.set_xlabel("mine")
    assert DRAW[name](ax).get_xlabel() == "mine"


@pytest.mark.parametrize(
    "draw", [lambda ax: plot_spectrum([1.0], ax=ax), lambda ax: plot_layer_sparsity(LAYERS, ax=ax)]
)
def test_a_grid_or_figure_is_no_axes(draw):
    figure, grid = plt.subplots(2, 2)
    with pytest.raises(TypeError, match=r"ndarray came; pick one of them, e\.g\. axes\[0, 1\]"):
        draw(grid)
    with pytest.raises(TypeError, match="Figure came; pass figure.add_subplot"):
        draw(figure)


@pytest.mark.parametrize("name", DRAW)
def test_user_cycle_is_respected(name):
    with matplotlib.rc_context({"axes.prop_cycle": cycler(color=["#123456", "#654321"])}):
        ax = DRAW[name](blank())
        drawn = {to_rgb(line.get_color()) for line in ax.lines} | {to_rgb(p.get_facecolor()) for p in ax.patches}
    assert to_rgb("#123456") in drawn and to_rgb("#0072B2") not in drawn


def bars(ax: Axes) -> dict[str, Rectangle]:
    found = [patch for patch in ax.patches if (patch.get_gid() or "").startswith("fipgeo-layer:")]
    return {str(patch.get_gid()).split(":")[1]: patch for patch in found if isinstance(patch, Rectangle)}


def test_layers_bars_and_total():
    ax = plot_layer_sparsity(LAYERS, target=0.7)
    assert {name: bar.get_width() for name, bar in bars(ax).items()} == {"conv": 0.75, "bn": 0.0, "fc": 0.5}
    line = lines(ax, "fipgeo-layers-global")[0]
    assert x_of(line)[0] == pytest.approx(80 / 148)  # weighted by size, not the mean of the shares
    assert x_of(lines(ax, "fipgeo-layers-target")[0])[0] == 0.7
    assert {"all layers 54.1 %", "target 70 %", "40", "8", "100", "weights"} <= set(texts(ax))
    low, high = ax.get_ylim()
    assert low > high and bars(ax)["conv"].get_y() < bars(ax)["fc"].get_y()  # the first on top
    alpha = {name: to_rgba(bar.get_facecolor())[3] for name, bar in bars(ax).items()}
    assert alpha["bn"] < alpha["conv"] < alpha["fc"] == 1.0


def test_layers_unknown_and_empty_are_hatched():
    layers = {"a": (float("nan"), 10), "b": (0, 0), "c": (torch.tensor(5), torch.tensor(10))}
    ax = plot_layer_sparsity(layers, ax=blank())
    hatched = [patch for patch in ax.patches if patch.get_hatch()]
    assert len(hatched) == 2
    assert x_of(lines(ax, "fipgeo-layers-global")[0])[0] == 0.5
    assert not lines(plot_layer_sparsity({"a": (0, 0)}, ax=blank()), "fipgeo-layers-global")


def test_layers_overlay_uses_the_rows_of_the_first():
    ax = plot_layer_sparsity(LAYERS, ax=blank(), label="a", target=0.5)
    plot_layer_sparsity({"fc": (10, 100), "conv": (20, 40)}, ax=ax, label="b", target=0.5)
    (line,) = lines(ax, "fipgeo-layers-series")
    np.testing.assert_allclose([x_of(line), y_of(line)], [[0.1, 0.5], [2.0, 0.0]])
    assert legend(ax) == ["a", "b"]
    assert len(lines(ax, "fipgeo-layers-target")) == 1 and len(lines(ax, "fipgeo-layers-global")) == 2
    assert line.get_color() != lines(ax, "fipgeo-layers-global")[0].get_color()
    with pytest.raises(ValueError, match=r"layers \['head'\] have no row"):
        plot_layer_sparsity({"head": (1, 2)}, ax=ax)


def test_layers_long_names_share_their_pattern():
    names = [f"backbone.encoder.stages.block{i}.conv.weight" for i in range(3)]
    ax = plot_layer_sparsity({name: (1, 2) for name in names}, ax=blank())
    assert [text.get_text() for text in ax.get_yticklabels()] == ["block0", "block1", "block2"]
    assert ax.get_ylabel() == "backbone.encoder.stages.*.conv.weight"


def test_layers_names_never_look_alike():
    names = ["a" * 20 + middle + "b" * 20 for middle in "xy"]
    ax = plot_layer_sparsity({name: (1, 2) for name in names}, ax=blank())
    assert [text.get_text() for text in ax.get_yticklabels()] == names
    ax = plot_layer_sparsity({"a" * 40: (1, 2)}, ax=blank())
    assert len(ax.get_yticklabels()[0].get_text()) < 30


def test_layers_kwargs_go_to_the_bars():
    ax = plot_layer_sparsity(LAYERS, ax=blank(), color="#ff0000", height=0.5)
    assert {bar.get_height() for bar in bars(ax).values()} == {0.5}
    assert {bar.get_facecolor() for bar in bars(ax).values()} == {(1.0, 0.0, 0.0, 1.0)}


@pytest.mark.parametrize(
    "layers, kwargs, error, message",
    [
        ([("a", 1, 2)], {}, TypeError, "layers must map names to"),
        ({}, {}, ValueError, "layers is empty"),
        ({"a": 0.5}, {}, TypeError, r"layers\['a'\] must be a pair"),
        ({"a": (1, 2, 3)}, {}, TypeError, r"layers\['a'\] must be a pair"),
        ({"a": (5, 2)}, {}, ValueError, "5 zeros of 2 weights.*in this order"),
        ({"a": (-1, 2)}, {}, ValueError, "-1 zeros"),
        ({"a": (1, 2)}, {"target": 80}, ValueError, "80 % is 0.8"),
    ],
)
def test_layers_bad_input(layers, kwargs, error, message):
    with pytest.raises(error, match=message):
        plot_layer_sparsity(layers, **kwargs)
    assert not plt.get_fignums()


@pytest.mark.parametrize("name", DRAW)
@pytest.mark.usefixtures("drawn_once")
def test_svg_is_reproducible(name):
    ax = DRAW[name](blank())
    first = figure_svg(ax, "A figure")
    again, anew = figure_svg(ax, "A figure"), figure_svg(DRAW[name](blank()), "A figure")
    assert first == again, "the text depends on how often the figure was drawn"  # no diff of a long line
    assert first == anew


def test_svg_is_one_image_of_the_whole_figure():
    axes = plot_path(make_path())
    image = figure_svg(axes, 'Drift "below" 5 % & <flat>')
    assert image.startswith('<img alt="Drift &quot;below&quot; 5 % &amp; &lt;flat&gt;"') and "\n" not in image
    match = re.search(r'src="data:image/svg\+xml;base64,([^"]+)">$', image)
    assert match is not None
    svg = base64.b64decode(match[1]).decode()
    assert "<svg" in svg and "<dc:date>" not in svg and svg.count('id="axes_') == 3
    ids = re.findall(r'id="([^"]+)"', svg)
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', svg)) <= set(ids)  # what is referred to is there
    assert plt.get_fignums()  # still open


def test_svg_restores_rc_params():
    before = dict(matplotlib.rcParams)
    figure_svg(DRAW["layers"](blank()), "x")
    assert dict(matplotlib.rcParams) == before


def test_svg_bad_input():
    with pytest.raises(ValueError, match="alt must say in words"):
        figure_svg(blank(), " ")
    with pytest.raises(TypeError, match="list came; pass what the plot function returned"):
        figure_svg([blank()], "x")  # type: ignore[arg-type]
