"""Laws that every operator node obeys, and what operators say when they are misused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse.linalg import LinearOperator as ScipyOperator
from scipy.sparse.linalg import lsqr

from fipgeo.linalg import (
    Dense,
    Diagonal,
    Function,
    Gram,
    Identity,
    Stack,
    Sum,
    adjoint_gap,
    dense_gap,
    from_scipy,
    psd_gap,
    symmetry_gap,
)

from .cases import NODES, PSD, Counting, draw

every_node = pytest.mark.parametrize("node", NODES)
cases = given(seed=st.integers(0, 2**20), m=st.integers(1, 6), n=st.integers(6, 9))


@every_node
@cases
def test_agrees_with_its_matrix(node: str, seed: int, m: int, n: int) -> None:
    operator, dense = NODES[node](seed, m, n)
    assert operator.shape == dense.shape
    assert dense_gap(operator, dense) < 1e-10
    assert adjoint_gap(operator, generator=seed) < 1e-10
    assert torch.allclose(operator.to_dense(), dense, rtol=1e-10, atol=1e-10)
    assert dense_gap(operator.T, torch.einsum("ij->ji", dense)) < 1e-10
    assert torch.allclose(operator.gram(), torch.einsum("ij,kj->ik", dense, dense), rtol=1e-10, atol=1e-10)
    assert torch.linalg.matrix_rank(dense) <= operator.rank_bound <= min(operator.shape)


@pytest.mark.parametrize("node", PSD)
@cases
def test_symmetric_and_psd_as_declared(node: str, seed: int, m: int, n: int) -> None:
    operator, dense = NODES[node](seed, m, n)
    assert operator.symmetric and operator.psd
    assert symmetry_gap(operator, generator=seed) < 1e-10
    assert psd_gap(operator, generator=seed) < 1e-10
    assert torch.allclose(operator.diagonal(), torch.einsum("ii->i", dense), rtol=1e-10, atol=1e-10)


@every_node
@cases
def test_calls_and_matrix_products_agree(node: str, seed: int, m: int, n: int) -> None:
    operator, dense = NODES[node](seed, m, n)
    x = draw(seed, 2, 3, operator.shape[1])
    expected = torch.einsum("ij,abj->abi", dense, x)
    assert torch.allclose(operator(x), expected, atol=1e-10)
    assert torch.allclose(operator @ x.mT, expected.mT, atol=1e-10)
    assert torch.allclose(operator @ x[0, 0], expected[0, 0], atol=1e-10)
    y = draw(seed + 1, 4, operator.shape[0])
    assert torch.allclose(operator.adjoint(y), torch.einsum("ij,ai->aj", dense, y), atol=1e-10)
    assert operator(x[:, :0]).shape == (2, 0, operator.shape[0])


@every_node
@cases
def test_scipy_and_back(node: str, seed: int, m: int, n: int) -> None:
    operator, dense = NODES[node](seed, m, n)
    exported = operator.to_scipy()
    assert isinstance(exported, ScipyOperator) and exported.dtype == dense.numpy().dtype
    v, u = draw(seed, operator.shape[1]).numpy(), draw(seed, operator.shape[0], 2).numpy()
    assert abs(exported @ v - dense.numpy() @ v).max() < 1e-10
    assert abs(exported.rmatmat(u) - dense.numpy().T @ u).max() < 1e-10
    assert dense_gap(from_scipy(exported), dense) < 1e-10


def test_scipy_runs_its_own_solvers_on_our_operators() -> None:
    a, b = draw(3, 50, 30), draw(4, 50)
    found = torch.from_numpy(lsqr(Dense(a).to_scipy(), b.numpy(), atol=1e-12, btol=1e-12)[0])
    assert torch.allclose(found, torch.linalg.lstsq(a, b[:, None]).solution[:, 0], atol=1e-8)


def test_structure_is_concluded_where_it_follows() -> None:
    psd, symmetric = Identity(3), Dense(torch.diag(torch.tensor([1.0, -1.0, 0.0])), symmetric=True)
    assert (psd + 2 * psd).psd and not (psd - psd).psd and (psd - psd).symmetric
    assert (psd + symmetric).symmetric and not (psd + symmetric).psd
    assert not (-1 * psd).psd and not (symmetric @ psd).symmetric
    assert Gram(Dense(torch.ones(2, 3))).psd and Diagonal(torch.ones(2)).psd
    assert not Diagonal(torch.tensor([1.0, -1.0])).psd
    assert symmetric.T is symmetric
    wide = Dense(torch.ones(2, 3))
    assert wide.T.T is wide
    assert Gram(wide).rank_bound == 2 and (Gram(wide) + Gram(wide)).rank_bound == 3


@pytest.mark.parametrize("node", ["sum", "product", "stack", "gram", "scaled"])
def test_products_pass_one_stack_to_their_parts(node: str) -> None:
    part = Counting(Dense(draw(0, 5, 5)))
    operator = {
        "sum": part + Identity(5),
        "product": part @ Identity(5),
        "stack": Stack([part, Identity(5)]),
        "gram": Gram(part),
        "scaled": 2 * part,
    }[node]
    operator(draw(1, 7, 5))
    operator.normal(draw(1, 7, 5))
    fused = 1 if node in ("product", "stack", "scaled") else 2  # the normal product of a part is one call
    assert (part.calls, part.vectors) == (1 + fused, 7 * (1 + fused))


def test_probes_measure_violations() -> None:
    a = draw(0, 6, 6)
    wrong = Function(lambda x: x @ a.T, lambda y: y @ (a + 1e-3), (6, 6))
    assert 1e-6 < adjoint_gap(wrong) < 1e-1
    assert 1e-6 < dense_gap(wrong, a) < 1e-1
    assert symmetry_gap(Dense(a)) > 1e-2
    assert psd_gap(Diagonal(torch.tensor([1.0, 1.0, -0.9]))) > 1e-2
    broken = Function(lambda x: x * torch.nan, None, (3, 3), symmetric=True)
    assert adjoint_gap(broken) == symmetry_gap(broken) == float("inf")


def test_to_dense_refuses_with_the_estimate() -> None:
    operator = Identity(100_000)
    with pytest.raises(ValueError, match=r"80,000,000,000 bytes.*max_bytes=80000000000"):
        operator.to_dense()


def test_misuse_names_both_sides_and_the_cure() -> None:
    a = Dense(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"\(2, 2\).*\[\.\.\., 3\].*\(2, 3\)"):
        a(torch.ones(2, 2))
    with pytest.raises(TypeError, match=r"float32.*float64.*\.to\(torch.float64\)"):
        a(torch.ones(3, dtype=torch.float32))
    with pytest.raises(ValueError, match=r"\(2, 3\).*\[3, k\].*call A\(x\)"):
        _ = a @ torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"\(2, 3\) and \(2, 3\).*\.T"):
        _ = a @ a
    with pytest.raises(ValueError, match="one shape"):
        _ = a + a.T
    with pytest.raises(TypeError, match="one dtype"):
        Sum(a, Dense(torch.ones(2, 3, dtype=torch.float32)))
    with pytest.raises(ValueError, match="square"):
        Dense(torch.ones(2, 3), symmetric=True)
    with pytest.raises(TypeError, match="real floating"):
        Dense(torch.ones(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="symmetric=True"):
        Function(lambda x: x, None, (2, 2))
    with pytest.raises(ValueError, match=r"returned shape \(3, 1\).*\(3, 2\)"):
        Function(lambda x: x[:, :1], None, (2, 2), symmetric=True)(torch.ones(3, 2))
    with pytest.raises(ValueError, match="same columns"):
        Stack([a, a.T])
    with pytest.raises(ValueError, match="Gram"):
        a.diagonal()
    with pytest.raises(ValueError, match="at least 0"):
        Gram(a, -1.0)
    with pytest.raises(TypeError):
        _ = a + 1  # pyright: ignore[reportOperatorIssue]
