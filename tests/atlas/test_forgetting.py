"""Forgetting under a floor, against its definition."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom
from torch import nn
from torch.nn.functional import cross_entropy

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Goal, fit_, forget_
from fipgeo.atlas.forgetting import Floor
from fipgeo.data import as_batches
from fipgeo.linalg import Outcome

from .test_composition import draw


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
@given(seed=st.integers(0, 2**20), floor=st.floats(0.5, 0.94), confidence=st.sampled_from([None, 0.7]))
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


def test_the_weight_of_the_control_and_the_ridge_are_in_what_is_minimised() -> None:
    """Where a floor of almost nothing stops no step."""
    base, x, labels = quadrants()
    away, ends = labels < 2, {}
    goals = (x[away], labels[away]), (x[~away], labels[~away])
    for weight, ridge in ((0.5, 0.1), (50.0, 0.1), (0.5, 10.0)):
        model = Composition(base, random_vectors())
        options = {"floor": 1e-3, "held_out": goals[1], "steps": 60, "weight": weight, "ridge": ridge}
        fit = forget_(model, *goals, generator=0, **options)
        losses = [cross_entropy(model(part), y).item() for part, y in goals]
        c = model.coefficients.detach()
        expected = weight * losses[1] - losses[0] + ridge / 2 * float(c.square().sum())
        assert any(value == pytest.approx(expected) for value in fit.losses[1:]) and fit.losses[0] > fit.losses[-1]
        ends[weight, ridge] = losses[1], float(c.norm())
    assert ends[50.0, 0.1][0] < ends[0.5, 0.1][0]
    assert ends[0.5, 10.0][1] < ends[0.5, 0.1][1]


def test_the_result_is_the_first_look_that_leaves_least() -> None:
    base, x, labels = quadrants()
    away, ends = labels < 2, []
    goals = (x[away], labels[away]), (x[~away], labels[~away])
    for steps in range(9):
        model = Composition(base, random_vectors())
        fit = forget_(model, *goals, floor=1e-3, held_out=goals[1], steps=steps, weight=0.3, generator=0)
        with torch.no_grad():
            left = int((model(x[away]).argmax(1) == labels[away]).sum())
        ends.append((left, fit.losses[-1], model.coefficients.detach()))
    lefts = [left for left, _, _ in ends]
    assert lefts == sorted(lefts, reverse=True) and lefts[0] > lefts[-1] == lefts[-2]
    first = lefts.index(lefts[-1])
    for _, _, c in ends[first:]:
        assert torch.equal(c, ends[first][2])  # although the loss falls on
    assert ends[-1][1] < ends[first][1] - 0.1


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), floor=st.floats(0.3, 0.95))
def test_all_of_the_control_tells_what_is_left_up_to_the_start(seed: int, floor: float) -> None:
    base, x, labels = quadrants()
    model, goal = Composition(base, random_vectors()), Goal((x, labels))
    few = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:30]
    whole, part = Floor.of(model, goal, floor), Floor.of(model, Goal((x[few], labels[few])), floor)
    start, end = (draw(seed + i, 6, 2) / 4 for i in (0, 1))

    def share(c: torch.Tensor, places: Any = slice(None)) -> float:
        with torch.no_grad():
            net = torch.func.functional_call(model.module, model.weights(c), (x[places],))
        return float((net.argmax(1) == labels[places]).double().mean())

    assert whole(start) == (share(start) >= floor * share(torch.zeros_like(start)))
    left = share(start) + share(end, few) - share(start, few)
    least = floor * share(torch.zeros_like(start))
    if abs(left - least) > 1e-9:
        assert part.beside(whole, start)(end) == (left >= least)


def test_a_start_that_all_of_the_control_allows_is_not_brought_back() -> None:
    base, x, labels = quadrants()
    away, kinds = labels < 2, set()
    goals = (x[away], labels[away]), (x[~away], labels[~away])
    for seed in range(20):
        model = Composition(base, random_vectors())
        with torch.no_grad():
            model.coefficients.copy_(0.25 * draw(seed, 6, 2))
        start = model.coefficients.detach().clone()
        ours = Floor.of(model, Goal(goals[1]), 0.9)(start)
        forget_(model, *goals, floor=0.9, held_out=0.2, steps=0, generator=seed)
        assert torch.equal(model.coefficients.detach(), start) == ours
        kinds.add(ours)
    assert kinds == {True, False}


def test_what_is_lost_is_counted_from_what_all_of_the_control_says_of_the_start() -> None:
    base, x, labels = quadrants()
    away, moved = labels < 2, 0
    goals = (x[away], labels[away]), (x[~away], labels[~away])
    for seed in range(12):
        model = Composition(base, random_vectors())
        with torch.no_grad():
            model.coefficients.copy_(0.2 * draw(seed, 6, 2))
            left, before = ((net(goals[1][0]).argmax(1) == goals[1][1]).sum() for net in (model, base))
        start, floor = model.coefficients.detach().clone(), 0.97 * float(left / before)
        forget_(model, *goals, floor=floor, held_out=0.2, steps=6, weight=0.2, generator=seed)
        _, data = as_batches(goals[1]).split(0.2, torch.Generator().manual_seed(seed))
        whole, judge = Floor.of(model, Goal(goals[1]), floor), Floor.of(model, Goal(data), floor)
        end = model.coefficients.detach()
        assert judge.beside(whole, start)(end)
        moved += not judge(start) and not judge(end) and not torch.equal(start, end)
    assert moved  # where the data set apart, which know the start less well, would not have allowed it


@pytest.mark.parametrize("confidence", [None, 0.9])
def test_a_start_is_brought_back_where_held_out_data_alone_decide(confidence: float | None) -> None:
    base, x, labels = quadrants()
    model = Composition(base, random_vectors())
    with torch.no_grad():
        model.coefficients.copy_(0.2 * draw(3, 6, 2))
        start = model.coefficients.detach().clone()
        right, before = (net(x).argmax(1) == labels for net in (model, base))
    lost = before & ~right
    judge, control = (x[lost], labels[lost]), (x[right], labels[right])
    forget_(model, (x, labels), control, held_out=judge, floor=0.5, confidence=confidence, steps=0)
    assert not torch.equal(model.coefficients.detach(), start)
    if confidence is not None:  # and where they are a share of the control
        with torch.no_grad():
            model.coefficients.copy_(start)
        floor = 0.97 * float(right.sum() / before.sum())
        assert Floor.of(model, Goal((x, labels)), floor)(start)
        forget_(model, (x, labels), (x, labels), held_out=0.5, floor=floor, confidence=confidence, steps=0)
        assert not torch.equal(model.coefficients.detach(), start)


def test_nothing_is_changed_where_no_less_is_left() -> None:
    base, x, labels = quadrants()
    model, wrong = Composition(base, random_vectors()), (labels + 1) % 4
    with torch.no_grad():
        lost = base(x).argmax(1) != wrong
    fit = forget_(model, (x[lost], wrong[lost]), (x, labels), steps=3)  # nothing of the target is right to begin with
    assert not bool(model.coefficients.any()) and fit.outcome is Outcome.STAGNATED
    fit = forget_(model, (x, labels), (x, labels), steps=0)  # as much as before
    assert fit.outcome is Outcome.STAGNATED


def test_what_cannot_be_forgotten_is_said_and_coefficients_stay() -> None:
    base, x, labels = quadrants()
    model = Composition(base, random_vectors())
    with torch.no_grad():
        model.coefficients.copy_(5 * draw(1, 6, 2))
    before = model.coefficients.detach().clone()
    with pytest.raises(ValueError, match=r"weight: got 0\.0"):
        forget_(model, (x, labels), (x, labels), weight=0.0)
    with pytest.raises(ValueError, match="target: its accuracy needs labels"):
        forget_(model, x, (x, labels))

    def forward(net: nn.Module, batch: Any) -> torch.Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return net(batch[0])

    with pytest.raises(RuntimeError, match="no gradients"):
        forget_(model, Goal((x, labels), forward_fn=forward), (x, labels), steps=2)
    assert torch.equal(model.coefficients.detach(), before)


def test_a_linear_composition_forgets_with_a_ridge() -> None:
    base, x, labels = quadrants()
    away, model = labels < 2, Composition(base, random_vectors(), linear=True)
    goals = (x[away], labels[away]), (x[~away], labels[~away])
    with pytest.raises(ValueError, match=r"ridge: got 0\.0 for a linear composition"):
        forget_(model, *goals)
    with torch.no_grad():
        before = [(base(part).argmax(1) == y).double().mean() for part, y in goals]
    goal = [Goal(goals[0], weight=-1.0), Goal(goals[1], weight=0.5)]
    solution = Composition(base, random_vectors(), linear=True)
    fit_(solution, goal, ridge=0.03)
    with torch.no_grad():
        broken = (solution(x[~away]).argmax(1) == labels[~away]).double().mean()
    assert broken < 0.9 * before[1]  # the minimum is below the floor
    forget_(model, *goals, held_out=goals[1], floor=0.9, weight=0.5, ridge=0.03)
    with torch.no_grad():
        after = [(model(part).argmax(1) == y).double().mean() for part, y in goals]
    assert after[0] < before[0] and after[1] >= 0.9 * before[1]
    free = Composition(base, random_vectors(), linear=True)
    forget_(free, *goals, held_out=goals[1], floor=1e-3, weight=0.5, ridge=0.03)
    torch.testing.assert_close(free.coefficients, solution.coefficients)
