"""How often the data are passed over, and that neither batching, padding nor repetition moves a number."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipgeo import Metric, Sketched, metric

from . import oracles
from .models import build, cut

ENGINES = ("autodiff", "linearised", "factored", "materialised")
HELD = ENGINES[1:]
NETS = ("convnet", "text", "in_place")
FEW = ("mlp", "text")
LOOK = 1 / 3  # at the first of three batches


class Counting:
    """A loader that counts the batches it gave and how often it was asked to begin."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches, self.given, self.begun = batches, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.begun += 1
        for batch in self.batches:
            self.given += 1
            yield batch

    def passes(self) -> float:
        """Passes since the last call, a look at the first batch being a part of one."""
        given, self.given, self.begun = self.given, 0, 0
        return given / len(self.batches)


def counted(name: str, engine: str, **kwargs: Any) -> tuple[Metric, Counting, float]:
    """The metric of a network of the table on a counting loader of three ragged batches, and the passes it took."""
    module, inputs = build(name)
    loader = Counting(cut(inputs, 2, 2, 1))
    g = metric(module, loader, geometry="euclidean", engine=engine, **kwargs)
    return g, loader, loader.passes()


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETS)
def test_a_product_passes_the_data_once_for_a_whole_stack(name: str, engine: str) -> None:
    g, loader, setup = counted(name, engine)
    assert setup <= 4
    once = float(engine == "autodiff")
    g.matvec(draw(16, g.dim))  # the first stack may look at one batch to find out whether stacks can be vectorised
    assert loader.passes() <= once * (1 + 1 / 3)
    for count in (1, 16):
        v, y = draw(count, g.dim), draw(count, g.root.shape[0])
        for product, x in ((g.matvec, v), (g.norm, v), (g.root, v), (g.root.adjoint, y)):
            product(x)
            assert loader.begun == once and loader.passes() == once


@pytest.mark.parametrize("engine", HELD)
@pytest.mark.parametrize("name", FEW)
def test_what_is_held_needs_no_data(name: str, engine: str) -> None:
    g, loader, setup = counted(name, engine)
    assert setup <= 4
    v = draw(3, g.dim)
    for _ in range(3):
        g.matvec(v)
    _ = g.trace(), g.diagonal(), g.density(num_probes=2, num_steps=5)
    for method in ("lanczos", "dense"):
        g.spectrum(4, method=method)
    for method in ("cg", "nystrom", "dense"):
        g.solve(v, 0.1, method=method)
    assert loader.passes() == 0
    _ = g.spectrum(4, method="dual"), g.solve(v, 0.1, method="dual")  # K by factors, which graphs are not
    assert loader.passes() <= (2 + LOOK if engine == "linearised" else 0)
    _ = g.spectrum(), g.rank(), g.log_det(0.1), g.solve(v, 0.2), g.solve(v, [1.0, 2.0]), g.spectrum(3)
    assert loader.passes() == 0


@pytest.mark.parametrize("name", FEW)
def test_passes_of_spectra_and_solves_do_not_depend_on_the_number_of_vectors(name: str) -> None:
    g, loader, _ = counted(name, "autodiff")
    found = g.spectrum(4, method="lanczos")
    assert found.num_products <= 3 * 4 + 25
    assert loader.passes() <= 2 * found.num_products + 1  # R R^T u, on the short side of R, takes two
    g.solve(draw(1, g.dim), 0.5, method="cg")
    one = loader.passes()
    many = g.solve(draw(16, g.dim), [0.5, 1.0, 2.0], method="cg")
    assert many.ok and loader.passes() <= 2 * one + 8 < 16 * one  # the slowest of the vectors decides
    g.spectrum(method="dual")
    assert loader.passes() <= 5 + LOOK
    g.solve(draw(16, g.dim), [0.5, 1.0], method="dual")
    assert loader.passes() <= 6


@pytest.mark.parametrize("name", FEW)
def test_auto_stops_passing_once_it_holds_something(name: str) -> None:
    g, loader, _ = counted(name, "auto")
    for _ in range(40):
        g.matvec(draw(16, g.dim))
    assert loader.passes() <= 8
    _ = g.matvec(draw(16, g.dim)), g.spectrum(4), g.solve(draw(4, g.dim), 0.1), g.trace(), g.density()
    assert loader.passes() <= 4


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sketch_passes_no_more_often(engine: str) -> None:
    module, x = build("mlp")
    loader = Counting(cut(x, 2, 2, 1))
    g = metric(module, loader, geometry=Sketched("categorical", 2), engine=engine)
    assert loader.passes() <= 5  # one more, which draws
    g.matvec(draw(16, g.dim))
    loader.passes()
    g.matvec(draw(16, g.dim))
    assert loader.passes() == (engine == "autodiff")


class Tagger(nn.Module):
    """Tokens to logits of every position, each from the tokens up to it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, 4)

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(ids).cumsum(1))))


def texts(sizes: tuple[int, ...]) -> list[dict[str, Tensor]]:
    """Five texts of lengths 4, 1, 3, 2, 4 in batches of these sizes, each padded to a width of its own."""
    generator, lengths, start, out = torch.Generator().manual_seed(3), [4, 1, 3, 2, 4], 0, []
    tokens = torch.randint(1, 6, (5, 4), generator=generator)
    for place, size in enumerate(sizes):
        part = lengths[start : start + size]
        keep = torch.arange(max(part) + place) < torch.tensor(part)[:, None]
        ids = nn.functional.pad(tokens[start : start + size], (0, 9))[:, : keep.shape[1]] * keep
        out.append({"ids": ids, "keep": keep.long()})
        start += size
    return out


def numbers(g: Metric) -> dict[str, Tensor]:
    """What must not depend on how the data are cut."""
    v = draw(2, g.dim)
    return {
        "product": g.matvec(v),
        "trace": torch.tensor(g.trace(num_products=4).value),
        "values": g.spectrum(5, method="dual").values,
        "dual": g.solve(v, 0.1, method="dual", rtol=1e-14).value,
        "dense": g.solve(v, 0.1, method="dense", rtol=1e-14).value,
    }


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    gaps = {key: oracles.relative(found[key], value) for key, value in expected.items()}
    assert max(gaps.values()) < 1e-12, gaps


SIZES = [(1, 1, 2, 1)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["convnet", "text"])
def test_batches_do_not_matter(name: str, engine: str) -> None:
    module, inputs = build(name)
    whole = numbers(metric(module, inputs, engine=engine))
    for sizes in SIZES:
        assert_same(numbers(metric(module, cut(inputs, *sizes), engine=engine)), whole)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("per", ["example", "position"])
def test_padding_does_not_matter(per: str, engine: str) -> None:
    with torch.random.fork_rng():
        module = Tagger()
    whole = numbers(metric(module, texts((5,)), mask="keep", per=per, engine=engine))
    for sizes in [(4, 1), *SIZES]:
        assert_same(numbers(metric(module, texts(sizes), mask="keep", per=per, engine=engine)), whole)


class Residual(nn.Module):
    """Convolutions whose shortcut is added in place, as most public residual networks write it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.norm, self.relu, self.head = nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.b(self.relu(self.a(x))))
        out += x
        out = self.relu(out)
        out = self.a(out).add_(out)
        return self.head(self.relu(out).mean((2, 3)))


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("count", [1, 16])
def test_products_in_a_row_are_equal(engine: str, count: int) -> None:
    with torch.random.fork_rng():
        module = Residual()
    for net, x in [(module, draw(5, 2, 4, 4)), build("in_place")]:
        rows = oracles.root(net, x)
        g = metric(net, x, geometry="euclidean", engine=engine, batch_size=2)
        v = draw(count, g.dim)
        expected = v @ rows.T @ rows / 5
        products = [g.matvec(v) for _ in range(3)]
        assert all(oracles.relative(product, expected) < 1e-10 for product in products)
        if engine != "auto":  # which may have changed the engine between them
            assert torch.equal(products[0], products[1]) and torch.equal(products[1], products[2])
        pushed = [g.root(v) for _ in range(3)]
        assert all(oracles.relative(one, v @ rows.T) < 1e-10 for one in pushed)
