"""Ensembles along a path towards robustness, beside ensembles and networks that cost as much to train.

    python -m benchmarks.robust                                     all that is not on record yet
    python -m benchmarks.robust --split selection --methods path    on other test images, for choices
    python -m benchmarks.robust --epochs 4 --again

One pretrained network of the folder that FIPGEO_DATA names, and its first training images. Methods:

- "single": the pretrained network itself.
- "path": `fipgeo.robustify` without labels, then the mean probability of networks on the line from its start through
  its end (`fipgeo.PathEnsemble.towards`); "path end" is its last point alone.
- "path without metric": the same with `damping=None`.
- "FGE": fast geometric ensembling (Garipov et al. 2018), training with labels under a cyclical learning rate, a network
  kept at the bottom of each cycle; as many as the path ensemble has.
- "adversarial": fine-tuning with labels on attacked minibatches alone, one network.

FGE and adversarial fine-tuning get as many seconds of CPU time as "path" took. Training images are mirrored at random
in these two. The shares and the size of the attack in training were chosen on test images 5000 to 9999, and figures
are taken on those before: clean accuracy; accuracy under PGD-20 on the method itself (for ensembles on the mean
probability), an input counting as lost once any point that the attack meets is misclassified; and "transfer", the
accuracy on examples made by PGD-20 on the single network. Records go to benchmarks/results/robust.json.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks import pretrained
from benchmarks.records import RESULTS, read, write
from fipgeo.attacks import Attack, fgsm, pgd, withstands

CASE = "akamaster_cifar10_resnet20"
BOX: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "bounds": (0.0, 1.0)}
PATHS = ("path", "path without metric")

METHODS = ("single", *PATHS, "FGE", "adversarial")
FGE_RATES = (0.01, 0.0005)
"""Highest and lowest learning rate of a cycle."""


class Mean(nn.Module):
    """The logarithm of the mean probability of several networks."""

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def each(self, x: Tensor) -> Tensor:
        """Log-probabilities `[K, n, C]`."""
        return torch.stack([member(x).log_softmax(-1) for member in self.members])

    def forward(self, x: Tensor) -> Tensor:
        """Log-probabilities `[n, C]`."""
        return self.each(x).logsumexp(0) - math.log(len(self.members))


def main(arguments: list[str] | None = None) -> None:
    args = parsed(arguments)
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        known = {r["method"] for r in read("robust", args.folder) if r["case"] == case_of(args) and r["seed"] == seed}
        wanted = [m for m in args.methods if args.again or m not in known]
        for records in measured(wanted, seed, args):
            write("robust", records, args.folder)
            for r in records:
                print(f"{r['method']:<12} {r['figure']:<14} {r['value']:.4g} {r['unit']}", flush=True)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--split", default="test", choices=("test", "selection"), help="images that figures are taken on"
    )
    parser.add_argument("--train", type=int, default=10000, help="training images of all methods")
    parser.add_argument("--clean", type=int, default=5000, help="images that clean accuracy is measured on")
    parser.add_argument("--attacked", type=int, default=500, help="the first of them, which are attacked")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[0.4, 0.8, 1.2], help="of the way to the path's end, one a member"
    )
    parser.add_argument("--eps", type=float, default=2.0, help="of the attack in training, in 255ths")
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--lr", type=float, default=0.05)
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--refresh", type=int, default=30)
    parser.add_argument("--rows", type=int, default=512, help="outputs in a metric")
    parser.add_argument("--again", action="store_true", help="measure what is on record too")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    return parser.parse_args(arguments)


def case_of(args: argparse.Namespace) -> str:
    return f"{CASE}/inputs={args.train}" + ("" if args.split == "test" else "/selection")


def measured(methods: Sequence[str], seed: int, args: argparse.Namespace) -> Any:
    """The records of one method after the other; FGE and adversarial fine-tuning take as long as the path did."""
    model, x, x_test, y_test = pretrained.load(CASE, args.train)
    labels = pretrained._labels("cifar10", "train")
    first = 5000 if args.split == "selection" else 0
    x_test, y_test = (part[first : first + args.clean] for part in (x_test, y_test))
    few = x_test[: args.attacked], y_test[: args.attacked]
    transfers = {eps: pgd(eps / 255, 20, **BOX)(model, *few, generator=seed) for eps in (2, 4)} if methods else {}
    attack = fgsm(args.eps / 255, random=True, **BOX)
    known = [r for r in read("robust", args.folder) if r["case"] == case_of(args) and r["seed"] == seed]
    spent = {r["method"]: r["train_seconds"] for r in known}.get("path")
    for method in methods:
        found: dict[str, nn.Module] = {"single": model} if method == "single" else {}
        begun, notes = time.process_time(), {}
        if method in PATHS:
            found, notes = walked(method, model, x, attack, seed, args)
            spent = time.process_time() - begun if method == "path" else spent
        elif method != "single" and spent is None:
            raise SystemExit(f"{method} takes as long as the path did; measure --methods path first")
        elif method == "FGE":
            found, notes = cycled(model, x, labels[: len(x)], spent or 0.0, len(args.shares), seed)
        elif method == "adversarial":
            found, notes = hardened(model, x, labels[: len(x)], attack, spent or 0.0, seed)
        notes["train_seconds"] = round(time.process_time() - begun, 1)
        for name, net in found.items():
            records = figures(net, x_test, y_test, transfers, seed, args.attacked)
            same = {"case": case_of(args), "seed": seed, "method": name} | notes
            yield [same | {"figure": figure, "value": value, "unit": unit} for figure, (value, unit) in records.items()]


def walked(
    method: str, model: nn.Module, x: Tensor, attack: Attack, seed: int, args: argparse.Namespace
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """The ensemble along a path, and the path's last point."""
    options: dict[str, Any] = {"epochs": args.epochs, "lr": args.lr, "refresh": args.refresh}
    options["damping"] = args.damping if method == "path" else None
    path = fipgeo.robustify(model, x, attack, max_rows=args.rows, held_out=0.02, generator=seed, **options)
    several = fipgeo.PathEnsemble.towards(path, model, args.shares)
    notes = options | {"eps": args.eps, "rows": args.rows, "shares": args.shares}
    notes |= {"drifts": [round(p.drift, 3) for p in path]}
    return {method: several, f"{method} end": path[-1].apply_(copy.deepcopy(model))}, notes


def cycled(
    model: nn.Module, x: Tensor, y: Tensor, seconds: float, members: int, seed: int
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """Networks at the bottom of every cycle of the learning rate."""
    high, low = FGE_RATES

    def rate(share: float) -> float:
        down = abs(2 * (share * members % 1) - 1)
        return low + (high - low) * down

    kept: list[nn.Module] = []

    def look(net: nn.Module, share: float) -> None:
        if share * members >= len(kept) + 0.5 and len(kept) < members:
            kept.append(copy.deepcopy(net).eval())

    batches = trained(copy.deepcopy(model), x, y, seconds, rate, seed, look=look)[1]
    return {"FGE": Mean(kept)}, {"members": len(kept), "minibatches": batches, "rates": list(FGE_RATES)}


def hardened(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, seconds: float, seed: int, lr: float = 0.01
) -> tuple[dict[str, nn.Module], dict[str, Any]]:
    """One network, fine-tuned on attacked minibatches."""
    net, batches = trained(
        *(copy.deepcopy(model), x, y, seconds, lambda share: lr * 0.5 * (1 + math.cos(math.pi * share)), seed),
        change=lambda net, a, b, random: attack(net, a, b, cross_entropy, generator=random),
    )
    return {"adversarial": net}, {"minibatches": batches, "lr": lr, "eps": attack.eps * 255}


def trained(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    seconds: float,
    rate: Callable[[float], float],
    seed: int,
    *,
    change: Callable[[nn.Module, Tensor, Tensor, torch.Generator], Tensor] | None = None,
    look: Callable[[nn.Module, float], None] | None = None,
) -> tuple[nn.Module, int]:
    """SGD on labelled minibatches of 100 for so many seconds of CPU time; the network, and how many they were."""
    random, begun, count = torch.Generator().manual_seed(seed), time.process_time(), 0
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, momentum=0.9)
    order = torch.arange(len(x))
    net.train()
    while (share := (time.process_time() - begun) / seconds) < 1:
        if count * 100 % len(x) == 0:
            order = torch.randperm(len(x), generator=random)
        part = order[count * 100 % len(x) :][:100]
        a, b = x[part], y[part]
        turned = torch.rand(len(a), generator=random) < 0.5
        a = torch.where(turned[:, None, None, None], a.flip(3), a)
        a = a if change is None else change(net, a, b, random)
        optimizer.param_groups[0]["lr"] = rate(share)
        optimizer.zero_grad()
        cross_entropy(net(a), b).backward()
        optimizer.step()
        count += 1
        if look is not None:
            look(net, share)
    return net.eval(), count


@torch.no_grad()
def figures(
    net: nn.Module, x: Tensor, y: Tensor, transfers: dict[int, Tensor], seed: int, attacked: int
) -> dict[str, tuple[float, str]]:
    """What a method reaches."""
    scores = torch.cat([net(part) for part in x.split(250)])
    out = {"clean": (100 * float(scores.argmax(1).eq(y).double().mean()), "%")}
    few, target = x[:attacked], y[:attacked]
    for eps, shown in transfers.items():
        left = withstands(net, few, target, pgd(eps / 255, 20, **BOX), generator=seed)
        guess = torch.cat([net(part) for part in shown.split(250)]).argmax(1)
        out[f"pgd20 {eps}/255"] = (100 * float(left.double().mean()), "%")
        out[f"transfer {eps}/255"] = (100 * float(guess.eq(target).double().mean()), "%")
    if isinstance(net, Mean | fipgeo.PathEnsemble):
        found = fipgeo.diversity(torch.cat([net.each(part) for part in few.split(250)], 1), target)
        out |= {"disagreement": (100 * found.disagreement, "%"), "correlation of errors": (found.correlation, "1")}
    return {figure: (value, unit) for figure, (value, unit) in out.items() if math.isfinite(value)}


if __name__ == "__main__":
    main()
