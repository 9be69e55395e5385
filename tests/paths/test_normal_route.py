"""Moves from the normal equations of few free weights, against dense algebra."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev

import fipgeo
from fipgeo.paths import Compensation, Kept, Position, compensate


@given(st.integers(0, 2**31), st.sampled_from([1e-4, 1e-2, 1.0]))
def test_the_move_is_that_of_dense_least_squares(seed: int, damping: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=generator)
    x = torch.randn(40, 5, generator=generator)
    field = fipgeo.MetricField(net, x, "euclidean", batch_size=16)
    theta = field.map.point()
    kept, free = Kept.of(field.function, theta), torch.rand(len(theta), generator=generator) < 0.3
    r = torch.randn(120, generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensate, "MAX_ROWS", 50)
        moves = Compensation(kept, Position(theta), free, damping=damping)
    assert moves.normal is not None and moves.gram is None
    w = moves(r)

    def outputs(vector: torch.Tensor) -> torch.Tensor:
        return functional_call(net, field.space.unravel(vector), (x,)).reshape(-1)

    dense = jacrev(outputs)(theta)[:, free]
    scale = float(dense.square().sum()) / 40 / min(120, int(free.sum()))
    assert moves.scale == pytest.approx(scale)
    unit, rhs = torch.eye(int(free.sum())), -dense.T @ r / 40
    expected = torch.linalg.solve(dense.T @ dense / 40 + damping * scale * unit, rhs)
    torch.testing.assert_close(w[free], expected, rtol=1e-8, atol=1e-10)
    assert not w[~free].any()
    assert moves.predicted(r, w) == pytest.approx(float((r + dense @ expected).square().sum() / 40) ** 0.5)
    for other in (1e-3, 0.5):  # another damping, the same normal matrix
        again = torch.linalg.solve(dense.T @ dense / 40 + other * scale * unit, rhs)
        torch.testing.assert_close(moves.damped(other)(r)[free], again, rtol=1e-8, atol=1e-10)
