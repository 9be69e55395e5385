"""The root by plain automatic differentiation: halves that share a forward pass, stacks, memory bounds, passes."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import AutodiffRoot, EmbeddedOutputs
from fipgeo.linalg import adjoint_gap
from fipgeo.model import NotFiniteError
from fipgeo.outputs import Euclidean

from .. import oracles
from ..hygiene import unchanged
from ..models import CASES, build, cut


def root_of(module: nn.Module, inputs: Any, **kwargs: Any) -> AutodiffRoot:
    function = EmbeddedOutputs(OutputMap(module), Euclidean(), as_batches(inputs))
    theta = function.map.point()
    return AutodiffRoot(function, theta, function.survey(theta), **kwargs)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("max_bytes", [0, 2**30])
@pytest.mark.parametrize("name", CASES)
def test_shared_and_separate_halves_are_right(name: str, max_bytes: int) -> None:
    module, inputs = build(name)
    expected = oracles.root(module, inputs)
    found = root_of(module, cut(inputs, 2, 2, 1), max_bytes=max_bytes)
    assert (found.at_once == 1) == (max_bytes == 0)
    m, n = expected.shape
    with unchanged(module, inputs):
        for count in (1, 3):
            x, y = draw(count, n), draw(count, m, seed=1)
            assert oracles.relative(found(x), x @ expected.T) < 1e-10
            assert oracles.relative(found.adjoint(y), y @ expected) < 1e-10
            assert oracles.relative(found.normal(x), x @ expected.T @ expected) < 1e-10
    assert adjoint_gap(found) < 1e-12


@pytest.mark.parametrize("chunk", [1, 2, 5, 64])
def test_chunks_do_not_matter(chunk: int) -> None:
    module, x = build("convnet")
    expected = oracles.root(module, x)
    found = root_of(module, x, chunk=chunk)
    v = draw(7, expected.shape[1])
    assert found.at_once == chunk
    assert oracles.relative(found.normal(v), v @ expected.T @ expected) < 1e-10
    with pytest.raises(ValueError, match="chunk: got 0, expected at least 1 vector"):
        root_of(module, x, chunk=0)


def test_chunks_shrink_to_fit_memory() -> None:
    module, x = build("mlp")
    whole = root_of(module, x)
    single = whole.graph_bytes + 31 * 8 + 1
    for vectors in (1, 3, 8):
        assert root_of(module, x, max_bytes=vectors * single).at_once == vectors
    # the bound is that of the largest batch, not of the first
    assert root_of(module, cut(x, 1, 4), max_bytes=3 * single).at_once <= 3


class Counted:
    """A loader that counts its passes."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.passes = batches, 0

    def __iter__(self) -> Iterator[Any]:
        self.passes += 1
        return iter(self.batches)


@pytest.mark.parametrize("name", ["mlp", "weight_norm"])
@pytest.mark.parametrize("max_bytes", [0, 2**30])
def test_one_pass_over_the_data_for_every_stack(name: str, max_bytes: int) -> None:
    module, x = build(name)
    loader = Counted(cut(x, 2, 2, 1))
    found = root_of(module, loader, chunk=2, max_bytes=max_bytes)
    _ = found.vectorised
    m, n = found.shape
    for product, size in ((found, n), (found.adjoint, m), (found.normal, n)):
        for count in (1, 2, 9):
            before = loader.passes
            product(draw(count, size))
            assert loader.passes == before + 1


class Calls(nn.Module):
    """Counts forward passes where the test can see it."""

    def __init__(self, count: list[int]) -> None:
        super().__init__()
        self.layer, self.count = nn.Linear(3, 2), count

    def forward(self, x: Tensor) -> Tensor:
        self.count[0] += 1
        return self.layer(x).sin()


def test_both_halves_of_a_product_share_one_forward_pass() -> None:
    count = [0]
    found = root_of(Calls(count), draw(5, 3))
    for call, expected in ((found.normal, 1), (found, 1)):
        count[0] = 0
        call(draw(8))
        assert count[0] == expected


def test_vectors_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    module, x = build("mlp")
    found = root_of(module, cut(x, 2, 3), chunk=2)
    v, seen = draw(5, 31), []
    named = found.function.map.named

    def spy(vector: Tensor) -> dict[str, Tensor]:
        parts = named(vector)
        seen.extend(t.untyped_storage().data_ptr() for t in parts.values())
        return parts

    monkeypatch.setattr(found.function.map, "named", spy)
    _ = found(v), found.normal(v), found.normal(v[0])
    assert set(seen) == {v.untyped_storage().data_ptr()}


@pytest.mark.parametrize("context", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_products_in_any_mode(context: Any) -> None:
    module, x = build("in_place")
    expected = oracles.root(module, x)
    with context(), torch.autocast("cpu"):
        found = root_of(module, x)
        for v in (draw(expected.shape[1]), draw(2, expected.shape[1])):
            assert oracles.relative(found.normal(v), v @ expected.T @ expected) < 1e-10
            assert oracles.relative(found.adjoint(found(v)), v @ expected.T @ expected) < 1e-10
    assert not found.normal(v).requires_grad


def test_a_checkpoint_is_refused_rather_than_wrong() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False)  # type: ignore[return-value]

    with pytest.raises(NotImplementedError, match="checkpointed modules run again in the backward pass"):
        root_of(Checkpointed(), draw(4, 3))


@pytest.mark.parametrize("inputs_need_grad", [False, True])
def test_a_reentrant_checkpoint_is_refused_though_torch_only_warns(inputs_need_grad: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.on = nn.Linear(3, 3), nn.Linear(3, 2), True

        def forward(self, x: Tensor) -> Tensor:
            hidden = checkpoint(self.first, x, use_reentrant=True) if self.on else self.first(x)
            with torch.no_grad():
                size = x.square().sum(1, keepdim=True)  # no gradient is no offence by itself
            return self.second(hidden) * size

    module, x = Checkpointed().double(), draw(4, 3).requires_grad_(inputs_need_grad)
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match="its forward uses reentrant checkpoints"):
        warnings.simplefilter("ignore")
        root_of(module, x)
    module.on = False
    assert root_of(module, x).shape == (8, 20)


def test_a_derivative_that_is_not_finite_is_named() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).abs().sqrt()

    with pytest.raises(NotFiniteError, match=r"their derivative is not \(first in layer.weight\)"):
        root_of(Root(), torch.zeros(4, 3))
