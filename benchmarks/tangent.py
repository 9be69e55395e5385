"""Tangent models on real networks: what they cost, and what components of shards come to beside what people use today.

    python -m benchmarks.tangent                                           all that is not on record yet
    python -m benchmarks.tangent --parts cost memory                       time and memory beside the plain network
    python -m benchmarks.tangent --parts shards --settings eurosat --splits data/5 class/5 --seeds 0 1 2
    python -m benchmarks.tangent --plan                                    what would be run, and nothing else

    cost       a composed model's forward and training step over the plain network's, in CPU time, turn by turn
    memory     peak memory of a training step over the plain network's, each in a process of its own
    shards     the last block of a pretrained network and a new head learn examples in n parts
    exact      outputs beside f + J tau with J made row by row, in float64
    fit        passes over the data that the convex fit and Adam take to one value of the loss

`shards` compares components (`fit_square_`, then their mean or learned weights) with networks fine-tuned by AdamW on
the same parts (mean of their outputs, mean of their weights) and with both kinds trained on all parts together; see
`benchmarks.shards`, also for how options were chosen. A split is data/n, equal parts at random, or class/n, whole
classes. Settings of texts need an encoder (`benchmarks.texts`) and are left out with a word where it is missing.
A cell is (part, case, seed); those on record are skipped unless --again is given. Records go to
benchmarks/results/tangent.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks.exactness import LINEARISED, difference
from benchmarks.measure import Unavailable, race, reason
from benchmarks.pretrained import _network
from benchmarks.records import RESULTS, read, write
from benchmarks.shards import IMAGES, SETTINGS, loaded, possible, shards
from fipgeo.tangent import tangent_norm

NETWORKS = {"akamaster_cifar10_resnet20": ("layer3.2.*", "linear.*"), "smmk47_cifar10_vit": ("*.5.*", "mlp_head.*")}
"""Networks whose cost is measured, with the patterns of their last block and head."""

SPLITS = ["data/5", "data/10", "data/20", "class/2", "class/5", "class/10"]
COUNTS = [1, 10, 50]
RIDGE, KAPPA = 1e-3, 5.0


class Cell(NamedTuple):
    """One thing to be measured."""

    part: str
    case: str
    seed: int


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    torch.set_num_threads(1)
    for cell in cells(args):
        known = {(r["part"], r["case"], r["seed"]) for r in read("tangent", args.folder)}
        if args.plan:
            print(*cell, sep="  ")
        elif cell not in known or args.again:
            try:
                found = [cell._asdict() | r for r in PARTS[cell.part](cell, args)]
            except Unavailable as error:
                print(*cell, "left out:", reason(error))
                continue
            if not args.held_out:
                write("tangent", found, args.folder)
            for r in found:
                print(f"{r['case']:<48} {r['method']:<36} {r['figure']:<16} {r['value']:8.2f} {r['unit']}", flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=SETTINGS)
    parser.add_argument("--splits", nargs="+", default=SPLITS, help="data/n or class/n")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=15, help="turns of every contestant")
    parser.add_argument("--batch", type=int, default=64, help="images in a call whose cost is measured")
    parser.add_argument("--held-out", action="store_true", help="accuracy on unseen training images, not recorded")
    parser.add_argument("--components", action="store_true", help="of shards, only what is made of their components")
    parser.add_argument("--again", action="store_true", help="measure what is on record too")
    parser.add_argument("--plan", action="store_true", help="print the cells and stop")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    return parser.parse_args(arguments)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    for part in args.parts:
        if part in ("cost", "memory"):
            for name, which in product(args.networks, ("all", "last block")):
                yield Cell(part, f"{name}/{which}", 0)
        elif part == "exact":
            yield from (Cell(part, name, 0) for name in LINEARISED)
        elif part == "fit":
            yield from (Cell(part, f"{setting}/300 images", 0) for setting in args.settings if setting in IMAGES)
        else:
            for seed, setting, split in product(args.seeds, args.settings, args.splits):
                if possible(setting, split):
                    yield Cell(part, f"{setting}/{split}", seed)


def cost(cell: Cell, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Forwards of composed models of 1, 10 and 50 components, and a training step, over the plain network's."""
    net, model, x, y = costly(cell.case, args.batch)
    generator = torch.Generator().manual_seed(0)

    def drawn(name: str) -> fipgeo.Component:
        tau = {n: 1e-3 * torch.randn(t.shape, generator=generator) for n, t in model.tangents().items()}
        return fipgeo.Component(name, tau, code)

    code = fipgeo.tangent.fingerprint(net)
    parts = [drawn(f"{i:02}") for i in range(max(COUNTS))]
    composed = {f"composed of {n}": fipgeo.compose(net, parts[:n]) for n in COUNTS}
    calls: dict[str, Callable[[], Any]] = {"plain": quiet(net, x)}
    calls |= {name: quiet(one, x) for name, one in composed.items()}
    forwards = race(calls, rounds=args.rounds, limit=120)
    steps = race({"plain": step(net, x, y), "tangent": step(model, x, y)}, rounds=args.rounds, limit=120)
    found = []
    for figure, series, names in (("forward", forwards, list(composed)), ("training step", steps, ["tangent"])):
        for name in names:
            value, span = series.ratio(name, "plain")
            found.append({"method": name, "figure": figure, "value": value, "unit": "plain", "span": span})
    return [r | {"clock": forwards.clock, "batch": args.batch} for r in found]


def costly(case: str, batch: int) -> tuple[nn.Module, fipgeo.TangentModel, Tensor, Tensor]:
    """A plain network of which all weights or those of its end are trained, a tangent model of it, and a batch."""
    name, which = case.split("/")
    net = _network(name)[0]
    model = fipgeo.TangentModel(net, "*" if which == "all" else list(NETWORKS[name]))
    for n, p in net.named_parameters():
        p.requires_grad_(n in model.names)
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return net, model, x, torch.arange(batch) % 10


def quiet(net: nn.Module, x: Tensor) -> Callable[[], Any]:
    def call() -> Tensor:
        with torch.no_grad():
            return net(x)

    return call


def step(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """A training step of the parameters that require a gradient."""
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=1e-6)

    def call() -> None:
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()

    return call


def memory(cell: Cell, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What a training step on 256 images adds to the process at its peak, over the plain network's.

    Once with every tensor given back to the system when it is freed, so that the size is that of what lives together,
    and once with the memory that the C library keeps for later, by its own rules.
    """
    del args
    found = []
    for figure, threshold in (("peak memory", str(2**16)), ("peak memory, with what malloc keeps", None)):
        with environment(MALLOC_MMAP_THRESHOLD_=threshold):
            plain, tangent = (alone(cell.case, kind) for kind in ("plain", "tangent"))
        record = {"method": "tangent", "figure": figure, "value": tangent / plain, "unit": "plain"}
        found.append(record | {"mib": [round(tangent / 2**10, 1), round(plain / 2**10, 1)], "batch": 256})
    return found


def alone(case: str, kind: str) -> int:
    """`peak` in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as workers:
        return workers.apply(peak, (case, kind))


@contextmanager
def environment(**changes: str | None) -> Iterator[None]:
    """Variables of processes that are started inside; None for one that is not set."""
    before = {name: os.environ.get(name) for name in changes}
    try:
        _put(changes)
        yield
    finally:
        _put(before)


def _put(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def peak(case: str, kind: str) -> int:
    """KiB by which the largest size of this process grows in a training step, after one on two images."""
    torch.set_num_threads(1)
    net, model, x, y = costly(case, 256)
    one = net if kind == "plain" else model
    step(one, x[:2], y[:2])()
    Path("/proc/self/clear_refs").write_text("5")  # the largest size is counted from here
    before = size("VmRSS")
    step(one, x, y)()
    return size("VmHWM") - before


def size(key: str) -> int:
    """KiB of this process, on Linux."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0])


def exact(cell: Cell, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The largest difference from the dense linearisation, over the largest J tau."""
    del args
    found = {"method": "tangent model", "figure": "difference", "unit": "of J tau"}
    return [found | {"value": difference(cell.case)}]


def fit(cell: Cell, args: argparse.Namespace) -> list[dict[str, Any]]:
    """What Adam reaches in 50 epochs at its best rate, and the passes and seconds in which the fit is below it.

    A pass is one forward and one backward over the data; a product of conjugate gradients counts as one, the dual
    system as the backward passes that make J, one for every output.
    """
    data = loaded(cell.case.split("/")[0], cell.seed, args.held_out)
    x, y, ridge, kappa = data.x[:300], data.y[:300], RIDGE, KAPPA
    best, rate, took = min(adam(data.net, x, y, ridge, kappa, rate) for rate in (1e-3, 3e-3, 1e-2))
    found = {"method": "Adam, 50 epochs", "figure": "objective", "value": best, "unit": "loss", "rate": rate}
    records = [found | {"seconds": took}]
    model = fipgeo.TangentModel(data.net, copy=False)
    begun = time.process_time()
    solved = fipgeo.fit_square_(model, (x, y), kappa=kappa, ridge=ridge, gap=1e-6, method="dual")
    spent, outputs = time.process_time() - begun, int(y.max()) + 1
    records.append({"method": "fit_square_, dual", "figure": "objective", "value": solved.objective, "unit": "loss"})
    records[-1] |= {"seconds": spent, "outputs": outputs}
    passes = 50 / ((1 + 2 * outputs) / 3)  # one forward and a backward for every output, which counts two
    records.append({"method": "fit_square_, dual", "figure": "passes saved", "value": passes, "unit": "times"})
    records.append({"method": "fit_square_, dual", "figure": "time saved", "value": took / spent, "unit": "times"})
    for iterations in (5, 10, 20, 40, 80, 160):
        model.assign_({})
        begun = time.process_time()
        solved = fipgeo.fit_square_(
            model, (x, y), kappa=kappa, ridge=ridge, gap=1e-6, method="cg", max_iters=iterations
        )
        spent = time.process_time() - begun
        records.append({"method": f"fit_square_, {solved.num_products} products", "figure": "objective"})
        records[-1] |= {"value": solved.objective, "unit": "loss", "seconds": spent, "products": solved.num_products}
        if solved.objective < best:
            passes = 50 / solved.num_products
            records.append({"method": "fit_square_", "figure": "passes saved", "value": passes, "unit": "times"})
            records.append({"method": "fit_square_", "figure": "time saved", "value": took / spent, "unit": "times"})
            break
    return records


def adam(net: nn.Module, x: Tensor, y: Tensor, ridge: float, kappa: float, rate: float) -> tuple[float, float, float]:
    """The objective after 50 epochs with the published drops of the rate, the rate, and CPU seconds."""
    model, generator = fipgeo.TangentModel(net), torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(model.tangents().values(), lr=rate)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [25, 40])
    begun = time.process_time()
    for _ in range(50):
        for chosen in torch.randperm(len(y), generator=generator).split(32):
            optimizer.zero_grad()
            loss = fipgeo.rescaled_square_loss(model(x[chosen]), y[chosen], kappa)
            (loss + ridge * tangent_norm(model, squared=True)).backward()
            optimizer.step()
        schedule.step()
    took = time.process_time() - begun
    with torch.no_grad():
        loss = fipgeo.rescaled_square_loss(model(x), y, kappa) + ridge * tangent_norm(model, squared=True)
    return float(loss), rate, took


PARTS: dict[str, Callable[[Cell, argparse.Namespace], list[dict[str, Any]]]] = {
    "cost": cost,
    "memory": memory,
    "shards": lambda cell, args: shards(cell.case, cell.seed, args.held_out, not args.components),
    "exact": exact,
    "fit": fit,
}

if __name__ == "__main__":
    sys.exit(main())
