"""Every method of the sparsity benchmark by name, and the learning rates that baselines were given.

A rate is chosen for each network and each of `GRIDS` by how often the sparse network at 90 % agrees with the dense one
on training images 5,000 to 9,999, which no method is given when it has 1,000 inputs; no label is looked at. `python -m
benchmarks.sparsify --tune` measures that and writes benchmarks/results/rates.json; where nothing was measured, `RATES`
holds. Methods of a family share their rate. The rate of gradual magnitude in `RATES` was the best of three by
that measure, with taps: of 1e-3, 4e-3 and 8e-3 on ResNet-8 (83.9, 86.2, 85.8 %), of 1e-3, 2e-3 and 4e-3 on the LeNet
for MNIST (98.6, 98.8, 99.0 %).

Distillation is KL at temperature 4 in minibatches of 64; on ResNet-20 at 80 % and 20 CPU seconds it agreed with the
dense network on 88.2 % of 2,000 such images, squared differences of logits on 87.7 %. With taps it is the latter, so
that outputs and taps are measured alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import fipgeo
from benchmarks.baselines import (
    Distillation,
    Found,
    Pace,
    Task,
    clock,
    counted,
    distilled,
    gradual,
    magnitude,
    outputs,
    train,
)
from benchmarks.layerwise import reconstructed
from benchmarks.records import RESULTS, read
from fipgeo.paths.correctors import NoCorrection
from fipgeo.paths.driver import Method, walk
from fipgeo.paths.objectives.replay import Replay

OURS = "fipgeo"
KD_LOSS = "kl"
HELD_OUT = 0.05
"""Share of the inputs that a path sets apart for its verdict; baselines may use all."""

STATISTICS = "magnitude, statistics re-estimated"
SGD, ADAM = "magnitude + KD (SGD)", "magnitude + KD (Adam)"
GRADUAL, GRADUAL_TAPS = "gradual magnitude + KD", "gradual magnitude + KD, taps"
REPLAY = "replay (published FIP)"
OBC_KD = "OBC, global shares, then KD (Adam)"

GRIDS = {SGD: (0.01, 0.03, 0.1), ADAM: (3e-4, 1e-3, 3e-3), GRADUAL: (3e-4, 1e-3, 3e-3), REPLAY: (0.03, 0.1, 0.3)}
"""The learning rates that are tried."""

FAMILY = {GRADUAL_TAPS: GRADUAL, OBC_KD: ADAM}
RATES = {SGD: 0.03, ADAM: 1e-3, GRADUAL: 4e-3, REPLAY: 0.1}
PULL = 0.1
"""Weight of the pull towards the sparse plane in the published method, on a distance averaged over the minibatch."""


def replay(task: Task) -> Found:
    """The published method, walked by fipgeo's own driver; as many minibatches as there is time for.

    Two short walks tell how many those are; they come on top of the budget and are part of the seconds on record.
    """
    names = counted(task.model)
    field = fipgeo.MetricField(task.model, task.inputs)
    control = fipgeo.StepControl(initial=1.0, smallest=1.0, largest=1.0, tolerance=1.0)
    method = Method(control, NoCorrection(statistics=True), damping=None, max_steps=10**6, store="last")

    def path(steps: int, refresh: int) -> fipgeo.PathResult:
        objective = Replay(task.level, lambda name, _: name not in names, steps, refresh, lr=task.rate, weight=PULL)
        return walk(field, objective, method, held_out=HELD_OUT, generator=task.seed)

    steps = task.pace.steps
    if steps is None:
        begun = clock()
        path(1, 1)
        first = clock() - begun
        path(11, 11)
        each = max((clock() - begun - 2 * first) / 10, 1e-4)
        steps = max(int((task.pace.budget_s - first) / each), 1)
    walked = path(steps, max(steps // 20, 1))
    model = walked[-1].apply_(copy.deepcopy(task.model))
    return Found(model, walked[-1].cost, more={"minibatches": steps})


def reconstructed_then_distilled(task: Task) -> Found:
    """OBC, and what is left of the time for distillation with the zeros held."""
    begun = clock()
    start = reconstructed(task, solver="obc", shares="global")
    pace = Pace(max(task.pace.budget_s - (clock() - begun), 1.0), task.pace.steps)
    found = train(replace(task, pace=pace), start.model, "adam", Distillation(task, kind=KD_LOSS))
    return replace(found, forwards=found.forwards + start.forwards)


BASELINES: dict[str, Callable[[Task], Found]] = {
    GRADUAL_TAPS: partial(gradual, taps=True),
    GRADUAL: partial(gradual, kind=KD_LOSS),
    OBC_KD: reconstructed_then_distilled,
    ADAM: partial(distilled, optimizer="adam", kind=KD_LOSS),
    SGD: partial(distilled, optimizer="sgd", kind=KD_LOSS),
    "OBC, global shares": partial(reconstructed, solver="obc", shares="global"),
    "SparseGPT, global shares": partial(reconstructed, solver="sparsegpt", shares="global"),
    "SparseGPT, uniform shares": partial(reconstructed, solver="sparsegpt", shares="uniform"),
    STATISTICS: partial(magnitude, statistics=True),
    "magnitude": magnitude,
    REPLAY: replay,
}
"""Strongest first."""

FIXED = {"OBC, global shares", "SparseGPT, global shares", "SparseGPT, uniform shares", STATISTICS, "magnitude"}
"""Methods that take no time budget and have no randomness: one seed is all there is."""


def rate_of(model: str, method: str, folder: Path = RESULTS) -> float:
    """The learning rate of a method on a network: the best that was measured, else the one in `RATES`."""
    family = FAMILY.get(method, method)
    found = [r for r in read("rates", folder) if r["case"].split("/")[0] == model and r["family"] == family]
    return max(found, key=lambda r: r["value"])["rate"] if found else RATES.get(family, 0.0)


def agreement(dense: torch.nn.Module, sparse: torch.nn.Module, inputs: Tensor) -> float:
    """Percentage of inputs on which both predict the same."""
    same = outputs(dense, inputs).argmax(1) == outputs(sparse, inputs).argmax(1)
    return 100 * float(same.double().mean())
