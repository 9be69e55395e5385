"""Eigenvalues against prescribed spectra: multiplicities, low rank, no ghosts, honest residuals."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.linalg import (
    Dense,
    Diagonal,
    Function,
    Gram,
    Identity,
    LinearOperator,
    Outcome,
    Spectrum,
    dense_eigh,
    dual_eigh,
    lanczos,
)

from .cases import Counting, draw, prescribed, root_with

SPECTRA: dict[str, Tensor] = {
    "power law": torch.arange(1, 121).double() ** -1.0,
    "steep": torch.exp(-torch.arange(120).double() / 4),
    "outliers and bulk": torch.cat([torch.linspace(10, 2, 10), torch.linspace(0, 1, 110)]).double(),
    "multiplicity 10": torch.cat([torch.linspace(6, 1, 10).repeat_interleave(10), torch.linspace(0, 0.9, 20)]).double(),
    "two levels": torch.cat([torch.ones(5), torch.full((115,), 0.5)]).double(),
    "low rank": torch.cat([torch.linspace(3, 1, 6), torch.zeros(114)]).double(),
    "indefinite": torch.linspace(-3, 2, 120).double(),
    "identity": torch.ones(120).double(),
    "zero": torch.zeros(120).double(),
}


def check(found: Spectrum, dense: Tensor, k: int, tol: float = 1e-6) -> None:
    """The k largest eigenvalues, each once, with orthonormal vectors and the residuals of true products."""
    exact = torch.linalg.eigvalsh(dense).flip(0)
    scale = max(float(exact.abs().max()), 1e-300)
    assert found.ok and found.dim == len(dense) and found.vectors is not None and found.residuals is not None
    assert found.values.shape == found.residuals.shape == (k,) and found.vectors.shape == (k, len(dense))
    assert (found.values - exact[:k]).abs().max() < tol * scale  # a ghost or a missed copy would shift the list
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(k), atol=1e-9)
    true = (found.vectors @ dense - found.values[:, None] * found.vectors).norm(dim=1)
    assert torch.allclose(found.residuals, true, rtol=1e-2, atol=1e-13 * scale) and true.max() <= tol * scale
    assert found.complete == bool((exact[k:].abs() <= 1e-12 * scale).all())


@pytest.mark.parametrize("name", SPECTRA)
@given(seed=st.integers(0, 2**20), k=st.integers(1, 25), block_size=st.sampled_from([1, 2, 5]))
@settings(max_examples=4)
def test_lanczos_finds_prescribed_spectra(name: str, seed: int, k: int, block_size: int) -> None:
    dense = prescribed(seed, SPECTRA[name])
    counting = Counting(Dense(dense, symmetric=True))
    found = lanczos(counting, k, block_size=block_size, generator=seed, max_products=2000)
    check(found, dense, k)
    assert found.num_products == counting.vectors


@given(seed=st.integers(0, 2**20), n=st.integers(1, 12), k=st.integers(1, 12))
def test_lanczos_on_small_operators_up_to_k_equal_n(seed: int, n: int, k: int) -> None:
    k = min(k, n)
    dense = prescribed(seed, draw(seed, n))
    check(lanczos(Dense(dense, symmetric=True), k, generator=seed), dense, k)


@given(seed=st.integers(0, 2**20), m=st.integers(1, 15), n=st.integers(1, 15), rank=st.integers(0, 9))
def test_three_routes_agree_on_gram_operators(seed: int, m: int, n: int, rank: int) -> None:
    rank = min(rank, m, n)
    a = root_with(seed, torch.linspace(2, 1, rank), m, n)
    dense = 0.5 * torch.einsum("ij,ik->jk", a, a)
    counting = Counting(Dense(a))
    dual = dual_eigh(counting, scale=0.5)
    assert dual.num_products == counting.vectors
    check(dual, dense, min(m, n))
    check(dense_eigh(Gram(Dense(a), 0.5)), dense, n)
    check(lanczos(Gram(Dense(a), 0.5), n), dense, n)
    assert dual.rank() == rank and dual.rank_bound == min(m, n)
    for k in range(1, min(m, n) + 1):
        check(dual_eigh(Dense(a), scale=0.5, k=k, gram=a @ a.T), dense, k)
        check(dense_eigh(Gram(Dense(a), 0.5), k), dense, k)


def test_copies_of_one_eigenvalue_are_all_found_from_one_start_vector() -> None:
    outer = torch.kron(torch.diag(torch.linspace(5, 1, 12)), torch.eye(8))  # every eigenvalue eight times
    q = torch.linalg.qr(draw(0, 96, 96)).Q
    found = lanczos(Dense(q @ outer @ q.T, psd=True), 20, block_size=1)
    expected = torch.linspace(5, 1, 12).repeat_interleave(8)[:20]
    assert found.ok and torch.allclose(found.values, expected, atol=1e-6)


def test_no_ghosts_in_float32_after_many_restarts() -> None:
    values = torch.arange(1, 501).double() ** -0.5
    dense = prescribed(0, values)
    found = lanczos(Dense(dense.float(), psd=True), 8, basis_size=14, max_products=3000)
    assert found.ok and found.vectors is not None and found.residuals is not None
    assert torch.allclose(found.values.double(), values[:8], atol=1e-5)
    v = found.vectors.double()
    assert torch.allclose(v @ v.T, torch.eye(8), atol=1e-5)
    true = (v @ dense.float().double() - found.values.double()[:, None] * v).norm(dim=1)
    assert torch.allclose(found.residuals.double(), true, rtol=0.2, atol=2e-7)


def test_noisy_products_stagnate_at_the_noise() -> None:
    dense = prescribed(0, torch.arange(1, 301).double() ** -1.0).float()
    source = torch.Generator().manual_seed(5)

    def noisy(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=source, dtype=x.dtype)
        return x @ dense + 1e-5 * x.norm(dim=-1, keepdim=True) * noise / 300**0.5

    operator = Function(noisy, None, (300, 300), dtype=torch.float32, symmetric=True)
    found = lanczos(operator, 10, rtol=1e-6)
    assert found.outcome is Outcome.STAGNATED and found.residuals is not None
    assert torch.allclose(found.values.double(), 1 / torch.arange(1, 11), atol=1e-4)
    assert 1e-6 < float(found.residuals.max()) < 1e-4


def test_products_come_in_stacks_and_stay_few() -> None:
    dense = prescribed(0, SPECTRA["power law"])
    products = {}
    for block_size in (1, 4):
        counting = Counting(Dense(dense, psd=True))
        found = lanczos(counting, 10, block_size=block_size)
        assert found.ok and counting.calls <= 1.3 * found.num_products / block_size + 3
        products[block_size] = found.num_products
    assert products[1] < 60 and products[4] < 100


def test_a_budget_that_is_too_small_is_said() -> None:
    operator = Dense(prescribed(0, SPECTRA["power law"]), psd=True)
    found = lanczos(operator, 10, max_products=13)
    assert found.outcome is Outcome.MAX_ITERATIONS and found.num_products <= 13 and not found.complete
    assert found.vectors is not None and found.residuals is not None
    true = (operator(found.vectors) - found.values[:, None] * found.vectors).norm(dim=1)
    assert torch.allclose(found.residuals, true, atol=1e-12)
    assert len(lanczos(operator, 10, max_products=5).values) == 4


def test_the_same_seed_gives_the_same_numbers_and_no_global_state_moves() -> None:
    operator = Dense(prescribed(0, SPECTRA["power law"]), psd=True)
    before = torch.get_rng_state()
    first, second = lanczos(operator, 3, generator=7), lanczos(operator, 3, generator=7)
    assert torch.equal(first.values, second.values)
    assert not torch.equal(first.values, lanczos(operator, 3, generator=8).values)
    assert torch.equal(torch.get_rng_state(), before)


def test_dual_without_vectors_costs_only_the_gram() -> None:
    a = draw(0, 6, 30)
    counting = Counting(Dense(a))
    found = dual_eigh(counting, vectors=False)
    assert counting.vectors == found.num_products == 6
    assert found.vectors is None and found.residuals is None and found.rank() == 6
    assert torch.allclose(found.values, torch.linalg.svdvals(a).square())


def test_float32_roots_keep_the_small_eigenvalues() -> None:
    singular = torch.logspace(0, -3, 20)
    a = root_with(0, singular, 20, 400).float()
    found = dual_eigh(Dense(a))
    assert torch.allclose(found.values.double(), singular.square(), rtol=2e-2, atol=0)
    assert found.vectors is not None
    v = found.vectors.double()
    assert torch.allclose(v @ v.T, torch.eye(20), atol=1e-5)


def test_nan_products_are_reported() -> None:
    bad = Function(lambda x: x * torch.nan, None, (9, 9), symmetric=True)
    assert lanczos(bad, 2).outcome is Outcome.NOT_FINITE


@pytest.mark.parametrize("method", [lanczos, dense_eigh])
def test_misuse_is_refused(method: Callable[[LinearOperator, int], Spectrum]) -> None:
    with pytest.raises(ValueError, match="take Gram"):
        method(Dense(torch.ones(2, 3)), 1)
    with pytest.raises(ValueError, match="declared symmetric"):
        method(Dense(torch.ones(2, 2)), 1)
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"k is {k}, expected 1 to 3"):
            method(Identity(3), k)


def test_more_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="no room"):
        lanczos(Diagonal(torch.ones(100)), 10, basis_size=11)
    with pytest.raises(ValueError, match="k is 3, expected 1 to 2"):
        dual_eigh(Dense(torch.ones(2, 5)), k=3)
    with pytest.raises(ValueError, match="gram has shape"):
        dual_eigh(Dense(torch.ones(2, 5)), gram=torch.eye(5))
    with pytest.raises(ValueError, match="max_bytes"):
        dense_eigh(Identity(1000), max_bytes=10)
