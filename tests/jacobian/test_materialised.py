"""Rows in memory and the Gram matrix in blocks: memory bounds, networks whose examples meet, awkward batches."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from fipgeo import OutputMap, as_batches
from fipgeo.data import Batches
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot, inner_products
from fipgeo.jacobian import gram as gram_file
from fipgeo.jacobian.gram import gram_by_pairs
from fipgeo.outputs import Euclidean

from .. import oracles
from ..models import build, cut


def parts(module: nn.Module, inputs: Any, **kwargs: Any) -> tuple[EmbeddedOutputs, Tensor]:
    map_ = OutputMap(module, **kwargs)
    batches = inputs if isinstance(inputs, Batches) else as_batches(inputs)
    return EmbeddedOutputs(map_, Euclidean(), batches), map_.point()


@pytest.mark.parametrize("name", ["mlp", "text", "keywords"])
@pytest.mark.parametrize("sizes", [(5,), (1, 4), (1, 1, 2, 1)])
@pytest.mark.parametrize("examples", [1, 2])
def test_gram_in_blocks_equals_the_whole(name: str, sizes: tuple[int, ...], examples: int) -> None:
    module, inputs = build(name)
    expected = oracles.root(module, inputs)
    width = len(expected) // 5
    function, theta = parts(module, cut(inputs, *sizes))
    found = gram_by_pairs(function, theta, function.survey(theta), 2 * examples * width * expected.shape[1] * 8)
    assert oracles.relative(found, expected @ expected.T) < 1e-10


def test_blocks_keep_to_the_bound_even_if_a_batch_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs = build("mlp")
    function, theta = parts(module, inputs)
    seen = []
    whole = gram_file.materialised_root

    def spy(function: EmbeddedOutputs, theta: Tensor, survey: Any) -> Any:
        seen.append(survey.num_rows * len(theta) * 8)
        return whole(function, theta, survey)

    monkeypatch.setattr(gram_file, "materialised_root", spy)
    bound = 4 * 3 * 31 * 8  # two blocks of two examples
    found = gram_by_pairs(function, theta, function.survey(theta), bound)
    assert len(seen) == 6 and max(seen) <= bound // 2
    expected = oracles.root(module, inputs)
    assert oracles.relative(found, expected @ expected.T) < 1e-10


class Centred(nn.Module):
    """Takes the mean of its batch away, so an example's output depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.layer(x))
        return x - x.mean(0)


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (1, 4)])
def test_examples_that_meet_in_the_batch(sizes: tuple[int, ...]) -> None:
    module, x = Centred(), torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    batches = cut(x, *sizes)
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    function, theta = parts(module, batches)
    for engine in ("autodiff", "materialised"):
        assert oracles.relative(JacobianRoot(function, theta, engine=engine).to_dense(), expected) < 1e-10
    found = gram_by_pairs(function, theta, function.survey(theta), 2 * 2 * 2 * 8 * 8)
    assert oracles.relative(found, expected @ expected.T) < 1e-10


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


def _forward(module: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, Mapping):
        return module(batch["left"] * batch["right"])
    return module(batch.left * batch.right)


@pytest.mark.parametrize("kind", [Pair, SimpleNamespace, dict])
def test_batches_of_any_kind_with_their_own_forward(kind: Any) -> None:
    module, x = build("mlp")
    y = x.cos()
    batches = [kind(left=x[:2], right=y[:2]), kind(left=x[2:], right=y[2:])]
    function, theta = parts(module, batches, forward_fn=_forward)
    expected = oracles.root(module, x * y)
    for engine in ("autodiff", "materialised"):
        found = JacobianRoot(function, theta, engine=engine)
        assert oracles.relative(found.to_dense(), expected) < 1e-10
    tight = gram_by_pairs(function, theta, found.survey, 2 * 3 * 31 * 8)
    assert oracles.relative(tight, expected @ expected.T) < 1e-10


def test_batches_whose_examples_differ_in_shape() -> None:
    module, x = build("scaled_dot_product")
    batches = [x[:2], x[2:4, :2], x[4:, :1]]
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    function, theta = parts(module, batches)
    found = JacobianRoot(function, theta, engine="materialised")
    assert found.survey.rows == (12, 8, 2)
    assert oracles.relative(found.to_dense(), expected) < 1e-10
    tight = gram_by_pairs(function, theta, found.survey, 2 * 4 * found.shape[1] * 8)
    assert oracles.relative(tight, expected @ expected.T) < 1e-10


def test_inner_products_are_accumulated_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gram_file, "BLOCK_BYTES", 8 * 4 * 7)  # seven columns at a time
    a = torch.randn(4, 100, generator=torch.Generator().manual_seed(0)).float()
    b = torch.randn(3, 100, generator=torch.Generator().manual_seed(1)).float()
    assert oracles.relative(inner_products(a, b), torch.einsum("ij,kj->ik", a.double(), b.double())) < 1e-15
    for strip in (1, 3, 160):
        monkeypatch.setattr(gram_file, "STRIP", strip)
        assert oracles.relative(inner_products(a, a), a.double() @ a.double().T) < 1e-15
