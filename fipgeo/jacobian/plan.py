"""What the factored root holds for every parameter, and what that takes: decided before anything is made."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.jacobian.capture import Recorder, Site, Term
from fipgeo.jacobian.embedded import EmbeddedOutputs, Weights

BYTE = 10
"""Floating-point operations that take as long as moving one byte: about the same on CPUs and GPUs."""

STACK = 4
"""The stack of vectors that the choice between rows and factors has in mind."""


@dataclass(frozen=True)
class Tracing:
    """The sites of one batch.

    Attributes:
        sites: In the order in which the forward pass meets them.
        overwritten: Activations that the model changes in place later.
        examples: n.
    """

    sites: tuple[Site, ...]
    overwritten: frozenset[int]
    examples: int

    @property
    def signature(self) -> tuple:
        """Equal for batches whose factors can be put together: all but the number of examples."""
        n = self.examples
        return tuple((site.terms, site.trailing, site.numel // (n * math.prod(site.trailing))) for site in self.sites)


def trace(function: EmbeddedOutputs, weights: Weights, batch: object, examples: int) -> Tracing:
    """Run the model once and list its sites; inside `function.map.frozen()`."""
    names = {id(t): name for name, t in weights.items()}
    with Recorder(names, examples) as seen:
        function.on(batch)(weights)
    return Tracing(tuple(seen.sites), seen.overwritten(), examples)


@dataclass(frozen=True)
class Form:
    """How one term is held: as rows, or as factors.

    Attributes:
        factored: Whether factors are held.
        num_bytes: Memory for one example.
        flops: Operations of one product R^T R v for one example and vector.
    """

    factored: bool
    num_bytes: int
    flops: int

    @property
    def cost(self) -> int:
        """Operations for one vector of a stack, memory traffic included."""
        return self.flops + 2 * BYTE * self.num_bytes // STACK


def forms(site: Site, term: Term, shape: torch.Size, examples: int, rows: int, itemsize: int) -> list[Form]:
    """The ways to hold a term, with `rows` rows an example."""
    size, outputs = shape.numel(), site.numel // examples
    plain = Form(False, rows * size * itemsize, 4 * rows * size)
    if term.kind in ("scale", "shift"):
        return [plain]
    positions = outputs // math.prod(site.trailing)
    if term.kind == "embedding":
        return [Form(True, (rows * outputs) * itemsize + 8 * positions, 4 * rows * outputs)]
    if term.kind == "linear":
        inputs, work = positions * (size // site.shape[-1]), positions * size
    else:
        spatial = math.prod(site.trailing[1:])
        inputs = positions * shape[1] * term.options["groups"] * spatial * math.prod(term.options["stride"])
        work = positions * spatial * size
    return [plain, Form(True, (rows * outputs + inputs) * itemsize, 4 * work + 4 * rows * outputs)]


Key = tuple[int, str]
"""A term: the place of its site and the parameter's name."""


@dataclass(frozen=True)
class Plan:
    """The form of every term, and what the whole takes.

    Attributes:
        chosen: The forms.
        uncovered: Parameters with no site, whose rows come from plain differentiation.
        num_bytes: Memory for one example, all parameters together.
        flops: Operations of one product R^T R v for one example and vector.
    """

    chosen: Mapping[Key, Form]
    uncovered: tuple[str, ...]
    num_bytes: int
    flops: int

    @property
    def cost(self) -> int:
        """Operations of a product for one example and one vector of a stack, memory traffic included."""
        return self.flops + 2 * BYTE * self.num_bytes // STACK


def plan(
    tracing: Tracing,
    shapes: Mapping[str, torch.Size],
    rows: int,
    itemsize: int,
    budget: float,
    excluded: Collection[str] = (),
) -> Plan:
    """The fastest forms that keep `budget` bytes an example; the smallest ones where nothing does.

    Args:
        tracing: The sites of a batch.
        shapes: Shapes of the parameters by name.
        rows: M.
        itemsize: Bytes of a number.
        budget: Bytes for one example.
        excluded: Parameters whose sites are not to be used.
    """
    options: dict[Key, list[Form]] = {}
    for place, site in enumerate(tracing.sites):
        for term in site.terms:
            if term.name not in excluded:
                shape = torch.Size(shapes[term.name])
                options[place, term.name] = forms(site, term, shape, tracing.examples, rows, itemsize)
    covered = {name for _, name in options}
    uncovered = tuple(name for name in shapes if name not in covered)
    chosen = {key: min(found, key=lambda form: form.cost) for key, found in options.items()}
    left = rows * itemsize * sum(torch.Size(shapes[name]).numel() for name in uncovered)
    saving = {key: form.num_bytes - min(f.num_bytes for f in options[key]) for key, form in chosen.items()}
    total = left + sum(form.num_bytes for form in chosen.values())
    for key in sorted(saving, key=lambda key: -saving[key]):
        if total <= budget or not saving[key]:
            break
        chosen[key] = min(options[key], key=lambda form: form.num_bytes)
        total -= saving[key]
    flops = 4 * left // itemsize + sum(form.flops for form in chosen.values())
    return Plan(chosen, uncovered, total, flops)


def slow_index(site: Site, first: Tensor, last: Tensor, examples: int) -> bool | None:
    """Whether the examples are the slow index of the leading axes, or (False) the fast one; None for neither.

    Args:
        site: The site.
        first: Derivative by its output of a function of the first example's outputs.
        last: The same for the last example.
        examples: n.
    """
    for major in (True, False):
        elsewhere = site.arranged(first, examples, major=major)[1:], site.arranged(last, examples, major=major)[:-1]
        if not any(bool(part.any()) for part in elsewhere):
            return major
    return None
