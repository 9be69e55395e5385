"""The backbones of `benchmarks.merging`, each with its tasks and its control.

    resnet20   a ResNet-20 for CIFAR-10, 64 features; six sets of images, the control is CIFAR-10 under its own head
    vit        a small ViT for CIFAR-10, 128 features; the same
    minilm     MiniLM without its embeddings, which stay, 384 features of 32 tokens; five sets of texts, the control is
               AG News under a head of the kind that all tasks have

Images: 2,000 of each task to tune on, 400 for validation, 1,000 of the test set. Texts: 1,000, 200 and 500; the control
gets 200 more for validation. All are drawn once. How MiniLM is had is told in `benchmarks.texts`. Where forms of a rule
are compared, spare examples stand in for the test's: of a task those of its training file that are in no other part, of
CIFAR-10 more of its test file.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.banks import Backbone, Control, Examples, Labelled, Learning, cosine, head
from benchmarks.pretrained import _network, folder
from benchmarks.texts import Encoder, Pooled, encoder, living, rows, sentences

RESNET, TRANSFORMER = "akamaster_cifar10_resnet20", "smmk47_cifar10_vit"
FILES = {
    "mnist": "mnist",
    "fashion": "fashion_mnist",
    "usps": "usps16",
    "gtsrb": "gtsrb32",
    "eurosat": "eurosat32",
    "omniglot": "omniglot28_small",
}
TRAIN, VALIDATION, TEST = 2000, 400, 1000
"""Images of each task: for the bank, for learning coefficients, and for the accuracy that is reported."""
TEXTS = {"sst2": "sst2", "subj": "subj", "cr": "cr", "ag_news": "ag_news", "imdb": "imdb_9k"}
TEXT_TRAIN, TEXT_VALIDATION, TEXT_TEST = 1000, 200, 500
KEPT = "ag_news"
"""The control of texts."""
SPARE, SPARE_CONTROL = 600, 1500
"""Spare examples of a task and of a control, at most."""


def images(network: str, name: str, spare: bool = False) -> Examples:
    """A task as a network wants its inputs, by a fixed draw; its test part may be of spare images."""
    _, _, norm = _network(network)
    parts = {split: _read(FILES[name], split) for split in ("train", "test")}
    draws = torch.Generator().manual_seed(0)

    def take(split: str, order: Tensor) -> Labelled:
        x, y = (torch.from_numpy(part[order.numpy()]) for part in parts[split])
        return _prepared(x, norm), y.long()

    train, validation, rest = _cut(len(parts["train"][1]), TRAIN, VALIDATION, draws)
    test = torch.randperm(len(parts["test"][1]), generator=draws)[:TEST]
    judge = take("train", rest[:SPARE]) if spare else take("test", test)
    return Examples(name, take("train", train), take("train", validation), judge)


def image_share(network: str, name: str, percent: int, seed: int) -> Labelled:
    """A share of the training file of a task, without the images on which choices are made."""
    x, y = _read(FILES[name], "train")
    chosen = _free(len(y), TRAIN, VALIDATION, percent, seed).numpy()
    return _prepared(torch.from_numpy(x[chosen]), _network(network)[2]), torch.from_numpy(y[chosen]).long()


def _cut(count: int, train: int, validation: int, draws: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Places of a file's examples for training, for validation and for neither."""
    order = torch.randperm(count, generator=draws)
    end = min(count - validation, train)
    return order[:end], order[end : end + validation], order[end + validation :]


def _free(count: int, train: int, validation: int, percent: int, seed: int) -> Tensor:
    """Places of a share of so many examples, none of them among those that `images` or `texts` hold for validation."""
    first, _, rest = _cut(count, train, validation, torch.Generator().manual_seed(0))
    free = torch.cat([first, rest])
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
    return free[order[: round(percent * count / 100)]]


def trunk(network: str, last: str) -> nn.Module:
    """A pretrained network without its last layer, in eval mode: images to features."""
    net, _, _ = _network(network)
    net.set_submodule(last, nn.Identity())
    return net.eval()


def own(network: str, last: str, spare: bool = False) -> Control:
    """CIFAR-10 under the head of the pretrained network; images that it was not trained on, for choices too."""
    net, data, norm = _network(network)
    layer = net.get_submodule(last)
    assert isinstance(layer, nn.Linear)
    weight, bias = layer.weight.detach(), layer.bias.detach()
    with np.load(folder() / "images" / "cifar10_test.npz") as archive:
        x, y = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"]).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    first, second, rest = order[:VALIDATION], order[VALIDATION : VALIDATION + TEST], order[VALIDATION + TEST :]
    second = rest[:SPARE_CONTROL] if spare else second
    validation, test = ((_prepared(x[i], norm), y[i]) for i in (first, second))
    return Control(data, lambda features: features @ weight.T + bias, validation, test)


def block(name: str) -> int | None:
    """The number of a residual block of the ResNet-20, counted from 0; None outside of them."""
    parts = name.split(".")
    return 3 * (int(parts[0][5:]) - 1) + int(parts[1]) if parts[0].startswith("layer") else None


def layer(name: str) -> int | None:
    """The number of a layer of the ViT; None outside of them."""
    return int(name.split(".")[2]) if name.startswith("transformer.layers.") else None


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


@cache
def _encoder() -> Encoder:
    """MiniLM, read once."""
    return encoder()


def minilm() -> nn.Module:
    """MiniLM and the mean over its tokens; its embeddings want no gradient."""
    net = Pooled(copy.deepcopy(_encoder().model)).eval()
    net.encoder.embeddings.requires_grad_(False)
    return net


def texts(name: str, spare: bool = False, further: int = 0, most: int = SPARE) -> Examples:
    """A task as MiniLM wants its inputs, by a fixed draw.

    Args:
        name: Of the task.
        spare: The test part is of spare texts.
        further: Texts for validation, more than there are of others.
        most: Spare texts, where they are the test part.
    """
    one, draws = _encoder(), torch.Generator().manual_seed(0)
    train, test = (sentences(TEXTS[name], split) for split in ("train", "test"))

    def take(part: Any, order: Tensor) -> Labelled:
        return rows(one, [part.texts[i] for i in order.tolist()], 0), part.labels[order]

    first, second, rest = _cut(len(train.texts), TEXT_TRAIN, TEXT_VALIDATION + further, draws)
    third = torch.randperm(len(test.texts), generator=draws)[:TEXT_TEST]
    judge = take(train, rest[:most]) if spare else take(test, third)
    return Examples(name, take(train, first), take(train, second), judge)


def text_share(name: str, percent: int, seed: int) -> Labelled:
    """A share of the training file of a task, without the texts on which choices are made."""
    whole = sentences(TEXTS[name], "train")
    chosen = _free(len(whole.texts), TEXT_TRAIN, TEXT_VALIDATION, percent, seed)
    return rows(_encoder(), [whole.texts[i] for i in chosen.tolist()], 0), whole.labels[chosen]


def topics(spare: bool = False) -> Control:
    """AG News under the head that its training texts make."""
    found = texts(KEPT, spare, TEXT_VALIDATION, SPARE_CONTROL)
    return Control(KEPT, cosine(head(minilm(), *found.train)), found.validation, found.test)


def _of_images(
    name: str, network: str, last: str, others: tuple[tuple[int, float], ...], depth: Callable[[str], int | None]
) -> Backbone:
    """A network for CIFAR-10 without its last layer."""
    return Backbone(
        name,
        network,
        partial(trunk, network, last),
        tuple(FILES),
        tuple(FILES),
        partial(images, network),
        partial(own, network, last),
        partial(image_share, network),
        epochs=6,
        rate=1e-3,
        batch=100,
        others=others,
        depth=depth,
    )


RESNET20 = _of_images("resnet20", RESNET, "linear", ((12, 3e-4), (12, 1e-4)), block)
VIT = _of_images("vit", TRANSFORMER, "mlp_head.1", ((6, 3e-4),), layer)
MINILM = Backbone(
    "minilm",
    "minilm",
    minilm,
    tuple(TEXTS),
    tuple(name for name in TEXTS if name != KEPT),
    texts,
    topics,
    text_share,
    mask=living,
    epochs=3,
    rate=5e-5,
    batch=32,
    others=((3, 2e-5), (3, 1e-4)),
    learning=Learning(steps=240),
)
BACKBONES = {one.name: one for one in (RESNET20, VIT, MINILM)}
"""By name. The learning rate of a bank was chosen from its own and the others'; `--cells bank` puts them side by side,
which is on record for the ResNet-20."""
