"""NewTask: learns, keeps, holds zeros, treats every kind of new data alike, and blames the right argument."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from fipgeo import GaussNewton, MetricField, NewTask, PathResult, StepControl, adapt, sparsify, walk
from fipgeo.data import TensorBatches
from fipgeo.outputs import Categorical, Logits
from fipgeo.paths import Method
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.kept import Kept, Position

from .toys import draw, filled, inputs, loaded, mlp, same_tensors, stored, zeros

COUNT = 120


def task(seed: int = 11, count: int = COUNT) -> tuple[Tensor, Tensor]:
    """New inputs, labelled by a feature that is never active in the old ones."""
    x = draw(seed, count, 5)
    return x, (x[:, 4] > 0).long()


def old(count: int = 60) -> Tensor:
    x = inputs(1, count)
    x[:, 4] = 0.0
    return x


def learned(model: nn.Module, **options: Any) -> PathResult:
    settings: dict[str, Any] = {"keep": old(), "epochs": 2, "batch_size": 12, "lr": 0.5, "budget": 0.5}
    return adapt(model, task(), cross_entropy, **(settings | options))


def outputs_at(model: nn.Module, theta: Tensor, x: Tensor) -> Tensor:
    """All outputs on x, flat, with other weights."""
    tensors = dict(
        zip(dict(model.named_parameters()), theta.split([p.numel() for p in model.parameters()]), strict=True)
    )
    return functional_call(model, {n: tensors[n].view_as(p) for n, p in model.named_parameters()}, (x,)).flatten()


def loss_of(path: PathResult, model: nn.Module, index: int = -1) -> float:
    x, y = task()
    with torch.no_grad():
        return float(cross_entropy(loaded(model, path[index].tensors)(x), y))


def test_it_learns_the_new_and_keeps_the_old() -> None:
    model = mlp(0, hidden=16)
    path = learned(model, geometry="logits", damping=1e-2)
    assert path.outcome == "reached"
    assert loss_of(path, model) < 0.7 * loss_of(path, model, 0)
    assert all(p.drift <= 0.5 for p in path)
    # the same minibatches without the metric lose more of the old function
    field = MetricField(model, old())
    objective = NewTask(TensorBatches(task(), 12), cross_entropy, epochs=2, lr=0.5, num_batches=10)
    control = StepControl(initial=1.0, smallest=1.0, largest=1.0, tolerance=1e6)
    plain = walk(field, objective, Method(control=control, corrector=GaussNewton(steps=0), damping=None))
    assert path[-1].drift < 0.5 * plain[-1].drift


@pytest.mark.parametrize("feedback", [0.0, 0.5, 1.0])
def test_a_step_minimises_what_it_changes_and_what_has_changed(feedback: float) -> None:
    """v = argmin |feedback r + R v|^2 / N + mu |v - d|^2, against a dense solve, where the outputs have moved by r."""
    model, data = mlp(0), TensorBatches(task(), 12)
    function = MetricField(model, old(), "euclidean").function
    kept = Kept.of(function, function.map.point())
    away = Position(kept.start + 0.1 * draw(5, len(kept.start)))
    objective = NewTask(data, cross_entropy, momentum=0.0, clip=1e9, refresh=1, feedback=feedback, rehearse=60)
    state = objective.begin(kept, away)
    moves = Compensation(kept, away, state["free"], damping=0.1)
    found = objective.propose(kept, away, state, 1.0, lambda *_: moves, torch.Generator()).position.theta - away.theta

    rows, r = torch.autograd.functional.jacobian(lambda t: outputs_at(model, t, old()), away.theta), kept.residual(away)
    x, y = next(iter(data.shuffled(1)))
    d = -torch.autograd.functional.jacobian(
        lambda t: cross_entropy(outputs_at(model, t, x).view(12, -1), y), away.theta
    )
    metric = rows.T @ rows / kept.num_examples + moves.mu * torch.eye(len(d))
    wanted = torch.linalg.solve(metric, moves.mu * d - feedback * rows.T @ r / kept.num_examples)
    torch.testing.assert_close(found / objective.lr, wanted, rtol=1e-5, atol=1e-6 * float(wanted.norm()))


def test_the_value_of_a_point_is_the_mean_loss_over_its_step() -> None:
    model = mlp(0)
    path = learned(model, epochs=1, store="all")
    x, y = task()
    batches = list(TensorBatches((x, y), 12).shuffled(1))
    with torch.no_grad():
        start = [float(cross_entropy(model(a), b)) for a, b in batches]
    assert path[0].objective == pytest.approx(sum(start) / 10)
    assert path.objective_name == "loss on new data" and not path.maximise
    assert path[1].objective < path[0].objective


def test_zeros_are_held_on_request_only() -> None:
    model = mlp(0, hidden=16)
    with torch.no_grad():
        model[0].weight[:, ::2] = 0.0  # type: ignore[index]
    names = ["0.weight"]
    held, free = learned(model, hold_zeros=True), learned(model)
    assert zeros(held[-1].tensors, names) == 48 and not stored(held[-1])["0.weight"][:, ::2].any()
    assert zeros(free[-1].tensors, names) == 0
    assert loss_of(held, model) < loss_of(held, model, 0)


def bundles(x: Tensor, y: Tensor) -> dict[str, Callable[[], Any]]:
    return {
        "list": lambda: list(zip(x.split(12), y.split(12), strict=True)),
        "loader": lambda: DataLoader(TensorDataset(x, y), batch_size=12),
    }


@pytest.mark.parametrize("kind", ["list", "loader"])
def test_new_data_may_come_in_batches(kind: str) -> None:
    model = mlp(0)
    path = adapt(
        model, bundles(*task())[kind](), cross_entropy, keep=old(), epochs=2, lr=0.3, budget=None, max_steps=50
    )
    assert path.outcome == "reached" and loss_of(path, model) < loss_of(path, model, 0)


def test_batches_of_a_list_and_of_a_loader_are_the_same() -> None:
    one, two = (
        adapt(mlp(0), bundles(*task())[kind](), cross_entropy, keep=old(), epochs=0.1, budget=None)
        for kind in ("list", "loader")
    )
    seen = [{k: int(v) for k, v in path.state.items() if k.endswith("seen")} for path in (one, two)]
    assert len(one) == len(two) and seen[0] == seen[1] and seen[0]  # the order within an epoch may differ


class Keyword(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp(0)

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        del y
        return {"logits": self.inner(x)}


def test_mapping_batches_hand_the_whole_batch_to_the_loss() -> None:
    x, y = task()
    new = [{"x": a, "y": b} for a, b in zip(x.split(12), y.split(12), strict=True)]
    seen: list[Any] = []

    def loss(outputs: Tensor, batch: dict[str, Tensor]) -> Tensor:
        seen.append(batch.keys())
        return cross_entropy(outputs, batch["y"])

    path = adapt(Keyword(), new, loss, keep={"x": old()}, lr=0.3, budget=None)
    assert path.outcome == "reached" and all(set(keys) == {"x", "y"} for keys in seen)


def test_unlabelled_new_data_never_hands_one_example_to_the_loss() -> None:
    x = task()[0]
    seen: list[tuple[int, ...]] = []

    def loss(outputs: Tensor, target: Tensor) -> Tensor:
        seen.append(tuple(target.shape))
        return (outputs.sum(1) - target.reshape(len(target), -1).sum(1)[: len(outputs)].mean()).square().mean()

    try:
        adapt(mlp(0), x, loss, keep=old(), batch_size=12, budget=None)
    except (TypeError, ValueError) as error:
        assert "new_batches" in str(error)
    assert (5,) not in seen


def test_dropout_and_normalisation_run_in_eval_mode() -> None:
    model = mlp(0, norm=True, dropout=True).train()
    path = learned(model)
    assert model.training
    same_tensors(path[-1].tensors, learned(model.eval())[-1].tensors)


LOSSES: dict[str, tuple[Callable[..., Any], str]] = {
    "vector": (lambda f, y: cross_entropy(f, y, reduction="none"), "(?s)loss_fn: returned .*expected a finite scalar"),
    "nan": (lambda f, y: cross_entropy(f, y) * torch.nan, "loss_fn: returned nan, expected a finite scalar"),
    "float": (lambda f, y: float(cross_entropy(f, y).detach()), "loss_fn: returned float, expected a finite scalar"),
    "none": (lambda f, y: None, "loss_fn: returned NoneType, expected a finite scalar"),
    "detached": (lambda f, y: cross_entropy(f, y).detach(), "loss_fn: .*gradient"),
}


@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_is_no_finite_scalar_is_named(kind: str) -> None:
    loss, message = LOSSES[kind]
    with pytest.raises(ValueError, match=message) as caught:
        adapt(mlp(0), task(), loss, keep=old(20))
    assert len(str(caught.value)) < 300


class Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self):  # noqa: ANN204
        return iter([(x, y) for x, y in zip(*task(count=24), strict=True)])


def test_a_loader_without_a_length_is_counted() -> None:
    path = adapt(mlp(0), DataLoader(Stream(), batch_size=12), cross_entropy, keep=old(20), budget=None)
    assert path.outcome == "reached" and len(path) == 2


def test_a_loader_without_batches_is_named() -> None:
    empty = DataLoader(TensorDataset(torch.zeros(0, 5), torch.zeros(0).long()), batch_size=4)
    with pytest.raises(ValueError, match="new_batches: .*(0|no) "):
        adapt(mlp(0), empty, cross_entropy, keep=old(20))


@pytest.mark.parametrize(
    "option",
    [
        {"lr": 0.0},
        {"lr": -0.1},
        {"epochs": 0},
        {"epochs": -1.0},
        {"damping": -1.0},
        {"momentum": 1.0},
        {"feedback": -0.1},
    ],
)
def test_useless_numbers_are_named(option: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(option))}: got"):
        learned(mlp(0), **option)


def test_a_step_that_diverges_is_refused_not_blamed_on_the_loss() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.exp(torch.exp(self.layer(x)))

    x, y = task(count=24)
    path = adapt(
        *(filled(Growing(), 0), (0.1 * x, y), lambda f, y: (f[:, 0] - y).square().mean()),
        **{"keep": 0.1 * old(20), "geometry": "euclidean", "lr": 40.0, "budget": 1.0, "batch_size": 6},  # type: ignore[arg-type]
    )
    assert path.outcome in ("reached", "budget", "stalled") and all((p.control_drift or 0.0) <= 1.0 for p in path)


def test_classes_are_kept_as_tempered_probabilities_that_are_not_saturated() -> None:
    """The lowest temperature of 2, 4, ... at which the geometry feels the outputs; other targets, and paths, decide."""

    def kept(net: nn.Module, y: Tensor, loss: Any = cross_entropy, **options: Any) -> str:
        path = adapt(net, (task()[0], y), loss, keep=old(), epochs=0.2, batch_size=12, **options)
        return path.settings["geometry"]

    model, y = mlp(0), task()[1]
    assert kept(model, y) == repr(Categorical(temperature=2.0))
    loud = nn.Sequential(model, Louder())
    assert kept(loud, y) == repr(Categorical(temperature=2.0 ** loud_enough(loud)))
    assert loud_enough(loud) > 1
    scores = torch.nn.functional.one_hot(y, 3).double()
    assert kept(model, scores, lambda f, t: (f - t).square().mean()) == repr(Logits())
    walked = sparsify(model, old(), 0.2, max_steps=1)
    assert kept(model, y, after=walked) == walked.settings["geometry"]


class Louder(nn.Module):
    def forward(self, f: Tensor) -> Tensor:
        return 200 * f


def loud_enough(net: nn.Module) -> int:
    """The first power of two at which a twentieth of the geometry's strength is left, by its definition."""
    with torch.no_grad():
        f = net(old())
    for power in range(1, 7):
        p = (f / 2**power).softmax(1)
        strength = float((1 - p.square().sum(1)).mean()) / (1 - 1 / f.shape[1])
        if strength >= 0.05:
            return power
    return 6
