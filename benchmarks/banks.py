"""Banks of task vectors: what a backbone is, and how its trunk is fine-tuned on each of its tasks.

A task's head is made once of labelled examples and never trained: the cosines of features with the mean feature of each
class in the pretrained network, times 16. Fine-tuning moves the trunk under that head (AdamW, decaying along a cosine;
always in eval mode, so that BatchNorm keeps the statistics of the pretrained network and nothing is dropped), and what
it adds is the task vector. Vectors are kept in benchmarks/.cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from benchmarks.streams import CACHE
from fipgeo import TaskVector

Labelled = tuple[Tensor, Tensor]
SHARPNESS = 16.0
RATE = 1e-3
"""The learning rate that names of files do not mention."""


@dataclass(frozen=True, eq=False)
class Examples:
    """Labelled examples of a task in three disjoint parts; those for the test are of the test set."""

    name: str
    train: Labelled
    validation: Labelled
    test: Labelled

    def shots(self, count: int, seed: int) -> Labelled:
        """`count` examples of each class from the training part."""
        x, y = self.train
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[y[order] == label][:count] for label in y.unique().tolist()])
        return x[chosen], y[chosen]


class Control(NamedTuple):
    """What a pretrained network is good at already, under a head of its own.

    Attributes:
        name: Of the task, which may be one of the bank.
        top: Features -> scores.
        validation: For learning coefficients and for every choice.
        test: For the accuracy that is reported.
    """

    name: str
    top: Callable[[Tensor], Tensor]
    validation: Labelled
    test: Labelled


class Learning(NamedTuple):
    """How published rules learn the coefficients of all tasks at once; the defaults are as published.

    Attributes:
        adamw: Learning rate of AdamW, with labels.
        entropy: That of AdaMerging.
        steps: Of AdaMerging.
    """

    adamw: float = 1e-3
    entropy: float = 1e-3
    steps: int = 500


@dataclass(frozen=True, eq=False)
class Backbone:
    """A pretrained network, the tasks that its trunk is tuned on, and one that it is good at already.

    Attributes:
        name: Such as "vit".
        file: What its vectors are called in the cache.
        trunk: Makes it anew in eval mode, inputs to features; parameters that want no gradient are not tuned.
        tasks: Names.
        forgotten: Those that are to be forgotten, by vectors of these alone.
        examples: Those of a task, and whether spare ones stand in for the test's.
        control: What is to be kept then, and the same.
        share: A task, per cent of its training file and a seed -> as many examples, none of them for validation.
        epochs: Of fine-tuning.
        rate: Its learning rate.
        batch: Examples of a step of it.
        others: Epochs and rates of banks that this one was chosen from, beside its own.
        depth: Name of a tensor -> number of its layer; None for the first number in the name.
        mask: Inputs -> which tokens are no padding; None where there are none.
        learning: How coefficients of all tasks are learned by others' rules.
    """

    name: str
    file: str
    trunk: Callable[[], nn.Module]
    tasks: tuple[str, ...]
    forgotten: tuple[str, ...]
    examples: Callable[..., Examples]
    control: Callable[..., Control]
    share: Callable[[str, int, int], Labelled]
    epochs: int
    rate: float
    batch: int
    others: tuple[tuple[int, float], ...]
    depth: Callable[[str], int | None] | None = None
    mask: Callable[[Tensor], Tensor] | None = None
    learning: Learning = Learning()


def head(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean features of the classes, each of length 1, `[classes, width]`."""
    found = features(net, x)
    return normalize(torch.stack([normalize(found[y == label], dim=1).mean(0) for label in y.unique()]), dim=1)


def cosine(classes: Tensor) -> Callable[[Tensor], Tensor]:
    """Features -> the scores of a task under its head."""
    return lambda features: SHARPNESS * normalize(features, dim=1) @ classes.T


def scores(classes: Tensor) -> Any:
    """(network, batch) -> the scores of a task under its head."""
    top = cosine(classes)
    return lambda net, batch: top(net(batch[0]))


@torch.no_grad()
def features(net: nn.Module, x: Tensor) -> Tensor:
    """What the trunk makes of inputs."""
    return torch.cat([net(part) for part in x.split(250)])


def accuracy(net: nn.Module, classes: Tensor, data: Labelled) -> float:
    """Share of examples whose best score is their label's."""
    return float((features(net, data[0]) @ classes.T).argmax(1).eq(data[1]).double().mean())


def bank(
    backbone: Backbone, tasks: Sequence[Examples], epochs: int | None = None, rate: float | None = None
) -> dict[str, TaskVector]:
    """The task vectors, made or read; epochs and learning rate are the backbone's unless told."""
    epochs, rate = backbone.epochs if epochs is None else epochs, backbone.rate if rate is None else rate
    return {task.name: _vector(backbone, task, epochs, rate) for task in tasks}


def _vector(backbone: Backbone, task: Examples, epochs: int, rate: float) -> TaskVector:
    other = "" if rate == RATE else f"-rate{rate}"
    path = CACHE / f"bank-{backbone.file}-{task.name}-epochs{epochs}{other}.safetensors"
    if path.exists():
        return TaskVector.load(path)
    base, net, random = backbone.trunk(), backbone.trunk(), torch.Generator().manual_seed(0)
    (x, y), batch = task.train, backbone.batch
    forward = scores(head(base, x, y))
    tuned = {name: p for name, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(tuned.values(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // batch))
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=random).split(batch)[: len(x) // batch]:
            optimizer.zero_grad()
            cross_entropy(forward(net, (x[part],)), y[part]).backward()
            optimizer.step()
            schedule.step()
    CACHE.mkdir(exist_ok=True)
    found = TaskVector.between(base, net, lambda name, _: name in tuned)
    found.save(path, overwrite=True)
    return found
