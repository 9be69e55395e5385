"""Geodesics of networks, and paths between two that were trained apart.

    python -m benchmarks.geodesics                                        all that is not on record yet
    python -m benchmarks.geodesics --cases speed/tanh connect/dense-chreg --seeds 0
    python -m benchmarks.geodesics --steps 400 --batch 64 --again

speed/*: small random networks in float64; a geodesic of unit length in the damped metric with error control, and what
it lost of its conserved speed. Methods "rk4" and "dopri5" are integrated with fixed steps too; their `order` is the
logarithm to base 2 of the ratio of two errors at the end, one with twice the steps, against many more steps.

connect/*: two pretrained ResNet-20 of one shape from the folder that FIPGEO_DATA names, connected without labels on
training images. `drift` is the largest one along the path on training images that were held out (see
`fipgeo.Connection`); `excess_loss` is the highest cross entropy on test images along the path, less the larger one of
the two ends. Methods are the straight line of the weights, the same after alignment of the channels by weights, and by
activations ("aligned line"), and the path between the networks of the latter; all have their BatchNorm statistics
re-estimated on the same images wherever they are measured.

predictor/*: what steps with the geodesic's acceleration save beside plain ones (see `benchmarks.predictors`).

Records go to benchmarks/results/geodesics.json.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks import predictors
from benchmarks.records import RESULTS, read, write

PAIRS = {
    "connect/dense-chreg": ("intel_cifar10_resnet20_dense", "intel_cifar10_resnet20_chreg"),
}
MEASURED = 7
"""Points at which a path is measured, ends included."""


class Tokens(nn.Module):
    """A transformer encoder layer with LayerNorm, its outputs the mean over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, activation="gelu", batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[n, 3]` of sequences `[n, 5, 8]`."""
        return self.head(self.layer(x).mean(1))


def _tanh() -> tuple[nn.Module, tuple[int, ...]]:
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3)), (8,)


def _gelu() -> tuple[nn.Module, tuple[int, ...]]:
    first, second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
    return nn.Sequential(first, nn.GELU(), second, nn.GELU(), nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8)


NETWORKS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "speed/tanh": _tanh,
    "speed/gelu": _gelu,
    "speed/layer_norm": lambda: (Tokens(), (5, 8)),
}


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        for case in args.cases:
            for records in measured(case, seed, args):
                write("geodesics", [{"case": case, "seed": seed} | r for r in records], args.folder)
                for r in records:
                    print(f"{case:<22} {r['method']:<16} {r['figure']:<14} {r['value']:.4g} {r['unit']}", flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = [*NETWORKS, *PAIRS, *predictors.NETWORKS]
    parser.add_argument("--cases", nargs="+", default=cases, choices=cases)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--kept", type=int, default=1500, help="unlabelled training images that a path is found on")
    parser.add_argument("--held-out", type=int, default=500, help="training images that it is measured on")
    parser.add_argument("--test", type=int, default=1000, help="test images that losses are measured on")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--inputs", type=int, default=100, help="unlabelled inputs of a predictor's metric")
    parser.add_argument(
        "--settings",
        nargs="+",
        default=list(predictors.SETTINGS),
        choices=list(predictors.SETTINGS),
        help="directions and dampings of a predictor's steps",
    )
    parser.add_argument("--again", action="store_true", help="measure what is on record too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    return parser.parse_args(arguments)


def measured(case: str, seed: int, args: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The records of a case, as they come; what is on record is not measured again unless that is asked for."""
    found = [r["method"] for r in read("geodesics", args.folder) if (r["case"], r["seed"]) == (case, seed)]
    known = [] if args.again else found
    if case in predictors.NETWORKS:
        settings = [setting for setting in args.settings if not any(method.endswith(setting) for method in known)]
        yield from predictors.measured(case, seed, args.inputs, settings)
    elif not known:
        yield speed(case, seed) if case in NETWORKS else connected(case, seed, args)


def speed(case: str, seed: int) -> list[dict[str, Any]]:
    """What is lost of a conserved speed, and the orders of the methods."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, shape = NETWORKS[case]()
        x, model = torch.randn(16, *shape).double(), model.double()
        field = fipgeo.MetricField(model, x, "euclidean")
        v = torch.randn(field.space.dim).double()
    begun = time.process_time()
    path = fipgeo.geodesic(field, None, v, 1.0)
    seconds = time.process_time() - begun
    notes = {"unit": "1", "seconds": round(seconds, 2), "evaluations": path.num_evaluations, "damping": path.damping}
    change = float((path.output_speeds / path.output_speeds[0] - 1).abs().max())
    records = [
        notes | {"method": "error control", "figure": "speed_error", "value": path.speed_error},
        notes | {"method": "error control", "figure": "output_speed_change", "value": change},
    ]
    options: dict[str, Any] = {"damping": path.damping}
    exact = fipgeo.geodesic(field, None, v, 1.0, steps=48, **options).end
    for method in fipgeo.geodesics.TABLEAUX:
        ends = [fipgeo.geodesic(field, None, v, 1.0, method=method, steps=n, **options).end for n in (8, 16)]
        few, many = (float((end - exact).norm()) for end in ends)
        records.append({"method": method, "figure": "order", "value": math.log2(few / many), "unit": "1"})
    return records


def connected(case: str, seed: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Drift and loss along the straight line, the line after alignment, and the path."""
    from benchmarks import pretrained

    a, kept, x_test, y_test = pretrained.load(PAIRS[case][0], args.kept)
    b = pretrained.load(PAIRS[case][1], 1)[0]
    held = pretrained.held_out(PAIRS[case][0], 5000, 5000 + args.held_out)
    x_test, y_test = x_test[: args.test], y_test[: args.test]
    turned = fipgeo.align(a, b, kept, by="activations", generator=seed)
    begun = time.process_time()
    options: dict[str, Any] = {"generator": seed, "num_measured": MEASURED, "held_out": held}
    plain = fipgeo.connect(a, b, kept, steps=1, **options)
    weighed = fipgeo.connect(a, b, kept, steps=1, align="weights", **options)
    path = fipgeo.connect(a, turned, kept, steps=args.steps, lr=args.lr, batch_size=args.batch, points=2, **options)
    seconds = round(time.process_time() - begun, 1)
    notes = {"seconds": seconds, "steps": args.steps, "batch": args.batch, "lr": args.lr, "kept": args.kept}
    notes |= {"held_out": args.held_out, "test": args.test}
    records = []
    lines = {"straight line": plain, "aligned by weights": weighed, "aligned line": path}
    ways = {method: (line(p), p.straight_drift, p.straight_changed) for method, p in lines.items()}
    ways["path"] = (path, path.drift, path.changed)
    for method, (way, values, strange) in ways.items():
        found = {"drift": (float(values.max()), "spreads"), "changed": (100 * float(strange.max()), "%")}
        loss, accuracy = along(way, copy.deepcopy(a), x_test, y_test)
        ends = (max(loss[0], loss[-1]), min(accuracy[0], accuracy[-1]))
        found |= {"excess_loss": (max(loss) - ends[0], "nats"), "lost_accuracy": (100 * (ends[1] - min(accuracy)), "%")}
        more = {"losses": [round(v, 4) for v in loss], "accuracies": [round(v, 4) for v in accuracy]}
        more |= {"drifts": [round(v, 4) for v in values.tolist()]}
        for figure, (value, unit) in found.items():
            records.append(notes | {"method": method, "figure": figure, "value": value, "unit": unit} | more)
    return records


def line(found: fipgeo.Connection) -> fipgeo.Connection:
    """The straight line of the weights between the ends of a path."""
    return replace(found, way=replace(found.way, corners=found.way.corners[[0, -1]]))


@torch.no_grad()
def along(found: fipgeo.Connection, model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[float], list[float]]:
    """Cross entropy and accuracy on test images at the points where a path was measured."""
    losses, accuracies = [], []
    for t in found.times.tolist():
        found.apply_(model, t)
        scores = torch.cat([model(part) for part in x.split(250)])
        losses.append(float(cross_entropy(scores, y)))
        accuracies.append(float(scores.argmax(1).eq(y).double().mean()))
    return losses, accuracies


if __name__ == "__main__":
    main()
