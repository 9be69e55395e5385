"""How often the statements of a certificate are true: 200 held-out sets at random, against the rate on all test images.

    python -m benchmarks.coverage sfd_mnist_lenet5

A network is made sparse along a path of 1,000 unlabelled training inputs. All 10,000 test images then stand for the
population: their outputs under the start and under every point are computed once, and the true share of changed
predictions (of each class, and the true distance) is known. Each repetition draws a held-out set from them with
replacement, as new inputs would come, and certifies every point at 95 %. Nothing is chosen with test images.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import fipgeo
from benchmarks.pretrained import load
from benchmarks.records import write
from fipgeo.paths.certificate import Certificate, certify, changed_upper_bound

REPETITIONS = 200
CONFIDENCE = 0.95
LIMITS = (0.005, 0.01, 0.02, 0.05)


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Logits of all images, `[N, C]`."""
    return torch.cat([model(part) for part in x.split(500)]).double()


class Population:
    """Start and points on all test images: per image what a held-out set would show of it."""

    def __init__(self, start: Tensor, points: Sequence[Tensor]) -> None:
        z0 = start - start.mean(1, keepdim=True)
        self.spread = float((z0 - z0.mean(0)).square().sum(1).mean().sqrt())
        self.classes = start.argmax(1)
        self.sure = torch.softmax(start, 1).amax(1)
        self.squared = [(f - f.mean(1, keepdim=True) - z0).square().sum(1) for f in points]
        self.moved = [f.argmax(1) != self.classes for f in points]
        self.surer = [torch.softmax(f, 1).amax(1) - self.sure for f in points]

    def certificate(self, point: int, index: Tensor) -> Certificate:
        """What a walk would have written with these images held out."""
        parts = (self.squared[point][index], self.spread, self.moved[point][index], self.classes[index])
        return certify(*parts, self.surer[point][index], CONFIDENCE)

    def worst(self, point: int) -> dict[int, float]:
        """The true share of changes of every class."""
        moved, classes = self.moved[point].double(), self.classes
        return {int(c): float(moved[classes == c].mean()) for c in classes.unique()}


def covered(
    population: Population, point: int, size: int, generator: torch.Generator, whole: bool
) -> tuple[dict[str, float], float]:
    """Share of repetitions in which each statement about one point is true, and the mean bound on changes.

    Without `whole` only the bound on changes is looked at, which is all that costs nothing.
    """
    true, classes = float(population.moved[point].double().mean()), population.worst(point)
    distance = float(population.squared[point].mean().sqrt())
    right, width = dict.fromkeys(("changed", *(("worst class", "every class", "distance") if whole else ())), 0), 0.0
    for _ in range(REPETITIONS):
        index = torch.randint(len(population.classes), (size,), generator=generator)
        upper = changed_upper_bound(int(population.moved[point][index].sum()), size, CONFIDENCE)
        right["changed"] += upper >= true
        width += upper / REPETITIONS
        if whole:
            found = population.certificate(point, index)
            right["worst class"] += found.worst_upper >= classes[found.worst_class]
            right["every class"] += found.classes_upper >= max(classes.values())
            right["distance"] += found.distance_low <= distance <= found.distance_high
    return {key: count / REPETITIONS for key, count in right.items()}, width


def kept(population: Population, path: fipgeo.PathResult, size: int, rule: str, generator: torch.Generator) -> float:
    """Share of repetitions in which `best` picks a point that is within the limit; the limits take turns."""
    true = [0.0] + [float(moved.double().mean()) for moved in population.moved]
    broken = 0
    for repetition in range(REPETITIONS):
        limit = LIMITS[repetition % len(LIMITS)]
        index = torch.randint(len(population.classes), (size,), generator=generator)
        shares = [0.0] + [float(moved[index].double().mean()) for moved in population.moved]
        points = [replace(p, changed=share, num_held_out=size) for p, share in zip(path, shares, strict=True)]
        drawn = fipgeo.PathResult(tuple(points), path.objective_name, path.maximise, None, "reached", "", {})
        try:
            best = drawn.best(max_changed=limit, confidence=CONFIDENCE, multiplicity=rule)
        except ValueError:  # nothing is promised
            continue
        broken += true[best.step] > limit
    return 1 - broken / REPETITIONS


def run(name: str, levels: tuple[float, ...], sizes: Sequence[int], seed: int, corrector: str) -> list[dict[str, Any]]:
    """All records of one network."""
    model, inputs, x_test, _ = load(name, 1000)
    options: dict[str, Any] = {"corrector": corrector, "held_out": 0.1, "generator": seed, "sparsity": levels}
    path = fipgeo.sparsify(model, inputs, **options)
    print(path, flush=True)
    points = [outputs(p.apply_(copy.deepcopy(model)), x_test) for p in path[1:]]
    population = Population(outputs(model, x_test), points)
    generator, records = torch.Generator().manual_seed(seed), []
    for size in sizes:
        shares = []
        for index, point in enumerate(path[1:]):
            case = f"{name}/sparsity={point.sparsity:.4f}/held_out={size}"
            found, width = covered(
                population, index, size, generator, any(abs(point.sparsity - level) < 1e-4 for level in levels)
            )
            more = {"true_changed": float(population.moved[index].double().mean()), "mean_upper": round(width, 5)}
            for what, value in found.items():
                base = {"case": case, "method": f"certificate at 95 %: {what}", "figure": "coverage", "value": value}
                records.append(base | {"unit": "share", "seed": seed, "repetitions": REPETITIONS} | more)
            shares.append(found["changed"])
            print(case, found, more, flush=True)
        base = {"case": f"{name}/all points/held_out={size}", "method": "certificate at 95 %: changed"}
        base |= {"figure": "coverage", "value": round(sum(shares) / len(shares), 4), "unit": "share", "seed": seed}
        records.append(base | {"repetitions": REPETITIONS * len(shares)})
        print(base, flush=True)
        for rule in ("sequence", "bonferroni", "none"):
            value = kept(population, path, size, rule, generator)
            base = {"case": f"{name}/best/held_out={size}", "method": f"multiplicity={rule}", "figure": "promise kept"}
            records.append(base | {"value": value, "unit": "share", "seed": seed, "repetitions": REPETITIONS})
            print(base, value, flush=True)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a pretrained network, such as sfd_mnist_lenet5")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.9, 0.95, 0.98], help="waypoints of the path")
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000], help="held-out inputs in a repetition")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--corrector", default="first-order")
    args = parser.parse_args()
    write("coverage", run(args.model, tuple(args.levels), args.sizes, args.seed, args.corrector))


if __name__ == "__main__":
    main()
