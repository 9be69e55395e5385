"""One task after the other: inputs are kept of each, the head grows, and what is known of all is written down."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo.data import Generator, as_generator
from fipgeo.heads import grow_head
from fipgeo.memory import select, views
from fipgeo.memory.views import Transform
from fipgeo.model import OutputFn
from fipgeo.paths import PathResult, adapt
from fipgeo.paths.objectives.new_task import LossFn
from fipgeo.tasks import AccuracyMatrix

Pairs = Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Learned:
    """A network after a sequence of tasks.

    Attributes:
        model: The network, in eval mode.
        paths: The path of every task but the first.
        kept: Inputs kept of every task, by its name.
        matrix: Accuracy on each task after each; None without test data.
    """

    model: nn.Module
    paths: tuple[PathResult, ...]
    kept: Mapping[str, Tensor]
    matrix: AccuracyMatrix | None


def adapt_tasks(
    model: nn.Module,
    tasks: Pairs,
    loss_fn: LossFn = cross_entropy,
    *,
    kept: int = 50,
    by: str = "balanced",
    transform: Transform | None = None,
    num_views: int = 20,
    head: str | None = None,
    own_heads: bool = False,
    tests: Pairs | None = None,
    after_task: Callable[[str, nn.Module], Any] | None = None,
    generator: Generator = None,
    **options: Any,
) -> Learned:
    """Teach a network a sequence of tasks; no labels of earlier tasks are needed.

    After each task some of its inputs are kept, and while later ones are learned the outputs on all kept inputs stay as
    they were when that task began (see `adapt`). Where a task has classes beyond the head's outputs, the head grows by
    rows of zeros. A fifth of the kept inputs is set apart for the verdicts.

    One head may serve all tasks, so that nobody need say which task an input is of. With `own_heads` every task has
    outputs of its own: loss and accuracy look at these alone, and on kept inputs every head is compared by itself, as
    probabilities among its own classes.

    Args:
        model: Classifier that knows the first task; not changed.
        tasks: Inputs `[N, ...]` and targets `[N]` by name, in the order of learning. Of the first only inputs are used.
        loss_fn: (outputs, targets) -> scalar mean loss.
        kept: Inputs kept of every task, at least 2.
        by: How they are chosen (see `fipgeo.memory.select`).
        transform: What shows kept inputs in several views, such as `fipgeo.memory.Affine()`; None for none.
        num_views: Views of a kept input, itself included, where there is a transform.
        head: Name of the output layer (see `grow_head`); None to find it.
        own_heads: Whether every task has outputs of its own: the first those that the model has, each later one its
            classes, which begin where those before end.
        tests: Inputs and classes by the names of the tasks, on which accuracy is measured after each.
        after_task: Called with the name of each task and the network after it.
        generator: Source of randomness.
        options: Of `adapt`, the same for all tasks: `epochs`, `lr`, `damping`, `batch_size`, ...

    Returns:
        The network, the paths and the record.

    Raises:
        ValueError: There are fewer than two tasks, kept is below 2, tests are missing for a task, or with `own_heads` a
            task has no classes of its own.

    Examples:
        >>> draw = torch.Generator().manual_seed(0)
        >>> x, net = torch.randn(80, 4, generator=draw), nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> tasks = {"sign of a": (x, (x[:, 0] > 0).long()), "sign of b": (x, 2 + (x[:, 1] > 0).long())}
        >>> after = adapt_tasks(net, tasks, kept=10, tests=tasks, batch_size=20)
        >>> after.model[-1].out_features, after.matrix.values.shape
        (4, torch.Size([2, 2]))
    """
    names = list(tasks)
    if len(names) < 2 or kept < 2:
        raise ValueError(
            f"tasks: got {len(names)} with {kept} inputs kept of each; expected one that the model knows, one or more"
            " to learn, and at least 2 inputs"
        )
    if missing := [name for name in names if tests is not None and name not in tests]:
        raise ValueError(f"tests: got none for {', '.join(map(repr, missing))}; pass one for each task, or None")
    random, model = as_generator(generator), copy.deepcopy(model).eval()
    matrix = None if tests is None else AccuracyMatrix.of(names)
    memory: dict[str, Tensor] = {}
    paths: list[PathResult] = []
    ends = [0, _width(model, tasks[names[0]][0])]
    for index, name in enumerate(names):
        x, y = tasks[name]
        if index:
            model = _wide_enough(model, x, y, head)
            ends.append(_width(model, x))
            seen = torch.cat(list(memory.values()))
            unseen = torch.arange(len(seen)) % min(5, len(seen)) == min(5, len(seen)) - 1
            keep = seen[~unseen]
            keep = keep if transform is None else views(keep, transform, num_views, random)
            told = {"held_out": seen[unseen], "generator": random} | options
            if own_heads:
                y = _own(name, y, ends)
                told["output_fn"] = partial(_split, [b - a for a, b in pairwise(ends)], options.get("output_fn"))
            loss = partial(_last_loss, loss_fn) if own_heads else loss_fn
            paths.append(adapt(model, (x, y), loss, keep=keep, **told))
            model = paths[-1][-1].apply_(model)
        parts = [(model, 0)] * len(ends)
        if own_heads:
            parts = [(_Head(model, first, end), first) for first, end in pairwise(ends)]
        memory[name] = x[select(parts[index][0], x, min(kept, len(x)), by=by, generator=random)]
        if matrix is not None and tests is not None:
            seen_by = zip(names[: index + 1], parts, strict=False)
            matrix = matrix.after([_accuracy(net, tests[n][0], tests[n][1] - first) for n, (net, first) in seen_by])
        if after_task is not None:
            after_task(name, model)
    return Learned(model, tuple(paths), memory, matrix)


class _Head(nn.Module):
    """The outputs `first` to `end - 1` of a network."""

    def __init__(self, model: nn.Module, first: int, end: int) -> None:
        super().__init__()
        self.model, self.first, self.end = model, first, end

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, self.first : self.end]


def _split(sizes: list[int], output_fn: OutputFn | None, f: Any) -> tuple[Tensor, ...]:
    return (f if output_fn is None else output_fn(f)).split(sizes, 1)


def _last_loss(loss_fn: LossFn, heads: tuple[Tensor, ...], y: Tensor) -> Tensor:
    return loss_fn(heads[-1], y)


def _own(name: str, y: Tensor, ends: list[int]) -> Tensor:
    """Classes counted from the first of a task's own."""
    first = ends[-2]
    if ends[-1] == first or int(y.min()) != first:
        found = f"classes {int(y.min())} to {int(y.max())}" if y.dtype == torch.long else f"targets of {y.dtype}"
        raise ValueError(f"tasks: {name!r} has {found}, expected classes from {first} on, for a head of its own")
    return y - first


@torch.no_grad()
def _width(model: nn.Module, x: Tensor) -> int:
    return model(x[:2]).shape[-1]


@torch.no_grad()
def _wide_enough(model: nn.Module, x: Tensor, y: Tensor, head: str | None) -> nn.Module:
    """The model, with as many outputs as the classes of a task need."""
    have, need = _width(model, x), int(y.max()) + 1 if y.dtype == torch.long else 0
    return model if need <= have else grow_head(model, need, name=head, inputs=None if head else x[:2])


@torch.no_grad()
def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers among all outputs; classes that the head has not yet are wrong."""
    guess = torch.cat([model(part).argmax(1) for part in x.split(500)])
    return float((guess == y).double().mean())
