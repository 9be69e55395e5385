"""What people use to make a trained network sparse without labels: magnitude, distillation, gradual magnitude.

Every baseline gets the dense network and the same unlabelled inputs as fipgeo, hits the asked number of zeros exactly
over the weights of convolutions and linear layers together, and says what it spent: wall seconds, CPU seconds, and
model evaluations on one image (a forward pass counts one, a backward pass two, as in `PathPoint.cost`).

Those that train stretch their schedules over the time they are given (`Pace`): `budget_s` is the time that fipgeo took
for the same cell. They distil: the loss compares outputs with the dense network's, which are computed once. Where the
network has BatchNorm, minibatches are normalised by themselves while weights move, and the running statistics are
re-estimated at the end; dropout is off.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax

from fipgeo.model import OutputMap

NORMALISERS = nn.modules.batchnorm._BatchNorm
TEMPERATURE = 4.0
TAP_BYTES = 2**30
"""Hidden outputs of the dense network are kept in memory up to here, and computed for every minibatch beyond."""


@dataclass(frozen=True, eq=False)
class Task:
    """What every method is given.

    Attributes:
        model: The dense network, in eval mode.
        inputs: Unlabelled inputs `[N, ...]`.
        level: Share of zeros to reach among the counted weights.
        seed: Of everything random.
        pace: How long methods that train may take.
        rate: Learning rate (what it multiplies is the method's own).
    """

    model: nn.Module
    inputs: Tensor
    level: float
    seed: int = 0
    pace: Pace = field(default_factory=lambda: Pace(budget_s=60.0))
    rate: float = 1e-3

    @property
    def generator(self) -> torch.Generator:
        """A fresh stream."""
        return torch.Generator().manual_seed(self.seed)


@dataclass(eq=False)
class Pace:
    """How far a schedule is: by the clock of `budget_s` seconds, or by a number of steps, which repeats bit for bit.

    On one thread the clock is the CPU time of the process, so that a busy machine shortens no run; else wall time.
    """

    budget_s: float = math.inf
    steps: int | None = None

    def __iter__(self) -> Iterator[float]:
        """Progress in [0, 1) before each step, until the time or the steps are over."""
        begun, count = clock(), 0
        while (at := (clock() - begun) / self.budget_s if self.steps is None else count / self.steps) < 1:
            yield at
            count += 1


def clock() -> float:
    """Seconds by which budgets are counted."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True, eq=False)
class Found:
    """A sparse network and what it took.

    Attributes:
        model: The network, in eval mode.
        forwards: Model evaluations on one image.
        seconds: Wall time.
        cpu_seconds: CPU time of the process.
        more: Other figures for the record.
    """

    model: nn.Module
    forwards: float
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    more: dict[str, float | str | None] = field(default_factory=dict)


def timed(method: Callable[[Task], Found], task: Task) -> Found:
    """Run a method and note its time."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = method(task)
    return replace(found, seconds=time.perf_counter() - wall, cpu_seconds=time.process_time() - cpu)


def counted(model: nn.Module) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers (those inside attention included) by name."""
    found: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            found[f"{name}.weight".lstrip(".")] = module.weight
        elif isinstance(module, nn.MultiheadAttention):
            found[f"{name}.in_proj_weight".lstrip(".")] = module.in_proj_weight
    return {name: p for name, p in model.named_parameters() if name in found}


def goal(model: nn.Module, level: float) -> int:
    """How many zeros a level asks for."""
    return round(level * sum(w.numel() for w in counted(model).values()))


def zeros(model: nn.Module) -> int:
    """Exact zeros among the counted weights."""
    return sum(int((w == 0).sum()) for w in counted(model).values())


def masks(model: nn.Module, level: float) -> dict[str, Tensor]:
    """Which weights stay when the smallest of all counted weights together become zero, exactly `goal` of them."""
    weights = {name: w.detach() for name, w in counted(model).items()}
    flat = torch.cat([w.abs().flatten() for w in weights.values()])
    keep = torch.ones_like(flat, dtype=torch.bool)
    keep[flat.argsort(stable=True)[: goal(model, level)]] = False
    parts = keep.split([w.numel() for w in weights.values()])
    return {name: part.view(weights[name].shape) for part, name in zip(parts, weights, strict=True)}


@torch.no_grad()
def hold(model: nn.Module, keep: dict[str, Tensor]) -> None:
    """Set to zero what does not stay."""
    for name, w in counted(model).items():
        w.masked_fill_(~keep[name], 0)


@contextmanager
def batch_normalised(model: nn.Module, momentum: float | None = 0.1) -> Iterator[None]:
    """BatchNorm normalises by the minibatch and averages its running statistics (None: a plain mean); nothing else."""
    norms = [m for m in model.modules() if isinstance(m, NORMALISERS)]
    before = [m.momentum for m in norms]
    for m in norms:
        m.train()
        m.momentum = momentum
    try:
        yield
    finally:
        for m, old in zip(norms, before, strict=True):
            m.eval()
            m.momentum = old


def normalised(model: nn.Module) -> bool:
    """Whether there is a BatchNorm."""
    return any(isinstance(m, NORMALISERS) for m in model.modules())


@torch.no_grad()
def reestimate(model: nn.Module, inputs: Tensor, batch_size: int = 250) -> float:
    """Running statistics of BatchNorm as plain means over the inputs, in place; the model evaluations it took."""
    norms = [m for m in model.modules() if isinstance(m, NORMALISERS)]
    for m in norms:
        m.reset_running_stats()
    with batch_normalised(model, None):
        for part in inputs.split(batch_size) if norms else ():
            model(part)
    return float(len(inputs)) if norms else 0.0


@torch.no_grad()
def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    """Outputs `[N, C]`."""
    return torch.cat([model(part) for part in inputs.split(500)])


def magnitude(task: Task, *, statistics: bool = False) -> Found:
    """The smallest weights of all layers become zero; BatchNorm statistics are re-estimated if asked."""
    model = copy.deepcopy(task.model)
    hold(model, masks(model, task.level))
    return Found(model, reestimate(model, task.inputs) if statistics else 0.0)


class Distillation:
    """Distance of a student's outputs from the dense network's, on minibatches of the inputs.

    kind "mse" is the mean over the minibatch of |f - f_0|^2 over its mean on all inputs, logits centred; "kl" is
    KL(softmax(f_0 / 4) | softmax(f / 4)) times 16 (Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural
    Network, 2015). With taps, the outputs of the smallest modules with two weight matrices (residual blocks, attention,
    MLPs; of the layers where there are none) are compared too: `tap_weight` times the mean over taps of
    mean (h - h_0)^2 / var h_0.
    """

    def __init__(self, task: Task, *, kind: str = "mse", taps: bool = False, tap_weight: float = 2.0) -> None:
        self.kind, self.tap_weight, self.dense, self.inputs = kind, tap_weight, task.model, task.inputs
        self.names = hidden_modules(task.model) if taps else []
        self.forwards = float(len(task.inputs))
        with torch.no_grad():
            _, one = self.tapped(self.dense, task.inputs[:1])
            self.cached = sum(h.numel() * h.element_size() for h in one) * len(task.inputs) <= TAP_BYTES
            parts = [self.tapped(self.dense, part) for part in task.inputs.split(250)]
        self.reference = torch.cat([f for f, _ in parts])
        self.scale = float(centred(self.reference).square().sum(1).mean())
        self.hidden = [torch.cat(hs) for hs in zip(*(hs for _, hs in parts), strict=True)] if self.cached else []

    def tapped(self, model: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Outputs and hidden outputs."""
        modules, found = dict(model.named_modules()), []

        def note(_module: nn.Module, _inputs: object, out: Tensor | tuple[Tensor, ...]) -> None:
            found.append(out if isinstance(out, Tensor) else out[0])  # attention puts out its weights too

        hooks = [modules[n].register_forward_hook(note) for n in self.names]
        try:
            return model(x), found
        finally:
            for hook in hooks:
                hook.remove()

    def __call__(self, student: nn.Module, which: Tensor) -> Tensor:
        """The loss on the inputs at `which`; adds to `forwards` what it and its gradient take."""
        x, f0 = self.inputs[which], self.reference[which]
        f, hidden = self.tapped(student, x)
        self.forwards += 3.0 * len(x)
        if self.kind == "kl":
            p, q = log_softmax(f0 / TEMPERATURE, -1), log_softmax(f / TEMPERATURE, -1)
            loss = TEMPERATURE**2 * kl_div(q, p, reduction="batchmean", log_target=True)
        else:
            loss = (centred(f) - centred(f0)).square().sum(1).mean() / self.scale
        if not self.names:
            return loss
        if self.cached:
            targets = [h0[which] for h0 in self.hidden]
        else:
            with torch.no_grad():
                targets = self.tapped(self.dense, x)[1]
            self.forwards += len(x)
        pairs = zip(hidden, targets, strict=True)
        parts = [(h - h0).square().mean() / h0.var(correction=0).clamp_min(1e-12) for h, h0 in pairs]
        return loss + self.tap_weight * sum(parts, torch.zeros(())) / len(parts)


def hidden_modules(model: nn.Module) -> list[str]:
    """The smallest modules with two weight matrices; in a plain chain, every layer with weights but the last."""
    return OutputMap(model).blocks() or [name.rpartition(".")[0] for name in counted(model)][:-1]


def centred(f: Tensor) -> Tensor:
    """Logits without their mean, which no prediction depends on."""
    return f - f.mean(-1, keepdim=True)


GROWTH = 0.7
"""Share of the time in which zeros are added by the gradual baselines."""


def train(
    task: Task, model: nn.Module, optimizer: str, distil: Distillation, grow: bool = False, batch_size: int = 64
) -> Found:
    """Distil into `model`, in place, for as long as the pace allows; its zeros stay.

    SGD has momentum 0.9. The learning rate decays along a cosine. With `grow`, the share of zeros follows the cubic
    schedule s (1 - (1 - t / 0.7)^3) up to 70 % of the time, zeros chosen anew by magnitude at a hundred equidistant
    moments, and the learning rate decays afterwards only.
    """
    params = list(model.parameters())
    descent: torch.optim.Optimizer = torch.optim.Adam(params, lr=task.rate)
    if optimizer == "sgd":
        descent = torch.optim.SGD(params, lr=task.rate, momentum=0.9)
    keep, last = {name: w.detach() != 0 for name, w in counted(model).items()}, -1
    random = task.generator
    with batch_normalised(model), torch.enable_grad():
        for at in task.pace:
            if grow and (moment := min(int(100 * at / GROWTH), 100)) > last:
                keep, last = masks(model, task.level * (1 - (1 - moment / 100) ** 3)), moment
                hold(model, keep)
            decay = max(at - GROWTH, 0.0) / (1 - GROWTH) if grow else at
            descent.param_groups[0]["lr"] = task.rate * 0.5 * (1 + math.cos(math.pi * decay))
            descent.zero_grad()
            distil(model, torch.randperm(len(task.inputs), generator=random)[:batch_size]).backward()
            descent.step()
            hold(model, keep)
    if grow:  # the last moment may have been missed
        hold(model, masks(model, task.level))
    return Found(model.eval(), distil.forwards + reestimate(model, task.inputs))


def distilled(task: Task, *, optimizer: str, kind: str = "mse", taps: bool = False) -> Found:
    """One-shot magnitude, then distillation with the zeros held."""
    model = copy.deepcopy(task.model)
    hold(model, masks(model, task.level))
    return train(task, model, optimizer, Distillation(task, kind=kind, taps=taps))


def gradual(task: Task, *, optimizer: str = "adam", kind: str = "mse", taps: bool = False) -> Found:
    """Gradual magnitude with distillation (Zhu & Gupta, To Prune, or Not to Prune, 2017), over all layers together."""
    return train(task, copy.deepcopy(task.model), optimizer, Distillation(task, kind=kind, taps=taps), grow=True)
