"""New tasks without forgetting the old: accuracy on both, beside what people use today.

    python -m benchmarks.learn                                             all that is not on record yet
    python -m benchmarks.learn --settings mnist_fashion --methods fipgeo "KD replay" --seeds 0 1 2
    python -m benchmarks.learn --settings mnist_fashion --methods fipgeo --ours "epochs=6,lr=0.05"
    python -m benchmarks.learn --tune --settings mnist_fashion             options of the baselines
    python -m benchmarks.learn --tune --settings split_cifar10 --methods fipgeo --ours "readout=True,ridge=30"
    python -m benchmarks.learn --plan                                      what would be run, and nothing else

`benchmarks.streams` says what the settings are. A cell is (setting, kept inputs, method, seed); those on record are
skipped unless --again is given, and each is written when it is done, so that a run can be broken off and several can
share the work. Every method has the same start, the same new data, the same kept inputs without labels (DER++ alone is
given those) and at most the same number of minibatches; one head serves all tasks, and accuracy is that of its largest
output on all test images of a task. Options of baselines are chosen on training images that are held out of a shorter
run with seed 0 (--tune), and written to learn_rates.json; where nothing was measured, `OPTIONS` holds.

Records go to benchmarks/results/learn.json: old_accuracy is the mean over all tasks but the last after the last,
new_accuracy that on the last, average_accuracy the mean over all, average_forgetting that of
`fipgeo.AccuracyMatrix`, all in per cent; matrix is the whole record.
"""

from __future__ import annotations

import argparse
import ast
import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks.anchors import EWC, GPM, LoRA, LoRAReplay, LwF
from benchmarks.learners import DER, DERpp, Distilled, Joint, Learner, Lesson, Memory, PublishedFIP, outputs
from benchmarks.records import RESULTS, read, write
from benchmarks.streams import SETTINGS, Stream, Task, grown, load
from benchmarks.texts import Headed

OURS = "fipgeo"
FIGURES = ("old_accuracy", "new_accuracy", "average_accuracy", "average_forgetting")
TUNING = 0.25
"""Share of the minibatches that options are chosen with."""

METHODS: dict[str, Callable[..., Learner]] = {
    "fine-tuning": Learner,
    "FIP replay (published)": PublishedFIP,
    **{f"FIP replay (published), weight {w}": partial(PublishedFIP, weight=float(w)) for w in (10, 100, 1000)},
    "KD replay": Distilled,
    "KD replay, views": partial(Distilled, views=20),
    "DER++ (buffer labels)": DERpp,
    "joint training": Joint,
    "EWC": EWC,
    "GPM": GPM,
    "LoRA": LoRA,
    "LoRA + KD replay": LoRAReplay,
    "DER": DER,
    "LwF": LwF,
}

OPTIONS: dict[str, dict[str, float]] = {
    "KD replay": {"weight": 3.0},
    "KD replay, views": {"weight": 3.0},
    "LoRA + KD replay": {"weight": 3.0},
}
"""Where they differ from a learner's own defaults."""

RATES = {"sgd": (0.003, 0.01, 0.03), "adamw": (1e-4, 3e-4, 1e-3)}
WEIGHTS: dict[str, dict[str, tuple[float, ...]]] = {
    "KD replay": {"weight": (1.0, 10.0)},
    "KD replay, views": {"weight": (1.0, 10.0)},
    "LoRA + KD replay": {"weight": (1.0, 10.0)},
    "EWC": {"weight": (10.0, 100.0, 1000.0)},
    "LwF": {"weight": (1.0, 10.0)},
    "GPM": {"energy": (0.97, 0.995)},
    "DER": {"weight": (0.1, 0.5)},
    "DER++ (buffer labels)": {"weight": (0.1, 0.5)},
}
"""What is tried beside learning rates."""


class Cell(NamedTuple):
    """One run to be measured."""

    setting: str
    kept: int | None
    method: str
    seed: int

    def case(self, stream: Stream) -> str:
        """Its name on record."""
        return f"{self.setting}/kept={stream.kept}"


class Ours(Learner):
    """The library's own method."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    def learn(self, lesson: Lesson) -> nn.Module:
        """See `fipgeo_learn`."""
        model, self.at["notes"] = fipgeo_learn(lesson, self.at, **self.options)
        return model

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """See `fipgeo_remember`."""
        fipgeo_remember(model, task, seed, self.at, **self.options)


SKETCHED = 1000
"""Inputs of a task that a sketch is made of, while they are there."""


def fipgeo_remember(model: nn.Module, task: Task, seed: int, state: dict[str, Any], **options: Any) -> None:
    """With `sketch=True`, what the network's maps see on a task just learned, joined to the sketch of those before.

    With `readout=True`, what hidden features say of the first task, and what the network takes its inputs for: later
    tasks are remembered as they are learned.
    """
    if options.get("readout") and "features" not in state:
        about = {key: options[key] for key in ("cells", "width") if key in options}
        state["features"] = fipgeo.memory.HiddenFeatures(fipgeo.MetricField(model, task.x, mask=task.mask), **about)
        if not options.get("heads"):
            state["readout"] = fipgeo.memory.ReadoutSketch.of(state["features"], task.x, targets="model")
    if options.get("sketch"):
        which = torch.randperm(len(task.x), generator=torch.Generator().manual_seed(seed))[:SKETCHED]
        made = fipgeo.memory.LayerSketch.of(fipgeo.MetricField(model, task.x[which]))
        state["sketch"] = state["sketch"].merge(made) if "sketch" in state else made


def fipgeo_learn(lesson: Lesson, state: dict[str, Any], **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    """One task by the library: the network after it, and figures for the record.

    Options are those of `fipgeo.adapt`, `views` of each kept input (see `fipgeo.memory.views`) and `low_rank` for paths
    of factors of that rank and the whole head. With `sketch=True` they are those of `fipgeo.optim.FIP`, with
    `readout=True` those of `readout_of`, and no kept input is looked at. Epochs may not go beyond the budget of
    minibatches. A tenth of the kept inputs is held out. `state` is that of `fipgeo_remember`.
    """
    if options.get("readout"):
        return readout_of(lesson, state, options.get("ridge"), heads=options.get("heads", False))
    asked: dict[str, Any] = {"epochs": lesson.passes} | options
    if asked["epochs"] > lesson.passes + 1e-9:
        raise ValueError(f"epochs: got {asked['epochs']}, expected at most {lesson.passes:g}, as for all methods")
    notes: dict[str, Any] = {"passes": asked["epochs"]}
    if asked.pop("sketch", False):
        learner = Sketched(state["sketch"], asked)
        return learner.learn(lesson), notes | {"sketch_bytes": state["sketch"].nbytes}
    every = min(10, len(lesson.memory))
    unseen = torch.arange(len(lesson.memory)) % every == every - 1
    keep = fipgeo.memory.views(lesson.memory.x[~unseen], lesson.transform, asked.pop("views", 1), lesson.seed)
    new, held = (lesson.task.x, lesson.task.y), lesson.memory.x[unseen]
    asked = {"batch_size": lesson.batch, "generator": lesson.seed, **asked}
    rank = asked.pop("low_rank", None)
    moving = copy.deepcopy(lesson.model)
    if rank is not None:
        moving = fipgeo.LowRank(moving, rank, whole=f"{lesson.head}.*", generator=lesson.seed)
    path = fipgeo.adapt(moving, new, cross_entropy, keep=keep, held_out=held, **asked)
    notes |= {"forwards": path[-1].cost, "outcome": path.outcome, "drift": path[-1].drift}
    found = path[-1].apply_(moving)
    return found.merge() if isinstance(found, fipgeo.LowRank) else found, notes


def readout_of(
    lesson: Lesson, state: dict[str, Any], ridge: float | None, *, heads: bool
) -> tuple[nn.Module, dict[str, Any]]:
    """The readout of all tasks up to this one, or with `heads` one more of this task alone."""
    features, task, notes = state["features"], lesson.task, {"passes": 1.0}
    if heads:
        first = int(task.y.min())
        own = fipgeo.memory.ReadoutSketch.of(features, (task.x, task.y - first), batch_size=lesson.batch)
        state["heads"] = state.get("heads", {}) | {int(task.x[0, 0]): own.solve(ridge)}
        return Headed(features, state["heads"]), notes
    state["readout"] += fipgeo.memory.ReadoutSketch.of(features, (task.x, task.y), num_outputs=task.outputs)
    return state["readout"].readout(features, ridge), notes | {"sketch_bytes": state["readout"].nbytes}


class Sketched(Learner):
    """Plain training by an optimiser that keeps what a sketch knows.

    Args:
        sketch: What is kept.
        options: `epochs`, and options of the optimiser.
    """

    def __init__(self, sketch: fipgeo.memory.LayerSketch, options: dict[str, Any]) -> None:
        super().__init__()
        self.sketch, self.options = sketch, dict(options)
        self.epochs = self.options.pop("epochs")

    def learn(self, lesson: Lesson) -> nn.Module:
        """The network after the task."""
        student, random = copy.deepcopy(lesson.model).eval(), torch.Generator().manual_seed(lesson.seed)
        optimizer = fipgeo.optim.FIP(student.named_parameters(), self.sketch, refresh=10**9, **self.options)
        steps = max(round(lesson.steps * self.epochs / lesson.passes), 1)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _, (x, y) in zip(range(steps), self.stream(lesson, random), strict=False):
            optimizer.zero_grad()
            cross_entropy(student(x), y).backward()
            optimizer.step()
            schedule.step()
        return student


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    begun, failed = time.perf_counter(), 0
    for cell in cells(args):
        if time.perf_counter() - begun > args.limit:
            break
        if args.plan:
            print(cell.setting, cell.method, f"seed {cell.seed}", sep="  ")
            continue
        try:
            (tune if args.tune else measure)(cell, args)
        except Exception as error:  # the other cells do not depend on it
            failed += 1
            print(f"{cell.setting}  {cell.method}  {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"{failed} cells failed")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--methods", nargs="+", default=[OURS, *METHODS], choices=[OURS, *METHODS])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kept", type=int, help="inputs kept, instead of the setting's own number")
    parser.add_argument("--ours", type=options_of, default={}, help="options of fipgeo, as in epochs=6,lr=0.05")
    parser.add_argument("--name", help="of fipgeo's record, instead of one made of its options")
    parser.add_argument("--limit", type=float, default=float("inf"), help="no cell begins after so many seconds")
    parser.add_argument(
        "--share", type=float, help="of the minibatches, a part of the case on record; 1, and 0.25 with --tune"
    )
    parser.add_argument("--again", action="store_true", help="measure what is on record too")
    parser.add_argument("--plan", action="store_true", help="print the cells and stop")
    parser.add_argument("--tune", action="store_true", help="choose the options of the baselines, with the first seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    args = parser.parse_args(arguments)
    args.share = args.share or (TUNING if args.tune else 1.0)
    return args


def options_of(text: str) -> dict[str, Any]:
    """Options from `key=value,key=value`; a value is a Python literal, or a word."""
    call = ast.parse(f"f({text})", mode="eval").body
    assert isinstance(call, ast.Call)
    return {
        str(k.arg): k.value.id if isinstance(k.value, ast.Name) else ast.literal_eval(k.value) for k in call.keywords
    }


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """In the order of seeds, settings, methods."""
    for seed, setting, method in product(args.seeds[: 1 if args.tune else None], args.settings, args.methods):
        yield Cell(setting, args.kept, method, seed)


def named(cell: Cell, args: argparse.Namespace) -> str:
    """The method's name on record: fipgeo's says what options it was given."""
    if cell.method != OURS:
        return cell.method
    return args.name or ", ".join([OURS, *(f"{key}={value}" for key, value in args.ours.items())])


def stream_of(cell: Cell) -> Stream:
    stream = load(cell.setting, cell.seed)
    return stream if cell.kept is None else replace(stream, kept=cell.kept)


def measure(cell: Cell, args: argparse.Namespace) -> None:
    """Run one cell and write what came out, unless it is on record."""
    name, stream = named(cell, args), stream_of(cell)
    setting = cell.case(stream)
    case = setting if args.share == 1 else f"{setting}/share={args.share:g}"
    known = {(r["case"], r["method"], r["seed"]) for r in read("learn", args.folder)}
    if (case, name, cell.seed) in known and not args.again:
        return
    options = args.ours if cell.method == OURS else options_for(cell.method, stream, setting, args.folder)
    learner = Ours(**options) if cell.method == OURS else METHODS[cell.method](**options)
    found, notes = run(stream, learner, cell.seed, args.share)
    base = {"case": case, "method": name, "unit": "%", "seed": cell.seed} | notes
    base |= {"options": options, "matrix": found.to_dict()}
    values = figures(found)
    write("learn", [base | {"figure": key, "value": round(100 * values[key], 2)} for key in FIGURES], args.folder)
    line = "  ".join(f"{key.replace('_', ' ')} {100 * values[key]:6.2f}" for key in FIGURES)
    print(f"{case:<28} {name:<28} seed {cell.seed}  {line}  {notes['seconds']:.0f} s", flush=True)


def run(
    stream: Stream, learner: Learner, seed: int, share: float = 1.0
) -> tuple[fipgeo.AccuracyMatrix, dict[str, Any]]:
    """Every task of a stream in order: the accuracies, and CPU seconds, minibatches and passes of learning alone."""
    model, tasks, memory = stream.start, stream.tasks, Memory.empty(stream.tasks[0])
    matrix = fipgeo.AccuracyMatrix.of([task.name for task in tasks])
    notes: dict[str, Any] = {"seconds": 0.0, "steps": 0, "passes": stream.passes * share}
    for place, task in enumerate(tasks):
        begun = time.process_time()
        if place:
            steps = max(round(share * stream.steps(task)), 1)
            ready = grown(model, stream.head, task.outputs)
            about = (steps, stream.batch, stream.optimizer, stream.head, seed, stream.transform)
            lesson = Lesson(ready, model, task, memory, tasks[:place], *about)
            model = learner.learn(lesson)
            notes["steps"] += steps
        if place + 1 < len(tasks):
            learner.remember(model, task, seed)
        notes["seconds"] += time.process_time() - begun
        matrix = matrix.after([accuracy(model, seen.x_test, seen.y_test) for seen in tasks[: place + 1]])
        if place + 1 < len(tasks):
            memory = memory.adding(model, task, stream.kept_of(task), seed)
    noted = notes | learner.at.get("notes", {})
    steps = round(notes["steps"] * noted["passes"] / notes["passes"])  # a path may take fewer epochs than are allowed
    return matrix, noted | {"seconds": round(notes["seconds"], 1), "steps": steps}


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of inputs whose largest output is their label's."""
    return float(outputs(model, x).argmax(1).eq(y).double().mean())


def figures(found: fipgeo.AccuracyMatrix) -> dict[str, float]:
    """What a cell comes to, as shares."""
    last = found.values[-1]
    values = {"old_accuracy": float(last[:-1].mean()), "new_accuracy": float(last[-1])}
    return values | {
        "average_accuracy": found.average_accuracy(),
        "average_forgetting": found.average_forgetting(),
    }


def grid(method: str, stream: Stream) -> list[dict[str, float]]:
    """Options that are tried for a method."""
    axes = {"rate": RATES[stream.optimizer], **WEIGHTS.get(method, {})}
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def options_for(method: str, stream: Stream, case: str, folder: Path) -> dict[str, float]:
    """The best options that were measured for a case, else the defaults."""
    tried = [r for r in read("learn_rates", folder) if (r["case"], r["family"]) == (case, method)]
    if tried:
        return max(tried, key=lambda r: r["value"])["options"]
    rate = {} if stream.optimizer == "sgd" else {"rate": RATES["adamw"][1]}
    return rate | OPTIONS.get(method, {})


def tune(cell: Cell, args: argparse.Namespace) -> None:
    """Average accuracy on held-out training data after a shorter run, for every option of the grid; ours by --ours."""
    own = cell.method == OURS
    stream = stream_of(cell)
    case = cell.case(stream)
    stream = replace(stream, tasks=[task.for_tuning() for task in stream.tasks])
    known = {(r["case"], r["method"]) for r in read("learn_rates", args.folder)}
    for options in [args.ours] * bool(args.ours) if own else grid(cell.method, stream):
        name = ", ".join([cell.method, *(f"{k}={v if own else format(v, 'g')}" for k, v in options.items())])
        if (case, name) in known and not args.again:
            continue
        found, notes = run(stream, Ours(**options) if own else METHODS[cell.method](**options), cell.seed, args.share)
        value = round(100 * found.average_accuracy(), 2)
        record = {"case": case, "method": name, "figure": "average_accuracy", "value": value, "unit": "%", "seed": 0}
        write("learn_rates", [record | {"family": cell.method, "options": options} | notes], args.folder)
        print(f"{case:<28} {name:<44} {value:6.2f} %  {notes['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
