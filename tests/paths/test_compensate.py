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
@settings(max_examples=4)
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
@settings(max_examples=4)
def test_damping_is_in_units_of_the_mean_nonzero_eigenvalue(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    free = some(seed, root.shape[1])
    moves = Compensation(kept, position, free, damping=damping)
    values = torch.linalg.eigvalsh(root[:, free].T @ root[:, free] / 8)
    rank = min(root.shape[0], int(free.sum()))  # an upper bound of the rank; centred logits fall short of it
    assert moves.mu == pytest.approx(damping * float(values.sum()) / rank, rel=1e-10)


@given(SEEDS, DAMPINGS)
@settings(max_examples=4)
def test_the_predictor_is_the_damped_inverse_of_the_dense_metric(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    dim = root.shape[1]
    d = draw(seed + 2, dim)
    moves = Compensation(kept, position, torch.ones(dim, dtype=torch.bool), damping=damping)
    g = root.T @ root / 8
    expected = moves.mu * torch.linalg.solve(g + moves.mu * torch.eye(dim), d)
    torch.testing.assert_close(moves.passed(d), expected, rtol=1e-9, atol=1e-9 * float(d.norm()))


@given(SEEDS, DAMPINGS)
@settings(max_examples=4)
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
@settings(max_examples=4)
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
@settings(max_examples=4)
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


@given(SEEDS, DAMPINGS)
@settings(max_examples=4)
def test_with_every_weight_free_no_rows_are_needed(seed: int, damping: float) -> None:
    kept, position, root = setup(seed, hidden=64)
    free, r, d = torch.ones(root.shape[1], dtype=torch.bool), draw(seed, root.shape[0]), draw(seed + 1, root.shape[1])
    moves = Compensation(kept, position, free, damping=damping)
    assert moves.gram is not None and torch.allclose(moves.gram, root @ root.T, atol=1e-9)
    assert normal_gap(root, 8, free, r, moves(r), moves.mu) < 1e-8
    system = root.T @ root / 8 + moves.mu * torch.eye(len(d)).double()
    expected = moves.mu * torch.linalg.solve(system, d)
    assert float((moves.passed(d) - expected).norm() / expected.norm()) < 1e-7


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


@pytest.mark.parametrize("damping", [-1e-9, -1.0, math.nan])
def test_damping_must_not_be_negative(damping: float) -> None:
    kept, position, root = setup(0)
    with pytest.raises(ValueError, match="damping: got"):
        Compensation(kept, position, torch.ones(root.shape[1], dtype=torch.bool), damping=damping)


def null_part(root: Tensor, d: Tensor) -> Tensor:
    """d - R^+ R d by a singular value decomposition."""
    _, s, vh = torch.linalg.svd(root, full_matrices=False)
    rows = vh[s > 1e-9 * s[0]]
    return d - rows.T @ (rows @ d)


@given(SEEDS)
@settings(max_examples=4)
def test_no_damping_is_the_projection_on_the_null_space(seed: int) -> None:
    kept, position, root = setup(seed)
    dim = root.shape[1]
    d, free = draw(seed + 2, dim), some(seed, dim)
    moves = Compensation(kept, position, torch.ones(dim, dtype=torch.bool), damping=0.0)
    v = moves.passed(d)
    torch.testing.assert_close(v, null_part(root, d), rtol=0, atol=1e-8 * float(d.norm()))
    torch.testing.assert_close(moves.passed(v), v, rtol=0, atol=1e-8 * float(d.norm()))  # once is enough
    w = Compensation(kept, position, free, damping=0.0)(root @ d)
    best = torch.linalg.lstsq(root * free, -(root @ d)[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(w, best, rtol=0, atol=1e-6 * float(best.norm()))


def test_rtol_says_which_directions_the_null_space_has() -> None:
    kept, position, root = setup(5)
    free = torch.ones(root.shape[1], dtype=torch.bool)
    d = draw(7, root.shape[1])
    _, s, vh = torch.linalg.svd(root, full_matrices=False)
    strong = vh[s.square() > 0.1 * s[0] ** 2]
    assert 0 < len(strong) < root.shape[0]
    v = Compensation(kept, position, free, damping=0.0, rtol=0.1).passed(d)
    torch.testing.assert_close(v, d - strong.T @ (strong @ d), rtol=0, atol=1e-9)


@pytest.mark.parametrize("damping", [math.inf, None])
def test_no_metric_is_the_plain_step(damping: float | None) -> None:
    kept, position, root = setup(1)
    d = draw(2, root.shape[1])
    moves = Compensation(kept, position, torch.ones(root.shape[1], dtype=torch.bool), damping=damping)
    assert torch.equal(moves.passed(d), d)
    assert not moves(draw(3, root.shape[0])).any()


@given(SEEDS, st.floats(0.01, 0.99), st.sampled_from([0.0, 1e-3, 1.0]))
@settings(max_examples=4)
def test_a_wish_is_passed_with_the_length_of_the_trust_region(seed: int, share: float, damping: float) -> None:
    kept, position, root = setup(seed)
    dim = root.shape[1]
    d, free = draw(seed + 2, dim), torch.ones(dim, dtype=torch.bool)
    moves = Compensation(kept, position, free, damping=damping)
    least = float(null_part(root, d).norm())
    radius = least + share * (float(d.norm()) - least)
    v = moves.passed(d, radius=radius)
    assert float(v.norm()) == pytest.approx(radius, rel=1e-6)
    # v = mu (g + mu)^{-1} d for some mu: g v is a multiple of what was taken away
    felt, taken = root.T @ (root @ v), d - v
    assert float(felt @ taken) == pytest.approx(float(felt.norm() * taken.norm()), rel=1e-5)


@given(SEEDS, st.floats(0.01, 0.99))
@settings(max_examples=4)
def test_outside_the_reach_of_damping_a_trust_region_takes_the_end(seed: int, share: float) -> None:
    kept, position, root = setup(seed)
    dim = root.shape[1]
    d = draw(seed + 2, dim)
    moves = Compensation(kept, position, torch.ones(dim, dtype=torch.bool), damping=1e-2)
    torch.testing.assert_close(moves.passed(d, radius=2 * float(d.norm())), d)
    least = null_part(root, d)
    found = moves.passed(d, radius=share * float(least.norm()))
    torch.testing.assert_close(found, share * least, rtol=0, atol=1e-7 * float(d.norm()))


@given(SEEDS, st.floats(0.05, 0.95), st.sampled_from([0.0, 1e-2]))
@settings(max_examples=4)
def test_an_answer_is_shortened_to_the_trust_region(seed: int, share: float, damping: float) -> None:
    kept, position, root = setup(seed)
    free = some(seed, root.shape[1])
    r = root @ draw(seed + 2, root.shape[1])
    moves = Compensation(kept, position, free, damping=damping)
    whole = moves(r)
    radius = share * float(whole.norm())
    w = moves(r, radius=radius)
    assert float(w.norm()) == pytest.approx(radius, rel=1e-6)
    gradient = (root.T @ (r + root @ w))[free]  # = -N mu w: the smallest residual of that length
    assert float(-gradient @ w[free]) == pytest.approx(float(gradient.norm() * w.norm()), rel=1e-5)
    assert torch.equal(moves(r, radius=2 * float(whole.norm())), whole)


def test_without_a_factored_gram_a_trust_region_is_searched() -> None:
    kept, position, root = setup(3)
    dim = root.shape[1]
    free, r, d = torch.ones(dim, dtype=torch.bool), draw(4, root.shape[0]), draw(5, dim)
    factored = Compensation(kept, position, free, damping=1e-3)
    implicit = Compensation(kept, position, free, damping=1e-3, max_iters=300, max_bytes=0)
    for one, other in (
        (factored(r, radius=0.2), implicit(r, radius=0.2)),
        (factored.passed(d, radius=0.8 * float(d.norm())), implicit.passed(d, radius=0.8 * float(d.norm()))),
    ):
        assert float(other.norm()) == pytest.approx(float(one.norm()), rel=1e-6)
        assert float((one - other).norm()) < 0.1 * float(one.norm())
    v = implicit.damped(0.0).passed(d)
    torch.testing.assert_close(v, null_part(root, d), rtol=0, atol=1e-3 * float(d.norm()))


@given(SEEDS, DAMPINGS)
@settings(max_examples=4)
def test_the_predicted_change_is_the_dense_one(seed: int, damping: float) -> None:
    kept, position, root = setup(seed)
    free, r = some(seed, root.shape[1]), draw(seed + 2, root.shape[0])
    moves = Compensation(kept, position, free, damping=damping)
    w = moves(r)
    assert moves.predicted(r, w) == pytest.approx(float((r + root @ w).norm()) / 8**0.5, rel=1e-9)
    assert moves.predicted(r, w) < moves.predicted(r, torch.zeros_like(w))


def test_a_radius_that_means_nothing_is_refused() -> None:
    kept, position, root = setup(0)
    dim = root.shape[1]
    d, free = draw(1, dim), some(1, dim)
    moves = Compensation(kept, position, free, damping=1e-2)
    with pytest.raises(ValueError, match="radius: got -1"):
        moves.passed(d * free, radius=-1.0)
    with pytest.raises(ValueError, match="radius: got nan"):
        moves(root @ d, radius=math.nan)
    with pytest.raises(ValueError, match="weights that are not free"):
        moves.passed(d, radius=1.0)
