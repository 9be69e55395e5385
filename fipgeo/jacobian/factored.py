"""The root as factors: activations and output derivatives of every layer, and no differentiation per product."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp

from fipgeo.jacobian.autodiff import pull_back, vectorised
from fipgeo.jacobian.capture import Recorder, Site, Term
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.factors import Block, ConvBlock, EmbeddingBlock, LinearBlock
from fipgeo.jacobian.plan import Plan, Tracing, plan, slow_index, trace
from fipgeo.jacobian.rows import RowMaker
from fipgeo.linalg import LinearOperator

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Segment:
    """The root on consecutive batches whose layers have the same shapes.

    Attributes:
        matrix: Rows for the parameters that are held as rows, `[n * M, columns]`.
        spans: Where these columns lie among the D coordinates, in order.
        blocks: Coordinates, shape and factors of the other parameters.
        examples: n.
        height: M.
    """

    matrix: Tensor
    spans: tuple[slice, ...]
    blocks: tuple[tuple[slice, torch.Size, Block], ...]
    examples: int
    height: int

    def apply(self, x: Tensor) -> Tensor:
        """R x: `[k, D]` to `[k, n * M]`."""
        out = _columns(x, self.spans) @ self.matrix.T if self.matrix.numel() else x.new_zeros(len(x), len(self.matrix))
        for where, shape, block in self.blocks:
            part = block.apply(x[:, where].unflatten(1, shape))
            out += part.reshape(len(self.matrix), len(x)).T
        return out

    def adjoint(self, y: Tensor, out: Tensor) -> None:
        """Add R^T y to `out`: `[k, n * M]` to `[k, D]`."""
        if self.matrix.numel():
            found, start = y @ self.matrix, 0
            for span in self.spans:
                width = span.stop - span.start
                out[:, span] += found[:, start : start + width]
                start += width
        stack = y.view(len(y), self.examples, self.height).permute(1, 2, 0)
        for where, shape, block in self.blocks:
            out[:, where] += block.adjoint(stack).reshape(len(y), shape.numel())

    def num_bytes(self) -> int:
        """Memory held, activations that several layers share counted once."""
        held = {t.data_ptr(): t.nbytes for _, _, block in self.blocks for t in block.tensors()}
        return self.matrix.nbytes + sum(held.values())


def _columns(x: Tensor, spans: tuple[slice, ...]) -> Tensor:
    return x[:, spans[0]] if len(spans) == 1 else torch.cat([x[:, span] for span in spans], -1)


class FactoredRoot(LinearOperator):
    """R = dz/dtheta `[N * M, D]`, held layer by layer in the form that is fastest and fits.

    A linear layer or a convolution is held as its rows, or as two factors (its inputs, and the derivatives by its
    outputs) with which a product costs two forward passes of the layer whatever M is. Embeddings are held as factors;
    scales, shifts, biases and every parameter that no known function uses, as rows. The whole is compared with plain
    differentiation on the first batch, and parameters that disagree become rows.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`.
        survey: Rows and examples of every batch.
        max_bytes: Most memory to hold.

    Raises:
        ValueError: It does not fit, or rows belong to no single example.
    """

    def __init__(self, function: EmbeddedOutputs, theta: Tensor, survey: Survey, *, max_bytes: float) -> None:
        super().__init__((survey.num_rows, len(theta)), dtype=theta.dtype, device=theta.device)
        with function.map.frozen():
            self.segments = tuple(_Builder(function, theta, survey, max_bytes).segments())

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(segment.num_bytes() for segment in self.segments)

    def _apply(self, x: Tensor) -> Tensor:
        return torch.cat([segment.apply(x) for segment in self.segments], -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        out = torch.zeros(len(y), self.shape[1], dtype=self.dtype, device=self.device)
        for segment, part in zip(self.segments, y.split([len(s.matrix) for s in self.segments], -1), strict=True):
            segment.adjoint(part, out)
        return out


class _Builder:
    """Makes the segments of a factored root."""

    def __init__(self, function: EmbeddedOutputs, theta: Tensor, survey: Survey, max_bytes: float) -> None:
        self.function, self.survey, self.max_bytes = function, survey, max_bytes
        self.space = function.map.space
        self.weights = function.map.named(theta)
        self.names = {id(t): name for name, t in self.weights.items()}
        self.shapes = {name: torch.Size(shape) for name, shape in self.space.shapes.items()}
        self.dtype = theta.dtype

    def segments(self) -> Iterator[Segment]:
        """One segment for every run of batches that trace alike."""
        batches = list(self._traced())
        for _, run in groupby(batches, key=lambda item: (item[2] // item[1].examples, _Equal(item[1].signature))):
            yield self._segment(list(run))

    def _traced(self) -> Iterator[tuple[Any, Tracing, int]]:
        function = self.function
        for batch, examples, rows in zip(function.batches, self.survey.examples, self.survey.rows, strict=True):
            yield batch, trace(function, self.weights, batch, examples), rows

    def _segment(self, run: list[tuple[Any, Tracing, int]]) -> Segment:
        excluded: set[str] = set()
        while True:
            height = run[0][2] // run[0][1].examples
            budget = self.max_bytes / self.survey.num_examples
            chosen = plan(run[0][1], self.shapes, height, self.dtype.itemsize, budget, excluded)
            total = sum(tracing.examples for _, tracing, _ in run)
            if chosen.num_bytes > budget:
                raise ValueError(
                    f"max_bytes: the factors of this root take {chosen.num_bytes * self.survey.num_examples:,} bytes,"
                    f" max_bytes is {int(self.max_bytes):,}; raise it, or use engine='autodiff'"
                )
            store = _Store(self, chosen, run[0][1], total, height)
            wrong = self._fill(store, run)
            if not wrong:
                return store.segment()
            log.info("rows are made by plain differentiation for %s, which no layer rule describes", ", ".join(wrong))
            excluded |= wrong

    def _fill(self, store: _Store, run: list[tuple[Any, Tracing, int]]) -> set[str]:
        """Fill a store; the parameters whose factors turned out wrong on the first batch, if any."""
        start = 0
        maker = RowMaker(self.function, self.weights, store.plan.uncovered)
        for batch, tracing, _ in run:
            self._factors(store, batch, tracing, start)
            stop = start + tracing.examples
            if store.plan.uncovered:
                rows = torch.cat(list(maker.blocks(batch, tracing.examples, tracing.examples * store.height)))
                sizes = [self.shapes[name].numel() for name in store.plan.uncovered]
                for name, part in zip(store.plan.uncovered, rows.split(sizes, -1), strict=True):
                    store.put_rows(name, part.unflatten(0, (tracing.examples, -1)), start, 0)
            if start == 0 and (wrong := self._disagreeing(store, batch, tracing)):
                return wrong
            start = stop
        return set()

    def _factors(self, store: _Store, batch: Any, tracing: Tracing, start: int) -> None:
        n, height = tracing.examples, store.height

        def probed(probes: tuple[Tensor, ...]) -> tuple[Tensor, list[Tensor]]:
            with Recorder(self.names, n, probes, tracing.overwritten) as seen:
                z = self.function.on(batch)(self.weights)
            return z, seen.inputs

        some = next(iter(self.weights.values()))
        probes = tuple(torch.zeros(site.shape, dtype=some.dtype, device=some.device) for site in tracing.sites)
        if not probes:
            return
        z, pull, inputs = vjp(probed, probes, has_aux=True)
        if start == 0:
            store.majors = self._majors(tracing, pull, z)
        step = max(1, min(height, int(self.max_bytes / 8 // (sum(p.nbytes for p in probes) + 1))))
        for first in range(0, height, step):
            count = min(step, height - first)
            u = z.new_zeros(count, n, height)
            u[torch.arange(count), :, torch.arange(first, first + count)] = 1.0
            gradients = _pulled(pull, u.flatten(1))
            for place, site in enumerate(tracing.sites):
                if store.majors[place] is not None:
                    store.put(place, site, gradients[place], inputs, n, start, first)

    def _majors(self, tracing: Tracing, pull: Callable, z: Tensor) -> list[bool | None]:
        """For every site, how the examples lie in its output (see `slow_index`)."""
        u = torch.zeros_like(z).view(tracing.examples, -1)
        ramp = torch.linspace(-1.0, 1.3, u.shape[1], dtype=z.dtype, device=z.device)
        ends = [
            pull(u.index_fill(0, torch.tensor([i], device=z.device), 1.0).mul(ramp).flatten())[0]
            for i in (0, len(u) - 1)
        ]
        return [slow_index(site, a, b, tracing.examples) for site, a, b in zip(tracing.sites, *ends, strict=True)]

    def _disagreeing(self, store: _Store, batch: Any, tracing: Tracing) -> set[str]:
        """Parameters whose part of R^T u differs from the pullback's, for one u on the first batch."""
        z, pull = pull_back(self.function.on(batch), self.weights)
        u = torch.linspace(-1.0, 1.3, z.numel(), dtype=z.dtype, device=z.device).cos()
        expected = pull(u)[0]
        first = store.segment(tracing.examples)
        found = torch.zeros(1, self.space.dim, dtype=self.dtype, device=z.device)
        first.adjoint(u[None].to(self.dtype), found)
        coarse = 8 * max(torch.finfo(t.dtype).eps for t in self.weights.values())
        scale = max(float(t.norm()) for t in expected.values())
        wrong = set()
        for name, part in self.space.unravel(found[0]).items():
            want = expected[name].to(part.dtype)
            if float((part - want).norm()) > max(1e-4, coarse) * (float(want.norm()) + 1e-2 * scale):
                wrong.add(name)
        if wrong & set(store.plan.uncovered):
            raise ValueError("engine: the rows of this model belong to no single example; use engine='autodiff'")
        return wrong


def _pulled(pull: Callable, u: Tensor) -> tuple[Tensor, ...]:
    """Gradients by the probes for a stack of cotangents, `[c, n * M]`."""
    try:
        return vectorised(lambda one: pull(one)[0])(u)  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        log.info("factors are made one output at a time, since the model cannot be vectorised: %s", error)
        return tuple(map(torch.stack, zip(*(pull(one)[0] for one in u), strict=True)))


class _Equal:
    """A value for `groupby` to compare, whatever is in it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Equal) and self.value == other.value


class _Store:
    """Memory for one segment, filled piece by piece."""

    def __init__(self, builder: _Builder, chosen: Plan, tracing: Tracing, examples: int, height: int) -> None:
        self.plan, self.height, self.examples, self.shapes = chosen, height, examples, builder.shapes
        self.dtype, self.device = builder.dtype, builder.space.device
        self.slices = builder.space.slices()
        self.majors: list[bool | None] = []
        plain = {name for (_, name), form in chosen.chosen.items() if not form.factored} | set(chosen.uncovered)
        self.columns: dict[str, slice] = {}
        width = 0
        for name, shape in self.shapes.items():
            if name in plain:
                self.columns[name] = slice(width, width + shape.numel())
                width += shape.numel()
        self.matrix = torch.zeros(examples, height, width, dtype=self.dtype, device=self.device)
        self.second: dict[tuple[int, str], Tensor] = {}
        self.first: dict[tuple[int, bool], Tensor] = {}
        self.used: dict[tuple[int, str], tuple[Site, Term]] = {}

    def put(
        self, place: int, site: Site, gradient: Tensor, inputs: list[Tensor], n: int, start: int, first: int
    ) -> None:
        """Take the derivatives by one site's output, `[c, *shape]`, of n examples, for outputs from `first` on."""
        major = bool(self.majors[place])
        b = site.arranged(gradient, n, 1, major=major).transpose(0, 1).to(self.dtype)  # [n, c, q, *trail]
        for term in site.terms:
            form = self.plan.chosen.get((place, term.name))
            if form is None:
                continue
            if term.kind in ("scale", "shift"):
                part = b
                if term.kind == "scale":
                    part = b * site.arranged(inputs[term.source], n, major=major).to(self.dtype)[:, None]
                self.put_rows(term.name, _reduced(part, term.aligned), start, first)
                continue
            x = self._activation(site, term, inputs[term.source], n, major)
            c = b
            if term.kind == "embedding" and term.options["padding_idx"] is not None:
                c = b * (x != term.options["padding_idx"])[:, None, :, None]
            if form.factored:
                self._put_factors(place, site, term, x, c, start, first, n)
            else:
                block = self._block(term, x, c)
                rows = block.rows(0, block.features).view(n, c.shape[1], -1)
                if term.options.get("transposed"):
                    i, o = self.shapes[term.name]
                    rows = rows.unflatten(-1, (o, i)).transpose(-1, -2).flatten(-2)
                self.put_rows(term.name, rows, start, first)

    def put_rows(self, name: str, rows: Tensor, start: int, first: int) -> None:
        """Add rows `[n, c, columns]` of a parameter."""
        self.matrix[start : start + len(rows), first : first + rows.shape[1], self.columns[name]] += rows

    def _activation(self, site: Site, term: Term, x: Tensor, n: int, major: bool) -> Tensor:
        trail = {"linear": 1, "embedding": 0}.get(term.kind, site.trail)
        x = site.arranged(x, n, major=major, trail=trail)
        if term.kind == "conv":
            x = x.flatten(0, 1)
        return x if term.kind == "embedding" else x.to(self.dtype)

    def _put_factors(
        self, place: int, site: Site, term: Term, x: Tensor, b: Tensor, start: int, first: int, n: int
    ) -> None:
        key = place, term.name
        if key not in self.second:
            self.used[key] = site, term
            self.second[key] = b.new_zeros(self.examples, self.height, *b.shape[2:])
        source = term.source, bool(self.majors[place])
        share = len(x) // n
        if source not in self.first:
            self.first[source] = x.new_zeros(self.examples * share, *x.shape[1:])
        if first == 0:
            self.first[source][start * share : start * share + len(x)] = x
        self.second[key][start : start + n, first : first + b.shape[1]] = b

    def _block(self, term: Term, x: Tensor, b: Tensor) -> Block:
        shape = self.shapes[term.name]
        if term.kind == "conv":
            return ConvBlock(x, b, tuple(shape[2:]), term.options)
        if term.kind == "embedding":
            return EmbeddingBlock(x, b, shape[0])
        return LinearBlock(x, b, bool(term.options.get("transposed")))

    def segment(self, examples: int | None = None) -> Segment:
        """What was filled in, or its first examples."""
        n = self.examples if examples is None else examples
        spans: list[slice] = []
        for name in self.columns:
            here = self.slices[name]
            if spans and spans[-1].stop == here.start:
                spans[-1] = slice(spans[-1].start, here.stop)
            else:
                spans.append(here)
        blocks = []
        for key, (_, term) in self.used.items():
            x = self.first[term.source, bool(self.majors[key[0]])]
            block = self._block(term, x[: n * (len(x) // self.examples)], self.second[key][:n])
            blocks.append((self.slices[term.name], self.shapes[term.name], block))
        return Segment(self.matrix[:n].flatten(0, 1), tuple(spans), tuple(blocks), n, self.height)


def _reduced(part: Tensor, aligned: tuple[int, ...]) -> Tensor:
    """Sum `[n, c, q, *trail]` over positions and over axes along which the parameter is repeated: `[n, c, columns]`."""
    part = part.sum(2)
    trail = part.dim() - 2
    for axis, size in enumerate((1,) * (trail - len(aligned)) + aligned):
        if size == 1 and part.shape[2 + axis] != 1:
            part = part.sum(2 + axis, keepdim=True)
    return part.flatten(2)
