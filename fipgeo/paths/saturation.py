"""Geometries that confident outputs make blind: what to take in their place, and a warning where one is taken."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fipgeo.data import Batches
from fipgeo.field import MetricField
from fipgeo.outputs import Categorical
from fipgeo.paths.record import PathResult


class SaturationWarning(UserWarning):
    """The chosen geometry hardly feels the outputs of this model, so it protects little."""


SATURATED = 0.05
"""A geometry that keeps less than this share of its strength at a model's outputs protects little."""

TEMPERATURES = tuple(Categorical(temperature=2.0**k) for k in range(1, 7))


def tempered(field: MetricField, new: Batches, after: PathResult | None) -> MetricField:
    """The field in the geometry of a path that goes on; else tempered probabilities if the new targets are classes."""
    if after is not None:
        known = [g for g in TEMPERATURES if repr(g) == after.settings.get("geometry")]
        return field.under(known[0]) if known else field
    batch = new.first()
    targets = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
    outputs = field.map.check(field.function.batches.first())
    classes = isinstance(targets, Tensor) and targets.dtype == torch.long and targets.dim() == 1
    if not (classes and all(f.dim() == 2 and f.shape[1] > 1 for f in outputs)):
        return field
    open_enough = (g for g in TEMPERATURES if min(map(g.openness, outputs)) >= SATURATED)
    return field.under(next(open_enough, TEMPERATURES[-1]))


def check_openness(field: MetricField) -> None:
    """Check the model on the first batch; say so when the geometry is nearly blind at its outputs."""
    batch = field.function.batches.first()
    outputs = field.map.check(batch)
    counting = zip(outputs, field.function.masks(outputs, batch), strict=True)
    counting = (f if m is None else f[m] for f, m in counting)
    openness = min((field.geometry.openness(f) for f in counting if f.numel()), default=1.0)
    if openness < SATURATED:
        warnings.warn(
            f"geometry {field.geometry} is saturated: its metric keeps {openness:.1%} of its strength at this model's"
            " confident outputs, so it protects little; use geometry='logits' or Categorical(temperature=4)",
            SaturationWarning,
            stacklevel=3,
        )
