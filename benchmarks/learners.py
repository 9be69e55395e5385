"""What people use to learn a task without forgetting those before: one training loop, and what each adds to it.

Every method gets the same network (its head grown for the new task), the same new data, the same number of minibatches
and, where it uses any, the same kept inputs and the same frozen teacher: the network as it was before the task, in eval
mode. Labels of kept inputs are given to DER++ only, which asks for them. Weights move by SGD with momentum 0.9 (AdamW
for transformers) along a cosine; gradients are clipped at norm 5. Networks are in eval mode throughout: BatchNorm keeps
the statistics that it has, dropout is off.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from benchmarks.streams import Task
from fipgeo.memory import Affine, views

CLIP = 5.0


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    """Outputs `[N, C]`."""
    return torch.cat([model(part) for part in x.split(500)])


@dataclass(frozen=True, eq=False)
class Memory:
    """What is kept of earlier tasks.

    Attributes:
        x: Inputs `[n, ...]`.
        y: Their labels, for methods that say so.
        logits: Outputs when they were stored `[n, C]`; NaN for outputs that were not there then.
    """

    x: Tensor
    y: Tensor
    logits: Tensor

    @classmethod
    def empty(cls, task: Task) -> Memory:
        """Nothing."""
        return cls(task.x[:0], task.y[:0], torch.empty(0, 0))

    def __len__(self) -> int:
        return len(self.x)

    def adding(self, model: nn.Module, task: Task, count: int, seed: int) -> Memory:
        """With `count` random inputs of a task, as many of each predicted class as can be."""
        random = torch.Generator().manual_seed(1000 + seed)
        order = torch.randperm(len(task.x), generator=random)[: max(20 * count, 2000)] if count else torch.arange(0)
        predicted = outputs(model, task.x[order]).argmax(1) if count else order
        turn = torch.zeros_like(predicted)
        for c in predicted.unique():
            turn[predicted == c] = torch.arange(int((predicted == c).sum()))
        chosen = order[turn.argsort(stable=True)[:count]]
        x, y = torch.cat([self.x, task.x[chosen]]), torch.cat([self.y, task.y[chosen]])
        new = outputs(model, task.x[chosen]) if count else torch.empty(0, self.logits.shape[1])
        return Memory(x, y, torch.cat([widened(self.logits, new.shape[1]), new]))

    def seen(self, transform: Affine, count: int, seed: int) -> Memory:
        """With `count` views of every input, whose stored outputs are not known."""
        if count == 1 or not len(self):
            return self
        logits = torch.cat(
            [self.logits, self.logits.new_full(((count - 1) * len(self), self.logits.shape[1]), math.nan)]
        )
        return Memory(views(self.x, transform, count, seed), self.y.repeat(count), logits)


def widened(logits: Tensor, width: int) -> Tensor:
    """Logits with NaN for outputs that came later."""
    return torch.cat([logits, logits.new_full((len(logits), width - logits.shape[1]), math.nan)], 1)


@dataclass(frozen=True, eq=False)
class Lesson:
    """One new task, as every method sees it.

    Attributes:
        model: The network, its head grown, in eval mode; not to be changed.
        teacher: The same as it was before its head grew.
        task: The new data.
        memory: What is kept of the tasks before.
        earlier: Data of the tasks before, for joint training only.
        steps: Minibatches.
        batch: Examples of the new task in each; at most as many of the memory beside them, and 50.
        optimizer: "sgd" or "adamw".
        head: Name of the layer of the outputs.
        seed: Of everything random.
        transform: What views of kept inputs are made by.
    """

    model: nn.Module
    teacher: nn.Module
    task: Task
    memory: Memory
    earlier: list[Task]
    steps: int
    batch: int = 100
    optimizer: str = "sgd"
    head: str = ""
    seed: int = 0
    transform: Affine = field(default_factory=Affine)

    @property
    def passes(self) -> float:
        """Passes over the new data."""
        return self.steps * self.batch / len(self.task.x)


@dataclass(eq=False)
class Learner:
    """Plain fine-tuning. Subclasses add to the loss, to the gradient, or remember something after a task.

    Attributes:
        rate: Learning rate at the start.
        weight: Of what a method adds to the loss.
        rehearse: Inputs of the memory in a minibatch.
        views: Of each kept input (see `fipgeo.memory.views`).
    """

    rate: float = 0.03
    weight: float = 1.0
    rehearse: int = 50
    views: int = 1
    replays = False
    at: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def learn(self, lesson: Lesson) -> nn.Module:
        """The network after the task."""
        student = copy.deepcopy(lesson.model).eval()
        random = torch.Generator().manual_seed(lesson.seed)
        lesson = replace(lesson, memory=lesson.memory.seen(lesson.transform, self.views, lesson.seed))
        self.begin(student, lesson)
        params = [p for p in student.parameters() if p.requires_grad]
        descent: torch.optim.Optimizer = torch.optim.SGD(params, lr=self.rate, momentum=0.9)
        if lesson.optimizer == "adamw":
            descent = torch.optim.AdamW(params, lr=self.rate, weight_decay=0.01)
        for step, (x, y) in zip(range(lesson.steps), self.stream(lesson, random), strict=False):
            descent.param_groups[0]["lr"] = self.rate * 0.5 * (1 + math.cos(math.pi * step / lesson.steps))
            descent.zero_grad()
            self.loss(student, x, y, lesson, random).backward()
            self.project(student)
            torch.nn.utils.clip_grad_norm_(params, CLIP)
            descent.step()
            self.settle(student)
        return self.finish(student).eval()

    def stream(self, lesson: Lesson, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches without end."""
        x, y = lesson.task.x, lesson.task.y
        size = min(lesson.batch, len(x))
        while True:
            for part in torch.randperm(len(x), generator=random).split(size):
                if len(part) == size:
                    yield x[part], y[part]

    def loss(self, student: nn.Module, x: Tensor, y: Tensor, lesson: Lesson, random: torch.Generator) -> Tensor:
        """Cross entropy on the new data and what the method adds; new and kept inputs go through together."""
        which = torch.arange(0)
        if self.replays and len(lesson.memory):
            which = torch.randperm(len(lesson.memory), generator=random)[: self.rehearse]
        f = student(torch.cat([x, lesson.memory.x[which]]))
        loss = cross_entropy(f[: len(x)], y) + self.penalty(student, x, f[: len(x)], lesson)
        return loss + self.weight * self.replay(f[len(x) :], which, lesson) if len(which) else loss

    def begin(self, student: nn.Module, lesson: Lesson) -> None:
        """Before a task; the teacher's outputs on the memory are computed once."""
        del student
        if self.replays:
            self.at["taught"] = outputs(lesson.teacher, lesson.memory.x) if len(lesson.memory) else torch.empty(0)

    def replay(self, f: Tensor, which: Tensor, lesson: Lesson) -> Tensor:
        """What outputs on kept inputs cost."""
        raise NotImplementedError

    def penalty(self, student: nn.Module, x: Tensor, f: Tensor, lesson: Lesson) -> Tensor:
        """What is added to the loss without the memory."""
        del student, x, lesson
        return f.new_zeros(())

    def project(self, student: nn.Module) -> None:
        """Change the gradient."""

    def settle(self, student: nn.Module) -> None:
        """After a step."""

    def finish(self, student: nn.Module) -> nn.Module:
        """After the last step."""
        return student

    def remember(self, model: nn.Module, task: Task, seed: int) -> None:
        """After a task (the first included), while its data are there."""


class Joint(Learner):
    """All data of all tasks: what learning without forgetting could reach."""

    def stream(self, lesson: Lesson, random: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Minibatches of old and new data, every example as likely."""
        parts = [*lesson.earlier, lesson.task]
        ends = torch.tensor([len(task.x) for task in parts]).cumsum(0)
        while True:
            drawn = torch.randint(int(ends[-1]), (lesson.batch,), generator=random)
            place = torch.bucketize(drawn, ends, right=True)
            picks = [drawn[place == k] - (int(ends[k - 1]) if k else 0) for k in range(len(parts))]
            pairs = list(zip(parts, picks, strict=True))
            yield torch.cat([t.x[pick] for t, pick in pairs]), torch.cat([t.y[pick] for t, pick in pairs])


class PublishedFIP(Learner):
    """Replay by the Bhattacharyya distance of probabilities, -log sum sqrt(p q), summed over the kept inputs.

    As the published method computes it, with three things put right: the teacher is a frozen copy in eval mode, the
    distance is computed in log space, and no constant stands under the root.
    """

    replays = True

    def replay(self, f: Tensor, which: Tensor, lesson: Lesson) -> Tensor:
        """The sum over the minibatch; new outputs have no probability in the teacher."""
        del lesson
        p = log_softmax(self.at["taught"][which], 1)
        q = log_softmax(f, 1)[:, : p.shape[1]]
        return -torch.logsumexp((p + q) / 2, 1).sum()


class Distilled(Learner):
    """Replay by distillation at temperature 2, T^2 KL(p | q), the mean over the kept inputs (Hinton et al. 2015)."""

    replays = True

    def replay(self, f: Tensor, which: Tensor, lesson: Lesson) -> Tensor:
        """The mean over the minibatch; new outputs have no probability in the teacher."""
        del lesson
        return distilled(f, self.at["taught"][which])


def distilled(f: Tensor, taught: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(softmax(taught / T) | softmax(f / T)), the mean over examples; f may have more outputs."""
    p = log_softmax(taught / temperature, 1)
    q = log_softmax(f / temperature, 1)[:, : p.shape[1]]
    return temperature**2 * kl_div(q, p, reduction="batchmean", log_target=True)


@dataclass(eq=False)
class DER(Learner):
    """Dark experience replay: logits as they were when stored, mean squared (Buzzega et al., NeurIPS 2020)."""

    weight: float = 0.5
    replays = True

    def replay(self, f: Tensor, which: Tensor, lesson: Lesson) -> Tensor:
        """Over the outputs that were there when an input was stored."""
        stored = widened(lesson.memory.logits[which], f.shape[1])
        known = ~stored.isnan()
        return (f - stored.nan_to_num()).square()[known].mean()


@dataclass(eq=False)
class DERpp(DER):
    """DER++: the same, and cross entropy with the labels of kept inputs, which no other method here is given.

    Attributes:
        labels: Weight of the cross entropy, as a multiple of that of the logits.
    """

    labels: float = 1.0

    def replay(self, f: Tensor, which: Tensor, lesson: Lesson) -> Tensor:
        """Both terms on the same minibatch of the memory."""
        return super().replay(f, which, lesson) + self.labels * cross_entropy(f, lesson.memory.y[which])
