"""The eigenvectors that outputs feel most, followed along a curve."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fipgeo.field import MetricField
from fipgeo.geodesics.chart import Chart, as_chart
from fipgeo.linalg import principal_angles
from fipgeo.metrics import Metric


@dataclass(frozen=True, eq=False)
class Frames:
    """A top eigenbasis along a curve.

    Attributes:
        values: The k Ritz values at every point, `[n, k]`, largest first.
        vectors: Of the last point, orthonormal rows `[k, r]`.
        angles: Principal angles between the basis at every point and that of the start, `[n, k]`, ascending.
        residuals: |g V - H V| / |g V| of the basis as it came to every point, `[n]`, H = V g V^T.
        refreshed: Where the basis was computed anew, `[n]`.
    """

    values: Tensor
    vectors: Tensor
    angles: Tensor
    residuals: Tensor
    refreshed: Tensor


def track(field: MetricField | Chart, points: Tensor, k: int, *, tol: float = 0.05) -> Frames:
    """Follow the k leading eigenvectors of g along points, computing them anew only where the old ones fail.

    At every point the old basis V is multiplied by g, k products. As long as its span is invariant to `tol`, the
    eigenvectors within it are taken (Rayleigh-Ritz); otherwise a spectrum is computed.

    Args:
        field: The metric as a function of the weights, or in the coordinates of a `Chart`.
        points: Coordinates, `[n, r]`, such as `Geodesic.points`.
        k: Eigenvectors.
        tol: Largest relative residual of the basis, which bounds the sines of its angles to an invariant span, in units
            of the gap below the k-th eigenvalue.

    Raises:
        ValueError: Shapes, or k is out of range.

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> field = MetricField(net, torch.tensor([[3.0, 0.0], [0.0, 4.0]]).double(), "euclidean")
        >>> found = track(field, torch.zeros(3, 2).double(), 1)
        >>> found.values[:, 0].tolist(), found.refreshed.tolist()
        ([8.0, 8.0, 8.0], [True, False, False])
    """
    chart = as_chart(field)
    if points.dim() != 2 or points.shape[1] != chart.dim or not len(points):
        raise ValueError(f"points: got shape {list(points.shape)}, expected [n, {chart.dim}] with n at least 1")
    start, ritz = _fresh(chart.at(points[0]), k)
    basis, found = start, [(ritz, float("inf"), True)]
    angles = [principal_angles(start, start)]
    for c in points[1:]:
        metric = chart.at(c)
        pushed = metric.matvec(basis)
        small = basis @ pushed.T
        residual = float((pushed - small @ basis).norm() / pushed.norm().clamp_min(1e-300))
        again = not residual <= tol
        if again:
            basis, ritz = _fresh(metric, k)
        else:
            values, turn = torch.linalg.eigh((small + small.T) / 2)
            basis, ritz = turn.T.flip(0) @ basis, values.flip(0)
        found.append((ritz, residual, again))
        angles.append(principal_angles(start, basis))
    ritzes, residuals, refreshed = zip(*found, strict=True)
    return Frames(torch.stack(ritzes), basis, torch.stack(angles), torch.tensor(residuals), torch.tensor(refreshed))


def _fresh(metric: Metric, k: int) -> tuple[Tensor, Tensor]:
    """The k leading eigenvectors and eigenvalues."""
    spectrum = metric.spectrum(k)
    assert spectrum.vectors is not None
    return spectrum.vectors, spectrum.values
