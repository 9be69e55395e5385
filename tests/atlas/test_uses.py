"""The choice of vectors, and diagnostics, against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fipgeo import Composition
from fipgeo.atlas import choose_vectors, cosines, disentanglement_error
from fipgeo.atlas.uses import pivots
from fipgeo.plotting import plot_coefficient_depth, plot_coefficients
from fipgeo.plotting._common import PALETTE

from .test_composition import bank, draw


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
