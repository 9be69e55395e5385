"""Bases against matrices that are written down entry by entry."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import LinearOperator, WeightSpace, basis
from fipgeo.linalg import Dense, Gram, adjoint_gap, dense_eigh, dense_gap

SPACE = WeightSpace.of(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)).double())


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inclusion(seed: int) -> tuple[LinearOperator, Tensor]:
    del seed
    return basis.inclusion(SPACE, ["0.bias", "2.weight"]), torch.eye(SPACE.dim, dtype=torch.float64)[:, 6:15]


def _columns(seed: int) -> tuple[LinearOperator, Tensor]:
    vectors = draw(seed, 3, SPACE.dim)
    return basis.columns(vectors), torch.stack(list(vectors), 1)


def _blockwise(seed: int) -> tuple[LinearOperator, Tensor]:
    vectors = draw(seed, 2, SPACE.dim)
    expected = torch.zeros(SPACE.dim, 8, dtype=torch.float64)
    for i in range(2):
        for j, where in enumerate(SPACE.slices().values()):
            expected[where, 4 * i + j] = vectors[i, where]
    return basis.blockwise(SPACE, vectors), expected


def _spectral(seed: int) -> tuple[LinearOperator, Tensor]:
    found = dense_eigh(Gram(Dense(draw(seed, 6, SPACE.dim))), 5)
    assert found.vectors is not None
    return basis.spectral(found, 3), torch.stack([found.vectors[i] for i in range(3)], 1)


BASES: dict[str, Callable[[int], tuple[LinearOperator, Tensor]]] = {
    "inclusion": _inclusion,
    "columns": _columns,
    "blockwise": _blockwise,
    "spectral": _spectral,
}
"""Seed to a basis of SPACE and its matrix, made another way. A random basis has no reference but its laws."""


@pytest.mark.parametrize("name", BASES)
@given(seed=st.integers(0, 2**20))
def test_bases_are_their_matrices(name: str, seed: int) -> None:
    found, expected = BASES[name](seed)
    assert dense_gap(found, expected) < 1e-12 and adjoint_gap(found) < 1e-12


@given(seed=st.integers(0, 2**20), size=st.integers(1, SPACE.dim))
def test_random_columns_are_orthonormal_and_repeat(seed: int, size: int) -> None:
    found = basis.random(SPACE, size, generator=seed).to_dense()
    assert torch.allclose(found.T @ found, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found, basis.random(SPACE, size, generator=torch.Generator().manual_seed(seed)).to_dense())
    assert torch.equal(basis.random(SPACE, size).to_dense(), basis.random(SPACE, size, generator=0).to_dense())


def test_random_subspaces_are_uniform() -> None:
    projections = []
    for seed in range(200):
        q = basis.random(SPACE, 5, generator=seed).to_dense()
        projections.append(q @ q.T)
    mean = torch.stack(projections).mean(0)
    assert torch.allclose(mean, torch.eye(SPACE.dim, dtype=torch.float64) * 5 / SPACE.dim, rtol=0, atol=0.08)


def test_bases_keep_dtype() -> None:
    space = WeightSpace.of(nn.Linear(2, 2).float())
    for found in (
        basis.inclusion(space, "bias"),
        basis.random(space, 2),
        basis.blockwise(space, torch.ones(1, 6).float()),
    ):
        assert found.dtype == found(torch.ones(found.shape[1]).float()).dtype == torch.float32


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"vectors: got shape \[17\], expected a stack \[r, D\]"):
        basis.columns(torch.zeros(17))
    with pytest.raises(ValueError, match=r"vectors: got shape \[2, 3\], expected \[n, 17\]"):
        basis.blockwise(SPACE, torch.zeros(2, 3))
    for size in (0, 18):
        with pytest.raises(ValueError, match=f"size: got {size}, expected between 1 and D = 17"):
            basis.random(SPACE, size)
    with pytest.raises(ValueError, match="params: the pattern '3.bias' matches none"):
        basis.inclusion(SPACE, "3.bias")
    found = dense_eigh(Gram(Dense(draw(0, 6, SPACE.dim))), 2)
    with pytest.raises(ValueError, match="k: got 3, expected between 1 and the 2 vectors of the spectrum"):
        basis.spectral(found, 3)
    with pytest.raises(ValueError, match="spectrum: it carries no vectors"):
        basis.spectral(type(found)(found.values, None, None, dim=17))
