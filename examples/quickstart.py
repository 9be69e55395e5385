"""Sparsify a trained network and teach it new digits, without the labels of what it knows already.

Trains a small convolutional network on the 1,797 handwritten digits that scikit-learn carries, draws the spectrum of
its metric, walks to 90 % sparsity, then teaches the digits 5-9 to a network that knew 0-4. Prints one table, writes
figures to ./out. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import copy
import time
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo

SPARSITY = 0.9
KEPT = 200


def digits(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training and test images `[N, 1, 8, 8]` with their labels."""
    data: Any = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    x = torch.tensor(data.images, dtype=torch.float32)[order, None] / 8 - 1
    y = torch.tensor(data.target)[order]
    return x[:1297], y[:1297], x[1297:], y[1297:]


def network(seed: int = 0) -> nn.Sequential:
    """Three convolutions with BatchNorm and two linear layers, 23 thousand weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        for inputs, outputs, pool in ((1, 16, True), (16, 32, False), (32, 32, True)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            layers += [nn.MaxPool2d(2)] if pool else []
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, x: Tensor, y: Tensor, optimizer: torch.optim.Optimizer, epochs: int, clip: float) -> None:
    """Ordinary training with a cosine schedule; in eval mode it is plain fine-tuning with fixed statistics."""
    size, generator = 100, torch.Generator().manual_seed(1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // size))
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(size)[: len(x) // size]:
            optimizer.zero_grad()
            cross_entropy(model(x[index]), y[index]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            schedule.step()


def trained(x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """A freshly trained network, in eval mode."""
    model = network().train()
    train(model, x, y, torch.optim.Adam(model.parameters(), lr=3e-3), epochs, clip=10.0)
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def pruned_by_magnitude(model: nn.Module, sparsity: float, statistics_from: Tensor | None = None) -> nn.Module:
    """The usual baseline: the smallest weights set to zero, BatchNorm statistics re-estimated if inputs are given."""
    model = copy.deepcopy(model)
    weights = [p for p in model.parameters() if p.dim() > 1]
    flat = torch.cat([w.abs().flatten() for w in weights])
    threshold = flat.kthvalue(round(sparsity * len(flat))).values
    for w in weights:
        w[w.abs() <= threshold] = 0
    if statistics_from is not None:
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()
                m.momentum = None
        model.train()(statistics_from)
    return model.eval()


def layer_zeros(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Zeros and size of every weight tensor."""
    return {n: (int((p == 0).sum()), p.numel()) for n, p in model.named_parameters() if p.dim() > 1}


def at(path: fipgeo.PathResult, model: nn.Module) -> nn.Module:
    """A copy of the model at the end of a path."""
    return path[-1].apply_(copy.deepcopy(model))


def main(out: Path = Path("out"), quick: bool = False) -> dict[str, float]:
    """Run everything; returns the table's figures by name. `quick` does less of everything, for tests."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    begun = time.perf_counter()
    x, y, x_test, y_test = digits()
    epochs, lessons, kept, few, dpi = (4, 3, 50, 20, 50) if quick else (15, 20, KEPT, 80, 150)
    corrector = fipgeo.FirstOrder(steps=8, final_steps=100) if quick else "auto"
    table: dict[str, float] = {}

    model = trained(x, y, epochs)
    exact = copy.deepcopy(model).double()  # so that rounding does not hide small eigenvalues
    spectrum = fipgeo.metric(exact, x[:few].double(), geometry="categorical").spectrum(
        held_out=x[few : 3 * few].double()
    )

    path = fipgeo.sparsify(model, x, SPARSITY, corrector=corrector)
    sparse = at(path, model)
    table["dense"] = accuracy(model, x_test, y_test)
    table["magnitude"] = accuracy(pruned_by_magnitude(model, SPARSITY), x_test, y_test)
    table["magnitude, statistics re-estimated"] = accuracy(pruned_by_magnitude(model, SPARSITY, x), x_test, y_test)
    table["path"] = accuracy(sparse, x_test, y_test)

    old, old_test = y < 5, y_test < 5
    knows = trained(x[old], y[old], epochs)
    new = (x[~old], y[~old])
    learned = fipgeo.adapt(knows, new, cross_entropy, keep=x[old][:kept], epochs=lessons)
    plain = copy.deepcopy(knows)
    train(plain, *new, torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9), lessons, clip=1.0)
    for name, net in (("before", knows), ("fine-tuned", plain), ("path", at(learned, knows))):
        table[f"old digits, {name}"] = accuracy(net, x_test[old_test], y_test[old_test])
        table[f"new digits, {name}"] = accuracy(net, x_test[~old_test], y_test[~old_test])

    out.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.9), layout="constrained")
    fipgeo.plotting.plot_spectrum(spectrum, ax=axes[0])
    axes[0].set_title("What the outputs feel: the metric's spectrum")
    plot_levels(axes[1], path, model, x, x_test, y_test)
    plot_learning(axes[2], table)
    figure.savefig(out / "quickstart.png", dpi=dpi)
    for name, walked in (("sparsify", path), ("adapt", learned)):
        fipgeo.plotting.plot_path(walked)
        plt.savefig(out / f"{name}.png", dpi=dpi)
    fipgeo.plotting.plot_layer_sparsity(layer_zeros(sparse), target=SPARSITY)
    plt.savefig(out / "layers.png", dpi=dpi)
    plt.close("all")
    report(table, path, learned, kept, time.perf_counter() - begun, out)
    return table


def plot_levels(ax: Axes, path: fipgeo.PathResult, model: nn.Module, x: Tensor, x_test: Tensor, y_test: Tensor) -> None:
    """Test accuracy against sparsity, along the path and for magnitude pruning at the same levels."""
    levels = [point.sparsity for point in path]
    nets = {
        "path": [point.apply_(copy.deepcopy(model)) for point in path],
        "magnitude, statistics re-estimated": [pruned_by_magnitude(model, level, x) for level in levels[1:]],
        "magnitude": [pruned_by_magnitude(model, level) for level in levels[1:]],
    }
    for (name, row), colour, mark in zip(nets.items(), ("#0072B2", "#E69F00", "#999999"), "os^", strict=True):
        share = [100 * accuracy(net, x_test, y_test) for net in row]
        ax.plot([100 * level for level in levels[-len(row) :]], share, mark + "-", color=colour, label=name, ms=4)
    ax.set(xlabel="zero weights (%)", ylabel="test accuracy (%)", ylim=(0, 103))
    ax.set_title("Sparsity without labels")
    ax.legend(frameon=False, loc="lower left", fontsize="small")


def plot_learning(ax: Axes, table: dict[str, float]) -> None:
    """Accuracy on old and new digits before and after learning."""
    names = ("before", "fine-tuned", "path")
    for shift, kind, colour in ((-0.19, "old", "#0072B2"), (0.19, "new", "#E69F00")):
        bars = ax.bar(
            [i + shift for i in range(len(names))],
            [100 * table[f"{kind} digits, {name}"] for name in names],
            width=0.36,
            color=colour,
            label=f"{kind} digits",
        )
        ax.bar_label(bars, fmt="%.0f", fontsize="small")
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="test accuracy (%)", ylim=(0, 118))
    ax.set_title("Learning 5-9 on a network that knew 0-4")
    ax.legend(frameon=False, loc="upper center", ncols=2, fontsize="small")


def report(
    table: dict[str, float], path: fipgeo.PathResult, learned: fipgeo.PathResult, kept: int, seconds: float, out: Path
) -> None:
    """Print the table."""
    rows = [("test accuracy", "all digits")]
    rows += [(name, f"{100 * table[name]:.1f} %") for name in list(table)[:4]]
    width = max(len(name) for name, _ in rows)
    print(f"\n{SPARSITY:.0%} sparsity, no labels used")
    for name, value in rows:
        print(f"  {name:<{width}}  {value:>10}")
    end = path[-1]
    print(
        f"  the path: {end.sparsity:.1%} exact zeros in {len(path) - 1} steps; on {end.num_held_out} held-out inputs"
        f" {end.changed:.1%} of the predictions changed (at most {end.changed_upper:.1%} at 95 % confidence)"
    )
    print(f"\nlearning 5-9 on a network that knew 0-4, {kept} unlabelled old inputs kept")
    print(f"  {'test accuracy':<{width}}  {'old digits':>10}  {'new digits':>10}")
    for name in ("before", "fine-tuned", "path"):
        old, new = table[f"old digits, {name}"], table[f"new digits, {name}"]
        print(f"  {name:<{width}}  {100 * old:>8.1f} %  {100 * new:>8.1f} %")
    print(
        f"\n{seconds:.0f} s; figures in {out}/: quickstart.png, sparsify.png, adapt.png, layers.png; {learned.message}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the figures")
    main(parser.parse_args().out)
