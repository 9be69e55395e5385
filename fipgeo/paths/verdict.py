"""The verdict: how far the function has moved, measured on inputs that no step used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.model import NotFiniteError
from fipgeo.outputs import Bernoulli, Geometry, changed_predictions, over_entries, squared_distance
from fipgeo.paths.certificate import Certificate, certify, changed_upper_bound
from fipgeo.paths.kept import live_entries

__all__ = ["Measured", "Verdict", "changed_upper_bound", "spread_of"]


@dataclass(frozen=True)
class Measured:
    """How far a point's function is from the start's, on held-out inputs (see `PathPoint` for the units)."""

    distance: float
    drift: float
    changed: float
    changed_upper: float
    certificate: Certificate | None = None


class Verdict:
    """Outputs of the start on held-out inputs, against which every later point is measured.

    Args:
        function: Embedded outputs on the held-out inputs.
        theta: The start.
        spread: The unit of drift, if it is not to be that of these inputs.

    Attributes:
        spread: Root mean square distance of the start's embedded outputs from their mean: the unit of drift.
        num_examples: Held-out inputs.
        num_compared: Those of them with a position that counts, whose predictions are compared.
    """

    def __init__(self, function: EmbeddedOutputs, theta: Tensor, spread: float | None = None) -> None:
        self.function = function
        self.reference: list[tuple[Tensor, ...]] = []
        live, counting, classes, sure = [], [], [], []
        for batch, outputs in function.outputs(theta):
            masks = function.masks(outputs, batch)
            self.reference.append(outputs)
            counting.append(_counting(outputs, masks))
            live.append(live_entries(function, outputs, batch).any(1))
            classes.append(_classes(function.geometry, outputs))
            sure.append(_sureness(function.geometry, outputs, masks))
        self.live = torch.cat(live)
        self.classes, self.sureness = _joined(classes), _joined(sure)
        self.num_examples, self.num_compared = len(self.live), int(self.live.sum())
        self.spread = _spread(function.geometry, counting, self.num_examples) if spread is None else spread

    def measure(self, theta: Tensor, function: EmbeddedOutputs | None = None, *, certify: bool = False) -> Measured:
        """Distance of the function at theta from the start's; exactly 0 at the start.

        Args:
            theta: The point, `[D]`.
            function: The same inputs under other normalisation statistics, if the path has moved them.
            certify: Say what follows for other inputs like these, too (see `Certificate`).

        Raises:
            NotFiniteError: Outputs at theta are not finite.
        """
        function = self.function if function is None else function
        squares, moves, sure = [], [], []
        for (batch, outputs), reference in zip(function.outputs(theta), self.reference, strict=True):
            wide, wide0 = (tuple(f.double() for f in tensors) for tensors in (outputs, reference))
            masks = function.masks(outputs, batch)
            squares.append(squared_distance(function.geometry, wide, wide0, masks))
            moves.append(changed_predictions(function.geometry, outputs, reference, masks))
            sure.append(_sureness(function.geometry, outputs, masks) if certify else None)
        squared, moved, sureness = torch.cat(squares), _joined(moves), _joined(sure)
        total = float(squared.sum())
        if not math.isfinite(total):
            raise NotFiniteError("outputs: the distance to the start is not finite")
        distance = math.sqrt(total / self.num_examples)
        share = upper = math.nan
        if moved is not None:
            moved = moved[self.live]
            share = int(moved.sum()) / self.num_compared
            upper = changed_upper_bound(int(moved.sum()), self.num_compared)
        found = Measured(distance, distance / self.spread, share, upper)
        return Measured(*_numbers(found), self._certificate(squared, moved, sureness)) if certify else found

    def _certificate(self, squared: Tensor, moved: Tensor | None, sureness: Tensor | None) -> Certificate:
        surer = None if sureness is None or self.sureness is None else (sureness - self.sureness)[self.live]
        classes = None if self.classes is None else self.classes[self.live]
        return certify(squared, self.spread, moved, classes, surer)


def spread_of(function: EmbeddedOutputs, theta: Tensor) -> float:
    """Root mean square distance of the embedded outputs at theta from their mean; 1 where all outputs are equal."""
    counting, num_examples = [], 0
    for batch, outputs in function.outputs(theta):
        counting.append(_counting(outputs, function.masks(outputs, batch)))
        num_examples += len(outputs[0])
    return _spread(function.geometry, counting, num_examples)


def _numbers(found: Measured) -> tuple[float, float, float, float]:
    return found.distance, found.drift, found.changed, found.changed_upper


def _joined(parts: list[Any]) -> Tensor | None:
    """Parts of all batches as one tensor; None where any is missing."""
    return None if any(part is None for part in parts) else torch.cat(parts)


def _counting(outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """Outputs at the positions that count."""
    return tuple(f if m is None else f[m] for f, m in zip(outputs, masks, strict=True))


def _classes(geometry: Geometry, outputs: tuple[Tensor, ...]) -> Tensor | None:
    """The predicted class of every input `[n]`, where there is exactly one."""
    predicted = geometry.predict(outputs[0]) if len(outputs) == 1 else None
    return predicted.flatten() if predicted is not None and predicted.numel() == len(outputs[0]) else None


def _sureness(geometry: Geometry, outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> Tensor | None:
    """Probability that the network gives to what it predicts, `[n]`, a mean over the positions that count."""
    total = count = torch.zeros(len(outputs[0]), dtype=torch.float64, device=outputs[0].device)
    for f, mask in zip(outputs, masks, strict=True):
        if geometry.predict(f) is None:
            return None
        if isinstance(geometry, Bernoulli):
            sure = torch.sigmoid(f.double().abs())
        else:
            sure = torch.softmax(f.double(), -1).amax(-1)
        chosen = torch.ones_like(sure) if mask is None else over_entries(mask, sure).expand_as(sure).double()
        total = total + torch.where(chosen > 0, sure, 0).reshape(len(f), -1).sum(1)
        count = count + chosen.reshape(len(f), -1).sum(1)
    return total / count.clamp_min(1)


def _spread(geometry: Geometry, counting: list[tuple[Tensor, ...]], num_examples: int) -> float:
    """Root mean square distance of an input's embedded outputs from the mean; 1 where all outputs are equal.

    The mean is over the inputs and positions that count, for each output tensor on its own, so lengths may differ.
    """
    total, size = 0.0, 0.0
    for parts in zip(*counting, strict=True):
        z = torch.cat([geometry.embed(f.double()).flatten(0, -2) for f in parts])
        total += float((z - z.mean(0)).square().sum())
        size += float(z.square().sum())
    return math.sqrt(total / num_examples) if total > 1e-12 * size else 1.0
