"""Classifiers of features from few examples, against loops over examples, and what their training promises."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import hessian
from torch.nn.functional import cosine_similarity, cross_entropy

from fipgeo import Composition, TaskVector
from fipgeo.atlas import CacheAdapter, LinearProbe, class_means, few_shot_

from .test_composition import bank, draw

seeds = st.integers(0, 2**20)


def task(seed: int, classes: int = 3, each: int = 4, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features that lie about a centre for each class, their labels, and a prior near the centres."""
    centres = draw(seed, classes, width)
    labels = torch.arange(classes).repeat(each)
    features = centres[labels] + 0.3 * draw(seed + 1, len(labels), width)
    return features, labels, centres + 0.5 * draw(seed + 2, classes, width)


@given(seed=seeds)
@settings(max_examples=4)
def test_a_cache_is_a_sum_over_stored_examples(seed: int) -> None:
    features, labels, prior = task(seed)
    adapter = CacheAdapter(features, labels, prior, sharpness=7.0, alpha=1.5, beta=3.0)
    x = draw(seed + 3, 4, 5)
    expected = torch.zeros(4, 3, dtype=torch.float64)
    for i in range(4):
        for k in range(3):
            expected[i, k] = 7.0 * cosine_similarity(x[i], prior[k], dim=0)
        for key, label in zip(features, labels.tolist(), strict=True):
            expected[i, label] += 1.5 * math.exp(-3.0 * (1 - float(cosine_similarity(x[i], key, dim=0))))
    torch.testing.assert_close(adapter(x).detach(), expected)


@given(seed=seeds)
@settings(max_examples=4)
def test_a_cache_keeps_what_it_should(seed: int) -> None:
    features, labels, prior = task(seed)
    x, order = draw(seed + 3, 6, 5), torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    one, two = CacheAdapter(features, labels, prior), CacheAdapter(features[order], labels[order], 2 * prior)
    torch.testing.assert_close(one(x), two(5 * x))  # neither order nor lengths matter
    silent = CacheAdapter(features, labels, prior, alpha=0.0)
    cosines = cosine_similarity(x[:, None], prior[None], dim=2)
    torch.testing.assert_close(silent(x).detach(), 16 * cosines)


@given(seed=seeds)
@settings(max_examples=3)
def test_keys_are_trained(seed: int) -> None:
    features, labels, prior = task(seed)
    adapter = CacheAdapter(features, labels, prior, sharpness=2.0)
    before = adapter.keys.detach().clone()
    losses = adapter.fit_(features, labels, steps=40, lr=1e-2)
    assert len(losses) == 41 and losses[-1] < losses[0] and not torch.equal(adapter.keys, before)
    assert losses[-1] == cross_entropy(adapter(features), labels).item() and adapter.keys.grad is None


@given(seed=seeds)
@settings(max_examples=4)
def test_a_probe_descends_by_a_bound_of_its_curvature(seed: int) -> None:
    features, labels, prior = task(seed)
    probe = LinearProbe(features, labels, prior, sharpness=2.0)
    losses = probe.fit_(features, labels, steps=30)
    assert all(later <= earlier + 1e-12 for earlier, later in zip(losses, losses[1:], strict=False))
    assert losses[-1] < losses[0]
    rows, unit, n = nn.functional.normalize(features, dim=1), probe.prior, len(features)

    def loss(w: Tensor, blend: Tensor) -> Tensor:
        return cross_entropy(rows @ (w.view(3, 5) + blend[:, None] * unit).T, labels)

    w, blend = probe.weight.detach().flatten(), probe.blend.detach()
    steep = torch.linalg.eigvalsh(hessian(loss)(w, blend))[-1]
    assert steep <= torch.linalg.matrix_norm(rows, 2) ** 2 / (2 * n) + 1e-12
    curved = hessian(loss, argnums=1)(w, blend)
    bound = (rows @ unit.T).square().sum(0) / (2 * n)
    assert torch.linalg.eigvalsh(bound.diag() - curved)[0] >= -1e-12


@given(seed=seeds)
@settings(max_examples=3)
def test_a_step_of_the_probe_is_the_gradient_over_the_bound(seed: int) -> None:
    features, labels, prior = task(seed)
    probe, n = LinearProbe(features, labels, prior), len(features)
    w, blend = probe.weight.detach().clone(), probe.blend.detach().clone()
    rows = nn.functional.normalize(features, dim=1)
    (slope,) = torch.autograd.grad(cross_entropy(probe(features), labels), probe.weight)
    probe.fit_(features, labels, steps=1)
    expected = w - slope * 2 * n / torch.linalg.eigvalsh(rows.T @ rows)[-1]
    torch.testing.assert_close(probe.weight.detach(), expected)
    other = LinearProbe(features, labels, prior)
    with torch.no_grad():
        other.weight.copy_(expected)
    (slope,) = torch.autograd.grad(cross_entropy(other(features), labels), other.blend)
    near = rows @ probe.prior.T
    torch.testing.assert_close(probe.blend.detach(), blend - slope * 2 * n / near.square().sum(0))


def test_a_probe_begins_with_class_means_and_one_blend() -> None:
    features, labels, prior = task(3)
    probe = LinearProbe(features, labels, prior, sharpness=10.0)
    rows = nn.functional.normalize(features, dim=1)
    means = torch.stack([rows[labels == k].mean(0) for k in range(3)])
    near = torch.stack([(rows[labels == k] @ probe.prior[k]).mean() for k in range(3)]).mean()
    torch.testing.assert_close(probe.weight.detach(), means)
    torch.testing.assert_close(probe.blend.detach(), (10 * near).expand(3))
    torch.testing.assert_close(class_means(features, labels), nn.functional.normalize(means, dim=1))
    lone = LinearProbe(features[labels == 1], labels[labels == 1], prior)  # two classes without an example
    assert bool(lone.weight[0].eq(0).all()) and lone.blend.isfinite().all()
    assert class_means(features[:1], labels[:1], 3)[1:].eq(0).all()


@pytest.mark.parametrize("adapter", [None, "cache", "probe"])
def test_few_shots_in_one_call(adapter: str | None) -> None:
    base, vectors, x = bank("tied", 1, 3)
    tuned = (0.5 * vectors[0] + 0.5 * vectors[2]).apply_to(base)
    prior = class_means(tuned(x).detach(), labels := tuned(x).argmax(1))
    model = Composition(base, vectors).eval()
    start = class_scores(model, x, prior)
    found = few_shot_(model, (x, labels), prior, adapter=adapter, rounds=2, steps=10, sharpness=4.0)
    scores = found.classifier(model(x))
    assert len(found.fits) == 2 and scores.shape == (len(x), len(prior)) and bool(model.coefficients.any())
    assert cross_entropy(scores, labels) < cross_entropy(start, labels)
    assert bool(found.losses) is (adapter is not None)
    if isinstance(found.classifier, nn.Module):
        assert not any(p.requires_grad for p in found.classifier.parameters())


def class_scores(model: Composition, x: Tensor, prior: Tensor) -> Tensor:
    return 4.0 * cosine_similarity(model(x)[:, None], prior[None], dim=2)


def test_few_shot_settings_are_checked() -> None:
    features, labels, prior = task(0)
    for kind in (CacheAdapter, LinearProbe):
        with pytest.raises(ValueError, match=r"got shapes \[12, 5\], \[11\]"):
            kind(features, labels[1:], prior)
        with pytest.raises(ValueError, match="prior: got 4 features, expected the 5"):
            kind(features, labels, prior[:, 1:])
        with pytest.raises(ValueError, match="labels: got torch.int64 from 1 to 3; expected classes from 0 to 2"):
            kind(features, labels + 1, prior)
    with pytest.raises(ValueError, match="sharpness, alpha, beta: got 16.0, -1, 5.5"):
        CacheAdapter(features, labels, prior, alpha=-1)
    base = nn.Linear(5, 5).double()
    model = Composition(base, [TaskVector({"weight": draw(1, 5, 5)})])
    with pytest.raises(ValueError, match="adapter, rounds: got 'lora', 1"):
        few_shot_(model, (features, labels), prior, adapter="lora")
    with pytest.raises(ValueError, match="needs labels"):
        few_shot_(model, features, prior)
