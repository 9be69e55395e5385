"""What coefficients are learned for: losses over data, and what evaluates them for a composition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.losses import Loss, as_loss
from fipgeo.data import Batches, ListBatches, TensorBatches, as_batches
from fipgeo.model import ForwardFn, OutputFn


@dataclass(frozen=True, eq=False)
class Goal:
    """One term of what coefficients are learned for: the mean of a loss over data, times a weight.

    Attributes:
        data: `(x, y)` tensors, a list of batches, or a re-iterable loader; y is left out for losses without labels.
        loss: "cross_entropy", "square", "entropy" or a `Loss`.
        weight: Of the term; negative to undo what a network can do.
        forward_fn: (network, batch) -> raw outputs; by default the network gets x.
        output_fn: Raw outputs -> the tensor that the loss gets.
    """

    data: Any
    loss: str | Loss = "cross_entropy"
    weight: float = 1.0
    forward_fn: ForwardFn | None = None
    output_fn: OutputFn | None = None


@dataclass(frozen=True, eq=False)
class Term:
    """A goal with what evaluates it.

    Attributes:
        batches: Its data.
        loss: Its loss.
        weight: Its weight.
        expander: Its outputs and their derivatives.
    """

    batches: Batches
    loss: Loss
    weight: float
    expander: Expander

    @classmethod
    def of(cls, model: Composition, goal: Goal) -> Term:
        """That of a composition, with the data held in memory."""
        expander = Expander(model, goal.forward_fn, goal.output_fn)
        return cls(as_batches(goal.data, argument="data").hold(), as_loss(goal.loss), goal.weight, expander)

    def drawn(self, sample: int | None, draws: torch.Generator) -> Batches:
        """All of the data, or so many examples of it, where examples can be told apart; else one of the batches."""
        if sample is None:
            return self.batches
        chosen = self.batches.sample(sample, draws)
        return TensorBatches(chosen) if isinstance(self.batches, TensorBatches) else ListBatches([chosen])

    def mean(self, part: Batches, c: Tensor) -> float:
        """Weight times mean loss, by forward passes."""
        losses = [self.loss.value(self.expander.outputs(c, batch), labels_of(batch)) for batch in part]
        return self.weight * float(torch.cat(losses).double().mean())


def labels_of(batch: Any) -> Tensor | None:
    """The y of a batch `(x, y)`; None for other batches."""
    return batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None


def listed(goals: Any, loss: str | Loss) -> list[Goal]:
    """Goals as a list: one or several, or one made of data and a loss.

    Raises:
        ValueError: Goals and other things are in one list.
    """
    if isinstance(goals, Goal):
        return [goals]
    if isinstance(goals, list | tuple) and any(isinstance(goal, Goal) for goal in goals):
        if not all(isinstance(goal, Goal) for goal in goals):
            raise ValueError("goals: got goals and other things in one list; make each a Goal(data, ...)")
        return list(goals)
    return [Goal(goals, loss)]
