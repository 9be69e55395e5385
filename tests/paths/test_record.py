"""PathResult: a sequence, the best point within limits, writing into models, and files."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fipgeo import PathPoint, PathResult, changed_upper_bound
from fipgeo.io import save_record

from .toys import draw, inputs, loaded, mlp, same_bits, same_paths, sparse_path, stored

TOTAL = 100


def point(step: int, objective: float, changed: float, drift: float, stored: bool = True) -> PathPoint:
    numbers: dict[str, Any] = {
        "arc_length": 1.0 * step,
        "step_norm": 1.0,
        "distance": drift,
        "drift": drift,
        "changed": changed,
    }
    numbers |= {"objective": objective, "sparsity": 0.5, "cost": 10.0 * step, "seconds": 0.1}
    upper = changed_upper_bound(round(changed * TOTAL), TOTAL)
    tensors = {"weight": draw(step, 2, 3)} if stored else None
    return PathPoint(step=step, changed_upper=upper, num_held_out=TOTAL, tensors=tensors, **numbers)


def path_of(points: Sequence[PathPoint], maximise: bool = True) -> PathResult:
    return PathResult(tuple(points), "sparsity", maximise, 0.5, "reached", "the objective was reached", {"size": 0.1})


RISING = [point(i, 0.1 * i, 0.01 * i, 0.02 * i) for i in range(6)]


def test_a_path_is_a_sequence_of_its_points() -> None:
    path = path_of(RISING)
    assert isinstance(path, Sequence) and len(path) == 6 and list(path) == RISING
    assert path[0] is RISING[0] and path[-1] is RISING[-1] and path[1:3] == tuple(RISING[1:3])
    assert RISING[2] in path and path.index(RISING[2]) == 2
    with pytest.raises(IndexError):
        path[6]


@given(st.lists(st.tuples(*[st.integers(0, 10)] * 3, st.booleans()), min_size=1, max_size=8), st.booleans())
def test_best_is_the_best_stored_point_within_the_limits(
    rows: list[tuple[int, int, int, bool]], maximise: bool
) -> None:
    points = [point(i, o / 10, c / 100, d / 10, stored) for i, (o, c, d, stored) in enumerate(rows)]
    path = path_of(points, maximise)
    cases: list[dict[str, Any]] = [
        {},
        {"max_changed": 0.05},
        {"max_drift": 0.5},
        {"max_changed": 0.07, "max_drift": 0.3},
    ]
    for limits in cases:
        allowed = [
            p
            for p in points
            if p.tensors is not None
            and p.changed <= limits.get("max_changed", 1.0)
            and p.drift <= limits.get("max_drift", 9.0)
        ]
        if not allowed:
            with pytest.raises(ValueError, match="best: no stored point"):
                path.best(**limits)
            continue
        found = path.best(**limits)
        assert found in allowed
        best = (max if maximise else min)(p.objective for p in allowed)
        assert found.objective == best
        assert found.drift == min(p.drift for p in allowed if p.objective == best)


def test_a_confidence_asks_for_the_bound_instead_of_the_share() -> None:
    path = path_of(RISING)
    assert path.best(max_changed=0.05).step == 5
    certified = path.best(max_changed=0.05, confidence=0.95)
    assert path.best(max_changed=0.05, confidence=0.95, multiplicity="none") is certified
    assert certified.changed_upper <= 0.05 < path[certified.step + 1].changed_upper
    assert path.best(max_changed=0.05, confidence=0.6).step > certified.step


def test_a_limit_that_cannot_be_certified_says_how_near_the_path_came() -> None:
    nearest = changed_upper_bound(0, TOTAL, 0.99)
    with pytest.raises(ValueError, match=rf"best: .*certified at 99% on {TOTAL} held-out inputs is {nearest:.4f}"):
        path_of(RISING).best(max_changed=0.001, confidence=0.99)
    with pytest.raises(ValueError, match="confidence: got"):
        path_of(RISING).best(max_changed=0.1, confidence=1.5)


def test_best_among_the_stored_points_of_a_thin_path() -> None:
    path = path_of(RISING).thinned([0, -1])
    assert [p.tensors is not None for p in path] == [True, *[False] * 4, True]
    assert path.best(max_changed=0.04).step == 0 and path.best().step == 5
    with pytest.raises(ValueError, match="point 2 was not stored; walk with store='all'"):
        path[2].apply_(nn.Linear(3, 2))


def test_to_dict_is_flat_and_complete() -> None:
    numbers = RISING[1].to_dict()
    assert not {"tensors", "layers", "certificate"} & numbers.keys() and len(numbers) == 13
    assert all(type(v) in (int, float) for v in numbers.values())


def test_apply_writes_weights_and_normalisation_statistics() -> None:
    model, x = mlp(3, norm=True).train(), inputs(4, 30)
    path = sparse_path(model, x, 0.4)
    other = mlp(9, norm=True).train()
    for p in other.parameters():
        p.requires_grad_(False)
    grads_before = [p.grad for p in other.parameters()]
    assert path[-1].apply_(other) is other
    assert other.training and [p.grad for p in other.parameters()] == grads_before
    assert not any(p.requires_grad for p in other.parameters())
    for name, tensor in stored(path[-1]).items():
        assert same_bits(other.state_dict()[name], tensor)
    assert {"1.running_mean", "1.running_var", "1.weight", "1.bias"} <= stored(path[-1]).keys()
    with torch.no_grad():
        torch.testing.assert_close(other.eval()(x), loaded(model, path[-1].tensors)(x))


def test_the_start_written_back_is_the_model_itself() -> None:
    model = mlp(3, norm=True)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    path = sparse_path(model, inputs(4, 30), 0.4)
    path[-1].apply_(model)
    assert not same_bits(model.state_dict()["0.weight"], before["0.weight"])
    path[0].apply_(model)
    assert all(same_bits(t, before[n]) for n, t in model.state_dict().items())


def test_apply_to_another_network_lists_all_mismatches_and_writes_nothing() -> None:
    path = sparse_path(mlp(3), inputs(4, 30), 0.3)
    other = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
    before = other.get_parameter("0.weight").detach().clone()
    with pytest.raises(ValueError, match="does not fit") as caught:
        path[-1].apply_(other)
    for name in ("0.weight", "0.bias", "2.weight is missing|2.weight", "2.bias"):
        assert any(part in str(caught.value) for part in name.split("|"))
    assert "[6, 5]" in str(caught.value) and "missing from the model" in str(caught.value)
    assert torch.equal(other.get_parameter("0.weight"), before)


def test_a_file_gives_the_path_back(tmp_path: Path) -> None:
    path = sparse_path(mlp(3, norm=True), inputs(4, 30), 0.4)
    path.save(tmp_path / "path.safetensors")
    back = PathResult.load(tmp_path / "path.safetensors")
    same_paths(path, back)
    assert [p.seconds for p in back] == [p.seconds for p in path]
    assert (back.message, back.settings) == (path.message, path.settings)
    back.save(tmp_path / "again.safetensors")
    same_paths(path, PathResult.load(tmp_path / "again.safetensors"))


def test_shares_that_do_not_exist_survive_a_file(tmp_path: Path) -> None:
    path = sparse_path(mlp(3), inputs(4, 30), 0.3, geometry="euclidean", options={"store": "last"})
    assert all(math.isnan(p.changed) and math.isnan(p.changed_upper) for p in path)
    path.save(tmp_path / "path.safetensors")
    same_paths(path, PathResult.load(tmp_path / "path.safetensors"))
    with pytest.raises(ValueError, match="best: "):
        path.best(max_changed=1.0)  # regression has no predictions that could change


def test_save_does_not_overwrite_unless_asked(tmp_path: Path) -> None:
    target = tmp_path / "path.safetensors"
    path_of(RISING).save(target)
    before = target.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        path_of(RISING[:2]).save(target)
    assert target.read_bytes() == before
    path_of(RISING[:2]).save(target, overwrite=True)
    assert len(PathResult.load(target)) == 2


def test_other_records_are_not_paths(tmp_path: Path) -> None:
    save_record(tmp_path / "other.safetensors", {"x": torch.zeros(2)}, {"kind": "spectrum"})
    with pytest.raises(ValueError, match="holds spectrum, not a path"):
        PathResult.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("keep", [[0], [-1], [1, 2]])
def test_thinning_changes_no_number(keep: list[int]) -> None:
    path = path_of(RISING)
    thin: Any = path.thinned(keep)
    assert [replace(p, tensors=None) for p in thin] == [replace(p, tensors=None) for p in path]
    assert [i for i, p in enumerate(thin) if p.tensors is not None] == [range(6)[i] for i in keep]


def test_a_path_prints_in_one_line() -> None:
    path = sparse_path(mlp(0), inputs(1, 40), 0.5)
    assert str(path).startswith(f"path of {len(path) - 1} steps, reached: sparsity 0.5, drift ")
    assert "PathPoint" not in repr(path) and len(repr(path)) < 2000
