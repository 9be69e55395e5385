"""Whole walks: budget, independent measurement, disjoint inputs, kinds of data, callbacks, reproducibility."""

import importlib
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import fipgeo
from fipgeo import PathResult, adapt
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.paths import Correction, Corrector, Verdict
from fipgeo.paths.start import Inputs

from .toys import (
    CORRECTORS,
    draw,
    filled,
    inputs,
    labels,
    loaded,
    mlp,
    same_paths,
    same_tensors,
    sparse_path,
    stored,
    verdict_by_hand,
    weight_names,
    zeros,
)

SEEDS = st.integers(0, 10**6)
WALK = importlib.import_module("fipgeo.paths.driver")  # the name `walk` in the package is the function


def adapted(model: nn.Module, seed: int = 5, **options: Any) -> PathResult:
    """Three quick steps on random new labels."""
    new = (draw(seed, 60, 5), labels(seed, 60))
    settings: dict[str, Any] = {"keep": inputs(1, 30), "epochs": 5, "batch_size": 10, "lr": 0.2, "store": "all"}
    return adapt(model, new, cross_entropy, **(settings | options))


@pytest.mark.parametrize("kind", [*CORRECTORS, "adapt"])
@given(seed=SEEDS)
@settings(max_examples=2)
def test_points_measure_what_plain_torch_measures(kind: str, seed: int) -> None:
    model, held_out = mlp(seed, norm=True).train(), inputs(seed + 1, 25)
    if kind == "adapt":
        path = adapted(model, seed, held_out=held_out, budget=None, epochs=4, geometry="logits")
    else:
        path = sparse_path(
            model, inputs(seed, 30), 0.5, corrector=CORRECTORS[kind], held_out=fipgeo.as_batches(held_out)
        )
    assert (path[0].distance, path[0].drift, path[0].changed, path[0].step_norm) == (0.0, 0.0, 0.0, 0.0)
    start, arc = loaded(model, {}), 0.0
    for before, point in zip(path, path[1:], strict=False):
        distance, drift, changed = verdict_by_hand(start, loaded(model, point.tensors), held_out)
        assert point.distance == pytest.approx(distance, rel=1e-10)
        assert point.drift == pytest.approx(drift, rel=1e-10)
        assert point.changed == pytest.approx(changed, abs=1e-15) and point.num_held_out == 25
        names = [n for n, _ in model.named_parameters()]
        gaps = [float((stored(point)[n] - stored(before)[n]).square().sum()) for n in names]
        arc += math.sqrt(sum(gaps))
        assert point.step_norm == pytest.approx(math.sqrt(sum(gaps)), rel=1e-10)
        assert point.arc_length == pytest.approx(arc, rel=1e-10)
    assert [p.step for p in path] == list(range(len(path)))
    assert [p.cost for p in path] == sorted({p.cost for p in path})
    assert [p.seconds for p in path] == sorted(p.seconds for p in path)


@pytest.mark.parametrize("corrector", CORRECTORS.values(), ids=CORRECTORS)
@given(seed=SEEDS, budget=st.floats(0.15, 0.6))
@settings(max_examples=2)
def test_no_accepted_point_exceeds_the_budget(corrector: Corrector, seed: int, budget: float) -> None:
    try:
        path = sparse_path(mlp(seed), inputs(seed, 30), 0.95, corrector=corrector, options={"budget": budget})
    except ValueError as error:
        assert "is below the first step" in str(error)
        return
    assert path.budget == budget and all(p.control_drift <= budget for p in path)
    assert path.outcome in ("budget", "reached")
    assert path.outcome == "reached" or ("budget" in path.message and path[-1].sparsity < 0.95)


@given(seed=SEEDS)
@settings(max_examples=2)
def test_learning_stays_within_the_budget(seed: int) -> None:
    path = adapted(mlp(seed), seed, budget=0.02)
    assert all(p.control_drift <= 0.02 for p in path)


class Spy(Corrector):
    """Notes the inputs that steps are taken on."""

    def __init__(self, inner: Corrector) -> None:
        self.inner, self.rows = inner, torch.zeros(0, 5)

    def correct(self, kept: Any, *args: Any, **options: Any) -> Correction:
        self.rows = torch.cat([b if isinstance(b, Tensor) else b[0] for b in kept.batches])
        return self.inner.correct(kept, *args, **options)


@pytest.mark.parametrize("kind", ["tensor", "list", "loader"])
@pytest.mark.parametrize("share", [0.2, 0.5, None])
def test_inputs_of_steps_of_their_control_and_of_the_verdict_are_others(
    kind: str, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, other = inputs(3, 40), inputs(4, 15)
    held: list[Tensor] = []

    class Watched(Verdict):
        def __init__(self, function: EmbeddedOutputs, *args: Any) -> None:
            held.append(torch.cat([b if isinstance(b, Tensor) else b[0] for b in function.batches]))
            super().__init__(function, *args)

    monkeypatch.setattr(WALK, "Verdict", Watched)
    spy = Spy(CORRECTORS["first-order"])
    data = {"tensor": x, "list": list(x.split(7)), "loader": DataLoader(TensorDataset(x), batch_size=7, shuffle=True)}
    given = fipgeo.as_batches(other) if share is None else share
    path = sparse_path(mlp(0), data[kind], 0.3, corrector=spy, held_out=given)
    used, control, unused = ({tuple(r.tolist()) for r in rows} for rows in (spy.rows, *held))
    assert not used & unused and not used & control and not control & unused
    assert used | control | unused == {tuple(r.tolist()) for r in (x if share else torch.cat([x, other]))}
    assert len(unused) == path[0].num_held_out == (15 if share is None else round(share * 40))
    assert len(control) == (40 - len(unused) * (share is not None)) // 4


class Counts(Corrector):
    """Notes how many inputs every correction holds."""

    def __init__(self, inner: Corrector) -> None:
        self.inner, self.counts = inner, []

    def correct(self, kept: Any, *args: Any, **options: Any) -> Correction:
        self.counts.append(kept.num_examples)
        return self.inner.correct(kept, *args, **options)


@pytest.mark.parametrize("budget", [None, 100.0])
@pytest.mark.parametrize("kind", ["tensor", "list"])
def test_control_inputs_join_where_nothing_depends_on_them_any_more(kind: str, budget: float | None) -> None:
    x, found = inputs(3, 80), {}
    data = x if kind == "tensor" else list(x.split(5))
    for join in (False, True):
        spy = Counts(CORRECTORS["first-order"])
        options = {"budget": budget, "join_control": join}
        path = sparse_path(mlp(0), data, (0.3, 0.6), corrector=spy, held_out=0.25, options=options)
        found[join] = spy.counts, path[-1].cost
    (apart, less), (together, more) = found[False], found[True]
    assert set(apart) == {apart[0]} and apart[0] < 60 and together[:-1] == apart[:-1]
    assert together[-1] == (60 if budget is None else apart[0])
    assert more - less == (60 if budget is None else 0)  # their references, taken once; minibatches are as many


@pytest.mark.parametrize(("count", "control"), [(1, 1), (2, 1), (4, 1), (20, 5), (64, 16), (400, 20), (5000, 64)])
def test_a_twentieth_controls_but_neither_few_nor_many(count: int, control: int) -> None:
    data = fipgeo.as_batches(torch.arange(count))
    parts = Inputs.of(data, fipgeo.as_batches(torch.zeros(3)), torch.Generator().manual_seed(0))
    sizes = [sum(len(b) for b in part) for part in (parts.protected, parts.control, parts.verdict)]
    assert sizes == [max(count - control, 1), control, 3]


@pytest.mark.parametrize("kind", CORRECTORS)
def test_what_the_verdict_measures_decides_nothing(kind: str) -> None:
    # other held-out inputs, on which every point measures otherwise, give the same weights and the same costs
    walked = [
        sparse_path(mlp(0), inputs(3, 40), 0.8, corrector=CORRECTORS[kind], held_out=fipgeo.as_batches(held))
        for held in (inputs(7, 25), 3 * inputs(8, 25))
    ]
    for p, q in zip(*walked, strict=True):
        same_tensors(p.tensors, q.tensors)
        assert p.control_drift == q.control_drift
    assert walked[0][-1].drift != walked[1][-1].drift


class Keyword(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, shift: Tensor) -> Mapping[str, Tensor]:
        return {"logits": self.inner(x) + shift}


def test_a_list_and_a_loader_walk_as_their_joined_tensor_does() -> None:
    x = inputs(3, 40)
    walked = sparse_path(mlp(0), fipgeo.as_batches(x, 8), 0.5)
    same_paths(walked, sparse_path(mlp(0), list(x.split(8)), 0.5))
    pairs = DataLoader(TensorDataset(x, labels(0, 40)), batch_size=8)
    same_paths(walked, sparse_path(mlp(0), pairs, 0.5))
    same_paths(walked, sparse_path(mlp(0), [(b, labels(0, 8)) for b in x.split(8)], 0.5))


@pytest.mark.parametrize("form", ["tensors", "list of mappings"])
def test_mappings_walk_too(form: str) -> None:
    x, shift = inputs(3, 40), draw(4, 40, 1)
    model = Keyword(mlp(0))
    batches = [{"x": a, "shift": b} for a, b in zip(x.split(8), shift.split(8), strict=True)]
    path = sparse_path(model, {"x": x, "shift": shift} if form == "tensors" else batches, 0.5)
    assert path.outcome == "reached" and zeros(path[-1].tensors, ["inner.0.weight", "inner.2.weight"]) == 24


def test_batches_of_unlike_shapes_are_split_whole() -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    batches = [draw(i, 4, 2 + i % 3, 5) for i in range(10)]
    path = sparse_path(Mean(), batches, 0.4, held_out=0.3)
    assert path.outcome == "reached" and path[0].num_held_out == 12


def test_callbacks_get_flat_numbers_of_every_accepted_point() -> None:
    seen: list[Mapping[str, float]] = []
    path = sparse_path(mlp(0), inputs(3, 40), 0.5, callback=seen.append)
    assert len(seen) == len(path) - 1
    for info, point in zip(seen, path[1:], strict=True):
        assert all(isinstance(k, str) and type(v) in (int, float) for k, v in info.items())
        assert info == point.to_dict()


def test_a_callback_that_returns_true_stops_the_walk() -> None:
    whole = sparse_path(mlp(0), inputs(3, 20), 0.6)
    path = sparse_path(mlp(0), inputs(3, 20), 0.6, callback=lambda numbers: numbers["step"] == 2)
    assert path.outcome == "stopped" and len(path) == 3 and "resume" in path.message
    same_paths(sparse_path(mlp(0), inputs(3, 20), 0.6, resume=path), whole)
    going_on = sparse_path(mlp(0), inputs(3, 20), 0.6, callback=lambda numbers: [numbers])  # what a logger may return
    same_paths(going_on, whole)
    at_the_end = sparse_path(mlp(0), inputs(3, 20), 0.6, callback=lambda numbers: numbers["sparsity"] >= 0.5)
    assert at_the_end.outcome in ("stopped", "reached")


def test_silence_unless_asked_for_a_bar(capfd: pytest.CaptureFixture[str]) -> None:
    sparse_path(mlp(0), inputs(3, 40), 0.3)
    adapted(mlp(0), epochs=2)
    assert capfd.readouterr() == ("", "")
    sparse_path(mlp(0), inputs(3, 40), 0.3, progress=True)
    out, err = capfd.readouterr()
    assert out == "" and "sparsity 0.29" in err and "drift" in err  # 14 of 48


@pytest.mark.parametrize("kind", [*CORRECTORS, "adapt"])
def test_the_same_seed_gives_the_same_bytes_whatever_the_global_streams(kind: str) -> None:
    def walked(generator: torch.Generator | int | None) -> PathResult:
        _ = torch.rand(1), np.random.rand(1)  # the global streams move, the path does not
        if kind == "adapt":
            return adapted(mlp(0, norm=True), epochs=2, generator=generator)
        return sparse_path(mlp(0, norm=True), inputs(3, 24), 0.3, corrector=CORRECTORS[kind], generator=generator)

    one = walked(7)
    same_paths(one, walked(torch.Generator().manual_seed(7)))
    assert walked(8)[-1].drift != one[-1].drift


def test_only_the_last_point_is_kept_on_request() -> None:
    full, thin = (sparse_path(mlp(0), inputs(3, 40), 0.6, options={"store": s}) for s in ("all", "last"))
    assert all(p.tensors is not None for p in full)
    assert [p.tensors is not None for p in thin] == [True, *[False] * (len(thin) - 2), True]
    same_paths(full.thinned([0, -1]), thin)


def test_a_path_stops_after_max_steps_and_says_how_to_go_on() -> None:
    path = sparse_path(mlp(0), inputs(3, 40), 0.9, options={"max_steps": 2})
    assert len(path) == 3 and path.outcome == "max_steps" and "resume" in path.message


def test_parameters_that_do_not_move_are_left_alone() -> None:
    model = mlp(0)
    model[0].weight.requires_grad_(False)  # type: ignore[index]
    path = sparse_path(model, inputs(3, 40), 0.5)
    assert "0.weight" not in path[-1].tensors and zeros(path[-1].tensors, ["2.weight"]) == 9


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(guard: Any) -> None:
    expected = sparse_path(mlp(0, norm=True), inputs(3, 40), 0.3, corrector=CORRECTORS["first-order"])
    with guard():
        same_paths(expected, sparse_path(mlp(0, norm=True), inputs(3, 40), 0.3, corrector=CORRECTORS["first-order"]))
        adapted(mlp(0), epochs=2)


def test_single_precision_walks() -> None:
    model = mlp(0, norm=True).float()
    path = sparse_path(model, inputs(3, 40).float(), 0.5)
    assert path.outcome == "reached" and stored(path[-1])["0.weight"].dtype == torch.float32
    assert zeros(path[-1].tensors, weight_names(model)) == 24


def test_tied_weights_are_sparse_together() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))

    model = filled(Tied(), 0)
    path = sparse_path(model, inputs(3, 40), 0.5)
    path[-1].apply_(model)
    assert zeros(dict(model.named_parameters()), ["a.weight", "head.weight"]) == 20
    assert torch.equal(model.get_parameter("b.weight"), model.get_parameter("a.weight"))


def test_outputs_of_the_wrong_kind_on_the_way_are_not_called_stalled() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(0)

        def forward(self, x: Tensor) -> Any:
            out = self.inner(x)
            matrices = [w for name, w in self.inner.named_parameters() if name.endswith("weight")]
            pruned = any(int(torch.count_nonzero(w)) < w.numel() for w in matrices)
            return "text" if pruned else out

    with pytest.raises(ValueError, match="outputs: the model returned"):
        sparse_path(Fickle(), inputs(3, 40), 0.5, corrector=CORRECTORS["first-order"])
