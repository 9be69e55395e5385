"""What a network's outputs should be, and the geometry in which a loss is nearly a square."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fipgeo.outputs import Categorical, Euclidean, Geometry


@dataclass(frozen=True)
class Loss:
    """A loss of outputs, with the geometry whose metric stands for its second derivative.

    For cross-entropy and the square loss the two are equal; for others the metric makes a natural gradient of it.

    Attributes:
        value: (outputs `[n, ..., C]`, labels) -> losses `[n]`.
        geometry: Of the outputs; that of "categorical" belongs to losses of a softmax, "euclidean" to squares.
    """

    value: Callable[[Tensor, Tensor | None], Tensor]
    geometry: Geometry


def square(kappa: float = 1.0) -> Loss:
    """Half the squared distance to the targets, or to kappa times one-hot labels: 1/2 sum_C (f - kappa y)^2.

    Args:
        kappa: What the targets are multiplied by.
    """

    def value(outputs: Tensor, labels: Tensor | None) -> Tensor:
        labels = _needed(labels)
        if not labels.is_floating_point():
            labels = F.one_hot(labels.long(), outputs.shape[-1])
        return 0.5 * (outputs - kappa * labels.to(outputs)).square().flatten(1).sum(1)

    return Loss(value, Euclidean())


def _cross_entropy(outputs: Tensor, labels: Tensor | None) -> Tensor:
    labels = _needed(labels)
    shape = outputs.shape[:-1] if not labels.is_floating_point() else outputs.shape
    flat = labels.reshape(-1) if not labels.is_floating_point() else labels.reshape(-1, shape[-1])
    each = F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), flat, reduction="none")
    return each.view(len(outputs), -1).sum(1)


def _entropy(outputs: Tensor, labels: Tensor | None) -> Tensor:
    del labels
    logs = torch.log_softmax(outputs, -1)
    return -(logs.exp() * logs).flatten(1).sum(1)


def _needed(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("data: the loss needs labels; pass batches (x, y) with a tensor y")
    return labels


LOSSES: dict[str, Loss] = {
    "cross_entropy": Loss(_cross_entropy, Categorical()),
    "square": square(),
    "entropy": Loss(_entropy, Categorical()),
}
"""Losses by name: of labels, of targets, and of no labels at all. Positions of an example are summed."""


def as_loss(loss: str | Loss) -> Loss:
    """A loss from its name or itself.

    Raises:
        ValueError: The name is unknown.

    Examples:
        >>> as_loss("entropy").value(torch.zeros(1, 2), None)
        tensor([0.6931])
    """
    if isinstance(loss, Loss):
        return loss
    if loss not in LOSSES:
        raise ValueError(f"loss: got {loss!r}, expected one of {', '.join(map(repr, LOSSES))} or a Loss")
    return LOSSES[loss]
