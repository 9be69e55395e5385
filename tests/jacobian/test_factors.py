"""Blocks of the root for one parameter: products and chosen rows against dense rows by differentiation."""

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fipgeo.jacobian.factored import factors
from fipgeo.jacobian.factored.factors import Block, ConvBlock, EmbeddingBlock, LinearBlock, RowsBlock

from .. import oracles

seeds = st.integers(0, 2**20)
small = st.integers(1, 3)


def dense(layer: Callable[[Tensor], Tensor], b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows `[n * M, *shape]` of `z[n, m] = sum b[n, m] * y[n]` for a layer that maps the parameter to y."""
    weight = torch.zeros(shape, requires_grad=True)
    z = (b * layer(weight)[:, None]).flatten(2).sum(-1).flatten()
    return torch.stack([torch.autograd.grad(entry, weight, retain_graph=True)[0] for entry in z])


def check(block: Block, expected: Tensor, n: int, generator: torch.Generator, index: Tensor | None = None) -> None:
    """Every method of a block against its dense rows `[n * M, *shape]`."""
    rows, shape = expected.flatten(1), expected.shape[1:]
    height = len(rows) // n
    for k in (1, 3):
        v = torch.randn(k, *shape, generator=generator)
        u = torch.randn(n, height, k, generator=generator)
        assert block.apply(v).shape == (n, height, k)
        assert oracles.relative(block.apply(v), (rows @ v.flatten(1).T).view(n, height, k)) < 1e-10
        assert block.adjoint(u).shape == (k, *shape)
        assert oracles.relative(block.adjoint(u), (u.flatten(0, 1).T @ rows).view(k, *shape)) < 1e-10
    entries = block.entries()
    silent = torch.ones(shape[0], dtype=torch.bool).index_fill(0, entries, False)
    assert not expected[:, silent].any()
    assert torch.equal(entries, entries.sort().values)
    some = entries[torch.randperm(len(entries), generator=generator)[: len(entries) // 2 + 1]].sort().values
    for chosen in (entries, some) if index is None else (entries, some, index):
        assert oracles.relative(block.rows(chosen), expected[:, chosen].flatten(1)) < 1e-10
    narrow = block.to(torch.float32)
    assert type(narrow) is type(block)
    if not isinstance(block, RowsBlock):  # converts in its products, part by part
        assert all(t.dtype == torch.float32 for t in narrow.tensors() if t.is_floating_point())
        assert narrow.rows(entries).dtype == torch.float32
    assert narrow.apply(v.float()).dtype == narrow.adjoint(u.float()).dtype == torch.float32
    assert oracles.relative(narrow.apply(v.float()), block.apply(v)) < 1e-5
    assert oracles.relative(block.rows(), rows[:, :] if len(entries) == shape[0] else block.rows(entries)) < 1e-10
    memory = torch.full_like(block.rows(), torch.nan)
    assert torch.equal(block.rows(out=memory), block.rows()) and torch.equal(memory, block.rows())
    assert oracles.relative(narrow.rows(entries), expected[:, entries].flatten(1)) < 1e-5
    assert sum(t.numel() for t in block.tensors()) > 0


@example(seed=0, n=3, m=2, t=1, i=2, o=3, transposed=False)
@given(seed=seeds, n=small, m=small, t=st.sampled_from([1, 5]), i=small, o=small, transposed=st.booleans())
def test_linear(seed: int, n: int, m: int, t: int, i: int, o: int, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, b = torch.randn(n, t, i, generator=generator), torch.randn(n, m, t, o, generator=generator)
    expected = dense(lambda w: x @ (w if transposed else w.T), b, (i, o) if transposed else (o, i))
    block = LinearBlock(x, b, transposed)
    check(block, expected, n, generator)
    rows, start = expected.flatten(1), torch.randn(n * m, n * m, generator=generator)
    for shift, strip in ((0.0, 160), (1.0, 160), (1.0, m)):
        total = start.clone()
        with patch.object(factors, "STRIP", strip):
            assert block.add_inner(total, shift) == (t == 1)
        bias = b[:, :, 0].flatten(0, 1) if t == 1 else rows[:, :0]
        wanted = start + (t == 1) * (rows @ rows.T + shift * bias @ bias.T)
        assert oracles.relative(total.triu(), wanted.triu()) < 1e-10


CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


@given(
    seed=seeds,
    n=small,
    q=st.integers(1, 2),
    m=small,
    space=small,
    groups=st.sampled_from([(1, 1, 2), (1, 2, 1), (2, 1, 2), (2, 2, 1), (3, 1, 1), (3, 1, 2)]),
    data=st.data(),
)
def test_convolution(seed: int, n: int, q: int, m: int, space: int, groups: tuple[int, ...], data: Any) -> None:
    """Groups with their widths on either side; a width of one on the inner side is depthwise."""
    generator = torch.Generator().manual_seed(seed)
    count, inner, outer = groups
    draw = lambda low, high: tuple(data.draw(st.integers(low, high)) for _ in range(space))  # noqa: E731
    kernel, stride, padding, dilation = draw(1, 3), draw(1, 3), draw(0, 2), draw(1, 2)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": count}
    size = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, draw(0, 2), strict=True))
    x = torch.randn(n * q, count * inner, *size, generator=generator)
    shape = (count * outer, inner, *kernel)
    layer = CONVOLUTIONS[space - 1]
    out = layer(x, torch.zeros(shape), None, **options)
    b = torch.randn(n, m, q, *out.shape[1:], generator=generator)
    expected = dense(lambda w: layer(x, w, None, **options).unflatten(0, (n, q)), b, shape)
    check(ConvBlock(x, b, kernel, options), expected, n, generator)


@given(seed=seeds, n=small, m=small, t=st.integers(1, 5), d=small, size=st.integers(2, 6))
def test_embedding(seed: int, n: int, m: int, t: int, d: int, size: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(size - 1, (n, t), generator=generator)  # repeated, and the last entry never occurs
    b = torch.randn(n, m, t, d, generator=generator)
    expected = dense(lambda w: w[ids], b, (size, d))
    check(EmbeddingBlock(ids, b, size), expected, n, generator, index=torch.arange(size))
    absent = EmbeddingBlock(ids, b, size).rows(torch.tensor([size - 1]))
    assert absent.shape == (n * m, d) and not absent.any()


@given(seed=seeds, n=small, m=small, shape=st.sampled_from([(1,), (4,), (3, 2), (2, 3, 2)]))
def test_rows(seed: int, n: int, m: int, shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(n * m, *shape, generator=generator)
    check(RowsBlock(matrix, n), matrix, n, generator)


@pytest.mark.parametrize("transposed", [False, True])
def test_activations_may_be_views(transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 3, 2, generator=generator).transpose(0, 1)  # [n, T, i] over time-first memory
    b = torch.randn(4, 2, 3, 5, generator=generator).permute(2, 1, 0, 3)  # [n, M, T, o]
    expected = dense(lambda w: x @ (w if transposed else w.T), b, (2, 5) if transposed else (5, 2))
    check(LinearBlock(x, b, transposed), expected, 3, generator)
    ids = torch.randint(4, (4, 3), generator=generator).T
    check(EmbeddingBlock(ids, b, 4), dense(lambda w: w[ids], b, (4, 5)), 3, generator)
