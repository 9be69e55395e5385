"""Robustness: the loss of adversarial examples, descended while the clean function stays."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.attacks import Attack
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives.new_task import NewTask


@dataclass(frozen=True, eq=False)
class Robustness(NewTask):
    """The loss of adversarial examples, descended in the damped metric of the clean outputs.

    A minibatch is attacked at the weights of its turn, with the loss that is then descended on what the attack found;
    all else is as in `NewTask`. Targets may be labels, or the network's own probabilities p on clean inputs: with the
    cross entropy as loss its gradient is that of KL(p || q), q the probabilities under attack, which is the second term
    of TRADES (Zhang et al. 2019), while the metric keeps p where it is. `robustify` does that.

    Attributes:
        attack: How examples are made. Its random start depends on the number of the minibatch alone.
        share: Share of each minibatch that is attacked. The rest stays clean, so that its loss holds the function on
            all inputs, where the metric sees those of one step.

    Raises:
        TypeError: There is no attack.
        ValueError: A batch is not `(x, y)` with a floating tensor x, or a number is out of its range.
    """

    attack: Attack | None = None
    share: float = 1.0
    name = "adversarial loss"

    def __post_init__(self) -> None:
        """Check the attack and the numbers."""
        super().__post_init__()
        if not 0 < self.share <= 1:
            raise ValueError(f"share: got {self.share}, expected a number in (0, 1]")
        if self.attack is None:
            raise TypeError("attack: got None, expected an Attack such as fipgeo.attacks.pgd(0.1)")

    def _shown(self, kept: Kept, position: Position, batch: Any, index: int) -> tuple[Any, float]:
        """The minibatch, a share of it under attack."""
        assert self.attack is not None
        if not (isinstance(batch, list | tuple) and len(batch) == 2):
            raise ValueError(f"new_batches: a batch is a {type(batch).__name__}, expected (x, y) with a tensor x")
        x, y = batch
        count = math.ceil(self.share * len(x))
        function = kept.at(position).map
        weights = function.named(position.theta)

        def losses(at: Tensor) -> Tensor:
            outputs = function.call(weights, at)
            return self.loss_fn(outputs[0] if len(outputs) == 1 else outputs, y[:count])

        random = torch.Generator().manual_seed(index)
        with function.frozen():
            found = replace(self.attack, restarts=1).ascend(losses, x[:count], random)
        return (torch.cat([found, x[count:]]), y), 3.0 * self.attack.steps * count / len(x)
