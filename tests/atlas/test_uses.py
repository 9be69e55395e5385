"""Forgetting under a floor, the choice of vectors, and diagnostics, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from scipy.stats import binom
from torch import nn
from torch.nn.functional import cross_entropy

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Goal, choose_vectors, cosines, disentanglement_error, forget_
from fipgeo.atlas.uses import pivots
from fipgeo.plotting import plot_coefficient_depth, plot_coefficients
from fipgeo.plotting._common import PALETTE

from .test_composition import bank, draw


def quadrants(count: int = 200) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear classifier of the signs of two numbers, with its data."""
    x = draw(0, count, 6)
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    base = nn.Linear(6, 4).double()
    with torch.no_grad():
        base.weight.copy_(torch.linalg.lstsq(x, 2 * nn.functional.one_hot(labels).double() - 1).solution.T * 4)
        base.bias.zero_()
    return base, x, labels


def random_vectors(count: int = 6) -> list[TaskVector]:
    return [TaskVector({"weight": draw(i, 4, 6), "bias": draw(i + 9, 4)}) for i in range(count)]


def test_a_target_is_forgotten_and_the_control_stays_above_its_floor() -> None:
    base, x, labels = quadrants()
    away = labels < 2
    model = Composition(base, random_vectors())

    def shares() -> list[float]:
        right = (model(x).argmax(1) == labels).double()
        return [float(right[part].mean()) for part in (away, ~away)]

    before = shares()
    loss = cross_entropy(model(x[away]), labels[away]).item()
    judge = (x[~away], labels[~away])
    fit = forget_(model, (x[away], labels[away]), judge, floor=0.9, held_out=judge, ridge=0.1)
    after = shares()
    assert after[1] >= 0.9 * before[1] and after[0] < before[0] and fit.steps >= 1
    assert cross_entropy(model(x[away]), labels[away]).item() > loss
    with pytest.raises(ValueError, match="floor: got 0"):
        forget_(model, (x, labels), (x, labels), floor=0)
    with pytest.raises(ValueError, match="held_out: got 1"):
        forget_(model, (x, labels), (x, labels), held_out=1.0)
    with pytest.raises(ValueError, match="control: its accuracy needs labels"):
        forget_(model, (x, labels), x)
    with pytest.raises(ValueError, match="expected a number between 0 and 1"):
        forget_(model, (x, labels), (x, labels), confidence=1.0)
    with pytest.raises(ValueError, match=r"confidence: got 0\.99, but of \d right predictions"):
        forget_(model, (x, labels), (x, labels), held_out=(x[:9], labels[:9]), confidence=0.99)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), floor=st.floats(0.5, 0.95), confidence=st.sampled_from([None, 0.7]))
def test_the_floor_is_judged_on_data_that_nothing_is_learned_from(
    seed: int, floor: float, confidence: float | None
) -> None:
    base, x, labels = quadrants()
    away, model = labels < 2, Composition(base, random_vectors())
    learned, judge = torch.randperm(int((~away).sum()), generator=torch.Generator().manual_seed(seed)).split(60)[:2]
    control = (x[~away], labels[~away])
    parts = [tuple(part[index] for part in control) for index in (learned, judge)]
    with torch.no_grad():
        model.coefficients.copy_(draw(seed, 6, 2))
        before = base(parts[1][0]).argmax(1) == parts[1][1]
    goals = (x[away], labels[away]), parts[0]
    forget_(model, *goals, floor=floor, held_out=parts[1], confidence=confidence, steps=5, ridge=0.1)
    with torch.no_grad():
        after = model(parts[1][0]).argmax(1) == parts[1][1]
    if confidence is None:
        assert int(after.sum()) >= floor * int(before.sum())
    else:  # no larger share of losses than allowed would show so few of them by a chance of 1 - confidence
        lost, right = int((before & ~after).sum()), int(before.sum())
        assert binom.cdf(lost, right, 1 - floor) <= 1 - confidence + 1e-9


def test_what_is_set_apart_depends_on_the_generator_alone_and_leaves_no_mark_on_the_steps() -> None:
    base, x, labels = quadrants()
    away, seen = labels < 2, []

    def forward(net: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        if torch.is_grad_enabled():
            seen.append(batch[0])
        return net(batch[0])

    found = []
    for seed in (1, 1, 2):
        model, control = Composition(base, random_vectors()), Goal((x[~away], labels[~away]), forward_fn=forward)
        seen.clear()
        forget_(model, (x[away], labels[away]), control, held_out=0.25, steps=3, generator=seed)
        found.append((model.coefficients.detach(), {tuple(row) for part in seen for row in part.tolist()}))
    assert torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1] != found[2][1]
    assert len(found[0][1]) == int((~away).sum()) - round(0.25 * int((~away).sum()))


@given(seed=st.integers(0, 2**20), budget=st.integers(1, 3))
def test_pivots_are_a_greedy_choice(seed: int, budget: int) -> None:
    root, columns = draw(seed, 9, 12), 4
    taken: list[int] = []
    for _ in range(budget * columns):
        basis = torch.linalg.qr(root[:, taken])[0] if taken else root[:, :0]
        left = (root - basis @ (basis.T @ root)).square().sum(0)
        full = [sum(i % columns == j % columns for i in taken) >= budget for j in range(12)]
        open_ = torch.tensor([-1.0 if full[j] or j in taken else float(left[j]) for j in range(12)])
        if float(open_.max()) <= 1e-9:
            break
        taken.append(int(open_.argmax()))
    found = pivots(root, budget, columns)
    assert sorted(taken) == found.flatten().nonzero().flatten().tolist()
    assert int(found.sum(0).max()) <= budget


def test_a_vector_that_repeats_another_is_not_chosen() -> None:
    base, vectors, x = bank("mixed", 2, 3)
    chosen = choose_vectors(base, [vectors[0], 2.0 * vectors[0], vectors[1]], x, 2)
    assert len(chosen) == 3 and not set(chosen[0].tensors) & set(chosen[1].tensors) - {"unused"}
    assert "unused" not in {name for vector in chosen for name in vector.tensors}
    model = Composition(base, chosen)
    assert all(block.data.shape[1] <= 2 for block in model._blocks())
    with pytest.raises(ValueError, match="budget: got 0"):
        choose_vectors(base, vectors, x, 0)


def test_diagnostics() -> None:
    base, vectors, x = bank("tied", 3, 3)
    found = cosines(vectors)
    assert torch.equal(found, found.T) and abs(float(found[0, 2]) - vectors[0].cosine(vectors[2])) < 1e-12
    errors = disentanglement_error(base, vectors[:2], [x, x], [1.0, 0.5])
    both = vectors[1].apply_to(vectors[0].apply_to(base), 0.5)
    alone = [vectors[0].apply_to(base), vectors[1].apply_to(base, 0.5)]
    expected = [(net(x).argmax(1) != both(x).argmax(1)).double().mean() for net in alone]
    torch.testing.assert_close(errors, torch.stack(expected))
    assert not disentanglement_error(base, vectors[:1], [x]).any()
    with pytest.raises(ValueError, match="expected one of each for every task"):
        disentanglement_error(base, vectors, [x])


def test_coefficients_are_drawn() -> None:
    base, vectors, _ = bank("tied", 3, 2)
    model = Composition(base, vectors, start=-0.5)
    axes = Figure().subplots()
    assert plot_coefficients(model, names=["one", "two"], ax=axes) is axes
    (image,) = axes.images
    assert image.get_clim() == (-0.5, 0.5) and image.get_array().shape == (2, 3)  # type: ignore[union-attr]
    assert [t.get_text() for t in axes.get_xticklabels()] == model.labels
    assert [t.get_text() for t in axes.get_yticklabels()] == ["one", "two"]
    with pytest.raises(ValueError, match="labels: got 1, expected 2"):
        plot_coefficients([[0.0, 0.0]], ["a"], ax=axes)
    with pytest.raises(ValueError, match="coefficients: got shape"):
        plot_coefficients([0.0], ax=axes)


def test_coefficients_are_drawn_by_depth() -> None:
    ax = plot_coefficient_depth(
        [[0.0, 1.0], [1.0, float("nan")], [5.0, 3.0]], ["first", "last"], ax=Figure().subplots()
    )
    medians = [line.get_ydata()[0] for line in ax.lines if line.get_color() == PALETTE[1]]  # type: ignore[index]
    assert medians == [1.0, 2.0] and [t.get_text() for t in ax.get_xticklabels()] == ["first", "last"]
    with pytest.raises(ValueError, match="labels: got 3, expected 2"):
        plot_coefficient_depth([[0.0, 0.0]], ["a", "b", "c"], ax=ax)
