"""Views of kept inputs: the inputs come first, every map is what it says, nothing else is random."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.memory import Affine, views


def images(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_the_inputs_come_first_and_a_seed_decides_the_rest(seed: int, n: int, count: int, flip: bool) -> None:
    x, transform = images(seed, n, 2, 5, 7), Affine(flip=flip)
    found = views(x, transform, count, seed)
    assert found.shape == (count * n, 2, 5, 7) and found.dtype == x.dtype
    assert torch.equal(found[:n], x)
    assert torch.equal(found, views(x, transform, count, seed))
    assert found.abs().max() <= x.abs().max() + 1e-12  # interpolation takes means


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**31), st.floats(0, 20), st.floats(0, 0.2), st.floats(0, 0.3), st.floats(0, 0.3))
def test_pixels_come_from_where_the_map_says(
    seed: int, degrees: float, shift: float, scale: float, shear: float
) -> None:
    """A linear image a u + b v + c, seen through an affine map, is linear again; its centre tells the move."""
    u = (2 * torch.arange(33, dtype=torch.float64) + 1) / 33 - 1
    plane = torch.stack([u.expand(33, 33), u[:, None].expand(33, 33)])[None]
    moved = Affine(degrees, shift, scale, shear)(plane, torch.Generator().manual_seed(seed))[0]
    assert moved[:, 16, 16].abs().max() <= 2 * shift + 1e-9
    slopes = (moved[:, 16, 17] - moved[:, 16, 15]) * 33 / 4, (moved[:, 17, 16] - moved[:, 15, 16]) * 33 / 4
    turn = torch.stack(slopes, 1)  # columns: where steps in u and v lead
    angle, least = torch.tensor(degrees * torch.pi / 180), 1 - scale
    assert turn[1, 1] >= least * angle.cos() - 1e-9 and turn[1, 1] <= 1 + scale + 1e-9
    assert turn[1, 0].abs() <= angle.sin() + 1e-9
    assert (turn[0, 1] + turn[1, 0]).abs() <= shear + 1e-9
    assert (turn[0, 0] - turn[1, 1]).abs() <= 2 * scale + 1e-9


def test_about_half_of_the_images_are_mirrored() -> None:
    x = images(0, 1, 1, 4, 6).expand(400, 1, 4, 6)
    found = Affine(0, 0, 0, 0, flip=True)(x, torch.Generator().manual_seed(0))
    mirrored = (found - x.flip(-1)).abs().amax((1, 2, 3)) < 1e-9
    kept = (found - x).abs().amax((1, 2, 3)) < 1e-9
    assert bool((mirrored ^ kept).all()) and 150 < int(mirrored.sum()) < 250


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"^count: got 0 views"):
        views(images(0, 2, 1, 4, 4), Affine(), 0)
    with pytest.raises(ValueError, match=r"^transform: gave inputs of shape \[1, 1, 4, 4\] from \[2, 1, 4, 4\]"):
        views(images(0, 2, 1, 4, 4), lambda x, _: x[:1], 2)
    with pytest.raises(ValueError, match=r"^images: got torch.int64 of shape \[3\]"):
        Affine()(torch.arange(3), torch.Generator())
