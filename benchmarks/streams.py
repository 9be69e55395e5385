"""Sequences of tasks for `benchmarks.learn`: data sets, and a network that knows the first of them.

    mnist_fashion      digits, then clothes: one head of 20 outputs, a network trained on the digits (225,000 weights)
    split_cifar10      five pairs of classes: the head grows, a ResNet-8 trained on the first pair
    eurosat_gtsrb      CIFAR-10, then satellite images, then traffic signs: the head grows, a pretrained ResNet-8
    split_cifar10_vit  the same with a ViT that was pretrained on all ten classes, its head cut to the first pair
    texts              films liked or not, sentences with an opinion or not, products liked or not, topics of news: a
                       head for each, MiniLM trained on the first (`benchmarks.texts` says what it needs)

Networks that are trained here are trained once for each seed, without the last tenth of their data, and kept in
benchmarks/.cache. That tenth of every task is what options of methods are chosen on.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks.pretrained import MLP_NORM, _network, folder
from benchmarks.texts import Answers, Headed, encoder, living, rows, sentences

CACHE = Path(__file__).parent / ".cache"
CIFAR_NORM = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)
HELD_OUT = 0.1
"""The last part of each task's training data, on which options are chosen; networks are not started on it."""


MIRRORED = fipgeo.memory.Affine(flip=True)


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled images (or other inputs) of one task; labels are indices of outputs of the common head.

    Attributes:
        mask: Which positions of inputs count; None for all.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    mask: Callable[[Tensor], Tensor] | None = None

    @property
    def outputs(self) -> int:
        """How many outputs a head needs for it."""
        return int(max(self.y.max(), self.y_test.max())) + 1

    def for_tuning(self) -> Task:
        """The same task with its held-out training data in place of the test data."""
        cut = len(self.x) - max(round(HELD_OUT * len(self.x)), 1)
        return replace(self, x=self.x[:cut], y=self.y[:cut], x_test=self.x[cut:], y_test=self.y[cut:])


@dataclass(frozen=True, eq=False)
class Stream:
    """Tasks in order, the first of which the network knows.

    Attributes:
        start: The network, in eval mode.
        tasks: All tasks.
        head: Name of the layer that grows.
        passes: Passes over the data of each new task, at most.
        batch: Examples in a minibatch, and as many of the memory at most.
        kept: Inputs kept of each task (see `per_class`).
        per_class: Whether `kept` counts inputs of each class.
        optimizer: "sgd" or "adamw", for the baselines.
        transform: How its images may be changed for views of them.
    """

    start: nn.Module
    tasks: list[Task]
    head: str
    passes: float
    batch: int = 100
    kept: int = 50
    per_class: bool = True
    optimizer: str = "sgd"
    transform: fipgeo.memory.Affine = MIRRORED

    def steps(self, task: Task) -> int:
        """Minibatches that a task may take."""
        return max(int(self.passes * len(task.x) / self.batch), 1)

    def kept_of(self, task: Task) -> int:
        """How many inputs are kept of a task."""
        return self.kept * (len(task.y.unique()) if self.per_class else 1)


def load(name: str, seed: int) -> Stream:
    """The sequence of a setting, its network made with a seed."""
    return SETTINGS[name](seed)


def mnist_net() -> nn.Module:
    """Two convolutions (32 and 64 channels) and two dense layers (128, 20 outputs), 225,172 weights."""
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(32, 64, 3), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(1600, 128), nn.ReLU(), nn.Linear(128, 20)),
    )


def _mnist_fashion(seed: int) -> Stream:
    tasks = [_task(name, name, MLP_NORM, shift=10 * place) for place, name in enumerate(("mnist", "fashion_mnist"))]
    start = started("mnist_fashion", mnist_net(), tasks[0], seed, epochs=4)
    return Stream(start, tasks, head="9", passes=6.5, per_class=False, transform=fipgeo.memory.Affine())


def _split_cifar10(seed: int) -> Stream:
    tasks = _pairs(CIFAR_NORM)
    kind: Any = type(_network("kd_cifar10_resnet8")[0])
    net = kind(8, "B", classes=2)
    return Stream(started("split_cifar10", net, tasks[0], seed, epochs=30), tasks, head="fc", passes=15)


def _split_cifar10_vit(seed: int) -> Stream:
    del seed
    model, _, norm = _network("smmk47_cifar10_vit")
    model.mlp_head[1] = _cut(model.mlp_head[1], 2)  # type: ignore[operator, index]
    return Stream(model, _pairs(norm), head="mlp_head.1", passes=10, optimizer="adamw")


def _eurosat_gtsrb(seed: int) -> Stream:
    del seed
    model, _, norm = _network("kd_cifar10_resnet8")
    first = _task("cifar10", ("cifar10_train10k", "cifar10_test"), norm)
    tasks = [first, _task("eurosat", "eurosat32", norm, shift=10), _task("gtsrb", "gtsrb32", norm, shift=20)]
    return Stream(model.to(memory_format=torch.channels_last), tasks, head="linear", passes=10)  # type: ignore[call-overload]


def _texts(seed: int) -> Stream:
    one, names = encoder(), ("sst2", "subj", "cr", "ag_news")
    tasks, first = [], 0
    for place, name in enumerate(names):
        train, test = (sentences(name, split) for split in ("train", "test"))
        x, x_test = (rows(one, part.texts, place) for part in (train, test))
        tasks.append(Task(name, x, first + train.labels, x_test, first + test.labels, living))
        first = tasks[-1].outputs
    owners = [place for place, task in enumerate(tasks) for _ in task.y.unique()]
    model = Answers(one, owners, tasks[0].outputs)
    model.encoder.embeddings.requires_grad_(False)
    start = started("texts", model, tasks[0], seed, epochs=2, batch=50, rate=1e-4, fresh=model.head)
    return Stream(start, tasks, head="head", passes=2, batch=50, kept=100, per_class=False, optimizer="adamw")


SETTINGS: dict[str, Callable[[int], Stream]] = {
    "mnist_fashion": _mnist_fashion,
    "split_cifar10": _split_cifar10,
    "eurosat_gtsrb": _eurosat_gtsrb,
    "split_cifar10_vit": _split_cifar10_vit,
    "texts": _texts,
}


def _cut(layer: nn.Linear, outputs: int) -> nn.Linear:
    """The first outputs of a linear layer."""
    small = nn.Linear(layer.in_features, outputs)
    with torch.no_grad():
        small.weight.copy_(layer.weight[:outputs])
        small.bias.copy_(layer.bias[:outputs])
    return small


def _pairs(norm: tuple[Any, Any]) -> list[Task]:
    """CIFAR-10 in five pairs of classes, in the order of their numbers."""
    whole = _task("cifar10", ("cifar10_train10k", "cifar10_test"), norm)

    def part(first: int) -> Task:
        train, test = whole.y // 2 == first // 2, whole.y_test // 2 == first // 2
        name = f"classes {first}, {first + 1}"
        return Task(name, whole.x[train], whole.y[train], whole.x_test[test], whole.y_test[test])

    return [part(first) for first in range(0, 10, 2)]


def _task(name: str, files: str | tuple[str, str], norm: tuple[Any, Any], shift: int = 0) -> Task:
    train, test = (files, files) if isinstance(files, str) else files
    return Task(name, *_read(train, "train", norm, shift), *_read(test, "test", norm, shift))


def _read(file: str, split: str, norm: tuple[Any, Any], shift: int) -> tuple[Tensor, Tensor]:
    with np.load(folder() / "images" / f"{file}.npz") as archive:
        keys = ("images", "labels") if "images" in archive else (f"{split}_images", f"{split}_labels")
        images, labels = (torch.from_numpy(archive[key]) for key in keys)
    x = images[:, None] if images.dim() == 3 else images
    x = x.float().div_(255)
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in norm)
    return x.sub_(mean).div_(std).contiguous(memory_format=torch.channels_last), labels.long() + shift


def started(
    name: str,
    model: nn.Module,
    task: Task,
    seed: int,
    epochs: int,
    *,
    batch: int = 100,
    rate: float = 1e-3,
    fresh: nn.Module | None = None,
) -> nn.Module:
    """A network trained with Adam (its rate decaying along a cosine) on a task, or read where that was done before.

    Minibatches are mirrored at random where there are colours; BatchNorm and dropout are in train mode here and nowhere
    else. `fresh` is the part that is drawn at random first, None for the whole.
    """
    path = CACHE / f"{name}-seed{seed}-epochs{epochs}.safetensors"
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if path.exists():
        model.load_state_dict(load_file(path))
        return model.eval()
    random, task = torch.Generator().manual_seed(seed), task.for_tuning()
    _initialise(fresh or model, random)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(task.x) // batch))
    model.train()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # for dropout
        for _ in range(epochs):
            for part in torch.randperm(len(task.x), generator=random).split(batch)[: len(task.x) // batch]:
                x = task.x[part]
                if x.dim() == 4 and x.shape[1] == 3:
                    flip = torch.rand(len(x), generator=random) < 0.5
                    x = torch.where(flip.view(-1, 1, 1, 1), x.flip(3), x)
                optimizer.zero_grad()
                cross_entropy(model(x), task.y[part]).backward()
                optimizer.step()
                schedule.step()
    CACHE.mkdir(exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, draft)
    os.replace(draft, path)
    return model.eval()


@torch.no_grad()
def _initialise(model: nn.Module, random: torch.Generator) -> None:
    """He's normal weights and no biases, from a stream of their own; one-dimensional scales stay at one."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan = module.weight[0].numel()
            module.weight.copy_(torch.randn(module.weight.shape, generator=random) * (2 / fan) ** 0.5)
            if module.bias is not None:
                module.bias.zero_()


def grown(model: nn.Module, head: str, outputs: int) -> nn.Module:
    """The network with as many outputs as the tasks up to now need; new ones start at logit 0; readouts grow alone."""
    if isinstance(model, fipgeo.memory.Readout | Headed):
        return model
    layer = model.get_submodule(head)
    assert isinstance(layer, nn.Linear)
    if layer.out_features >= outputs:
        return model
    return fipgeo.grow_head(model, outputs, name=head)
