"""The verdict: how far the function has moved, measured on inputs that no step used."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.model import NotFiniteError
from fipgeo.outputs import Geometry, changed_predictions, squared_distance
from fipgeo.paths.kept import live_entries


def changed_upper_bound(changed: int, total: int, confidence: float = 0.95) -> float:
    """Exact one-sided upper confidence bound on a rate, from `changed` out of `total` independent trials.

    The largest p with P(Binomial(total, p) <= changed) >= 1 - confidence (Clopper & Pearson, The Use of Confidence or
    Fiducial Limits, Biometrika 1934); the quantile of a Beta(changed + 1, total - changed) distribution.

    Args:
        changed: Successes.
        total: Trials, at least 1.
        confidence: Between 0 and 1.

    Returns:
        The bound; 1 when every trial succeeded.

    Raises:
        ValueError: The counts or the confidence are out of range.

    Examples:
        >>> round(changed_upper_bound(0, 100), 4)
        0.0295
    """
    if not (0 <= changed <= total and total > 0):
        raise ValueError(f"changed: got {changed} of {total}, expected 0 <= changed <= total with total > 0")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
    if changed == total:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(changed + 1, total - changed, confidence))


@dataclass(frozen=True)
class Measured:
    """How far a point's function is from the start's, on held-out inputs (see `PathPoint` for the units)."""

    distance: float
    drift: float
    changed: float
    changed_upper: float


class Verdict:
    """Outputs of the start on held-out inputs, against which every later point is measured.

    Args:
        function: Embedded outputs on the held-out inputs.
        theta: The start.

    Attributes:
        spread: Root mean square distance of the start's embedded outputs from their mean: the unit of drift.
        num_examples: Held-out inputs.
        num_compared: Those of them with a position that counts, whose predictions are compared.
    """

    def __init__(self, function: EmbeddedOutputs, theta: Tensor) -> None:
        self.function = function
        self.reference: list[tuple[Tensor, ...]] = []
        self.num_examples, self.num_compared, counting = 0, 0, []
        for batch, outputs in function.outputs(theta):
            masks = function.masks(outputs, batch)
            self.reference.append(outputs)
            counting.append(tuple(f if m is None else f[m] for f, m in zip(outputs, masks, strict=True)))
            self.num_examples += len(outputs[0])
            self.num_compared += int(live_entries(function, outputs, batch).any(1).sum())
        self.spread = _spread(function.geometry, counting, self.num_examples)

    def measure(self, theta: Tensor, function: EmbeddedOutputs | None = None) -> Measured:
        """Distance of the function at theta from the start's; exactly 0 at the start.

        Args:
            theta: The point, `[D]`.
            function: The same inputs under other normalisation statistics, if the path has moved them.

        Raises:
            NotFiniteError: Outputs at theta are not finite.
        """
        function = self.function if function is None else function
        total, changed, predicts = 0.0, 0, True
        for (batch, outputs), reference in zip(function.outputs(theta), self.reference, strict=True):
            wide, wide0 = (tuple(f.double() for f in tensors) for tensors in (outputs, reference))
            masks = function.masks(outputs, batch)
            total += float(squared_distance(function.geometry, wide, wide0, masks).sum())
            moved = changed_predictions(function.geometry, outputs, reference, masks)
            predicts = predicts and moved is not None
            changed += 0 if moved is None else int(moved.sum())
        if not math.isfinite(total):
            raise NotFiniteError("outputs: the distance to the start is not finite")
        distance = math.sqrt(total / self.num_examples)
        share = changed / self.num_compared if predicts else math.nan
        upper = changed_upper_bound(changed, self.num_compared) if predicts else math.nan
        return Measured(distance, distance / self.spread, share, upper)


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
