"""Steps in a region of trust and what curvature learns, against dense linear algebra."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipgeo.atlas.region import Curvature, within

from .test_composition import draw

seeds = st.integers(0, 2**20)


def dense(curvature: Curvature) -> torch.Tensor:
    v = curvature.rows
    return v.T @ curvature.signs.diag() @ v + curvature.ridge * torch.eye(v.shape[1], dtype=v.dtype)


@given(seed=seeds, radius=st.sampled_from([0.1, 1.0, 30.0]), least=st.sampled_from([-2.0, 0.0, 1.0]))
@settings(max_examples=12)
def test_no_point_of_the_region_is_lower(seed: int, radius: float, least: float) -> None:
    values = torch.cat([torch.tensor([least], dtype=torch.float64), draw(seed, 5).abs().sort().values + 1.0])
    slope = draw(seed + 1, 6)
    y = within(values, slope, radius)
    assert y.norm() <= radius * (1 + 1e-9)

    def model(d: torch.Tensor) -> torch.Tensor:
        return d @ slope + (d.square() * values).sum(-1) / 2

    others = draw(seed + 2, 4000, 6)
    others = radius * others / others.norm(dim=1, keepdim=True) * torch.linspace(0, 1, 4000).double()[:, None]
    assert model(y) <= model(others).min() + 1e-9
    assert model(y) <= model(y + 1e-3 * draw(seed + 3, 6)) or y.norm() > radius * (1 - 1e-6)


def test_a_slope_without_the_most_negative_direction_still_goes_along_it() -> None:
    values, slope = torch.tensor([-1.0, 2.0]).double(), torch.tensor([0.0, -3.0]).double()
    y = within(values, slope, 2.0)
    assert abs(float(y.norm()) - 2) < 1e-9 and abs(float(y[1]) - 1) < 1e-6


@given(seed=seeds)
@settings(max_examples=6)
def test_what_is_learnt_holds_along_the_move(seed: int) -> None:
    curvature = Curvature.of(draw(seed, 4, 6), ridge=0.3)
    torch.testing.assert_close(curvature(draw(seed, 6)), dense(curvature) @ draw(seed, 6))
    hessian = draw(seed + 1, 6, 6)
    hessian = hessian + hessian.T
    moves = draw(seed + 2, 6, 6)
    for move in moves:
        curvature = curvature.learnt(move, hessian @ move)
    # a quadratic's Hessian is known after as many moves as there are unknowns, whatever its signs
    torch.testing.assert_close(dense(curvature), hessian, rtol=1e-4, atol=1e-4)
    assert curvature.learnt(moves[0], curvature(moves[0])) is curvature


@given(seed=seeds, rows=st.sampled_from([3, 9]))
@settings(max_examples=6)
def test_a_wide_region_gives_newtons_step_and_rows_are_enough(seed: int, rows: int) -> None:
    root = draw(seed, rows, 7)
    curvature = Curvature.of(root, ridge=0.0 if rows > 7 else 1e-9)
    slope = root.T @ draw(seed + 1, rows)
    d = curvature.step(slope, 1e6)
    torch.testing.assert_close(root.T @ (root @ d), -slope, rtol=1e-5, atol=1e-5)
    assert curvature.change(slope, d) == pytest.approx(float(slope @ d) / 2, rel=1e-4)
    short = curvature.step(slope, 0.01)
    assert curvature.length(short) <= 0.01 * (1 + 1e-9)


@given(seed=seeds)
@settings(max_examples=6)
def test_steps_do_not_depend_on_the_units_of_the_unknowns(seed: int) -> None:
    root, slope, units = draw(seed, 9, 5), draw(seed + 1, 5), (draw(seed + 2, 5) / 4).exp()
    here, there = Curvature.of(root), Curvature.of(root * units)
    d = here.step(slope, 0.5)
    # but for the floor under D, which is a share of the largest entry
    torch.testing.assert_close(there.step(slope * units, 0.5) * units, d, rtol=2e-2, atol=2e-3)


def test_signs_make_a_metric_of_what_is_to_be_undone() -> None:
    root = torch.eye(3, dtype=torch.float64)
    curvature = Curvature.of(root, torch.tensor([1.0, -1.0, 1.0]).double(), 0.5)
    torch.testing.assert_close(dense(curvature).diagonal(), torch.tensor([1.5, -0.5, 1.5]).double())
    d = curvature.step(torch.tensor([0.0, 1e-3, 0.0]).double(), 2.0)
    assert d[1] < 0 and abs(curvature.length(d) - 2.0) < 1e-6
    assert Curvature.of(torch.zeros(2, 3)).scale.tolist() == [1.0, 1.0, 1.0]
