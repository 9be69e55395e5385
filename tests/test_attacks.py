"""Attacks: known gradients and optima, the box, what is drawn, and what is left alone."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo.attacks import Attack, fgsm, pgd, withstands

from .hygiene import unchanged
from .paths.toys import draw, labels, mlp

SEEDS = st.integers(0, 2**31)


def each(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def two_classes(seed: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A linear model of two classes, inputs, labels, and the margin's gradient by x, that of the right class less."""
    model = nn.Linear(5, 2)
    with torch.no_grad():
        model.weight.copy_(draw(seed, 2, 5))
    x, y = draw(seed + 1, 30, 5), labels(seed, 30) % 2
    w = model.weight.detach()
    return model, x, y, w[1 - y] - w[y]


@given(SEEDS, st.floats(0.01, 2.0))
def test_one_step_is_optimal_for_a_linear_model_of_two_classes(seed: int, eps: float) -> None:
    """The loss rises with the margin of the wrong class, w . x, which a box allows to grow by eps |w|_1."""
    model, x, y, w = two_classes(seed)
    for attack in (fgsm(eps), pgd(eps, 5), pgd(eps, 2)):
        found = attack(model, x, y)
        assert torch.allclose(found, x + eps * w.sign())
        margin = ((found - x) * w).sum(1)
        assert torch.allclose(margin, eps * w.abs().sum(1))
    logits = model(x)[torch.arange(30), 1 - y] - model(x)[torch.arange(30), y]
    assert torch.equal(withstands(model, x, y, fgsm(eps)), logits + eps * w.abs().sum(1) < 0)


@given(SEEDS)
def test_steps_follow_the_gradient_by_finite_differences(seed: int) -> None:
    model, x, y = mlp(seed % 1000), draw(seed, 8, 5), labels(seed, 8)
    found = fgsm(1e-3)(model, x, y)
    h = 1e-6
    with torch.no_grad():
        rises = [each(model(x + h * e), y) - each(model(x - h * e), y) for e in torch.eye(5)]
    slope = torch.stack(rises, 1) / (2 * h)
    clear = slope.abs() > 1e-6
    assert torch.allclose((found - x)[clear], 1e-3 * slope.sign()[clear])


@given(SEEDS, st.integers(1, 6))
def test_more_steps_never_do_worse(seed: int, steps: int) -> None:
    """The first full step from the input is that of one step, and the worst point met is what comes back."""
    model, x, y = mlp(seed % 1000), draw(seed, 20, 5), labels(seed, 20)
    with torch.no_grad():
        clean, one = each(model(x), y), each(model(fgsm(0.5)(model, x, y)), y)
        more = each(model(Attack(0.5, steps, 1.0, random=False)(model, x, y)), y)
        single = each(model(pgd(0.5, 3)(model, x, y, generator=1)), y)
        several = each(model(pgd(0.5, 3, restarts=3)(model, x, y, generator=1)), y)
    assert bool((one >= clean).all() and (more >= one - 1e-12).all() and (several >= single - 1e-12).all())


@given(SEEDS, st.booleans(), st.booleans())
def test_examples_stay_in_the_box_and_within_bounds(seed: int, random: bool, scalar: bool) -> None:
    conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))
    mean, std, eps = (0.5, 0.4, 0.3), (0.2, 0.3, 0.5), 0.1
    pixels = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    m, s = (torch.tensor(v).view(1, 3, 1, 1) for v in (mean, std))
    attack = pgd(eps, 3, random=random, mean=mean, std=std, bounds=(0.0, 1.0))
    loss = cross_entropy if scalar else None
    found = attack(conv, (pixels - m) / s, labels(seed, 6), loss, generator=seed) * s + m
    assert float((found - pixels).abs().max()) <= eps + 1e-12
    assert float(found.min()) >= -1e-12 and float(found.max()) <= 1 + 1e-12
    assert float((found - pixels).abs().max()) > eps / 2


def test_inputs_beyond_the_bounds_are_not_moved_further_out() -> None:
    low, high = Attack(0.1, bounds=(0.0, 1.0)).box(x := torch.tensor([[-0.5, 0.05, 1.2]]))
    assert torch.allclose(low, torch.tensor([[-0.5, 0.0, 1.1 - 0.1]]) + torch.tensor([[0.0, 0.0, 0.1]]))
    assert torch.allclose(high, torch.tensor([[-0.4, 0.15, 1.2]])) and bool((low <= x).all() and (x <= high).all())


def test_without_labels_the_predictions_are_attacked() -> None:
    model, x = mlp(3), draw(0, 20, 5)
    assert torch.equal(pgd(0.3, 4)(model, x), pgd(0.3, 4)(model, x, model(x).argmax(1)))


@given(SEEDS)
def test_what_withstands_agrees_with_every_point_met(seed: int) -> None:
    """Without a random start the points do not depend on which inputs are left, so a plain loop is the oracle."""
    model, x, y = mlp(seed % 1000), draw(seed, 30, 5), labels(seed, 30)
    at, stays = x.clone(), torch.ones(30, dtype=torch.bool)
    for _ in range(5):
        at = at.detach().requires_grad_()
        outputs = model(at)
        stays &= outputs.argmax(1) == y
        (slope,) = torch.autograd.grad(cross_entropy(outputs, y), at)
        at = torch.maximum(torch.minimum(at + 0.2 * slope.sign(), x + 0.4), x - 0.4)
    stays &= model(at).argmax(1) == y
    found = withstands(model, x, y, Attack(0.4, 5, 0.5, random=False), batch_size=7)
    assert torch.equal(found, stays)
    wider = withstands(model, x, y, Attack(0.4, 5, 0.5, random=False, restarts=2), batch_size=30)
    assert torch.equal(wider, stays)


def test_draws_come_from_the_generator_alone() -> None:
    model, x, y = mlp(0), draw(1, 10, 5), labels(0, 10)
    one, two, other = (pgd(0.3, 2)(model, x, y, generator=s) for s in (5, 5, 6))
    assert torch.equal(one, two) and not torch.equal(one, other)
    random = torch.Generator().manual_seed(5)
    assert torch.equal(pgd(0.3, 2)(model, x, y, generator=random), one)
    assert not torch.equal(pgd(0.3, 2)(model, x, y, generator=random), one)


class Raises(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("no")


def test_nothing_of_the_callers_changes() -> None:
    model = mlp(0, norm=True, dropout=True).train()
    model[0].eval()
    x, y = draw(1, 10, 5), labels(0, 10)
    with unchanged(model, x, y):
        pgd(0.3, 2)(model, x, y)
        fgsm(0.3)(model, x)
        withstands(model, x, y, pgd(0.3, 2))
    broken = Raises(5, 2).train()
    with unchanged(broken, x), pytest.raises(RuntimeError, match="no"):
        pgd(0.3)(broken, x)
    assert torch.equal(pgd(0.3, 2)(model, x, y), pgd(0.3, 2)(copy.deepcopy(model).eval(), x, y))


def test_it_works_without_gradients_being_recorded() -> None:
    model, x, y = mlp(0), draw(1, 10, 5), labels(0, 10)
    with torch.no_grad():
        found = pgd(0.3, 2)(model, x, y)
    with torch.inference_mode():
        again = pgd(0.3, 2)(model, x, y)
    assert torch.equal(found, again) and not found.requires_grad


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "eps": ({"eps": -0.1}, "eps: got -0.1"),
    "steps": ({"eps": 0.1, "steps": 0}, "steps: got 0"),
    "restarts": ({"eps": 0.1, "restarts": 0}, "restarts: got 0"),
    "step": ({"eps": 0.1, "step": 0.0}, "step: got 0.0"),
    "std": ({"eps": 0.1, "std": (1.0, 0.0)}, "std: got"),
    "bounds": ({"eps": 0.1, "bounds": (1, 0)}, "bounds: got"),
}


@pytest.mark.parametrize("kind", BAD)
def test_useless_numbers_are_named(kind: str) -> None:
    options, message = BAD[kind]
    with pytest.raises(ValueError, match=message):
        Attack(**options)


def test_useless_inputs_are_named() -> None:
    model, x, y = mlp(0), draw(1, 10, 5), labels(0, 10)
    with pytest.raises(ValueError, match="std: got 3 numbers for inputs of shape"):
        fgsm(0.1, std=(1.0, 2.0, 3.0))(model, x, y)
    with pytest.raises(ValueError, match="x: got torch.int64 of 2 axes"):
        fgsm(0.1).box(torch.ones(2, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="restarts: .*scalar"):
        pgd(0.1, 2, restarts=2)(model, x, y, cross_entropy)
