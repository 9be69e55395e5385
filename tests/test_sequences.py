"""Sequences of tasks: what is kept of each, how the head grows, what is measured, and that old labels are not read."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipgeo import adapt, adapt_tasks
from fipgeo.memory import select


def blobs(seed: int, first: int, count: int = 60) -> tuple[Tensor, Tensor]:
    """Two clusters, classes `first` and `first + 1`."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(count) % 2
    centres = 3 * torch.randn(2, 6, generator=torch.Generator().manual_seed(first), dtype=torch.float64)
    return centres[y] + torch.randn(count, 6, generator=random, dtype=torch.float64), y + first


def network(outputs: int = 2) -> nn.Sequential:
    random = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, outputs)).double()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=random, dtype=torch.float64) / 2)
    x, y = blobs(0, 0)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def learned(net: nn.Module, **options: Any) -> Any:
    tasks = {"a": blobs(0, 0), "b": blobs(1, 2), "c": blobs(2, 4)}
    tests = {"a": blobs(10, 0), "b": blobs(11, 2), "c": blobs(12, 4)}
    return adapt_tasks(net, tasks, **({"kept": 20, "tests": tests, "epochs": 8, "batch_size": 20} | options))


def test_three_tasks_are_known_at_the_end_and_the_model_given_is_not_changed() -> None:
    net = network().train()
    before, called = copy.deepcopy(net.state_dict()), []
    end = learned(net, after_task=lambda name, model: called.append((name, model(torch.zeros(1, 6).double()).shape[1])))
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items()) and net.training
    assert called == [("a", 2), ("b", 4), ("c", 6)] and not end.model.training
    assert end.matrix.values.shape == (3, 3) and bool(end.matrix.values[0, 1:].isnan().all())
    assert end.matrix.average_accuracy() > 0.85 and len(end.paths) == 2
    x, y = blobs(11, 2)
    assert end.matrix.values[2, 1] == (end.model(x).argmax(1) == y).double().mean()
    assert {n: len(k) for n, k in end.kept.items()} == {"a": 20, "b": 20, "c": 20}


def test_the_second_task_is_learned_as_adapt_does_it() -> None:
    net, x, new = network(4), blobs(0, 0)[0], blobs(1, 2)
    end = adapt_tasks(net, {"a": (x, x), "b": new}, kept=10, generator=3, epochs=2)  # type: ignore[arg-type]
    random = torch.Generator().manual_seed(3)
    kept = x[select(net.eval(), x, 10, generator=random)]
    assert torch.equal(end.kept["a"], kept)
    unseen = torch.arange(10) % 5 == 4
    path = adapt(
        net, new, nn.functional.cross_entropy, keep=kept[~unseen], held_out=kept[unseen], generator=random, epochs=2
    )
    for name, tensor in (path[-1].tensors or {}).items():
        assert torch.equal(tensor, end.model.get_parameter(name))


def test_heads_of_their_own_are_learned_and_compared_by_themselves() -> None:
    given: list[tuple[int, int, int]] = []

    def loss(f: Tensor, y: Tensor) -> Tensor:
        given.append((f.shape[1], int(y.min()), int(y.max())))
        return nn.functional.cross_entropy(f, y)

    net = network()
    end = learned(net, own_heads=True, loss_fn=loss, damping=1.0)
    assert set(given) == {(2, 0, 1)} and end.model(blobs(0, 0)[0]).shape[1] == 6
    assert end.matrix.average_accuracy() > 0.9 and end.matrix.average_forgetting() < 0.05
    x, y = blobs(11, 2)
    own = end.model(x)[:, 2:4]
    assert end.matrix.values[2, 1] == (own.argmax(1) + 2 == y).double().mean()
    assert all("Categorical" in path.settings["geometry"] for path in end.paths)
    x = end.kept["c"]
    counts = end.model(x)[:, 4:].argmax(1).bincount(minlength=2)
    assert counts.tolist() == [10, 10]  # as many of each class that its own head predicts
    probabilities = [torch.cat([h.softmax(1) for h in m(blobs(0, 0)[0]).split(2, 1)], 1) for m in (net, end.model)]
    assert (probabilities[0] - probabilities[1][:, :2]).abs().mean() < 0.1


def test_every_head_is_compared_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def noted(*args: Any, **options: Any) -> Any:
        shapes.append([f.shape[1] for f in options["output_fn"](args[0](options["keep"]))])
        return adapt(*args, **options)

    monkeypatch.setattr("fipgeo.sequences.adapt", noted)
    learned(network(), own_heads=True, epochs=0.1)
    assert shapes == [[2, 2], [2, 2, 2]]
    calls = []
    learned(network(), own_heads=True, epochs=0.1, output_fn=lambda f: calls.append(f.shape[1]) or f)
    assert set(calls) == {4, 6}


def test_a_head_of_its_own_needs_classes_of_its_own() -> None:
    for wrong, says in ((blobs(1, 0), "'b' has classes 0 to 1, expected classes from 2 on"), (blobs(1, 3), "3 to 4")):
        with pytest.raises(ValueError, match=says):
            adapt_tasks(network(), {"a": blobs(0, 0), "b": wrong}, own_heads=True)
    x, y = blobs(1, 2)
    with pytest.raises(ValueError, match=r"targets of torch\.float64"):
        adapt_tasks(network(), {"a": blobs(0, 0), "b": (x, y.double()[:, None])}, own_heads=True)


def test_views_protect_more_and_bad_arguments_are_named() -> None:
    net, draws = network(), []

    def shaken(x: Tensor, random: torch.Generator) -> Tensor:
        draws.append(len(x))
        return x + 0.1 * torch.randn(x.shape, generator=random, dtype=x.dtype)

    learned(net, transform=shaken, num_views=3, epochs=1)
    assert draws == [16, 16, 32, 32]
    with pytest.raises(ValueError, match="got 1 with 50 inputs"):
        adapt_tasks(net, {"a": blobs(0, 0)})
    with pytest.raises(ValueError, match="tests: got none for 'b'"):
        adapt_tasks(net, {"a": blobs(0, 0), "b": blobs(1, 2)}, tests={"a": blobs(0, 0)})
