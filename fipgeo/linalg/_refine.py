"""An approximate inverse, made accurate: refinement, then conjugate gradients that it preconditions."""

from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.linalg._stacks import dots, norms, scaled
from fipgeo.linalg._system import System, ratio
from fipgeo.linalg.result import Outcome, Solution

Inverse = Callable[[Tensor, Tensor | None], Tensor]
_POLISH_STEPS = 30
_PATIENCE = 4


def refined(system: System, inverse: Inverse, rtol: float | None, refine: int) -> Solution:
    """Solve, and refine rows whose true residual is too large; a step that does not help is not taken.

    A row that a step does not bring to half leaves. If the vectors are in float64, conjugate gradients with the
    inverse as preconditioner then go on with what is left, for inverses that are too rough to contract.

    Args:
        system: the damped system.
        inverse: `(b, rows)` to about `(A + damping)^{-1} b` for the stack of the system's rows given, or of all of
            them for None.
        rtol: the relative residual asked for, or None.
        refine: most refinements; 0 leaves the first answer as it is.
    """
    rtol = system.tolerance(rtol)
    x = inverse(system.rhs, None)
    product = system(x)
    r = system.rhs - product
    norm = float(ratio(norms(product), norms(x)).nan_to_num(0).max()) if len(x) else 0.0
    size = system.relative(r)
    steps = 0
    rows = (size > rtol).nonzero().squeeze(-1)
    while steps < refine and len(rows):
        steps += 1
        trial = x[rows] + inverse(r[rows], rows)
        left = system.residual(trial, rows)
        new, old = ratio(norms(left), system.lengths[rows]), size[rows]
        better = new < old
        some = rows[better]
        x[some], r[some], size[some] = trial[better], left[better], new[better]
        rows = rows[(new < 0.5 * old) & (new > rtol)]
    rows = (size > rtol).nonzero().squeeze(-1)
    if refine and len(rows) and x.dtype == torch.float64:
        steps += _polish(system, inverse, rtol, rows, (x, r, size))
    finite = bool(torch.isfinite(size).all())
    outcome = Outcome.CONVERGED if bool((size <= rtol).all()) else Outcome.STAGNATED
    outcome = system.judged(outcome, x, rtol, norm) if finite else Outcome.NOT_FINITE
    return system.solution(x, size, outcome, steps)


def _polish(system: System, inverse: Inverse, rtol: float, rows: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> int:
    """Preconditioned conjugate gradients on `rows`; writes x, r and sizes where they got better; the steps."""
    x, r, size = state
    rows = rows[torch.isfinite(size[rows])]
    y, left, best = x[rows], r[rows], size[rows]
    p, z, rz = torch.zeros_like(left), torch.zeros_like(left), torch.zeros_like(best)
    steps = waited = 0
    while len(rows) and steps < _POLISH_STEPS and waited < _PATIENCE:
        steps += 1
        new = inverse(left, rows)
        # Polak and Ribiere's beta: the inverse rounds, so it is not quite the same map at every step
        beta = torch.where(rz > 0, (dots(left, new) - dots(left, z)) / torch.where(rz > 0, rz, 1.0), 0.0)
        p, z, rz = new + scaled(beta, p), new, dots(left, new)
        image = system(p, rows)
        curvature = dots(p, image)
        good = (curvature > 0) & torch.isfinite(curvature)
        alpha = torch.where(good, dots(left, p) / torch.where(good, curvature, 1.0), 0.0)
        y, left = y + scaled(alpha, p), left - scaled(alpha, image)
        now = ratio(norms(left), system.lengths[rows])
        if bool(((now <= 0.5 * rtol) | ~good).all()):
            break
        waited = 0 if bool((now < 0.5 * best).any()) else waited + 1
        best = torch.minimum(best, now)
    if len(rows):
        left = system.residual(y, rows)
        now = ratio(norms(left), system.lengths[rows])
        better = now < size[rows]
        some = rows[better]
        x[some], r[some], size[some] = y[better], left[better], now[better]
    return steps
