"""The benchmark of learning: what each method adds by another route, and the grid on tiny data."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks import anchors, learn, learners, records, streams
from benchmarks.learners import Learner, Lesson, Memory, outputs
from benchmarks.streams import Stream, Task


def images(count: int, first: int, seed: int) -> tuple[Tensor, Tensor]:
    """Noise with one bright corner a class, classes `first` and `first + 1`."""
    random = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 1, 6, 6, generator=random), torch.arange(count) % 2 + first
    for k in range(count):
        row, column = divmod(int(y[k]), 3)
        x[k, 0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] += 4
    return x, y


def tiny(outputs: int = 2) -> nn.Module:
    torch.manual_seed(1)
    body = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    return nn.Sequential(*body, nn.Linear(36, 8), nn.ReLU(), nn.Linear(8, outputs)).eval()


def tasks() -> list[Task]:
    return [Task(f"pair {k}", *images(40, 2 * k, k), *images(20, 2 * k, 10 + k)) for k in range(3)]


def stream() -> Stream:
    return Stream(tiny(), tasks(), head="7", passes=4, batch=10, kept=3)


def lesson(memory: bool = True) -> Lesson:
    model, (first, second, _) = tiny(), tasks()
    kept = Memory.empty(first).adding(model, first, 6 if memory else 0, 0)
    return Lesson(streams.grown(model, "7", 4), model, second, kept, [first], 50, 10, head="7")


@pytest.mark.parametrize("name", learn.METHODS)
def test_every_method_learns_and_leaves_its_givens_alone(name: str) -> None:
    given, learner = lesson(), learn.METHODS[name](rate=0.02)
    before = [copy.deepcopy(m.state_dict()) for m in (given.model, given.teacher)]
    learner.remember(given.teacher, given.earlier[0], 0)
    model = learner.learn(given)
    assert type(model) is nn.Sequential and not model.training and all(p.requires_grad for p in model.parameters())
    assert set(model.state_dict()) == set(before[0])
    for state, m in zip(before, (given.model, given.teacher), strict=True):
        assert all(torch.equal(t, m.state_dict()[key]) for key, t in state.items())
    assert all(torch.equal(model.state_dict()[key], before[0][key]) for key in before[0] if "running" in key)
    loss = [cross_entropy(m(given.task.x), given.task.y).item() for m in (given.model, model)]
    if "weight 100" not in name:  # so heavy a penalty keeps such a small network from learning
        assert loss[1] < loss[0]
    again = learn.METHODS[name](rate=0.02)
    again.remember(given.teacher, given.earlier[0], 0)
    assert all(torch.equal(a, b) for a, b in zip(again.learn(given).parameters(), model.parameters(), strict=True))


def test_a_step_of_fine_tuning_is_sgd() -> None:
    given = replace(lesson(), steps=1, batch=40)
    model = Learner(rate=0.01).learn(given)
    expected = copy.deepcopy(given.model)
    cross_entropy(expected(given.task.x), given.task.y).backward()
    for p, q in zip(expected.parameters(), model.parameters(), strict=True):
        assert p.grad is not None
        assert torch.allclose(q, p - 0.01 * p.grad)


def test_what_replay_adds_is_what_its_formula_says() -> None:
    given, random = lesson(), torch.Generator().manual_seed(5)
    f, which = torch.randn(6, 4, generator=random), torch.arange(6)
    taught = outputs(given.teacher, given.memory.x)
    p, q = (torch.cat([taught, torch.full((6, 2), -torch.inf)], 1)).softmax(1), f.softmax(1)

    def added(learner: Learner) -> float:
        learner.begin(given.model, given)
        return float(learner.replay(f, which, given))

    assert added(learners.PublishedFIP()) == pytest.approx(float(-(p * q).sqrt().sum(1).log().sum()))
    warm, student = (taught / 2).softmax(1), (f / 2).softmax(1)[:, :2]
    assert added(learners.Distilled()) == pytest.approx(float(4 * (warm * (warm / student).log()).sum(1).mean()))
    squared = float((f[:, :2] - given.memory.logits).square().mean())
    assert added(learners.DER()) == pytest.approx(squared)
    labelled = float(-f.log_softmax(1)[which, given.memory.y].mean())
    assert added(learners.DERpp(labels=0.5)) == pytest.approx(squared + 0.5 * labelled)
    same = learners.PublishedFIP()
    same.begin(given.model, given)
    assert float(same.replay(taught, which, given)) == pytest.approx(0, abs=1e-12)


def test_the_memory_is_balanced_by_what_is_predicted_and_keeps_logits() -> None:
    first, second, _ = tasks()
    model = tiny()
    memory = Memory.empty(first).adding(model, first, 8, 3)
    predicted, counts = outputs(model, first.x).argmax(1).bincount(minlength=2), torch.zeros(2, dtype=torch.long)
    counts = outputs(model, memory.x).argmax(1).bincount(minlength=2)
    few = int(predicted.min())
    assert len(memory) == 8 and int(counts.min()) == min(few, 4)
    wide = streams.grown(model, "7", 4)
    more = memory.adding(wide, second, 4, 3)
    assert torch.equal(more.logits.isnan().sum(1), torch.tensor([2] * 8 + [0] * 4))
    assert torch.allclose(more.logits[8:], outputs(wide, more.x[8:]))
    assert len(memory.adding(wide, second, 0, 3)) == 8


def test_fisher_and_penalty_are_what_single_gradients_give() -> None:
    given = lesson()
    model, x = given.teacher, given.earlier[0].x
    found = anchors.fisher_diagonal(model, x, seed=4, chunk=7)
    random = torch.Generator().manual_seed(4)
    order = torch.randperm(len(x), generator=random)
    y = torch.multinomial(outputs(model, x[order]).softmax(1), 1, generator=random)[:, 0]
    expected = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for k in range(len(x)):
        one = cross_entropy(model(x[order][k : k + 1]), y[k : k + 1])
        for (n, _), g in zip(model.named_parameters(), torch.autograd.grad(one, list(model.parameters())), strict=True):
            expected[n] += g.square() / len(x)
    assert all(torch.allclose(found[n], e) for n, e in expected.items())
    ewc = anchors.EWC(weight=3.0)
    ewc.remember(model, given.earlier[0], 4)
    student = copy.deepcopy(given.model)
    ewc.begin(student, given)
    assert ewc.penalty(student, x, x, given).item() == 0
    with torch.no_grad():
        student[7].weight += 0.5  # type: ignore[index, operator]
    assert ewc.penalty(student, x, x, given).item() == pytest.approx(1.5 * 0.25 * float(expected["7.weight"].sum()))


def test_projected_steps_do_not_change_what_layers_had_seen() -> None:
    given, gpm = lesson(), anchors.GPM(rate=0.05, energy=1 - 1e-12)
    gpm.remember(given.teacher, replace(given.earlier[0], x=given.earlier[0].x[:5]), 0)
    for basis in gpm.at["bases"].values():
        assert torch.allclose(basis.T @ basis, torch.eye(basis.shape[1]), atol=1e-8)
    model, seen = gpm.learn(given), given.earlier[0].x[:5]
    assert torch.allclose(model[5](model[:5](seen)), given.model[5](given.model[:5](seen)), atol=1e-6)  # type: ignore
    assert not torch.allclose(model[5].weight, given.model[5].weight)  # type: ignore[index]
    part = anchors.extended(gpm.at["bases"]["5.weight"], torch.randn(36, 30), 0.9)
    assert torch.allclose(part.T @ part, torch.eye(part.shape[1]), atol=1e-8)


def test_attention_is_listened_to_where_it_can_be() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(5, 3, 8)
    found = anchors.layer_inputs(model, x, torch.Generator().manual_seed(0))
    assert set(found) == {"self_attn.in_proj_weight", "linear1.weight", "linear2.weight"}
    assert found["self_attn.in_proj_weight"].shape == (8, 15)
    gram = x.flatten(0, 1).T @ x.flatten(0, 1)
    assert torch.allclose(found["self_attn.in_proj_weight"] @ found["self_attn.in_proj_weight"].T, gram)


def test_low_rank_additions_are_of_low_rank_and_merge() -> None:
    given = lesson()
    model = anchors.LoRA(rate=0.05, rank=2).learn(given)
    for name, p in model.named_parameters():
        moved = p - dict(given.model.named_parameters())[name]
        if name in ("0.weight", "5.weight"):
            assert torch.linalg.matrix_rank(moved.flatten(1), atol=1e-9) == 2
        else:
            assert moved.any() == name.startswith("7.")


def test_joint_batches_come_from_all_tasks_with_their_labels() -> None:
    given = replace(lesson(), batch=4000)
    x, y = next(learners.Joint().stream(given, torch.Generator().manual_seed(0)))
    corners = x[:, 0].unfold(1, 2, 2).unfold(2, 2, 2).mean((-1, -2)).flatten(1)
    assert torch.equal(corners.argmax(1), y)
    share = y.bincount(minlength=4) / len(y)
    assert share.min() > 0.2


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a grid on the tiny tasks."""
    monkeypatch.setitem(streams.SETTINGS, "split_cifar10", lambda _seed: stream())
    return ["--settings", "split_cifar10", "--folder", str(tmp_path)]


def test_the_grid_measures_what_is_missing_and_nothing_twice(grid: list[str], tmp_path: Path, capsys) -> None:
    few = ["--methods", "fipgeo", "fine-tuning", "KD replay", "--ours", "lr=0.02,geometry=logits"]
    learn.main([*grid, *few, "--plan"])
    assert len(capsys.readouterr().out.splitlines()) == 3 and not list(tmp_path.iterdir())
    learn.main([*grid, *few])
    found = records.read("learn", tmp_path)
    names = {"fipgeo, lr=0.02, geometry=logits", "fine-tuning", "KD replay"}
    assert len(found) == 12 and {r["method"] for r in found} == names
    for r in found:
        matrix = learn.fipgeo.AccuracyMatrix.from_dict(r["matrix"])
        assert r["case"] == "split_cifar10/kept=3" and r["steps"] == 32 and r["passes"] == 4 and r["seconds"] >= 0
        assert r["value"] == pytest.approx(100 * learn.figures(matrix)[r["figure"]], abs=0.01)
    capsys.readouterr()
    learn.main([*grid, *few])
    assert capsys.readouterr().out == "" and records.read("learn", tmp_path) == found
    learn.main([*grid, "--methods", "DER", "--kept", "5", "--seeds", "0", "1", "--share", "0.5"])
    assert {(r["case"], r["seed"]) for r in records.read("learn", tmp_path)[12:]} == {
        ("split_cifar10/kept=5/share=0.5", 0),
        ("split_cifar10/kept=5/share=0.5", 1),
    }


def test_the_library_may_remember_each_task_and_finds_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []

    def remember(_model: nn.Module, task: Task, _seed: int, state: dict, **options: object) -> None:
        assert options == {"a": 1}
        state.setdefault("names", []).append(task.name)

    def learned(given: Lesson, state: dict, **options: object) -> tuple[nn.Module, dict]:
        assert options == {"a": 1} and [len(task.x) for task in given.earlier] == [40] * len(state["names"])
        seen.append(list(state["names"]))
        return given.model, {"passes": 2.0}

    monkeypatch.setattr(learn, "fipgeo_remember", remember)
    monkeypatch.setattr(learn, "fipgeo_learn", learned)
    found, notes = learn.run(stream(), learn.Ours(a=1), 0)
    assert seen == [["pair 0"], ["pair 0", "pair 1"]] and len(found) == 3
    assert notes["passes"] == 2 and notes["steps"] == 16  # half of what is allowed


def test_options_are_the_best_that_were_measured(grid: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(learn.WEIGHTS, "EWC", {"weight": (1.0, 2.0)})
    learn.main([*grid, "--tune", "--methods", "fipgeo", "EWC"])
    found = records.read("learn_rates", tmp_path)
    assert len(found) == 6 and {r["family"] for r in found} == {"EWC"} and {r["steps"] for r in found} == {8}
    case, whole = "split_cifar10/kept=3", stream()
    best = max(found, key=lambda r: r["value"])["options"]
    assert learn.options_for("EWC", whole, case, tmp_path) == best
    assert learn.options_for("KD replay", whole, case, tmp_path) == learn.OPTIONS["KD replay"]
    held = whole.tasks[0].for_tuning()
    assert len(held.x) == 36 and torch.equal(torch.cat([held.x, held.x_test]), whole.tasks[0].x)


def test_readouts_learn_the_tasks_without_an_input_kept(grid: list[str], tmp_path: Path) -> None:
    asked = [*grid, "--methods", "fipgeo", "--ours", "readout=True,ridge=1"]
    learn.main([*asked, "--tune"])
    tuned = records.read("learn_rates", tmp_path)
    assert [(r["method"], r["family"]) for r in tuned] == [("fipgeo, readout=True, ridge=1", "fipgeo")]
    learn.main(asked)
    found = {r["figure"]: r for r in records.read("learn", tmp_path)}
    assert found["average_accuracy"]["value"] > 80 and found["average_accuracy"]["passes"] == 1
    whole, learner = stream(), learn.Ours(readout=True, ridge=1.0)
    learn.run(whole, learner, 0)
    assert learner.at["readout"].count == sum(len(task.x) for task in whole.tasks)  # each task once


def test_budgets_and_failures_are_said(grid: list[str], capsys) -> None:
    with pytest.raises(SystemExit, match="1 cells failed"):
        learn.main([*grid, "--methods", "fipgeo", "--ours", "epochs=5"])
    assert "expected at most 4, as for all methods" in capsys.readouterr().err


def test_starts_are_trained_once_for_a_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CACHE", tmp_path / "cache")
    first = tasks()[0]
    model = streams.started("net", tiny(), first, 0, epochs=60, batch=6)
    assert learn.accuracy(model, first.x_test, first.y_test) > 0.7 and not model.training
    monkeypatch.setattr(torch.optim, "Adam", None)
    again = streams.started("net", tiny(), first, 0, epochs=60, batch=6)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".safetensors"]
