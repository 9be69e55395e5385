"""A bank of task vectors of a CIFAR ResNet-20, made from image sets, for `benchmarks.atlas`.

The network is the trunk of `akamaster_cifar10_resnet20`. A task's head is made once of labelled images and never
trained: the cosines of features with the mean feature of each class in the pretrained network, times 16. Fine-tuning
moves the trunk under that head (AdamW, 1e-3, decaying along a cosine; BatchNorm by the statistics of the pretrained
network), and what it adds is the task vector. Vectors are kept in benchmarks/.cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, normalize

from benchmarks.pretrained import _network, folder
from benchmarks.streams import CACHE
from fipgeo import TaskVector

FILES = {
    "mnist": "mnist",
    "fashion": "fashion_mnist",
    "usps": "usps16",
    "gtsrb": "gtsrb32",
    "eurosat": "eurosat32",
    "omniglot": "omniglot28_small",
}
BACKBONE = "akamaster_cifar10_resnet20"
TRAIN, VALIDATION, TEST = 2000, 400, 1000
"""Images of each task: for the bank, for learning coefficients, and for the accuracy that is reported."""
SHARPNESS = 16.0
RATE = 1e-3


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images of a task in three disjoint parts; those for the test are of the test set."""

    name: str
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]

    def shots(self, count: int, seed: int) -> tuple[Tensor, Tensor]:
        """`count` images of each class from the training part."""
        x, y = self.train
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[y[order] == label][:count] for label in y.unique().tolist()])
        return x[chosen], y[chosen]


def trunk() -> nn.Module:
    """The pretrained network without its last layer, in eval mode: images to 64 features."""
    net, _, _ = _network(BACKBONE)
    net.linear = nn.Identity()
    return net.eval()


def images(name: str) -> Images:
    """A task, by a fixed draw."""
    _, _, norm = _network(BACKBONE)
    parts = {split: _read(FILES[name], split) for split in ("train", "test")}
    draws = torch.Generator().manual_seed(0)

    def take(split: str, order: Tensor) -> tuple[Tensor, Tensor]:
        x, y = (torch.from_numpy(part[order.numpy()]) for part in parts[split])
        return _prepared(x, norm), y.long()

    first = torch.randperm(len(parts["train"][1]), generator=draws)
    test = torch.randperm(len(parts["test"][1]), generator=draws)[:TEST]
    end = min(len(first) - VALIDATION, TRAIN)
    return Images(name, take("train", first[:end]), take("train", first[end : end + VALIDATION]), take("test", test))


def head(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean features of the classes, each of length 1, `[classes, 64]`."""
    found = features(net, x)
    return normalize(torch.stack([normalize(found[y == label], dim=1).mean(0) for label in y.unique()]), dim=1)


def scores(classes: Tensor) -> Any:
    """(network, batch) -> the scores of a task under its head."""
    return lambda net, batch: SHARPNESS * normalize(net(batch[0]), dim=1) @ classes.T


@torch.no_grad()
def features(net: nn.Module, x: Tensor) -> Tensor:
    """What the trunk makes of images."""
    return torch.cat([net(part) for part in x.split(250)])


def accuracy(net: nn.Module, classes: Tensor, data: tuple[Tensor, Tensor]) -> float:
    """Share of images whose best score is their label's."""
    return float((features(net, data[0]) @ classes.T).argmax(1).eq(data[1]).double().mean())


def bank(tasks: list[Images], epochs: int = 6, batch: int = 100, rate: float = RATE) -> dict[str, TaskVector]:
    """The task vectors, made or read."""
    return {task.name: _vector(task, epochs, batch, rate) for task in tasks}


def _vector(task: Images, epochs: int, batch: int, rate: float) -> TaskVector:
    other = "" if rate == RATE else f"-rate{rate}"
    path = CACHE / f"bank-{BACKBONE}-{task.name}-epochs{epochs}{other}.safetensors"
    if path.exists():
        return TaskVector.load(path)
    base, net, random = trunk(), trunk(), torch.Generator().manual_seed(0)
    x, y = task.train
    forward = scores(head(base, x, y))
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * (len(x) // batch))
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=random).split(batch)[: len(x) // batch]:
            optimizer.zero_grad()
            cross_entropy(forward(net, (x[part],)), y[part]).backward()
            optimizer.step()
            schedule.step()
    CACHE.mkdir(exist_ok=True)
    found = TaskVector.between(base, net)
    found.save(path, overwrite=True)
    return found


def _read(file: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels; Omniglot, whose file has no splits, is cut: 15 drawings of each character to learn from."""
    with np.load(folder() / "images" / f"{file}.npz") as archive:
        if f"{split}_images" in archive:
            return archive[f"{split}_images"], archive[f"{split}_labels"].astype(np.int64)
        pictures, labels = archive["images"], archive["labels"].astype(np.int64)
    place = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        place[labels == label] = np.arange((labels == label).sum())
    chosen = place < 15 if split == "train" else place >= 15
    return pictures[chosen], labels[chosen]


def _prepared(x: Tensor, norm: Any) -> Tensor:
    """Colour images of 32 x 32 as the network wants them."""
    x = x.float().div(255)
    x = x[:, None].expand(-1, 3, -1, -1) if x.dim() == 3 else x
    mean, std = (torch.tensor(part).view(1, -1, 1, 1) for part in norm)
    return (interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) - mean) / std
