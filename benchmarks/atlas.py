"""Learning coefficients of task vectors: what composing costs, and how far the solver gets beside AdamW.

    python -m benchmarks.atlas                                  all that is not on record yet
    python -m benchmarks.atlas --cells compose step             what composing eight vectors costs
    python -m benchmarks.atlas --cells stream               memory of a step over vectors that stay in files (Linux)
    python -m benchmarks.atlas --cells few --tasks mnist --shots 1 4 16
    python -m benchmarks.atlas --cells add negate
    python -m benchmarks.atlas --plan

Times are medians of interleaved runs in CPU seconds. Coefficients are learned over the bank of `benchmarks.banks`, one
for each vector and tensor. "few": a task whose own vector is left out, from k images of each class, under a head made
of the same images; AdamW as published (learning rate 0.1, weight decay 0.1, cosine, 30 epochs of at least 10 steps,
batches of 128). "add": all tasks at once, on validation images that no vector was made of; AdamW as published (0.001,
weight decay 0.1, 20 epochs, 16 images of each task in a step). "negate": a task is to be unlearned while the network's
own, CIFAR-10, is kept, on training images of both; AdamW with the learning rate and the epochs published for the task
(weight decay 0.1, 64 images of either in a step). AdamW runs its schedule; the solver stops at the training loss which
that reached. Passes are in examples: AdamW's count one each, the solver's as `fipgeo.atlas.Fit` says. Where the solver
takes samples it stops when the loss of its sample is lower still by a margin, and a look at all of the data that makes
it go on with another sample counts. Accuracy is on test images, by which nothing is chosen; at coefficients 0 it is
that of the pretrained network.

Records go to benchmarks/results/atlas.json, cell by cell; what is there is not measured again without --again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from benchmarks.anonymous import Peak, held_apart
from benchmarks.backbones import FILES, RESNET, RESNET20, TEST, TRAIN, VALIDATION
from benchmarks.banks import Examples, accuracy, bank, head, scores
from benchmarks.cells import Cell, Record, measure, options
from benchmarks.models import Inputs, build
from benchmarks.pretrained import _images, _labels, _network
from fipgeo import Composition, TaskVector
from fipgeo.atlas import Goal, fit_

OURS = "fipgeo"
SHAPES = {"resnet20": 64, "vit": 16, "bert": 16, "mlp": 256}
"""Networks whose composition is timed, and examples of a step."""
VECTORS = 8
BANK, DEPTHS = 22, (3, 10)
"""Vectors that stay in files, and how many units of 8.9 million weights the network has."""
ADDED = ("mnist", "fashion", "usps", "gtsrb", "eurosat")
"""Tasks of the bank that are learned together; Omniglot has ten times as many classes."""
MARGIN = 0.2
"""What a sample's loss must fall further than AdamW's has fallen over all of the data, as a share of that. It was
chosen by the passes that the cells on record took with 0 and with it, not on others."""
NEGATED = {"mnist": (3e-3, 7), "eurosat": (5e-3, 3), "gtsrb": (5e-3, 5)}
"""Tasks to be unlearned, with the learning rate and the epochs that Zhang et al. (NeurIPS 2024, Table 6) give them."""


def main(arguments: list[str] | None = None) -> None:
    parser = options(__doc__, ["compose", "step", "stream", "few", "add", "negate"], [0])
    parser.add_argument("--networks", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tasks", nargs="+", default=list(ADDED), choices=list(FILES))
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 4, 16])
    args = parser.parse_args(arguments)
    measure("atlas", cells(args), args)


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    """What composing costs, then what learning takes, seed by seed."""
    for name in args.networks:
        for kind, run in (("compose", composing), ("step", stepping)):
            if kind in args.cells:
                yield Cell({"case": f"{kind}/{name}", "seed": 0}, partial(run, name))
    for units in DEPTHS if "stream" in args.cells else ():
        yield Cell({"case": f"stream/{units} units", "seed": 0}, partial(streaming, units))
    for seed in args.seeds:
        for count in args.shots if "few" in args.cells else ():
            for task in args.tasks:
                yield Cell({"case": f"few/{task}/k={count}", "seed": seed}, partial(few_shot, task, count, seed))
        if "add" in args.cells:
            yield Cell({"case": f"add/{'+'.join(args.tasks)}", "seed": seed}, partial(addition, args.tasks, seed))
        for task in NEGATED if "negate" in args.cells else ():
            if task in args.tasks:
                yield Cell({"case": f"negate/{task}", "seed": seed}, partial(negation, task, seed))


def timed(**calls: Callable[[], Any]) -> dict[str, float]:
    """Median CPU seconds of some functions that are called in turn."""
    spent: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(12):
        for name, call in calls.items():
            begun = time.process_time()
            call()
            if turn:
                spent[name].append(time.process_time() - begun)
    return {name: statistics.median(times) for name, times in spent.items()}


def composed(name: str) -> tuple[Composition, Mapping[str, Tensor], list[TaskVector], Inputs]:
    case = build(name, SHAPES[name])
    draws, base = torch.Generator().manual_seed(0), dict(case.model.named_parameters())
    vectors = [
        TaskVector({n: 0.01 * torch.randn(p.shape, generator=draws) for n, p in base.items()}) for _ in range(VECTORS)
    ]
    return Composition(case.model, vectors, start=0.1).eval(), base, vectors, case.inputs


def product(coefficients: Tensor, base: Mapping[str, Tensor], vectors: list[TaskVector]) -> dict[str, Tensor]:
    """The composed weights as a sum of products in Python."""
    pairs = [(coefficients[i], vector.tensors) for i, vector in enumerate(vectors)]
    return {n: start + sum(row[place] * of[n] for row, of in pairs) for place, (n, start) in enumerate(base.items())}


def composing(name: str) -> list[Record]:
    """One composition without its derivative, beside a sum of products in Python."""
    model, base, vectors, _ = composed(name)

    @torch.no_grad()
    def plain() -> dict[str, Tensor]:
        return product(model.coefficients, base, vectors)

    @torch.no_grad()
    def fused() -> dict[str, Tensor]:
        return model.weights()

    gap = max(float((plain()[n] - t).abs().max()) for n, t in fused().items())
    assert gap < 1e-4, f"the two differ by {gap}"
    return ratios(timed(ours=fused, other=plain), "sum of products")


def stepping(name: str) -> list[Record]:
    """Forward and backward pass with coefficients, beside one with the composed weights as they are."""
    model, base, vectors, x = composed(name)
    fixed = {n: t.detach().requires_grad_() for n, t in model.weights().items()}
    frozen = {n: t.detach() for n, t in base.items()}

    def plain() -> None:
        for t in fixed.values():
            t.grad = None
        functional_call(model.module, fixed, (x,)).logsumexp(1).sum().backward()

    def ours() -> None:
        model.coefficients.grad = None
        model(x).logsumexp(1).sum().backward()

    def naive() -> None:
        model.coefficients.grad = None
        weights = product(model.coefficients, frozen, vectors)
        functional_call(model.module, weights, (x,)).logsumexp(1).sum().backward()

    times = timed(ours=ours, other=plain, naive=naive)
    ratio = {"figure": "ratio", "value": round(times["naive"] / times["other"], 3), "unit": "of fixed weights"}
    return [*ratios(times, "fixed weights"), {"method": "sum of products", **ratio}]


def streaming(units: int) -> list[Record]:
    """Memory of a step over vectors that stay in float16 files, beside one with the composed weights as they are."""
    held_apart()
    layers = [(768, 2304), (2304, 768), (768, 768), (768, 3072), (3072, 768)] * units
    base = nn.Sequential(*(part for size in layers for part in (nn.Linear(*size), nn.ReLU())))
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{i}.safetensors" for i in range(BANK)]
        for i, file in enumerate(files):
            draws = torch.Generator().manual_seed(i)
            TaskVector(
                {n: (1e-3 * torch.randn(p.shape, generator=draws)).half() for n, p in base.named_parameters()}
            ).save(file)
        model, x = (
            Composition(base, [TaskVector.load(file, stream=True) for file in files], start=0.01),
            torch.ones(8, 768),
        )
        weights = sum(p.numel() for p in base.parameters())
        largest = max(p.numel() for p in base.parameters())
        del base
        with Peak() as ours:
            model(x).logsumexp(1).sum().backward()
        fixed = {n: t.detach().requires_grad_() for n, t in model.weights().items()}
        with Peak() as plain:
            functional_call(model.module, fixed, (x,)).logsumexp(1).sum().backward()
    sizes = {"files": 2 * BANK * weights, "largest block": 2 * BANK * largest, "step": ours.rise, "peak": ours.top}
    return [
        {"method": OURS, "figure": "weights", "value": weights, "unit": "numbers"},
        *({"method": OURS, "figure": n, "value": round(size / 2**20), "unit": "MiB"} for n, size in sizes.items()),
        {
            "method": "fixed weights",
            "figure": "step",
            "value": round((4 * weights + plain.rise) / 2**20),  # the weights are there before the step
            "unit": "MiB",
        },
    ]


def ratios(times: dict[str, float], other: str) -> list[Record]:
    return [
        {"method": OURS, "figure": "seconds", "value": round(times["ours"], 5), "unit": "s"},
        {"method": other, "figure": "seconds", "value": round(times["other"], 5), "unit": "s"},
        {"method": OURS, "figure": "ratio", "value": round(times["ours"] / times["other"], 3), "unit": f"of {other}"},
    ]


def few_shot(name: str, count: int, seed: int) -> list[Record]:
    """A task from a few images of each class, by the other tasks' vectors."""
    task, base = RESNET20.examples(name), RESNET20.trunk()
    others = [RESNET20.examples(other) for other in ADDED if other != name]
    x, y = task.shots(count, seed)
    labels = torch.searchsorted(y.unique(), y)
    data, classes = (x, labels), head(base, x, y)
    forward = scores(classes)
    steps = 30 * max(10, -(-len(x) // 128))
    draws = torch.Generator().manual_seed(seed)
    batches = ([part] for part in shuffled(data, forward, 128, draws))
    vectors = list(bank(RESNET20, others).values())
    model = Composition(base, vectors).eval()
    theirs = adamw(model, batches, steps, lr=0.1, cosine=True)
    goals = [Goal(data, forward_fn=forward)]
    return compared(model, goals, theirs, [(task, classes)], seed)


def addition(names: list[str], seed: int) -> list[Record]:
    """All tasks at once, on their validation images."""
    tasks, base = [RESNET20.examples(name) for name in names], RESNET20.trunk()
    heads = [head(base, *task.train) for task in tasks]
    forwards = [scores(classes) for classes in heads]
    draws = torch.Generator().manual_seed(seed)
    streams = [shuffled(t.validation, forward, 16, draws) for t, forward in zip(tasks, forwards, strict=True)]
    batches = ([next(stream) for stream in streams] for _ in cycle([0]))
    model = Composition(base, list(bank(RESNET20, tasks).values())).eval()
    steps = 20 * -(-len(tasks[0].validation[0]) // 16)
    theirs = adamw(model, batches, steps, lr=1e-3, cosine=False)
    goals = [
        Goal(task.validation, forward_fn=forward, weight=1 / len(tasks))
        for task, forward in zip(tasks, forwards, strict=True)
    ]
    return compared(model, goals, theirs, list(zip(tasks, heads, strict=True)), seed, sample=80)


def negation(name: str, seed: int) -> list[Record]:
    """A task is unlearned, CIFAR-10 kept, by the vectors of all tasks."""
    tasks, base = [RESNET20.examples(name), known()], RESNET20.trunk()
    heads = [head(base, *task.train) for task in tasks]
    forwards = [scores(classes) for classes in heads]
    rate, epochs = NEGATED[name]
    draws = torch.Generator().manual_seed(seed)
    streams = [shuffled(t.train, forward, 64, draws) for t, forward in zip(tasks, forwards, strict=True)]
    signs = (-2.0, 2.0)  # `adamw` takes the mean over the two
    batches = ([(*next(stream), sign) for stream, sign in zip(streams, signs, strict=True)] for _ in cycle([0]))
    model = Composition(base, list(bank(RESNET20, [RESNET20.examples(task) for task in ADDED]).values())).eval()
    theirs = adamw(model, batches, epochs * -(-len(tasks[0].train[0]) // 64), lr=rate, cosine=False)
    goals = [
        Goal(task.train, forward_fn=forward, weight=sign / 2)
        for task, forward, sign in zip(tasks, forwards, signs, strict=True)
    ]
    return compared(model, goals, theirs, list(zip(tasks, heads, strict=True)), seed, sample=128)


def shuffled(data: tuple[Tensor, Tensor], forward: Any, size: int, draws: torch.Generator) -> Iterator[Any]:
    """Batches of one goal for ever."""
    x, y = data
    while True:
        for part in torch.randperm(len(x), generator=draws).split(size):
            yield forward, (x[part], y[part])


def known() -> Examples:
    """The network's own task, by its first images."""
    _, data, norm = _network(RESNET)
    x, y = _images(data, "train", norm, RESNET), _labels(data, "train")
    test = _images(data, "test", norm, RESNET, slice(TEST)), _labels(data, "test")[:TEST]
    return Examples(data, (x[:TRAIN], y[:TRAIN]), (x[TRAIN:][:VALIDATION], y[TRAIN:][:VALIDATION]), test)


def adamw(model: Composition, batches: Iterator[list[Any]], steps: int, *, lr: float, cosine: bool) -> Record:
    """The published recipe: passes and seconds; the coefficients are left in the model."""
    optimizer = torch.optim.AdamW([model.coefficients], lr=lr, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if cosine else None
    passes, begun = 0, time.process_time()
    for _ in range(steps):
        optimizer.zero_grad()
        with model.once():
            for forward, (x, y), *weight in (parts := next(batches)):
                (cross_entropy(forward(model, (x,)), y) * (weight[0] if weight else 1) / len(parts)).backward()
                passes += len(x)
        nn.utils.clip_grad_norm_([model.coefficients], 1.0)
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return {"passes": passes, "seconds": time.process_time() - begun}


def compared(
    model: Composition,
    goals: list[Goal],
    theirs: Record,
    tests: list[tuple[Examples, Tensor]],
    seed: int,
    sample: int | None = None,
) -> list[Record]:
    """The solver from the start to the loss that AdamW left, and both on test images."""
    reached = trained(model, goals)
    records = judged("AdamW", model, tests) + noted("AdamW", reached, **theirs)
    with torch.no_grad():
        model.coefficients.zero_()
    start = trained(model, goals)
    records += judged("pretrained", model, tests) + noted("pretrained", start, passes=0, seconds=0)
    target = reached - MARGIN * (start - reached) if sample else reached
    begun, passes, loss = time.process_time(), 0.0, float("inf")
    for turn in range(10 if sample else 1):
        if turn:
            passes += sum(len(goal.data[0]) for goal in goals) / 3
        fit = fit_(model, goals, target=target, steps=200, sample=sample, rtol=0.0, generator=seed + turn)
        passes, loss = passes + fit.passes[-1], trained(model, goals)
        if loss <= reached:
            break
    records += noted(OURS, loss, passes=passes, seconds=time.process_time() - begun) + judged(OURS, model, tests)
    share = {"method": OURS, "figure": "passes ratio", "value": round(passes / theirs["passes"], 4), "unit": "of AdamW"}
    return [*records, share]


@torch.no_grad()
def trained(model: Composition, goals: list[Goal]) -> float:
    """The objective."""
    net, total = model.merge(), 0.0
    for goal in goals:
        x, y = goal.data
        assert goal.forward_fn is not None
        found = torch.cat([goal.forward_fn(net, (part,)) for part in x.split(250)])
        total += goal.weight * float(cross_entropy(found, y))
    return total


def noted(method: str, loss: float, *, passes: float, seconds: float) -> list[Record]:
    return [
        {"method": method, "figure": "training loss", "value": round(loss, 5), "unit": "nats"},
        {"method": method, "figure": "passes", "value": round(passes), "unit": "examples"},
        {"method": method, "figure": "seconds", "value": round(seconds, 1), "unit": "s"},
    ]


def judged(method: str, model: Composition, tests: list[tuple[Examples, Tensor]]) -> list[Record]:
    """Accuracy of each task on its test images, and their mean."""
    net = model.merge()
    found = {task.name: round(100 * accuracy(net, classes, task.test), 2) for task, classes in tests}
    mean = round(statistics.fmean(found.values()), 2)
    return [{"method": method, "figure": "accuracy", "value": mean, "unit": "%", "rows": found}]


if __name__ == "__main__":
    main()
