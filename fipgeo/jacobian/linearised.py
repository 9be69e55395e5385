"""The root with its forward pass done once: what every batch's derivative needs is kept, products reuse it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp

from fipgeo.jacobian.autodiff import vectorised
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.jacobian.graphs import Function, Graph, push_dual, put, saved, storages
from fipgeo.jacobian.tape import Tape
from fipgeo.linalg import LinearOperator, as_generator
from fipgeo.trees import copied

log = logging.getLogger(__name__)

RUNGS = ("tape", "double backward", "plain")
"""How tangents are pushed forward, best first."""

SMALL = 2**26
"""Vectors go through several at once while what they need together stays below; larger problems gain nothing by it."""

SHARE = 1.4
"""Kept activations against those of the graph alone: what the tape cannot share with it (measured 1.1 to 1.5)."""

Push = Callable[..., Tensor]


def kept_bytes(function: EmbeddedOutputs, theta: Tensor, survey: Survey) -> int:
    """Memory that a `LinearisedRoot` will keep, by one forward pass over the first batch; right within a factor 1.5.

    The weights are kept once, activations of all batches 1.4 times what a backward pass needs.
    """
    weights = function.map.named(theta)
    with function.map.frozen():
        graph = Graph(function.on(function.batches.first()), weights)
        held = graph.storages()
    fixed = storages(weights.values())
    activations = sum(size for where, size in held.items() if where not in fixed)
    return sum(fixed.values()) + int(SHARE * activations * survey.num_rows / survey.rows[0])


class LinearisedRoot(LinearOperator):
    """R = dz/dtheta at a point, `[N * M, D]`, with the forward pass of every batch kept for all further products.

    R^T u goes back through a kept autograd graph. R v replays a tape, the operators that depend on the tangent, about
    2 forward passes each. The tape is checked against forward mode on random tangents, repeatedly, before it is used;
    where it cannot be recorded or disagrees, the next rung serves: the derivative of u -> R^T u (reverse mode twice,
    for modules without forward mode), or forward mode anew. The data are passed over once, at construction, and
    nothing is read from the module afterwards.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`; a copy is kept.
        survey: Rows and examples of every batch.
        chunk: Most vectors that go through at once.
        max_bytes: Most memory that may be kept; None for no limit.
        rungs: Ways that may be tried, out of `RUNGS`, in order.

    Attributes:
        num_bytes: Memory that is kept.
        seconds: Time that the construction took.

    Raises:
        ValueError: More than `max_bytes` would be kept, or a rung is unknown.
        RuntimeError: No rung works.
    """

    def __init__(
        self,
        function: EmbeddedOutputs,
        theta: Tensor,
        survey: Survey,
        *,
        chunk: int = 8,
        max_bytes: int | None = None,
        rungs: Sequence[str] = RUNGS,
    ) -> None:
        super().__init__((survey.num_rows, len(theta)), dtype=theta.dtype, device=theta.device)
        if not rungs or set(rungs) - set(RUNGS):
            raise ValueError(f"rungs: got {tuple(rungs)}, expected some of {', '.join(map(repr, RUNGS))}")
        if max_bytes is not None and (needed := kept_bytes(function, theta, survey)) > max_bytes:
            raise ValueError(
                f"max_bytes: {needed / 2**20:.0f} MiB would be kept for {survey.num_examples:,} examples, but at most"
                f" {max_bytes / 2**20:.0f} MiB may; raise max_bytes, use fewer examples, or engine='autodiff'"
            )
        start = time.perf_counter()
        with torch.inference_mode(False):
            weights = {name: t.clone() for name, t in function.map.named(theta.detach()).items()}
        self.survey, self.chunk, self.map = survey, chunk, function.map
        held = _detached_from_module(function, weights)
        with function.map.frozen():
            self.parts = [_Part(held(batch), weights, tuple(rungs), i == 0) for i, batch in enumerate(function.batches)]
        self.num_bytes = sum(storages([*weights.values(), *(t for p in self.parts for t in p.kept())]).values())
        self.seconds = time.perf_counter() - start
        log.info("%s", self.explain())

    @property
    def rung(self) -> str:
        """How tangents are pushed forward; the slowest way if batches differ."""
        return max((part.rung for part in self.parts), key=RUNGS.index)

    def explain(self) -> str:
        """What is in use, what it keeps, and what it cost."""
        count = len(self.parts)
        return (
            f"linearised root: {self.shape[0]:,} rows x {self.shape[1]:,} weights in {count} batch{'es' * (count > 1)};"
            f" R v by {self.rung}, R^T u by kept graphs; {self.num_bytes / 2**20:.1f} MiB kept,"
            f" {self.seconds:.2f} s to set up"
        )

    @cached_property
    def at_once(self) -> int:
        """Vectors that go through at once: `chunk` for small problems that can be vectorised, else 1."""
        single = self.num_bytes // len(self.parts) + self.shape[1] * torch.finfo(self.dtype).bits // 8
        width = min(self.chunk, SMALL // (single + 1))
        if width < 2 or self.rung == "plain":
            return 1
        try:
            right = all(self._stacks_agree(part) for part in {part.graph.z.shape: part for part in self.parts}.values())
        except (RuntimeError, NotImplementedError, ValueError) as error:
            log.info("products are taken one vector at a time, since the model cannot be vectorised: %s", error)
            return 1
        return width if right else 1

    def _stacks_agree(self, part: _Part) -> bool:
        """Whether two vectors at once give what they give one by one."""
        x = torch.randn(2, self.shape[1], generator=as_generator(1)).to(self.device, self.dtype)
        tangents = list(self.map.named(x).values())
        expected = torch.stack([part.push(*(t[i] for t in tangents)) for i in range(2)])
        pairs = [(part.push_stack(tangents), expected)]
        for pulled, alone in zip(part.pull_stack(expected), part.graph.pull(expected[1]), strict=True):
            if pulled is not None and alone is not None:
                pairs.append((pulled[1], alone))
        return all(_agree(a, b) for a, b in pairs)

    def _apply(self, x: Tensor) -> Tensor:
        with self._quiet(len(x)) as width:
            return torch.cat([self._push(part, x, width) for part in self.parts], -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        with self._quiet(len(y)) as width:
            out = torch.empty(len(y), self.shape[1], dtype=self.dtype, device=self.device)
            for place, (part, u) in enumerate(zip(self.parts, y.split(self.survey.rows, -1), strict=True)):
                self._pull(part, u, out, width, add=place > 0)
        return out

    def _normal(self, x: Tensor) -> Tensor:
        return self._scaled_normal(x, 1.0)

    def _scaled_normal(self, x: Tensor, scale: float) -> Tensor:
        with self._quiet(len(x)) as width:
            out = torch.empty(len(x), self.shape[1], dtype=self.dtype, device=self.device)
            for place, part in enumerate(self.parts):
                self._pull(part, scale * self._push(part, x, width), out, width, add=place > 0)
        return out

    def _push(self, part: _Part, x: Tensor, width: int) -> Tensor:
        """J x for one batch: `[k, D]` to `[k, rows]`."""
        if width > 1:
            return torch.cat([part.push_stack(list(self.map.named(v).values())) for v in x.split(width)])
        return torch.stack([part.push(*self.map.named(v).values()) for v in x])

    def _pull(self, part: _Part, u: Tensor, out: Tensor, width: int, *, add: bool) -> None:
        """J^T u for one batch, u `[k, rows]`, into out `[k, D]`, or added to it."""
        for start in range(0, len(u), width):
            if width > 1:
                views = self.map.space.unravel(out[start : start + width])
                put(views, part.pull_stack(u[start : start + width]), add)
            else:
                put(self.map.space.unravel(out[start]), part.graph.pull(u[start]), add)

    @contextmanager
    def _quiet(self, count: int) -> Iterator[int]:
        """Nothing recorded or cast, the module prepared if it is called at all; gives vectors to take at once."""
        with ExitStack() as stack:
            if self.rung == "plain":
                stack.enter_context(self.map.frozen())
            stack.enter_context(torch.autocast(self.device.type, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            yield self.at_once if count > 1 else 1


class _Part:
    """One batch: its graph, and the first way to push tangents forward that proves right."""

    def __init__(self, f: Function, weights: Weights, rungs: tuple[str, ...], first: bool) -> None:
        self.graph = Graph(f, weights)
        self.tape: Tape | None = None
        self.rung, self.push = self._choose(f, weights, rungs, first)

    def _choose(self, f: Function, weights: Weights, rungs: tuple[str, ...], first: bool) -> tuple[str, Push]:
        v = _random_like(weights, 0)  # the largest memory here: vectors of all weights, no more of them than needed
        u = torch.randn(self.graph.z.shape, generator=as_generator(2)).to(self.graph.z)
        pairs = zip(self.graph.pull(u), v.values(), strict=True)
        inner = sum(float((a * b).sum(dtype=torch.float64)) for a, b in pairs if a is not None)
        failure: Exception | None = None
        for rung in rungs:
            try:
                push = self._way(rung, f, weights)
                found = [push(*v.values()) for _ in range(3 if first else 1)]
                tolerance = _tolerance(weights) * float(u.double().norm() * found[0].double().norm())
                fits = abs(float(u.double() @ found[0].double()) - inner) <= max(tolerance, 1e-300)
                if fits and first:
                    expected = self._reference(f, weights, v)
                    fits = all(_agree(each, expected, _tolerance(weights)) for each in found)
            except (RuntimeError, NotImplementedError, ValueError, TypeError, KeyError) as error:
                failure = error
                log.info("R v by %s is not possible: %s", rung, str(error).partition("\n")[0])
                continue
            if fits:
                return rung, push
            log.info("R v by %s disagrees with forward mode on a random tangent and is not used", rung)
        raise RuntimeError(
            f"model: none of {', '.join(rungs)} gives a right derivative in a direction ({failure}); use"
            " engine='autodiff', which names the module"
        )

    def _way(self, rung: str, f: Function, weights: Weights) -> Push:
        names = list(weights)
        self.tape = None
        if rung == "tape":
            other = list(_random_like(weights, 1).values())
            self.tape = Tape(lambda *v: jvp(f, (dict(weights),), (dict(zip(names, v, strict=True)),))[1], other)
            self.tape.adopt([self.graph.z, *weights.values(), *saved(self.graph.z)])
            return self.tape
        if rung == "double backward":
            return self.graph.transposed()
        return lambda *v: push_dual(f, weights, dict(zip(names, v, strict=True)))

    def _reference(self, f: Function, weights: Weights, v: Weights) -> Tensor:
        """J v by plain forward mode, or by a fresh double backward pass where there is none."""
        try:
            return push_dual(f, weights, v)
        except (RuntimeError, NotImplementedError):
            return Graph(f, weights).transposed()(*v.values())

    def push_stack(self, tangents: list[Tensor]) -> Tensor:
        """J v for tangents with a stack axis first: `[k, rows]`."""
        tape = self.tape
        if tape is not None:
            return vectorised(lambda v: tape(*v, stacked=True))(tangents)
        return vectorised(lambda v: self.push(*v))(tangents)

    def pull_stack(self, u: Tensor) -> tuple[Tensor | None, ...]:
        """J^T u for `[k, rows]`, one tensor `[k, *shape]` per weight."""
        if not self.graph.z.requires_grad:
            return (None,) * len(self.graph.leaves)
        used = [i for i, t in enumerate(self.graph.pull(u[0])) if t is not None]
        found = vectorised(lambda row: [t for t in self.graph.pull(row) if t is not None])(u)
        out: list[Any] = [None] * len(self.graph.leaves)
        for i, t in zip(used, found, strict=True):
            out[i] = t
        return tuple(out)

    def kept(self) -> list[Tensor]:
        """Every tensor that is held for products."""
        held = [self.graph.z, *saved(self.graph.z)]
        if self.tape is not None:
            held += self.tape.constants()
        elif self.rung == "double backward":
            held += [t for root in getattr(self.push, "pulled", []) for t in (root, *saved(root))]
        return held


def _detached_from_module(function: EmbeddedOutputs, weights: Weights) -> Callable[[Any], Function]:
    """The function z on a batch that reads copies of the buffers, of the unchosen parameters and of the batch."""
    module = function.map.module
    rest = {n: p.detach().clone() for n, p in module.named_parameters() if n not in weights}
    buffers = {n: b.clone() for n, b in module.named_buffers()} | dict(function.map.buffers)
    own = replace(function, map=function.map.with_buffers(buffers))

    def on(batch: Any) -> Function:
        f = own.on(copied(batch))
        return lambda chosen: f({**rest, **chosen})

    return on


def _random_like(weights: Weights, seed: int) -> dict[str, Tensor]:
    generator = as_generator(seed)
    return {n: torch.randn(t.shape, generator=generator).to(t) for n, t in weights.items()}


def _tolerance(weights: Weights) -> float:
    """What rounding may do to a product, generously: a wrong tape is off by far more."""
    return max(100 * torch.finfo(t.dtype).eps for t in weights.values()) ** 0.75


def _agree(found: Tensor, expected: Tensor, tolerance: float = 0.0) -> bool:
    limit = max(tolerance, float(torch.finfo(expected.dtype).eps) ** 0.5)
    gap = (found.double() - expected.double()).norm()
    return found.shape == expected.shape and bool(gap <= limit * expected.double().norm())
