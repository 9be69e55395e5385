"""Learning without labels: who is trusted, what the others are told, and what comes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Isotropic, pseudo_labels, self_train_, trusted

from .test_composition import draw

seeds = st.integers(0, 2**20)


@given(seed=seeds, n=st.integers(3, 30), most=st.integers(1, 6))
def test_the_trusted_are_balanced_and_none_outside_is_better(seed: int, n: int, most: int) -> None:
    scores = draw(seed, n, 3).softmax(-1)
    places, classes = trusted(scores, most)
    k = min(n // 3, most)
    assert classes.bincount(minlength=3).tolist() == [k] * 3 and len(set(places.tolist())) == 3 * k
    chosen = set(places.tolist())
    for label in range(3):
        least = min(float(scores[p, label]) for p, c in zip(places, classes, strict=True) if c == label)
        assert all(float(scores[p, label]) <= least for p in range(n) if p not in chosen)
    apart = torch.eye(3).repeat_interleave(5, 0) * 9 + draw(seed, 15, 3)  # nobody is the best of two classes
    places, classes = trusted(apart, 2)
    for label in range(3):
        assert set(places[classes == label].tolist()) == set(apart[:, label].topk(2).indices.tolist())


@given(seed=seeds, threshold=st.floats(0, 1), power=st.sampled_from([0.5, 1.0, 2.0]))
def test_targets_are_the_published_ones(seed: int, threshold: float, power: float) -> None:
    logits = 3 * draw(seed, 6, 4)
    targets, sure = pseudo_labels(logits.softmax(-1), threshold, power)
    torch.testing.assert_close(targets, (power * logits).softmax(-1))
    assert sure.tolist() == [max(row) > threshold for row in targets.tolist()]


def noisy(x: Tensor, draws: torch.Generator) -> Tensor:
    return x + 0.1 * torch.randn(x.shape, generator=draws, dtype=x.dtype)


def problem(seed: int = 0) -> tuple[nn.Module, list[TaskVector], Tensor, Tensor]:
    """Three far clusters, which a network tells apart once a rotation of its inputs is undone."""
    labels = torch.arange(150) % 3
    x = 4 * torch.eye(3)[labels] + 0.7 * draw(seed, 150, 3)
    net = nn.Linear(3, 3, bias=False)
    turn = torch.linalg.matrix_exp(0.85 * torch.tensor([[0.0, -1, 0.4], [1, 0, 0.7], [-0.4, -0.7, 0]]))
    with torch.no_grad():
        net.weight.copy_(turn)
    vectors = [TaskVector({"weight": torch.eye(3) - turn}), TaskVector({"weight": draw(seed + 1, 3, 3)})]
    return net, vectors, x, labels


def test_inputs_without_labels_improve_the_network() -> None:
    net, vectors, x, labels = problem()
    model = Composition(net, vectors, Isotropic())

    def right() -> float:
        return float((model(x).argmax(-1) == labels).double().mean())

    before = right()
    fits = self_train_(model, x, noisy, epochs=4, most=20, ridge=1e-3)
    assert len(fits) == 4 and before < 0.9 and right() > 0.95
    again = Composition(net, vectors, Isotropic())
    self_train_(again, x, noisy, epochs=4, most=20, ridge=1e-3, generator=0)
    torch.testing.assert_close(again.coefficients, model.coefficients)


def test_the_objective_is_the_published_one() -> None:
    """The value at the start of the first epoch, from Eqs. 15 and 16 written example by example."""
    net, vectors, x, _ = problem(3)
    model = Composition(net, vectors, Isotropic(), start=0.1)
    c = model.coefficients.detach().clone()
    scores = model(x).detach().softmax(-1)
    places, classes = trusted(scores, 5)
    certain = torch.stack([-scores[p, label].log() for p, label in zip(places, classes, strict=True)]).mean()
    rest = [i for i in range(len(x)) if i not in places.tolist()]
    total = torch.zeros(())
    for i in rest:
        q = scores[i].sqrt() / scores[i].sqrt().sum()
        if q.max() > 0.6:
            total = total - (q * model(2 * x[i : i + 1]).detach().log_softmax(-1)[0]).sum()
    expected = 0.25 * certain + 0.75 * total / len(rest) + 0.005 * c.square().sum()
    (fit,) = self_train_(model, x, lambda view, _: 2 * view, epochs=1, most=5, thresholds=(0.6, 1.0))
    assert fit.losses[0] == pytest.approx(float(expected), rel=1e-9) and fit.losses[-1] < fit.losses[0]


def test_bad_arguments() -> None:
    net, vectors, x, _ = problem()
    model = Composition(net, vectors)
    with pytest.raises(ValueError, match="thresholds, share: got"):
        self_train_(model, x, noisy, thresholds=(0.9, 0.5))
    with pytest.raises(ValueError, match="got 2 examples and 3 classes"):
        self_train_(model, x[:2], noisy)
    (fit,) = self_train_(model, x, noisy, epochs=1, thresholds=(1.0, 1.0), steps=0)
    assert fit.steps == 0
