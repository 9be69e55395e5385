"""Solves through `K = R R^T` that measure and mend their residuals in the dual space, by forward products alone."""

from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.linalg._precision import widened
from fipgeo.linalg._stacks import norms, scaled, wide
from fipgeo.linalg._system import System, ratio
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Outcome, Solution

Inverse = Callable[[Tensor], Tensor]


def dual_solved(
    system: System,
    root: LinearOperator,
    scale: float,
    dual: Tensor,
    inverses: list[Inverse],
    rtol: float | None,
    refine: int,
) -> Solution | None:
    """`(scale R^T R + damping) x = b` for all dampings and right-hand sides; None where that does not converge.

    With y of the dual, `x = (b - scale R^T y) / damping` leaves

        b - (scale R^T R + damping) x = scale R^T q        q = y - R x

    so R x, a forward product with the x that is returned, tells the residual: `scale sqrt(q^T K q)`, to which the
    rounding of K may add `eps tr(K) |q|^2` under the root. A correction is
    `scale R^T d` with `(scale K + damping) d = q`, one adjoint product. The rounding of `R^T y` outside the row space,
    which R x does not see, is added as two units in the last place of `scale R^T y`.

    Args:
        system: The damped system.
        root: R.
        scale: Factor of `R^T R`.
        dual: K.
        inverses: `y -> (scale K + damping)^{-1} y` for every damping.
        rtol: The relative residual asked for, or None.
        refine: Most corrections.
    """
    rtol = system.tolerance(rtol)
    root, _ = widened(root, system.rhs.dtype)
    high, count = wide(system.rhs.device), len(system.base)
    shifts = torch.tensor(system.dampings, dtype=high, device=system.rhs.device).repeat_interleave(count)
    eps = torch.finfo(root.dtype if system.exact else system.own_dtype).eps

    def inverted(stack: Tensor) -> Tensor:
        return torch.cat([inverse(part) for inverse, part in zip(inverses, stack.split(count), strict=True)])

    def pulled(stack: Tensor) -> Tensor:
        system.num_products += len(stack)
        return root.adjoint((scale * stack).to(system.rhs.dtype))

    slack = torch.finfo(dual.dtype).eps * dual.diagonal().sum().to(high)
    system.num_products += count
    y = inverted(root(system.base).to(high).repeat(len(inverses), 1))
    back = pulled(y)
    floor = 2 * eps * norms(back)
    x = system.divided(system.rhs - back)
    size = torch.full_like(system.lengths, torch.inf)
    for step in range(refine + 1):
        system.num_products += len(x)
        q = y - root(x).to(high)
        missed = ((q.to(dual.dtype) @ dual).to(high) * q).sum(-1).clamp(min=0) + slack * q.square().sum(-1)
        before, size = size, ratio((scale**2 * missed + floor.square()).sqrt(), system.lengths)
        if bool((size <= rtol).all()):
            norm = float(ratio(system.lengths, norms(x)).max())  # |A x| is |b| by now
            return system.solution(x, size, system.judged(Outcome.CONVERGED, x, rtol, norm), step)
        if not bool(((size <= rtol) | (size < 0.5 * before)).all()):
            return None
        if step < refine:
            d = inverted(q)
            x = x + pulled(d)
            y = y - scaled(shifts, d)
    return None
