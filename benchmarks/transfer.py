"""A task that the bank does not know, from few examples: its other vectors beside fine-tuning, a probe and LoRA.

    python -m benchmarks.transfer                                  all that is not on record yet
    python -m benchmarks.transfer --cells rate few --tasks mnist --shots 1 --seeds 0
    python -m benchmarks.transfer --backbones minilm --cells select
    python -m benchmarks.transfer --cells parts
    python -m benchmarks.transfer --plan

Targets are MNIST, EuroSAT and USPS for the ResNet-20, and SST-2, SUBJ and CR for MiniLM (`benchmarks.backbones`),
each without its own vector. "rate": the learning rate of each baseline, and the ridge of `fipgeo.atlas.fit_`, by
accuracy on validation examples of tasks that are no targets, learned from two examples of each class; for "parts"
from as large a share as there. "few": k examples of each class of a target; every method starts from the head that
those make (`benchmarks.banks.head`). Baselines take 60 steps of AdamW with a cosine, on all weights and the head
(full fine-tuning), on the head (linear probe), or on low-rank additions to all kernels and the head (LoRA, rank 16).
"Tip" and "LP++" are a cache of the examples and a linear probe with class priors (`fipgeo.atlas.few_shot_`). "fipgeo"
learns a coefficient for each of the other tasks' vectors and each tensor, and leaves the head as it is, or makes one
of the two classifiers of the features then; with "moving head" coefficients are learned by AdamW under the head that
the images have at them, and "then fine-tuning" goes on from there with all weights, at a rate of full fine-tuning.
"all layers": no head, but ridge regression on what all layers see (`fipgeo.atlas.HiddenClassifier`), of the network
as it is, or with coefficients that the evidence of the examples gives (`fipgeo.atlas.fit_hidden_`); "evidence": those
coefficients under the head of the examples. On texts they begin at 0 or at a merge of all vectors, whichever is more
probable; that, and the head, were chosen on validation texts of IMDB and AG News. How layers are seen and how many
steps are taken was chosen once, on validation images of Fashion-MNIST, GTSRB and the targets of the ResNet-20, from
draws of other seeds. That one example of each class chooses no start was decided after a first run on test texts.
"select": coefficients with two vectors for each tensor, chosen by leverage (`fipgeo.atlas.choose_vectors`) or by the
gradient of each block. "parts": 1 % or 5 % of a target's training file, LoRA of rank 1 beside coefficients of parts of
the vectors, all with the head and by AdamW: random parts, as many as LoRA has numbers, or output channels.
Accuracies are on test examples, by which nothing is chosen.

Records go to benchmarks/results/transfer.json, cell by cell; what is there is not measured again without --again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from benchmarks.backbones import MINILM, RESNET20
from benchmarks.banks import Backbone, Labelled
from benchmarks.cells import Cell, Record, measure, options
from benchmarks.merges import Setting, setting
from benchmarks.records import read
from benchmarks.students import BATCH, METHODS, PARTED, RATES, SELECTED, Lesson, few

Learner = Callable[[Lesson, float], Callable[[Tensor], Tensor]]
SHARES = (1, 5)
"""Per cent."""
TUNING_SEED = 100


@dataclass(frozen=True, eq=False)
class Course:
    """What is measured of a backbone.

    Attributes:
        backbone: Its bank.
        targets: Tasks to be learned.
        others: Tasks on which rates are chosen.
        before: What cases begin with.
        without: Methods that make no sense there.
        rates: In place of `RATES`.
        batch: Examples of a step.
        starts: Common values of all coefficients at which learning by the evidence may begin.
    """

    backbone: Backbone
    targets: tuple[str, ...]
    others: tuple[str, ...]
    before: str = ""
    without: tuple[str, ...] = ()
    rates: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    batch: int = BATCH
    starts: tuple[float, ...] = ()

    def methods(self, kind: Mapping[str, Learner], args: argparse.Namespace) -> list[str]:
        """Those that are wanted."""
        known = [method for method in kind if method not in self.without]
        return [method for method in known if not args.methods or method in args.methods]


COURSES = {
    "resnet20": Course(RESNET20, ("mnist", "eurosat", "usps"), ("fashion", "gtsrb")),
    "minilm": Course(
        MINILM,
        ("sst2", "subj", "cr"),
        ("imdb", "ag_news"),
        "minilm/",
        ("fipgeo, moving head", "fipgeo, moving head, then fine-tuning", "channels of vectors"),
        {
            "full fine-tuning": (1e-5, 3e-5, 1e-4, 3e-4),
            "LoRA": (1e-4, 3e-4, 1e-3, 3e-3),
            "LoRA of rank 1": (1e-3, 3e-3, 1e-2),
            "parts of vectors": (1e-2, 3e-2, 1e-1),
        },
        batch=32,
        starts=(0.3, 0.6),
    ),
}
TARGETS = list(dict.fromkeys(task for course in COURSES.values() for task in course.targets))


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ["rate", "few", "select", "parts"], [0, 1, 2])
    parser.add_argument("--backbones", nargs="+", default=list(COURSES), choices=list(COURSES))
    parser.add_argument("--tasks", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--methods", nargs="+", help="such as fipgeo, LoRA")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(arguments)
    measure("transfer", (cell for name in args.backbones for cell in cells(COURSES[name], args)), args)


def cells(at: Course, args: argparse.Namespace) -> Iterator[Cell]:
    """In the order of the kinds, "rate" first, since others read it."""
    tasks = [task for task in at.targets if task in args.tasks]

    def cell(case: str, method: str, seed: int, run: Callable[[], Record]) -> Cell:
        return Cell({"case": at.before + case, "method": method, "seed": seed}, lambda: [run()])

    if "rate" in args.cells:
        for method in at.methods(METHODS, args):
            if method in RATES:
                yield cell("rate", method, TUNING_SEED, partial(rate, at, METHODS[method], grid(at, method)))
        for part in SHARES if "parts" in args.cells else ():
            for method in at.methods(PARTED, args):
                run = partial(rate, at, PARTED[method], grid(at, method), part)
                yield cell(f"rate/{part} %", method, TUNING_SEED, run)
    for seed in args.seeds:
        for count in args.shots if "few" in args.cells else ():
            for task in tasks:
                for method in at.methods(METHODS, args):
                    run = partial(measured, at, METHODS[method], rated(method), task, seed, args.folder, count=count)
                    yield cell(f"few/{task}/k={count}", method, seed, run)
        for task in tasks if "select" in args.cells else ():
            for method in at.methods(SELECTED, args):
                run = partial(measured, at, SELECTED[method], "fipgeo", task, seed, args.folder, count=4)
                yield cell(f"select/{task}/k=4", method, seed, run)
        for part in SHARES if "parts" in args.cells else ():
            for task in tasks:
                for method in at.methods(PARTED, args):
                    run = partial(measured, at, PARTED[method], method, task, seed, args.folder, percent=part)
                    yield cell(f"parts/{task}/{part} %", method, seed, run)


def grid(at: Course, method: str) -> tuple[float, ...]:
    """From which the rate of a method is chosen."""
    return at.rates.get(method, RATES[method])


def rated(method: str) -> str:
    """The method whose rate, or ridge, a method takes."""
    return method.split(",")[0]


@cache
def given(backbone: Backbone) -> Setting:
    """The bank, made once."""
    return setting(backbone)


def lesson(course: Course, name: str, data: Labelled, seed: int) -> Lesson:
    """A task with the vectors of all the others."""
    at = given(course.backbone)
    place = [task.name for task in at.tasks].index(name)
    rest = [vector for number, vector in enumerate(at.vectors) if number != place]
    one = Lesson.of(at.base, at.tasks[place], rest, data, seed)
    return replace(one, mask=course.backbone.mask, batch=course.batch, starts=course.starts)


def rate(at: Course, learn: Learner, values: tuple[float, ...], percent: int = 0) -> Record:
    """The learning rate, or ridge, with the best mean accuracy on validation examples of tasks that are no targets."""
    lessons, sizes = [], {task.name: task.size(given(at.backbone).base) for task in given(at.backbone).tasks}
    for name in at.others:
        data = drawn(at.backbone, name, TUNING_SEED, 2, percent)
        if len(data[1].unique()) == sizes[name]:  # a small share may lack a class
            lessons.append(lesson(at, name, data, TUNING_SEED))
    found = {}
    for value in values:
        rows = [one.accuracy(learn(one, value), one.task.validation) for one in lessons]
        found[str(value)] = round(sum(rows) / len(rows), 2)
    best = max(found, key=lambda value: found[value])
    names = [one.task.name for one in lessons]
    return {"figure": "rate", "value": float(best), "unit": "", "rows": found, "tasks": names}


def drawn(backbone: Backbone, name: str, seed: int, count: int, percent: int) -> Labelled:
    """A share of a task's training file, or else so many examples of each class."""
    return backbone.share(name, percent, seed) if percent else few(given(backbone), name, count, seed)


def measured(
    at: Course,
    learn: Learner,
    method: str,
    name: str,
    seed: int,
    folder: Path,
    *,
    count: int = 0,
    percent: int = 0,
) -> Record:
    """Accuracy on test examples of a target."""
    case = at.before + (f"rate/{percent} %" if percent else "rate")
    rates = {r["method"]: r["value"] for r in read("transfer", folder) if r["case"] == case}
    if method in RATES and method not in rates:
        raise LookupError(f"no rate of {method} on record for {case!r}; run --cells rate first")
    one = lesson(at, name, drawn(at.backbone, name, seed, count, percent), seed)
    net = learn(one, rates.get(method, 0.0))
    value = round(one.accuracy(net, one.task.test), 2)
    return {
        "figure": "accuracy",
        "value": value,
        "unit": "%",
        "images": len(one.data[1]),
        "numbers": getattr(net, "numbers", 0),
    }


if __name__ == "__main__":
    main()
