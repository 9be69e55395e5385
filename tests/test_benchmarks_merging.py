"""The benchmarks of merging and of few images: each rule by another route, and the grids on tiny data."""

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import learned, merges, merging, records, students, transfer
from benchmarks.banks import SHARPNESS, cosine
from benchmarks.merges import Setting, Task
from benchmarks.students import Lesson, Student
from fipgeo import TaskVector
from fipgeo.atlas import CacheAdapter, LinearProbe, forget_, isotropise, whiten


def images(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Three classes of vectors, each a direction of its own that depends on the task, in noise."""
    random = torch.Generator().manual_seed(seed // 10)
    centres = torch.randn(3, 12, generator=random)
    random.manual_seed(seed)
    y = torch.arange(count) % 3
    return (centres[y] + torch.randn(count, 12, generator=random)).view(count, 3, 2, 2), y


def trunk(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 2), nn.Flatten(), nn.Tanh(), nn.Linear(8, 64)).eval()


def setting() -> Setting:
    """Two tasks, with vectors of a few steps of training each."""
    base, tasks, vectors = trunk(), [], []
    for number, name in enumerate(("one", "two")):
        train, validation, test = (images(10 * number + part, 30) for part in (1, 2, 3))
        features = base(train[0]).detach()
        classes = F.normalize(torch.stack([features[train[1] == k].mean(0) for k in range(3)]), dim=1)
        task, net = Task(name, cosine(classes), train, validation, test), copy.deepcopy(base)
        optimizer = torch.optim.SGD(net.parameters(), 0.05)
        for _ in range(10):
            optimizer.zero_grad()
            F.cross_entropy(task.scores(net, train), train[1]).backward()
            optimizer.step()
        tasks.append(task)
        vectors.append(TaskVector.between(base, net))
    return Setting(base, tasks, vectors)


def kept(at: Setting) -> Task:
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(5))
    train, validation, test = (images(seed, 40) for seed in (81, 82, 83))
    part = [(x, (at.base(x) @ weight.T).argmax(1).detach()) for x, _ in (train, validation, test)]
    return Task("kept", lambda features: features @ weight.T, *part)


def test_of_many_classes_the_likeliest_and_the_label_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    at = setting()
    task, (x, y) = at.tasks[0], at.tasks[0].validation
    scores = task.scores(at.base, (x, y)).detach()
    for short in (2, 3):
        monkeypatch.setattr(merges, "SHORT", short)
        goal = task.goal(at.base, (x, y))
        assert goal.forward_fn is not None
        found = F.cross_entropy(goal.forward_fn(at.base, goal.data), goal.data[1], reduction="none")
        for n in range(len(y)):
            rivals = sorted((scores[n, k] for k in range(3) if k != y[n]), reverse=True)[: short - 1]
            kept = torch.stack([scores[n, y[n]], *rivals])
            assert torch.allclose(found[n], kept.logsumexp(0) - scores[n, y[n]])


class Told:
    """In the place of a task: what its accuracy is said to be at a network's one weight."""

    name, validation = "told", None

    def __init__(self, **table: float) -> None:
        self.table = {float(scale.replace("_", ".")[1:]): value for scale, value in table.items()}

    def accuracy(self, net: nn.Module, data: object) -> float:
        return self.table[round(abs(float(net.weight.detach())), 3)]  # type: ignore[arg-type, operator]


def line() -> tuple[nn.Module, TaskVector]:
    net = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(net.weight)
    return net, TaskVector({"weight": torch.ones(1, 1)})


def test_the_scale_is_the_best_on_validation_until_accuracy_falls_twice() -> None:
    net, vector = line()
    told = Told(c0_025=1, c0_05=3, c0_1=2, c0_2=4, c0_3=3, c0_4=3, c0_5=9)
    at = Setting(net, [told], [vector])  # type: ignore[list-item]
    found, name = merges.scaled(at, {"all": vector})
    assert name == "all scale 0.2" and found.weight.item() == pytest.approx(0.2)  # type: ignore[operator]


def test_merges_by_singular_vectors_average_what_is_no_matrix() -> None:
    at = setting()
    found = merges.summed(at.vectors)
    for name, tensor in found.tensors.items():
        both = torch.stack([vector.tensors[name] for vector in at.vectors])
        assert torch.allclose(tensor, both.sum(0) if tensor.dim() > 1 else both.mean(0))


@pytest.mark.parametrize("name", [*merges.ADDED, *learned.LEARNED])
def test_every_rule_merges_without_touching_the_network(name: str) -> None:
    at = setting()
    before = copy.deepcopy(at.base.state_dict())
    few = {"steps": 20} if "AdaMerging" in name else {}
    net, _ = (merges.ADDED | learned.LEARNED)[name](at, 0, **few)
    assert type(net) is nn.Sequential
    assert all(torch.equal(tensor, before[key]) for key, tensor in at.base.state_dict().items())
    rows = at.rows(net, "validation")
    assert at.validated(net) == pytest.approx(sum(rows.values()) / 2)
    if name not in ("pretrained", "AdaMerging", "AdaMerging on test"):
        assert at.validated(net) >= at.validated(at.base)


def test_entropy_does_not_look_at_labels() -> None:
    at = setting()
    x, y = at.tasks[0].validation
    loss = torch.no_grad()(merges.uncertain(at.tasks[0]))
    p = at.tasks[0].scores(at.base, (x, y)).softmax(1).detach()
    assert float(loss(at.base, (x, y))) == pytest.approx(float(-(p * p.log()).sum(1).mean()), rel=1e-5)
    assert torch.equal(loss(at.base, (x, y)), loss(at.base, (x, y.flip(0))))


@pytest.mark.parametrize("name", learned.NEGATED)
def test_what_forgets_keeps_the_floor_on_validation(name: str) -> None:
    at = setting()
    control = kept(at)
    net, _ = learned.NEGATED[name](at, 0, control, 0)
    floor = learned.FLOOR * control.accuracy(at.base, control.validation)
    assert name == "fipgeo" or control.accuracy(net, control.validation) >= floor  # ours is told on images set apart
    left, start = (at.tasks[0].accuracy(n, at.tasks[0].validation) for n in (net, at.base))
    assert left <= start


def test_a_ridge_is_judged_by_examples_that_nothing_was_learned_from(monkeypatch: pytest.MonkeyPatch) -> None:
    at, seen = setting(), []
    start, _, vectors = learned.started(at)
    step = learned.stepped
    monkeypatch.setattr(learned, "stepped", lambda *args: seen.append((args[3], args[4])) or step(*args))
    found = learned.ridges(at, 3)
    assert list(found) == [ridge for _, ridge in seen] == list(learned.RIDGES)
    for (parts, ridge), value in zip(seen, found.values(), strict=True):
        net, _ = step(at, start, vectors, parts, ridge, 15, 3)
        shares = []
        for task, (x, _) in zip(at.tasks, parts, strict=True):
            whole, y = task.validation
            used = (whole[:, None].flatten(2) == x[None].flatten(2)).all(2).any(1)
            assert int(used.sum()) == len(x) == len(y) // 2
            shares.append(task.accuracy(net, (whole[~used], y[~used])))
        assert value == pytest.approx(sum(shares) / 2, abs=0.01)


@pytest.mark.parametrize("rule", ["isotropic", "TSV", "Iso-C", ""])
def test_forgetting_starts_at_the_rule_that_left_least(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at, seen = setting(), []
    other = at.vectors[0].apply_to(at.base)  # what the rule makes is not what coefficients are counted from
    chosen = f"{rule} scale {0.4 if rule else 0}".strip()
    monkeypatch.setattr(learned, "taken_back", lambda at, place, kept, forms: (other, chosen))

    def forget(model: Any, *goals: Any, **options: Any) -> Any:
        seen.append((model.coefficients.detach(), model.merge()))
        return forget_(model, *goals, **options | {"steps": 0})

    monkeypatch.setattr(learned, "forget_", forget)
    learned.by_forgetting(at, 1, at.tasks[0], 0)
    coefficients, start = seen[0]
    assert bool(coefficients[0].eq(-0.4 if rule else 0.0).all()) and not bool(coefficients[1:].any())
    forms = {"isotropic": at.vectors[1], "TSV": whiten(at.vectors)[1], "Iso-C": isotropise([at.vectors[1]])[0]}
    expected = forms[rule].apply_to(at.base, -0.4) if rule else at.base
    for one, other in zip(start.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_vector_is_taken_back_as_far_as_the_floor_allows() -> None:
    net, vector = line()
    steps = dict(c0=100, c0_025=99, c0_05=99, c0_1=99, c0_2=98, c0_3=97, c0_4=96, c0_5=95)
    control = Told(**steps, c0_6=95, c0_8=94, c0_7=95)
    target = Told(**dict.fromkeys(steps, 60.0), c0_6=40, c0_7=30, c0_8=10)
    at = Setting(net, [target], [vector])  # type: ignore[list-item]
    found, name = learned.taken_back(at, 0, control, {"": vector})  # type: ignore[arg-type]
    assert name == "scale 0.7" and found.weight.item() == pytest.approx(-0.7)  # type: ignore[operator]


def test_ascent_takes_the_best_look_above_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    at = setting()
    control = kept(at)
    said = {"kept": iter([100, 96, 90, 95, 80, 80]), "one": iter([60, 50, 10, 40, 5, 5])}
    monkeypatch.setattr(Task, "accuracy", lambda task, net, data: next(said[task.name]))
    assert learned.by_ascent(at, 0, control, 0)[1] == "30 steps"


CLOSED = {"all layers", "fipgeo, all layers", "Tip", "LP++", "fipgeo, Tip", "fipgeo, LP++", "fipgeo, evidence"}


def lesson() -> Lesson:
    at = setting()
    return Lesson.of(at.base, at.tasks[0], [at.vectors[1], 0.5 * at.vectors[0]], images(4, 6), 0)


def test_students_start_from_one_head_and_learn_what_they_may() -> None:
    at = lesson()
    start = Student(at.base, at.classes)(at.data[0])
    for name, learn in (students.METHODS | students.PARTED).items():
        if name in CLOSED:  # no head, or one of its own, so its scores are others from the first
            assert torch.equal(learn(at, 0.0)(at.data[0]).argmax(1), at.data[1])
            continue
        same = start if "fipgeo" in name else learn(at, 0.0)(at.data[0])
        assert torch.allclose(same, start, atol=1e-5), name
        student = learn(at, 1e-2)
        loss = [F.cross_entropy(f, at.data[1]).item() for f in (start, student(at.data[0]))]
        assert loss[1] < loss[0] or name == "head of the images"
    head = students.probed(at, 1e-2)
    assert isinstance(head, Student) and torch.equal(head.body[0].weight, at.base[0].weight)  # type: ignore[index]
    assert not torch.equal(head.classes, at.classes)


def test_what_a_course_says_reaches_the_evidence(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = lambda x: x  # noqa: E731
    course = transfer.Course(replace(transfer.RESNET20, mask=mask), (), (), batch=7, starts=(0.5,))
    monkeypatch.setattr(transfer, "given", lambda backbone: setting())
    at, asked = transfer.lesson(course, "one", images(4, 6), 3), []
    assert (at.mask, at.batch, at.starts, at.seed, len(at.vectors)) == (mask, 7, (0.5,), 3, 1)
    monkeypatch.setattr(students, "fit_hidden_", lambda model, data, **options: asked.append(options))
    students.told(at)
    assert asked == [{"mask": mask, "starts": (0.5,), "steps": 15}]


def test_a_share_that_lacks_a_class_chooses_no_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    at = setting()

    def share(name: str, percent: int, seed: int) -> tuple[Tensor, Tensor]:
        x, y = images(4, 12)
        return (x, y) if name == "one" else (x[y < 2], y[y < 2])

    monkeypatch.setattr(transfer, "given", lambda backbone: at)
    course = transfer.Course(replace(transfer.RESNET20, share=share), (), ("one", "two"))
    found = transfer.rate(course, lambda lesson, rate: Student(lesson.base, lesson.classes), (0.1, 0.2), 1)
    assert found["tasks"] == ["one"] and set(found["rows"]) == {"0.1", "0.2"}


@pytest.mark.parametrize("rule", ["Iso-C", "TSV"])
def test_coefficients_are_learned_over_the_vectors_of_the_start(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at, used = setting(), []
    monkeypatch.setattr(learned, "scaled", lambda at, candidates: (at.base, f"{rule} scale 1.0"))
    monkeypatch.setattr(learned, "shares", lambda vectors: used.append(vectors) or vectors)
    learned.by_ours(at, 0, steps=1)
    expected = {"Iso-C": isotropise, "TSV": whiten}[rule](at.vectors)
    assert all((one - other).norm() == 0 for one, other in zip(used[-1], expected, strict=True))


def test_classifiers_of_features_know_the_coefficients_only_where_they_are_learned() -> None:
    at = lesson()
    for kind, alone in (("Tip", CacheAdapter), ("LP++", LinearProbe)):
        with torch.no_grad():
            features = at.base(at.data[0])
            known = alone(features, at.data[1], at.classes, sharpness=SHARPNESS)
            known.fit_(features, at.data[1])
            torch.testing.assert_close(students.METHODS[kind](at, 0.0)(at.data[0]), known(features))
            assert not torch.allclose(students.METHODS[f"fipgeo, {kind}"](at, 0.0)(at.data[0]), known(features))


def test_coefficients_of_parts_are_as_many_as_the_numbers_of_lora() -> None:
    at = lesson()
    found = (students.PARTED[name](at, 1e-2).numbers for name in ("LoRA of rank 1", "parts of vectors"))
    theirs, ours = (int(number) for number in found)  # type: ignore[arg-type]
    assert 0.5 * theirs < ours <= theirs == 8 + 12 + 64 + 8 + at.classes.numel()


def test_images_of_a_lesson_have_all_classes() -> None:
    at = setting()
    assert students.few(at, "one", 2, 0)[1].bincount().tolist() == [2, 2, 2]
    x, y = students.few(at, "one", 2, 0)
    with pytest.raises(ValueError, match="got examples of 2 classes, expected all 3 of one"):
        Lesson.of(at.base, at.tasks[0], at.vectors, (x[y < 2], y[y < 2]), 0)


def test_grids_are_resumed_and_means_are_those_of_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at, counted = setting(), []
    monkeypatch.setattr(merging, "given", lambda backbone, spare: (at, kept(at)))
    course = transfer.Course(transfer.RESNET20, ("one",), ("two",))
    monkeypatch.setattr(transfer, "given", lambda backbone: counted.append(1) or at)
    monkeypatch.setattr(transfer, "COURSES", {"resnet20": course})
    monkeypatch.setattr(transfer, "TARGETS", ["one"])
    methods = ["individual vectors", "isotropic", "DARE"]
    merging.main(["--folder", str(tmp_path), "--backbones", "resnet20", "--cells", "add", "--methods", *methods])
    found = records.read("merging", tmp_path)
    assert {(r["method"], r["seed"]) for r in found} == {(m, 0) for m in methods} | {("DARE", 1), ("DARE", 2)}
    for r in found:
        assert r["seconds"] >= 0 and r["processor"] == records.processor() != ""
        if "rows" in r:
            assert r["value"] == pytest.approx(sum(r["rows"].values()) / 2, abs=0.01)
    ours = ["--folder", str(tmp_path), "--backbones", "resnet20", "--methods", "fipgeo", "--seeds", "0", "--cells"]
    with pytest.raises(SystemExit):
        merging.main([*ours, "add"])  # no ridge is on record yet
    monkeypatch.setattr(learned, "RIDGES", (0.5, 0.0))
    merging.main([*ours, "ridge", "add"])
    (ridge,) = (r for r in records.read("merging", tmp_path) if r["case"] == "ridge")
    assert ridge["rows"] == {str(k): v for k, v in learned.ridges(at, merging.TUNING_SEED).items()}
    assert ridge["value"] == max((0.5, 0.0), key=lambda k: ridge["rows"][str(k)])
    assert any(f"ridge {ridge['value']} " in r.get("chosen", "") for r in records.read("merging", tmp_path))
    given = ["--folder", str(tmp_path), "--methods", "fipgeo", "LoRA", "--shots", "1", "--seeds", "0", "--tasks", "one"]
    with pytest.raises(SystemExit):
        transfer.main([*given, "--cells", "few"])  # no rate is on record yet
    transfer.main([*given, "--cells", "rate", "few"])
    text, before = (tmp_path / "transfer.json").read_text(), len(counted)
    assert {r["method"] for r in json.loads(text)["records"] if r["figure"] == "accuracy"} == {"fipgeo", "LoRA"}
    transfer.main([*given, "--cells", "rate", "few"])
    assert len(counted) == before and (tmp_path / "transfer.json").read_text() == text
