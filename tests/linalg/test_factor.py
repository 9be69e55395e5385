"""The dual route: digits at small damping, damping paths from one factorisation, null spaces."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipgeo.linalg import Dense, DualFactor, Gram, Outcome, cholesky, woodbury

from .cases import Counting, draw, prescribed, root_with


@given(seed=st.integers(0, 2**20), scale=st.sampled_from([1.0, 0.01]))
def test_one_decomposition_serves_every_damping(seed: int, scale: float) -> None:
    a, b = draw(seed, 6, 40), draw(seed + 1, 3, 40)
    counting = Counting(Dense(a))
    factor = DualFactor(counting, scale=scale)
    assert factor.num_products == counting.vectors == 6
    for damping in (1e-4, 1e-2, 1.0, 100.0):
        before = counting.vectors
        found = factor.solve(b, damping, rtol=1e-10)
        matrix = scale * torch.einsum("ij,ik->jk", a, a) + damping * torch.eye(40)
        assert found.ok and torch.allclose(found.value, torch.linalg.solve(matrix, b.T).T, rtol=1e-6, atol=1e-9)
        assert found.num_products == counting.vectors - before <= 3 * 3 * (found.num_iters + 1)


def test_float32_keeps_its_digits_at_small_damping_by_refinement() -> None:
    a = root_with(0, torch.logspace(0, -3, 50), 50, 2000).float()
    b = draw(1, 2000).float()
    factor = DualFactor(Dense(a))
    for damping, reached in ((1e-3, 1e-5), (1e-5, 1e-3)):
        rough = factor.solve(b, damping, refine=0)
        fine = factor.solve(b, damping, rtol=1e-9)
        exact = a.double() @ fine.value.double() @ a.double() + damping * fine.value.double()
        true = float((b.double() - exact).norm() / b.norm())
        assert true < reached < float(rough.residual)
        assert float(fine.residual) == pytest.approx(true, rel=0.5, abs=2e-7)
        single = woodbury(Dense(a), b, damping=damping, rtol=1e-9)
        assert float(single.residual) < 3 * reached


@given(seed=st.integers(0, 2**20))
def test_further_solves_take_three_products_and_tell_their_residuals(seed: int) -> None:
    a, b = draw(seed, 6, 40), draw(seed + 1, 3, 40)
    counting = Counting(Dense(a))
    factor = DualFactor(counting, scale=0.5)
    assert factor.solve(b, 0.1).ok
    for damping in (0.1, 1.0):
        before = counting.vectors
        found = factor.solve(2 * b, damping)
        assert found.ok and found.num_products == counting.vectors - before == 3 * 3
        matrix = 0.5 * a.T @ a + damping * torch.eye(40)
        assert torch.allclose(found.value, torch.linalg.solve(matrix, 2 * b.T).T, rtol=1e-6, atol=1e-9)
    paths = factor.solve(b, [0.1, 1.0])
    assert paths.ok and torch.allclose(2 * paths.value[1], found.value, rtol=1e-6, atol=1e-9)


def test_the_residual_of_further_solves_is_that_of_the_vector_in_float32() -> None:
    a, b = root_with(0, torch.logspace(0, -3, 50), 50, 2000).float(), draw(1, 3, 2000).float()
    factor = DualFactor(Dense(a))
    assert factor.solve(b, 1e-2, rtol=1e-5).ok
    for damping, rtol in ((1e-2, 1e-4), (1e-3, 1e-5)):
        found = factor.solve(b, damping, rtol=rtol)
        left = b.double() - found.value.double() @ a.double().T @ a.double() - damping * found.value.double()
        true = left.norm(dim=-1) / b.norm(dim=-1)
        assert found.ok and torch.allclose(found.residual, true, rtol=1.0, atol=3e-7)


def test_a_wrong_gram_is_never_trusted() -> None:
    a, b = draw(0, 5, 30), draw(1, 30)
    for wrong in (torch.zeros(5, 5), 2 * a @ a.T, torch.eye(5)):
        factor = DualFactor(Dense(a), gram=wrong)
        for _ in range(3):
            found = factor.solve(b, 0.1, refine=1)
            true = (b - a.T @ (a @ found.value) - 0.1 * found.value).norm() / b.norm()
            assert float(found.residual) == pytest.approx(float(true), rel=1e-6) and found.ok == (true <= 1e-6)


def test_refinement_never_makes_it_worse_and_says_when_it_stops() -> None:
    a = root_with(0, torch.logspace(0, -3, 50), 50, 2000).float()
    b = draw(1, 4, 2000).float()
    factor = DualFactor(Dense(a))
    sizes = [float(factor.solve(b, 1e-6, refine=steps, rtol=1e-12).residual.max()) for steps in range(5)]
    assert all(later <= earlier for earlier, later in zip(sizes, sizes[1:], strict=False))
    found = factor.solve(b, 1e-6, rtol=1e-12)
    assert found.outcome is Outcome.STAGNATED and "float64" in found.outcome.message


def test_a_known_gram_costs_no_products() -> None:
    a, b = draw(0, 5, 30), draw(1, 30)
    counting = Counting(Dense(a))
    given_gram = woodbury(counting, b, damping=0.1, gram=a @ a.T)
    assert given_gram.num_products == counting.vectors == 3  # forward, adjoint, and the residual
    assert torch.allclose(given_gram.value, woodbury(Dense(a), b, damping=0.1).value)
    assert DualFactor(Dense(a), gram=a @ a.T).num_products == 0


def test_an_indefinite_gram_is_a_breakdown() -> None:
    found = woodbury(Dense(torch.eye(2)), torch.ones(2), damping=0.1, gram=-torch.eye(2))
    assert found.outcome is Outcome.BREAKDOWN and float(found.residual) == 1
    found = woodbury(Dense(torch.eye(2)), torch.ones(2), damping=0.1, gram=torch.full((2, 2), torch.nan))
    assert found.outcome is Outcome.NOT_FINITE
    with pytest.raises(ValueError, match="not finite"):
        DualFactor(Dense(torch.eye(2)), gram=torch.full((2, 2), torch.nan))


@given(seed=st.integers(0, 2**20), m=st.integers(1, 12), rank=st.integers(1, 8))
def test_eigenvalues_are_squared_singular_values(seed: int, m: int, rank: int) -> None:
    a = root_with(seed, torch.linspace(2, 1, min(rank, m)), m, 10)
    factor = DualFactor(Dense(a), scale=0.5)
    expected = torch.zeros(min(m, 10))
    expected[: min(rank, m)] = torch.linspace(2, 1, min(rank, m)).square() / 2
    assert torch.allclose(factor.eigenvalues, expected, atol=1e-12)


@given(seed=st.integers(0, 2**20), m=st.integers(1, 12), rank=st.integers(1, 8))
def test_null_projection(seed: int, m: int, rank: int) -> None:
    a = root_with(seed, torch.logspace(0, -3, min(rank, m)), m, 10)
    factor = DualFactor(Dense(a))
    v = draw(seed + 2, 2, 3, 10)
    projected = factor.null_project(v)
    row_space = torch.linalg.svd(a).Vh[: min(rank, m)]
    expected = v - (v @ row_space.T) @ row_space
    assert torch.allclose(projected, expected, atol=1e-8)
    assert torch.allclose(factor.null_project(projected), projected, atol=1e-8)


def test_null_projection_in_float32_and_with_a_cut() -> None:
    a = root_with(0, torch.tensor([1.0, 0.1, 0.01]), 20, 500).float()
    factor, v = DualFactor(Dense(a)), draw(1, 500).float()
    assert float((a @ factor.null_project(v)).norm()) < 1e-5 * float((a @ v).norm())
    coarse = factor.null_project(v, rtol=1e-3)  # keeps the direction of singular value 0.01
    assert float((a @ coarse).norm()) == pytest.approx(0.01 * abs(float(torch.linalg.svd(a).Vh[2] @ v)), rel=1e-2)


def test_small_damping_tends_to_the_null_projection() -> None:
    a, v = draw(0, 4, 20), draw(1, 20)
    factor = DualFactor(Dense(a))
    damped = 1e-6 * factor.solve(v, 1e-6).value
    assert torch.allclose(damped, factor.null_project(v), atol=1e-5)


def test_cholesky_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="max_bytes"):
        cholesky(Gram(Dense(torch.ones(1, 1000))), torch.ones(1000), damping=1.0, max_bytes=1000)


def test_cholesky_in_float32_by_float64() -> None:
    matrix = prescribed(0, torch.logspace(0, -5, 50))
    b = draw(1, 50)
    found = cholesky(Dense(matrix.float(), psd=True), b.float(), damping=1e-4)
    expected = torch.linalg.solve(matrix + 1e-4 * torch.eye(50), b)
    assert float((found.value - expected).norm() / expected.norm()) < 1e-3


@given(seed=st.integers(0, 2**20))
def test_a_factorisation_in_float32_tells_what_is_left(seed: int) -> None:
    a, b = root_with(seed, torch.logspace(0, -6, 40), 40, 300), draw(seed + 1, 2, 300)
    factor = DualFactor(Dense(a), dtype=torch.float32)
    assert factor.solve(b, 1e-1).ok
    for damping, rtol in ((1e-1, 1e-9), (1e-2, 1e-7), (1e-2, 1e-3)):
        found = factor.solve(b, damping, rtol=rtol)
        left = b - found.value @ a.T @ a - damping * found.value
        assert found.ok and bool((left.norm(dim=-1) / b.norm(dim=-1) <= 1.001 * found.residual + 1e-13).all())


def test_rounding_of_the_gram_hides_no_residual() -> None:
    root = Dense(torch.tensor([[1.0, 0.0, 0.0], [0.0, 3e-5, 0.0]]))
    factor = DualFactor(root, gram=torch.diag(torch.tensor([1.0, 0.0])), dtype=torch.float32)  # 9e-10 is rounding
    assert factor.solve(torch.tensor([1.0, 1.0, 1.0]), 1.0).ok
    found = factor.solve(torch.tensor([0.0, 1.0, 0.0]), 9e-10)
    left = 1 - 2 * 9e-10 * float(found.value[1])
    assert float(found.residual) == pytest.approx(abs(left), abs=1e-6)
