"""Making the factors: the data in pieces, each differentiated by the outputs of its sites."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks

from fipgeo.data import TensorBatches
from fipgeo.jacobian.autodiff import pull_back, vectorised
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.factored.capture import Recorder
from fipgeo.jacobian.factored.plan import Same, Tracing, plan, slow_index, trace, traced
from fipgeo.jacobian.factored.segment import Segment
from fipgeo.jacobian.factored.store import Store
from fipgeo.jacobian.graphs import HOOKS
from fipgeo.jacobian.rows import RowMaker, as_tree
from fipgeo.trees import head

log = logging.getLogger(__name__)

SMALL = 2**17
"""On CPUs, cotangents are pulled back together as long as one of them has at most so many numbers to be taken by."""

FEW = 4
"""Examples that are looked at in the place of all."""


class _UnlikeError(Exception):
    """A piece did not do what the few examples did that were to stand for it."""


@dataclass(frozen=True)
class _Piece:
    """Examples that are differentiated together.

    Attributes:
        batch: The inputs.
        examples: How many they are.
        tracing: The sites of these examples, or of a few of them.
        few: A few of these examples on which the layouts and the rows are checked; the batch itself to check on all.
        height: Rows of one example.
        origin: The batch that they are part of.
    """

    batch: Any
    examples: int
    tracing: Tracing
    few: Any
    height: int
    origin: int


class Builder:
    """Makes the segments of a factored root.

    Examples are taken a few at a time, so that what is in flight fits `max_bytes` eight times (and the caches of a
    CPU). The first few are traced, and compared with plain differentiation, in the place of all; if others then turn
    out not to be like them, everything is made again with every piece traced and the whole first piece compared.
    """

    def __init__(
        self, function: EmbeddedOutputs, theta: Tensor, survey: Survey, max_bytes: float, names: Collection[str]
    ) -> None:
        self.function, self.survey, self.max_bytes = function, survey, max_bytes
        self.space, self.dtype = function.map.space, theta.dtype
        # autograd takes no tensor that was made in inference mode
        self.weights = function.map.named(theta.clone() if theta.is_inference() else theta)
        self.shapes = {n: torch.Size(shape) for n, shape in self.space.shapes.items() if not names or n in names}
        self.names = {id(t): name for name, t in self.weights.items() if name in self.shapes}
        self.quick = True
        self.outputs: dict[int, dict[int, Tensor]] = {}

    def segments(self) -> list[Segment]:
        """One segment for every run of pieces that trace alike."""
        try:
            return self._segments()
        except (_UnlikeError, ValueError) as error:  # whether it is one is for the whole pieces to say
            log.info("every piece is looked at, since a few examples do not stand for all: %s", error)
        self.quick = False
        return self._segments()

    def _segments(self) -> list[Segment]:
        self.outputs = {}
        pieces = list(self._pieces())
        runs = groupby(pieces, key=lambda piece: Same((piece.height, piece.tracing.signature)))
        out = [self._segment(list(run)) for _, run in runs]
        for origin, batch in enumerate(self.function.batches) if self.quick else ():
            parts = self.outputs.get(origin, {})
            if len(parts) > 1:
                self._check_apart(batch, torch.cat([parts[start] for start in sorted(parts)]))
        return out

    def _pieces(self) -> Iterator[_Piece]:
        function, counts = self.function, zip(self.survey.examples, self.survey.rows, strict=True)
        for origin, (batch, (examples, rows)) in enumerate(zip(function.batches, counts, strict=True)):
            height = rows // examples
            few, tracing = self._few(batch, examples)
            step = examples if tracing is None else self._step(tracing, examples, height)
            parts = [batch] if step >= examples else list(TensorBatches(as_tree(batch), step))
            sizes = [min(step, examples - start) for start in range(0, examples, step)]
            if self.quick and tracing is not None:
                for part, size in zip(parts, sizes, strict=True):
                    yield _Piece(part, size, tracing, few if part is parts[0] and size > FEW else part, height, origin)
                continue
            found = [traced(function, self.weights, p, size, self.names) for p, size in zip(parts, sizes, strict=True)]
            if len(parts) > 1:
                self._check_apart(batch, torch.cat([z for _, z in found]))
            for part, size, (own, _) in zip(parts, sizes, found, strict=True):
                yield _Piece(part, size, own, part, height, origin)

    def _check_apart(self, batch: Any, split: Tensor) -> None:
        """Refuse a batch whose outputs are others when its examples come a few at a time."""
        whole = self.function.on(batch)(self.weights)
        coarse = max(1e-4, 8 * max(torch.finfo(t.dtype).eps for t in self.weights.values()))
        if split.shape != whole.shape or float((split - whole).abs().max()) > coarse * float(whole.abs().max()):
            raise ValueError("engine: an output of this model depends on the other examples of its batch")

    def _few(self, batch: Any, examples: int) -> tuple[Any, Tracing | None]:
        """The first examples and their sites; the batch and None where it cannot be cut."""
        few = min(examples, FEW)
        try:
            if len(TensorBatches(as_tree(batch))) != examples:
                return batch, None
            some = head(batch, few)
            return some, trace(self.function, self.weights, some, few, self.names)
        except Exception as error:  # whatever a model says to a smaller batch, the whole one is at hand
            log.info("batches stay whole, since the model does not take pieces of them: %s", error)
            return batch, None

    def _step(self, tracing: Tracing, examples: int, height: int) -> int:
        """How many examples to take at a time."""
        each = height * self.dtype.itemsize * sum(site.numel for site in tracing.sites) // tracing.examples
        return max(1, min(examples, int(self.max_bytes / 8 // (each + 1))))

    def _segment(self, run: list[_Piece]) -> Segment:
        total, height, tracing = sum(p.examples for p in run), run[0].height, run[0].tracing
        budget = self.max_bytes / self.survey.num_examples
        excluded: set[str] = set()
        while True:
            chosen = plan(tracing, self.shapes, height, self.dtype.itemsize, budget, excluded)
            if chosen.num_bytes > budget:
                raise ValueError(
                    f"max_bytes: the factors of this root take {chosen.num_bytes * self.survey.num_examples:,} bytes,"
                    f" max_bytes is {int(self.max_bytes):,}; raise it, or use engine='autodiff'"
                )
            store = Store(self.space, self.dtype, chosen, tracing.sites, total, height)
            wrong = self._fill(store, run)
            if not wrong:
                return store.segment()
            log.info("rows come from plain differentiation for %s, which no layer rule describes", ", ".join(wrong))
            excluded |= wrong

    def _fill(self, store: Store, run: list[_Piece]) -> set[str]:
        """Fill a store; the parameters whose factors turned out wrong on the first piece, if any."""
        counts = [piece.examples for piece in run]
        starts = [sum(counts[:i]) for i in range(len(run))]
        maker = RowMaker(self.function, self.weights, store.plan.uncovered)
        # the largest piece comes first: a single example shows neither layouts nor whether examples interact
        for place, i in enumerate(sorted(range(len(run)), key=lambda i: -counts[i])):
            piece, n, start = run[i], counts[i], starts[i]
            if place == 0 and piece.tracing.sites:
                store.decide(self._layouts(piece))
            self._factors(store, piece, start)
            if store.plan.uncovered:
                rows = torch.cat(list(maker.blocks(piece.batch, n, n * store.height)))
                sizes = [self.shapes[name].numel() for name in store.plan.uncovered]
                for name, part in zip(store.plan.uncovered, rows.split(sizes, -1), strict=True):
                    store.put_rows(name, part.unflatten(0, (n, -1)), start, 0)
            if place == 0 and (wrong := self._disagreeing(store, piece, start)):
                return wrong
        return set()

    def _recorded(self, batch: Any, examples: int, tracing: Tracing) -> tuple[Tensor, list[Tensor], Recorder]:
        """The outputs with their graph, the probes and the activations of some examples."""
        probes: list[Tensor] = []
        with (
            torch.enable_grad(),
            disable_saved_tensors_hooks(HOOKS),
            Recorder(self.names, examples, probes, tracing.overwritten) as seen,
        ):
            z = self.function.on(batch)(self.weights)
        own = Tracing(tuple(seen.sites), seen.overwritten(), examples, frozenset(seen.outside))
        if own.signature != tracing.signature or own.overwritten != tracing.overwritten:
            raise _UnlikeError("they call other functions of the weights")
        return z, probes, seen

    def _layouts(self, piece: _Piece) -> list[bool | None]:
        """For every site, how the examples lie in its output (see `slow_index`)."""
        n = piece.examples if piece.few is piece.batch else FEW
        z, probes, seen = self._recorded(piece.few, n, piece.tracing)
        u = torch.zeros_like(z, requires_grad=False).view(n, -1)
        ramp = torch.linspace(-1.0, 1.3, u.shape[1], dtype=z.dtype, device=z.device)
        ends = [torch.tensor([i], device=z.device) for i in (0, n - 1)]
        first, last = (_pull(z, probes, u.index_fill(0, end, 1.0).mul(ramp).flatten()) for end in ends)
        return [slow_index(site, a, b, n) for site, a, b in zip(seen.sites, first, last, strict=True)]

    def _factors(self, store: Store, piece: _Piece, start: int) -> None:
        """Differentiate the outputs of one piece by the outputs of its sites."""
        n, height = piece.examples, store.height
        if not piece.tracing.sites:
            if self.quick and piece.few is not piece.batch:
                raise _UnlikeError("no function of the weights is known")
            return
        z, probes, seen = self._recorded(piece.batch, n, piece.tracing)
        self.outputs.setdefault(piece.origin, {})[start] = z.detach()
        inputs = [x.detach() for x in seen.inputs]
        step = max(1, min(height, int(self.max_bytes / 8 // (sum(p.nbytes for p in probes) + 1))))
        for first in range(0, height, step):
            count = min(step, height - first)
            u = z.new_zeros(count, n, height)
            u[torch.arange(count), :, torch.arange(first, first + count)] = 1.0
            gradients = _pulled(z, probes, u.flatten(1))
            for place, site in enumerate(seen.sites):
                if store.majors[place] is not None:
                    store.put(place, site, gradients[place], inputs, n, start, first)

    def _disagreeing(self, store: Store, piece: _Piece, start: int) -> set[str]:
        """Parameters whose part of R^T u differs from the pullback's, for one u on the first piece."""
        z, pull = pull_back(self.function.on(piece.few), self.weights)
        u = torch.linspace(-1.0, 1.3, z.numel(), dtype=z.dtype, device=z.device).cos()
        expected = pull(u)[0]
        found = torch.zeros(1, self.space.dim, dtype=self.dtype, device=z.device)
        store.segment(len(u) // store.height, start).adjoint(u[None].to(self.dtype), found)
        coarse = 8 * max(torch.finfo(t.dtype).eps for t in self.weights.values())
        scale = max(float(expected[name].norm()) for name in self.shapes)
        wrong = set()
        for name, part in self.space.unravel(found[0]).items():
            want = expected[name].to(part.dtype)
            if name in self.shapes and float((part - want).norm()) > max(1e-4, coarse) * (
                float(want.norm()) + 1e-2 * scale
            ):
                wrong.add(name)
        if wrong and piece.few is not piece.batch:
            raise _UnlikeError(f"rows of {', '.join(wrong)} differ")
        if wrong & set(store.plan.uncovered):
            raise ValueError("engine: the rows of this model belong to no single example; use engine='autodiff'")
        return wrong


def _pull(z: Tensor, probes: Sequence[Tensor], u: Tensor) -> tuple[Tensor, ...]:
    """Gradients of `u^T z` by the probes."""
    if not z.requires_grad:
        return tuple(torch.zeros_like(p, requires_grad=False) for p in probes)
    return torch.autograd.grad(z, probes, u.view_as(z), retain_graph=True, allow_unused=True, materialize_grads=True)


def _pulled(z: Tensor, probes: Sequence[Tensor], u: Tensor) -> list[Sequence[Tensor]]:
    """Gradients by every probe for a stack of cotangents, `[c, n * M]`, in stacks: together where that saves calls."""
    if u.device.type != "cpu" or sum(p.numel() for p in probes) <= SMALL:
        try:
            found = vectorised(lambda one: _pull(z, probes, one))(u)
            return [[gradients] for gradients in found]
        except (RuntimeError, ValueError) as error:
            log.info("factors are made one output at a time, since the model cannot be vectorised: %s", error)
    return list(zip(*([g[None] for g in _pull(z, probes, one)] for one in u), strict=True))
