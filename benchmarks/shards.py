"""What components of shards come to beside what people use today, for `benchmarks.tangent`.

Images: the last block of a ResNet-20 that was pretrained on CIFAR-10, and a new head, learn 600 images (1,000 of GTSRB,
which has 43 classes) in n parts. Texts: the last layer of MiniLM and a new head learn 300 sentences. What stands before
is computed once.

Options were chosen by accuracy on training examples that no part holds (`--held-out`), those of images on EuroSAT with
1,000 training images, those of texts on SST-2 in 20 parts, seed 0, once for all splits: ridge and kappa of components,
rate and epochs of AdamW for the fine-tuned networks; what has a learned weight, a component or each of its tensors, on
held-out images of all three settings in 5 and 10 parts of other classes and on SST-2 in 5 parts. Accuracies are on
2,000 test images or 500 test sentences.
"""

from __future__ import annotations

import copy
import time
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks.pretrained import _network, folder
from benchmarks.texts import TEXTS, End, encoder, packed, sentences
from fipgeo.tangent import Pool, learned_weights

IMAGES = {"eurosat": "eurosat32", "gtsrb": "gtsrb32", "cifar10": "cifar10_train10k"}
SETTINGS = [*IMAGES, *TEXTS]
TRAINED = {"eurosat": 600, "gtsrb": 1000, "cifar10": 600} | dict.fromkeys(TEXTS, 300)
TESTED = dict.fromkeys(IMAGES, 2000) | dict.fromkeys(TEXTS, 500)
UNSEEN = dict.fromkeys(IMAGES, 1000) | dict.fromkeys(TEXTS, 300)
PUBLIC = dict.fromkeys(IMAGES, 200) | dict.fromkeys(TEXTS, 50)
"""Test examples; training examples that no part holds, for choices and for the attack; and others without labels."""

ROWS, PRODUCTS = 1200, 40
"""Largest dual system of a component, and how many products it gets where it is larger."""


class Options(NamedTuple):
    """What was chosen for a kind of data."""

    ridge: float
    kappa: float
    rate: float
    epochs: int
    batch: int
    by: str


CHOSEN = {
    "images": Options(ridge=1e-3, kappa=15.0, rate=3e-3, epochs=50, batch=32, by="tensor"),
    "texts": Options(ridge=1e-4, kappa=15.0, rate=5e-4, epochs=40, batch=8, by="component"),
}


class Data(NamedTuple):
    """The end of the network, and what its input is for examples of a setting."""

    net: nn.Module
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    x_unseen: Tensor
    y_unseen: Tensor
    x_public: Tensor
    options: Options


@cache
def loaded(setting: str, seed: int, held_out: bool = False) -> Data:
    """Training examples drawn with a seed, the test set or, for choices, the unseen training examples in its place."""
    made = (of_texts if setting in TEXTS else of_images)(setting, seed)
    return made._replace(x_test=made.x_unseen, y_test=made.y_unseen) if held_out else made


def drawn(setting: str, count: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places of the training examples, of those that no part holds, and of those without labels."""
    order, unseen = np.random.default_rng(seed).permutation(count), UNSEEN[setting]
    return order[: TRAINED[setting]], order[-unseen:], order[-unseen - PUBLIC[setting] : -unseen]


def head_of(width: int, classes: int, seed: int) -> nn.Linear:
    """A head with random weights: a component moves hidden layers only as far as they let the change be seen."""
    head = nn.Linear(width, classes)
    with torch.no_grad():
        weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(seed))
        head.weight.copy_(weight / width**0.5)
        head.bias.zero_()
    return head


def of_images(setting: str, seed: int) -> Data:
    """What the ResNet-20 makes of images before its last block."""
    options = CHOSEN["images"]
    model, _, norm = _network("akamaster_cifar10_resnet20")
    file: Any = np.load(folder() / "images" / f"{IMAGES[setting]}.npz")
    prefix = "train_" if "train_images" in file else ""
    images, labels = file[prefix + "images"], file[prefix + "labels"].astype(np.int64)
    test: Any = file if prefix else np.load(folder() / "images" / "cifar10_test.npz")
    key = "test_" if prefix else ""
    chosen = np.random.default_rng(0).permutation(len(test[key + "labels"]))[: TESTED[setting]]
    trunk = nn.Sequential(model.conv1, model.bn1, nn.ReLU(), model.layer1, model.layer2, model.layer3[:2])  # type: ignore
    head = head_of(64, int(labels.max()) + 1, seed)
    end = nn.Sequential(model.layer3[2], nn.AvgPool2d(8), nn.Flatten(), head).eval()  # type: ignore

    def hidden(images: Any) -> Tensor:
        x = torch.from_numpy(images).float() / 255
        mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in norm)
        with torch.no_grad():
            return torch.cat([trunk((part - mean) / std) for part in x.split(250)])

    first, rest, public = drawn(setting, len(labels), seed)
    y, y_unseen = torch.from_numpy(labels[first]), torch.from_numpy(labels[rest])
    y_test = torch.from_numpy(test[key + "labels"][chosen].astype(np.int64))
    x, x_unseen, x_public = hidden(images[first]), hidden(images[rest]), hidden(images[public])
    return Data(end, x, y, hidden(test[key + "images"][chosen]), y_test, x_unseen, y_unseen, x_public, options)


def of_texts(setting: str, seed: int) -> Data:
    """What MiniLM makes of sentences before its last layer."""
    options, one = CHOSEN["texts"], encoder()
    train, test = sentences(setting, "train"), sentences(setting, "test")
    end = End(one, 1, head_of(384, TEXTS[setting], seed)).eval()
    order = np.random.default_rng(0).permutation(len(test.texts))[: TESTED[setting]]

    def hidden(texts: list[str], places: np.ndarray) -> Tensor:
        return packed(one, [texts[i] for i in places], 5)

    first, rest, public = drawn(setting, len(train.texts), seed)
    x, x_unseen, x_public = (hidden(train.texts, places) for places in (first, rest, public))
    y, y_unseen = train.labels[first], train.labels[rest]
    return Data(end, x, y, hidden(test.texts, order), test.labels[order], x_unseen, y_unseen, x_public, options)


def group_of(y: Tensor, split: str, classes: int) -> Tensor:
    """The number of the part that every label's example belongs to."""
    kind, number = split.split("/")
    n = int(number)
    return torch.arange(len(y)) % n if kind == "data" else y * n // classes


def possible(setting: str, split: str) -> bool:
    """Whether a setting has as many classes as the split has parts."""
    kind, number = split.split("/")
    classes = TEXTS.get(setting, 43 if setting == "gtsrb" else 10)
    return kind == "data" or int(number) <= classes


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([net(part) for part in x.split(250)])


def component(data: Data, index: Tensor, name: str, penalty: Any = None) -> fipgeo.Component:
    """By the dual system where that is small, else by some products, which stop early."""
    model, o = fipgeo.TangentModel(data.net, copy=False), data.options
    examples = data.x[index], data.y[index]
    small = penalty is None and len(index) * data.net(data.x[:1]).shape[-1] <= ROWS
    how: dict[str, Any] = {"method": "dual"} if small else {"method": "cg", "max_iters": PRODUCTS, "penalty": penalty}
    fipgeo.fit_square_(model, examples, kappa=o.kappa, ridge=o.ridge, batch_size=64, **how)
    return fipgeo.Component.of(model, name)


def finetuned(data: Data, index: Tensor, seed: int) -> nn.Module:
    """The end of the network, trained by AdamW with a cosine schedule on cross-entropy."""
    net, generator, o = copy.deepcopy(data.net).requires_grad_(True), torch.Generator().manual_seed(seed), data.options
    optimizer = torch.optim.AdamW(net.parameters(), lr=o.rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, o.epochs * -(-len(index) // o.batch))
    for _ in range(o.epochs):
        for chosen in index[torch.randperm(len(index), generator=generator)].split(o.batch):
            optimizer.zero_grad()
            cross_entropy(net(data.x[chosen]), data.y[chosen]).backward()
            optimizer.step()
            schedule.step()
    return net.eval()


@cache
def together(setting: str, seed: int, held_out: bool) -> tuple[nn.Module, float]:
    """The network fine-tuned on all parts, and the CPU seconds that took."""
    data, begun = loaded(setting, seed, held_out), time.process_time()
    return finetuned(data, torch.arange(len(data.y)), seed), time.process_time() - begun


@cache
def whole(setting: str, seed: int, held_out: bool) -> nn.Module:
    """The tangent model of all parts."""
    data = loaded(setting, seed, held_out)
    return fipgeo.compose(data.net, [component(data, torch.arange(len(data.y)), "whole")])


def shards(case: str, seed: int, held_out: bool, peers: bool = True) -> list[dict[str, Any]]:
    """Accuracies of all ways to use the parts; what forgetting the last of them takes, and what of it can be seen.

    Without `peers` only what is made of the parts' own components.
    """
    setting, split = case.split("/", 1)
    data = loaded(setting, seed, held_out)
    group = group_of(data.y, split, data.net(data.x[:1]).shape[-1])
    parts = [torch.nonzero(group == i).flatten() for i in range(int(split.split("/")[1]))]
    begun = time.process_time()
    pool = Pool(data.net, [component(data, index, f"{i:02}") for i, index in enumerate(parts)])
    fitted = time.process_time() - begun
    for name, index in zip(pool.components, parts, strict=True):
        pool.measure((data.x[index], data.y[index]), name, by=data.options.by, kappa=data.options.kappa)
    weights, coarse = pool.weights(), [e.by_component() for e in pool.evidence.values()]
    nets = {
        "components, mean": pool.model(),
        "components, learned weights": pool.model(learned_weights(pool.components, coarse)),
    }
    if data.options.by == "tensor":
        nets["components, learned weights of tensors"] = pool.model(weights)
    scores = {name: outputs(net, data.x_test) for name, net in nets.items()}
    if peers:
        scores |= beside(data, parts, seed)
        scores["tangent model, all parts"] = outputs(whole(setting, seed, held_out), data.x_test)
        scores["fine-tuned, all parts"] = outputs(together(setting, seed, held_out)[0], data.x_test)
        if split.startswith("class"):
            scores["components with a drift penalty, sum"] = outputs(drifting(data, parts), data.x_test)
    found = [r | {"options": data.options._asdict()} for r in accuracies(scores, data.y_test, split)]
    tuned, took = together(setting, seed, held_out)
    return [*found, *forgetting(pool, data, parts[-1], tuned, {"joint": took, "components": fitted})]


def beside(data: Data, parts: list[Tensor], seed: int) -> dict[str, Tensor]:
    """Scores of networks that are fine-tuned on each part."""
    tuned = [finetuned(data, index, seed) for index in parts]
    mean, states = copy.deepcopy(data.net), [net.state_dict() for net in tuned]
    mean.load_state_dict({n: torch.stack([s[n].double() for s in states]).mean(0).to(t) for n, t in states[0].items()})
    members = torch.stack([outputs(net, data.x_test) for net in tuned])
    return {
        "fine-tuned, mean of weights": outputs(mean, data.x_test),
        "fine-tuned, mean of outputs": members.mean(0),
        "fine-tuned, mean of probabilities": members.softmax(-1).mean(0),
    }


def drifting(data: Data, parts: list[Tensor]) -> nn.Module:
    """The sum of components, each trained with a penalty for what it changes on inputs without labels.

    The penalty counts those inputs as the examples of the other parts, of which none are seen.
    """
    model, count = fipgeo.TangentModel(data.net, copy=False), len(data.y)
    metric = fipgeo.metric(data.net, data.x_public, geometry="logits", params=model.names)
    classes = data.net(data.x[:1]).shape[-1]

    def penalised(i: int, index: Tensor) -> fipgeo.Component:
        others = (count - len(index)) / len(index) / classes
        return component(data, index, f"{i:02}", penalty=others * metric.operator)

    return fipgeo.compose(data.net, [penalised(i, index) for i, index in enumerate(parts)], "sum")


def accuracies(scores: dict[str, Tensor], y: Tensor, split: str) -> list[dict[str, Any]]:
    """Per cent of the examples; for parts of classes also among the classes of the example's own part."""
    found = []
    for name, score in scores.items():
        figures = {"test_accuracy": score}
        if split.startswith("class"):
            classes = torch.arange(score.shape[-1])
            own = group_of(y, split, len(classes))[:, None] == group_of(classes, split, len(classes))
            figures["test_accuracy, task known"] = score.masked_fill(~own, -torch.inf)
        for figure, one in figures.items():
            value = 100 * float(one.argmax(1).eq(y).double().mean())
            found.append({"method": name, "figure": figure, "value": round(value, 2), "unit": "%"})
    return found


def forgetting(
    pool: Pool, data: Data, index: Tensor, tuned: nn.Module, seconds: dict[str, float]
) -> list[dict[str, Any]]:
    """Forgetting the last component: CPU time over retraining, the difference to never had, and the attack."""
    name = list(pool.components)[-1]
    alone = fipgeo.compose(data.net, [pool.components[name]])
    holds = pool.model(pool.weights())
    control = Pool(data.net, [c for c in pool.components.values() if c.name != name])
    for shard, evidence in pool.evidence.items():
        if shard != name:
            control.hear(evidence)
    begun = time.process_time()
    pool.forget(name)
    model = pool.model(pool.weights())
    took = time.process_time() - begun
    never = control.model(control.weights())
    gap = (outputs(model, data.x_test) - outputs(never, data.x_test)).abs().max()
    share = 100 * took / (seconds["joint"] * (len(pool) / (len(pool) + 1)))
    base = {"method": "forget one component", "seconds": took, "joint_seconds": seconds["joint"]}
    base |= {"components_seconds": seconds["components"]}
    found = [
        base | {"figure": "retraining", "value": round(share, 4), "unit": "%"},
        base | {"figure": "difference", "value": float(gap), "unit": "outputs"},
    ]
    nets = {
        "the component alone": alone,
        "fine-tuned, all parts": tuned,
        "components, learned weights": holds,
        "after forgetting": model,
        "never had it": never,
    }
    return found + [attack(net, data, index, name) for name, net in nets.items()]


def attack(net: nn.Module, data: Data, index: Tensor, name: str) -> dict[str, Any]:
    """How well the loss tells the forgotten shard's examples from unseen ones of the same classes.

    The unseen examples are training examples that no part holds, drawn as the shard's were.
    """
    same = torch.isin(data.y_unseen, data.y[index].unique())
    members = cross_entropy(outputs(net, data.x[index]), data.y[index], reduction="none")
    others = cross_entropy(outputs(net, data.x_unseen[same]), data.y_unseen[same], reduction="none")
    value, low, high = area(members, others)
    record = {"method": name, "figure": "membership", "value": value, "unit": "AUC", "interval": [low, high]}
    return record | {"members": len(members), "others": len(others)}


def area(members: Tensor, others: Tensor) -> tuple[float, float, float]:
    r"""The share of pairs in which a member has the smaller loss, ties counting half, and its 95 % interval.

    The variance is that of DeLong, DeLong and Clarke-Pearson (1988): with the shares of each example against all of
    the other kind, var(members' shares) / m + var(others' shares) / n.
    """
    a, b = members.double()[:, None], others.double()[None]
    wins = (a < b).double() + 0.5 * (a == b).double()
    value = float(wins.mean())
    spread = float(wins.mean(1).var() / len(members) + wins.mean(0).var() / len(others)) ** 0.5
    return value, value - 1.96 * spread, value + 1.96 * spread
