"""The root against rows from plain reverse mode: every network of the table, every engine, every way to batch."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot
from fipgeo.linalg import adjoint_gap
from fipgeo.outputs import Euclidean

from .. import oracles
from ..models import CASES, build, cut

ENGINES = ("autodiff", "linearised", "factored", "materialised")


def root_of(module: nn.Module, inputs: Any, engine: str = "auto", **kwargs: Any) -> JacobianRoot:
    """The root of the plain outputs at the module's weights."""
    map_ = OutputMap(module)
    return JacobianRoot(EmbeddedOutputs(map_, Euclidean(), as_batches(inputs)), map_.point(), engine=engine, **kwargs)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_products_agree_with_the_oracle(name: str, engine: str) -> None:
    module, inputs = build(name)
    expected = oracles.root(module, inputs)
    found = root_of(module, cut(inputs, 2, 2, 1), engine)
    m, n = found.shape
    assert found.shape == tuple(expected.shape) and found.dtype == torch.float64
    x, y = expected[:2] + torch.linspace(-1, 1, n), torch.linspace(-1, 2, 3 * m).reshape(3, m).cos()
    assert oracles.relative(found(x), x @ expected.T) < 1e-10
    assert oracles.relative(found(x[0]), expected @ x[0]) < 1e-10
    assert oracles.relative(found.adjoint(y), y @ expected) < 1e-10
    assert oracles.relative(found.normal(x), x @ expected.T @ expected) < 1e-10
    assert oracles.relative(found.to_dense(), expected) < 1e-10
    assert oracles.relative(found.gram(), expected @ expected.T) < 1e-10
    assert adjoint_gap(found) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_ladder_stops_where_the_table_says(name: str) -> None:
    module, inputs = build(name)
    autodiff = root_of(module, inputs, "autodiff").autodiff
    assert autodiff.push.__name__ == ("push_forward" if CASES[name].forward_mode else "push_transposed")
    assert autodiff.vectorised == CASES[name].vectorised


@pytest.mark.parametrize("engine", ENGINES)
@given(seed=st.integers(0, 2**20), sizes=st.sampled_from([(5,), (1, 4), (4, 1), (2, 3), (1, 1, 1, 1, 1)]))
def test_batches_do_not_matter(engine: str, seed: int, sizes: tuple[int, ...]) -> None:
    module, inputs = build("mlp", seed)
    expected = oracles.root(module, inputs)
    v = torch.randn(2, expected.shape[1], generator=torch.Generator().manual_seed(seed))
    found = root_of(module, cut(inputs, *sizes), engine)
    assert found.survey.examples == sizes
    assert oracles.relative(found(v), v @ expected.T) < 1e-13
    assert oracles.relative(found.normal(v), v @ expected.T @ expected) < 1e-13


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_low_precision(engine: str, dtype: torch.dtype, tolerance: float) -> None:
    module, inputs = build("mlp")
    module, inputs = module.to(dtype), inputs.to(dtype)
    expected = oracles.root(module, inputs)
    found = root_of(module, inputs, engine)
    assert found.dtype == torch.float32
    v = torch.randn(3, found.shape[1], generator=torch.Generator().manual_seed(0)).float()
    assert oracles.relative(found.to_dense(), expected) < tolerance
    assert oracles.relative(found(v), v.double() @ expected.T) < tolerance
    assert oracles.relative(found.normal(v), v.double() @ expected.T @ expected) < 2 * tolerance
    assert adjoint_gap(found) < tolerance


@pytest.mark.parametrize("engine", ENGINES)
def test_outputs_in_another_dtype_than_the_weights(engine: str) -> None:
    module, inputs = build("mlp")
    module, inputs = module.float(), inputs.float()
    map_ = OutputMap(module, output_fn=lambda f: f.double())
    found = JacobianRoot(EmbeddedOutputs(map_, Euclidean(), as_batches(inputs)), map_.point(), engine=engine)
    expected = oracles.root(module, inputs)
    assert found.to_dense().dtype == found(torch.zeros(found.shape[1]).float()).dtype == torch.float32
    assert oracles.relative(found.adjoint(torch.eye(15).float()), expected) < 2e-6


class Branching(nn.Module):
    """Looks at its activations in Python, which vmap over tangents allows and vmap over examples does not."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x.sin() if float(x.detach().sum()) > 0 else x.tanh()


@pytest.mark.parametrize("engine", ENGINES)
def test_control_flow_on_activations(engine: str) -> None:
    module, x = Branching(), torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    found = root_of(module, cut(x, 3, 2), engine)
    expected = torch.cat([oracles.root(module, part) for part in cut(x, 3, 2)])
    assert oracles.relative(found.adjoint(torch.eye(15)), expected) < 1e-10
    assert oracles.relative(found(torch.eye(12)), expected.T) < 1e-10


def test_the_point_is_a_copy_and_may_be_elsewhere() -> None:
    module, inputs = build("mlp")
    moved, _ = build("mlp", seed=9)
    map_ = OutputMap(module)
    function = EmbeddedOutputs(map_, Euclidean(), as_batches(inputs))
    theta = OutputMap(moved).point()
    found = JacobianRoot(function, theta.float())  # comes in the dtype of the space
    assert found.dtype == torch.float64
    found = JacobianRoot(function, theta)
    theta.zero_()
    assert oracles.relative(found.to_dense(), oracles.root(moved, inputs)) < 1e-10
    with pytest.raises(ValueError, match=r"theta: got shape \[3\], expected a flat point \[31\]"):
        JacobianRoot(function, torch.zeros(3))


def test_weights_that_fail_now_do_not_matter_at_another_point() -> None:
    module, inputs = build("mlp")
    map_ = OutputMap(module)
    theta = map_.point()
    with torch.no_grad():
        module[0].weight.fill_(torch.nan)  # type: ignore[index, union-attr]
    found = JacobianRoot(EmbeddedOutputs(map_, Euclidean(), as_batches(inputs)), theta)
    assert oracles.relative(found.to_dense(), oracles.root(build("mlp")[0], inputs)) < 1e-10


def test_auto_sets_up_what_announced_products_pay_for() -> None:
    module, inputs = build("mlp")
    lazy = root_of(module, inputs)
    assert lazy.using == "autodiff" and "now using autodiff" in lazy.explain()
    assert lazy.prepare(1) is lazy.autodiff
    assert lazy.prepare() is not lazy.autodiff and lazy.using in ("factored", "materialised")
    tight = root_of(module, inputs, max_bytes=1)
    assert tight.prepare() is tight.autodiff and "does not fit" in tight.explain()
    assert root_of(module, inputs, "autodiff").prepare().__class__.__name__ == "AutodiffRoot"


def test_engines_are_checked() -> None:
    module, inputs = build("mlp")
    with pytest.raises(ValueError, match="engine: got 'dense', expected one of 'auto', 'autodiff', 'linearised'"):
        root_of(module, inputs, "dense")
    with pytest.raises(ValueError, match="'materialised' needs .* for 15 x 31 rows, but max_bytes is"):
        root_of(module, inputs, "materialised", max_bytes=1000)


class Opaque(torch.autograd.Function):
    """A derivative that torch.func cannot use, written before it existed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * 2


class OpaqueLayer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Opaque.apply(x)  # type: ignore[return-value]


def test_a_module_without_derivative_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 3), OpaqueLayer(), nn.Linear(3, 2))
    with pytest.raises(NotImplementedError, match=r"model: 1 \(OpaqueLayer\) has no derivative rule"):
        root_of(module, torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_padding_are_weights_like_others(engine: str) -> None:
    module = nn.Sequential(nn.Embedding(5, 3, padding_idx=0), nn.Flatten(), nn.Linear(6, 2))
    ids = torch.tensor([[0, 1], [2, 0], [3, 4]])
    found = root_of(module, ids, engine)
    expected = oracles.root(module, ids)
    assert bool((expected[:, :3] != 0).any()) and adjoint_gap(found) < 1e-12
    assert oracles.relative(found.to_dense(), expected) < 1e-10
    assert module[0].padding_idx == 0  # type: ignore[union-attr]
