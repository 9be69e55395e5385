"""Attention's tangent in pieces: against the dense Jacobian of softmax attention, and what its graph keeps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import TangentModel
from fipgeo.tangent import heads
from fipgeo.tangent.heads import Heads, pieces

seeds = st.integers(0, 2**31)


def drawn(seed: int, count: int = 3) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values of `count` heads, of 4 queries and 5 keys, and tangents of them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, 4, 2), (count, 5, 2), (count, 5, 3)]
    one, two = ([torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes] for _ in range(2))
    return one, two


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


@pytest.mark.parametrize("table", [1, 45, 2**20])
@given(seed=seeds)
def test_tangent_and_transpose_are_those_of_the_dense_jacobian(table: int, seed: int) -> None:
    point, moves = drawn(seed)
    before, heads.TABLE = heads.TABLE, table
    try:
        moved = [t.requires_grad_() for t in moves]
        change, value = Heads.apply(*moved, *point)  # type: ignore[misc]
        u = torch.randn(change.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        pulled = torch.autograd.grad(change, moved, u)
    finally:
        heads.TABLE = before
    jacobian = torch.autograd.functional.jacobian(plain, tuple(point))
    rows = torch.cat([j.reshape(u.numel(), -1) for j in jacobian], 1)
    flat = torch.cat([t.detach().flatten() for t in moves])
    assert torch.allclose(value, plain(*point), rtol=1e-12, atol=1e-12) and not value.requires_grad
    assert torch.allclose(change.detach().flatten(), rows @ flat, rtol=1e-10, atol=1e-10)
    assert torch.allclose(torch.cat([t.flatten() for t in pulled]), u.flatten() @ rows, rtol=1e-10, atol=1e-10)


def test_gradients_of_gradients() -> None:
    point, moves = drawn(0)
    inputs = tuple(t.requires_grad_() for t in moves)
    assert torch.autograd.gradcheck(lambda *d: Heads.apply(*d, *point)[0].square(), inputs)  # type: ignore[index]
    assert torch.autograd.gradgradcheck(lambda *d: Heads.apply(*d, *point)[0].square(), inputs)  # type: ignore[index]


@given(count=st.integers(1, 40), length=st.integers(1, 40), table=st.integers(1, 2000))
def test_pieces_hold_all_heads_once_in_tables_of_the_size(count: int, length: int, table: int) -> None:
    before, heads.TABLE = heads.TABLE, table
    try:
        q = torch.zeros(count, length, 1)
        found = list(pieces(q, q))
    finally:
        heads.TABLE = before
    assert [i for piece in found for i in range(count)[piece]] == list(range(count))
    assert all(len(range(count)[piece]) * length**2 <= max(table, length**2) for piece in found)


@pytest.mark.parametrize(
    "net",
    [
        nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
        nn.Sequential(nn.Conv1d(11, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 3, 2), nn.GELU()),
    ],
    ids=["encoder", "convolutions"],
)
def test_a_graph_keeps_neither_tables_nor_tangents(net: nn.Module) -> None:
    """What `unpack_dual` gives is a view of all of a dual number, which lives on with its tangent through it."""
    x = torch.randn(3, 11, 6, generator=torch.Generator().manual_seed(0))
    found: dict[int, Tensor] = {}
    nodes, stack = set(), [TangentModel(net.double())(x.double()).grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in nodes:
            continue
        nodes.add(node)
        stack.extend(parent for parent, _ in node.next_functions)
        kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        for t in [*kept, *getattr(node, "saved_tensors", ())]:
            if isinstance(t, Tensor):
                found[id(t)] = t
    large = [t for t in found.values() if t.numel() >= x.numel() // 2]
    assert large and not any(t._base is not None and t._base.shape == t.shape for t in large)
    assert not any(t.shape[-2:] == (11, 11) for t in large)
