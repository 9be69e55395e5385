"""The choice of vectors, against its definitions."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from fipgeo import Composition, TaskVector
from fipgeo.atlas import choose_vectors, feature_similarity
from fipgeo.atlas.selection import RULES, pivots

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


def chosen(found: list[TaskVector], labels: list[str]) -> torch.Tensor:
    return torch.tensor([[label in vector.tensors for label in labels] for vector in found])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**20), budget=st.integers(1, 4))
def test_the_steepest_are_those_of_autograd(seed: int, budget: int) -> None:
    base, vectors, x = bank("tied", seed, 3)
    y, model = torch.arange(len(x)) % 2, Composition(base, vectors)
    (slope,) = torch.autograd.grad(cross_entropy(model(x), y), model.coefficients)
    keep = min(budget, 3)
    for by, scores in (("gradient", slope.abs()), ("whole gradient", slope.abs().sum(1, keepdim=True) + 0 * slope)):
        found = chosen(choose_vectors(base, vectors, (x, y), budget, by=by), model.labels)
        assert found.sum(0).tolist() == [keep] * len(model.labels)
        least = scores.where(found, torch.inf).min(0).values
        assert bool((scores.where(~found, -torch.inf).max(0).values <= least + 1e-12).all())


def test_any_scores_may_choose_and_what_is_not_chosen_takes_no_memory() -> None:
    base, vectors, x = bank("mixed", 2, 3)
    labels = Composition(base, vectors).labels
    scores = draw(0, 3, len(labels))
    found = choose_vectors(base, vectors, x, 2, by=scores)
    assert torch.equal(chosen(found, labels), scores > scores.min(0).values)
    whole = choose_vectors(base, vectors, x, 1, by=torch.tensor([0.1, 0.3, 0.2]))
    assert [len(vector.tensors) for vector in whole] == [0, len(labels), 0]
    drawn = [choose_vectors(base, vectors, x, 1, by="random", generator=seed) for seed in (0, 0, 1)]
    picks = [chosen(one, labels) for one in drawn]
    assert torch.equal(picks[0], picks[1]) and not torch.equal(picks[0], picks[2])
    assert picks[0].sum(0).tolist() == [1] * len(labels)

    def stored(model: Composition) -> int:
        return sum(block.data.numel() for block in model._blocks())

    for by in (*RULES, scores):
        y = torch.zeros(len(x)).long() if "gradient" in str(by) else None
        few = choose_vectors(base, vectors, x if y is None else (x, y), 1, by=by)
        assert 3 * stored(Composition(base, few)) <= stored(Composition(base, vectors))


def test_rules_that_are_not_known_and_scores_of_other_shapes_are_refused() -> None:
    base, vectors, x = bank("tied", 0, 2)
    with pytest.raises(ValueError, match="sources: got none"):
        feature_similarity(base, x, [])
    with pytest.raises(ValueError, match="by: got 'best', expected scores or one of leverage, gradient"):
        choose_vectors(base, vectors, x, 1, by="best")
    with pytest.raises(ValueError, match=r"by: got scores \[3\], expected \[2\] or \[2, "):
        choose_vectors(base, vectors, x, 1, by=torch.zeros(3))


def test_features_are_alike_where_their_means_are() -> None:
    base, inputs = nn.Linear(3, 4), [draw(i, 20 + i, 3) for i in range(4)]

    def features(net: Any, batch: Any) -> torch.Tensor:
        return net(batch[0]).relu()

    means = [(part @ base.weight.T + base.bias).relu().mean(0).detach() for part in inputs]
    batches = [[(part[:15],), (part[15:],)] for part in inputs]  # of unequal sizes
    found = feature_similarity(base, batches[0], batches, feature_fn=features)
    for one, mean in zip(found, means, strict=True):
        assert float(one) == pytest.approx(float(means[0] @ mean / means[0].norm() / mean.norm()))
    assert float(found[0]) == pytest.approx(1.0) and len(set(found.tolist())) == 4
