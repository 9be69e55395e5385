"""The root by automatic differentiation: one pass over the data for every stack of vectors, nothing stored."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.jacobian.graphs import Function, Graph, add_into, push_dual, storages
from fipgeo.linalg import LinearOperator
from fipgeo.model import NotFiniteError

log = logging.getLogger(__name__)

Pull = Callable[[Tensor], tuple[Weights]]
Push = Callable[[Function, Weights, Weights], Tensor]


def vectorised(function: Callable[[Any], Any], chunk: int | None = None) -> Callable[[Any], Any]:
    """A function over the first axis of a stack by vmap, quiet about operators that it takes one by one."""
    mapped = vmap(function, chunk_size=chunk, randomness="same")

    def call(stack: Any) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            return mapped(stack)

    return call


def pull_back(f: Function, weights: Weights) -> tuple[Tensor, Pull]:
    """z, and u -> J^T u by reverse mode."""
    z, pull = vjp(f, weights)[:2]
    return z, pull


def push_forward(f: Function, weights: Weights, tangent: Weights) -> Tensor:
    """J v by forward mode."""
    return jvp(f, (weights,), (tangent,))[1]


def push_transposed(f: Function, weights: Weights, tangent: Weights) -> Tensor:
    """J v as the transpose of u -> J^T u, linear in u: two reverse passes, for modules without forward mode."""
    z, pull = pull_back(f, weights)
    return vjp(lambda u: pull(u)[0], torch.zeros_like(z))[1](dict(tangent))[0]


class AutodiffRoot(LinearOperator):
    """R = dz/dtheta at a point, as an operator `[N * M, D]`; every stack of vectors passes over the data once.

    R v and R^T u cost about 3 forward passes a vector. R^T R v (`normal`) costs about 5 for one vector, whose halves
    share a forward pass, and 5 a vector in stacks, where it is shared by all. Stacks of small problems are vectorised,
    a few vectors at once; the time per vector hardly changes between 4 and 16 at once, memory does.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`.
        survey: Rows and examples of every batch.
        chunk: Most vectors differentiated at once.
        max_bytes: Memory for what vectors that are differentiated at once need on top of a single one.

    Attributes:
        push: How tangents are pushed forward, `push_forward` or `push_transposed`.
        graph_bytes: What a backward pass through the first batch keeps.
        at_once: Vectors differentiated at once.

    Raises:
        ValueError: chunk is less than 1.
        NotImplementedError: A module of the model has no derivative rule; it is named.
    """

    def __init__(
        self, function: EmbeddedOutputs, theta: Tensor, survey: Survey, *, chunk: int = 8, max_bytes: int = 2**30
    ) -> None:
        super().__init__((survey.num_rows, len(theta)), dtype=theta.dtype, device=theta.device)
        if chunk < 1:
            raise ValueError(f"chunk: got {chunk}, expected at least 1 vector")
        self.function, self.survey, self.chunk, self.max_bytes = function, survey, chunk, max_bytes
        with torch.inference_mode(False):
            # each in memory of its own: a dual number gets a tangent as large as all the memory behind its primal
            self.weights = {name: t.clone() for name, t in function.map.named(_recordable(theta)).items()}
        self.push, self.graph_bytes = self._preflight()
        largest = self.graph_bytes * max(survey.rows) // survey.rows[0]
        self.at_once = max(min(chunk, max_bytes // (largest + len(theta) * theta.element_size() + 1)), 1)
        # tangents that keep a graph of their own while both halves share a forward pass take about twice that
        self._share = self.push is push_forward and 3 * largest <= max_bytes

    @cached_property
    def vectorised(self) -> bool:
        """Whether the model takes several tangents and cotangents at once; tried when a stack first comes."""
        two = {n: t.new_zeros(2, *t.shape) for n, t in self.weights.items()}
        with self.function.map.frozen():
            f = self.function.on(self.function.few(self.weights))
            try:
                vectorised(lambda t: self.push(f, self.weights, t))(two)
                z, pull = pull_back(f, self.weights)
                vectorised(lambda u: pull(u)[0])(z.new_zeros(2, *z.shape))
            except (RuntimeError, NotImplementedError, ValueError) as error:
                log.info("products are taken one vector at a time, since the model cannot be vectorised: %s", error)
                return False
        return True

    def _apply(self, x: Tensor) -> Tensor:
        at_once = self._width(x)
        with self.function.map.frozen():
            x = _recordable(x)
            return torch.cat([self._forward(self.function.on(b), x, at_once) for b in self.function.batches], -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        at_once = self._width(y)
        with self.function.map.frozen():
            out = torch.zeros(len(y), self.shape[1], dtype=self.dtype, device=self.device)
            parts = _recordable(y).split(self.survey.rows, -1)
            for batch, part in zip(self.function.batches, parts, strict=True):
                self._backward(self.function.on(batch), part, out, at_once)
        return out

    def _normal(self, x: Tensor) -> Tensor:
        at_once = self._width(x)
        with self.function.map.frozen():
            x = _recordable(x)
            out = torch.zeros(len(x), self.shape[1], dtype=self.dtype, device=self.device)
            for batch in self.function.batches:
                f = self.function.on(batch)
                if len(x) == 1 and self._share:
                    graph = Graph(f, self.weights, self.function.map.named(x[0]))
                    assert graph.pushed is not None
                    add_into(self.function.map.space.unravel(out[0]), graph.pull(graph.pushed, keep=False))
                else:
                    self._backward(f, self._forward(f, x, at_once), out, at_once)
        return out

    def _width(self, stack: Tensor) -> int:
        """How many vectors of a stack are differentiated at once."""
        return self.at_once if min(len(stack), self.at_once) > 1 and self.vectorised else 1

    def _forward(self, f: Function, x: Tensor, at_once: int) -> Tensor:
        """J x for one batch: `[k, D]` to `[k, rows]`; parts of x are looked at, never copied."""
        named = self.function.map.named
        if at_once > 1:
            push = vectorised(lambda t: self.push(f, self.weights, t))
            return torch.cat([push(named(part)) for part in x.split(at_once)])
        single = push_dual if self.push is push_forward else self.push
        return torch.stack([single(f, self.weights, named(v)) for v in x])

    def _backward(self, f: Function, y: Tensor, out: Tensor, at_once: int) -> None:
        """Add J^T y for one batch, y `[k, rows]`, to out `[k, D]`."""
        views = self.function.map.space.unravel(out)
        if at_once > 1:
            pull = pull_back(f, self.weights)[1]
            pull_all = vectorised(lambda u: pull(u)[0])
            for start in range(0, len(y), at_once):
                rows = slice(start, start + at_once)
                add_into({n: view[rows] for n, view in views.items()}, pull_all(y[rows]).values())
            return
        graph = Graph(f, self.weights)
        for i, u in enumerate(y):
            add_into({n: view[i] for n, view in views.items()}, graph.pull(u, keep=i + 1 < len(y)))

    def _check_finite(self, gradient: Iterable[Tensor | None]) -> None:
        pairs = list(zip(self.weights, gradient, strict=True))
        if bool(torch.isfinite(sum(t.sum().double() for _, t in pairs if t is not None))):  # type: ignore[arg-type]
            return  # a sum is NaN or infinite if one of its terms is
        bad = [name for name, t in pairs if t is not None and not bool(torch.isfinite(t).all())]
        if bad:
            raise NotFiniteError(
                f"model: its outputs are finite, their derivative is not (first in {bad[0]}); look for a square root,"
                " a norm or a division at zero in the forward"
            )

    def _preflight(self) -> tuple[Push, int]:
        """The first way to push tangents forward that works on the first batch, and the bytes of its graph."""
        function = self.function
        zero = {n: torch.zeros_like(t) for n, t in self.weights.items()}
        first_error: Exception | None = None
        with function.map.frozen():
            f = function.on(function.few(self.weights))
            for push in (push_forward, push_transposed):
                try:
                    if push is push_forward:  # one evaluation shows both halves
                        graph = Graph(f, self.weights, zero)
                    else:
                        push(f, self.weights, zero)
                        graph = Graph(f, self.weights)
                    fixed = storages(self.weights.values())
                    held = sum(size for where, size in graph.storages().items() if where not in fixed)
                    num_bytes = held * self.survey.rows[0] // graph.z.numel()
                    gradient = graph.pull(torch.ones_like(graph.z), keep=False)
                except (RuntimeError, NotImplementedError) as error:
                    first_error = first_error or error
                    continue
                self._check_finite(gradient)
                return push, num_bytes
            name = _last_module(function, lambda: push_forward(f, self.weights, zero))
        raise NotImplementedError(
            f"model: {name} has no derivative rule for Jacobian-vector products ({first_error}); replace it by a"
            " differentiable module or leave it out of the forward"
        )


def _recordable(t: Tensor) -> Tensor:
    """The tensor itself, or a copy that autograd takes if it was made in inference mode; to be called outside."""
    return t.clone() if t.is_inference() else t


def _last_module(function: EmbeddedOutputs, run: Callable[[], object]) -> str:
    """The module that was running when `run` failed."""
    names = {id(m): n for n, m in function.map.module.named_modules()}
    seen: list[str] = []

    def note(module: torch.nn.Module, args: object) -> None:
        del args
        if id(module) in names:
            seen.append(f"{names[id(module)] or 'the model'} ({type(module).__name__})")

    handle = torch.nn.modules.module.register_module_forward_pre_hook(note)
    try:
        run()
    except (RuntimeError, NotImplementedError):
        pass
    finally:
        handle.remove()
    return seen[-1] if seen else "the model"
