"""Sparsity: exact counts, zeros that stay, what may not become zero, and which weights go first."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import GaussNewton, MetricField, PathResult, Sparsity
from fipgeo.data import ListBatches
from fipgeo.paths import Corrector, Kept, Position
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.correctors import Correction
from fipgeo.paths.objectives import metric_diagonal, weight_mask

from .toys import (
    CORRECTORS,
    draw,
    filled,
    inputs,
    jacobian_by_backward,
    kept_of,
    mlp,
    same_bits,
    sparse_path,
    stored,
    weight_names,
    zeros,
)

SEEDS = st.integers(0, 10**6)
TARGETS = st.floats(0.05, 0.9)
WEIGHTS = 5 * 6 + 6 * 3


def nested(path: PathResult, names: list[str]) -> bool:
    """Whether a weight that is zero at one point is zero at all later ones."""
    masks = [torch.cat([stored(p)[n].reshape(-1) == 0 for n in names]) for p in path]
    return all(bool((later | ~earlier).all()) for earlier, later in zip(masks, masks[1:], strict=False))


@pytest.mark.parametrize("corrector", CORRECTORS.values(), ids=CORRECTORS)
@pytest.mark.parametrize("norm", [False, True])
@given(seed=SEEDS, target=TARGETS)
@settings(max_examples=2)
def test_zeros_are_exactly_as_many_as_asked_and_held(
    corrector: Corrector, norm: bool, seed: int, target: float
) -> None:
    model = mlp(seed, norm=norm)
    names = weight_names(model)
    path = sparse_path(model, inputs(seed, 24), target, corrector=corrector)
    assert path.outcome == "reached"
    assert zeros(path[-1].tensors, names) == round(target * WEIGHTS)
    assert nested(path, names)
    dense = [n for n, _ in model.named_parameters() if n not in names]
    assert zeros(path[-1].tensors, dense) == 0
    for point in path:
        share = zeros(point.tensors, names) / WEIGHTS
        assert point.sparsity == point.objective == pytest.approx(share, abs=1e-15)


def test_steps_gain_zeros_without_passing_the_goal() -> None:
    path = sparse_path(mlp(0), inputs(0, 24), 0.7)
    counts = [round(p.sparsity * WEIGHTS) for p in path]
    assert counts == sorted(set(counts)) and counts[-1] == round(0.7 * WEIGHTS)


@pytest.mark.parametrize("exclude", ["2.*", ["2.*"], ["2.weight", "0.bias"]])
def test_excluded_tensors_stay_dense(exclude: str | list[str]) -> None:
    path = sparse_path(mlp(1), inputs(0, 24), 0.5, exclude=exclude)
    assert zeros(path[-1].tensors, ["2.weight", "0.bias", "2.bias"]) == 0
    assert zeros(path[-1].tensors, ["0.weight"]) == 15 and path[-1].sparsity == 0.5


def test_only_the_chosen_parameters_become_sparse_or_move() -> None:
    model = mlp(1)
    field = MetricField(model, inputs(0, 24), params="2.weight")
    assert int(Sparsity(0.5).counted(field.map).sum()) == 18 == field.space.dim


def test_weights_that_are_zero_already_count_and_are_held() -> None:
    model = mlp(2)
    with torch.no_grad():
        model[0].weight[:2] = 0.0  # type: ignore[index]
        model[0].bias[0] = 0.0  # type: ignore[index]
    path = sparse_path(model, inputs(0, 24), 0.5)
    assert path[0].sparsity == 10 / WEIGHTS
    assert zeros(path[-1].tensors, ["0.weight", "2.weight"]) == 24
    assert not stored(path[-1])["0.weight"][:2].any()
    assert stored(path[-1])["0.bias"][0] != 0.0  # a bias is free to move


@pytest.mark.parametrize("target", [0.0, 0.1])
def test_a_target_that_is_met_at_the_start_returns_the_start(target: float) -> None:
    model = mlp(2, norm=True)
    with torch.no_grad():
        model[0].weight[0] = 0.0  # type: ignore[index]
    path = sparse_path(model, inputs(0, 24), target)
    assert path.outcome == "reached" and len(path) == 1 and path[-1].drift == 0.0
    for name, tensor in model.state_dict().items():
        if name in stored(path[-1]):
            assert same_bits(stored(path[-1])[name], tensor)


def test_the_mask_is_the_matrices_less_the_exclusions() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv1d(1, 2, 3), nn.LayerNorm([2, 4]), nn.Linear(4, 2)
            self.token = nn.Parameter(torch.zeros(1, 1, 4))

    model = MetricField(Net(), inputs()).map
    parts = model.space.unravel(weight_mask(model, "head.*"))
    assert {n for n, m in parts.items() if m.any()} == {"conv.weight"}
    assert bool(parts["conv.weight"].all())


def dense_diagonal(model: nn.Module, x: Tensor) -> Tensor:
    return jacobian_by_backward(model, x).square().sum(0) / len(x)


@pytest.mark.parametrize("ragged", [False, True], ids=["tensor", "unlike batches"])
def test_the_diagonal_estimate_is_unbiased(ragged: bool) -> None:
    model, x = filled(nn.Linear(5, 3), 1), inputs(2, 12)
    kept = kept_of(model, x)
    if ragged:  # whole batches are drawn, as where shapes differ too much to be joined
        listed = ListBatches([x[:2], x[2:7], x[7:]])
        reference = torch.cat(list(kept.reference)).split([2, 5, 5])
        kept = Kept(replace(kept.function, batches=listed), listed, reference, kept.start)
    position = Position(kept.function.map.point())
    source = torch.Generator().manual_seed(3)
    single = 60 if ragged else 1  # the ratio of two random sums is unbiased only where the second one is large
    draws = torch.stack([metric_diagonal(kept, position, single, 4, source) for _ in range(32 if ragged else 450)])
    error = draws.std(0) / len(draws) ** 0.5
    exact = dense_diagonal(model, x)
    assert float((error / exact).max()) < 0.08  # else the next line could not fail
    assert bool(((draws.mean(0) - exact).abs() < 4.5 * error + 0.01 * ragged * exact).all())


@given(SEEDS)
@settings(max_examples=4)
def test_the_diagonal_estimate_follows_the_position(seed: int) -> None:
    model, x = mlp(seed), inputs(seed, 6)
    kept = kept_of(model, x)
    theta = kept.function.map.point() + 0.5 * draw(seed, len(kept.function.map.point()))
    source = torch.Generator().manual_seed(seed)
    found = metric_diagonal(kept, Position(theta), 60, 6, source)
    exact = dense_diagonal(kept_model(model, kept, theta), x)
    assert float((found - exact).norm() / exact.norm()) < 0.5
    assert math.isclose(float(found.sum()), float(exact.sum()), rel_tol=0.35)
    assert bool((found >= 0).all())


def kept_model(model: nn.Module, kept: Kept, theta: Tensor) -> nn.Module:
    model = filled(mlp(0), 0)
    model.load_state_dict(kept.function.map.named(theta))
    return model


def test_the_weights_that_the_outputs_do_not_feel_go_first() -> None:
    # inputs 3 and 4 are never active: their large weights cost nothing, the small others something
    model, x = filled(nn.Linear(5, 3), 4), inputs(5, 40)
    with torch.no_grad():
        model.weight[:, 3:] = 10.0  # type: ignore[index]
    x[:, 3:] = 0.0
    path = sparse_path(model, x, 6 / 15)
    assert zeros({"w": stored(path[-1])["weight"][:, 3:]}, ["w"]) == 6
    assert path[-1].drift < 1e-12


def test_compensation_beats_setting_the_same_weights_to_zero() -> None:
    model, x = mlp(6), inputs(7, 60)
    path = sparse_path(model, x, 0.4)
    kept = kept_of(model, x)
    field = MetricField(model, x)
    plain = field.map.point()
    end = field.space.ravel(path[-1].tensors)
    plain[end == 0] = 0.0
    assert kept.loss(Position(end)) < 0.5 * kept.loss(Position(plain))


@pytest.mark.parametrize("corrector", CORRECTORS.values(), ids=CORRECTORS)
@given(seed=SEEDS, targets=st.lists(st.integers(1, 19), min_size=1, max_size=3, unique=True))
@settings(max_examples=2)
def test_every_waypoint_is_hit_exactly(corrector: Corrector, seed: int, targets: list[int]) -> None:
    waypoints = tuple(t / 20 for t in sorted(targets))
    path = sparse_path(mlp(seed), inputs(seed, 24), waypoints, corrector=corrector)
    counts = [zeros(p.tensors, ["0.weight", "2.weight"]) for p in path]
    assert path.outcome == "reached" and {round(t * WEIGHTS) for t in waypoints} <= set(counts)
    assert counts[-1] == round(waypoints[-1] * WEIGHTS)


def test_the_corrector_does_its_full_work_at_the_waypoints_only() -> None:
    finals = []

    class Watching(GaussNewton):
        def correct(self, kept: Kept, position: Position, *args: Any, final: bool = False, **kwargs: Any) -> Correction:
            finals.append((zeros(kept.function.map.named(position.theta), ["0.weight", "2.weight"]), final))
            return super().correct(kept, position, *args, final=final, **kwargs)

    sparse_path(mlp(0), inputs(0, 24), (0.5, 0.75, 0.9), corrector=Watching(steps=1, final_steps=2))
    assert {count for count, final in finals if final} == {24, 36, 43}
    assert all(final == (count in (24, 36, 43)) for count, final in finals) and not all(f for _, f in finals)


@pytest.mark.parametrize("bad", [1.0, -0.1, (), (0.5, 1.0), (0.5, 0.5), (0.9, 0.8), math.nan])
def test_targets_that_are_no_increasing_shares_are_refused(bad: Any) -> None:
    with pytest.raises(ValueError, match="sparsity: got"):
        Sparsity(bad)


def test_the_predicted_change_is_that_of_the_linear_model() -> None:
    model, x = filled(nn.Linear(5, 3), 1), inputs(2, 12)  # linear in its weights: the prediction is exact
    kept = kept_of(model, x)
    objective, start = Sparsity(0.5), Position(kept.start)
    source = torch.Generator().manual_seed(0)
    state = objective.begin(kept, start)

    def predictor(position: Position, free: Tensor) -> Compensation:
        return Compensation(kept, position, free, damping=1e-2)

    first = objective.propose(kept, start, state, 0.2, predictor, source)
    second = objective.propose(kept, first.position, first.state, 0.2, predictor, source)
    sizes = [(kept.residual(p).square().sum() / 12).sqrt() for p in (start, first.position, second.position)]
    assert first.predicted == pytest.approx(float(sizes[1] - sizes[0]), rel=1e-9)
    assert second.predicted == pytest.approx(float(sizes[2] - sizes[1]), rel=1e-9)
    assert objective.propose(kept, start, state, 0.2, lambda *_: None, source).predicted is None
