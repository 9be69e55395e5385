"""Every way to a solve, spectrum, trace or block against dense float64 algebra, through the front door."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fipgeo import Categorical, Metric, Sketched, metric, principal_angles, sketch_error, sketch_trace
from fipgeo.jacobian.routes import patience
from fipgeo.linalg import Dense, Outcome, cg

from . import oracles
from .models import build

ENGINES = ("autodiff", "linearised", "factored", "materialised")
METHODS = ("dual", "dense", "cg", "nystrom", "auto")
COUNT = 5


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(module: nn.Module, inputs: Any, embed: oracles.Embed = lambda f: f) -> Tensor:
    """g `[D, D]` of the oracle, a mean over the five examples of the table."""
    rows = oracles.root(module, inputs, embed)
    return rows.T @ rows / COUNT


def damped(g: Tensor, rhs: Tensor, damping: float) -> Tensor:
    return torch.linalg.solve(g + damping * torch.eye(len(g)), rhs.reshape(-1, len(g)).T).T.reshape(rhs.shape)


@pytest.mark.parametrize(("name", "engine"), [("convnet", "factored"), ("text", "autodiff")])
@pytest.mark.parametrize("method", METHODS)
def test_solves_by_every_route(name: str, method: str, engine: str) -> None:
    module, inputs = build(name)
    expected = dense(module, inputs)
    g = metric(module, inputs, geometry="euclidean", engine=engine)
    for rhs, damping in [(draw(g.dim), 0.05), (draw(4, g.dim), 0.5), (draw(2, 3, g.dim), 0.05)]:
        found = g.solve(rhs, damping, method=method, rtol=1e-9)
        assert found.ok and found.value.shape == rhs.shape
        assert oracles.relative(found.value, damped(expected, rhs, damping)) < 1e-6


@pytest.mark.parametrize("method", ["dual", "cg", "nystrom", "auto"])
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_several_dampings_come_first_in_the_solution(method: str, shape: tuple[int, ...]) -> None:
    module, inputs = build("convnet")
    expected = dense(module, inputs)
    g = metric(module, inputs, geometry="euclidean")
    rhs, dampings = draw(*shape, g.dim), [2.0, 0.5, 0.05]
    for given in (dampings, torch.tensor(dampings), dampings[:1]):
        found = g.solve(rhs, given, method=method, rtol=1e-9)
        assert found.ok and found.value.shape == (len(given), *shape, g.dim)
        for value, damping in zip(found.value, dampings, strict=False):
            assert oracles.relative(value, damped(expected, rhs, damping)) < 1e-6


def test_a_dense_factorisation_takes_one_damping() -> None:
    g = Metric(Dense(draw(3, 4)), 1)
    with pytest.raises(ValueError, match="one damped matrix at a time; use 'dual' or 'cg'"):
        g.solve(draw(4), [1.0, 2.0], method="dense")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["convnet", "text"])
def test_sums_over_the_spectrum(name: str, engine: str) -> None:
    module, inputs = build(name)
    expected = dense(module, inputs)
    g = metric(module, inputs, geometry="euclidean", engine=engine)
    held = engine in ("factored", "materialised")
    for damping in (1e-3, 1.0):
        exact = float(torch.logdet(expected + damping * torch.eye(g.dim)))
        assert abs(g.log_det(damping).value - exact) < 1e-6 * abs(exact) + 6 * g.log_det(damping).std_error
    trace, diagonal = g.trace(num_products=16), g.diagonal(num_products=16)
    assert abs(trace.value - float(expected.trace())) <= 1e-10 * trace.value + 6 * trace.std_error
    assert (trace.std_error == 0) == held or trace.value == pytest.approx(float(expected.trace()), rel=1e-6)
    if held:
        assert oracles.relative(diagonal.value, expected.diagonal()) < 1e-10 and not diagonal.std_error.any()
    else:
        assert oracles.relative(diagonal.value, expected.diagonal()) < 0.7
        assert float(diagonal.std_error.norm()) > 0
    density = g.density(num_probes=6, num_steps=30, deflate=g.spectrum(3))
    values, damping = torch.linalg.eigvalsh(expected), 0.1
    for found, exact in [
        (density.trace(), float(values.sum())),
        (density.log_det(damping), float((values + damping).log().sum())),
        (density.effective_dimension(damping), float((values / (values + damping)).sum())),
    ]:
        assert abs(found.value - exact) <= 1e-6 * abs(exact) + 6 * found.std_error


def parts_of(module: nn.Module) -> dict[str, Tensor]:
    """Where every parameter lies in the flat vector."""
    named = {name: p.numel() for name, p in module.named_parameters() if p.requires_grad}
    return dict(zip(named, torch.arange(sum(named.values())).split(list(named.values())), strict=True))


NETS = ("convnet", "tied", "text")


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("name", NETS)
def test_restrictions_are_the_diagonal_blocks(name: str, engine: str) -> None:
    module, inputs = build(name)
    expected, places = dense(module, inputs), parts_of(module)
    g = metric(module, inputs, geometry="euclidean", engine=engine)
    bias = [key for key in places if key.endswith("bias")]
    for where, names in [("*", list(places)), ("*bias", bias), *((key, [key]) for key in places)]:
        own = torch.cat([places[key] for key in names])
        part, wanted = g.restrict(where), expected[own][:, own]
        assert part.dim == len(own) and part.num_examples == COUNT
        assert oracles.relative(part.matvec(torch.eye(len(own))), wanted) < 1e-10
    own = places[bias[-1]]
    part, rhs = g.restrict(bias[-1]), draw(2, len(own))
    exact = damped(expected[own][:, own], rhs, 0.1)
    assert oracles.relative(part.solve(rhs, 0.1, rtol=1e-9).value, exact) < 1e-6


@pytest.mark.parametrize("engine", [*ENGINES, "auto"])
@pytest.mark.parametrize("name", NETS)
def test_blocks_are_the_diagonal_blocks(name: str, engine: str) -> None:
    module, inputs = build(name)
    expected, places = dense(module, inputs), parts_of(module)
    g = metric(module, inputs, geometry="euclidean", engine=engine)
    by_parameter, by_module = g.blocks("parameter"), g.blocks()
    assert list(by_parameter) == list(places)
    assert list(by_module) == list(dict.fromkeys(key.rpartition(".")[0] for key in places))
    for block_name, block in (by_parameter | by_module).items():
        own = torch.cat([places[key] for key in places if block_name in (key, key.rpartition(".")[0])])
        assert oracles.relative(block.matvec(torch.eye(len(own))), expected[own][:, own]) < 1e-10
        values = torch.linalg.eigvalsh(expected[own][:, own]).flip(0)
        assert abs(float(block.spectrum(1).values - values[0])) < 1e-6 * float(values[0]) + 1e-12


def test_blocks_and_restrictions_refuse() -> None:
    module, inputs = build("mlp")
    g = metric(module, inputs)
    with pytest.raises(ValueError, match="by: got 'layer', expected 'module' or 'parameter'"):
        g.blocks("layer")
    with pytest.raises(ValueError, match="nowhere"):
        g.restrict("nowhere.*")
    with pytest.raises(ValueError, match="restrict: this metric was made from a root"):
        Metric(Dense(draw(3, 4)), 1).restrict("*")


@pytest.mark.parametrize("engine", ["factored", "materialised", "auto"])
@pytest.mark.parametrize("method", ["dual", "cg", "nystrom", "auto"])
def test_float64_right_hand_sides_of_a_float32_metric(method: str, engine: str) -> None:
    module, inputs = build("convnet")
    module, inputs = module.float(), inputs.float()
    g = metric(module, inputs, geometry="euclidean", engine=engine)
    g.root.prepare(1000)  # type: ignore[attr-defined]
    rows = metric(module, inputs, geometry="euclidean", engine="materialised").root.rows.matrix.double()  # type: ignore[attr-defined]
    expected = rows.T @ rows / COUNT
    damping = 1e-5 * float(torch.linalg.matrix_norm(expected, 2))
    rhs = draw(3, g.dim)
    found = g.solve(rhs, damping, method=method)
    assert found.value.dtype == torch.float64 and found.ok
    exact = damped(expected, rhs, damping)
    if engine == "materialised":  # over those very rows
        assert oracles.relative(found.value, exact) < 1e-6
    residual = (found.value @ expected + damping * found.value - rhs).norm(dim=-1) / rhs.norm(dim=-1)
    assert float(residual.max()) < 2e-6 if engine == "materialised" else oracles.relative(found.value, exact) < 1e-2
    single = g.solve(rhs.float(), 0.1, method=method).value
    assert single.dtype == torch.float32 and oracles.relative(single, damped(expected, rhs, 0.1)) < 1e-4


def test_explain_names_engines_and_routes() -> None:
    module, inputs = build("convnet")
    g = metric(module, inputs, geometry="euclidean", max_bytes=2**20)
    text = g.explain()
    lines = text.splitlines()
    for engine in ENGINES:
        assert sum(line.split()[:1] == [engine] for line in lines) == 1
    assert "now using autodiff; max_bytes = 1.0 MiB" in text and "rank at most 15" in text
    routes = [word for word in text.split("\n")[-1].split("'") if word.isalpha()]
    assert routes[0] in METHODS and routes[1] in ("dual", "dense", "lanczos")
    assert "engine 'factored', now using factored" in metric(module, inputs, engine="factored").explain()
    g.dual_factor()
    assert "a damped solve goes by 'dual', up to 20 eigenpairs by 'dual'" in g.explain()
    assert "does not fit" in metric(module, inputs, max_bytes=1).explain()
    made = Metric(Dense(draw(3, 4)), 1)
    assert made.explain() == repr(made)


def test_explain_says_when_an_engine_never_pays() -> None:
    with torch.random.fork_rng():
        module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    g = metric(module, draw(200, 8))
    costs = g.root.costs.engines  # type: ignore[attr-defined]
    assert costs["materialised"].product > costs["autodiff"].product
    assert "never paid back" in g.explain() and max(map(len, g.explain().splitlines())) < 200


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_named_must_fit(engine: str) -> None:
    module, inputs = build("convnet")
    if engine == "autodiff":
        assert metric(module, inputs, engine=engine, max_bytes=1).norm(torch.ones(1, 51)) > 0
    else:
        with pytest.raises(ValueError, match="max_bytes"):
            metric(module, inputs, engine=engine, max_bytes=1)


class Tagger(nn.Module):
    """Logits of every position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(6, 3), nn.Linear(3, 4)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.head(torch.tanh(self.embedding(ids).cumsum(1)))


LENGTHS = (4, 1, 3, 2, 4)


def tagger() -> tuple[Tagger, dict[str, Tensor]]:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = Tagger()
    ids = torch.randint(1, 6, (len(LENGTHS), 4), generator=torch.Generator().manual_seed(2))
    keep = (torch.arange(4) < torch.tensor(LENGTHS)[:, None]).long()
    return module, {"ids": ids * keep, "attention_mask": keep}


def unpadded(module: nn.Module, batch: dict[str, Tensor], embed: oracles.Embed) -> Tensor:
    """Sum of R^T R over the texts, each without its padding."""
    roots = [oracles.root(module, ids[None, :n], embed) for ids, n in zip(batch["ids"], LENGTHS, strict=True)]
    return torch.cat(roots).T @ torch.cat(roots)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("per", "count"), [("example", len(LENGTHS)), ("position", sum(LENGTHS))])
def test_masks(per: str, count: int, engine: str) -> None:
    module, batch = tagger()
    expected = unpadded(module, batch, lambda f: f - f.mean(-1, keepdim=True)) / count
    for mask in ("attention_mask", lambda batch: batch["attention_mask"].bool()):
        g = metric(module, [batch], mask=mask, per=per, engine=engine)
        assert g.num_examples == count
        assert oracles.relative(g.operator.to_dense(), expected) < 1e-10
    assert oracles.relative(g.solve(draw(g.dim), 0.1, rtol=1e-9).value, damped(expected, draw(g.dim), 0.1)) < 1e-6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_float32_model_in_float64(engine: str) -> None:
    module, x = build("convnet")
    module, x = module.float(), x.float()
    expected = dense(module, x)
    g = metric(module, x, geometry="euclidean", dtype=torch.float64, engine=engine)
    assert g.operator.dtype == torch.float64 and next(module.parameters()).dtype == torch.float32
    assert oracles.relative(g.operator.to_dense(), expected) < 1e-12
    damping = 1e-6 * float(torch.linalg.matrix_norm(expected, 2))
    found = g.solve(draw(2, g.dim), damping)
    assert oracles.relative(found.value, damped(expected, draw(2, g.dim), damping)) < 1e-4


@pytest.mark.parametrize("engine", ENGINES)
def test_sketches_are_unbiased_and_know_their_error(engine: str) -> None:
    module, batch = tagger()
    expected = unpadded(module, batch, lambda f: 2 * torch.softmax(f, -1).sqrt()) / len(LENGTHS)
    v = draw(expected.shape[0])
    exact, seeds, samples = float(v @ expected @ v), 8, 32
    quotients, errors, traces = [], [], []
    for seed in range(seeds):
        sketch = Sketched("categorical", num_samples=samples, seed=seed)
        g = metric(module, [batch], geometry=sketch, mask="attention_mask", engine=engine)
        assert g.root.shape == (len(LENGTHS) * samples, expected.shape[0])
        quotients.append(float(g.norm(v)) ** 2)
        errors.append(float(sketch_error(g, v)))
        traces.append(sketch_trace(g).value)
    mean, error = torch.tensor(quotients).mean(), torch.tensor(errors).square().mean().sqrt()
    assert abs(float(mean) - exact) < 4 * float(error) / seeds**0.5
    assert 0.5 < float(torch.tensor(quotients).std() / error) < 1.7
    spread = float(torch.tensor(traces).std()) / seeds**0.5
    assert abs(sum(traces) / seeds - float(expected.trace())) < 4 * spread


def test_angles_between_what_two_data_sets_protect() -> None:
    module, x = build("mlp")
    g, other = metric(module, x, geometry=Categorical()), metric(module, draw(5, 3, seed=1), geometry=Categorical())
    angles = principal_angles(g.spectrum(4), other.spectrum(4))
    oracle = [dense(module, z, lambda f: 2 * torch.softmax(f, -1).sqrt()) for z in (x, draw(5, 3, seed=1))]
    a, b = (torch.linalg.eigh(matrix).eigenvectors[:, -4:] for matrix in oracle)
    assert torch.allclose(angles.cos(), torch.linalg.svdvals(a.T @ b), atol=1e-8)
    assert float(principal_angles(g.spectrum(4), g.spectrum(4)).max()) < 1e-6


def test_solves_one_by_one_come_to_the_factor_that_all_at_once_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def few(root: object, count: int, dampings: int) -> str:
        asked.append(count)
        return "cg" if count < 3 else "dual"

    monkeypatch.setattr("fipgeo.jacobian.routes.cheapest_solver", few)
    module, inputs = build("mlp")
    g = metric(module, inputs)
    rhs = torch.randn(g.dim, generator=torch.Generator().manual_seed(0))
    found = [g.solve(rhs, 0.1).value for _ in range(4)]
    assert asked == [1, 2, 3]  # then the factor is there
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count", [1, 3])
def test_iterations_that_do_not_end_turn_to_the_factor(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr("fipgeo.jacobian.routes.cheapest_solver", lambda *_: "cg")
    monkeypatch.setattr("fipgeo.jacobian.routes.ITERATIONS", 2)
    module, inputs = build("mlp")
    g = metric(module, inputs)
    rhs = torch.randn(count, g.dim, generator=torch.Generator().manual_seed(0))
    limit = patience(g.root, count, 1)
    assert limit is not None and limit < 10
    stopped = cg(g.operator, rhs, damping=1e-6, max_iters=limit)
    assert stopped.outcome is Outcome.MAX_ITERATIONS
    found = g.solve(rhs, 1e-6)
    assert found.ok and found.num_products > stopped.num_products
    matrix = g.operator.to_dense() + 1e-6 * torch.eye(g.dim)
    torch.testing.assert_close(found.value, torch.linalg.solve(matrix, rhs.T).T, rtol=1e-6, atol=1e-6)
    assert g.solve(rhs[0], 1e-6).num_products < stopped.num_products  # the factor is there
