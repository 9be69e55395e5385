"""Columns of chosen weights, from factors, rows or plain differentiation, against dense rows by `torch.func`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional as F

from fipgeo.jacobian import FactoredRoot, JacobianRoot
from fipgeo.jacobian.factored import segment

from .. import models, oracles
from .kinds import KINDS, prepared
from .test_factored import GENEROUS, least_bytes, parts_of

SEEDS = st.integers(0, 2**20)


class Texts(nn.Module):
    """A table beside a wide layer, with a head that uses the table again if asked."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.token, self.mix, self.head = nn.Embedding(19, 6), nn.Linear(6, 24), nn.Linear(24, 6)
        self.out = self.token if tied else nn.Embedding(3, 6)

    def forward(self, ids: Tensor) -> Tensor:
        h = self.head(torch.tanh(self.mix(self.token(ids)))).sin().mean(1)
        return F.linear(h, self.token.weight)[:, ::3] if self.out is self.token else self.out(ids[:, :1] % 3)[:, 0] * h


def wide() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.Tanh(), nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 3))


def images() -> nn.Module:
    first, second = nn.Conv2d(2, 8, 3, padding=1), nn.Conv2d(8, 6, 3, stride=2, groups=2)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.Tanh(), second, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3))


def floats(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda generator: torch.randn(5, *shape, generator=generator)


def ids(generator: torch.Generator) -> Tensor:
    return torch.randint(19, (5, 4), generator=generator)


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[torch.Generator], Tensor]]] = {
    "wide": (wide, floats(12)),
    "images": (images, floats(2, 6, 6)),
    "texts": (lambda: Texts(False), ids),
    "tied texts": (lambda: Texts(True), ids),
}


def made(name: str, seed: int) -> tuple[nn.Module, Tensor, torch.Generator]:
    """A network with random weights, inputs, and the generator that drew them."""
    generator, (build, draw) = torch.Generator().manual_seed(seed), NETS[name]
    module = build().eval()
    for p in module.parameters():
        p.data = 0.5 * torch.randn(p.shape, generator=generator)
    return module, draw(generator), generator


def rows(module: nn.Module, inputs: Any) -> Tensor:
    """R `[N * M, D]` by `jacrev`."""
    weights = {name: p.detach() for name, p in module.named_parameters()}
    found = jacrev(lambda w: functional_call(module, w, (inputs,)).flatten())(weights)
    return torch.cat([part.flatten(1) for part in found.values()], 1)


def masks(dim: int, generator: torch.Generator) -> list[Tensor]:
    """Few weights, many, one, all and none."""
    draw = torch.rand(dim, generator=generator)
    one = torch.arange(dim) == int(torch.randint(dim, (), generator=generator))
    return [draw < 0.05, draw < 0.7, one, draw < 2, draw < 0]


@settings(max_examples=4)
@given(SEEDS, st.sampled_from([(5,), (2, 2, 1), (4, 1)]))
@pytest.mark.parametrize("tight", [False, True], ids=["generous", "tight"])
@pytest.mark.parametrize("name", NETS)
def test_columns_from_factors(name: str, tight: bool, seed: int, sizes: tuple[int, ...]) -> None:
    module, inputs, generator = made(name, seed)
    expected = rows(module, inputs)
    function, theta, survey = parts_of(module, models.cut(inputs, *sizes))
    root = FactoredRoot(function, theta, survey, max_bytes=least_bytes(function, theta, survey) if tight else GENEROUS)
    assert any(part.blocks for part in root.segments)  # not everything lies in one matrix of rows
    for free in masks(len(theta), generator):
        found = root.chosen(free)
        assert found.shape == (len(expected), int(free.sum()))
        assert oracles.relative(found, expected[:, free]) < 1e-11


@settings(max_examples=3)
@given(SEEDS)
@pytest.mark.parametrize("name", ["wide", "texts"])
def test_columns_of_batches_whose_layers_differ_in_shape(name: str, seed: int) -> None:
    module, inputs, generator = made(name, seed)
    batches = [inputs[:2], inputs[2:4, :3], inputs[4:]] if name == "texts" else [inputs[:2], inputs[2:]]
    expected = torch.cat([rows(module, batch) for batch in batches])
    function, theta, survey = parts_of(module, batches)
    root = FactoredRoot(function, theta, survey, max_bytes=least_bytes(function, theta, survey))
    assert len(root.segments) > 1 or name == "wide"
    for free in masks(len(theta), generator):
        assert oracles.relative(root.chosen(free), expected[:, free]) < 1e-11


@settings(max_examples=3)
@given(SEEDS)
@pytest.mark.parametrize("name", NETS)
def test_columns_made_for_few_entries_at_a_time(name: str, seed: int) -> None:
    module, inputs, generator = made(name, seed)
    function, theta, survey = parts_of(module, inputs)
    root = FactoredRoot(function, theta, survey, max_bytes=least_bytes(function, theta, survey))
    free = masks(len(theta), generator)[1]
    whole = root.chosen(free)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segment, "BLOCK_BYTES", 1)
        assert torch.equal(root.chosen(free), whole) or oracles.relative(root.chosen(free), whole) < 1e-14


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize(("name", "tight"), [(name, bool(i % 2)) for i, name in enumerate(KINDS)])
def test_every_kind_of_layer(name: str, tight: bool) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    function, theta, survey = parts_of(module, models.cut(inputs, 2, 3))
    root = FactoredRoot(function, theta, survey, max_bytes=least_bytes(function, theta, survey) if tight else GENEROUS)
    for free in masks(len(theta), torch.Generator().manual_seed(3)):
        assert oracles.relative(root.chosen(free), expected[:, free]) < 1e-10


@settings(max_examples=2)
@given(SEEDS, st.sampled_from([(5,), (2, 2, 1)]))
@pytest.mark.parametrize("max_bytes", [2**30, 1], ids=["factors", "plain"])
@pytest.mark.parametrize("name", NETS)
def test_the_root_takes_whatever_way_there_is(name: str, max_bytes: int, seed: int, sizes: tuple[int, ...]) -> None:
    module, inputs, generator = made(name, seed)
    expected = rows(module, inputs)
    function, theta, _ = parts_of(module, models.cut(inputs, *sizes))
    root = JacobianRoot(function, theta, max_bytes=max_bytes)
    for free in masks(len(theta), generator):
        found = root.chosen(free)
        assert tuple(found.shape) == (len(expected), int(free.sum())) and root.using == "autodiff"
        assert oracles.relative(found.matrix, expected[:, free]) < 1e-11


def test_the_root_takes_columns_from_factors_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    module, inputs, generator = made("wide", 0)
    function, theta, _ = parts_of(module, inputs)
    root = JacobianRoot(function, theta)

    def refuse(*_: object) -> None:
        raise AssertionError("rows by plain differentiation")

    monkeypatch.setattr("fipgeo.jacobian.root.materialised_root", refuse)
    free = masks(len(theta), generator)[0]
    assert oracles.relative(root.chosen(free).matrix, rows(module, inputs)[:, free]) < 1e-11
