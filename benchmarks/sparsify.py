"""Sparsity without labels on real pretrained networks: test accuracy at each level, beside what people use today.

    python -m benchmarks.sparsify                                          all that is not on record yet
    python -m benchmarks.sparsify --models sfd_mnist_lenet5 --levels 0.9 --methods fipgeo magnitude --limit 600
    python -m benchmarks.sparsify --models akamaster_cifar10_resnet20 --inputs 10000 --methods fipgeo
    python -m benchmarks.sparsify --tune --models gaurav_mnist_vit --budget 30    learning rates of the baselines
    python -m benchmarks.sparsify --plan                                   what would be run, and nothing else

The first unlabelled training inputs, all test images, the weights of convolutions and linear layers counted together.
Test labels are used for the table only. A cell is (network, level, inputs, method, seed); those on record are skipped
unless --again is given, what matters most comes first, and each is written when it is done, so that a run can be broken
off and several can share the work (--models). Every level is a run of its own, of fipgeo and of the baselines; the
seconds that fipgeo takes are the budget of every baseline that trains. On one thread (--threads) budgets are
CPU time. Records go to benchmarks/results/sparsify.json; docs/sparsity.md and docs/results.md are made from it.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fipgeo
from benchmarks.baselines import Found, Pace, Task, counted, goal, normalised, outputs, timed, zeros
from benchmarks.methods import BASELINES, FAMILY, FIXED, GRIDS, HELD_OUT, OURS, STATISTICS, agreement, rate_of
from benchmarks.pretrained import held_out, load
from benchmarks.records import RESULTS, read, write

MODELS = [
    "akamaster_cifar10_resnet20",
    "sfd_mnist_lenet5",
    "mlp_mnist",
    "gaurav_mnist_vit",
    "kd_cifar10_resnet8",
    "sfd_fmnist_lenet5",
    "smmk47_cifar10_vit",
    "kd_cifar10_wrn16_1",
]
LEVELS = [0.9, 0.8, 0.95, 0.7]
EXTRA = {"mlp_mnist": [0.98]}
TUNED_AT = 0.9


class Cell(NamedTuple):
    """One figure to be measured."""

    model: str
    level: float
    inputs: int
    method: str
    seed: int

    @property
    def case(self) -> str:
        """Its name on record."""
        return case(self.model, self.level, self.inputs)


def case(model: str, level: float, inputs: int) -> str:
    return f"{model}/sparsity={level:g}/inputs={inputs}"


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    begun, failed = time.perf_counter(), 0
    for cell in tunings(args) if args.tune else cells(args):
        if time.perf_counter() - begun > args.limit:
            break
        if args.plan:
            print(cell.case, cell.method, f"seed {cell.seed}", sep="  ")
        elif args.tune or args.again or not on_record(named(cell, args), args.folder):
            try:
                (tune if args.tune else measure)(cell, args)
            except Exception as error:  # the other cells do not depend on it
                failed += 1
                print(f"{cell.case}  {cell.method}  {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(f"{failed} cells failed")


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--levels", type=float, nargs="+", help="default: 0.9, 0.8, 0.95, 0.7; 0.98 too for the MLP")
    parser.add_argument("--methods", nargs="+", default=[OURS, *BASELINES], choices=[OURS, *BASELINES])
    parser.add_argument("--inputs", type=int, nargs="+", default=[1000], help="unlabelled training inputs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--limit", type=float, default=float("inf"), help="no cell begins after so many seconds")
    parser.add_argument(
        "--budget", type=float, help="seconds of a baseline, in place of those fipgeo took; named in the record"
    )
    parser.add_argument("--again", action="store_true", help="measure what is on record too")
    parser.add_argument("--plan", action="store_true", help="print the cells and stop")
    parser.add_argument("--tune", action="store_true", help="measure the learning rates of the baselines")
    parser.add_argument("--score", help="of fipgeo, instead of sparsify's own choice; named in the record")
    parser.add_argument("--corrector", help="of fipgeo, instead of sparsify's own choice; named in the record")
    parser.add_argument("--pattern", help="of fipgeo: N:M, such as 2:4; named in the record, whose level it decides")
    parser.add_argument("--final-steps", type=int, help="minibatches of a last first-order correction; named too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    return parser.parse_args(arguments)


def levels(model: str, args: argparse.Namespace) -> list[float]:
    if args.pattern:
        found = pattern_of(args.pattern)
        return [1 - found.n / found.m]
    return args.levels or LEVELS + EXTRA.get(model, [])


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """In the order of seeds, networks, inputs, then fipgeo at all levels, then level by level the baselines."""
    own = ", ".join([OURS, *(f"{key}={value}" for key, value in options(args).items())])
    for seed, model, inputs in product(args.seeds, args.models, args.inputs):
        yield Cell(model, 0.0, inputs, "dense", 0)
        yield from (Cell(model, level, inputs, own, seed) for level in levels(model, args) if OURS in args.methods)
        for level, method in product(levels(model, args), (m for m in args.methods if m != OURS)):
            if not (method in FIXED and seed != args.seeds[0]):
                yield Cell(model, level, inputs, method, 0 if method in FIXED else seed)


def pattern_of(text: str) -> fipgeo.NofM:
    """What "2:4" means."""
    return fipgeo.NofM(*map(int, text.split(":")))


def options(args: argparse.Namespace) -> dict[str, Any]:
    """What is asked of fipgeo beside its defaults."""
    return {key: getattr(args, key) for key in ("score", "corrector", "final_steps", "pattern") if getattr(args, key)}


def named(cell: Cell, args: argparse.Namespace) -> Cell:
    """The cell under its name on record, which says what time a baseline was given if it is not that of fipgeo."""
    given = args.budget is not None and cell.method in BASELINES and cell.method not in FIXED
    return cell._replace(method=f"{cell.method}, {args.budget:g} s") if given else cell


def on_record(cell: Cell, folder: Path) -> bool:
    """Whether the cell was measured; records of an older form, which do not say what was spent, do not count."""
    found = {(r["case"], r["method"], r["seed"]) for r in read("sparsify", folder) if "forwards" in r}
    return (cell.case, cell.method, cell.seed) in found


def measure(cell: Cell, args: argparse.Namespace) -> None:
    """Run one cell and write what came out."""
    model, inputs, x_test, y_test = load(cell.model, cell.inputs)
    if cell.method == STATISTICS and not normalised(model):
        return

    def note(level: float, method: str, found: Found) -> None:
        value = 100 * float(outputs(found.model, x_test).argmax(1).eq(y_test).double().mean())
        record = {"case": case(cell.model, level, cell.inputs), "method": method, "figure": "test_accuracy"}
        least = 0.0 if args.pattern else level  # a pattern leaves runs alone that are too short
        record |= {"value": round(value, 2), "unit": "%", "seed": cell.seed} | verified(found, model, least)
        write("sparsify", [record], args.folder)
        print(f"{record['case']:<56} {method:<34} {value:6.2f} %  {found.cpu_seconds:.0f} s", flush=True)

    if cell.method == "dense":
        note(0.0, "dense", Found(model, 0.0))
    elif cell.method not in BASELINES:
        note(cell.level, cell.method, ours(model, inputs, cell.level, cell.seed, options(args)))
    else:
        rate = rate_of(cell.model, cell.method, args.folder)
        task = Task(model, inputs, cell.level, cell.seed, Pace(budget(cell, args)), rate)
        found = timed(BASELINES[cell.method], task)
        found.more.update({} if cell.method in FIXED else {"rate": rate, "budget_s": task.pace.budget_s})
        note(cell.level, named(cell, args).method, found)


def ours(model: nn.Module, inputs: Tensor, level: float, seed: int, options: dict[str, Any]) -> Found:
    """The network at the end of a path to one level, and what the path had taken when it got there."""
    if final := options.get("final_steps"):
        options = {k: v for k, v in options.items() if k != "final_steps"}
        options["corrector"] = fipgeo.FirstOrder(final_steps=final)
    target: float | None = level
    if "pattern" in options:
        target, options = None, options | {"pattern": pattern_of(options["pattern"])}
    names, wall, cpu = counted(model), time.perf_counter(), time.process_time()
    others = {name for name, _ in model.named_parameters()} - set(names)
    path = fipgeo.sparsify(
        model,
        inputs,
        target,
        exclude=(lambda name, _: name not in names) if others else None,
        held_out=HELD_OUT,
        generator=seed,
        **options,
    )
    spent, point = (time.perf_counter() - wall, time.process_time() - cpu), path[-1]
    more = {"steps": point.step, "drift": round(point.drift, 4), "changed": point.changed}
    more |= {"upper": point.changed_upper, "outcome": path.outcome}
    return Found(point.apply_(copy.deepcopy(model)).eval(), point.cost, *spent, more)


def budget(cell: Cell, args: argparse.Namespace) -> float:
    """Seconds for a baseline: what fipgeo took for the same case, with this seed or the first there is."""
    if args.budget is not None or cell.method in FIXED:
        return args.budget or 0.0
    took = [r for r in read("sparsify", args.folder) if (r["case"], r["method"]) == (cell.case, OURS)]
    if not took:
        raise ValueError(f"no record of fipgeo gives the time for {cell.method}; run it first, or pass --budget")
    record = next((r for r in took if r["seed"] == cell.seed), took[0])
    return record["cpu_seconds" if args.threads == 1 else "seconds"]


def verified(found: Found, dense: nn.Module, level: float) -> dict[str, Any]:
    """Exact zeros and cost; an error where zeros are missing."""
    have, want, total = zeros(found.model), goal(dense, level), sum(w.numel() for w in counted(dense).values())
    if have < want:
        raise RuntimeError(f"{have} zeros instead of {want}")
    cost = {"seconds": round(found.seconds, 1), "cpu_seconds": round(found.cpu_seconds, 1), "forwards": found.forwards}
    return {"zeros": have / total, "counted": total} | cost | found.more


def tunings(args: argparse.Namespace) -> Iterator[Cell]:
    """One for each network and family of which a method was asked for."""
    families = {FAMILY.get(method, method) for method in args.methods}
    for model, method in product(args.models, GRIDS):
        if method in families:
            yield Cell(model, TUNED_AT, args.inputs[0], method, 0)


def tune(cell: Cell, args: argparse.Namespace) -> None:
    """Agreement with the dense network on training images that no method is given, for every rate of the grid."""
    model, inputs, _, _ = load(cell.model, cell.inputs)
    unseen, seconds = held_out(cell.model), budget(cell, args)
    for rate in GRIDS[cell.method]:
        name = f"{cell.method}, rate {rate:g}"
        if not args.again and any((r["case"], r["method"]) == (cell.case, name) for r in read("rates", args.folder)):
            continue
        found = timed(BASELINES[cell.method], Task(model, inputs, cell.level, 0, Pace(seconds), rate))
        value = round(agreement(model, found.model, unseen), 2)
        record = {"case": cell.case, "method": name, "figure": "agreement", "value": value, "unit": "%", "seed": 0}
        record |= {"rate": rate, "family": cell.method, "budget_s": seconds, "seconds": round(found.seconds, 1)}
        write("rates", [record], args.folder)
        print(f"{cell.case:<56} {name:<44} {value:6.2f} %", flush=True)


if __name__ == "__main__":
    main()
