"""A top eigenbasis along a curve, against dense eigen-decompositions."""

import pytest
import torch

from fipgeo.geodesics import track
from fipgeo.linalg import principal_angles

from .. import oracles
from .charts import field_of, mlp


def test_ritz_values_are_eigenvalues_where_the_basis_is_renewed_and_near_them_elsewhere() -> None:
    net, x = mlp(2)
    field = field_of(net, x)
    v = torch.randn(field.space.dim, generator=torch.Generator().manual_seed(0))
    points = field.map.point() + torch.linspace(0, 0.6, 4)[:, None] * v
    always, seldom = track(field, points, 2, tol=0), track(field, points, 2, tol=0.2)
    assert bool(always.refreshed.all()) and not bool(seldom.refreshed.all())
    vectors = torch.empty(0)
    for i, theta in enumerate(points):
        field.space.assign_(net, theta)
        root = oracles.root(net, x)
        values, vectors = torch.linalg.eigh(root.T @ root / len(x))
        assert torch.allclose(always.values[i], values[-2:].flip(0))
        bound = float(seldom.residuals[i].clamp(max=0.2) * values[-1] * 2)
        assert float((seldom.values[i] - values[-2:].flip(0)).abs().max()) <= bound
    assert torch.allclose(principal_angles(always.vectors, vectors.T[-2:]), torch.zeros(2), atol=1e-6)
    assert float(always.angles[0].max()) < 1e-7 and float(always.angles[-1].max()) > 0.1
    with pytest.raises(ValueError, match="points"):
        track(field, points[0], 2)
