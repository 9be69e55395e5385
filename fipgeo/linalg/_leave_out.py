"""Leave-one-out algebra of the exchangeable estimators, and their jackknife errors.

A sketch of m test vectors gives m estimates, each with one vector left out of the subspace and used for the
rest outside it; their mean is the answer. They are correlated, so their spread alone understates the error (by
up to an order of magnitude in the variance where the spectrum falls fast). The error here is the jackknife
over test vectors: the answer is formed again without each of them, that is from estimates with two left out,

    std_error^2 = sum_j (t_(-j) - mean_j t_(-j))^2,

whose mean is at least the variance of the answer with m - 1 vectors (Efron & Stein, 1981). All of it follows
from `m x m` matrices, in float64 and without further products.
"""

import torch
from torch import Tensor

from fipgeo.linalg._stacks import dots, inner, wide

_TINY = 1e-14  # 1 - cosine^2 of two left-out directions is known to rounding


class Sketch:
    """An orthonormal basis Q of `A omega_i` and, for each i, the direction s_i it loses without `omega_i`.

    Attributes:
        q: Q as rows, `[r, n]`; r = m unless the images are dependent to rounding.
        r: coordinates of the images, `[r, m]` float64, `A omega_i = Q r_i`.
        s: unit columns `[r, m]`, `s_i` orthogonal to all `r_j`, j != i; zero where r < m, as then no image is
            missed.
        full: whether r = m.
    """

    def __init__(self, images: Tensor) -> None:
        images = workable(images)
        q, r = torch.linalg.qr(images.T)
        small = r.cpu().double()
        u, size, vh = torch.linalg.svd(small, full_matrices=False)
        m = len(images)
        kept = int((size > m * torch.finfo(images.dtype).eps * size[0]).sum())
        self.full = kept == m
        if self.full:
            s = (u / size) @ vh
            self.q, self.r, self.s = q.T, small, s / s.norm(dim=0)
        else:
            self.q = u[:, :kept].T.to(q.device, q.dtype) @ q.T
            self.r, self.s = size[:kept, None] * vh[:kept], torch.zeros(kept, m, dtype=torch.float64)

    def pair_cosines(self) -> tuple[Tensor, Tensor]:
        """`c_ij = <s_i, s_j>` and `1 - c_ij^2`, `[m, m]`; on the diagonal 0 and 1."""
        cosines = (self.s.T @ self.s).fill_diagonal_(0)
        return cosines, (1 - cosines.square()).clamp(min=_TINY)


def workable(rows: Tensor) -> Tensor:
    """In a dtype that factorisations know: at least float32."""
    return rows if rows.dtype.itemsize >= 4 else rows.float()


def small(x: Tensor, y: Tensor) -> Tensor:
    """All inner products of rows, in float64 on the CPU."""
    return inner(workable(x), workable(y)).cpu().double()


def jackknife(leave_two_out: Tensor) -> Tensor:
    """The error of a mean over i from `t_ij`, the estimates without i formed without vector j as well."""
    m = len(leave_two_out)
    means = leave_two_out.clone().fill_diagonal_(0).sum(0) / max(1, m - 1)
    return (means - means.mean()).square().sum().sqrt()


def xtrace(sketch: Sketch, omega: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The m leave-one-out estimates of the trace, and the jackknife error of their mean.

    With `P_i` the projector on the images without the i-th,

        t_i = tr P_i A + (n - r_i) <v, A v> / |v|^2,    v = (I - P_i) omega_i,

    where `omega_i` is Gaussian, so that v / |v| is uniform in the complement, of dimension `n - r_i`.

    Args:
        sketch: Q, of `A omega`.
        omega: test vectors `[m, n]`.
        z: `A Q` as rows, `[r, n]`.
    """
    n, m = omega.shape[1], len(omega)
    r, s = sketch.r, sketch.s
    h, w, t = small(sketch.q, z), small(sketch.q, omega), small(z, omega)
    # every inner product that occurs, row i for omega_i, column j for a direction s_j
    sws, sts, shs = w.T @ s, t.T @ s, s.T @ h @ s
    wr, tw, whw, ww = (w * r).sum(0), (t * w).sum(0), (w * (h @ w)).sum(0), w.square().sum(0)
    whs = w.T @ (h + h.T) @ s
    sr, own = (s * r).sum(0), shs.diagonal()
    lengths = dots(omega, omega).cpu().double()

    def estimates(a: Tensor, b: Tensor, inside: Tensor, rank: int) -> Tensor:
        """`t_ij`: `P omega_i = Q (w_i - a_ij s_i - b_ij s_j)`, `inside = tr P A`; every entry `[m, m]`."""
        column, i, j = slice(None), (slice(None), None), (None, slice(None))
        xr = wr[i] - a * sr[i]
        xt = tw[i] - a * sts.diagonal()[i] - b * sts[column]
        xhx = whw[i] - a * whs.diagonal()[i] - b * whs + a.square() * own[i] + b.square() * own[j]
        xhx = xhx + a * b * (shs + shs.T)
        left = lengths[i] - ww[i] + sws.diagonal()[i] * a + sws * b
        return inside + (n - rank) * (wr[i] - xr - xt + xhx) / left

    alone = sws.diagonal()[:, None].expand(m, m)
    rank = m - 1 if sketch.full else len(sketch.r)
    single = estimates(alone, torch.zeros_like(alone), (h.trace() - own)[:, None], rank).diagonal()
    if not sketch.full:
        return single, single.std() / m**0.5
    cosines, squared_sine = sketch.pair_cosines()
    a, b = (alone - cosines * sws) / squared_sine, (sws - cosines * alone) / squared_sine
    lost = (own[:, None] + own - cosines * (shs + shs.T)) / squared_sine
    return single, jackknife(estimates(a, b, h.trace() - lost, m - 2))


def xnystrace(h: Tensor, r: Tensor, n: int) -> tuple[Tensor, Tensor] | None:
    """The same for psd A by Nystrom approximations `Y H^-1 Y^T`; None if H is not positive definite.

    The test vectors are a random orthonormal frame: given the others, one of them is uniform in their
    complement, of dimension `n - m + 1`, on which the approximation without it leaves `1 / (H^-1)_ii`.

    Args:
        h: `H = Omega^T A Omega`, `[m, m]` float64.
        r: triangular factor of `Y = A Omega`, `[m, m]` float64.
        n: size of A.
    """
    m = len(h)
    lower, failed = torch.linalg.cholesky_ex(h)
    if int(failed):
        return None
    inverse = torch.cholesky_inverse(lower)
    half = torch.linalg.solve_triangular(lower, r.T, upper=False)
    lost = torch.linalg.solve_triangular(lower.T, half, upper=True)
    lost = lost @ lost.T  # H^-1 Y^T Y H^-1
    whole, d, f = half.square().sum(), inverse.diagonal(), lost.diagonal()
    single = whole - f / d + (n - m + 1) / d
    share = inverse / d  # G_ij / G_jj
    d_two = (d[:, None] - inverse * share).fill_diagonal_(1)
    d_two = torch.maximum(d_two, _TINY * d[:, None])
    f_two = f[:, None] - 2 * lost * share + f * share.square()
    return single, jackknife(whole - f / d - f_two / d_two + (n - m + 2) / d_two)


def xdiag(sketch: Sketch, columns: slice, omega: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the m leave-one-out estimates of the diagonal and its jackknife error, both `[n']` float64.

        d_i = diag(P_i A) + omega_i * (I - P_i) A omega_i

    Args:
        sketch: Q, of `A omega`.
        columns: the n' entries that are looked at.
        omega: random signs, `[m, n]`.
        z: `A^T Q` as rows, `[r, n]`.
    """
    m, dtype = len(omega), wide(omega.device)
    signs, q, z = (rows[:, columns].to(dtype) for rows in (omega, sketch.q, z))
    captured = (q * z).sum(0)
    if not sketch.full:
        return captured, torch.zeros_like(captured)
    s, sr = sketch.s.to(q), (sketch.s * sketch.r).sum(0)[:, None].to(q)
    v, w = s.T @ q, s.T @ z  # what Q and A^T Q lose with each vector
    value = captured + (sr * signs * v - v * w).mean(0)
    cosines, squared_sine = (entry.to(q) for entry in sketch.pair_cosines())
    g = (1 / squared_sine).fill_diagonal_(0)  # [i, j], j the vector left out of all
    cg = cosines * g
    rest = (g * sr).T @ (signs * v) - v * ((cg * sr).T @ signs)
    lost = g.T @ (v * w) - v * (cg.T @ w) - w * (cg.T @ v) + v * w * g.sum(0)[:, None]
    without = (rest - lost) / max(1, m - 1)
    return value, (without - without.mean(0)).square().sum(0).sqrt()
