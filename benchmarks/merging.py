"""One network for many tasks, and one that forgot a task: learned coefficients beside published ways to merge.

    python -m benchmarks.merging                                all that is not on record yet
    python -m benchmarks.merging --backbones vit --cells add --seeds 0
    python -m benchmarks.merging --cells negate --tasks mnist eurosat --methods fipgeo AdamW
    python -m benchmarks.merging --cells negate --spare         by examples that are neither for choices nor of the test
    python -m benchmarks.merging --plan

The backbones are those of `benchmarks.backbones`, each with a bank; cases of all but the ResNet-20 begin with the name
of theirs. "add": all tasks of the bank at once, each under its own head, and the mean of their accuracies on test
examples. Every rule sees what it was published with, and chooses on validation examples, which no vector was made of:

    individual vectors  each task by the network that its own vector gives (not one network)
    isotropic           the sum of all vectors, its scale by validation
    TIES, DARE          share kept or dropped, and scale, by validation
    TSV, Iso-C, LiNeS   scale or scales by validation
    AdaMerging          a coefficient for each vector and tensor, by the entropy of predictions on validation examples
                        without labels (Adam 0.001, 500 steps of 16 examples a task, 240 on MiniLM) from the scale of
                        "isotropic", since the published start of 0.3 breaks the ResNet-20; "on test" by that on test
                        examples
    AdamW               the published recipe of aTLAS: labels of validation examples, from 0, AdamW 0.001 with weight
                        decay 0.1, 20 epochs of 16 examples a task in a step
    fipgeo              the same labels by `fipgeo.atlas.fit_`, from the better of the merges of Iso-C and
                        TSV on validation examples, over its vectors; its ridge ("ridge", once for each backbone) is
                        that which does best on one half of them after learning from the other

"negate": the network forgets a task and keeps 95 % of its accuracy on the control, CIFAR-10 under the head that it was
trained with, or AG News under that of its training texts, whose vector no rule then gets. Vectors are taken back by the
scale that leaves least of the target and keeps this on control examples of validation; AdamW (gradient ascent on the
target as published, 64 examples of each in a step) by its best step; `fipgeo.atlas.forget_` from the best of the tuned
"isotropic", TSV and Iso-C, with half of those control examples set apart to judge the floor. The weight of the
control's loss was chosen from 8 and 16 on spare examples of the ResNet-20's targets and control, and so was that the
first step that leaves least is taken, not the last; a weight of 1, two ways to choose among several and the last step
had been seen on test examples before. Accuracies are on test examples, by which nothing is chosen.

"bank": the same tasks with vectors of other fine-tuning, by mean accuracy on validation examples: each task by its own
vector, and merges of all. The bank of the other cells is the first, the best by own vectors.

Forms of our own rules are compared with --spare, which takes accuracies on spare examples in place of the test's.
Records go to benchmarks/results/merging.json, or merging-spare.json, cell by cell; what is there is not measured again
without --again. Vectors that are made anew on another processor differ in their last digits, and accuracies by some
tenths, or by points where a chosen scale or a learned end moves with them; records say on which processor they were
made.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

from torch import nn

from benchmarks.backbones import BACKBONES, RESNET20
from benchmarks.banks import Backbone
from benchmarks.cells import Cell, Record, measure, options
from benchmarks.learned import LEARNED, NEGATED, by_ours, ridges
from benchmarks.merges import ADDED, Setting, Task, control, setting
from benchmarks.records import RESULTS, read

MERGED = ("weight averaging", "isotropic", "TSV", "Iso-C")
"""Rules that banks are compared by."""
DRAWN = {"DARE", "AdaMerging", "AdaMerging on test", "AdamW", "fipgeo"}
"""Methods with a seed of their own."""
TUNING_SEED = 100
TASKS = list(dict.fromkeys(task for backbone in BACKBONES.values() for task in backbone.tasks))


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ["ridge", "add", "negate", "bank"], [0, 1, 2])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=TASKS, help="to be forgotten")
    parser.add_argument("--methods", nargs="+", help="such as fipgeo, AdamW, TIES")
    parser.add_argument("--spare", action="store_true", help="judge by spare examples, not by those of the test")
    args = parser.parse_args(arguments)
    measure(
        "merging-spare" if args.spare else "merging",
        (cell for name in args.backbones for cell in cells(BACKBONES[name], args)),
        args,
    )


def cells(backbone: Backbone, args: argparse.Namespace) -> Iterator[Cell]:
    """Methods without a seed of their own are measured once."""
    before = "" if backbone is RESNET20 else f"{backbone.name}/"

    def wanted(method: str, seed: int) -> bool:
        return (not args.methods or method in args.methods) and (seed == args.seeds[0] or method in DRAWN)

    if "ridge" in args.cells and wanted("fipgeo", args.seeds[0]):
        yield Cell({"case": f"{before}ridge", "method": "fipgeo", "seed": TUNING_SEED}, partial(tuned, backbone))
    for seed in args.seeds:
        for method in ("individual vectors", *ADDED, *LEARNED) if "add" in args.cells else ():
            if wanted(method, seed):
                about = {"case": f"{before}add", "method": method, "seed": seed}
                yield Cell(about, partial(added, backbone, method, seed, args.spare, before, args.folder))
        for task in backbone.forgotten if "negate" in args.cells else ():
            for method in NEGATED if task in args.tasks else ():
                if wanted(method, seed):
                    about = {"case": f"{before}negate/{task}", "method": method, "seed": seed}
                    yield Cell(about, partial(negated, backbone, task, method, seed, args.spare))

    for epochs, rate in ((backbone.epochs, backbone.rate), *backbone.others) if "bank" in args.cells else ():
        about = {"case": f"{before}bank/{epochs} epochs at {rate}", "method": "fine-tuning", "seed": 0}
        yield Cell(about, partial(compared, backbone, epochs, rate))


@cache
def given(backbone: Backbone, spare: bool) -> tuple[Setting, Task]:
    """The bank and the control, made once."""
    return setting(backbone, spare=spare), control(backbone, spare)


def tuned(backbone: Backbone) -> list[Record]:
    """The ridge of ours, by halves of the validation examples."""
    found = ridges(given(backbone, False)[0], TUNING_SEED)
    best = max(found, key=lambda ridge: found[ridge])
    return [{"figure": "ridge", "value": best, "unit": "", "rows": {str(ridge): v for ridge, v in found.items()}}]


def added(
    backbone: Backbone, method: str, seed: int, spare: bool = False, before: str = "", folder: Path = RESULTS
) -> list[Record]:
    """Accuracy of all tasks on test examples, or on spare ones; the ridge of ours is read from what is on record."""
    at, _ = given(backbone, spare)
    if method == "individual vectors":
        alone = [at.only(task.name) for task in at.tasks]
        rows = {k: v for one in alone for k, v in one.rows(one.whole.apply_to(one.base), "test").items()}
        return [accuracy(rows, "scale 1")]
    rules = ADDED | LEARNED
    if method == "fipgeo":
        known = [r["value"] for r in read("merging", folder) if r["case"] == f"{before}ridge"]
        if not known:
            raise LookupError(f"no ridge is on record for {backbone.name}; run --cells ridge first")
        rules |= {"fipgeo": partial(by_ours, ridge=known[0])}
    net, chosen = rules[method](at, seed)
    rule = {"figure": "validation", "value": round(at.validated(net), 2), "unit": "%"}
    return [accuracy(at.rows(net, "test"), chosen), rule]


def compared(backbone: Backbone, epochs: int, rate: float) -> list[Record]:
    """Mean accuracies of a bank on validation examples, and the mean norm of its vectors."""
    at = setting(backbone, epochs, rate)
    alone = [at.only(task.name) for task in at.tasks]
    own = statistics.fmean(one.validated(one.whole.apply_to(one.base)) for one in alone)
    found = {"individual vectors": own, "norm": statistics.fmean(vector.norm() for vector in at.vectors)}
    found |= {rule: at.validated(ADDED[rule](at, 0)[0]) for rule in MERGED}
    return [{"figure": n, "value": round(v, 2), "unit": "" if n == "norm" else "%"} for n, v in found.items()]


def accuracy(rows: dict[str, float], chosen: str) -> Record:
    """The mean over tasks, with what it is made of."""
    mean = round(statistics.fmean(rows.values()), 2)
    return {"figure": "accuracy", "value": mean, "unit": "%", "rows": rows, "chosen": chosen}


def negated(backbone: Backbone, name: str, method: str, seed: int, spare: bool = False) -> list[Record]:
    """What is left of the target and of the control, on test or spare examples, without the control's own vector."""
    at, kept = given(backbone, spare)
    at = at.only(*backbone.forgotten)
    place = [task.name for task in at.tasks].index(name)
    net, chosen = NEGATED[method](at, place, kept, seed)
    return remains(at.base, net, at.tasks[place], kept, chosen)


def remains(base: nn.Module, net: nn.Module, target: Task, kept: Task, chosen: str) -> list[Record]:
    """Accuracies on the target and on the control, and the latter's share of that before."""
    left, control = target.accuracy(net, target.test), kept.accuracy(net, kept.test)
    share = 100 * control / kept.accuracy(base, kept.test)
    found = {"target": left, "control": control, "control kept": share}
    return [{"figure": n, "value": round(v, 2), "unit": "%", "chosen": chosen} for n, v in found.items()]


if __name__ == "__main__":
    main()
