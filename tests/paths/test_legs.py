"""A path that goes on with another objective, and objectives that the driver has never heard of."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo import MetricField, NewTask, PathResult, Sparsity, StepControl, as_batches, walk
from fipgeo.paths import Leg, NoCorrection, Objective, Position, Proposal

from .toys import (
    CORRECTORS,
    draw,
    inputs,
    labels,
    loaded,
    method,
    mlp,
    same_paths,
    same_tensors,
    sparse_path,
    stored,
    verdict_by_hand,
    weight_names,
    zeros,
)

HELD = inputs(9, 25)
CONTROL = StepControl(1.0, 1 / 64, 1.0, tolerance=0.1)


def task(hold_zeros: bool = True) -> NewTask:
    data = as_batches((draw(5, 60, 5), labels(5, 60)), 10)
    return NewTask(data, cross_entropy, epochs=5, lr=0.1, hold_zeros=hold_zeros, num_batches=6)


def leg(objective: Objective, model: Any, **options: Any) -> PathResult:
    how = method(control=CONTROL) if isinstance(objective, NewTask) else method()
    how = replace(how, **options.pop("how", {}))
    return walk(MetricField(model, inputs(1, 40)), objective, how, held_out=as_batches(HELD), **options)


ORDERS = {
    "sparse, then new": (Sparsity(0.6, samples=2), task()),
    "new, then sparse": (task(), Sparsity(0.6, samples=2)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("norm", [False, True])
def test_a_path_goes_on_with_another_objective(order: str, norm: bool) -> None:
    one, two = ORDERS[order]
    model = mlp(0, norm=norm)
    first = leg(one, model)
    both = leg(two, model, after=first)
    assert both.outcome == "reached" and len(both) > len(first) > 2
    same_paths(replace(both, points=both[: len(first)]), replace(both, points=first.points))
    assert both.legs == (Leg(one.name, one.maximise, 0), Leg(two.name, two.maximise, len(first) - 1))
    assert (both.objective_name, both.maximise) == (two.name, two.maximise)
    for before, point in zip(both, both[1:], strict=False):
        distance, drift, _ = verdict_by_hand(loaded(model, {}), loaded(model, point.tensors), HELD)
        assert point.distance == pytest.approx(distance, rel=1e-10)  # from the start of the first leg
        assert point.drift == pytest.approx(drift, rel=1e-10)
        assert point.arc_length == pytest.approx(before.arc_length + point.step_norm) and point.step == before.step + 1
        assert point.cost > before.cost and point.seconds >= before.seconds
    assert zeros(both[-1].tensors, weight_names(model)) == 29  # of 48, in either order
    names = ["0.weight", *(["3.weight"] if norm else ["2.weight"])]
    if order.startswith("sparse"):  # what was won is held
        assert all(bool((stored(both[-1])[n][stored(first[-1])[n] == 0] == 0).all()) for n in names)
    assert both.best().step > first[-1].step  # the objective before it is another quantity
    assert both.at(objective=both[-2].objective).step >= len(first)


def test_zeros_are_lost_where_nobody_holds_them() -> None:
    first = leg(Sparsity(0.6, samples=2), mlp(0))
    assert leg(task(hold_zeros=False), mlp(0), after=first)[-1].sparsity < 0.6


def test_the_second_leg_resumes_and_is_stored(tmp_path: Path) -> None:
    file = tmp_path / "path.safetensors"
    first = leg(Sparsity(0.6, samples=2), mlp(0))
    whole = leg(task(), mlp(0), after=first)
    part = leg(task(), mlp(0), after=first, how={"max_steps": 1})
    assert len(part) == len(first) + 1 and part.outcome == "max_steps"
    part.save(file)
    back = PathResult.load(file)
    same_paths(back, part)
    assert back.legs == part.legs
    same_paths(leg(task(), mlp(0), resume=back), whole)
    same_paths(leg(task(), mlp(0), after=first, checkpoint=file), whole)
    with pytest.raises(ValueError, match="checkpoint: .* holds another path"):
        leg(task(), mlp(0), after=leg(Sparsity(0.5, samples=2), mlp(0)), checkpoint=file)
    with pytest.raises(ValueError, match="resume: a path of 'loss on new data'"):
        leg(Sparsity(0.6, samples=2), mlp(0), resume=part)
    with pytest.raises(ValueError, match="after: got a path, and one to resume"):
        leg(task(), mlp(0), after=first, resume=part)


def test_the_model_may_hold_any_weights_of_the_path() -> None:
    model = mlp(0, norm=True)
    first = leg(Sparsity(0.6, samples=2), model)
    expected = leg(task(), model, after=first)
    first[-1].apply_(model)
    same_paths(leg(task(), model, after=first), expected)


def test_a_leg_begins_at_a_chosen_point() -> None:
    first = leg(Sparsity(0.6, samples=2), mlp(0))
    cut = first.until(first[1])
    assert len(cut) == 2 and cut.outcome == "stopped" and cut[-1] is first[1]
    both = leg(task(), mlp(0), after=cut)
    assert both.legs[1].begin == 1 and both[-1].sparsity == first[1].sparsity
    with pytest.raises(ValueError, match=r"resume: the path was cut at a chosen point; pass after="):
        leg(Sparsity(0.6, samples=2), mlp(0), resume=cut)
    with pytest.raises(ValueError, match="until: point 1 was not stored"):
        first.thinned([0, -1]).until(1)
    with pytest.raises(ValueError, match="until: got step 99"):
        first.until(99)
    same_tensors(both.until(2)[-1].tensors, both[2].tensors)
    assert both.until(1).legs == first.legs


@pytest.mark.parametrize("what", ["inputs", "model", "thin"])
def test_going_on_from_the_path_of_something_else_is_refused(what: str) -> None:
    first = leg(Sparsity(0.6, samples=2), mlp(0))
    if what == "inputs":
        with pytest.raises(ValueError, match="after: the path's last point measured"):
            walk(MetricField(mlp(0), inputs(1, 40)), task(), method(), held_out=as_batches(inputs(7)), after=first)
    elif what == "model":
        with pytest.raises(ValueError, match="after: the path's points lack or differ in 0.weight"):
            leg(task(), mlp(0, hidden=9), after=first)
    else:
        with pytest.raises(ValueError, match="after: point .* was not stored"):
            leg(task(), mlp(0), after=first.thinned([0]))


def test_a_limit_on_changes_picks_within_the_last_leg() -> None:
    both = leg(task(), mlp(0), after=leg(Sparsity(0.3, samples=2), mlp(0)))
    point = both.best(max_changed=1.0, confidence=0.9)
    assert point.objective == min(p.objective for p in both[both.legs[1].begin + 1 :])


# waypoints and layers


def test_waypoints_are_found_and_kept() -> None:
    levels = (0.25, 0.5, 0.75)
    path = sparse_path(mlp(0), inputs(1, 40), levels, options={"store": "last"})  # type: ignore[arg-type]
    for level in levels:
        assert path.at(objective=level).sparsity == level
    assert sum(p.tensors is not None for p in path) == 4
    with pytest.raises(ValueError, match="at: no point of the last leg was stored"):
        path.thinned([]).at(objective=0.5)


def test_layers_count_what_is_zero_in_them() -> None:
    path = sparse_path(mlp(0, norm=True), inputs(1, 40), 0.5, options={"store": "last"})
    for p in path:
        layers = p.layer_sparsity()
        assert {n: size for n, (_, size) in layers.items()} == {"0.weight": 30, "3.weight": 18}
        assert sum(z for z, _ in layers.values()) / 48 == p.sparsity
        if p.tensors is not None:
            assert {n: z for n, (z, _) in layers.items()} == {n: zeros(p.tensors, [n]) for n in layers}
    excluded = sparse_path(mlp(0), inputs(1, 40), 0.5, exclude="2.*")
    assert excluded[-1].layer_sparsity() == {"0.weight": (15, 30)}


# objectives of one's own


@dataclass(frozen=True, eq=False)
class Towards(Objective):
    """Given weights: size is the share of the way that is left."""

    goal: Tensor = field(repr=False)
    name = "distance to the goal"
    maximise = False

    def begin(self, kept: Any, position: Position) -> Mapping[str, Tensor]:
        return {"left": (self.goal - position.theta).norm()}

    def propose(self, kept: Any, position: Position, state: Any, size: float, predictor: Any, generator: Any) -> Any:
        step = size * (self.goal - position.theta)
        moves = predictor(position, torch.ones_like(step, dtype=torch.bool))
        theta = position.theta + (step if moves is None else moves.passed(step))
        still = torch.zeros_like(step, dtype=torch.bool)  # nothing is to be moved back
        return Proposal(replace(position, theta=theta), still, {"left": (self.goal - theta).norm()}, moves, 0.0)

    def value(self, position: Position, state: Any) -> float:
        return float((self.goal - position.theta).norm())

    def reached(self, state: Any) -> bool:
        return float(state["left"]) < 1e-3


class Steepest(Towards):
    """The linear functional <goal, theta>, up to a length of one."""

    name = "functional"
    maximise = True

    def begin(self, kept: Any, position: Position) -> Mapping[str, Tensor]:
        return {"left": torch.ones(())}

    def propose(self, kept: Any, position: Position, state: Any, size: float, predictor: Any, generator: Any) -> Any:
        free = torch.ones_like(self.goal, dtype=torch.bool)
        moves = predictor(position, free)
        theta = position.theta + min(size, float(state["left"])) * moves.passed(self.goal / self.goal.norm())
        return Proposal(replace(position, theta=theta), free, {"left": (state["left"] - size).clamp(min=0)}, moves, 0.0)

    def value(self, position: Position, state: Any) -> float:
        return float(self.goal @ position.theta)


def test_a_path_towards_given_weights() -> None:
    # the hidden units in another order: the same function, elsewhere
    model, x = mlp(0), inputs(1, 60)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    named = dict(model.state_dict())
    for name, axis in (("0.weight", 0), ("0.bias", 0), ("2.weight", 1)):
        named[name] = named[name].index_select(axis, order)
    fields = MetricField(model, x)
    goal = fields.space.ravel(named)
    how = method(CORRECTORS["first-order"], damping=None, control=StepControl(0.2, 0.05, 1.0, tolerance=0.2))
    path = walk(fields, Towards(goal), how)
    assert path.outcome == "reached" and path[-1].objective < 1e-3 and max(p.drift for p in path) > 0.1
    assert path[-1].drift < 1e-3 and path.objective_name == "distance to the goal"
    assert path.best() is path[-1]


def test_a_path_that_maximises_a_functional_within_a_budget() -> None:
    fields = MetricField(mlp(0), inputs(1, 40))
    goal = draw(3, fields.space.dim)
    free, bound = (
        walk(fields, Steepest(goal), method(control=StepControl(0.1, 0.002, 0.2, tolerance=0.02), budget=budget))
        for budget in (None, 0.05)
    )
    values = [p.objective for p in free]
    assert free.outcome == "reached" and values == sorted(values) and values[-1] > values[0] + 0.1
    assert all(p.control_drift <= 0.05 for p in bound)
    # the same length of the same direction without the metric moves the function further
    straight = fields.map.point() + free[-1].arc_length * goal / goal.norm()
    moved = verdict_by_hand(mlp(0), loaded(mlp(0), fields.map.named(straight)), HELD)
    walked = verdict_by_hand(mlp(0), loaded(mlp(0), free[-1].tensors), HELD)
    assert walked[1] < 0.5 * moved[1]


def test_the_second_order_takes_a_power_off_the_drift_of_a_null_space_step() -> None:
    x = inputs(1, 4).repeat(10, 1)  # so that control inputs are among the protected ones
    fields = MetricField(mlp(0, hidden=16), x)
    goal = draw(3, fields.space.dim)

    def drift(order: int, size: float) -> float:
        control = StepControl(size, size, size, tolerance=1e6)
        how = method(NoCorrection(), damping=0, order=order, control=control, max_steps=1)
        path = walk(fields, Steepest(goal), how, held_out=x)
        assert path.outcome == "max_steps"
        return path[1].drift

    for order in (1, 2):
        powers = torch.tensor([drift(order, size) for size in (0.2, 0.1, 0.05)]).log2().diff().neg()
        assert bool((powers - order - 1).abs().max() < 0.4)
    with pytest.raises(ValueError, match="order: got 3"):
        method(NoCorrection(), order=3)


def test_the_second_order_changes_nothing_where_outputs_are_linear() -> None:
    model, x = nn.Linear(5, 3), inputs(1, 20)
    fields = MetricField(model, x)
    goal = draw(3, fields.space.dim)
    first, second = (
        walk(fields, Steepest(goal), method(NoCorrection(), damping=0.1, order=order, max_steps=2)) for order in (1, 2)
    )
    assert first[-1].drift > 0 and first[-1].tensors is not None and second[-1].tensors is not None
    for name, tensor in first[-1].tensors.items():
        torch.testing.assert_close(second[-1].tensors[name], tensor, rtol=1e-10, atol=1e-12)
