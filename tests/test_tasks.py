"""The accuracy matrix: its figures by loops over their definitions, its round trips, and the picture of it."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fipgeo import AccuracyMatrix
from fipgeo.plotting import AccuracyRecord, plot_accuracy


def drawn(seed: int, learned: int, total: int) -> torch.Tensor:
    return torch.rand(learned, total, generator=torch.Generator().manual_seed(seed))


def blank() -> Axes:
    return Figure(figsize=(4, 3), layout="constrained").subplots()


@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(0, 3))
def test_figures_are_those_of_their_definitions(seed: int, learned: int, more: int) -> None:
    a = drawn(seed, learned, learned + more).tolist()
    found = AccuracyMatrix(torch.tensor(a))
    t = learned - 1
    assert found.average_accuracy() == pytest.approx(sum(a[t][j] for j in range(learned)) / learned)
    if learned == 1:
        assert found.average_forgetting() == found.backward_transfer() == 0 and not len(found.forgetting())
        return
    lost = [max(a[i][j] for i in range(t)) - a[t][j] for j in range(t)]
    assert found.forgetting().tolist() == pytest.approx(lost)
    assert found.average_forgetting() == pytest.approx(sum(lost) / t)
    moved = [a[t][j] - a[j][j] for j in range(t)]
    assert found.backward_transfer() == pytest.approx(sum(moved) / t)
    assert found.average_forgetting() >= -found.backward_transfer() - 1e-12  # the best is no less than the first


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_rows_come_one_by_one_and_the_future_does_not_count(seed: int, total: int) -> None:
    a = drawn(seed, total, total)
    found = AccuracyMatrix.of(total)
    assert len(found) == 0 and math.isnan(found.average_accuracy()) and found.average_forgetting() == 0
    for i in range(total):
        before, found = found, found.after(a[i, : i + 1])
        assert (len(before), len(found)) == (i, i + 1)
    lower = a.tril()
    assert torch.equal(found.values.nan_to_num(0.0), lower) and found.values.isnan().sum() == total * (total - 1) // 2
    assert found.average_accuracy() == pytest.approx(float(lower[-1].mean()))
    assert found.backward_transfer() == AccuracyMatrix(a).backward_transfer()
    again = AccuracyMatrix.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))
    assert torch.equal(again.values.nan_to_num(-1), found.values.nan_to_num(-1)) and again.tasks == found.tasks
    none = AccuracyMatrix.from_dict(AccuracyMatrix.of(["a", "b"]).to_dict())
    assert none.values.shape == (0, 2) and none.tasks == ("a", "b")


def test_a_sequence_that_gains_and_loses() -> None:
    found = AccuracyMatrix.of(["a", "b", "c"]).after([0.9]).after([0.95, 0.8]).after([0.85, 0.82, 0.7])
    assert found.forgetting().tolist() == pytest.approx([0.10, -0.02])
    assert found.average_forgetting() == pytest.approx(0.04)
    assert found.backward_transfer() == pytest.approx(-0.015)
    assert found.average_accuracy() == pytest.approx(0.79)
    unseen = AccuracyMatrix([[math.nan, math.nan], [0.5, 0.4]])  # type: ignore[arg-type]
    assert math.isnan(unseen.average_forgetting())


def test_the_record_is_a_copy_and_bad_ones_are_refused() -> None:
    a = drawn(0, 2, 2)
    found = AccuracyMatrix(a)
    a.zero_()
    assert found.values.all()
    with pytest.raises(ValueError, match=r"got shape \[3, 2\], expected \[t, T\]"):
        AccuracyMatrix(drawn(0, 3, 2))
    with pytest.raises(ValueError, match="got 87, expected shares"):
        AccuracyMatrix([[87.0]])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tasks: .*expected 2 different names"):
        AccuracyMatrix(drawn(0, 1, 2), ["a", "a"])
    with pytest.raises(ValueError, match="row: got 3 accuracies for 2 tasks"):
        AccuracyMatrix.of(2).after([0.1, 0.2, 0.3])


def test_the_picture_holds_every_share_and_frames_what_was_learned() -> None:
    found = AccuracyMatrix.of(["digits", "clothes"]).after([0.987]).after([0.955, 0.8786])
    assert isinstance(found, AccuracyRecord)
    ax = blank()
    assert found.plot(ax) is ax
    places = {(text.get_position(), text.get_text()) for text in ax.texts}
    assert places == {((0, 0), "98.7"), ((0, 1), "95.5"), ((1, 1), "87.9")}
    assert [t.get_text() for t in ax.get_xticklabels()] == ["digits", "clothes"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["digits", "clothes"]
    (image,) = ax.images
    shown = np.ma.asarray(image.get_array())
    assert np.array_equal(np.ma.getmaskarray(shown), [[False, True], [False, False]])
    assert image.get_clim() == (0, 1)
    framed = sorted(p.get_xy() for p in ax.patches if isinstance(p, Rectangle))
    assert framed == [(-0.5, -0.5), (0.5, 0.5)]
    with pytest.raises(ValueError, match="carries an accuracy matrix already"):
        found.plot(ax)


def test_long_names_are_turned_and_short_ones_are_not() -> None:
    for name, turned in [("t", 0), ("a task with a long name", 30)]:
        record = AccuracyMatrix(drawn(2, 4, 4), [f"{name} {k}" for k in range(4)])
        assert {text.get_rotation() for text in record.plot(blank()).get_xticklabels()} == {turned}


def test_numbers_are_readable_on_any_colour_and_new_figures_fit() -> None:
    ax = plot_accuracy([[0.02, 0.5], [0.6, 0.99]], cmap="viridis", ax=blank())
    (image,) = ax.images
    for text in ax.texts:
        column, row = (int(v) for v in text.get_position())
        share = float(np.ma.asarray(image.get_array())[row, column])
        background = np.dot(image.to_rgba(np.array([[share]]))[0, 0, :3], [0.2126, 0.7152, 0.0722])
        assert (text.get_color() == "white") == (background < 0.5) or 0.4 < background < 0.6
    few, many = (AccuracyMatrix(drawn(1, t, t)).plot().get_window_extent().height for t in (2, 8))
    assert many > few
    with pytest.raises(ValueError, match="learn a task first"):
        AccuracyMatrix.of(2).plot(blank())
    with pytest.raises(ValueError, match="80 % is 0.8"):
        plot_accuracy([[80.0]], ax=blank())
    with pytest.raises(TypeError, match="must be a matplotlib Axes"):
        plot_accuracy([[0.8]], ax=[blank()])  # type: ignore[arg-type]
