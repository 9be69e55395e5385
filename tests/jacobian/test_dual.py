"""Solves through K: seven digits where true products then refine the solution, all digits where they do not."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import metric
from fipgeo.jacobian import FactoredRoot, JacobianRoot
from fipgeo.jacobian.dual import Dual
from fipgeo.linalg import Dense

from .. import oracles
from .test_few_digits import SEEDS, N, asked, net, truth

__all__ = ["asked"]


def dual_of(module: nn.Module, inputs: Tensor) -> Dual:
    root = metric(module, inputs, geometry="euclidean").root
    assert isinstance(root, JacobianRoot)
    return Dual(root, 1 / N)


def held(dual: Dual) -> Tensor:
    """The metric of the rows that float32 products see, in float64."""
    assert isinstance(dual.root, JacobianRoot)
    dual.root.prepare(100)
    wide = dual.root.double()
    assert wide is not None
    rows = wide.to_dense()
    return rows.T @ rows / N


def draw(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def missed(matrix: Tensor, x: Tensor, rhs: Tensor, damping: float) -> float:
    """The largest relative residual, in float64."""
    left = rhs.double() - x.double() @ matrix - damping * x.double()
    return float((left.norm(dim=-1) / rhs.double().norm(dim=-1)).max())


@settings(max_examples=6)
@given(seed=SEEDS, count=st.integers(1, 3), part=st.sampled_from([1e-1, 1e-2]))
def test_seven_digits_do_for_common_dampings(seed: int, count: int, part: float) -> None:
    module, inputs = net(seed)
    dual = dual_of(module, inputs)
    damping, rhs = part * float(torch.linalg.eigvalsh(truth(module, inputs))[-1]), draw(seed, count, dual.root.shape[1])
    assert not dual.ready
    for other in (rhs, rhs.flip(-1)):  # the second one judges itself by K
        found = dual.solve(other, damping)
        assert found.ok and missed(held(dual), found.value, other, damping) < 2e-5
        assert dual.ready and not dual.exact
    several = dual.solve(rhs, [damping, 2 * damping])
    assert several.value.shape == (2, *rhs.shape)
    assert missed(held(dual), several.value[1], rhs, 2 * damping) < 2e-5


def test_small_dampings_take_all_digits(asked: list[bool]) -> None:
    dual = dual_of(*net(2))
    matrix = held(dual)
    rhs, largest = draw(2, len(matrix), dtype=torch.float64), float(torch.linalg.eigvalsh(matrix)[-1])
    for part, digits in ((1e-2, [True]), (1e-7, [True, False]), (1e-2, [True, False])):
        found = dual.solve(rhs, part * largest)
        assert asked == digits and dual.exact == (False in digits)
        assert found.ok and missed(matrix, found.value, rhs, part * largest) < 1e-6


def test_where_true_products_object_k_is_made_of_all_digits() -> None:
    """As where a device keeps eight bits of every factor of a float32 product."""
    module, inputs = net(3)
    original = FactoredRoot.gram

    def gram(self: FactoredRoot, *, single: bool = False) -> Tensor:
        found = original(self, single=single)
        return found.bfloat16().double() if single else found

    plain = dual_of(module, inputs)
    matrix = held(plain)
    damping, rhs = 1e-3 * float(torch.linalg.eigvalsh(matrix)[-1]), draw(3, len(matrix))
    expected = plain.solve(rhs, damping, rtol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactoredRoot, "gram", gram)
        dual = dual_of(module, inputs)
        found = dual.solve(rhs, damping, rtol=1e-4)
    assert dual.exact and found.ok and missed(matrix, found.value, rhs, damping) < 2e-4
    assert found.num_products > expected.num_products  # what the first attempt took counts


def test_roots_in_float64_and_plain_matrices_have_one_k(asked: list[bool]) -> None:
    module, inputs = net(4)
    rhs = draw(4, oracles.root(module, inputs).shape[1], dtype=torch.float64)
    wide = dual_of(module.double(), inputs.double())
    assert wide.solve(rhs, 0.1).ok and wide.exact and asked == [False]
    rows = oracles.root(module, inputs)
    plain = Dual(Dense(rows), 1 / N)
    assert torch.allclose(plain.solve(rhs, 0.1).value, wide.solve(rhs, 0.1).value, rtol=1e-8)
    assert oracles.relative(plain.gram, rows @ rows.T) < 1e-12 and plain.factor.dual is plain.gram


def test_a_damping_of_zero_is_refused() -> None:
    dual = dual_of(*net(5))
    with pytest.raises(ValueError, match="damping is 0"):
        dual.solve(draw(0, dual.root.shape[1]), [0.1, 0.0])
