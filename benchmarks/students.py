"""Ways to learn a task from few examples of it, all from one head, for `benchmarks.transfer`."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from benchmarks.anchors import _Added
from benchmarks.banks import SHARPNESS, Labelled, cosine, head
from benchmarks.merges import Setting, Task, laid, shuffled
from fipgeo import Composition, TaskVector
from fipgeo.atlas import HiddenClassifier, Kind, Partitions, PerChannel, choose_vectors, few_shot_, fit_, fit_hidden_

STEPS, BATCH = 60, 64
TUNED = 1e-3
"""The rate of full fine-tuning that goes on from coefficients."""
RATE, EPISODES = 0.03, 40
"""Of coefficients under a moving head; the rate is the one of 0.01, 0.03 and 0.1 from which fine-tuning was best on
validation images of Fashion-MNIST."""
BUDGET = 2
"""Vectors of a tensor where they are chosen."""


class Student(nn.Module):
    """A trunk with a cosine head, both of which may learn."""

    def __init__(self, body: nn.Module, classes: Tensor) -> None:
        super().__init__()
        self.body, self.classes = body, nn.Parameter(classes.clone())

    def forward(self, x: Tensor) -> Tensor:
        """The scores."""
        return cosine(self.classes)(self.body(x))


@dataclass(frozen=True, eq=False)
class Lesson:
    """A few examples of a task, and what there is to learn it with.

    Attributes:
        base: The pretrained trunk.
        task: The target, whose test examples are labelled as `data` is.
        vectors: Of the other tasks.
        data: Inputs and labels.
        classes: The head that they make, `[C, width]`.
        seed: Of whatever is drawn.
        mask: Inputs -> which tokens are no padding; None where there are none.
        batch: Examples of a step.
        starts: Common values of coefficients at which learning by the evidence may begin.
    """

    base: nn.Module
    task: Task
    vectors: Sequence[TaskVector]
    data: Labelled
    classes: Tensor
    seed: int
    mask: Callable[[Tensor], Tensor] | None = None
    batch: int = BATCH
    starts: tuple[float, ...] = ()

    @classmethod
    def of(cls, base: nn.Module, task: Task, vectors: Sequence[TaskVector], data: Labelled, seed: int) -> Lesson:
        """The lesson of some examples, with the head that they make; a class that they lack is an error."""
        x, y = laid(data)
        if len(y.unique()) != (size := task.size(base)):
            raise ValueError(f"data: got examples of {len(y.unique())} classes, expected all {size} of {task.name}")
        return cls(base, task, vectors, (x, y), head(base, x, y), seed)

    @property
    def draws(self) -> torch.Generator:
        """A fresh source of random numbers."""
        return torch.Generator().manual_seed(self.seed)

    def scores(self, net: nn.Module, batch: Labelled) -> Tensor:
        """What a trunk gives under the head."""
        return cosine(self.classes)(net(batch[0]))

    def accuracy(self, student: Callable[[Tensor], Tensor], data: Labelled) -> float:
        """Per cent of examples that are right."""
        with torch.no_grad():
            found = torch.cat([student(part).argmax(1) for part in data[0].split(250)])
        return 100 * float(found.eq(data[1]).double().mean())


def few(at: Setting, name: str, count: int, seed: int) -> Labelled:
    """`count` examples of each class of a task from those that its vector was made of."""
    task = next(task for task in at.tasks if task.name == name)
    assert task.train is not None
    x, y = task.train
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    chosen = torch.cat([order[y[order] == label][:count] for label in y.unique().tolist()])
    return x[chosen], y[chosen]


def trained(student: nn.Module, at: Lesson, rate: float, steps: int = STEPS) -> nn.Module:
    """AdamW with a cosine on whatever wants a gradient."""
    free = [p for p in student.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    stream = shuffled(*at.data, at.batch, at.draws)
    for _ in range(steps):
        x, y = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(student(x), y).backward()
        optimizer.step()
        schedule.step()
    student.numbers = sum(p.numel() for p in free)  # type: ignore[assignment]
    return student


def probed(at: Lesson, rate: float) -> nn.Module:
    """The head alone, on features that are computed once."""
    with torch.no_grad():
        features = torch.cat([at.base(part) for part in at.data[0].split(250)])
    inner = replace(at, base=nn.Identity(), data=(features, at.data[1]))
    found = trained(Student(inner.base, at.classes), inner, rate)
    assert isinstance(found, Student)
    found.body = at.base
    return found


def tuned(at: Lesson, rate: float) -> nn.Module:
    """All weights and the head."""
    return trained(Student(copy.deepcopy(at.base), at.classes), at, rate)


def adapted(at: Lesson, rate: float, rank: int = 16, steps: int = STEPS) -> nn.Module:
    """Low-rank additions to every kernel, and the head."""
    body, draws = copy.deepcopy(at.base).requires_grad_(False), at.draws
    for module in list(body.modules()):
        if isinstance(module, nn.Conv2d | nn.Linear):
            parametrize.register_parametrization(module, "weight", _Added(module.weight.detach(), rank, draws))
    return trained(Student(body, at.classes), at, rate, steps)


def solved(at: Lesson, ridge: float, vectors: Sequence[TaskVector] | None = None) -> nn.Module:
    """Coefficients of the other tasks' vectors; the head stays."""
    model = Composition(at.base, at.vectors if vectors is None else vectors).eval()
    task = replace(at.task, top=cosine(at.classes))
    fit_(model, task.goal(at.base, at.data), ridge=ridge, steps=30)
    return _under(model, at)


def chosen(at: Lesson, ridge: float, by: str) -> nn.Module:
    """Coefficients of few vectors for each tensor."""
    return solved(at, ridge, choose_vectors(at.base, at.vectors, at.data, BUDGET, by=by, forward_fn=at.scores))


def met(at: Lesson, rate: float = RATE, steps: int = EPISODES) -> Student:
    """Coefficients under a head that moves with them, by AdamW with a cosine; the head of the images where they end.

    Every image is told by the mean features of the others of its class, as they are at the coefficients; where a class
    has one image, that image moved by up to three pixels is told by the image itself.
    """
    x, y = at.data
    model, draws, hot = Composition(at.base, at.vectors).eval(), at.draws, F.one_hot(y).to(x)
    optimizer = torch.optim.AdamW([model.coefficients], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    single = int(y.bincount().min()) == 1
    for _ in range(steps):
        optimizer.zero_grad()
        with model.once():
            f = F.normalize(model(x), dim=1)
            if single:
                down, right = torch.randint(-3, 4, (2,), generator=draws).tolist()
                scores = cosine(F.normalize(hot.T @ f, dim=1))(model(x.roll((down, right), (2, 3))))
            else:
                means = F.normalize(hot.T @ f - hot[:, :, None] * f[:, None], dim=2)  # [n, C, 64], each without its own
                scores = SHARPNESS * (means @ f[:, :, None]).squeeze(2)
            F.cross_entropy(scores, y).backward()
        optimizer.step()
        schedule.step()
    net = model.merge()
    student = Student(net, head(net, x, y))
    student.numbers = model.coefficients.numel()  # type: ignore[assignment]
    return student


def met_and_tuned(at: Lesson, rate: float) -> nn.Module:
    """The same, and then all weights and the head from there, at the rate that full fine-tuning got."""
    del rate
    found = met(at)
    return trained(Student(found.body, found.classes.detach()), at, TUNED)


def read(at: Lesson, rate: float, *, steps: int = 15) -> HiddenClassifier:
    """Coefficients by the evidence of the images, and ridge regression on all layers of the network that they make.

    How layers are seen was chosen on validation images of five tasks, targets among them, with images drawn by other
    seeds, and is the default; so were the steps. Nothing is chosen for a task.
    """
    del rate
    model = Composition(at.base, at.vectors).eval()
    found = fit_hidden_(model, at.data, mask=at.mask, starts=at.starts if steps else (), steps=steps)
    found.numbers = (model.coefficients.numel() if steps else 0) + found.weights.numel()  # type: ignore[attr-defined]
    return found


def told(at: Lesson, steps: int = 15) -> Student:
    """Coefficients by the evidence of the examples, as for `read`, and the head of the examples where they end."""
    model = Composition(at.base, at.vectors).eval()
    fit_hidden_(model, at.data, mask=at.mask, starts=at.starts, steps=steps)
    net = model.merge()
    student = Student(net, head(net, *at.data))
    student.numbers = model.coefficients.numel()  # type: ignore[assignment]
    return student


def adapter(at: Lesson, ridge: float, *, kind: str, steps: int = 30) -> Callable[[Tensor], Tensor]:
    """Coefficients as for `solved`, and then a classifier of features; with no steps of the network as it is."""
    model = Composition(at.base, at.vectors).eval()
    found = few_shot_(model, at.data, at.classes, adapter=kind, sharpness=SHARPNESS, ridge=ridge, steps=steps)
    net = model.merge()
    return lambda x: found.classifier(net(x))


def parted(at: Lesson, rate: float, kind: Callable[[Lesson], Kind]) -> nn.Module:
    """Coefficients of parts of the vectors, and the head, by AdamW."""
    return trained(Student(Composition(at.base, at.vectors, kind(at)).eval(), at.classes), at, rate)


def random_parts(at: Lesson) -> Kind:
    """So many of each tensor that coefficients are as many as LoRA of rank 1 has numbers, or as few less as can be."""
    kernels = [module.weight for module in at.base.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    most = sum(len(w) + w[0].numel() for w in kernels)
    sizes = [p.numel() for name, p in at.base.named_parameters() if any(name in v.tensors for v in at.vectors)]
    return Partitions(max(k for k in range(1, 400) if len(at.vectors) * sum(min(k, n) for n in sizes) <= most))


def _under(model: Composition, at: Lesson) -> nn.Module:
    student = Student(model.merge(), at.classes)
    student.numbers = model.coefficients.numel()  # type: ignore[assignment]
    return student


METHODS: dict[str, Callable[[Lesson, float], Callable[[Tensor], Tensor]]] = {
    "head of the images": lambda at, _: Student(at.base, at.classes),
    "full fine-tuning": tuned,
    "linear probe": probed,
    "LoRA": adapted,
    "fipgeo": solved,
    "fipgeo, moving head": lambda at, _: met(at),
    "fipgeo, moving head, then fine-tuning": met_and_tuned,
    "Tip": partial(adapter, kind="cache", steps=0),
    "LP++": partial(adapter, kind="probe", steps=0),
    "fipgeo, Tip": partial(adapter, kind="cache"),
    "fipgeo, LP++": partial(adapter, kind="probe"),
    "all layers": partial(read, steps=0),
    "fipgeo, all layers": read,
    "fipgeo, evidence": lambda at, _: told(at),
}
SELECTED: dict[str, Callable[[Lesson, float], nn.Module]] = {
    "by leverage": partial(chosen, by="leverage"),
    "by gradient": partial(chosen, by="gradient"),
}
PARTED: dict[str, Callable[[Lesson, float], nn.Module]] = {
    "LoRA of rank 1": partial(adapted, rank=1),
    "parts of vectors": partial(parted, kind=random_parts),
    "channels of vectors": partial(parted, kind=lambda at: PerChannel.of(at.base)),
}
RATES = {
    "full fine-tuning": (1e-4, 1e-3, 3e-3, 1e-2),
    "linear probe": (1e-3, 1e-2, 1e-1),
    "LoRA": (1e-4, 1e-3, 1e-2, 3e-2),
    "fipgeo": (1e-3, 1e-2, 1e-1),
    "LoRA of rank 1": (3e-3, 1e-2, 3e-2, 1e-1),
    "parts of vectors": (3e-3, 1e-2, 3e-2, 1e-1),
    "channels of vectors": (3e-3, 1e-2, 3e-2, 1e-1),
}
"""From which the learning rate, or the ridge, is chosen."""
