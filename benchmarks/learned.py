"""Rules that learn coefficients, and rules that take a vector back, for `benchmarks.merging`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from benchmarks.banks import Labelled
from benchmarks.merges import (
    SCALES,
    Setting,
    Task,
    descended,
    scaled,
    shares,
    shuffled,
    summed,
    supervised,
    trimmed,
    uncertain,
)
from fipgeo import Composition, TaskVector
from fipgeo.atlas import Goal, fit_, forget_, isotropise, whiten

Merged = tuple[nn.Module, str]
FLOOR = 0.95
"""Share of the control's accuracy that must be left."""
RIDGES = (3e-2, 1e-3, 3e-5, 0.0)
"""From which that of `by_ours` is chosen; the largest first, which wins where accuracies are equal."""
LOOK = 10
"""Steps between two looks at the control."""


def by_adamw(at: Setting, seed: int, *, epochs: int = 20, size: int = 16) -> Merged:
    """The published recipe of aTLAS: labels of validation examples, from 0, the last step."""
    draws, model = torch.Generator().manual_seed(seed), Composition(at.base, at.vectors).eval()
    terms = [(supervised(task), shuffled(*task.validation, size, draws)) for task in at.tasks]
    steps = epochs * (len(at.tasks[0].validation[0]) // size)
    descended(model, terms, steps, torch.optim.AdamW([model.coefficients], lr=at.learning.adamw, weight_decay=0.1))
    return model.merge(), f"{steps} steps"


def by_entropy(at: Setting, seed: int, *, part: str = "validation", steps: int | None = None, size: int = 16) -> Merged:
    """Layer-wise AdaMerging: the entropy of predictions on inputs without labels, from the tuned common scale."""
    start, steps = float(at.isotropic[1].rpartition(" ")[2]), at.learning.steps if steps is None else steps
    draws, model = torch.Generator().manual_seed(seed), Composition(at.base, at.vectors, start=start).eval()
    inputs = [task.test if part == "test" else task.validation for task in at.tasks]
    terms = [(uncertain(task), shuffled(x, y, size, draws)) for task, (x, y) in zip(at.tasks, inputs, strict=True)]

    def clamp(_: int) -> None:
        with torch.no_grad():
            model.coefficients.clamp_(0.0, 1.0)

    descended(model, terms, steps, torch.optim.Adam([model.coefficients], lr=at.learning.entropy), after=clamp)
    return model.merge(), f"{steps} steps"


def by_ours(at: Setting, seed: int, *, ridge: float = RIDGES[0], steps: int = 15) -> Merged:
    """The same labels, by steps in the metric: from the better of the tuned Iso-C and TSV merges, over its vectors.

    The ridge draws coefficients to that merge, which is the better one on validation examples.
    """
    start, name, vectors = started(at)
    net, done = stepped(at, start, vectors, [task.validation for task in at.tasks], ridge, steps, seed)
    return net, f"from {name} ridge {ridge} {done} steps"


def started(at: Setting) -> tuple[nn.Module, str, list[TaskVector]]:
    """The better of two tuned merges, and the vectors that it is made of."""
    changed = {"Iso-C": isotropise(at.vectors), "TSV": whiten(at.vectors)}
    start, name = scaled(at, {rule: summed(vectors) for rule, vectors in changed.items()})
    return start, name, shares(changed[name.split(" ")[0]])


def stepped(
    at: Setting,
    start: nn.Module,
    vectors: list[TaskVector],
    data: Sequence[Labelled],
    ridge: float,
    steps: int,
    seed: int,
) -> tuple[nn.Module, int]:
    """Steps in the metric from a network, on some examples of each task, and how many there were."""
    model = Composition(start, vectors).eval()
    goals = [task.goal(start, part, 1 / len(at.tasks)) for task, part in zip(at.tasks, data, strict=True)]
    fit = fit_(model, goals, ridge=ridge, steps=steps, generator=seed)
    return model.merge(), fit.steps


def ridges(at: Setting, seed: int, *, steps: int = 15) -> dict[float, float]:
    """Mean accuracy on one half of the validation examples of what each ridge makes of the other half."""
    start, _, vectors = started(at)
    draws, halves = torch.Generator().manual_seed(seed), []
    for task in at.tasks:
        x, y = task.validation
        first, second = torch.randperm(len(y), generator=draws).chunk(2)
        halves.append(((x[first], y[first]), (x[second], y[second])))
    found = {}
    for ridge in RIDGES:
        net, _ = stepped(at, start, vectors, [learned for learned, _ in halves], ridge, steps, seed)
        rows = [task.accuracy(net, judge) for task, (_, judge) in zip(at.tasks, halves, strict=True)]
        found[ridge] = round(statistics.fmean(rows), 2)
    return found


LEARNED: dict[str, Callable[[Setting, int], Merged]] = {
    "AdaMerging": by_entropy,
    "AdaMerging on test": partial(by_entropy, part="test"),
    "AdamW": by_adamw,
    "fipgeo": by_ours,
}
"""Rules with gradients for all tasks at once."""


def taken_back(at: Setting, place: int, kept: Task, candidates: dict[str, TaskVector]) -> Merged:
    """The negative of some vector, at the scale that leaves least of the target and enough of the control.

    Accuracies are on validation examples; the scale grows until the control is below the floor, and is halved back
    once.
    """
    target = at.tasks[place]
    least = FLOOR * kept.accuracy(at.base, kept.validation)
    best, chosen, name = target.accuracy(at.base, target.validation), at.base, "scale 0"
    for label, vector in candidates.items():
        before, tried = 0.0, list(SCALES)
        while tried:
            scale = tried.pop(0)
            net = vector.apply_to(at.base, -scale)
            if kept.accuracy(net, kept.validation) < least:
                tried = [(before + scale) / 2] if tried and scale in SCALES else []
                continue
            before = scale
            found = target.accuracy(net, target.validation)
            if found < best:
                best, chosen, name = found, net, f"{label} scale {scale:g}".strip()
            if scale not in SCALES:
                break
    return chosen, name


def by_ascent(at: Setting, place: int, kept: Task, seed: int, *, steps: int = 120, size: int = 64) -> Merged:
    """The published recipe: cross-entropy of the control less that of the target, by AdamW from 0.

    The best of the looks at validation examples, one every ten steps: least of the target with the control above the
    floor. A run ends at the second look in a row that finds the control below it.
    """
    target, draws = at.tasks[place], torch.Generator().manual_seed(seed)
    model = Composition(at.base, at.vectors).eval()
    least = FLOOR * kept.accuracy(at.base, kept.validation)
    best, chosen, name, below = target.accuracy(at.base, target.validation), at.base, "0 steps", 0
    terms = [
        (supervised(task, weight), shuffled(*task.validation, size, draws))
        for task, weight in ((target, -1), (kept, 1))
    ]
    optimizer = torch.optim.AdamW([model.coefficients], lr=1e-2, weight_decay=0.1)
    for done in range(LOOK, steps + 1, LOOK):
        descended(model, terms, LOOK, optimizer)
        net = model.merge()
        below = below + 1 if kept.accuracy(net, kept.validation) < least else 0
        found = target.accuracy(net, target.validation)
        if not below and found < best:
            best, chosen, name = found, net, f"{done} steps"
        if below == 2:
            break
    return chosen, name


def by_forgetting(at: Setting, place: int, kept: Task, seed: int) -> Merged:
    """From the best of three tuned negations, by steps in the metric; half of the control's examples judge the floor.

    The vectors are the target's as the best rule makes it, and the others as they are. Which half judges is drawn for
    each target, so that what one half says of them all is not the same chance.
    """
    target = at.tasks[place]
    forms = {rule: trimmed(rule, at.vectors, place, seed)[""] for rule in ("isotropic", "TSV", "Iso-C")}
    start, name = taken_back(at, place, kept, forms)
    rule, _, scale = name.rpartition("scale ")
    turned = forms[rule.strip() or "isotropic"]  # no rule where none helps
    rest = [vector for number, vector in enumerate(at.vectors) if number != place]
    model = Composition(at.base, [turned, *rest]).eval()
    with torch.no_grad():
        model.coefficients[0] = -float(scale)
    goals = target.goal(start, target.validation), Goal(kept.validation, forward_fn=kept.scores)
    draw = seed * len(at.tasks) + place
    fit = forget_(model, *goals, floor=FLOOR, held_out=0.5, generator=draw)
    return model.merge(), f"from {name} {fit.steps} steps"


def _by_rule(rule: str) -> Callable[[Setting, int, Task, int], Merged]:
    def run(at: Setting, place: int, kept: Task, seed: int) -> Merged:
        return taken_back(at, place, kept, trimmed(rule, at.vectors, place, seed))

    return run


NEGATED: dict[str, Callable[[Setting, int, Task, int], Merged]] = {
    "pretrained": lambda at, place, kept, seed: (at.base, ""),
    **{rule: _by_rule(rule) for rule in ("isotropic", "TIES", "DARE", "TSV", "Iso-C")},
    "AdamW": by_ascent,
    "fipgeo": by_forgetting,
}
"""Rules that forget one task."""
