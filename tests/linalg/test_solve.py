"""Iterative and direct solves against torch.linalg, their verdicts, and what they cost."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.linalg import (
    Dense,
    Diagonal,
    DualFactor,
    Function,
    Gram,
    LinearOperator,
    Outcome,
    Solution,
    SolveError,
    cg,
    cholesky,
    lsmr,
    woodbury,
)

from .cases import Counting, draw, prescribed, root_with

Method = Callable[[LinearOperator, Tensor, float], Solution]
seeds = given(seed=st.integers(0, 2**20))

METHODS: dict[str, Method] = {
    "cg": lambda root, b, damping: cg(Gram(root, 0.1), b, damping=damping, rtol=1e-11),
    "cholesky": lambda root, b, damping: cholesky(Gram(root, 0.1), b, damping=damping, rtol=1e-11),
    "woodbury": lambda root, b, damping: woodbury(root, b, damping=damping, scale=0.1, rtol=1e-11),
    "dual": lambda root, b, damping: DualFactor(root, scale=0.1).solve(b, damping, rtol=1e-11),
}


@pytest.mark.parametrize("method", METHODS)
@given(
    seed=st.integers(0, 2**20),
    m=st.integers(1, 12),
    damping=st.sampled_from([1e-3, 0.1, 10.0]),
    batch=st.sampled_from([(), (1,), (3,), (2, 2), (0,)]),
)
def test_solves_agree_with_a_dense_solve(
    method: str, seed: int, m: int, damping: float, batch: tuple[int, ...]
) -> None:
    a, b = draw(seed, m, 9), draw(seed + 1, *batch, 9)
    counting = Counting(Dense(a))
    found = METHODS[method](counting, b, damping)
    matrix = 0.1 * torch.einsum("ij,ik->jk", a, a) + damping * torch.eye(9)
    expected = torch.linalg.solve(matrix, b.reshape(-1, 9).T).T.reshape(b.shape)
    assert found.ok and found.outcome is Outcome.CONVERGED and found.raise_for_outcome() is found
    assert found.value.shape == b.shape and found.residual.shape == b.shape[:-1]
    assert torch.allclose(found.value, expected, rtol=1e-7, atol=1e-7)
    true = (b - found.value @ matrix).norm(dim=-1) / b.norm(dim=-1)
    assert torch.allclose(found.residual, true, rtol=1e-3, atol=3e-12)
    prepared = min(m, 9) if method == "dual" else 0  # the decomposition is counted by the factor, not the solve
    assert found.num_products + prepared == counting.vectors


@seeds
def test_lsmr_minimises(seed: int) -> None:
    a, b = draw(seed, 12, 7), draw(seed + 1, 3, 12)
    counting = Counting(Dense(a))
    found = lsmr(counting, b, damping=0.3, rtol=1e-11)
    stacked = torch.cat([a, 0.3**0.5 * torch.eye(7)])
    expected = torch.linalg.lstsq(stacked, torch.cat([b, torch.zeros(3, 7)], 1).T).solution.T
    assert found.ok and torch.allclose(found.value, expected, atol=1e-8)
    assert found.num_products == counting.vectors
    gradient = (b - found.value @ a.T) @ a - 0.3 * found.value
    assert torch.allclose(found.residual, gradient.norm(dim=1) / (b @ a).norm(dim=1), rtol=1e-3, atol=1e-13)


@seeds
def test_lsmr_finds_the_smallest_of_many_minimisers(seed: int) -> None:
    a, b = root_with(seed, torch.tensor([3.0, 2.0, 0.5]), 8, 10), draw(seed, 8)
    found = lsmr(Dense(a), b, rtol=1e-10)
    assert found.ok and torch.allclose(found.value, torch.linalg.pinv(a, rtol=1e-8) @ b, atol=1e-7)


def test_lsmr_reaches_digits_where_the_normal_equations_do_not() -> None:
    singular = torch.logspace(0, -6, 30)
    root = Dense(root_with(0, singular, 40, 30))
    x = draw(1, 30)
    b = root(x)
    by_lsmr = lsmr(root, b, rtol=1e-15, max_iters=600)
    by_cg = cg(Gram(root), root.adjoint(b), rtol=1e-15, max_iters=600)
    assert (by_lsmr.value - x).norm() < 0.1 * (by_cg.value - x).norm()


def test_zero_right_hand_side_and_zero_operator() -> None:
    zero = torch.zeros(2, 3)
    for found in (cg(Diagonal(torch.ones(3)), zero), cholesky(Diagonal(torch.ones(3)), zero)):
        assert found.ok and not found.value.any() and not found.residual.any()
    assert lsmr(Dense(torch.zeros(2, 3)), torch.ones(2)).ok
    assert torch.allclose(cg(Diagonal(torch.zeros(3)), torch.ones(3), damping=0.5).value, torch.tensor(2.0))
    assert torch.allclose(woodbury(Dense(torch.zeros(1, 3)), torch.ones(3), damping=0.5).value, torch.tensor(2.0))


def test_cg_takes_as_many_steps_as_distinct_eigenvalues() -> None:
    values = torch.tensor([1.0, 2.0, 5.0]).repeat_interleave(20)
    found = cg(Dense(prescribed(0, values), psd=True), draw(1, 60), rtol=1e-10)
    assert found.ok and found.num_iters == 3 and found.num_products == 4  # the last one measures the residual
    assert found.history is not None and len(found.history) == 4 and found.history[0] == 1


def test_cg_lets_converged_rows_rest() -> None:
    values = torch.linspace(1, 100, 50)
    q = torch.linalg.eigh(prescribed(0, values)).eigenvectors
    counting = Counting(Dense(prescribed(0, values), psd=True))
    b = torch.stack([q[:, 3], draw(1, 50), torch.zeros(50)])  # one step, many steps, none
    found = cg(counting, b, rtol=1e-8)
    assert found.ok and found.num_products == counting.vectors < found.num_iters + 5
    assert torch.allclose(found.value, torch.linalg.solve(prescribed(0, values), b.T).T, atol=1e-7)


def test_cg_stops_at_atol_and_starts_at_x0() -> None:
    matrix, b = prescribed(0, torch.linspace(1, 9, 20)), draw(1, 20)
    assert cg(Dense(matrix, psd=True), b, atol=100.0).num_iters == 0
    exact = torch.linalg.solve(matrix, b)
    found = cg(Dense(matrix, psd=True), b, x0=exact)
    assert found.num_iters == 0 and found.num_products == 1 and found.ok
    assert cg(Dense(matrix, psd=True), b, x0=exact + 1e-4, rtol=1e-8).num_iters > 0


def test_cg_preconditioner_saves_steps() -> None:
    d = torch.logspace(0, 6, 100)
    matrix = prescribed(0, torch.linspace(1, 2, 100)) * d.sqrt() * d.sqrt()[:, None]
    operator, b = Dense(matrix, psd=True), draw(1, 2, 100)
    plain, better = cg(operator, b), cg(operator, b, preconditioner=Diagonal(1 / d))
    assert better.ok and better.num_iters < plain.num_iters / 5
    assert cg(operator, b, preconditioner=Diagonal(-1 / d)).outcome is Outcome.BREAKDOWN


@seeds
def test_cg_reports_negative_curvature(seed: int) -> None:
    values = torch.cat([torch.linspace(1, 5, 15), torch.tensor([-2.0])])
    operator = Dense(prescribed(seed, values), symmetric=True)
    b = draw(seed, 2, 16)
    found = cg(operator, b, rtol=1e-12)
    assert found.outcome is Outcome.BREAKDOWN
    assert found.curvature is not None and -2.0 - 1e-9 <= found.curvature.min() <= 0
    true = (b - operator(found.value)).norm(dim=-1) / b.norm(dim=-1)
    assert torch.allclose(found.residual, true, rtol=1e-6)
    with pytest.raises(SolveError, match=r"BREAKDOWN.*raise damping.*smallest curvature -") as caught:
        found.raise_for_outcome()
    assert caught.value.solution is found
    assert cg(operator, b, damping=3.0).ok


def test_singular_system_without_solution_is_a_breakdown() -> None:
    operator = Diagonal(torch.tensor([2.0, 1.0, 0.0]))
    assert cg(operator, torch.ones(3)).outcome is Outcome.BREAKDOWN
    assert cg(operator, torch.tensor([1.0, 1.0, 0.0])).ok
    assert cholesky(operator, torch.ones(3), damping=0.0).outcome is Outcome.BREAKDOWN


@given(seed=st.integers(0, 2**20), limit=st.integers(0, 5))
def test_cg_out_of_iterations_reports_the_true_residual(seed: int, limit: int) -> None:
    operator = Dense(prescribed(seed, torch.logspace(0, -6, 30)), psd=True)
    b = draw(seed, 2, 30)
    found = cg(operator, b, max_iters=limit)
    assert found.outcome is Outcome.MAX_ITERATIONS and found.num_iters == limit
    true = (b - operator(found.value)).norm(dim=-1) / b.norm(dim=-1)
    assert torch.allclose(found.residual, true, rtol=1e-6) and true.min() > 1e-6


def test_float32_below_its_rounding_stagnates_with_the_true_residual() -> None:
    matrix = prescribed(0, torch.logspace(0, -7, 16)).float()
    b = draw(1, 16).float()
    found = cg(Dense(matrix, psd=True), b, damping=1e-6, rtol=1e-9, max_iters=5000)
    assert found.outcome is Outcome.STAGNATED
    wide = matrix.double() + 1e-6 * torch.eye(16)
    true = (b.double() - wide @ found.value.double()).norm() / b.norm()
    assert 0.3 < float(found.residual) / float(true) < 3


def test_products_that_are_not_finite_are_reported() -> None:
    def once(x: Tensor) -> Tensor:
        return x.where(x.abs() < 1e3, torch.nan)

    bad = Function(once, None, (3, 3), psd=True)
    assert cg(bad, torch.full((3,), 1e4)).outcome is Outcome.NOT_FINITE
    assert lsmr(Dense(torch.full((3, 3), torch.nan)), torch.ones(3)).outcome is Outcome.NOT_FINITE
    found = cg(bad, torch.tensor([[1e4, 0, 0], [1.0, 0, 0]]))
    assert found.outcome is Outcome.NOT_FINITE and torch.equal(found.value[1], torch.tensor([1.0, 0, 0]))


def test_misuse_is_refused() -> None:
    a, b = Dense(torch.ones(2, 3)), torch.ones(3)
    with pytest.raises(ValueError, match="take lsmr"):
        cg(a, b)
    with pytest.raises(ValueError, match="damping is -1"):
        cg(Gram(a), b, damping=-1.0)
    with pytest.raises(ValueError, match=r"\(2,\).*\[\.\.\., 3\]"):
        cg(Gram(a), torch.ones(2))
    with pytest.raises(TypeError, match="float32"):
        cg(Gram(a), b.float())
    with pytest.raises(ValueError, match="x0 has shape"):
        cg(Gram(a), b, x0=torch.ones(1, 3))
    with pytest.raises(ValueError, match="null_project"):
        woodbury(a, b, damping=0.0)
    with pytest.raises(ValueError, match="gram has shape"):
        woodbury(a, b, damping=1.0, gram=torch.eye(3))


def test_solvers_leave_no_graph_behind() -> None:
    matrix = torch.eye(3, requires_grad=True)
    b = torch.ones(3, requires_grad=True)
    assert not cg(Dense(matrix, psd=True), b).value.requires_grad
    assert not lsmr(Dense(matrix), b).value.requires_grad


def test_float32_goes_on_from_the_true_residual_with_new_directions() -> None:
    """Old directions are not conjugate to it: going on along them ends above what float32 can reach, or diverges."""
    found = []
    for lowest, seed in product((-2.5, -3.0), range(4)):
        a = root_with(seed, torch.logspace(0, lowest, 100), 100, 400)
        b = (draw(seed, 100) @ a).float()
        found.append(cg(Gram(Dense(a.float())), b, damping=1e-3, rtol=1e-6))
        assert float(found[-1].residual) < 2e-6
    assert sum(each.ok for each in found) >= 7
