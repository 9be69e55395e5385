"""Learning new data along directions that the kept function does not feel."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import Batches, LoaderBatches, TensorBatches
from fipgeo.paths.joined import Joined
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives.base import Objective, Predictor, Proposal, State, weight_mask
from fipgeo.trees import FEW, head, tensor_leaves

LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True, eq=False)
class NewTask(Objective):
    """The loss on new data, descended in the damped metric.

    Every minibatch gradient d = -grad L becomes `argmin <v, g v> + mu |v - d|^2 = mu (g + mu)^{-1} d`: directions which
    the protected outputs feel are damped and free ones pass; momentum accumulates the result and is passed through the
    next metric when that is made. With `feedback` the step also takes back what protected outputs have changed since
    the start, r: at 1, `v = argmin |r + R v|^2 / N + mu |v - d|^2`, which is what keeps an integrator on a constraint
    (Baumgarte, Stabilization of constraints and integrals of motion in dynamical systems, 1972). A step of the path
    holds `refresh` minibatches, and its size multiplies the learning rate, which otherwise decays along a cosine over
    the whole path. The model is in eval mode throughout.

    Attributes:
        batches: New data, `(x, y)` or a mapping with the model's keywords.
        loss_fn: (outputs, y) -> scalar mean loss; for mapping batches (outputs, batch).
        epochs: Passes over the new data.
        lr: Learning rate.
        momentum: Heavy-ball coefficient.
        clip: Steps v longer than this are shortened to it, before the learning rate.
        refresh: Minibatches in a step, all under the metric at its start.
        feedback: How much of what protected outputs have changed each minibatch takes back; 0 leaves it to corrections
            between the steps. It needs a damping other than 0.
        rehearse: Protected inputs, drawn anew for each minibatch, whose change is looked at.
        hold_zeros: Weights (see `weight_mask`) that are exactly zero stay so, after a sparse path; but for whole rows
            of the output layer, which `grow_head` makes for new classes.
        num_batches: Minibatches in an epoch.
    """

    batches: Batches = field(repr=False)
    loss_fn: LossFn = field(repr=False)
    epochs: float = 1.0
    lr: float = 0.05
    momentum: float = 0.9
    clip: float = 1.0
    refresh: int = 10
    feedback: float = 0.0
    rehearse: int = 50
    hold_zeros: bool = False
    num_batches: int = 1
    _passes: dict[int, Iterator[Any]] = field(default_factory=dict, init=False, repr=False)
    name = "loss on new data"
    maximise = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        for key in ("epochs", "lr", "clip", "refresh", "rehearse", "num_batches"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected a positive number")
        if self.feedback < 0:
            raise ValueError(f"feedback: got {self.feedback}, expected 0 for none, or a positive number such as 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum: got {self.momentum}, expected a number in [0, 1)")

    def begin(self, kept: Kept, position: Position) -> State:
        """No minibatch seen, no momentum, every weight free (or all but the zeros)."""
        theta = position.theta
        free = torch.ones_like(theta, dtype=torch.bool)
        if self.hold_zeros:
            counted = weight_mask(kept.function.map) & ~kept.constraints.mask
            free &= (theta != 0) | ~counted | _new_rows(kept, theta)
        losses = []
        for index, batch in enumerate(self._stream(0, min(self.refresh, self.total))):
            losses.append(self._loss(kept, position, batch, index)[0])
            if index == 0 and (others := _like_protected([batch], kept)):
                Joined.here(kept, others, position)  # what the end will need fails here, or not at all
        loss = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
        return {"seen": torch.tensor(0), "velocity": torch.zeros_like(theta), "free": free, "loss": loss}

    def propose(
        self,
        kept: Kept,
        position: Position,
        state: State,
        size: float,
        predictor: Predictor,
        generator: torch.Generator,
    ) -> Proposal:
        """`refresh` minibatch steps in the metric at the position."""
        free, seen = state["free"], int(state["seen"])
        moves = predictor(position, free)
        mask = free.to(position.theta.dtype)
        count = min(self.refresh, self.total - seen)
        velocity = state["velocity"]
        velocity = velocity if moves is None else moves.passed(velocity)
        theta, losses, cost = position.theta, [], 0.0 if moves is None else moves.cost
        for batch in self._stream(seen, count):
            here = replace(position, theta=theta)
            loss, gradient, used = self._loss(kept, here, batch, seen)
            if self.feedback and moves is not None and 0 < moves.mu < math.inf:
                part = kept.draw(self.rehearse, generator)
                back = kept.gradient(here, part)
                gradient = gradient + self.feedback / (2 * moves.mu) * back
                used += 3.0 * len(part.reference)
            step = -gradient * mask if moves is None else moves.passed(-gradient * mask)
            velocity = self.momentum * velocity + step * min(1.0, self.clip / max(float(step.norm()), 1e-30))
            rate = self.lr * size * 0.5 * (1 + math.cos(math.pi * seen / self.total))
            theta = kept.constraints.brought_back(torch.where(free, theta + rate * velocity, theta))
            losses.append(loss)
            seen += 1
            cost += used
        new = {"seen": torch.tensor(seen), "velocity": velocity, "free": free}
        new["loss"] = torch.tensor(sum(losses) / len(losses), dtype=torch.float64)
        return Proposal(replace(position, theta=theta), free, new, moves, cost)

    def value(self, position: Position, state: State) -> float:
        """Mean loss over the minibatches of the last step, before each was learned."""
        del position
        return float(state["loss"])

    def reached(self, state: State) -> bool:
        """Whether all epochs are over."""
        return int(state["seen"]) >= self.total

    def beside(self, kept: Kept) -> Sequence[Any]:
        """New inputs, as many as are protected or as there are in an epoch: what was learned is not to be undone.

        There are none where the mask of the protected outputs is an entry that new batches do not have.
        """
        batches, count = [], 0
        for batch in self._stream(0, self.num_batches):
            batches.append(batch)
            count += len(tensor_leaves(batch)[0])
            if count >= kept.num_examples:
                break
        return _like_protected(batches, kept)

    @property
    def total(self) -> int:
        """Minibatches in all epochs together."""
        return max(math.ceil(self.epochs * self.num_batches), 1)

    def _stream(self, start: int, count: int) -> Iterator[Any]:
        """Minibatches start, ..., start + count - 1 of the endless sequence of shuffled epochs.

        The pass that is under way is kept open for the next step; a refused or resumed step opens its epoch again.
        """
        for index in range(start, start + count):
            epoch, skip = divmod(index, self.num_batches)
            stream = self._passes.pop(index, None) if skip else None
            if stream is None:
                self._passes.clear()
                stream = islice(self.batches.shuffled(epoch + 1), skip, None)
            try:
                batch = next(stream)
            except StopIteration:
                promised = f"a pass gave no batch number {skip} of the {self.num_batches} promised"
                raise ValueError(f"new_batches: {promised}") from None
            self._passes[index + 1] = stream
            yield batch

    def _shown(self, kept: Kept, position: Position, batch: Any, index: int) -> tuple[Any, float]:
        """What minibatch number `index` looks like when it is learned, and evaluations of each example for that."""
        del kept, position, index
        return batch, 0.0

    def _loss(self, kept: Kept, position: Position, batch: Any, index: int) -> tuple[float, Tensor, float]:
        """Loss on a minibatch, its gradient `[D]`, and evaluations of the model on one input."""
        function = kept.at(position)
        batch, more = self._shown(kept, position, batch, index)
        with function.map.frozen(), torch.enable_grad():
            theta = position.theta.detach().requires_grad_()
            outputs = function.map.call(function.map.named(theta), batch)
            out = outputs[0] if len(outputs) == 1 else outputs
            loss = self.loss_fn(out, _target(batch))
            if not isinstance(loss, Tensor) or loss.dim() or not torch.isfinite(loss):
                what = type(loss).__name__
                if isinstance(loss, Tensor):
                    what = f"a tensor of shape {list(loss.shape)}" if loss.dim() else str(float(loss.detach()))
                raise ValueError(f"loss_fn: returned {what}, expected a finite scalar tensor; average over the batch")
            if not loss.requires_grad:
                raise ValueError("loss_fn: returned a tensor without gradient; compute it from the outputs, undetached")
            return float(loss.detach()), torch.autograd.grad(loss, theta)[0], (3.0 + more) * len(outputs[0])


def _new_rows(kept: Kept, theta: Tensor) -> Tensor:
    """Boolean `[D]`, weights of outputs that are zero with their bias: they are new, nothing was removed there."""
    model, new = kept.function.map, torch.zeros_like(theta, dtype=torch.bool)
    widths = {f.shape[-1] for f in model(theta, head(kept.batches.first(), FEW)) if f.dim() > 1}
    layers = [n for n, m in model.module.named_modules() if isinstance(m, nn.Linear) and m.out_features in widths]
    tensors, where = model.space.unravel(theta), model.space.slices()
    if layers and (name := f"{layers[-1]}.weight".removeprefix(".")) in tensors:
        empty = (tensors[name] == 0).all(1)
        if (bias := tensors.get(name.removesuffix("weight") + "bias")) is not None:
            empty &= bias == 0
        new[where[name]] = empty.repeat_interleave(tensors[name].shape[1])
    return new


def _like_protected(batches: list[Any], kept: Kept) -> list[Any]:
    """New batches in the form of the protected ones, x of `(x, y)` where these are bare; none without their mask."""
    bare, name = isinstance(kept.batches.first(), Tensor), kept.function.mask
    inputs = [b[0] if bare and isinstance(b, list | tuple) and len(b) == 2 else b for b in batches]
    return [] if isinstance(name, str) and any(name not in x for x in inputs) else inputs


def _target(batch: Any) -> Any:
    """What the loss compares outputs with: y of `(x, y)`, or a mapping as a whole."""
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return batch[1]
    raise ValueError(f"new_batches: a batch is a {type(batch).__name__}, expected (x, y) or a mapping of tensors")


def count_batches(batches: Batches) -> int:
    """Minibatches in one shuffled pass; counted by a pass over a loader that does not tell its length.

    Raises:
        ValueError: There is none.
    """
    if isinstance(batches, TensorBatches):
        return max(len(batches) // min(batches.batch_size, len(batches)), 1)
    try:
        count = len(batches.loader) if isinstance(batches, LoaderBatches) else sum(1 for _ in batches)  # type: ignore[arg-type]
    except TypeError:
        count = sum(1 for _ in batches)
    if not count:
        raise ValueError("new_batches: no batch came; expected at least one")
    return count
