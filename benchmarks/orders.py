"""Sparsify then learn, and learn then sparsify: two paths between the same wishes, which do not end in one place.

    python -m benchmarks.orders                          zeros at 70 %, seeds 0 to 2
    python -m benchmarks.orders --zeros 0.9 --seeds 0

A small network knows the digits 0 to 3 of scikit-learn, is to get zeros and to learn the digits 4 to 6. One way round
zeros come first, protected by 120 old inputs, and are held while the network learns, but for the rows of the new
classes; the other way round it learns first and gets as many zeros then, protected by old and new inputs. Labels of old
digits are not used. Accuracy is on a third of the digits that nothing else sees. `overlap` is the share of the zeros of
the one network that are zero in the other, which for places chosen by chance would be the share of zeros; `apart` the
distance of the two ends over their mean distance from the start; `plane` holds both ways in the plane of their
principal directions. Records go to benchmarks/results/orders.json.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks.records import RESULTS, read, write

OLD, NEW = (0, 4), (4, 7)
KEPT = 120
WAYS = ("zeros, then learning", "learning, then zeros")


def digits(first: int, end: int, *, test: bool) -> tuple[Tensor, Tensor]:
    """Images `[n, 1, 8, 8]` and labels of some digits; every third image is for testing."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1, torch.tensor(labels)
    index = ((y >= first) & (y < end)).nonzero()[:, 0]
    index = index[(torch.arange(len(index)) % 3 == 2) == test]
    return x[index], y[index]


def started(seed: int) -> nn.Module:
    """A network of two convolutions and a head of four outputs that knows the old digits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, OLD[1])),
        )
        optimizer, (x, y) = torch.optim.Adam(net.parameters(), 3e-3), digits(*OLD, test=False)
        for part in (p for _ in range(15) for p in torch.randperm(len(x)).split(32)):
            optimizer.zero_grad()
            cross_entropy(net(x[part]), y[part]).backward()
            optimizer.step()
    return net.eval()


def walked(seed: int, zeros: float) -> tuple[nn.Module, dict[str, list[fipgeo.PathResult]]]:
    """The start with its head grown, and both ways in legs."""
    first, old, new = started(seed), digits(*OLD, test=False)[0], digits(*NEW, test=False)
    kept, wide = old[:: len(old) // KEPT][:KEPT], fipgeo.grow_head(first, NEW[1])
    both = torch.cat([kept, new[0][:: len(new[0]) // KEPT][:KEPT]])
    shared: dict[str, Any] = {"store": "all", "generator": seed}
    learning = shared | {"keep": kept, "epochs": 6, "batch_size": 32}

    sparse = fipgeo.sparsify(first, kept, zeros, **shared)
    thin = fipgeo.grow_head(sparse[-1].apply_(copy.deepcopy(first)), NEW[1])
    taught = fipgeo.adapt(thin, new, cross_entropy, hold_zeros=True, **learning)

    learned = fipgeo.adapt(wide, new, cross_entropy, **learning)
    full = learned[-1].apply_(copy.deepcopy(wide))
    pruned = fipgeo.sparsify(full, both, taught[-1].sparsity, **shared)
    return wide, {WAYS[0]: [sparse, taught], WAYS[1]: [learned, pruned]}


def networks(start: nn.Module, legs: list[fipgeo.PathResult]) -> list[nn.Module]:
    """Every point of a way; a head that has not grown yet gets rows of zeros."""
    out = []
    for point in (p for leg in legs for p in leg):
        state = copy.deepcopy(start).state_dict()
        for name, tensor in (point.tensors or {}).items():
            state[name].zero_()[: len(tensor)] = tensor
        net = copy.deepcopy(start)
        net.load_state_dict(state)
        out.append(net)
    return out


@torch.no_grad()
def accuracy(net: nn.Module, group: tuple[int, int]) -> float:
    """Per cent of the test images of some digits, among all outputs."""
    x, y = digits(*group, test=True)
    return 100 * float((net(x).argmax(1) == y).double().mean())


def weights(net: nn.Module) -> Tensor:
    """All tensors of at least two axes, in a row."""
    return torch.cat([p.detach().flatten() for p in net.parameters() if p.dim() > 1])


def measure(seed: int, zeros: float, folder: Path) -> None:
    """Walk both ways and write down where they lead."""
    begun = time.process_time()
    start, ways = walked(seed, zeros)
    points = {way: networks(start, legs) for way, legs in ways.items()}
    ends = {way: weights(nets[-1]) for way, nets in points.items()}
    one, two = ends.values()
    here = weights(start)
    base = {"case": f"digits/zeros={zeros:g}", "seed": seed, "unit": "%"}
    records = []
    for way, nets in points.items():
        figures = {"old_accuracy": accuracy(nets[-1], OLD), "new_accuracy": accuracy(nets[-1], NEW)}
        figures["zeros"] = 100 * float((ends[way] == 0).double().mean())
        records += [base | {"method": way, "figure": key, "value": round(v, 2)} for key, v in figures.items()]
    overlap = float(((one == 0) & (two == 0)).sum() / (one == 0).sum())
    apart = float((one - two).norm() / (0.5 * ((one - here).norm() + (two - here).norm())))
    seen = fipgeo.between.project(start, points)
    plane = {way: [[round(v, 4) for v in p] for p in curve.tolist()] for way, curve in seen.curves.items()}
    about = {"seconds": round(time.process_time() - begun, 1), "explained": seen.explained.tolist(), "plane": plane}
    records.append(base | {"method": "both", "figure": "overlap", "value": round(100 * overlap, 2)} | about)
    records.append(base | {"method": "both", "figure": "apart", "value": round(100 * apart, 2)})
    write("orders", records, folder)
    for r in records:
        print(r["case"], f"seed {seed}", r["method"], r["figure"], r["value"], sep="  ", flush=True)


def drawn(ax: Axes, folder: Path = RESULTS) -> Axes:
    """Both ways of the first seed on record, in their plane."""
    (record, *_) = [r for r in read("orders", folder) if "plane" in r]

    class Seen:
        curves, explained = record["plane"], record["explained"]

    return fipgeo.plotting.plot_path_projection(Seen(), ax=ax)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zeros", type=float, default=0.7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    for seed in args.seeds:
        measure(seed, args.zeros, args.folder)


if __name__ == "__main__":
    main()
