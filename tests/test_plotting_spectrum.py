"""Plots of spectra: what the artists hold, and what bad input is told."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipgeo.plotting import plot_spectrum

from .plots import SpectrumStub, blank, draw, legend, lines, texts, x_of, y_of


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


@settings(deadline=None, max_examples=6)
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
