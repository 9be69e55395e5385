"""Task vectors changed through the singular values of their matrices, as functions of task vectors.

A tensor of two axes or more is the matrix of its first axis by all others, as a convolution kernel is in `unfold`. One
that is cut in rank comes out as factors, which are not multiplied before they are used. Other tensors are passed as
they are. What comes out are task vectors in memory, so the maps from coefficients to weights, their adjoints and
everything that learns coefficients are those of `Composition`. Axis letters: T vectors, m x p a matrix, k directions of
a vector.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fipgeo.lazy import Entry, Factors, entries_of, gathered, value
from fipgeo.task_vectors import TaskVector


def directions(vector: TaskVector, count: int) -> list[TaskVector]:
    """A vector as the sum of its singular directions, so that each gets coefficients of its own.

    tau = sum_j s_j u_j v_j^T for every matrix; the j-th vector holds the j-th term of all of them, largest first, and
    the first one holds all other tensors too. Together they are the best approximation of rank `count`.

    Args:
        vector: Any.
        count: How many directions; later ones are left out.

    Raises:
        ValueError: `count` is not positive.

    Source: learning singular values of merged components is from Osial et al., arXiv:2508.19353 (2025).

    Examples:
        >>> parts = directions(TaskVector({"w": torch.diag(torch.tensor([3.0, 2.0, 1.0]))}), 2)
        >>> [round(part.norm(), 4) for part in parts]
        [3.0, 2.0]
    """
    if count < 1:
        raise ValueError(f"count: got {count} directions, expected at least 1")
    found: list[dict[str, Entry]] = [{} for _ in range(count)]
    for name, entry in _parameters(vector).items():
        if not _is_matrix(entry):
            found[0][name] = entry
            continue
        u, s, vh = _svd(entry)
        for j in range(min(count, len(s))):
            found[j][name] = _factors(u[:, j : j + 1], s[j : j + 1], vh[j : j + 1], entry)
    rest = _buffers(vector)
    return [
        TaskVector(gathered(part | (rest if j == 0 else {})), vector.buffers if j == 0 else frozenset())
        for j, part in enumerate(found)
        if part
    ]


def whiten(vectors: Sequence[TaskVector], rank: int | None = None) -> list[TaskVector]:
    """Vectors whose singular directions are orthogonal to those of all the others.

    Of every matrix tau_i = U_i S_i V_i^T the first k triplets are kept; [U_1 ... U_T] = P D Q^T is replaced by the
    nearest matrix with orthonormal columns (or rows), P Q^T, and so are the V_i. The i-th vector is then its own slice
    U'_i S_i V'_i^T, and the sum of all is the published merge, which takes the mean of tensors that are no matrices.

    Args:
        vectors: T vectors over the same tensors.
        rank: k; None for min(m, p) / T rounded down, and at least 1.

    Raises:
        ValueError: There is no vector, they are not over the same tensors, or `rank` is not positive.

    Source: Gargiulo et al., Task Singular Vectors: Reducing Task Interference in Model Merging, CVPR 2025.
    """
    if rank is not None and rank < 1:
        raise ValueError(f"rank: got {rank} directions of a vector, expected at least 1")

    def slices(entries: list[Entry]) -> list[Entry]:
        parts = []
        for u, s, vh in map(_svd, entries):
            share = max(1, min(len(u), vh.shape[1]) // len(entries))
            k = min(len(s), share if rank is None else rank)
            parts.append((u[:, :k], s[:k], vh[:k]))
        sizes = [len(s) for _, s, _ in parts]
        left = _nearest_orthonormal(torch.cat([u for u, _, _ in parts], 1)).split(sizes, 1)
        right = _nearest_orthonormal(torch.cat([vh for _, _, vh in parts], 0)).split(sizes, 0)
        return [
            _factors(one, s, other, entry)
            for one, (_, s, _), other, entry in zip(left, parts, right, entries, strict=True)
        ]

    return _together(vectors, slices)


def isotropise(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """Vectors whose sum has equal singular values in every matrix: the mean of those it had.

    With the sum Delta = U S V^T of T matrices and s the mean of S, the published merge is s U V^T. Here every vector is
    mapped by s (Delta Delta^T)^(-1/4) tau_i (Delta^T Delta)^(-1/4), and the sum of those is that merge, which takes the
    mean of tensors that are no matrices. Directions in which the sum is zero stay zero.

    Args:
        vectors: T vectors over the same tensors.

    Raises:
        ValueError: There is no vector, or they are not over the same tensors.

    Source: Marczak et al., No Task Left Behind: Isotropic Model Merging with Common and Task-Specific Subspaces, ICML
    2025, Iso-C; that each vector has a share of the merge, and its own coefficient, is ours.
    """

    def shares(entries: list[Entry]) -> list[Entry]:
        matrices = [_matrix(entry) for entry in entries]
        u, s, vh = torch.linalg.svd(sum(matrices[1:], matrices[0]), full_matrices=False)
        used = s > s.max() * max(len(u), vh.shape[1]) * torch.finfo(s.dtype).eps
        root = torch.where(used, s.clamp_min(torch.finfo(s.dtype).tiny).rsqrt(), 0.0)
        rows, across = u * root, root[:, None] * vh
        out: list[Entry] = []
        for matrix, entry in zip(matrices, entries, strict=True):
            if isinstance(entry, Factors):
                left = rows @ (u.mT @ entry.left.to(u.dtype)) * s.mean()
                right = (entry.right.to(u.dtype) @ vh.mT) @ across
                out.append(_of_storage(left, right, entry))
            else:
                share = rows @ (u.mT @ matrix @ vh.mT) @ across * s.mean()
                out.append(share.view(entry.shape).to(_stored(entry, share.dtype)))
        return out

    return _together(vectors, shares)


def _together(vectors: Sequence[TaskVector], change: Callable[[list[Entry]], list[Entry]]) -> list[TaskVector]:
    """Vectors with the matrices of each name changed by a function of all of them."""
    if not vectors:
        raise ValueError("vectors: got none, expected one task vector or more")
    for vector in vectors[1:]:
        vectors[0].check(vector)
    tables = [entries_of(vector.tensors) for vector in vectors]
    for name in _parameters(vectors[0]):
        entries = [table[name] for table in tables]
        if _is_matrix(entries[0]):
            for table, entry in zip(tables, change(entries), strict=True):
                table[name] = entry
    return [replace(vector, tensors=gathered(table)) for vector, table in zip(vectors, tables, strict=True)]


def _parameters(vector: TaskVector) -> dict[str, Entry]:
    return entries_of(vector.parameters)


def _buffers(vector: TaskVector) -> dict[str, Entry]:
    return {name: entry for name, entry in entries_of(vector.tensors).items() if name in vector.buffers}


def _is_matrix(entry: Entry) -> bool:
    return len(entry.shape) > 1 and entry.shape.numel() > 0


def _matrix(entry: Entry) -> Tensor:
    """A tensor as `[m, p]` in at least float32."""
    tensor = value(entry)
    return tensor.reshape(len(tensor), -1).to(torch.promote_types(tensor.dtype, torch.float32))


def _svd(entry: Entry) -> tuple[Tensor, Tensor, Tensor]:
    """U `[m, q]`, S `[q]`, V^T `[q, p]`; of factors by their own QR factorisations."""
    if not isinstance(entry, Factors) or len(entry.left) != entry.shape[0]:
        return torch.linalg.svd(_matrix(entry), full_matrices=False)
    wide = torch.promote_types(torch.promote_types(entry.left.dtype, entry.right.dtype), torch.float32)
    q, r = torch.linalg.qr(entry.left.to(wide))
    other, t = torch.linalg.qr(entry.right.to(wide).mT)
    u, s, vh = torch.linalg.svd(r @ t.mT, full_matrices=False)
    return q @ u, s, vh @ other.mT


def _nearest_orthonormal(matrix: Tensor) -> Tensor:
    """P Q^T of the singular value decomposition P D Q^T."""
    p, _, qh = torch.linalg.svd(matrix, full_matrices=False)
    return p @ qh


def _factors(u: Tensor, s: Tensor, vh: Tensor, like: Entry) -> Factors:
    return _of_storage(u * s, vh, like)


def _of_storage(left: Tensor, right: Tensor, like: Entry) -> Factors:
    """Factors in the dtype that a vector's tensor is stored in."""
    dtype = _stored(like, left.dtype)
    return Factors(left.to(dtype).contiguous(), right.to(dtype).contiguous(), like.shape)


def _stored(entry: Entry, otherwise: torch.dtype) -> torch.dtype:
    if isinstance(entry, Factors):
        return entry.left.dtype
    return entry.dtype if isinstance(entry, Tensor) else otherwise
