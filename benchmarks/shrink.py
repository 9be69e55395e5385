"""How much faster a network gets when zeros are taken out of it, and what that costs in accuracy.

    python -m benchmarks.shrink kd_cifar10_resnet20 --inputs 1000
    python -m benchmarks.shrink kd_cifar10_resnet20 --inputs 10000 --final-steps 1200
    python -m benchmarks.shrink akamaster_cifar10_resnet20 --which all

Half of the channels that one layer makes alone (`--which inner`: inside residual blocks, and in a stem that no skip
reads as it is), or of all that can go (`--which all`), become zero along a functionally invariant path on unlabelled
training images; then they are taken out. Reported are the accuracy on all test images of the smaller network, and how
many times faster it is: the ratio of median times over repetitions in which both networks take turns, in wall-clock
time and in CPU time of this process. Beside it the same ratio for as many zeros that lie anywhere, which dense kernels
multiply as they do any number. Test labels are used for the figures.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fipgeo
from benchmarks.pretrained import load
from benchmarks.records import write
from fipgeo.paths.objectives.patterns import Groups
from fipgeo.shrink import ChannelGroups, shrink


def chosen_groups(model: nn.Module, x: Tensor, which: str) -> ChannelGroups:
    """The removable channels; with "inner" those only that one layer makes: in blocks, and in a stem without a skip."""
    groups = fipgeo.channel_groups(model, x[:2])
    if which == "inner":
        inner = [f for f in groups.families if " + " not in f.name]
        kept = torch.zeros(len(groups), dtype=torch.bool)
        for family in inner:
            kept[family.first : family.first + family.size] = True
        ids = torch.where(kept[groups.ids.clamp_min(0)], groups.ids, -1)
        groups = ChannelGroups(ids, groups.columns, groups.names, tuple(inner), groups.barriers)
    return groups


def without_channels(
    model: nn.Module, x: Tensor, groups: ChannelGroups, share: float, options: argparse.Namespace
) -> tuple[nn.Module, fipgeo.PathResult]:
    """A copy in which a share of the weights of the channels of every layer is zero, and the path that led there."""
    space = fipgeo.WeightSpace.of(model)
    made = {name for name, where in space.slices().items() if (groups.ids[where] >= 0).any()}
    objective = fipgeo.Sparsity(
        share,
        exclude=lambda name, tensor: tensor.dim() > 1 and name not in made,
        pattern=Groups(groups.ids),
        allocation=options.allocation,
    )
    method = fipgeo.Method(
        control=fipgeo.StepControl(initial=0.2, smallest=0.1, largest=0.25, tolerance=0.1),
        corrector=fipgeo.FirstOrder(steps=options.steps, final_steps=options.final_steps),
        damping=None,
        store="last",
    )
    field = fipgeo.MetricField(model, x, "logits")
    path = fipgeo.walk(field, objective, method, held_out=0.1, generator=options.seed)
    return path[-1].apply_(copy.deepcopy(model)), path


def unstructured(model: nn.Module, share: float, seed: int) -> nn.Module:
    """A copy with zeros at random places."""
    out, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in out.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand(p.shape, generator=generator) >= share)
    return out


@torch.inference_mode()
def speed_up(
    dense: nn.Module, other: nn.Module, x: Tensor, clock: Callable[[], float], repeats: int = 15
) -> tuple[float, float]:
    """Median time of the first over that of the second, and the second in seconds; they take turns."""
    times: list[list[float]] = [[], []]
    for repeat in range(repeats + 2):
        for kind, net in enumerate((dense, other)):
            start = clock()
            net(x)
            if repeat >= 2:  # the first two warm up
                times[kind].append(clock() - start)
    first, second = (statistics.median(t) for t in times)
    return first / second, second


@torch.inference_mode()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Right answers in percent."""
    return 100 * float(torch.cat([model(part).argmax(1) for part in x.split(500)]).eq(y).double().mean())


def size(model: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in model.parameters())


def channels(model: nn.Module, groups: ChannelGroups) -> int:
    """How many channels of the groups are left, by the rows that make them."""
    layers = dict(model.named_modules())
    return sum(len(next(layers[name.split(" + ")[0]].parameters())) for name in (f.name for f in groups.families))


def run(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Records of one network."""
    model, x, x_test, y_test = load(name, options.inputs)
    timed = x_test[: options.batch].contiguous(memory_format=torch.channels_last)
    groups = chosen_groups(model, x, options.which)
    case = f"{name}/channels={options.channels}/inputs={options.inputs}"
    method = f"fipgeo, {options.which} channels, {options.allocation}, {options.final_steps} last steps"
    start, cpu = time.perf_counter(), time.process_time()
    sparse, path = without_channels(model, x, groups, options.channels, options)
    spent = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    small = shrink(sparse, x[:2])
    spent |= {"threads": torch.get_num_threads(), "batch": options.batch, "weights": size(small)}
    spent |= {"dense_weights": size(model), "channels": channels(small, groups), "of": channels(model, groups)}
    records = []

    def note(method: str, figure: str, value: float, unit: str, **more: Any) -> None:
        base = {"case": case, "method": method, "figure": figure, "value": round(value, 3), "unit": unit}
        records.append(base | {"seed": options.seed} | more)
        print(f"{case}  {method}: {figure} {value:.2f} {unit} {more}", flush=True)

    note("dense", "test_accuracy", accuracy(model, x_test, y_test), "%", weights=size(model))
    note(method, "test_accuracy", accuracy(small, x_test, y_test), "%", **spent, outcome=path.outcome)
    anywhere = f"{options.channels:.0%} of all weights zero at random places"
    for label, net in ((method, small), (anywhere, unstructured(model, options.channels, options.seed))):
        for figure, clock in (("speed_up", time.perf_counter), ("speed_up_cpu_time", time.process_time)):
            ratio, seconds = speed_up(model, net, timed, clock)
            shown = {"seconds": round(seconds, 4), "threads": torch.get_num_threads(), "batch": options.batch}
            note(label, figure, ratio, "times", **shown)
    if not options.dry:
        write("shrink", records)
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="name of a pretrained network, such as kd_cifar10_resnet20")
    parser.add_argument("--channels", type=float, default=0.5, help="share of the channels to remove")
    parser.add_argument("--which", choices=("inner", "all"), default="inner")
    parser.add_argument("--allocation", choices=("uniform", "global"), default="uniform")
    parser.add_argument("--inputs", type=int, default=1000, help="unlabelled training inputs")
    parser.add_argument("--steps", type=int, default=30, help="minibatches after each step of the path")
    parser.add_argument("--final-steps", type=int, default=600, help="minibatches at its end")
    parser.add_argument("--batch", type=int, default=256, help="images in a batch when times are taken")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dry", action="store_true", help="write no records")
    run(parser.parse_args().model, parser.parse_args())


if __name__ == "__main__":
    main()
