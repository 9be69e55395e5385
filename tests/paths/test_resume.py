"""A path that was stopped, saved, loaded and continued is the path that never stopped, bit for bit."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo import PathResult, adapt

from .toys import CORRECTORS, FEATURES, draw, filled, inputs, labels, mlp, same_paths, sparse_path, stored

Walk = Callable[..., PathResult]


def sparse(kind: str, norm: bool) -> Walk:
    def walked(
        model: nn.Module, seed: int, *, max_steps: int, resume: PathResult | None = None, **options: Any
    ) -> PathResult:
        more = {"max_steps": max_steps} | options
        x = inputs(seed, 24)
        return sparse_path(model, x, 0.75, corrector=CORRECTORS[kind], options=more, generator=seed, resume=resume)

    return walked


def adapted(
    model: nn.Module, seed: int, *, max_steps: int, resume: PathResult | None = None, **options: Any
) -> PathResult:
    new = (draw(seed, 60, FEATURES), labels(seed, 60))
    settings: dict[str, Any] = {"epochs": 6, "batch_size": 10, "lr": 0.2, "budget": 0.5, "store": "all"}
    settings |= {"max_steps": max_steps, "generator": seed, "resume": resume} | options
    return adapt(model, new, cross_entropy, keep=inputs(seed + 1, 24), **settings)


WALKS: dict[str, tuple[Walk, bool]] = {
    "gauss-newton": (sparse("gauss-newton", False), False),
    "gauss-newton with BatchNorm": (sparse("gauss-newton", True), True),
    "first-order": (sparse("first-order", False), False),
    "first-order with BatchNorm": (sparse("first-order", True), True),
    "adapt": (adapted, False),
}


def through_a_file(path: PathResult) -> PathResult:
    with tempfile.TemporaryDirectory() as folder:
        path.save(Path(folder) / "path.safetensors")
        return PathResult.load(Path(folder) / "path.safetensors")


@pytest.mark.parametrize("kind", WALKS)
@given(seed=st.integers(0, 10**6), stop=st.integers(1, 2))
@settings(max_examples=2)
def test_a_resumed_path_is_the_uninterrupted_one(kind: str, seed: int, stop: int) -> None:
    walked, norm = WALKS[kind]
    model = mlp(seed, norm=norm)
    whole = walked(model, seed, max_steps=3)
    part = through_a_file(walked(model, seed, max_steps=stop))
    resumed = walked(model, seed, max_steps=3, resume=part)
    same_paths(resumed, whole)
    assert len(part) <= stop + 1


@pytest.mark.parametrize("kind", ["gauss-newton", "first-order with BatchNorm", "adapt"])
def test_the_models_present_weights_do_not_matter(kind: str) -> None:
    # writing the half-way point into the model, as one would, does not move the start that drift is measured from
    walked, norm = WALKS[kind]
    model = mlp(3, norm=norm)
    whole = walked(model, 3, max_steps=4)
    part = walked(model, 3, max_steps=2)
    part[-1].apply_(model)
    same_paths(walked(model, 3, max_steps=4, resume=part), whole)


@pytest.mark.parametrize("kind", ["first-order", "adapt"])
def test_resuming_twice_and_keeping_little_change_nothing(kind: str) -> None:
    walked, norm = WALKS[kind]
    model = mlp(4, norm=norm)
    whole = walked(model, 4, max_steps=5, store="last")
    path = walked(model, 4, max_steps=1, store="last")
    for stop in (3, 5):
        path = through_a_file(walked(model, 4, max_steps=stop, store="last", resume=path))
    same_paths(path, whole)


def test_seconds_go_on_from_where_they_were() -> None:
    part = adapted(mlp(1), 1, max_steps=2)
    more = adapted(mlp(1), 1, max_steps=3, resume=part)
    assert more[-1].seconds > part[-1].seconds and more[1].seconds == part[1].seconds


def test_a_finished_path_is_returned_as_it_is() -> None:
    walked, _ = WALKS["first-order"]
    path = walked(mlp(1), 1, max_steps=50)
    assert path.outcome == "reached"
    same_paths(walked(mlp(1), 1, max_steps=50, resume=path), path)


def test_a_path_goes_on_to_a_further_goal() -> None:
    x = inputs(2, 30)
    half = sparse_path(mlp(2), x, 0.5)
    more = sparse_path(mlp(2), x, 0.75, resume=half)
    assert more.outcome == "reached" and more[-1].sparsity == 0.75
    assert list(more)[: len(half)] == list(half)
    zero = {n: t == 0 for n, t in stored(half[-1]).items() if t.dim() > 1}
    assert all(not stored(more[-1])[n][mask].any() for n, mask in zero.items())


def test_a_budget_that_stopped_a_path_can_be_raised() -> None:
    x = inputs(2, 30)
    first = sparse_path(mlp(2), x, 0.9, options={"budget": 0.25})
    assert first.outcome == "budget"
    more = sparse_path(mlp(2), x, 0.9, options={"budget": 5.0}, resume=first)
    assert more.outcome == "reached" and more[-1].sparsity > first[-1].sparsity


@pytest.mark.parametrize("hidden", [5, 7])
def test_the_path_of_a_larger_or_smaller_model_is_refused(hidden: int) -> None:
    path = sparse_path(mlp(0), inputs(2, 30), 0.3)
    with pytest.raises(ValueError, match=r"resume: a path .*resume with the model"):
        sparse_path(mlp(0, hidden=hidden), inputs(2, 30), 0.6, resume=path)


def test_the_path_of_another_model_with_as_many_weights_is_refused() -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(FEATURES, 10, bias=False), nn.Linear(10, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    other = filled(Other(), 0)
    model = nn.Sequential(nn.Linear(FEATURES, 8, bias=False), nn.Linear(8, 2, bias=False), nn.Linear(2, 8))
    filled(model, 0)
    assert sum(p.numel() for p in other.parameters()) == sum(p.numel() for p in model.parameters()) == 80
    path = sparse_path(other, inputs(2, 30), 0.3)
    with pytest.raises(ValueError, match="resume: "):
        sparse_path(model, inputs(2, 30), 0.6, resume=path)


def test_the_path_of_another_objective_is_refused() -> None:
    path = sparse_path(mlp(0), inputs(2, 30), 0.3)
    with pytest.raises(ValueError, match=r"resume: a path of 'sparsity'.*expected 'loss on new data'"):
        adapted(mlp(0), 1, max_steps=2, resume=path)
