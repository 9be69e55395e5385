"""What the factored root holds for every parameter, and what that takes: decided before anything is made."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.jacobian.embedded import EmbeddedOutputs, Weights
from fipgeo.jacobian.factored.capture import Recorder, Site, Term

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
        outside: Parameters that are used elsewhere, too.
    """

    sites: tuple[Site, ...]
    overwritten: frozenset[int]
    examples: int
    outside: frozenset[str] = frozenset()

    @property
    def signature(self) -> tuple:
        """Equal for batches whose factors can be put together: all but the number of examples."""
        n = self.examples
        sites = ((site.terms, site.trailing, site.numel // (n * math.prod(site.trailing))) for site in self.sites)
        return self.outside, *sites


class Same:
    """A value that `groupby` can compare, whatever is in it."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value == other.value


def trace(
    function: EmbeddedOutputs, weights: Weights, batch: object, examples: int, names: Mapping[int, str] | None = None
) -> Tracing:
    """Run the model once and list its sites; inside `function.map.frozen()`.

    Args:
        function: z on fixed inputs.
        weights: The point by name.
        batch: The inputs.
        examples: n.
        names: Names by `id` of the weights to look for; None for all.
    """
    return traced(function, weights, batch, examples, names)[0]


def traced(
    function: EmbeddedOutputs, weights: Weights, batch: object, examples: int, names: Mapping[int, str] | None = None
) -> tuple[Tracing, Tensor]:
    """As `trace`, with z from the same evaluation."""
    names = {id(t): name for name, t in weights.items()} if names is None else names
    with Recorder(names, examples) as seen:
        z = function.on(batch)(weights)
    return Tracing(tuple(seen.sites), seen.overwritten(), examples, frozenset(seen.outside)), z


@dataclass(frozen=True)
class Form:
    """How one term is held: as rows, or as factors.

    Attributes:
        factored: Whether factors are held.
        num_bytes: Memory for one example.
        flops: Operations of one product R^T R v for one example and vector.
        pair: Operations of the inner product of two rows.
    """

    factored: bool
    num_bytes: int
    flops: int
    pair: int

    @property
    def cost(self) -> int:
        """Operations for one vector of a stack, memory traffic included."""
        return self.flops + 2 * BYTE * self.num_bytes // STACK


def forms(site: Site, term: Term, shape: torch.Size, examples: int, rows: int, itemsize: int) -> list[Form]:
    """The ways to hold a term, with `rows` rows an example."""
    size, outputs = shape.numel(), site.numel // examples
    plain = Form(False, rows * size * itemsize, 4 * rows * size, 2 * size)
    if term.kind in ("scale", "shift"):
        return [plain]
    if term.kind == "embedding":
        return [Form(True, (rows * outputs) * itemsize + 8 * term.inputs, 4 * rows * outputs, 2 * size)]
    # every output meets as many weights as there are for one feature
    work = outputs * size // site.trailing[0]
    pair = 2 * outputs if term.kind == "linear" and outputs == site.trailing[0] else 2 * size
    return [plain, Form(True, (rows * outputs + term.inputs) * itemsize, 4 * work + 4 * rows * outputs, pair)]


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
        pair: Operations of the inner product of two rows.
    """

    chosen: Mapping[Key, Form]
    uncovered: tuple[str, ...]
    num_bytes: int
    flops: int
    pair: int

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
    uses: dict[str, dict[Key, list[Form]]] = {}
    shapes = {name: torch.Size(shape) for name, shape in shapes.items() if torch.Size(shape).numel()}
    for place, site in enumerate(tracing.sites):
        for term in site.terms:
            if term.name in shapes and term.name not in excluded and term.name not in tracing.outside:
                found = forms(site, term, shapes[term.name], tracing.examples, rows, itemsize)
                uses.setdefault(term.name, {})[place, term.name] = found
    ways = {name: found for name in uses if (found := _ways(uses[name]))}
    chosen = {name: min(found, key=_cost) for name, found in ways.items()}
    least = {name: min(found, key=_bytes) for name, found in ways.items()}
    uncovered = tuple(name for name in shapes if name not in ways)
    left = rows * itemsize * sum(shapes[name].numel() for name in uncovered)
    saving = {name: _bytes(way) - _bytes(least[name]) for name, way in chosen.items()}
    total = left + sum(map(_bytes, chosen.values()))
    for name in sorted(saving, key=lambda name: -saving[name]):
        if total <= budget or not saving[name]:
            break
        chosen[name] = least[name]
        total -= saving[name]
    held = {key: form for way in chosen.values() for key, form in way.items()}
    for key in _beside(tracing, shapes, held):
        total -= held[key].num_bytes
        held[key] = replace(held[key], factored=True, num_bytes=0, pair=0)
    flops = 4 * left // itemsize + sum(form.flops for form in held.values())
    pair = 2 * left // (rows * itemsize) + sum(form.pair for form in held.values())
    return Plan(held, uncovered, total, flops, pair)


Way = Mapping[Key, Form]
"""How all uses of one parameter are held."""


def _ways(uses: Mapping[Key, list[Form]]) -> list[Way]:
    """All uses as rows, which add up to those of one use, or all as factors: never some so and some so."""
    rows = {key: form for key, forms in uses.items() for form in forms if not form.factored}
    factors = {key: form for key, forms in uses.items() for form in forms if form.factored}
    first = next(iter(uses))
    summed = {key: form if key == first else Form(False, 0, 0, 0) for key, form in rows.items()}
    return [way for way in (summed, factors) if len(way) == len(uses)]


def _beside(tracing: Tracing, shapes: Mapping[str, torch.Size], held: Mapping[Key, Form]) -> Iterator[Key]:
    """Biases whose rows are the second factor of the weight beside them: layers with one position an example."""
    uses = Counter(name for _, name in held)
    for place, site in enumerate(tracing.sites):
        weights = [term for term in site.terms if term.kind == "linear" and (place, term.name) in held]
        if len(weights) != 1 or not held[place, weights[0].name].factored:
            continue
        for term in site.terms:
            single = term.kind == "shift" and uses[term.name] == 1 and (place, term.name) in held
            if single and shapes[term.name].numel() * tracing.examples == site.numel:
                yield place, term.name


def _bytes(way: Way) -> int:
    return sum(form.num_bytes for form in way.values())


def _cost(way: Way) -> int:
    return sum(form.cost for form in way.values())


def slow_index(site: Site, first: Tensor, last: Tensor, examples: int) -> bool | None:
    """Whether the examples are the slow index of the leading axes, or (False) the fast one; None for neither.

    Args:
        site: The site.
        first: Derivative by its output of a function of the first example's outputs.
        last: The same for the last example.
        examples: n.
    """
    fitting = []
    for major in (True, False):
        elsewhere = site.arranged(first, examples, major=major)[1:], site.arranged(last, examples, major=major)[:-1]
        if not any(bool(part.any()) for part in elsewhere):
            fitting.append(major)
    if len(fitting) == 2:  # a single example, or no derivative at all: only the shape can tell
        lead = site.shape[: len(site.shape) - site.trail]
        return not lead or lead[0] == examples or lead[-1] != examples
    return fitting[0] if fitting else None
