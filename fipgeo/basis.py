r"""Bases: linear maps B from coefficients R^r to weights R^D, as operators with apply and adjoint.

A basis pulls the metric back to its coefficients, B^T g B. Subsets of the parameters, spans of task vectors and
spectral subspaces are all bases; none is a matrix when it need not be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fipgeo.data import Generator, as_generator
from fipgeo.linalg import Dense, Function, LinearOperator, Spectrum
from fipgeo.space import WeightSpace, Where


def inclusion(space: WeightSpace, where: Where | Tensor) -> LinearOperator:
    """The coordinates of chosen tensors, or any others: coefficients go to their places, all other weights stay still.

    Args:
        space: The weight space.
        where: Glob, globs or predicate that chooses the tensors; or a boolean mask `[D]` of the coordinates.

    Returns:
        B `[D, r]` with B^T B = I, r the number of chosen coordinates.

    Raises:
        ValueError: The mask is not boolean or not of length D.

    Examples:
        >>> space = WeightSpace.of(torch.nn.Linear(3, 2))
        >>> inclusion(space, "bias").shape
        (8, 2)
    """
    mask = where if isinstance(where, Tensor) else space.mask(where)
    if mask.dtype != torch.bool or mask.shape != (space.dim,):
        raise ValueError(f"where: got {mask.dtype} of shape {list(mask.shape)}, expected a boolean mask [{space.dim}]")
    index = mask.nonzero().squeeze(-1)

    def apply(c: Tensor) -> Tensor:
        return c.new_zeros(len(c), space.dim).index_copy(1, index, c)

    return Function(
        apply, lambda v: v.index_select(1, index), (space.dim, len(index)), dtype=space.dtype, device=space.device
    )


def columns(vectors: Tensor) -> LinearOperator:
    """The span of r vectors `[r, D]`: B c = sum_i c_i v_i, one coefficient a vector.

    Raises:
        ValueError: `vectors` is not a stack `[r, D]`.
    """
    if vectors.dim() != 2:
        raise ValueError(f"vectors: got shape {list(vectors.shape)}, expected a stack [r, D]")
    return Dense(vectors.T)


def blockwise(space: WeightSpace, vectors: Tensor) -> LinearOperator:
    """One coefficient for every vector and parameter tensor: B c = sum_ij c_ij v_i restricted to tensor j.

    The anisotropic scaling of task vectors (Zhang et al., Knowledge Composition using Task Vectors with Learned
    Anisotropic Scaling, NeurIPS 2024).

    Args:
        space: The weight space; its tensors are the blocks.
        vectors: `[n, D]`.

    Returns:
        B `[D, n * T]` for T tensors; coefficients are ordered vector by vector.

    Raises:
        ValueError: The vectors do not lie in the space.
    """
    if vectors.dim() != 2 or vectors.shape[1] != space.dim:
        raise ValueError(f"vectors: got shape {list(vectors.shape)}, expected [n, {space.dim}]")
    sizes = torch.tensor(space.sizes, device=vectors.device)
    block = torch.repeat_interleave(torch.arange(len(sizes), device=vectors.device), sizes)
    count, blocks = len(vectors), len(sizes)

    def apply(c: Tensor) -> Tensor:
        out = c.new_zeros(len(c), space.dim)
        for vector, scale in zip(vectors, c.reshape(len(c), count, blocks).unbind(1), strict=True):
            out += vector * scale[:, block]
        return out

    def adjoint(v: Tensor) -> Tensor:
        parts = [v.new_zeros(len(v), blocks).index_add(1, block, v * vector) for vector in vectors]
        return torch.stack(parts, 1).reshape(len(v), count * blocks)

    return Function(apply, adjoint, (space.dim, count * blocks), dtype=vectors.dtype, device=vectors.device)


def random(space: WeightSpace, size: int, *, generator: Generator = None) -> LinearOperator:
    """A uniformly random subspace: `size` orthonormal columns.

    Raises:
        ValueError: `size` is not between 1 and D.
    """
    if not 1 <= size <= space.dim:
        raise ValueError(f"size: got {size}, expected between 1 and D = {space.dim}")
    draw = torch.randn(space.dim, size, generator=as_generator(generator), dtype=torch.float64)
    return Dense(torch.linalg.qr(draw).Q.to(space.device, space.dtype))


def spectral(spectrum: Spectrum, k: int | None = None) -> LinearOperator:
    """The first k eigenvectors of a metric (None: all that the record holds), the directions that outputs feel most.

    Raises:
        ValueError: The spectrum carries no vectors, or fewer than k.
    """
    if spectrum.vectors is None:
        raise ValueError("spectrum: it carries no vectors; compute it with vectors")
    if k is not None and not 1 <= k <= len(spectrum.vectors):
        raise ValueError(f"k: got {k}, expected between 1 and the {len(spectrum.vectors)} vectors of the spectrum")
    return columns(spectrum.vectors[:k])
