"""Conjugate gradients for several dampings at once: residuals of all shifted systems are parallel."""

import torch
from torch import Tensor

from fipgeo.linalg._stacks import dots, norms, scaled
from fipgeo.linalg._system import System


def multishift(system: System, target: Tensor, limit: int) -> tuple[Tensor, list[Tensor]]:
    """Iterates for all rows `[p k, n]` of a damping path by one product an iteration for each right-hand side.

    The iteration runs on the smallest damping, `r` being its residual; the residual of the system shifted by
    sigma is `zeta r`. Rows whose residual is at its target by the recurrence rest. Nothing is judged here: a run
    that meets negative curvature or a product that is not finite stops, and the iterates so far are the start of
    an ordinary solve.

    Returns:
        x `[p k, n]`, and the residuals by the recurrence, `[p k]` after every iteration.
    """
    p, k = len(system.dampings), len(system.base)
    lowest = min(system.dampings)
    sigma = torch.tensor(system.dampings, dtype=system.lengths.dtype, device=system.rhs.device)[:, None] - lowest
    n = system.rhs.shape[1]
    x = system.rhs.new_zeros(p, k, n)
    directions = system.rhs.clone().reshape(p, k, n)
    target = target.reshape(p, k)
    r, direction = system.base.clone(), system.base.clone()
    rr = dots(r, r)
    zeta, zeta_old = torch.ones_like(target), torch.ones_like(target)
    alpha_old, beta = torch.ones_like(rr), torch.zeros_like(rr)
    sizes = [norms(system.rhs)]
    while len(sizes) <= limit:
        live = (zeta.abs() * rr.sqrt() > target) & torch.isfinite(rr)
        if not bool(live.any()):
            break
        run = live.any(0)
        system.num_products += int(run.sum())
        rows = slice(None) if bool(run.all()) else run.nonzero().squeeze(-1)
        product = system.operator(direction[rows])
        product = product + lowest * direction[rows]
        curvature = torch.zeros_like(rr)
        curvature[rows] = dots(direction[rows], product)
        floor = torch.finfo(r.dtype).eps * dots(direction, direction) * lowest
        good = (curvature > floor) & torch.isfinite(curvature)
        if not bool(good[run].all()):
            break
        alpha = torch.where(run, rr / torch.where(run, curvature, 1.0), 0.0)
        rise = alpha * beta * (zeta_old - zeta) + zeta_old * alpha_old * (1 + alpha * sigma)
        zeta_new = torch.where(live & (rise != 0), zeta * zeta_old * alpha_old / rise, zeta)
        r[rows] -= scaled(alpha[rows], product)
        rr_new = torch.where(run, dots(r, r), rr)
        beta = torch.where(run & (rr > 0), rr_new / rr, 0.0)
        turn = torch.where(live, zeta_new / zeta, 0.0)
        for i in live.any(1).nonzero().squeeze(-1).tolist():
            x[i] += scaled(torch.where(live[i], alpha * turn[i], 0.0), directions[i])
            directions[i] = scaled(zeta_new[i], r) + scaled(beta * turn[i].square(), directions[i])
        direction = r + scaled(beta, direction)
        zeta_old, zeta = torch.where(live, zeta, zeta_old), zeta_new
        alpha_old, rr = torch.where(run, alpha, alpha_old), rr_new
        sizes.append(torch.where(live, zeta.abs() * rr.sqrt(), sizes[-1].reshape(p, k)).reshape(-1))
    return x.reshape(p * k, n), sizes
