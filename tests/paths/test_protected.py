"""Several protected functions as one, against one function that was written down by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.paths import Compensation, Kept, Position, Several
from fipgeo.paths.protected import equal_shares

from .toys import draw, inputs, jacobian_by_backward, kept_of, mlp

SEEDS = st.integers(0, 10**6)
WEIGHTS = st.lists(st.floats(0.01, 100.0), min_size=2, max_size=2)


def parts(seed: int, counts: tuple[int, int] = (6, 9)) -> tuple[list[Kept], list[Tensor]]:
    """Two protected functions of one model with their dense roots."""
    model = mlp(seed, hidden=4)
    data = [inputs(seed + 1 + k, count) for k, count in enumerate(counts)]
    return [kept_of(model, x, batch_size=4) for x in data], [jacobian_by_backward(model, x) for x in data]


@given(SEEDS, WEIGHTS)
@settings(max_examples=4)
def test_several_are_the_weighted_sum(seed: int, weights: list[float]) -> None:
    kept, _ = parts(seed)
    both = Several(kept, weights)
    theta = kept[0].start
    position = Position(theta + 0.1 * draw(seed, len(theta)))
    expected = sum(w * part.loss(position) for w, part in zip(weights, kept, strict=True))
    assert both.loss(position) == pytest.approx(expected, rel=1e-12)
    assert float(both.residual(position).square().sum()) == pytest.approx(expected, rel=1e-12)
    assert (both.num_rows, both.cost, both.num_examples) == (15 * 3, 15.0, 1)


@given(SEEDS, WEIGHTS, st.booleans())
@settings(max_examples=4)
def test_moves_solve_the_weighted_normal_equations(seed: int, weights: list[float], columns: bool) -> None:
    kept, roots = parts(seed)
    position, dim = Position(kept[0].start), roots[0].shape[1]
    free = draw(seed + 3, dim) > -0.5
    rows = torch.cat([(w / n) ** 0.5 * r for w, n, r in zip(weights, (6, 9), roots, strict=True)])
    moves = Compensation(
        Several(kept, weights), position, free, damping=0.1, max_iters=400, max_bytes=2**30 if columns else 0
    )
    r = draw(seed + 4, len(rows))
    masked = rows * free
    system, rhs = masked.T @ masked + moves.mu * torch.eye(dim).double(), masked.T @ r
    expected = -torch.linalg.solve(system, rhs)
    found = moves(r)  # conjugate gradients stop at a residual of 1e-3
    assert float((system @ found + rhs).norm() / rhs.norm()) < (1e-8 if columns else 1.1e-3)
    assert float((moves.root(expected) - rows @ expected).norm() / expected.norm()) < 1e-10


@given(SEEDS)
@settings(max_examples=4)
def test_one_part_moves_as_it_does_alone(seed: int) -> None:
    kept, roots = parts(seed)
    position, d = Position(kept[0].start), draw(seed + 5, roots[0].shape[1])
    free = torch.ones_like(d, dtype=torch.bool)
    alone = Compensation(kept[0], position, free, damping=0.3)
    wrapped = Compensation(Several(kept[:1]), position, free, damping=0.3)
    assert wrapped.mu == pytest.approx(alone.mu)
    assert torch.allclose(wrapped.passed(d), alone.passed(d), atol=1e-9)


@given(SEEDS, st.integers(6, 60))
@settings(max_examples=4)
def test_subsets_share_the_rows(seed: int, rows: int) -> None:
    kept, _ = parts(seed, (4, 20))
    both = Several(kept, [1.0, 2.0])
    part = both.subset(rows, torch.Generator().manual_seed(seed))
    assert part.num_rows <= rows and (part is both) == (rows >= both.num_rows)
    if part is not both:
        assert isinstance(part, Several) and part.weights == both.weights


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_equal_shares_are_fair(wanted: list[int], total: int) -> None:
    shares = equal_shares(wanted, total)
    assert all(0 <= s <= w for s, w in zip(shares, wanted, strict=True))
    assert min(sum(wanted), total) - len(wanted) < sum(shares) <= total
    short = [s for s, w in zip(shares, wanted, strict=True) if s < w]
    assert not short or min(short) >= max(shares) - 1


def test_what_does_not_go_together_is_refused() -> None:
    kept, _ = parts(0)
    with pytest.raises(ValueError, match="at least one"):
        Several([])
    for weights in ([1.0], [1.0, 0.0], [1.0, float("nan")]):
        with pytest.raises(ValueError, match="2 positive numbers"):
            Several(kept, weights)
    with pytest.raises(ValueError, match="other weights"):
        Several([kept[0], kept_of(mlp(0, hidden=5), inputs(1, 3), batch_size=3)])
