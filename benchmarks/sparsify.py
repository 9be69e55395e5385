"""Sparsity without labels on real pretrained networks: test accuracy at each level, beside magnitude pruning.

    python benchmarks/sparsify.py akamaster_cifar10_resnet20 --levels 0.7 0.8 0.9
    python benchmarks/sparsify.py sfd_mnist_lenet5 --levels 0.9 0.95 0.98

1,000 unlabelled training inputs, all test images, weights of convolutions and linear layers counted together. Every
level is a path of its own; a tenth of the inputs is set apart for its verdict. Test labels are used for the table only.
"""

from __future__ import annotations

import argparse
import copy
import time
from typing import Any

import torch
from pretrained import load
from records import write
from torch import Tensor, nn

import fipgeo


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).double().mean())


@torch.no_grad()
def magnitude(model: nn.Module, sparsity: float, inputs: Tensor | None = None) -> nn.Module:
    """The smallest weights of all layers set to zero; BatchNorm statistics re-estimated if inputs are given."""
    pruned = copy.deepcopy(model)
    weights = [p for p in pruned.parameters() if p.dim() > 1]
    flat = torch.cat([w.abs().flatten() for w in weights])
    threshold = flat.kthvalue(round(sparsity * len(flat))).values
    for w in weights:
        w[w.abs() <= threshold] = 0
    if inputs is not None:
        for m in pruned.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.reset_running_stats()
                m.momentum = None
        pruned.train()
        for part in inputs.split(250):
            pruned(part)
    return pruned.eval()


def zeros(model: nn.Module) -> float:
    """Exact zeros among the weights of convolutions and linear layers, as a share."""
    weights = [p for p in model.parameters() if p.dim() > 1]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


def run(name: str, levels: list[float], count: int, seed: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Records of one network at all levels."""
    model, inputs, x_test, y_test = load(name, count)
    normalised = any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    records: list[dict[str, Any]] = []

    def note(case: str, method: str, net: nn.Module, **more: Any) -> None:
        value = 100 * accuracy(net, x_test, y_test)
        base = {"case": case, "method": method, "figure": "test accuracy", "value": round(value, 2), "unit": "%"}
        records.append(base | {"seed": seed, "zeros": zeros(net)} | more)
        print(f"{case:<40} {method:<36} {value:6.2f} %  zeros {zeros(net):.4f}  {more}", flush=True)

    note(f"{name} dense", "dense", model)
    for level in levels:
        case = f"{name} {level:.0%}"
        note(case, "magnitude", magnitude(model, level))
        if normalised:
            note(case, "magnitude, statistics re-estimated", magnitude(model, level, inputs))
        wall, cpu = time.perf_counter(), time.process_time()
        path = fipgeo.sparsify(model, inputs, level, held_out=0.1, generator=seed, store="last", **options)
        method = ", ".join(["fipgeo", *(f"{key}={value}" for key, value in options.items())])
        spent = {"seconds": round(time.perf_counter() - wall, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
        end, sparse = path[-1], path[-1].apply_(copy.deepcopy(model))
        verdict = {"steps": end.step, "drift": round(end.drift, 4), "changed": end.changed, "upper": end.changed_upper}
        note(case, method, sparse, **spent, **verdict, outcome=path.outcome)
        write("sparsify", records)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a pretrained network, such as akamaster_cifar10_resnet20")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    parser.add_argument("--inputs", type=int, default=1000, help="unlabelled training inputs")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--score", help="what decides which weights become zero, instead of sparsify's own choice")
    parser.add_argument("--corrector", help="what brings the outputs back, instead of sparsify's own choice")
    args = parser.parse_args()
    options = {key: getattr(args, key) for key in ("score", "corrector") if getattr(args, key) is not None}
    write("sparsify", run(args.model, args.levels, args.inputs, args.seed, options))


if __name__ == "__main__":
    main()
