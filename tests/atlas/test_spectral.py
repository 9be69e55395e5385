"""Vectors that are changed through their singular values, against the formulas written with dense matrices."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from fipgeo import Composition, TaskVector, WeightSpace
from fipgeo.atlas import directions, isotropise, whiten
from fipgeo.lazy import Factors, LazyTensors
from fipgeo.linalg import adjoint_gap, dense_gap

from .test_composition import KINDS, columns, draw
from .test_composition import bank as network_bank

SHAPES = {"w": (5, 4), "kernel": (3, 2, 2, 2), "tall": (7, 2), "bias": (5,), "scale": ()}
seeds = st.integers(0, 2**20)


def drawn(seed: int, shape: tuple[int, ...]) -> Tensor:
    return draw(seed, max(1, torch.Size(shape).numel())).view(shape)


def bank(seed: int, count: int, rank: int | None = None) -> list[TaskVector]:
    """Dense vectors, or vectors that hold factors of a rank."""
    if rank is None:
        return [TaskVector({n: drawn(seed + i, s) for n, s in SHAPES.items()}) for i in range(count)]
    out = []
    for i in range(count):
        entries: dict[str, Tensor | Factors] = {}
        for name, shape in SHAPES.items():
            if len(shape) < 2:
                entries[name] = drawn(seed + i, shape)
                continue
            wide = torch.Size(shape).numel() // shape[0]
            entries[name] = Factors(draw(seed + i, shape[0], rank), draw(seed - i, rank, wide), torch.Size(shape))
        out.append(TaskVector(LazyTensors(entries)))
    return out


def matrices(vectors: list[TaskVector], name: str) -> list[Tensor]:
    return [vector.tensors[name].reshape(SHAPES[name][0], -1) for vector in vectors]


def polar(matrix: Tensor) -> Tensor:
    """The nearest orthonormal matrix as A (A^T A)^(-1/2), by eigenvalues rather than singular values."""
    if matrix.shape[0] < matrix.shape[1]:
        return polar(matrix.T).T
    values, q = torch.linalg.eigh(matrix.T @ matrix)
    return matrix @ q @ torch.diag(values.rsqrt()) @ q.T


@given(seed=seeds, count=st.integers(1, 3), rank=st.sampled_from([None, 1, 3]))
def test_directions_are_those_of_the_matrix(seed: int, count: int, rank: int | None) -> None:
    (tau,) = bank(seed, 1, rank)
    parts = directions(tau, count)
    for name in SHAPES:
        found = sum(part.tensors[name] for part in parts if name in part.tensors)
        if len(SHAPES[name]) < 2:
            expected = tau.tensors[name]
        else:
            (matrix,) = matrices([tau], name)
            values, q = torch.linalg.eigh(matrix.T @ matrix)
            top = q[:, values.argsort(descending=True)[:count]]
            expected = (matrix @ top @ top.T).view(SHAPES[name])
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    sizes = [part.select("w").norm() for part in parts if "w" in part.tensors]
    assert sizes == sorted(sizes, reverse=True)


@given(seed=seeds, count=st.integers(1, 4), rank=st.sampled_from([None, 2]), k=st.sampled_from([None, 1]))
def test_whitened_vectors_are_the_published_merge(seed: int, count: int, rank: int | None, k: int | None) -> None:
    vectors = bank(seed, count, rank)
    found = whiten(vectors, k)
    for name, shape in SHAPES.items():
        if len(shape) < 2:
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for a, b in zip(found, vectors, strict=True))
            continue
        rows = matrices(vectors, name)
        size = min(rows[0].shape)
        kept = min(size if rank is None else min(size, rank), max(1, size // count) if k is None else k)
        triplets = [torch.linalg.svd(matrix, full_matrices=False) for matrix in rows]
        u = polar(torch.cat([t[0][:, :kept] for t in triplets], 1))
        v = polar(torch.cat([t[2][:kept] for t in triplets], 0))
        s = torch.cat([t[1][:kept] for t in triplets])
        merged = sum(matrices(found, name))
        torch.testing.assert_close(merged, u @ torch.diag(s) @ v, rtol=1e-6, atol=1e-6)
        if u.shape[0] >= u.shape[1] and v.shape[1] >= v.shape[0]:  # slices of several vectors share no direction
            for i in range(count):
                for j in range(i):
                    one, two = matrices([found[i], found[j]], name)
                    assert float((one.T @ two).abs().max() + (one @ two.T).abs().max()) < 1e-7


@given(seed=seeds, count=st.integers(1, 4), rank=st.sampled_from([None, 1]))
def test_isotropised_vectors_sum_to_the_published_merge(seed: int, count: int, rank: int | None) -> None:
    vectors = bank(seed, count, rank)
    found = isotropise(vectors)
    for name, shape in SHAPES.items():
        if len(shape) < 2:
            assert all(torch.equal(a.tensors[name], b.tensors[name]) for a, b in zip(found, vectors, strict=True))
            continue
        total, merged = sum(matrices(vectors, name)), sum(matrices(found, name))
        assert isinstance(total, Tensor) and isinstance(merged, Tensor)
        mean = torch.linalg.svdvals(total).mean()
        if rank is None:
            torch.testing.assert_close(merged, mean * polar(total), rtol=1e-5, atol=1e-6)
        values = torch.linalg.svdvals(merged)
        used = torch.linalg.matrix_rank(total)
        torch.testing.assert_close(
            values, torch.where(torch.arange(len(values)) < used, mean, 0.0), atol=1e-6, rtol=1e-6
        )
        if rank is not None:
            assert all(isinstance(v.tensors, LazyTensors) for v in found)


@given(seed=seeds)
def test_isotropising_treats_rows_and_columns_alike(seed: int) -> None:
    one, two = bank(seed, 2)
    turned = [tau.map(lambda _, t: t).select("w") for tau in (one, two)]
    there = isotropise(turned)
    back = isotropise([TaskVector({"w": tau.tensors["w"].T.contiguous()}) for tau in turned])
    for a, b in zip(there, back, strict=True):
        torch.testing.assert_close(a.tensors["w"], b.tensors["w"].T, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["isotropic", "per block", "partitions"])
@pytest.mark.parametrize("change", [whiten, isotropise, lambda v: directions(v[0], 3)])
@given(seed=seeds)
@settings(max_examples=4)
def test_coefficients_are_learned_over_them(change, kind: str, seed: int) -> None:  # noqa: ANN001
    """The map from coefficients to weights is its columns, its adjoint is theirs, and outputs have plain gradients."""
    base, plain, x = network_bank("mixed", seed)
    vectors = change(plain)
    model, space = Composition(base, vectors, KINDS[kind]), WeightSpace.of(base)
    matrix = columns(model, vectors, space)
    assert dense_gap(model.operator(), matrix) < 1e-10 and adjoint_gap(model.operator()) < 1e-12
    c = (0.3 * draw(seed, model.coefficients.numel())).requires_grad_()
    with torch.no_grad():
        model.coefficients.copy_(c.view_as(model.coefficients))
    expected = functional_call(base, space.unravel(space.point(base) + matrix @ c), (x,))
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    (gradient,) = torch.autograd.grad(expected.square().sum(), c)
    found.square().sum().backward()
    assert model.coefficients.grad is not None
    torch.testing.assert_close(model.coefficients.grad.flatten(), gradient, rtol=1e-8, atol=1e-9)


def test_storage_buffers_and_bad_arguments() -> None:
    tau = TaskVector({"w": draw(0, 3, 4).bfloat16(), "m": torch.ones(3, 3)}, frozenset({"m"}))
    for found in (whiten([tau, tau])[1], isotropise([tau, tau])[1], directions(tau, 2)[0]):
        assert found.buffers == {"m"} and torch.equal(found.tensors["m"], torch.ones(3, 3))
        assert found.shapes["w"] == (3, 4)
    assert isotropise([tau])[0].tensors["w"].dtype == torch.bfloat16
    zero = isotropise([tau * 0.0])[0]
    assert not zero.tensors["w"].any()
    for change in (whiten, isotropise):
        with pytest.raises(ValueError, match="vectors: got none"):
            change([])
        with pytest.raises(ValueError, match="w is in the second alone"):
            change([tau.select("m"), tau])
    with pytest.raises(ValueError, match="rank: got 0"):
        whiten([tau], 0)
    with pytest.raises(ValueError, match="count: got 0"):
        directions(tau, 0)
