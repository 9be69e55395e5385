"""The metric as a function of the weights, and the front door: the metric of a model as it is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import Batches, as_batches
from fipgeo.jacobian import MAX_BYTES, EmbeddedOutputs, JacobianRoot
from fipgeo.jacobian.embedded import Mask
from fipgeo.metrics import Metric
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.outputs import Geometry, as_geometry
from fipgeo.space import WeightSpace, Where


class MetricField:
    """g as a function of the weights: model, inputs and geometry, with the point left open.

    Args:
        model: Any module; evaluated in eval mode, never changed.
        inputs: Tensor `[N, ...]`, list of batches, or re-iterable loader (see `as_batches`). No labels are needed.
        geometry: How outputs are compared: "logits" (default), "categorical" (the Fisher), "bernoulli", "euclidean",
            "gaussian", "cosine", or a `Geometry`.
        params: Which parameters are coordinates: glob, globs, predicate, or None for all that require a gradient.
        batch_size: Examples in a batch when `inputs` is a tensor.
        forward_fn: (model, batch) -> raw outputs, for models with a signature of their own.
        output_fn: raw outputs -> the tensor or tensors to compare.
        mask: Positions of token-level outputs `[n, T, C]` that count: the name of an entry of the batch such as
            "attention_mask", or batch -> bool `[n, T]`.
        per: "example" (g is a mean over examples) or "position" (a mean over all positions that count).
        dtype: torch.float64 evaluates the whole model in float64, on copies; None for its own precision, with algebra
            in float32 at least.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        geometry: str | Geometry = "logits",
        params: Where = None,
        *,
        batch_size: int | None = None,
        forward_fn: ForwardFn | None = None,
        output_fn: OutputFn | None = None,
        mask: Mask = None,
        per: str = "example",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.map = OutputMap(model, params, forward_fn=forward_fn, output_fn=output_fn, dtype=dtype)
        self.geometry = as_geometry(geometry)
        self.function = EmbeddedOutputs(self.map, self.geometry, as_batches(inputs, batch_size), mask, per)

    @property
    def space(self) -> WeightSpace:
        """The weight space."""
        return self.map.space

    def at(self, theta: Tensor | None = None, *, engine: str = "auto", max_bytes: int = MAX_BYTES) -> Metric:
        """The metric at a flat point `[D]`; at the model's present weights when None."""
        theta = self.map.point() if theta is None else theta
        root = JacobianRoot(self.function, theta, engine=engine, max_bytes=max_bytes)
        return Metric(root, root.survey.normaliser)

    def on(self, batches: Batches) -> MetricField:
        """The same field on other inputs."""
        out = object.__new__(MetricField)
        out.map, out.geometry = self.map, self.geometry
        out.function = self.function.renewed(batches)
        return out

    def under(self, geometry: str | Geometry) -> MetricField:
        """The same inputs compared in another geometry."""
        out = object.__new__(MetricField)
        out.map, out.geometry = self.map, as_geometry(geometry)
        out.function = replace(self.function, geometry=out.geometry)
        return out


def metric(
    model: nn.Module,
    inputs: Any,
    *,
    geometry: str | Geometry = "logits",
    params: Where = None,
    batch_size: int | None = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    mask: Mask = None,
    per: str = "example",
    dtype: torch.dtype | None = None,
    engine: str = "auto",
    max_bytes: int = MAX_BYTES,
) -> Metric:
    """The metric of a model at its present weights, g = R^T R / N with R = d phi(F(theta)) / d theta.

    Args:
        model: See `MetricField`.
        inputs: See `MetricField`.
        geometry: See `MetricField`.
        params: See `MetricField`.
        batch_size: See `MetricField`.
        forward_fn: See `MetricField`.
        output_fn: See `MetricField`.
        mask: See `MetricField`.
        per: See `MetricField`.
        dtype: See `MetricField`.
        engine: How products are computed: "auto", "autodiff", "linearised", "factored" or "materialised" (see
            `JacobianRoot`); `explain()` prints what each would take.
        max_bytes: Most memory that an engine may hold.

    Returns:
        The metric. Later changes of the chosen weights do not move it; the model's other parameters and its buffers are
        read at every product, so leave those alone while the metric is in use.

    Raises:
        ValueError: Bad inputs, patterns, outputs or modes; the message names the cure.
        TypeError: `model` is no module, or `inputs` can be passed over only once.

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> g = metric(net, torch.eye(3), geometry="euclidean")
        >>> round(g.trace().value, 6), g.rank()
        (4.0, 6)
    """
    field = MetricField(
        model,
        inputs,
        geometry,
        params,
        batch_size=batch_size,
        forward_fn=forward_fn,
        output_fn=output_fn,
        mask=mask,
        per=per,
        dtype=dtype,
    )
    return field.at(engine=engine, max_bytes=max_bytes)
