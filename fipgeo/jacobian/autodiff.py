"""The root by automatic differentiation: one pass over the data for every stack of vectors, nothing stored."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.jacobian.graphs import Function, Graph, push_dual, put
from fipgeo.jacobian.look import Rules, check_finite, finite, rules_of
from fipgeo.linalg import LinearOperator
from fipgeo.trees import FEW

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
        rules: How the model is differentiated, if that is known; otherwise it is tried out on a few examples, or, where
            there are no more than those, by the first product.

    Raises:
        ValueError: chunk is less than 1.
        NotImplementedError: A module of the model has no derivative rule; it is named.
        NotFiniteError: Outputs are finite, their derivative is not.
    """

    def __init__(
        self,
        function: EmbeddedOutputs,
        theta: Tensor,
        survey: Survey,
        *,
        chunk: int = 8,
        max_bytes: int = 2**30,
        rules: Rules | None = None,
    ) -> None:
        super().__init__((survey.num_rows, len(theta)), dtype=theta.dtype, device=theta.device)
        if chunk < 1:
            raise ValueError(f"chunk: got {chunk}, expected at least 1 vector")
        self.function, self.survey, self.chunk, self.max_bytes = function, survey, chunk, max_bytes
        with torch.inference_mode(False):
            theta = theta.detach()
            self._theta = theta if _owns(theta) and not theta.is_inference() else theta.clone()
            self._views = function.map.named(self._theta)
        self._rules, self._untried = rules, False
        if rules is None and survey.num_examples > FEW:
            self._rules = self._preflight()

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """The point by name, each in memory of its own: functorch's dual numbers of views copy all that is behind."""
        with torch.inference_mode(False):
            return {name: t.clone() for name, t in self._views.items()}

    @property
    def rules(self) -> Rules:
        """How the model is differentiated; tried out when it is not known yet."""
        if self._rules is None:
            self._rules = self._preflight()
        return self._rules

    @property
    def push(self) -> Push:
        """How tangents are pushed forward, `push_forward` or `push_transposed`."""
        return push_forward if self.rules.forward_mode else push_transposed

    @property
    def graph_bytes(self) -> int:
        """What a backward pass through the first batch keeps."""
        return self.rules.graph_bytes

    @property
    def _largest(self) -> int:
        """What a backward pass through the largest batch keeps."""
        return self.graph_bytes * max(self.survey.rows) // self.survey.rows[0]

    @property
    def at_once(self) -> int:
        """Vectors differentiated at once."""
        return max(min(self.chunk, self.max_bytes // (self._largest + self.shape[1] * self.dtype.itemsize + 1)), 1)

    @property
    def _share(self) -> bool:
        """Whether both halves of a product share a forward pass: its tangents keep about two more graphs."""
        return self.rules.forward_mode and 3 * self._largest <= self.max_bytes

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
            out = torch.empty(len(y), self.shape[1], dtype=self.dtype, device=self.device)
            parts = _recordable(y).split(self.survey.rows, -1)
            for place, (batch, part) in enumerate(zip(self.function.batches, parts, strict=True)):
                self._backward(self.function.on(batch), part, out, at_once, add=place > 0)
        return out

    def _normal(self, x: Tensor) -> Tensor:
        return self._scaled_normal(x, 1.0)

    def _scaled_normal(self, x: Tensor, scale: float) -> Tensor:
        at_once = self._width(x)
        with self.function.map.frozen():
            x = _recordable(x)
            out = torch.empty(len(x), self.shape[1], dtype=self.dtype, device=self.device)
            for place, batch in enumerate(self.function.batches):
                f = self.function.on(batch)
                graph = self._shared(f, x) if len(x) == 1 else None
                if graph is None:
                    self._backward(f, scale * self._forward(f, x, at_once), out, at_once, add=place > 0)
                    continue
                assert graph.pushed is not None
                put(self.function.map.space.unravel(out[0]), graph.pull(scale * graph.pushed, keep=False), place > 0)
            if self._untried:
                self._untried = False
                if not finite([out]):  # of the model, or of this vector alone
                    self._rules = self._preflight()
        return out

    def _shared(self, f: Function, x: Tensor) -> Graph | None:
        """The graph of one evaluation with the tangent x `[1, D]`; None where the halves are to have one each."""
        if self._rules is not None:
            return Graph(f, *self._paired(x[0])) if self._share else None
        try:
            graph = Graph(f, *self._paired(x[0]))
        except (RuntimeError, NotImplementedError) as error:
            log.info("the first product is made with care: %s", error)
            self._rules = self._preflight()
            return None
        self._rules, self._untried = rules_of(graph, self._views, self.survey), True
        return graph

    def _paired(self, v: Tensor) -> tuple[Weights, Weights]:
        """The point and a tangent by name, laid out alike in memory: dual numbers copy what is not."""
        return (self._views if _owns(v) else self.weights), self.function.map.named(v)

    def _width(self, stack: Tensor) -> int:
        """How many vectors of a stack are differentiated at once."""
        return self.at_once if len(stack) > 1 and self.at_once > 1 and self.vectorised else 1

    def _forward(self, f: Function, x: Tensor, at_once: int) -> Tensor:
        """J x for one batch: `[k, D]` to `[k, rows]`; parts of x are looked at, never copied."""
        named = self.function.map.named
        if at_once > 1:
            push = vectorised(lambda t: self.push(f, self.weights, t))
            return torch.cat([push(named(part)) for part in x.split(at_once)])
        if self.push is push_forward:
            return torch.stack([push_dual(f, *self._paired(v)) for v in x])
        return torch.stack([self.push(f, self.weights, named(v)) for v in x])

    def _backward(self, f: Function, y: Tensor, out: Tensor, at_once: int, *, add: bool) -> None:
        """J^T y for one batch, y `[k, rows]`, into out `[k, D]`, or added to it."""
        views = self.function.map.space.unravel(out)
        if at_once > 1:
            pull = pull_back(f, self.weights)[1]
            pull_all = vectorised(lambda u: pull(u)[0])
            for start in range(0, len(y), at_once):
                rows = slice(start, start + at_once)
                put({n: view[rows] for n, view in views.items()}, pull_all(y[rows]).values(), add)
            return
        graph = Graph(f, self._views)
        for i, u in enumerate(y):
            put({n: view[i] for n, view in views.items()}, graph.pull(u, keep=i + 1 < len(y)), add)

    def _preflight(self) -> Rules:
        """The rules of the first way to push tangents forward that works on the first batch."""
        function, weights = self.function, self._views
        zero = function.map.named(torch.zeros_like(self._theta))
        first_error: Exception | None = None
        with function.map.frozen():
            f = function.on(function.few(weights))
            for forward_mode in (True, False):
                try:
                    if not forward_mode:
                        push_transposed(f, weights, zero)
                    graph = Graph(f, weights, zero if forward_mode else None)  # one evaluation shows both halves
                    rules = rules_of(graph, weights, self.survey, forward_mode=forward_mode)
                    gradient = graph.pull(torch.ones_like(graph.z), keep=False)
                except (RuntimeError, NotImplementedError) as error:
                    first_error = first_error or error
                    continue
                check_finite(weights, gradient)
                return rules
            name = _last_module(function, lambda: push_dual(f, weights, zero))
        raise NotImplementedError(
            f"model: {name} has no derivative rule for Jacobian-vector products ({first_error}); replace it by a"
            " differentiable module or leave it out of the forward"
        )


def _recordable(t: Tensor) -> Tensor:
    """The tensor itself, or a copy that autograd takes if it was made in inference mode; to be called outside."""
    return t.clone() if t.is_inference() else t


def _owns(v: Tensor) -> bool:
    """Whether a vector fills the memory behind it."""
    return v.is_contiguous() and v.untyped_storage().nbytes() == v.nbytes


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
