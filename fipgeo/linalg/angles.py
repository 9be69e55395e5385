"""How two subspaces lie to each other."""

import torch
from torch import Tensor

from fipgeo.linalg.result import Spectrum

_SKEW = 1e-2  # largest entry of |A A^T - I| that still passes for orthonormal rows


@torch.no_grad()
def principal_angles(a: Tensor | Spectrum, b: Tensor | Spectrum) -> Tensor:
    """The principal angles between two subspaces, ascending, `[min(ka, kb)]` in radians.

        cos t_i = sigma_i(A B^T),    sin t_i = sigma_i((I - A^T A) B^T)

    A cosine tells angles near zero only to the square root of rounding, a sine those near a right angle: up to
    45 degrees the sine is taken, above that the cosine. All in float64, on rows made orthonormal to its rounding.

    Args:
        a: orthonormal rows `[ka, n]`, or a Spectrum with vectors.
        b: orthonormal rows `[kb, n]`, or a Spectrum with vectors.

    Raises:
        ValueError: if sizes differ, rows are not orthonormal or not finite, or a Spectrum has no vectors.

    Source: Bjorck & Golub, Numerical methods for computing angles between linear subspaces (1973).

    Examples:
        >>> tilted = torch.tensor([[1.0, 1e-9, 0.0]], dtype=torch.float64)
        >>> principal_angles(tilted, torch.eye(3, dtype=torch.float64)[:1])
        tensor([1.0000e-09], dtype=torch.float64)
    """
    large, small = _bases(a, b)
    products = large @ small.T  # [more, fewer]
    cosines = torch.linalg.svdvals(products).clamp(max=1)
    sines = torch.linalg.svdvals(small - products.T @ large).flip(0).clamp(max=1)
    return torch.where(cosines.square() > 0.5, torch.asin(sines), torch.acos(cosines))


@torch.no_grad()
def overlap(a: Tensor | Spectrum, b: Tensor | Spectrum) -> float:
    """`|A B^T|_F^2 / min(ka, kb)`: 1 if one subspace holds the other, 0 if they are orthogonal.

    It is the mean squared cosine of the principal angles. Two random subspaces of `R^n` have `max(ka, kb) / n`.

    Args:
        a: orthonormal rows `[ka, n]`, or a Spectrum with vectors.
        b: orthonormal rows `[kb, n]`, or a Spectrum with vectors.

    Raises:
        ValueError: if sizes differ, rows are not orthonormal or not finite, or a Spectrum has no vectors.

    Examples:
        >>> overlap(torch.eye(4)[:2], torch.eye(4)[1:4])
        0.5
    """
    large, small = _bases(a, b)
    return min(1.0, float((large @ small.T).square().sum()) / len(small))


def _bases(a: Tensor | Spectrum, b: Tensor | Spectrum) -> tuple[Tensor, Tensor]:
    """Both as float64 rows, the larger set first."""
    one, two = _orthonormal(a, "a"), _orthonormal(b, "b")
    if one.shape[1] != two.shape[1]:
        raise ValueError(f"a has rows of size {one.shape[1]}, b of size {two.shape[1]}; expected one size for both")
    if one.device != two.device:
        raise ValueError(f"a is on {one.device}, b on {two.device}; move one with .to()")
    return (one, two) if len(one) >= len(two) else (two, one)


def _orthonormal(rows: Tensor | Spectrum, name: str) -> Tensor:
    if isinstance(rows, Spectrum):
        if rows.vectors is None:
            raise ValueError(f"{name} is a Spectrum without vectors; compute it with vectors")
        rows = rows.vectors
    if rows.ndim != 2 or not 0 < rows.shape[0] <= rows.shape[1]:
        raise ValueError(f"{name} has shape {tuple(rows.shape)}, expected [k, n] with 1 <= k <= n; vectors are rows")
    rows = rows.double()
    skew = (rows @ rows.T - torch.eye(len(rows), dtype=rows.dtype, device=rows.device)).abs().max()
    if not bool(skew <= _SKEW):
        raise ValueError(
            f"the rows of {name} are not orthonormal (|A A^T - I| reaches {float(skew):.2g}); take "
            f"torch.linalg.qr({name}.T).Q.T"
        )
    return torch.linalg.qr(rows.T).Q.T
