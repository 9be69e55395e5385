"""The choice of an engine: estimates that can be printed, memory that is kept, the same numbers whatever is chosen."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import ENGINES, EmbeddedOutputs, FactoredRoot, JacobianRoot
from fipgeo.jacobian.cost import BYTE, Cost, size
from fipgeo.jacobian.factored import gram_by_parameters
from fipgeo.jacobian.gram import gram_by_pairs
from fipgeo.outputs import Euclidean

from .. import models, oracles
from ..hygiene import unchanged
from .kinds import KINDS, prepared

importlib.import_module("sympy")  # torch does so when it first vectorises, and that adds a warning filter
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

SOME = ("tokens", "conv2d strided", "vision", "language model", "position embedding", "tied layers", "decayed")


def paired(names: Sequence[str], limits: Sequence[int]) -> list[tuple[str, int]]:
    """Every other pair, each name with half of the limits and each limit with half of the names."""
    return [(name, limit) for i, name in enumerate(names) for j, limit in enumerate(limits) if (i + j) % 2 == 0]


def root_of(module: nn.Module, inputs: Any, engine: str = "auto", **kwargs: Any) -> JacobianRoot:
    """The root of the plain outputs at the module's weights."""
    map_ = OutputMap(module)
    return JacobianRoot(EmbeddedOutputs(map_, Euclidean(), as_batches(inputs)), map_.point(), engine=engine, **kwargs)


def drawn(root: JacobianRoot, k: int = 3) -> Tensor:
    """Vectors of weights."""
    return torch.randn(k, root.shape[1], generator=torch.Generator().manual_seed(3), dtype=root.dtype)


NETWORKS = [name for name in KINDS if name != "embedding bag"] + [f"models: {name}" for name in models.CASES]


@pytest.mark.parametrize("name", NETWORKS)
def test_estimates_can_be_printed_for_every_network(name: str) -> None:
    module, inputs = models.build(name[8:]) if name.startswith("models: ") else prepared(KINDS[name])
    root = root_of(module, models.cut(inputs, 2, 3))
    with unchanged(module, inputs):
        text = root.explain()
    assert all(engine in text for engine in ENGINES)
    assert f"{root.shape[0]:,} rows (5 examples) x {root.shape[1]:,} weights" in text
    for cost in root.costs.engines.values():
        assert cost.setup >= 0 and cost.product > 0 and cost.num_bytes >= 0
    assert set(root.costs.bytes_by_name) == set(OutputMap(module).space.shapes)
    least = root.costs.bytes_by_name.values()
    assert all(0 <= need < float("inf") for need in least)


@pytest.mark.parametrize(("name", "max_bytes"), paired(SOME, [1, 500, 5000, 10000, 2000, 2**30]))
def test_what_is_chosen_fits(name: str, max_bytes: int) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    root = root_of(module, models.cut(inputs, 2, 3), max_bytes=max_bytes)
    with unchanged(module, inputs):
        used = root.prepare(10**6)
        x = drawn(root)
        assert oracles.relative(root.normal(x), x @ expected.T @ expected) < 1e-10
    if isinstance(used, FactoredRoot):
        assert used.num_bytes <= max_bytes
    assert root.using != "materialised" or root.num_bytes <= max_bytes
    assert root.costs.engines[root.using].num_bytes <= max_bytes


@pytest.mark.parametrize("name", SOME)
def test_numbers_stay_the_same_when_the_engine_changes(name: str) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    root = root_of(module, models.cut(inputs, 2, 3))
    x, used = drawn(root, 1)[0], [root.using]
    for _ in range(40):
        assert oracles.relative(root.normal(x), expected.T @ (expected @ x)) < 1e-10
        assert oracles.relative(root.adjoint(root(x)), expected.T @ (expected @ x)) < 1e-10
        used.append(root.using)
    assert used[:2] == ["autodiff", "autodiff"] and used[-1] != "autodiff"
    assert sum(a != b for a, b in zip(used, used[1:], strict=False)) == 1  # changed once, and for good


@pytest.mark.parametrize("engine", ["factored", "materialised"])
@pytest.mark.parametrize("name", SOME)
def test_named_engines_are_the_ones_in_use(name: str, engine: str) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    root = root_of(module, models.cut(inputs, 2, 3), engine)
    assert root.using == engine and root.prepare() is root.prepare(1)
    assert f"now using {engine}" in root.explain()
    x = drawn(root)
    double = root.double()
    assert double is not None
    assert oracles.relative(double.normal(x), x @ expected.T @ expected) < 1e-10
    squares = root.column_squares()
    assert squares is not None and oracles.relative(squares, expected.square().sum(0)) < 1e-10
    with pytest.raises(ValueError, match="max_bytes"):
        root_of(module, inputs, engine, max_bytes=50)


@pytest.mark.parametrize("engine", ["auto", "autodiff"])
@pytest.mark.parametrize(("name", "max_bytes"), paired(SOME, [1, 6000, 1000, 2500, 2**30]))
def test_the_gram_matrix_in_parts_is_the_whole(name: str, engine: str, max_bytes: int) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    root = root_of(module, models.cut(inputs, 2, 3), engine, max_bytes=max_bytes)
    with unchanged(module, inputs):
        found = root.gram()
    assert found.dtype == torch.float64
    assert oracles.relative(found, expected @ expected.T) < 1e-10
    assert root.gram() is found


@pytest.mark.parametrize("name", [*SOME, "embedding", "self-attention", "unused", "scalars", "recurrent"])
def test_parts_by_parameters_and_by_pairs_add_up(name: str) -> None:
    module, inputs = prepared(KINDS[name])
    expected = oracles.root(module, inputs)
    root = root_of(module, models.cut(inputs, 2, 1, 2))
    names = list(OutputMap(module).space.shapes)
    for groups in ([[name] for name in names], [names[::2], names[1::2]], [names]):
        groups = [group for group in groups if group]
        found = gram_by_parameters(root.function, root.theta, root.survey, 2**30, groups)
        assert oracles.relative(found, expected @ expected.T) < 1e-10
    for max_bytes in (1, 16 * root.shape[1] * 3, 2**30):
        found = gram_by_pairs(root.function, root.theta, root.survey, max_bytes)
        assert oracles.relative(found, expected @ expected.T) < 1e-10


def test_lengths_that_differ_in_parts_of_the_gram_matrix() -> None:
    module, inputs = prepared(KINDS["language model"])
    batches = [inputs[:2], inputs[2:, :3], inputs[:1, :2]]
    expected = torch.cat([oracles.root(module, batch) for batch in batches])
    for engine in ("auto", "autodiff", "factored"):
        for max_bytes in (2**30, 40000, 12000, 3000):
            if engine == "factored" and max_bytes < 2**30:
                continue
            found = root_of(module, batches, engine, max_bytes=max_bytes).gram()
            assert oracles.relative(found, expected @ expected.T) < 1e-10


class Fussy(nn.Module):
    """Refuses batches of fewer than five examples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) < 5:
            raise RuntimeError("a batch of at least 5, please")
        return self.b(torch.tanh(self.a(x)))


def test_estimates_for_a_model_that_refuses_small_batches() -> None:
    module, inputs = Fussy(), torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    root = root_of(module, models.cut(inputs, 5, 5))
    assert "factored" in root.explain()
    root.prepare(1000)
    x, expected = drawn(root), oracles.root(module, inputs)
    assert oracles.relative(root.normal(x), x @ expected.T @ expected) < 1e-10


class Interacting(nn.Module):
    """Examples that know the mean of their batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


@pytest.mark.parametrize("max_bytes", [1000, 4000, 10000, 2**30])
def test_a_model_that_cannot_be_cut_falls_back(max_bytes: int) -> None:
    module, inputs = Interacting(), torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    expected = oracles.root(module, inputs)
    root = root_of(module, inputs, max_bytes=max_bytes)
    root.prepare(10**6)
    x = drawn(root)
    assert oracles.relative(root.normal(x), x @ expected.T @ expected) < 1e-10
    assert oracles.relative(root.gram(), expected @ expected.T) < 1e-10


def test_the_cheapest_that_fits_is_taken() -> None:
    engines = {
        "autodiff": Cost(0.0, 10.0, 0.0),
        "factored": Cost(100.0, 2.0, 50.0),
        "materialised": Cost(300.0, 1.0, 500.0),
    }
    module, inputs = prepared(KINDS["tokens"])
    costs = replace(root_of(module, inputs).costs, forward=1.0, engines=engines)
    assert costs.cheapest(1, 1000) == "autodiff"
    assert costs.cheapest(100, 1000) == "factored"
    assert costs.cheapest(10**6, 1000) == "materialised"
    assert costs.cheapest(10**6, 100) == "factored"
    assert costs.cheapest(10**6, 1) == "autodiff"
    table = costs.table(100)
    assert "paid back after 12 products" in table and table.count("does not fit") == 1
    assert size(2**20) == "1.0 MiB" and size(2**30) == "1.00 GiB"


@pytest.mark.parametrize("engine", ["factored", "materialised"])
def test_a_single_vector_reads_all_rows_by_itself(engine: str) -> None:
    module, inputs = prepared(KINDS["conv2d strided"])
    cost = root_of(module, inputs).costs.engines[engine]
    alone, stacked = cost.total(8, together=1) - cost.setup, cost.total(8, together=8) - cost.setup
    assert alone - stacked == pytest.approx(7 * 2 * BYTE * cost.num_bytes)
    assert cost.total(1) == cost.setup + cost.product
