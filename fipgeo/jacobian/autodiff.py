"""The root by automatic differentiation: one pass over the data for every stack of vectors, nothing stored."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp, vjp, vmap

from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.linalg import LinearOperator
from fipgeo.model import NotFiniteError

log = logging.getLogger(__name__)

Function = Callable[[Weights], Tensor]
Pull = Callable[[Tensor], tuple[Weights]]
Push = Callable[[Function, Weights, Weights], Tensor]


def vectorised(function: Callable[[Any], Tensor], chunk: int | None = None) -> Callable[[Any], Tensor]:
    """A function over the first axis of a stack by vmap, quiet about operators that it takes one by one."""
    mapped = vmap(function, chunk_size=chunk, randomness="same")

    def call(stack: Any) -> Tensor:
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
    """R = dz/dtheta at a point, as an operator `[N * M, D]`; every product passes over the data once.

    R v costs about 3 forward passes a vector, R^T u as much, and R^T R v (`normal`) both, batch by batch in the same
    pass. Stacks are vectorised in chunks.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`.
        survey: Rows and examples of every batch.
        chunk: Vectors differentiated at once; memory grows with it.

    Raises:
        NotImplementedError: A module of the model has no derivative rule; it is named.
    """

    def __init__(self, function: EmbeddedOutputs, theta: Tensor, survey: Survey, *, chunk: int = 8) -> None:
        super().__init__((survey.num_rows, len(theta)), dtype=theta.dtype, device=theta.device)
        self.function, self.survey, self.chunk = function, survey, chunk
        self.weights = function.map.named(theta)
        self.push, self.vectorised = self._preflight()

    def _apply(self, x: Tensor) -> Tensor:
        with self.function.map.frozen():
            return torch.cat([self._forward(self.function.on(b), x) for b in self.function.batches], -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        with self.function.map.frozen():
            out = torch.zeros(len(y), self.shape[1], dtype=self.dtype, device=self.device)
            parts = y.split(self.survey.rows, -1)
            for batch, part in zip(self.function.batches, parts, strict=True):
                out += self._backward(pull_back(self.function.on(batch), self.weights)[1], part)
        return out

    def _normal(self, x: Tensor) -> Tensor:
        with self.function.map.frozen():
            out = torch.zeros(len(x), self.shape[1], dtype=self.dtype, device=self.device)
            for batch in self.function.batches:
                f = self.function.on(batch)
                out += self._backward(pull_back(f, self.weights)[1], self._forward(f, x))
        return out

    def _forward(self, f: Function, x: Tensor) -> Tensor:
        """J x for one batch: `[k, D]` to `[k, rows]`."""
        return self._stacked(lambda t: self.push(f, self.weights, t), self.function.map.named(x), len(x))

    def _backward(self, pull: Pull, y: Tensor) -> Tensor:
        """J^T y for one batch: `[k, rows]` to `[k, D]`."""
        space = self.function.map.space
        return self._stacked(lambda u: space.ravel(pull(u)[0]), y, len(y))

    def _stacked(self, product: Callable, stack, count: int) -> Tensor:
        """A product on every vector of a stack (a tensor or a dict of tensors with the stack axis first)."""
        if count > 1 and self.vectorised:
            return vectorised(product, self.chunk)(stack)
        item = (lambda i: {n: t[i] for n, t in stack.items()}) if isinstance(stack, dict) else (lambda i: stack[i])
        return torch.stack([product(item(i)) for i in range(count)])

    def _check_finite(self, gradient: Weights) -> None:
        bad = [name for name, t in gradient.items() if not bool(torch.isfinite(t).all())]
        if bad:
            raise NotFiniteError(
                f"model: its outputs are finite, their derivative is not (first in {bad[0]}); look for a square root,"
                " a norm or a division at zero in the forward"
            )

    def _preflight(self) -> tuple[Push, bool]:
        """The first way to push tangents forward that works on the first batch, and whether it can be vectorised."""
        function = self.function
        f = function.on(function.batches.first())
        two = {n: t.new_zeros(2, *t.shape) for n, t in self.weights.items()}
        one = {n: t[0] for n, t in two.items()}
        first_error: Exception | None = None
        with function.map.frozen():
            for push in (push_forward, push_transposed):
                try:
                    push(f, self.weights, one)
                except (RuntimeError, NotImplementedError) as error:
                    first_error = first_error or error
                    continue
                try:
                    vectorised(lambda t, push=push: push(f, self.weights, t))(two)
                    z, pull = pull_back(f, self.weights)
                    vectorised(lambda u, pull=pull: function.map.space.ravel(pull(u)[0]))(z.new_zeros(2, *z.shape))
                except (RuntimeError, NotImplementedError, ValueError) as error:
                    log.info("products are taken one vector at a time, since the model cannot be vectorised: %s", error)
                    return push, False
                self._check_finite(pull(torch.ones_like(z))[0])
                return push, True
            name = _last_module(function, lambda: push_forward(f, self.weights, one))
        raise NotImplementedError(
            f"model: {name} has no derivative rule for Jacobian-vector products ({first_error}); replace it by a"
            " differentiable module or leave it out of the forward"
        )


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
