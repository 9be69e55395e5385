"""A task that the bank does not know, from few images: its other vectors beside fine-tuning, a probe and LoRA.

    python -m benchmarks.transfer                                  all that is not on record yet
    python -m benchmarks.transfer --cells rate few --tasks mnist --shots 1 --seeds 0
    python -m benchmarks.transfer --cells select
    python -m benchmarks.transfer --cells parts
    python -m benchmarks.transfer --plan

"rate": the learning rate of each baseline, and the ridge of `fipgeo.atlas.fit_`, by accuracy on validation images of
tasks that are no targets, learned from two images of each class. "few": k images of each class of a target whose own
vector is left out; every method starts from the head that those images make (`benchmarks.banks.head`). Baselines take
60 steps of AdamW with a cosine, on all weights and the head (full fine-tuning), on the head (linear probe), or on
low-rank additions to all kernels and the head (LoRA, rank 16). "fipgeo" learns a coefficient for each of the other
tasks' vectors and each tensor, and leaves the head as it is; with "moving head" coefficients are learned by AdamW under
the head that the images have at them, and "then fine-tuning" goes on from there with all weights, at a rate of full
fine-tuning. "all layers": no head, but ridge regression on what all layers see (`fipgeo.atlas.HiddenClassifier`), of
the network as it is, or with coefficients that the evidence of the images gives (`fipgeo.atlas.fit_hidden_`). How
layers are seen and how many steps are taken was chosen once, on validation images of Fashion-MNIST, GTSRB and the
targets, from draws of other seeds.
"select": coefficients with two vectors for each tensor, chosen by leverage (`fipgeo.atlas.choose_vectors`) or by the
gradient of each block. "parts": 1 % or 5 % of a target's training file; vectors cut into random parts, so many that
coefficients are as many as the numbers of LoRA of rank 1, both by AdamW.
Accuracies are on test images, by which nothing is chosen.

Records go to benchmarks/results/transfer.json, cell by cell; what is there is not measured again without --again.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.backbones import RESNET20
from benchmarks.banks import Labelled
from benchmarks.cells import Cell, Record, measure, options
from benchmarks.merges import Setting, setting
from benchmarks.records import read
from benchmarks.students import METHODS, PARTED, RATES, SELECTED, Lesson, few, share

TARGETS = ("mnist", "eurosat", "usps")
OTHERS = ("fashion", "gtsrb")
"""Tasks on which rates are chosen; never targets."""
TUNING_SEED = 100


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ["rate", "few", "select", "parts"], [0, 1, 2])
    parser.add_argument("--tasks", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--methods", nargs="+", help="such as fipgeo, LoRA")
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4])
    args = parser.parse_args(arguments)
    measure("transfer", cells(args), args)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """In the order of the kinds, "rate" first, since others read it."""

    def wanted(methods: Any) -> list[str]:
        return [method for method in methods if not args.methods or method in args.methods]

    for method in wanted(RATES) if "rate" in args.cells else ():
        yield cell("rate", method, TUNING_SEED, partial(rate, method))
    for seed in args.seeds:
        for count in args.shots if "few" in args.cells else ():
            for task in args.tasks:
                for method in wanted(METHODS):
                    rated = method.split(",")[0]
                    run = partial(measured, METHODS[method], rated, task, seed, args.folder, count=count)
                    yield cell(f"few/{task}/k={count}", method, seed, run)
        for task in args.tasks if "select" in args.cells else ():
            for method in wanted(SELECTED):
                run = partial(measured, SELECTED[method], "fipgeo", task, seed, args.folder, count=4)
                yield cell(f"select/{task}/k=4", method, seed, run)
        for part in (1, 5) if "parts" in args.cells else ():
            for task in args.tasks:
                for method in wanted(PARTED):
                    run = partial(measured, PARTED[method], method, task, seed, args.folder, percent=part)
                    yield cell(f"parts/{task}/{part} %", method, seed, run)


def cell(case: str, method: str, seed: int, run: Callable[[], Record]) -> Cell:
    """One that makes one record."""
    return Cell({"case": case, "method": method, "seed": seed}, lambda: [run()])


@cache
def given() -> Setting:
    """The bank, made once."""
    return setting(RESNET20)


def lesson(name: str, data: Labelled, seed: int) -> Lesson:
    """A task with the vectors of all the others."""
    at = given()
    place = [task.name for task in at.tasks].index(name)
    rest = [vector for number, vector in enumerate(at.vectors) if number != place]
    return Lesson.of(at.base, at.tasks[place], rest, data, seed)


def rate(method: str) -> Record:
    """The learning rate, or ridge, with the best mean accuracy on validation images of tasks that are no targets."""
    learn, found = (METHODS | PARTED)[method], {}
    for value in RATES[method]:
        rows = []
        for name in OTHERS:
            at = lesson(name, few(given(), name, 2, TUNING_SEED), TUNING_SEED)
            rows.append(at.accuracy(learn(at, value), at.task.validation))
        found[str(value)] = round(sum(rows) / len(rows), 2)
    best = max(found, key=lambda value: found[value])
    return {"figure": "rate", "value": float(best), "unit": "", "rows": found}


def measured(
    learn: Callable[[Lesson, float], Callable[[Tensor], Tensor]],
    rated: str,
    name: str,
    seed: int,
    folder: Path,
    *,
    count: int = 0,
    percent: int = 0,
) -> Record:
    """Accuracy on test images of a target."""
    rates = {r["method"]: r["value"] for r in read("transfer", folder) if r["figure"] == "rate"}
    if rated in RATES and rated not in rates:
        raise LookupError(f"no rate of {rated} on record; run --cells rate first")
    data = share(name, percent, seed) if percent else few(given(), name, count, seed)
    at = lesson(name, data, seed)
    net = learn(at, rates.get(rated, 0.0))
    value = round(at.accuracy(net, at.task.test), 2)
    return {
        "figure": "accuracy",
        "value": value,
        "unit": "%",
        "images": len(data[1]),
        "numbers": getattr(net, "numbers", 0),
    }


if __name__ == "__main__":
    main()
