"""Diagnostics, against their definitions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from fipgeo import Composition, TaskVector, WeightSpace, metric
from fipgeo.atlas import cosines, disentanglement_error, interference
from fipgeo.plotting import plot_coefficient_depth, plot_coefficients
from fipgeo.plotting._common import PALETTE

from .test_composition import bank


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


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20))
def test_interference_is_the_cosine_in_the_metric(seed: int) -> None:
    base, vectors, x = bank("tied", seed, 3)
    g, space = metric(base, x, params="*", geometry="categorical"), WeightSpace.of(base, "*")
    flat = torch.stack([space.ravel(vector.tensors) for vector in vectors])
    gram = torch.stack([g.matvec(row) for row in flat]) @ flat.T
    lengths = gram.diagonal().sqrt()
    torch.testing.assert_close(interference(base, vectors, x), gram / lengths / lengths[:, None], rtol=1e-6, atol=1e-8)
    unfelt = [vectors[0], TaskVector({name: torch.zeros_like(t) for name, t in vectors[0].tensors.items()})]
    assert torch.equal(interference(base, unfelt, x), torch.eye(2, dtype=torch.float64))


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
