"""Principal angles that were built in, small ones and right ones, and overlaps."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.linalg import Dense, Spectrum, dense_eigh, overlap, principal_angles

from .cases import draw, orthogonal, prescribed

ANGLES = (0.0, 1e-12, 1e-8, 1e-3, 0.5, 0.8, 1.2, math.pi / 2 - 1e-10)


def pair(seed: int, angles: Tensor, extra: int, n: int) -> tuple[Tensor, Tensor]:
    """Two subspaces with these angles, the first with `extra` more dimensions, in mixed bases."""
    k = len(angles)
    axes = orthogonal(seed, n)
    a = axes[: k + extra]
    b = angles.cos()[:, None] * axes[:k] + angles.sin()[:, None] * axes[k + extra : 2 * k + extra]
    return orthogonal(seed + 1, k + extra) @ a, orthogonal(seed + 2, k) @ b


@given(
    seed=st.integers(0, 2**20),
    angles=st.lists(
        st.sampled_from([0.0, 1e-12, 1e-8, 1e-3, 0.5, 0.8, 1.2, math.pi / 2 - 1e-10]), min_size=1, max_size=5
    ),
    extra=st.integers(0, 3),
)
def test_angles_come_back_to_rounding(seed: int, angles: list[float], extra: int) -> None:
    expected = torch.tensor(sorted(angles), dtype=torch.float64)
    a, b = pair(seed, expected, extra, 16)
    for found in (principal_angles(a, b), principal_angles(b, a)):
        assert found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-12, atol=5e-15)
    assert overlap(a, b) == pytest.approx(float(expected.cos().square().mean())) == overlap(b, a)


@given(seed=st.integers(0, 2**20), ka=st.integers(1, 8), kb=st.integers(1, 8))
def test_angles_are_those_of_the_projectors(seed: int, ka: int, kb: int) -> None:
    """The eigenvalues of `P_a P_b P_a` are squared cosines, in any dimension, crowded ones too."""
    a, b = orthogonal(seed, 8)[:ka], orthogonal(seed + 1, 8)[:kb]
    pa, pb = a.T @ a, b.T @ b
    cosines = torch.linalg.eigvalsh(pa @ pb @ pa).flip(0)[: min(ka, kb)].clamp(0, 1)
    assert torch.allclose(principal_angles(a, b).cos().square(), cosines, atol=1e-12)
    assert overlap(a, b) == pytest.approx(float(cosines.mean()))


def test_single_precision_rows_are_made_orthonormal_first() -> None:
    a = orthogonal(0, 300)[:5].float()
    assert float(principal_angles(a, a).max()) < 1e-14 and overlap(a, a) == pytest.approx(1, abs=1e-12)
    turned = torch.linalg.qr((orthogonal(1, 5).float() @ a).T).Q.T
    assert float(principal_angles(a, turned).max()) < 1e-5


def test_spectra_are_taken() -> None:
    found = dense_eigh(Dense(prescribed(0, torch.arange(9.0)), psd=True), 4)
    assert found.vectors is not None
    assert torch.equal(principal_angles(found, found.vectors[:2]), principal_angles(found.vectors, found.vectors[:2]))
    assert overlap(found, found) == pytest.approx(1)


def test_misuse_is_refused() -> None:
    a = orthogonal(0, 6)[:2]
    for function in (principal_angles, overlap):
        with pytest.raises(ValueError, match="rows of a are not orthonormal .* take torch.linalg.qr\\(a.T\\)"):
            function(draw(0, 2, 6), a)
        with pytest.raises(ValueError, match="rows of b are not orthonormal"):
            function(a, a * torch.nan)
        with pytest.raises(ValueError, match="b has shape \\(6, 2\\), expected .* vectors are rows"):
            function(a, a.T)
        with pytest.raises(ValueError, match="a has rows of size 6, b of size 5"):
            function(a, orthogonal(0, 5)[:2])
        with pytest.raises(ValueError, match="a is a Spectrum without vectors"):
            function(Spectrum(torch.ones(2), None, None, dim=6), a)
