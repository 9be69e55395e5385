"""Tangent moves against dense least squares: their normal equations, their closed form, their limits, their routes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.paths import Compensation, Kept, Position, compensate

from .toys import draw, inputs, jacobian_by_backward, kept_of, mlp

SEEDS = st.integers(0, 10**6)
DAMPINGS = st.floats(-4, 2).map(lambda e: 10.0**e)


def setup(seed: int, count: int = 8, hidden: int = 4) -> tuple[Kept, Position, Tensor]:
    """The kept function of a small network, its start, and R by another route."""
    model, x = mlp(seed, hidden=hidden), inputs(seed + 1, count)
    kept = kept_of(model, x, batch_size=3)
    return kept, Position(kept.function.map.point()), jacobian_by_backward(model, x)


def some(seed: int, dim: int) -> Tensor:
    """A random subset with at least one member."""
    mask = draw(seed, dim) > 0
    mask[seed % dim] = True
    return mask


def normal_gap(root: Tensor, count: int, free: Tensor, r: Tensor, w: Tensor, mu: float) -> float:
    """How far w is from solving R_F^T (r + R w) / N + mu w = 0, relative to R_F^T r / N."""
    gradient = (root.T @ (r + root @ w) / count + mu * w)[free]
    return float(gradient.norm() / (root.T @ r / count)[free].norm())


@given(SEEDS, DAMPINGS)
@settings(max_examples=8)
def test_moves_are_the_least_squares_argmin(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    free, r = some(seed, root.shape[1]), draw(seed + 2, root.shape[0])
    moves = Compensation(kept, position, free, damping=damping)
    w = moves(r)
    assert bool((w[~free] == 0).all())
    assert normal_gap(root, 8, free, r, w, moves.mu) < 1e-9

    def cost(v: Tensor) -> Tensor:
        return (r + root @ v).square().sum() / 8 + moves.mu * v.square().sum()

    for i in range(3):
        assert cost(w) < cost(w + 1e-3 * w.norm() * free * draw(seed + 3 + i, len(w)))


@given(SEEDS, DAMPINGS)
@settings(max_examples=8)
def test_damping_is_in_units_of_the_mean_nonzero_eigenvalue(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    free = some(seed, root.shape[1])
    moves = Compensation(kept, position, free, damping=damping)
    values = torch.linalg.eigvalsh(root[:, free].T @ root[:, free] / 8)
    rank = min(root.shape[0], int(free.sum()))  # an upper bound of the rank; centred logits fall short of it
    assert moves.mu == pytest.approx(damping * float(values.sum()) / rank, rel=1e-10)


@given(SEEDS, DAMPINGS)
@settings(max_examples=8)
def test_the_predictor_is_the_damped_inverse_of_the_dense_metric(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    dim = root.shape[1]
    d = draw(seed + 2, dim)
    moves = Compensation(kept, position, torch.ones(dim, dtype=torch.bool), damping=damping)
    g = root.T @ root / 8
    expected = moves.mu * torch.linalg.solve(g + moves.mu * torch.eye(dim), d)
    torch.testing.assert_close(moves.passed(d), expected, rtol=1e-9, atol=1e-9 * float(d.norm()))


@given(SEEDS, DAMPINGS)
@settings(max_examples=8)
def test_the_predictor_keeps_the_wish_off_the_free_weights(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    free, d = some(seed, root.shape[1]), draw(seed + 2, root.shape[1])
    moves = Compensation(kept, position, free, damping=damping)
    v = moves.passed(d)
    assert torch.equal(v[~free], d[~free])
    # argmin <v, g v> + mu |v - d|^2 over v with v = d off F: the gradient vanishes on F
    gradient = (root.T @ (root @ v) / 8 + moves.mu * (v - d))[free]
    assert float(gradient.norm()) < 1e-9 * float((root.T @ (root @ d) / 8).norm())


@given(SEEDS)
@settings(max_examples=6)
def test_little_damping_projects_on_the_null_space_and_much_passes_all(seed: int) -> None:
    kept, position, root = setup(seed)
    dim = root.shape[1]
    d = draw(seed + 2, dim)
    moves = Compensation(kept, position, torch.ones(dim, dtype=torch.bool), damping=1e-7)
    _, s, vh = torch.linalg.svd(root, full_matrices=False)
    rows = vh[s > 1e-9 * s[0]]
    projected = d - rows.T @ (rows @ d)
    smallest = float(s[s > 1e-9 * s[0]][-1]) ** 2 / 8
    assert float((moves.passed(d) - projected).norm()) <= 2 * moves.mu / smallest * float(d.norm()) + 1e-9
    assert float((moves.damped(1e9).passed(d) - d).norm()) < 1e-6 * float(d.norm())


@given(SEEDS)
@settings(max_examples=6)
def test_more_damping_moves_less_and_undoes_less(seed: int) -> None:
    kept, position, root = setup(seed)
    free, r = some(seed, root.shape[1]), draw(seed + 2, root.shape[0])
    moves = Compensation(kept, position, free, damping=1e-3)
    found = [moves.damped(damping)(r) for damping in (1e-3, 1e-1, 1e1)]
    lengths = [float(w.norm()) for w in found]
    left = [float((r + root @ w).norm()) for w in found]
    assert lengths == sorted(lengths, reverse=True) and left == sorted(left)


@given(SEEDS, st.floats(-2, 1).map(lambda e: 10.0**e))
@settings(max_examples=4)
def test_factored_and_iterated_routes_agree(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    free, r = some(seed, root.shape[1]), draw(seed + 2, root.shape[0])
    factored = Compensation(kept, position, free, damping=damping)
    implicit = Compensation(kept, position, free, damping=damping, max_iters=300, max_bytes=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compensate, "MAX_ROWS", 1)
        rows = Compensation(kept, position, free, damping=damping, max_iters=300)
    assert factored.gram is not None and rows.gram is None and implicit.gram is None
    expected = factored(r)
    for other in (rows, implicit):
        found = other.damped(factored.mu / other.scale)(r)
        assert other.mu == pytest.approx(factored.mu)
        assert bool((found[~free] == 0).all())
        assert normal_gap(root, 8, free, r, found, factored.mu) < 2e-3  # what conjugate gradients are asked for
        assert float((found - expected).norm()) < 0.1 * float(expected.norm())


def test_the_estimated_scale_without_rows_is_near_the_exact_one() -> None:
    kept, position, root = setup(3, count=16)
    free = torch.ones(root.shape[1], dtype=torch.bool)
    exact = Compensation(kept, position, free, damping=1.0).mu
    assert Compensation(kept, position, free, damping=1.0, max_bytes=0).mu == pytest.approx(exact, rel=0.7)


def test_no_free_weight_means_no_move() -> None:
    kept, position, root = setup(0)
    moves = Compensation(kept, position, torch.zeros(root.shape[1], dtype=torch.bool), damping=0.1)
    assert not moves(draw(1, root.shape[0])).any()


@pytest.mark.parametrize("damping", [1e-6, 1e-4])
def test_single_precision_with_dependent_rows_is_solved(damping: float) -> None:
    # centred logits make R R^T singular, and inputs with a common part make one eigenvalue large: rounded to float32
    # the matrix has negative eigenvalues beyond the damping that a converged corrector uses
    model, x = mlp(0, hidden=60).float(), (1 + 0.05 * inputs(1, 100)).float()
    kept = kept_of(model, x)
    position = Position(kept.function.map.point())
    dim = len(position.theta)
    moves = Compensation(kept, position, torch.ones(dim, dtype=torch.bool), damping=damping)
    r = moves.root(draw(5, dim).float())
    w = moves(r)
    assert w.dtype == torch.float32
    assert float((r + moves.root(w)).norm() / r.norm()) < 0.01


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_damping_must_be_positive(damping: float) -> None:
    kept, position, root = setup(0)
    with pytest.raises(ValueError, match="damping: got"):
        Compensation(kept, position, torch.ones(root.shape[1], dtype=torch.bool), damping=damping)
