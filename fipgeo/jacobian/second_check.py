"""A check of second derivatives on the user's own model: against differences of the first, in float64."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.jacobian.autodiff import push_forward, push_transposed
from fipgeo.jacobian.decomposed import Decomposed
from fipgeo.jacobian.embedded import EmbeddedOutputs
from fipgeo.jacobian.second import SecondOrder

log = logging.getLogger(__name__)

STEPS = (1e-5, 1e-6)


@dataclass(frozen=True)
class SecondDerivativeGap:
    """How far z''[v, v] is from differences of z'[v].

    Attributes:
        gap: |found - difference| over the larger norm, outputs with a kink left out; the smaller of both steps.
        gaps: The same over all outputs, one number a step.
        kinked: Share of the outputs whose differences disagree between the steps: z' jumps nearby (a ReLU or a maximum
            changes sides), and a difference measures the jump, not z''.
        steps: By how much the weights were moved, relative to their norm.
        dtype: Precision of the comparison; float64 unless the model cannot be evaluated in it.
        rounding: Relative gap between z'' in the model's own precision and in `dtype`.
        route: How z'' was computed (see `SecondOrder`).
    """

    gap: float
    gaps: tuple[float, float]
    kinked: float
    steps: tuple[float, float]
    dtype: torch.dtype
    rounding: float
    route: str

    def explain(self) -> str:
        """What was found, in words."""
        kinks = f"{self.kinked:.1%} of the outputs have a kink that near" if self.kinked else "no kink that near"
        return (
            f"z'' by {self.route} mode is {self.gap:.1e} away from differences of z' with steps {self.steps[0]:.0e} and"
            f" {self.steps[1]:.0e} in {self.dtype} ({kinks}); rounding in the model's precision {self.rounding:.1e}"
        )


def second_derivative_gap(
    function: EmbeddedOutputs,
    theta: Tensor,
    v: Tensor,
    *,
    steps: tuple[float, float] = STEPS,
    allow_finite_difference: bool = False,
) -> SecondDerivativeGap:
    """Compare z''[v, v] with central differences of z'[v] at two steps, in float64 whatever the model's precision.

    A network of ReLUs is piecewise smooth: z'' is that of the piece which holds theta. Steps are small, so that few
    outputs cross into another piece; those that do are counted and left out of `gap`. Costs some 40 forward passes.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`.
        v: One direction, `[D]`; not zero.
        steps: Two moves of the weights relative to their norm (or to 1, if that is larger).
        allow_finite_difference: As in `SecondOrder`.

    Raises:
        ValueError: v is zero, or steps are not two different positive numbers; or see `SecondOrder`.

    Examples:
        >>> from fipgeo import OutputMap, as_batches
        >>> from fipgeo.outputs import Logits
        >>> with torch.random.fork_rng():
        ...     net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
        >>> z = EmbeddedOutputs(OutputMap(net), Logits(), as_batches(torch.eye(3)))
        >>> theta = z.map.point()
        >>> second_derivative_gap(z, theta, torch.ones_like(theta)).gap < 1e-6
        True
    """
    if len(steps) != 2 or not min(steps) > 0 or steps[0] == steps[1]:
        raise ValueError(f"steps: got {steps}, expected two different positive numbers such as {STEPS}")
    if v.shape != theta.shape or not bool(v.any()):
        raise ValueError(f"v: got shape {list(v.shape)}, expected one direction {list(theta.shape)} that is not zero")
    own = SecondOrder(function, theta, allow_finite_difference=allow_finite_difference)
    plain = own.second(theta, v)
    wide, found = _widened(function), plain
    try:
        found = SecondOrder(wide, theta.double(), survey=own.survey, route=own.route).second(theta.double(), v.double())
    except (RuntimeError, TypeError) as error:
        log.info("the comparison stays in %s, since the model cannot be evaluated in float64: %s", plain.dtype, error)
        wide = function
    theta, v = theta.to(found.dtype), v.to(found.dtype)
    coarse, fine = (_difference(wide, theta, v, step) for step in sorted(steps, reverse=True))
    typical = fine.abs().median()
    kinked = (coarse - fine).abs() > 1e-3 * (fine.abs() + typical)
    gaps = _relative(found, coarse), _relative(found, fine)
    smooth = ~kinked
    return SecondDerivativeGap(
        gap=min(_relative(found[smooth], d[smooth]) for d in (coarse, fine)),
        gaps=gaps,
        kinked=float(kinked.double().mean()),
        steps=(max(steps), min(steps)),
        dtype=found.dtype,
        rounding=_relative(plain.to(found.dtype), found),
        route=own.route,
    )


def _difference(function: EmbeddedOutputs, theta: Tensor, v: Tensor, step: float) -> Tensor:
    """z''[v, v] by a central difference of z'[v] over the data, `[N * M]`."""
    h = step * max(float(theta.norm()), 1.0) / float(v.norm())
    tangent, parts = function.map.named(v), []
    ends = [function.map.named(theta + sign * h * v) for sign in (1, -1)]
    with function.map.frozen(), Decomposed():
        for batch in function.batches:
            f = function.on(batch)
            try:
                ahead, behind = (push_forward(f, end, tangent) for end in ends)
            except RuntimeError:
                ahead, behind = (push_transposed(f, end, tangent) for end in ends)
            parts.append((ahead - behind) / (2 * h))
    return torch.cat(parts)


def _relative(a: Tensor, b: Tensor) -> float:
    gap = float((a - b).norm())
    return gap / max(float(a.norm()), float(b.norm())) if gap else 0.0


def _widened(function: EmbeddedOutputs) -> EmbeddedOutputs:
    """The same function evaluated in float64, whatever the precision of its module; the module is left alone."""
    wide = copy.copy(function.map)
    wide.dtype, wide.space = torch.float64, replace(wide.space, dtype=torch.float64)
    wide._dtypes = dict.fromkeys(wide._dtypes, torch.float64)
    return replace(function, map=wide)
