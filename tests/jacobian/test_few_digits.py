"""Few eigenpairs to few digits: K from products in single precision where that will do, and only there."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import metric
from fipgeo.jacobian import FactoredRoot, JacobianRoot
from fipgeo.jacobian.routes import few_digits
from fipgeo.linalg import Dense, Gram, dual_eigh

from .. import oracles

N, K = 24, 6
SEEDS = st.integers(0, 2**20)
ENGINES = ["auto", "factored", "materialised"]


def net(seed: int) -> tuple[nn.Module, Tensor]:
    """A network in float32 and its inputs."""
    generator = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, 4)).float()
    for p in module.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    return module, torch.randn(N, 9, generator=generator, dtype=torch.float32)


def truth(module: nn.Module, inputs: Tensor) -> Tensor:
    rows = oracles.root(module, inputs)
    return rows.T @ rows / N


def root_of(module: nn.Module, inputs: Tensor, **kwargs: Any) -> JacobianRoot:
    root = metric(module, inputs, geometry="euclidean", **kwargs).root
    assert isinstance(root, JacobianRoot)
    return root


def residual(g: Tensor, values: Tensor, vectors: Tensor) -> float:
    """The largest |g v - lambda v| over the largest eigenvalue, in float64."""
    v, size = vectors.double(), values.double()
    return float((v @ g - size[:, None] * v).norm(dim=1).max() / torch.linalg.eigvalsh(g)[-1])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was asked of the roots: whether products in single precision would do."""
    calls: list[bool] = []
    original = JacobianRoot.gram

    def gram(self: JacobianRoot, *, single: bool = False) -> Tensor:
        calls.append(single)
        return original(self, single=single)

    monkeypatch.setattr(JacobianRoot, "gram", gram)
    return calls


@pytest.mark.parametrize("engine", ENGINES)
@settings(max_examples=4)
@given(seed=SEEDS)
def test_products_in_single_precision_give_seven_digits_and_no_more(engine: str, seed: int) -> None:
    module, inputs = net(seed)
    rows = oracles.root(module, inputs)
    roots = [root_of(module, inputs, engine=engine) for _ in range(2)]
    coarse, fine = roots[0].gram(single=True), roots[1].gram()
    assert coarse.dtype == fine.dtype == torch.float64
    assert 1e-9 < oracles.relative(coarse, fine) < 1e-6
    assert oracles.relative(coarse, rows @ rows.T) < 1e-5
    assert roots[0].gram(single=True) is coarse  # made once
    assert oracles.relative(roots[0].gram(), fine) < 1e-12  # and never passed off as K of all digits
    assert roots[0].gram(single=True) is roots[0].gram()  # which serves where fewer would have done, alone in memory
    assert roots[0]._single is None


def test_factors_of_single_parameters_do_the_same_in_little_memory() -> None:
    module, inputs = net(0)
    few = 4 * N * (9 + 4 * 16)
    roots = [root_of(module, inputs, max_bytes=few) for _ in range(2)]
    coarse, fine = roots[0].gram(single=True), roots[1].gram()
    assert 1e-9 < oracles.relative(coarse, fine) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("k", "rtol", "expected"),
    [(K, 1e-4, [True]), (K, 1e-5, [True]), (K, 1e-6, [False]), (K, None, [False]), (None, 1e-4, [False])],
)
def test_single_precision_serves_few_pairs_to_few_digits(
    asked: list[bool], engine: str, k: int | None, rtol: float | None, expected: list[bool]
) -> None:
    module, inputs = net(1)
    g = metric(module, inputs, geometry="euclidean", engine=engine)
    found = g.spectrum(k, method="dual", rtol=rtol)
    assert asked == expected
    assert found.vectors is not None and residual(truth(module, inputs), found.values, found.vectors) < 1e-5


def test_a_k_of_all_digits_that_is_there_is_used(asked: list[bool]) -> None:
    module, inputs = net(1)
    g = metric(module, inputs, geometry="euclidean")
    g.dual_factor()
    asked.clear()
    g.spectrum(K, method="dual", rtol=1e-4)
    assert True not in asked


@settings(max_examples=4)
@given(seed=SEEDS, rtol=st.sampled_from([1e-5, 1e-4]))
def test_where_single_precision_is_not_enough_k_is_made_of_all_digits(seed: int, rtol: float) -> None:
    """As where a device keeps eight bits of every factor of a float32 product."""
    module, inputs = net(seed)
    original, calls = FactoredRoot.gram, []

    def gram(self: FactoredRoot, *, single: bool = False) -> Tensor:
        calls.append(single)
        found = original(self, single=single)
        return found.bfloat16().double() if single else found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactoredRoot, "gram", gram)
        g = metric(module, inputs, geometry="euclidean", engine="factored")
        found = g.spectrum(K, method="dual", rtol=rtol)
        assert calls == [True, False]
        assert few_digits(root_of(module, inputs, engine="factored"), K, rtol, 1 / N) is None
    expected = truth(module, inputs)
    assert found.vectors is not None and found.residuals is not None
    assert float(found.residuals.max() / found.values[0]) < rtol
    assert residual(expected, found.values, found.vectors) < rtol
    top = torch.linalg.eigvalsh(expected).flip(0)[:K]
    torch.testing.assert_close(found.values.double(), top, rtol=1e-4, atol=1e-5 * float(top[0]))


@settings(max_examples=4)
@given(seed=SEEDS, noise=st.floats(1e-8, 1e-1))
def test_residuals_through_a_wrong_k_are_those_of_the_operator(seed: int, noise: float) -> None:
    """What the verdict rests on: residuals are never smaller than true ones by more than a little."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(N, 60, generator=generator)
    error = torch.randn(N, N, generator=generator)
    wrong = rows @ rows.T * (1 + noise * (error + error.T))
    found: Any = dual_eigh(Dense(rows), scale=1 / N, k=K, gram=wrong)
    operator = Gram(Dense(rows), 1 / N)
    missed = (operator(found.vectors) - found.values[:, None] * found.vectors).norm(dim=1)
    assert bool((missed.max() <= 3 * found.residuals.max()).all())


def test_a_root_of_no_model_is_not_asked() -> None:
    assert few_digits(Dense(torch.eye(4)), 2, 1e-4, 1.0) is None
