"""Ways to make one network of a bank of task vectors, each by its own rule, for `benchmarks.merging`.

Choices are made on validation examples, which no vector was made of; scales on a grid. Nothing looks at labels of test
examples.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.banks import Backbone, Labelled, Learning, bank, cosine, head
from fipgeo import Composition, TaskVector
from fipgeo.atlas import Goal, dare, isotropise, lines, ties, trim, whiten

SCALES = (0.025, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Scales of a vector that is added or taken back, in order."""
SHORT = 10
"""Classes among which cross-entropy is taken where coefficients are solved for."""


@dataclass(frozen=True, eq=False)
class Task:
    """Labelled examples under a head that is not trained.

    Attributes:
        name: Such as "mnist".
        top: Features `[n, width]` -> scores `[n, C]`.
        train: Examples that the bank's vector was made of; none for the control.
        validation: For learning coefficients and for every choice.
        test: For the accuracy that is reported.
    """

    name: str
    top: Callable[[Tensor], Tensor]
    train: Labelled | None
    validation: Labelled
    test: Labelled

    def scores(self, net: nn.Module, batch: Any) -> Tensor:
        """What the task makes of a batch of a network that gives features."""
        return self.top(net(batch[0]))

    @torch.no_grad()
    def accuracy(self, net: nn.Module, data: Labelled) -> float:
        """Per cent of examples whose best score is their label's."""
        found = torch.cat([self.scores(net, (part,)).argmax(1) for part in data[0].split(250)])
        return 100 * float(found.eq(data[1]).double().mean())

    @torch.no_grad()
    def size(self, net: nn.Module) -> int:
        """The number of classes."""
        return self.scores(net, (self.validation[0][:1],)).shape[1]

    def goal(self, net: nn.Module, data: Labelled, weight: float = 1.0) -> Goal:
        """Cross-entropy; among many classes, of the label and those that a network scores highest for each example."""
        x, y = data[0].contiguous(), data[1]
        if self.size(net) <= SHORT:
            return Goal((x, y), weight=weight, forward_fn=self.scores)
        with torch.no_grad():
            found = torch.cat([self.scores(net, (part,)) for part in data[0].split(250)])
        places = found.scatter(1, y[:, None], torch.inf).topk(SHORT, 1).indices  # the label first

        def forward(net: nn.Module, batch: Any) -> Tensor:
            return self.scores(net, batch).gather(1, batch[2])

        return Goal((x, torch.zeros_like(y), places), weight=weight, forward_fn=forward)


@dataclass(frozen=True, eq=False)
class Setting:
    """A pretrained trunk, tasks, and the vector of each.

    Attributes:
        base: The trunk.
        tasks: They share it.
        vectors: One for each.
        depth: Name of a tensor -> number of its layer; None for the first number in the name.
        learning: How coefficients are learned by others' rules.
    """

    base: nn.Module
    tasks: Sequence[Task]
    vectors: Sequence[TaskVector]
    depth: Callable[[str], int | None] | None = None
    learning: Learning = Learning()

    @cached_property
    def whole(self) -> TaskVector:
        """The sum of all vectors."""
        return sum(self.vectors[1:], self.vectors[0])

    @cached_property
    def isotropic(self) -> tuple[nn.Module, str]:
        """The sum of all vectors at the scale that validation chooses."""
        return scaled(self, {"": self.whole})

    def only(self, *names: str) -> Setting:
        """Some tasks with their own vectors."""
        places = [place for place, task in enumerate(self.tasks) if task.name in names]
        return replace(self, tasks=[self.tasks[i] for i in places], vectors=[self.vectors[i] for i in places])

    def rows(self, net: nn.Module, part: str) -> dict[str, float]:
        """Accuracy of each task on its "validation" or "test" examples."""
        return {task.name: round(task.accuracy(net, getattr(task, part)), 2) for task in self.tasks}

    def validated(self, net: nn.Module) -> float:
        """Mean accuracy on validation examples."""
        return statistics.fmean(self.rows(net, "validation").values())


def setting(backbone: Backbone, epochs: int | None = None, rate: float | None = None, spare: bool = False) -> Setting:
    """The tasks of a backbone, with its pretrained trunk and the vectors of its bank or of another."""
    base = backbone.trunk().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    sets = [backbone.examples(name, spare) for name in backbone.tasks]
    tasks = [
        Task(one.name, cosine(head(base, *one.train)), *map(laid, (one.train, one.validation, one.test)))
        for one in sets
    ]
    vectors = list(bank(backbone, sets, epochs, rate).values())
    return Setting(base, tasks, vectors, backbone.depth, backbone.learning)


def control(backbone: Backbone, spare: bool = False) -> Task:
    """What the backbone is good at already."""
    name, top, validation, test = backbone.control(spare)
    return Task(name, top, None, laid(validation), laid(test))


def laid(data: Labelled) -> Labelled:
    """Images with channels last; other inputs as they are."""
    x, y = data
    return (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x), y


def scaled(at: Setting, candidates: Mapping[str, TaskVector]) -> tuple[nn.Module, str]:
    """The best of some vectors and scales by mean accuracy on validation; no scale is tried after two falls."""
    best, chosen, name = -1.0, at.base, ""
    for label, vector in candidates.items():
        top, falls = -1.0, 0
        for scale in SCALES:
            net = vector.apply_to(at.base, scale)
            found = at.validated(net)
            if found > best:
                best, chosen, name = found, net, f"{label} scale {scale}".strip()
            top, falls = (found, 0) if found > top else (top, falls + 1)
            if falls == 2:
                break
    return chosen, name


def shares(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """Vectors whose tensors that are no matrices are divided by how many there are.

    Their sum adds matrices and averages other tensors, as the published merges by singular vectors do.
    """
    return [v.map(lambda _, tensor: tensor if tensor.dim() > 1 else tensor / len(vectors)) for v in vectors]


def summed(vectors: Sequence[TaskVector]) -> TaskVector:
    """The sum of shares."""
    first, *rest = shares(vectors)
    return sum(rest, first)


def by_ties(at: Setting, seed: int) -> tuple[nn.Module, str]:
    """TIES; share of weights kept and scale by validation."""
    del seed
    return scaled(at, {f"keep {keep}": ties(at.vectors, keep) for keep in (0.2, 0.5)})


def by_dare(at: Setting, seed: int) -> tuple[nn.Module, str]:
    """DARE; share of weights dropped and scale by validation."""
    draws = torch.Generator().manual_seed(seed)
    found = {}
    for drop in (0.5, 0.9):
        parts = [dare(vector, drop, generator=draws) for vector in at.vectors]
        found[f"drop {drop}"] = sum(parts[1:], parts[0])
    return scaled(at, found)


def by_lines(at: Setting, seed: int) -> tuple[nn.Module, str]:
    """LiNeS on the sum of all vectors: scale of the first layer and growth to the last by validation."""
    del seed
    unit = float(at.isotropic[1].rpartition(" ")[2])
    best, chosen, name = -1.0, at.base, ""
    for alpha in (0.5 * unit, unit):
        for beta in (0.0, 0.5 * unit, unit, 2 * unit):
            net = lines(at.whole, alpha, beta, depth_of=at.depth).apply_to(at.base)
            found = at.validated(net)
            if found > best:
                best, chosen, name = found, net, f"alpha {alpha:g} beta {beta:g}"
    return chosen, name


ADDED: dict[str, Callable[[Setting, int], tuple[nn.Module, str]]] = {
    "pretrained": lambda at, _: (at.base, ""),
    "weight averaging": lambda at, _: (at.whole.apply_to(at.base, 1 / len(at.vectors)), ""),
    "isotropic": lambda at, _: at.isotropic,
    "TIES": by_ties,
    "DARE": by_dare,
    "TSV": lambda at, _: scaled(at, {"": summed(whiten(at.vectors))}),
    "Iso-C": lambda at, _: scaled(at, {"": summed(isotropise(at.vectors))}),
    "LiNeS": by_lines,
}
"""Rules without gradients."""


def shuffled(x: Tensor, y: Tensor, size: int, draws: torch.Generator) -> Iterator[Labelled]:
    """Minibatches, epoch after epoch; a smaller one at the end of each is left out unless it is all there is."""
    while True:
        for part in torch.randperm(len(x), generator=draws).split(size):
            if len(part) == min(size, len(x)):
                yield x[part], y[part]


def descended(
    model: Composition,
    terms: Sequence[tuple[Callable[..., Tensor], Iterator[Labelled]]],
    steps: int,
    optimizer: torch.optim.Optimizer,
    *,
    after: Callable[[int], None] | None = None,
) -> None:
    """Steps on the mean of terms (network, minibatch) -> loss; `after` is called with the number of steps so far."""
    for step in range(steps):
        optimizer.zero_grad()
        with model.once():
            for loss, stream in terms:
                (loss(model, next(stream)) / len(terms)).backward()
        nn.utils.clip_grad_norm_([model.coefficients], 1.0)
        optimizer.step()
        if after is not None:
            after(step + 1)


def supervised(task: Task, weight: float = 1.0) -> Callable[..., Tensor]:
    """(network, minibatch) -> cross-entropy, times a weight."""
    return lambda net, batch: weight * F.cross_entropy(task.scores(net, batch), batch[1])


def uncertain(task: Task) -> Callable[..., Tensor]:
    """(network, minibatch) -> mean entropy of the predictions; labels are not looked at."""

    def loss(net: nn.Module, batch: Labelled) -> Tensor:
        logs = task.scores(net, batch).log_softmax(1)
        return -(logs.exp() * logs).sum(1).mean()

    return loss


def trimmed(rule: str, vectors: Sequence[TaskVector], place: int, seed: int) -> dict[str, TaskVector]:
    """One task's vector in the forms of a published rule, to be taken back."""
    vector, draws = vectors[place], torch.Generator().manual_seed(seed)
    forms: dict[str, Callable[[], dict[str, TaskVector]]] = {
        "isotropic": lambda: {"": vector},
        "TIES": lambda: {f"keep {keep}": trim(vector, keep) for keep in (0.2, 0.5)},
        "DARE": lambda: {f"drop {drop}": dare(vector, drop, generator=draws) for drop in (0.5, 0.9)},
        "TSV": lambda: {"": whiten(vectors)[place]},
        "Iso-C": lambda: {"": isotropise([vector])[0]},
    }
    return forms[rule]()
