"""One look at a model before it is used: its behaviour, its derivative rules and the size of the data."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.data import stir
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.jacobian.graphs import Graph, storages
from fipgeo.model import NotFiniteError
from fipgeo.trees import FEW, head

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """How a model is differentiated.

    Attributes:
        forward_mode: Whether it has forward mode; else tangents go through two reverse passes.
        graph_bytes: What a backward pass through the first batch keeps.
    """

    forward_mode: bool
    graph_bytes: int


@dataclass(frozen=True)
class Look:
    """What is known before the first product.

    Attributes:
        survey: Rows and examples of every batch.
        rules: How the model is differentiated; None if the first product is to find out.
    """

    survey: Survey
    rules: Rules | None


def look(function: EmbeddedOutputs, theta: Tensor) -> Look:
    """Look at a model by one evaluation of a few examples, with both derivatives, and one pass over the data.

    Outputs, modes, derivative rules and their memory are seen on the few examples. The pass meets them again: outputs
    that differ are random, or depend on the rest of their batch. Where the model does not take so few examples or has
    no forward mode, `EmbeddedOutputs.survey` looks at it in more evaluations, and words what is wrong.

    Raises:
        ValueError: See `EmbeddedOutputs.survey`.
        NotFiniteError: Outputs are finite, their derivative is not.
    """
    first = function.batches.first()
    small = head(first, FEW)
    if small is first:
        return Look(function.survey(theta), None)
    seen: list[tuple[Tensor, ...]] = []
    with function.map.frozen():
        stir(function.map.space.device)
        weights = function.map.named(theta)
        zero = function.map.named(torch.zeros_like(theta))
        try:
            graph = Graph(function.on(small, seen.append), weights, zero)
        except Exception as error:  # whatever it says, the survey says it better
            log.info("the model is looked at in several evaluations: %s", error)
            graph = None
        outputs = () if graph is None else function.map.checked(tuple(f.detach() for f in seen[0]))
    if graph is None:
        return Look(function.survey(theta), None)
    survey = function.counted(theta, first, outputs)
    rules = rules_of(graph, weights, survey)
    check_finite(weights, graph.pull(torch.ones_like(graph.z), keep=False))
    return Look(survey, rules)


def rules_of(graph: Graph, weights: Weights, survey: Survey, *, forward_mode: bool = True) -> Rules:
    """The rules that worked for a graph of some examples, its memory scaled to the first batch."""
    fixed = storages(weights.values())
    held = sum(size for where, size in graph.storages().items() if where not in fixed)
    return Rules(forward_mode, held * survey.rows[0] // graph.z.numel())


def finite(parts: Iterable[Tensor | None]) -> bool:
    """Whether all numbers are finite: a sum is NaN or infinite if one of its terms is."""
    return bool(torch.isfinite(sum((t.sum().double() for t in parts if t is not None), torch.zeros(()))))


def check_finite(weights: Weights, gradient: Iterable[Tensor | None]) -> None:
    """Refuse derivatives that are not finite.

    Raises:
        NotFiniteError: One is not; its parameter is named.
    """
    pairs = list(zip(weights, gradient, strict=True))
    if finite(t for _, t in pairs):
        return
    bad = [name for name, t in pairs if t is not None and not bool(torch.isfinite(t).all())]
    if bad:
        raise NotFiniteError(
            f"model: its outputs are finite, their derivative is not (first in {bad[0]}); look for a square root,"
            " a norm or a division at zero in the forward"
        )
