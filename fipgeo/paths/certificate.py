"""What held-out inputs prove about a point: intervals and bounds, from numbers that no decision has seen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 2**22
"""Entries of a bootstrap's index that are held at a time."""


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
    _check_confidence(confidence)
    if changed == total:
        return 1.0
    from scipy.special import betaincinv

    return float(betaincinv(changed + 1, total - changed, confidence))


def mean_interval(
    values: Tensor, confidence: float = 0.95, *, num_samples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Two-sided bootstrap interval for the mean of independent values `[N]`.

    Bias-corrected and accelerated percentiles of the means of `num_samples` resamples (BCa; Efron, Better Bootstrap
    Confidence Intervals, JASA 1987). The acceleration of a mean is known in closed form, sum c^3 / (6 (sum c^2)^(3/2))
    with c the values less their mean. Like any bootstrap it covers less often than it says where values are few or
    some of them carry the whole mean (benchmarks/coverage.py measures how often).

    Args:
        values: One number an input.
        confidence: Between 0 and 1.
        num_samples: Resamples.
        seed: Of a private generator, so that equal values give equal intervals.

    Returns:
        Both ends; NaN twice for a single value, from which nothing can be said about others.

    Raises:
        ValueError: There is no value, or the confidence is out of range.

    Examples:
        >>> low, high = mean_interval(torch.arange(100.0))
        >>> 43 < low < 45 and 54 < high < 56
        True
    """
    _check_confidence(confidence)
    if values.dim() != 1 or not len(values):
        raise ValueError(f"values: got shape {list(values.shape)}, expected [N] with at least one value")
    if len(values) == 1:
        return math.nan, math.nan
    values = values.detach().double().cpu()
    mean = values.mean()
    centred = values - mean
    square = float(centred.square().sum())
    if not square > 0:
        return float(mean), float(mean)
    means = _resampled_means(values, num_samples, seed)
    below = ((means < mean).double().mean() + (means <= mean).double().mean()) / 2
    edge = 0.5 / num_samples
    bias = torch.special.ndtri(below.clamp(edge, 1 - edge))
    acceleration = float(centred.pow(3).sum()) / (6 * square**1.5)
    tail = (1 - confidence) / 2
    z = bias + torch.special.ndtri(torch.tensor([tail, 1 - tail], dtype=torch.float64))
    low, high = torch.quantile(means, torch.special.ndtr(bias + z / (1 - acceleration * z))).tolist()
    return low, high


@dataclass(frozen=True)
class Certificate:
    """What the held-out inputs say about other inputs like them.

    No step, refusal or choice of the walk has seen these inputs, so the statements hold for the point as they stand.
    They are statements about one point named beforehand; `PathResult.best` says how it picks among several.

    Attributes:
        confidence: Of every statement below.
        distance_low: Lower end of the bootstrap interval of `PathPoint.distance` (see `mean_interval`).
        distance_high: Its upper end.
        drift_low: The same of `PathPoint.drift`; its unit, the spread of the start's outputs, is taken as it is.
        drift_high: Its upper end.
        worst_class: The class, as the start predicts it, whose predictions have changed most often; -1 where outputs
            do not predict one class for an input.
        worst_changed: Share of the inputs of that class whose prediction changed.
        worst_upper: Exact upper bound on it. These bounds hold for all classes at once (Bonferroni: each is taken at
            1 - (1 - confidence) / K, with K the classes among the held-out inputs).
        classes_upper: The largest of the bounds: no class changes more often than this.
        confidence_change: Mean confidence (largest class probability) less that of the start. Nothing is known about
            right and wrong without labels; but where the start's mean confidence is off its accuracy by c, this point's
            is off by at most |c| + |confidence_change| + changed.
    """

    confidence: float
    distance_low: float
    distance_high: float
    drift_low: float
    drift_high: float
    worst_class: int = -1
    worst_changed: float = math.nan
    worst_upper: float = math.nan
    classes_upper: float = math.nan
    confidence_change: float = math.nan


def certify(
    squared: Tensor,
    spread: float,
    moved: Tensor | None = None,
    classes: Tensor | None = None,
    surer: Tensor | None = None,
    confidence: float = 0.95,
) -> Certificate:
    """The certificate of one point.

    Args:
        squared: Squared distance to the start's outputs of every held-out input, `[N]`.
        spread: The unit of drift.
        moved: Which inputs are predicted differently, `[n]`, where outputs predict.
        classes: What the start predicts for them, `[n]`, where that is one class an input.
        surer: Change of their confidence, `[n]`.
        confidence: Between 0 and 1.

    Returns:
        The certificate.
    """
    low, high = (math.sqrt(max(end, 0.0)) if end == end else end for end in mean_interval(squared, confidence))
    worst: tuple[int, float, float, float] = (-1, math.nan, math.nan, math.nan)
    if moved is not None and classes is not None and len(moved):
        worst = _worst(moved, classes, confidence)
    change = math.nan if surer is None or not len(surer) else float(surer.double().mean())
    return Certificate(confidence, low, high, low / spread, high / spread, *worst, change)


def _worst(moved: Tensor, classes: Tensor, confidence: float) -> tuple[int, float, float, float]:
    """The class with the largest share of changes (of several the one with the larger bound), and the largest bound."""
    present, where = classes.cpu().unique(return_inverse=True)
    total = torch.bincount(where, minlength=len(present)).tolist()
    changed = torch.bincount(where[moved.cpu()], minlength=len(present)).tolist()
    each = 1 - (1 - confidence) / len(present)
    bounds = {pair: changed_upper_bound(*pair, each) for pair in set(zip(changed, total, strict=True))}
    rows = [(k / n, bounds[k, n], int(c)) for k, n, c in zip(changed, total, present.tolist(), strict=True)]
    share, bound, which = max(rows, key=lambda row: row[:2])
    return which, share, bound, max(bounds.values())


def _resampled_means(values: Tensor, num_samples: int, seed: int) -> Tensor:
    """Means of samples with replacement, `[num_samples]`."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(CHUNK // len(values), 1)
    parts = []
    for start in range(0, num_samples, rows):
        shape = (min(rows, num_samples - start), len(values))
        parts.append(values[torch.randint(len(values), shape, generator=generator)].mean(1))
    return torch.cat(parts)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: got {confidence}, expected a number between 0 and 1")
