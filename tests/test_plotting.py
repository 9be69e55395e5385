"""Plots: what the artists hold, what is left untouched, and what bad input is told."""

import base64
import re
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from cycler import cycler  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402
from matplotlib.collections import PolyCollection  # noqa: E402
from matplotlib.colors import to_rgb, to_rgba  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from fipgeo.plotting import figure_svg, plot_layer_sparsity, plot_path, plot_spectrum  # noqa: E402


@dataclass
class SpectrumStub:
    values: Any
    rank_bound: int | None = None
    held_out: Any = None
    captured: float | None = None
    complete: bool = False
    num_doubtful: int = 0

    def tolerance(self) -> float:
        return 1e-4

    def rank(self, tol: float | None = None) -> int:
        assert tol is None
        return sum(float(value) > 1e-4 for value in self.values) - self.num_doubtful


@dataclass
class PointStub:
    step: int
    arc_length: float
    drift: float
    changed: float | None = 0.0
    changed_upper: float | None = 0.01
    objective: float | None = 1.0
    sparsity: float | None = None
    accepted: bool = True


@dataclass
class PathStub:
    points: list[PointStub]
    budget: float | None = None
    objective_name: str = "new-task loss"
    best_step: int | None = None
    error: Exception | None = field(default=None)

    def best(self, max_changed: float | None = None) -> PointStub | None:
        if self.error is not None:
            raise self.error
        return None if self.best_step is None else self.points[self.best_step]


def make_path(num: int = 6, *, sparse: bool = False, **kwargs: Any) -> PathStub:
    points = [
        PointStub(i, 0.5 * i, 0.01 * i**2, 0.002 * i, 0.002 * i + 0.01, 2.0 - 0.1 * i, 0.1 * i if sparse else None)
        for i in range(num)
    ]
    return PathStub(points, **kwargs)


LAYERS = {"conv": (30, 40), "bn": (0, 8), "fc": (50, 100)}
DRAW = {
    "spectrum": lambda ax: plot_spectrum([3.0, 1.0, 0.0], ax=ax, held_out=[2.0, 1.0, 0.1], rank_bound=3),
    "path": lambda ax: plot_path(make_path(budget=0.1, best_step=3), axes={"drift": ax})["drift"],
    "layers": lambda ax: plot_layer_sparsity(LAYERS, ax=ax, target=0.5),
}
NEW = {
    "spectrum": lambda: plot_spectrum([3.0, 1.0, 0.0]),
    "path": lambda: plot_path(make_path()),
    "layers": lambda: plot_layer_sparsity(LAYERS),
}


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def blank() -> Axes:
    return Figure(layout="constrained").subplots()


def draw(ax: Axes) -> None:
    figure = ax.get_figure(root=True)
    assert figure is not None
    figure.draw_without_rendering()


def lines(ax: Axes, gid: str) -> list[Line2D]:
    return [line for line in ax.lines if line.get_gid() == gid]


def texts(ax: Axes) -> list[str]:
    return [text.get_text() for text in ax.texts]


def legend(ax: Axes) -> list[str]:
    box = ax.get_legend()
    return [] if box is None else [text.get_text() for text in box.get_texts()]


def y_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_ydata(), dtype=float)


def x_of(line: Line2D) -> np.ndarray:
    return np.asarray(line.get_xdata(), dtype=float)


# --- the rules that hold for every plot


@pytest.mark.parametrize("name", DRAW)
def test_only_the_given_axes_is_touched(name):
    figure, grid = plt.subplots(2, 2)
    others = [grid[0, 0], grid[1, 0], grid[1, 1]]
    before = [(ax.get_xlim(), ax.get_ylim(), ax.get_yscale(), len(ax.get_children())) for ax in others]
    current, numbers = plt.gca(), plt.get_fignums()
    assert DRAW[name](grid[0, 1]) is grid[0, 1]
    figure.draw_without_rendering()
    assert grid[0, 1].lines or grid[0, 1].patches
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


def test_import_leaves_pyplot_alone():
    code = "import sys, fipgeo.plotting; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0


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


# --- spectrum


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_spectrum_accepts_tensors_of_any_float_dtype(dtype):
    values = torch.tensor([4.0, 0.5, 2.0], dtype=dtype, requires_grad=True)
    ax = plot_spectrum(values, ax=blank())
    np.testing.assert_array_equal(y_of(ax.lines[0]), [4.0, 2.0, 0.5])
    assert values.requires_grad and values.tolist() == [4.0, 0.5, 2.0]
    assert ax.get_yscale() == "log"


@pytest.mark.parametrize("kind", [list, tuple, np.asarray, lambda v: [torch.tensor(x, requires_grad=True) for x in v]])
def test_spectrum_accepts_other_sequences(kind):
    ax = plot_spectrum(kind([1.0, 3.0]), ax=blank())
    np.testing.assert_array_equal(y_of(ax.lines[0]), [3.0, 1.0])


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**31), num=st.integers(1, 30), tol=st.sampled_from([0.0, 1e-6, 0.3]))
def test_spectrum_drops_no_value(seed, num, tol):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(num, generator=generator, dtype=torch.float64)
    values[torch.rand(num, generator=generator) < 0.2] = torch.nan
    values[torch.rand(num, generator=generator) < 0.2] = 0.0
    kept = values.clone()
    ax = plot_spectrum(values, ax=blank(), tol=tol)
    assert torch.equal(values, kept) or torch.equal(values.nan_to_num(7.0), kept.nan_to_num(7.0))

    finite = values[~values.isnan()]
    shown = lines(ax, "fipgeo-spectrum-values")[0]
    np.testing.assert_array_equal(y_of(shown), finite[finite > tol].sort(descending=True).values)
    floor = [line for line in lines(ax, "fipgeo-spectrum-floor") if line.get_marker() == "o"]
    assert sum(x_of(line).size for line in floor) == int((finite <= tol).sum())
    crosses = lines(ax, "fipgeo-spectrum-not-finite")
    assert sum(x_of(line).size for line in crosses) == int(values.isnan().sum())
    index = np.concatenate([x_of(line) for line in [shown, *floor, *crosses]])
    np.testing.assert_array_equal(np.sort(index), np.arange(1, num + 1))
    for line in floor:
        assert (y_of(line) > 0).all() and (y_of(line) == (tol or y_of(line)[0])).all()
        assert line.get_markerfacecolor() == ax.get_facecolor()  # hollow
        assert any(f"{int((finite <= tol).sum())} value" in text for text in texts(ax))


def test_spectrum_floor_lies_a_decade_below_when_tol_is_zero():
    ax = plot_spectrum([1.0, 1e-3, 0.0, -2.0], tol=0.0, ax=blank())
    ring = next(line for line in lines(ax, "fipgeo-spectrum-floor") if line.get_marker() == "o")
    np.testing.assert_allclose(y_of(ring), 1e-4)
    assert "2 values ≤ 0, 1 negative" in texts(ax)


def test_spectrum_of_zeros_only():
    ax = plot_spectrum(torch.zeros(4), ax=blank())
    assert "4 values ≤ 0" in texts(ax) and "numerical rank 0" in texts(ax)
    draw(ax)  # without a warning


@pytest.mark.parametrize("values", [[0.0, np.nan], [np.nan], [np.inf, 1.0], [-1.0], [2.0]])
def test_spectrum_of_few_finite_values(values):
    ax = plot_spectrum(values, ax=blank())
    draw(ax)  # without a warning
    assert ax.get_xlim()[0] < 1 and ax.get_xlim()[1] > len(values)


def test_spectrum_marks_the_rank_between_the_indices():
    ax = plot_spectrum([5.0, 4.0, 3.0, 1e-20], ax=blank())
    np.testing.assert_array_equal(x_of(lines(ax, "fipgeo-spectrum-rank")[0]), [3.5, 3.5])
    assert "numerical rank 3" in texts(ax)


def test_spectrum_marks_no_rank_when_more_values_may_exist():
    assert not lines(plot_spectrum([5.0, 4.0], ax=blank()), "fipgeo-spectrum-rank")
    assert not lines(plot_spectrum(SpectrumStub([5.0, 4.0]), ax=blank()), "fipgeo-spectrum-rank")
    assert "numerical rank 2" in texts(plot_spectrum(SpectrumStub([5.0, 4.0], complete=True), ax=blank()))
    assert "numerical rank 7" in texts(plot_spectrum([5.0, 4.0], rank=7, ax=blank()))


def test_spectrum_follows_the_rank_of_the_record():
    record = SpectrumStub(torch.tensor([5.0, 4.0, 1e-5, 1e-6], dtype=torch.float64))
    ax = plot_spectrum(record, ax=blank())
    np.testing.assert_array_equal(y_of(lines(ax, "fipgeo-spectrum-values")[0]), [5.0, 4.0])
    assert "numerical rank 2" in texts(ax)
    assert "2 values ≤ $10^{-4}$" in texts(ax)
    assert "numerical rank 3" in texts(plot_spectrum(record, tol=2e-6, ax=blank()))
    record.num_doubtful = 1
    assert "numerical rank 1" in texts(plot_spectrum(record, ax=blank()))


def test_spectrum_held_out_keeps_its_pairs():
    record = SpectrumStub([1.0, 9.0, 3.0], held_out=torch.tensor([0.1, 0.9, 0.0]), captured=0.834)
    ax = plot_spectrum(record, ax=blank(), label="fc")
    second = lines(ax, "fipgeo-spectrum-held-out")
    np.testing.assert_array_equal(x_of(second[0]), [1.0, 3.0])
    np.testing.assert_allclose(y_of(second[0]), [0.9, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(x_of(second[1]), [2.0])  # the zero, on the floor
    assert "fc, held out (83 % of trace)" in legend(ax)


@pytest.mark.parametrize("bound, drawn", [(4, True), (400, False)])
def test_spectrum_far_bound_does_not_squeeze_the_values(bound, drawn):
    ax = plot_spectrum([3.0, 2.0, 1.0], rank_bound=bound, ax=blank())
    assert bool(lines(ax, "fipgeo-spectrum-bound")) is drawn
    assert any(text.startswith(f"rank bound {bound}") for text in texts(ax))
    assert ax.get_xlim()[1] < 10


def test_spectra_overlaid_differ_in_colour_and_marker():
    ax = blank()
    for i in range(3):
        assert plot_spectrum(np.array([1.0, 0.1]) / (i + 1), ax=ax, label=f"layer {i}") is ax
    series = lines(ax, "fipgeo-spectrum-values")
    assert len({line.get_color() for line in series}) == len({str(line.get_marker()) for line in series}) == 3
    assert legend(ax) == ["layer 0", "layer 1", "layer 2"]


def test_labelled_spectrum_counts_its_floor_in_the_legend():
    ax = plot_spectrum([1.0, 0.0, 0.0], tol=0.01, label="fc", ax=blank())
    assert legend(ax) == ["fc (2 ≤ 0.01)"]


def test_spectrum_kwargs_go_to_the_main_line():
    ax = plot_spectrum([2.0, 1.0], ax=blank(), c="#ff0000", marker="s", ms=7, lw=2, ls="-")
    line = lines(ax, "fipgeo-spectrum-values")[0]
    assert (line.get_color(), line.get_marker(), line.get_markersize()) == ("#ff0000", "s", 7)
    assert (line.get_linewidth(), line.get_linestyle()) == (2, "-")


def test_spectrum_notes_do_not_cover_each_other():
    ax = plt.subplots(figsize=(3.4, 2.5), layout="constrained")[1]
    for rank in (50, 52, 55):
        plot_spectrum(np.r_[np.geomspace(1, 1e-5, rank), np.zeros(100 - rank)], ax=ax, tol=1e-9)
    draw(ax)
    boxes = [text.get_window_extent() for text in ax.texts]
    assert len(boxes) == 6
    overlapping = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i] if a.overlaps(b)]
    assert not overlapping


@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ([[]], {}, ValueError, "spectrum is empty"),
        ([np.ones((2, 3))], {}, ValueError, r"shape \(2, 3\) came; flatten it"),
        ([3.0], {}, ValueError, "one-dimensional"),
        ([torch.ones(2, dtype=torch.complex64)], {}, TypeError, "complex64 came.*eigvalsh"),
        ([np.array([1j])], {}, TypeError, "eigvalsh"),
        ([["a", "b"]], {}, TypeError, "spectrum must hold real numbers"),
        ([[1.0, 2.0]], {"held_out": [1.0]}, ValueError, "held_out has 1 values for 2 eigenvalues"),
        ([[1.0]], {"tol": -1.0}, ValueError, "tol must be a number >= 0"),
        ([[1.0]], {"tol": float("nan")}, ValueError, "tol must be a number >= 0"),
        ([[1.0]], {"rank": -1}, ValueError, "rank must be"),
        ([[1.0]], {"rank_bound": -1}, ValueError, "rank_bound must be"),
    ],
)
def test_spectrum_bad_input(args, kwargs, error, message):
    with pytest.raises(error, match=message):
        plot_spectrum(*args, **kwargs)
    assert not plt.get_fignums()  # refused before a figure was made


# --- path


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


# --- layers


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


# --- svg


@pytest.mark.parametrize("name", DRAW)
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
