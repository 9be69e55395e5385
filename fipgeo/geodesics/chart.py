"""Coordinates: all weights, or the coefficients of a basis at a point."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fipgeo.constraints import Constraints
from fipgeo.field import MetricField
from fipgeo.jacobian import JacobianRoot, SecondOrder, Taylor
from fipgeo.jacobian.cost import Costs
from fipgeo.linalg import LinearOperator
from fipgeo.metrics import Metric


@dataclass(frozen=True, eq=False)
class Chart:
    """A metric field in coordinates c: theta = origin + B c, with g pulled back to B^T g B; or theta = c without B.

    Attributes:
        field: The metric as a function of the weights.
        basis: B `[D, r]`; None for the weights themselves.
        origin: theta at c = 0, `[D]`; None for the model's weights when the chart is made. Only with a basis.

    Raises:
        ValueError: The basis or the origin does not fit the weight space, or there is an origin and no basis.
        NotImplementedError: A weight is kept on a manifold (a `geoopt.ManifoldParameter`).

    Examples:
        >>> from fipgeo import MetricField, basis
        >>> net = torch.nn.Linear(2, 1)
        >>> field = MetricField(net, torch.eye(2), "euclidean")
        >>> chart = Chart(field, basis.inclusion(field.space, "bias"))
        >>> chart.dim, chart.weights(torch.ones(1)).shape, round(float(chart.at(torch.ones(1)).norm(torch.ones(1))), 6)
        (1, torch.Size([3]), 1.0)
    """

    field: MetricField
    basis: LinearOperator | None = None
    origin: Tensor | None = None

    def __post_init__(self) -> None:
        """Check the shapes; take the model's weights where no origin came."""
        dim = self.field.space.dim
        held = Constraints.of(self.field.map.module, self.field.space)
        held.refuse("field", "would leave their manifolds along a geodesic of the weights", "leave them out of params=")
        if self.basis is None:
            if self.origin is not None:
                raise ValueError("origin: coordinates that are the weights have their origin at zero; give a basis too")
            return
        if self.basis.shape[0] != dim:
            raise ValueError(f"basis: got shape {list(self.basis.shape)}, expected [{dim}, r]")
        origin = self.field.map.point() if self.origin is None else self.origin.detach().clone()
        if origin.shape != (dim,):
            raise ValueError(f"origin: got shape {list(origin.shape)}, expected [{dim}]")
        object.__setattr__(self, "origin", origin)

    @property
    def dim(self) -> int:
        """r, or D without a basis."""
        return self.field.space.dim if self.basis is None else self.basis.shape[1]

    @property
    def start(self) -> Tensor:
        """Coordinates where nothing else is said: zero coefficients, or the model's present weights."""
        if self.basis is None:
            return self.field.map.point()
        return torch.zeros(self.dim, dtype=self.basis.dtype, device=self.basis.device)

    def weights(self, c: Tensor) -> Tensor:
        """Theta at coordinates c, `[..., r]` to `[..., D]`."""
        return c if self.basis is None else self.origin + self.basis(c)  # type: ignore[operator]

    def named(self, c: Tensor) -> dict[str, Tensor]:
        """Theta at coordinates c as named tensors for `torch.func.functional_call`; differentiable by c."""
        return self.field.map.named(self.weights(c))

    def at(self, c: Tensor) -> Metric:
        """The metric at coordinates c, as a tensor on coordinates."""
        survey = self.second.survey
        root = JacobianRoot(self.field.function, self.weights(c), survey=survey)
        root.costs = self.costs
        root.prepare()
        found = Metric(root, survey.normaliser)
        return found if self.basis is None else found.pullback(self.basis)

    @cached_property
    def costs(self) -> Costs:
        """What engines and solves take; the same at every point."""
        theta = self.field.map.point() if self.origin is None else self.origin
        return JacobianRoot(self.field.function, theta, survey=self.second.survey).costs

    def taylor(self, c: Tensor, v: Tensor, w: Tensor) -> Taylor:
        """z, z'[v] and z''[v, w] at coordinates c, for stacks of tangents v `[k, r]` and one tangent w `[r]`."""
        if self.basis is not None:
            v, w = self.basis(v), self.basis(w)
        return self.second.taylor(self.weights(c), v, w)

    @cached_property
    def second(self) -> SecondOrder:
        """Second derivatives of the embedded outputs, by the route that held at the origin (or the model's weights)."""
        return SecondOrder(self.field.function, self.field.map.point() if self.origin is None else self.origin)


def as_chart(field: MetricField | Chart) -> Chart:
    """A chart from itself, or the weights as coordinates.

    Raises:
        TypeError: Neither came.
    """
    if isinstance(field, Chart):
        return field
    if not isinstance(field, MetricField):
        raise TypeError(
            f"field: got a {type(field).__name__}, expected a MetricField(model, inputs) or a Chart of one; a Metric"
            " belongs to one point, and a geodesic needs it at every point"
        )
    return Chart(field)
