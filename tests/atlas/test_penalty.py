"""Penalties and bounds, against the conditions that minima satisfy."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Goal, fit_
from fipgeo.atlas.goals import Term
from fipgeo.atlas.penalty import Penalty
from fipgeo.atlas.region import Curvature
from fipgeo.atlas.solve import Objective, descend

from ..test_task_vectors import shaken
from .test_composition import draw

seeds = st.integers(0, 2**20)
penalties = st.sampled_from(
    [Penalty(0.3), Penalty(0.0, 0.0), Penalty(0.2, -0.1, 0.3), Penalty(0.3, 0.0), Penalty(0.0, -math.inf, 0.1)]
)


def broken(slope: Tensor, c: Tensor, penalty: Penalty) -> float:
    """How far from a minimum, by the conditions of Karush, Kuhn and Tucker: a smooth slope and where it is."""
    low = torch.where(c > 0, slope + penalty.l1, slope - penalty.l1)  # the least subgradient, and the largest
    high = torch.where(c < 0, slope - penalty.l1, slope + penalty.l1)
    down, up = low.clone(), high.clone()
    down[c > 0], up[c < 0] = high[c > 0], low[c < 0]
    falls = torch.where(c > penalty.lower + 1e-9, down.clamp(min=0), torch.zeros_like(c))  # it would pay to be less
    rises = torch.where(c < penalty.upper - 1e-9, (-up).clamp(min=0), torch.zeros_like(c))
    return float(torch.maximum(falls, rises).max())


def test_the_conditions_tell_minima_from_others() -> None:
    one = Penalty(0.5, lower=0.0)
    for slope, c, worst in ((0.4, 0.0, 0.0), (-0.4, 0.0, 0.0), (-0.8, 0.0, 0.3), (-0.5, 1.0, 0.0), (-0.2, 1.0, 0.3)):
        found = broken(torch.tensor([slope]), torch.tensor([c]), one)
        assert found == pytest.approx(worst, abs=1e-6)
    assert broken(torch.tensor([0.8]), torch.tensor([0.0]), one) == 0.0
    assert broken(torch.tensor([0.8]), torch.tensor([0.0]), Penalty(0.5)) == pytest.approx(0.3)


@settings(max_examples=40, deadline=None)
@given(seed=seeds, penalty=penalties, rows=st.integers(2, 9), ridge=st.sampled_from([0.1, 1.0]))
def test_a_step_without_a_radius_is_the_minimum_of_the_model(
    seed: int, penalty: Penalty, rows: int, ridge: float
) -> None:
    curvature = Curvature.of(draw(seed, rows, 6), ridge=ridge)
    c = penalty.near(draw(seed + 1, 6), 1.0)
    slope = draw(seed + 2, 6)
    d = penalty.step(curvature, slope, c, 1e6)
    assert bool((c + d >= penalty.lower - 1e-12).all()) and bool((c + d <= penalty.upper + 1e-12).all())
    assert broken(slope + curvature(d), (c + d).where((c + d).abs() > 1e-9, 0.0), penalty) < 1e-4


@settings(max_examples=30, deadline=None)
@given(seed=seeds, penalty=penalties, radius=st.floats(0.01, 2.0))
def test_a_step_is_within_its_radius_and_lowers_any_model(seed: int, penalty: Penalty, radius: float) -> None:
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    curvature = Curvature.of(draw(seed, 4, 6), signs)
    c, slope = penalty.near(draw(seed + 1, 6), 1.0), draw(seed + 2, 6)
    d = penalty.step(curvature, slope, c, radius)
    assert curvature.length(d) <= radius * (1 + 1e-9)
    assert bool((c + d >= penalty.lower - 1e-12).all()) and bool((c + d <= penalty.upper + 1e-12).all())
    assert penalty.change(curvature, slope, c, d) <= 0.0
    assert bool(d.any()) or broken(slope, c, penalty) < 1e-6


@settings(max_examples=8, deadline=None)
@given(seed=seeds, penalty=penalties)
def test_learned_coefficients_satisfy_the_conditions(seed: int, penalty: Penalty) -> None:
    base = shaken(nn.Linear(5, 3), seed)
    vectors = [TaskVector.between(base, shaken(base, seed + i)) for i in (1, 2, 3, 4)]
    x, y = draw(seed, 40, 5), torch.arange(40) % 3
    model = Composition(base, vectors)
    with torch.no_grad():
        model.coefficients.copy_(draw(seed + 9, 4, 2))  # brought to the bounds first
    fit = fit_(model, (x, y), l1=penalty.l1, bounds=(penalty.lower, penalty.upper), ridge=0.01, rtol=1e-9, steps=300)
    c = model.coefficients.detach()
    assert bool((c >= penalty.lower).all()) and bool((c <= penalty.upper).all())
    loss = cross_entropy(model(x), y) + 0.005 * model.coefficients.square().sum()
    (slope,) = torch.autograd.grad(loss, model.coefficients)
    assert fit.losses[-1] == pytest.approx(float(loss.detach()) + penalty.l1 * float(c.abs().sum()))
    assert list(fit.losses) == sorted(fit.losses, reverse=True)
    assert broken(slope.flatten(), c.flatten(), penalty) < 1e-3


def test_a_large_weight_leaves_nothing_and_a_small_one_some() -> None:
    base = shaken(nn.Linear(5, 3), 0)
    vectors = [TaskVector.between(base, shaken(base, i)) for i in range(1, 9)]
    x, y = draw(0, 60, 5), torch.arange(60) % 3
    zeros = []
    for l1 in (0.0, 0.02, 10.0):
        model = Composition(base, vectors, start=0.3)
        fit_(model, (x, y), l1=l1, rtol=1e-8)
        zeros.append(int(model.coefficients.eq(0).sum()))
    assert zeros[0] == 0 < zeros[1] < zeros[2] == 16


def test_a_start_is_brought_to_the_bounds_and_a_cut_step_counts_the_penalty() -> None:
    base = shaken(nn.Linear(5, 3), 0)
    vectors, data = [TaskVector.between(base, shaken(base, 1))], (draw(0, 20, 5), torch.arange(20) % 3)
    model = Composition(base, vectors, start=2.0)
    fit_(model, data, bounds=(-1.0, 0.5), steps=0)
    assert bool((model.coefficients == 0.5).all())
    term, penalty = Term.of(model, Goal(data)), Penalty(0.05)
    objective = Objective(model, [term], [term.batches], 0.0)
    start = model.coefficients.detach().clone()

    def near(c: Tensor) -> bool:
        return float((c - start).abs().max()) < 0.01

    fit = descend(objective, torch.Generator().manual_seed(0), steps=3, allowed=near, penalty=penalty)
    c = model.coefficients.detach()
    assert near(c) and not torch.equal(c, start)
    assert fit.losses[-1] == pytest.approx(cross_entropy(model(data[0]), data[1]).item() + 0.05 * float(c.abs().sum()))


def test_penalties_out_of_range_and_linear_compositions_are_refused() -> None:
    base = nn.Linear(2, 2)
    vectors, data = [TaskVector.between(base, shaken(base, 1))], (torch.ones(3, 2), torch.zeros(3).long())
    for l1, bounds in ((-1.0, (0.0, 1.0)), (math.nan, (0.0, 1.0)), (0.0, (1.0, 0.0))):
        with pytest.raises(ValueError, match="l1, bounds: got"):
            fit_(Composition(base, vectors), data, l1=l1, bounds=bounds)
    with pytest.raises(ValueError, match="for a linear composition; build it with linear=False"):
        fit_(Composition(base, vectors, linear=True), data, l1=0.1)


def test_what_a_step_leaves_by_rounding_is_removed() -> None:
    c = torch.tensor([0.1, 0.3, 0.7], dtype=torch.float64)
    d = torch.tensor([-0.1 * (1 - 3e-16), -0.2, 0.3 + 1e-15], dtype=torch.float64)
    assert float((c + d)[0]) != 0.0 and float((c + d)[2]) > 1.0
    assert Penalty(0.5, upper=1.0).moved(c, d).tolist() == [0.0, float(c[1] + d[1]), 1.0]
    assert Penalty(0.0, upper=1.0).moved(c, d)[0] != 0.0
