"""Low-rank approximations: exact on low rank, bounded errors, preconditioners that save products."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipgeo.linalg import Dense, Gram, LowRank, Outcome, Spectrum, cg, dense_eigh, dual_eigh, nystrom, root_lanczos

from .cases import Counting, draw, orthogonal, prescribed, root_with


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 20), true_rank=st.integers(0, 20))
def test_low_rank_operators_are_found_exactly(seed: int, rank: int, true_rank: int) -> None:
    values = torch.cat([torch.linspace(3, 1, true_rank), torch.zeros(30 - true_rank)])
    dense = prescribed(seed, values)
    counting = Counting(Dense(dense, psd=True))
    found = nystrom(counting, rank, generator=seed)
    assert found.ok and counting.calls == 1 and found.num_products == counting.vectors == rank + 4
    r = len(found.values)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(r), atol=1e-10)
    rest = dense - found.vectors.T * found.values @ found.vectors
    assert torch.linalg.eigvalsh(rest)[0] > -1e-7
    if rank >= true_rank:
        assert rest.abs().max() < 1e-6
    assert found.error is not None and found.error.value > -1e-6


def test_the_error_estimate_is_the_trace_of_the_rest() -> None:
    dense = prescribed(0, torch.arange(1, 201) ** -1.0)
    found = nystrom(Dense(dense, psd=True), 20, num_probes=40)
    assert found.error is not None
    rest = float(dense.trace() - found.values.sum())
    assert abs(found.error.value - rest) < 4 * found.error.std_error < rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_preconditioners_save_iterations(dtype: torch.dtype) -> None:
    q, values = orthogonal(0, 200), torch.arange(1, 201) ** -2.0
    operator = Dense(((q * values) @ q.T).to(dtype), psd=True)
    b, damping = draw(1, 2, 200).to(dtype), 1e-4
    rtol = 1e-6 if dtype == torch.float64 else 1e-3  # in float32 more is out of reach
    plain = cg(operator, b, damping=damping, rtol=rtol)
    spectrum = dense_eigh(operator, 20)
    for low in (nystrom(operator, 30), LowRank.from_spectrum(spectrum)):
        better = cg(operator, b, damping=damping, rtol=rtol, preconditioner=low.preconditioner(damping))
        assert better.ok and better.num_iters < 0.6 * plain.num_iters
        x = draw(2, 3, 200).to(dtype)
        assert (low(x) - operator(x)).norm() < 0.1 * operator(x).norm()


def test_trouble_is_said() -> None:
    assert nystrom(Dense(-torch.eye(5), psd=True), 3).outcome is Outcome.BREAKDOWN
    assert nystrom(Dense(torch.full((5, 5), torch.nan), psd=True), 3).outcome is Outcome.NOT_FINITE
    zero = nystrom(Dense(torch.zeros(5, 5), psd=True), 3)
    assert zero.ok and not zero.values.any() and zero.error is not None and zero.error.value == 0
    with pytest.raises(ValueError, match="expected damping > 0"):
        zero.preconditioner(0.0)
    with pytest.raises(ValueError, match="declared psd"):
        nystrom(Dense(torch.eye(3), symmetric=True), 1)
    with pytest.raises(ValueError, match="rank 4"):
        nystrom(Dense(torch.eye(3), psd=True), 4)
    with pytest.raises(ValueError, match="no vectors"):
        LowRank.from_spectrum(Spectrum(torch.ones(1), None, None, dim=3))


@given(seed=st.integers(0, 2**20), k=st.integers(1, 8), rank=st.integers(0, 12), tall=st.booleans())
def test_root_lanczos_agrees_with_the_dual(seed: int, k: int, rank: int, tall: bool) -> None:
    a = (
        root_with(seed, torch.linspace(3, 1, rank).round(), 40, 12)
        if tall
        else (root_with(seed, torch.linspace(3, 1, rank).round(), 12, 40))
    )
    counting = Counting(Dense(a))
    found, exact = root_lanczos(counting, k, scale=0.5, generator=seed), dual_eigh(Dense(a), scale=0.5, k=k)
    assert found.ok and found.dim == a.shape[1] and found.vectors is not None and found.residuals is not None
    assert torch.allclose(found.values, exact.values, atol=1e-5)
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(k), atol=1e-9)
    true = ((found.vectors @ a.T) @ a * 0.5 - found.values[:, None] * found.vectors).norm(dim=1)
    assert torch.allclose(found.residuals, true, atol=1e-10) and float(true.max()) < 5e-6
    assert found.complete == exact.complete


def test_root_lanczos_in_float32_measures_its_residuals() -> None:
    a = root_with(0, torch.arange(1, 101) ** -1.0, 100, 2000).float()
    found = root_lanczos(Dense(a), 20)
    assert found.ok and found.vectors is not None and found.residuals is not None
    v, wide = found.vectors.double(), a.double()
    true = ((v @ wide.T) @ wide - found.values.double()[:, None] * v).norm(dim=1)
    assert float(true.max()) < 1.3e-5 and torch.allclose(found.residuals.double(), true, atol=1e-6)
    assert torch.allclose(v @ v.T, torch.eye(20), atol=1e-5)
    with pytest.raises(ValueError, match="k is 101"):
        root_lanczos(Dense(a), 101)


def test_a_few_pairs_of_a_large_gram_are_those_of_the_whole() -> None:
    a = root_with(0, torch.arange(1, 501) ** -0.7, 500, 700)
    few, whole = dual_eigh(Dense(a), k=10), dual_eigh(Dense(a), k=100)
    assert few.ok and torch.allclose(few.values, whole.values[:10], rtol=1e-10)
    assert few.vectors is not None and whole.vectors is not None and few.residuals is not None
    assert torch.allclose((few.vectors @ whole.vectors[:10].T).abs(), torch.eye(10), atol=1e-6)
    assert float(few.residuals.max()) < 1e-11 and not few.complete
    copies = root_with(0, torch.tensor([3.0, 3.0, 3.0, 2.0]), 450, 600)
    found = dual_eigh(Dense(copies), k=6, scale=0.5)
    assert found.complete and torch.allclose(found.values, torch.tensor([4.5, 4.5, 4.5, 2, 0, 0]), atol=1e-9)
    assert isinstance(Gram(Dense(a)).rank_bound, int)
