"""Many dampings at once: dense oracles, shared products, and verdicts for each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.linalg import Dense, DualFactor, Gram, Outcome, cg, woodbury

from .cases import Counting, draw, prescribed, root_with


def oracle(matrix: Tensor, rhs: Tensor, damping: float) -> Tensor:
    """The dense solution for rows `[..., n]`."""
    return torch.linalg.solve(matrix + damping * torch.eye(len(matrix)), rhs.reshape(-1, len(matrix)).T).T.reshape(
        rhs.shape
    )


@given(seed=st.integers(0, 2**20), batch=st.sampled_from([(), (3,), (2, 2), (0,)]), tensor=st.booleans())
def test_paths_agree_with_dense_solves(seed: int, batch: tuple[int, ...], tensor: bool) -> None:
    a, b = draw(seed, 6, 30), draw(seed + 1, *batch, 30)
    dampings = [1.0, 1e-2, 1e-2, 50.0]
    path = torch.tensor(dampings) if tensor else dampings
    root = Dense(a)
    for found in (
        cg(Gram(root, 0.5), b, damping=path, rtol=1e-9),
        DualFactor(root, scale=0.5).solve(b, path, rtol=1e-9),
        woodbury(root, b, damping=path, scale=0.5, rtol=1e-9),
    ):
        assert found.ok and found.value.shape == (4, *batch, 30) and found.residual.shape == (4, *batch)
        for i, damping in enumerate(dampings):
            assert torch.allclose(found.value[i], oracle(0.5 * a.T @ a, b, damping), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("count", [2, 12])
def test_a_dual_path_takes_the_root_once(count: int) -> None:
    counting, b = Counting(Dense(draw(0, 6, 40))), draw(1, 3, 40)
    factor = DualFactor(counting)
    calls, vectors = counting.calls, counting.vectors
    found = factor.solve(b, torch.logspace(0, 2, count))
    assert found.ok and found.num_iters == 0
    assert counting.calls - calls == 3  # R b, the adjoint, and the normal product of the residuals
    assert found.num_products == counting.vectors - vectors == 3 + 2 * 3 * count


def test_a_conjugate_gradient_path_costs_one_product_an_iteration() -> None:
    counting, b = Counting(Dense(prescribed(0, torch.logspace(0, -4, 60)), psd=True)), draw(1, 60)
    path = [1e-1, 1e-2, 1e-3, 1e-4]
    alone = cg(counting, b, damping=1e-4)
    calls, vectors = counting.calls, counting.vectors
    found = cg(counting, b, damping=path)
    assert found.ok and counting.calls - calls <= alone.num_iters + 12
    assert found.num_products == counting.vectors - vectors <= alone.num_products + 4 * 12
    assert found.history is not None and found.history.shape == (found.num_iters + 1, 4)
    matrix = counting.operator.to_dense()
    for i, damping in enumerate(path):
        true = (b - matrix @ found.value[i] - damping * found.value[i]).norm() / b.norm()
        assert float(found.residual[i]) == pytest.approx(float(true), rel=1e-4) and true <= 1e-6


def test_a_path_in_float32_is_finished_by_ordinary_steps() -> None:
    matrix, b = prescribed(0, torch.logspace(0, -4, 200)).float(), draw(1, 2, 200).float()
    found = cg(Dense(matrix, psd=True), b, damping=[1e-1, 3e-2])
    for i, damping in enumerate([1e-1, 3e-2]):
        x = found.value[i].double()
        true = (b.double() - x @ matrix.double() - damping * x).norm(dim=-1) / b.double().norm(dim=-1)
        assert float(true.max()) < 2e-5
    assert found.ok


def test_paths_say_what_went_wrong() -> None:
    operator = Dense(prescribed(0, torch.cat([torch.linspace(1, 5, 15), torch.tensor([-2.0])])), symmetric=True)
    b = draw(1, 16)
    assert cg(operator, b, damping=[0.5, 3.0]).outcome is Outcome.BREAKDOWN
    assert cg(operator, b, damping=[3.0, 4.0]).ok
    nan = Dense(torch.full((3, 3), torch.nan), psd=True)
    assert cg(nan, torch.ones(3), damping=[1.0, 2.0]).outcome is Outcome.NOT_FINITE
    limited = cg(
        Dense(prescribed(0, torch.logspace(0, -4, 60)), psd=True), draw(1, 60), damping=[1e-4, 1.0], max_iters=5
    )
    assert limited.outcome is Outcome.MAX_ITERATIONS and limited.num_iters == 5
    zero = cg(Dense(torch.zeros(4, 4), psd=True), torch.zeros(4), damping=[1.0, 2.0])
    assert zero.ok and not zero.value.any()


def test_misuse_of_paths_is_refused() -> None:
    root, b = Dense(torch.ones(2, 3)), torch.ones(3)
    with pytest.raises(ValueError, match="damping is empty"):
        cg(Gram(root), b, damping=[])
    with pytest.raises(ValueError, match="damping is -1"):
        cg(Gram(root), b, damping=[1.0, -1.0])
    with pytest.raises(ValueError, match="null_project"):
        DualFactor(root).solve(b, [1.0, 0.0])
    with pytest.raises(ValueError, match=r"expected a number or a list"):
        cg(Gram(root), b, damping=torch.ones(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_float64_answers_of_float32_roots(dtype: torch.dtype) -> None:
    a = root_with(0, torch.arange(1, 61) ** -1.0, 60, 1500).float()
    wide, damping = a.double(), 1e-5
    rhs = torch.stack([draw(1, 1500), draw(2, 60) @ wide])
    found = DualFactor(Dense(a), dtype=dtype).solve(rhs, damping)
    true = (rhs - (found.value @ wide.T) @ wide - damping * found.value).norm(dim=-1) / rhs.norm(dim=-1)
    assert found.ok and found.value.dtype == torch.float64 and float(true.max()) < 1e-6
    assert torch.allclose(found.residual, true, rtol=1e-3, atol=1e-12)
    single = woodbury(Dense(a), rhs.float(), damping=damping)
    assert single.value.dtype == torch.float32


def test_products_that_cannot_be_made_in_float64_limit_the_verdict() -> None:
    class Opaque(Counting):
        """No matrix can be seen through this."""

    a, b = root_with(0, torch.logspace(0, -2, 20), 20, 300).float(), draw(1, 300)
    found = DualFactor(Opaque(Dense(a))).solve(b, 1e-6)
    assert found.outcome is Outcome.STAGNATED and found.value.dtype == torch.float64
    assert DualFactor(Opaque(Dense(a))).solve(b, 1.0, rtol=1e-4).ok
    with pytest.raises(TypeError, match="float32"):
        DualFactor(Dense(a.double())).solve(b.float(), 1.0)


def test_cholesky_first_and_eigenvectors_on_demand() -> None:
    factor = DualFactor(Dense(draw(0, 8, 30)))
    b = draw(1, 30)
    few = [factor.solve(b, damping).value for damping in (0.1, 1.0)]
    assert factor._eigen is None
    assert factor.eigenvalues.shape == (8,) and factor._eigen is not None
    assert torch.allclose(torch.stack(few), factor.solve(b, [0.1, 1.0]).value, atol=1e-9)
    many = DualFactor(Dense(draw(0, 8, 30)))
    assert many.solve(b, torch.linspace(0.1, 1, 9)).ok and many._eigen is not None
