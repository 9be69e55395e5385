"""The metric against dense references: products, solves, spectra, pullbacks, in every geometry and on every engine."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fipgeo
from fipgeo import Bernoulli, Categorical, Cosine, Gaussian, Logits, Metric, MetricField, basis, metric
from fipgeo.linalg import Dense, adjoint_gap, dense_gap, psd_gap, symmetry_gap

from . import oracles
from .hygiene import unchanged
from .models import CASES, build, cut

SEEDS = st.integers(0, 2**20)
few = settings(max_examples=2)  # a metric takes some hundredths of a second, and its numbers hardly depend on the seed
ENGINES = ("autodiff", "linearised", "factored", "materialised")


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(module: nn.Module, inputs: Any, embed: oracles.Embed = lambda f: f) -> Tensor:
    """g `[D, D]` of the oracle, the mean over five examples."""
    rows = oracles.root(module, inputs, embed)
    return rows.T @ rows / 5


@pytest.mark.parametrize("name", CASES)
def test_the_operator_is_the_dense_metric(name: str) -> None:
    module, inputs = build(name)
    expected = dense(module, inputs, lambda f: f - f.mean(-1, keepdim=True))
    g = metric(module, cut(inputs, 3, 2))
    assert g.num_examples == 5 and g.dim == len(expected)
    assert dense_gap(g.operator, expected) < 1e-10
    assert symmetry_gap(g.operator) < 1e-12 and psd_gap(g.operator) < 1e-12 and adjoint_gap(g.root) < 1e-12


def softmaxed(f: Tensor) -> Tensor:
    return 2 * torch.softmax(f, -1).sqrt()


EMBEDDINGS: dict[str, tuple[Any, oracles.Embed]] = {
    "euclidean": ("euclidean", lambda f: f),
    "logits": (Logits(), lambda f: f - f.mean(-1, keepdim=True)),
    "gaussian": (Gaussian(0.5), lambda f: 2 * f),
    "categorical": ("categorical", softmaxed),
    "tempered": (Categorical(3.0), lambda f: softmaxed(f / 3)),
    "bernoulli": (Bernoulli(), lambda f: 2 * torch.asin(torch.sigmoid(f).sqrt())),
    "cosine": (Cosine(), lambda f: nn.functional.normalize(f, dim=-1)),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("geometry", EMBEDDINGS)
@few
@given(seed=SEEDS)
def test_geometries(geometry: str, engine: str, seed: int) -> None:
    module, x = build("mlp", seed)
    kind, embed = EMBEDDINGS[geometry]
    expected = dense(module, x, embed)
    v = draw(seed, 2, g_dim := len(expected))
    g = metric(module, x, geometry=kind, engine=engine, batch_size=3)
    assert g.dim == g_dim
    assert oracles.relative(g.matvec(v), v @ expected) < 1e-10
    assert float(g.inner(v[0], v[1])) == pytest.approx(float(v[0] @ expected @ v[1]), rel=1e-10, abs=1e-12)
    assert torch.allclose(g.norm(v), torch.einsum("ki,ij,kj->k", v, expected, v).sqrt(), rtol=1e-10)


@pytest.mark.parametrize("name", ["mlp", "scaled_dot_product", "convnet", "text"])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_categorical_is_the_fisher(name: str, temperature: float) -> None:
    module, inputs = build(name)
    g = metric(module, cut(inputs, 2, 3), geometry=Categorical(temperature))
    assert oracles.relative(g.operator.to_dense(), oracles.fisher(module, inputs, temperature)) < 1e-10


def test_bernoulli_is_the_fisher_of_independent_outputs() -> None:
    module, x = build("mlp")
    rows, p = oracles.root(module, x), torch.sigmoid(module(x).detach()).flatten()
    expected = rows.T @ torch.diag(p * (1 - p)) @ rows / 5
    assert oracles.relative(metric(module, x, geometry="bernoulli").operator.to_dense(), expected) < 1e-10


@pytest.mark.parametrize("geometry", ["logits", "categorical"])
@few
@given(seed=SEEDS, shift=st.floats(-30, 30))
def test_a_constant_on_the_logits_changes_nothing(geometry: str, seed: int, shift: float) -> None:
    module, x = build("mlp", seed)
    v = draw(seed, 3, 31)
    plain = metric(module, x, geometry=geometry)
    shifted = metric(module, x, geometry=geometry, output_fn=lambda f: f + shift)
    with_weights = metric(module, x, geometry=geometry, output_fn=lambda f: f + f.sum(-1, keepdim=True))
    assert oracles.relative(shifted.matvec(v), plain.matvec(v)) < 1e-12
    assert oracles.relative(with_weights.matvec(v), plain.matvec(v)) < 1e-12


SIZES = {"wide": "mlp", "tall": "tied"}


def example(kind: str, seed: int, engine: str = "auto") -> tuple[Metric, Tensor]:
    """A metric with fewer or more rows than dimensions, and its matrix."""
    module, x = build(SIZES[kind], seed)
    where = None if kind == "wide" else "*.bias"
    rows = oracles.root(module, x, where=None if kind == "wide" else lambda name: name.endswith("bias"))
    return metric(module, x, geometry="euclidean", params=where, engine=engine), rows.T @ rows / 5


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("method", ["auto", "dual", "dense", "cg"])
@few
@given(seed=SEEDS, damping=st.sampled_from([1e-3, 1.0, 50.0]))
def test_solves(kind: str, method: str, seed: int, damping: float) -> None:
    g, expected = example(kind, seed)
    rhs = draw(seed, 2, len(expected))
    found = g.solve(rhs, damping, method=method, rtol=1e-13)
    exact = torch.linalg.solve(expected + damping * torch.eye(len(expected)), rhs.T).T
    condition = 1 + float(torch.linalg.matrix_norm(expected, 2)) / damping
    assert oracles.relative(found.value, exact) < max(1e-10, 2e-13 * condition)
    residual = (found.value @ expected + damping * found.value - rhs).norm(dim=-1) / rhs.norm(dim=-1)
    assert torch.allclose(found.residual, residual, rtol=0, atol=1e-12)
    assert oracles.relative(g.riemannian_gradient(rhs[0], damping).value, exact[0]) < 1e-5


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("method", ["auto", "dual", "dense", "lanczos"])
@few
@given(seed=SEEDS)
def test_spectra(kind: str, engine: str, method: str, seed: int) -> None:
    g, expected = example(kind, seed, engine)
    values = torch.from_numpy(np.linalg.eigvalsh(expected.numpy())[::-1].copy())
    k = 4
    found = g.spectrum(k, method=method, rtol=1e-12)
    assert found.ok and found.dim == g.dim and found.rank_bound == g.rank_bound and found.vectors is not None
    assert torch.allclose(found.values, values[:k], rtol=1e-10, atol=1e-10 * float(values[0]))
    assert torch.allclose(found.vectors @ found.vectors.T, torch.eye(k), rtol=0, atol=1e-10)
    gaps = (found.vectors @ expected - found.values[:, None] * found.vectors).norm(dim=-1)
    assert bool((gaps < 1e-9 * values[0]).all())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["mlp", "convnet", "tied", "weight_norm", "text"])
def test_trace_rank_and_whole_spectrum(name: str, engine: str) -> None:
    module, inputs = build(name)
    expected = dense(module, inputs, lambda f: f - f.mean(-1, keepdim=True))
    g = metric(module, inputs, engine=engine)
    exact = np.linalg.matrix_rank(expected.numpy(), hermitian=True)
    assert g.rank() == exact <= g.rank_bound
    spectrum = g.spectrum()
    assert spectrum.complete and float(spectrum.values.sum()) == pytest.approx(float(expected.trace()), rel=1e-10)
    trace = g.trace(num_products=8, method="hutchinson")
    if engine in ("factored", "materialised"):
        assert trace.value == pytest.approx(float(expected.trace()), rel=1e-10) and trace.std_error == 0
    else:
        assert abs(trace.value - float(expected.trace())) < 8 * trace.std_error
        assert trace == g.trace(num_products=8, method="hutchinson", generator=0)
        assert trace != g.trace(num_products=8, method="hutchinson", generator=1)


def test_the_sizes_of_single_eigenvalues_decide_the_rank() -> None:
    g = Metric(Dense(torch.diag(torch.tensor([2.0, 1.0, 1e-4, 1e-11]))), num_examples=1)
    assert g.rank() == 3 and g.rank(1e-23) == 4 and g.rank(0.5) == 2


BASES = {
    "inclusion": lambda space: basis.inclusion(space, "0.*"),
    "columns": lambda space: basis.columns(draw(1, 3, space.dim)),
    "blockwise": lambda space: basis.blockwise(space, draw(2, 2, space.dim)),
    "random": lambda space: basis.random(space, 4),
    "all": lambda space: basis.inclusion(space, "*"),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*BASES, "spectral"])
@pytest.mark.parametrize("lazy", [False, True])
def test_pullbacks(name: str, engine: str, lazy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if lazy:
        monkeypatch.setattr(fipgeo.metrics, "MAX_BYTES", 0)
    module, x = build("mlp", 4)
    expected = dense(module, x)
    field = MetricField(module, x, "euclidean")
    g = field.at(engine=engine)
    b = basis.spectral(g.spectrum(3)) if name == "spectral" else BASES[name](field.space)
    pulled, matrix = g.pullback(b), b.to_dense()
    wanted = matrix.T @ expected @ matrix
    assert pulled.dim == b.shape[1] and isinstance(pulled.root, Dense) != lazy
    assert dense_gap(pulled.operator, wanted) < 1e-10
    c = draw(0, pulled.dim)
    assert float(pulled.norm(c)) == pytest.approx(float(g.norm(b(c))), rel=1e-10)
    solved = pulled.solve(c, 0.1).value
    assert oracles.relative(solved, torch.linalg.solve(wanted + 0.1 * torch.eye(pulled.dim), c)) < 1e-10
    twice = pulled.pullback(basis.columns(draw(5, 2, pulled.dim)))
    outer = matrix @ draw(5, 2, pulled.dim).T
    assert oracles.relative(twice.operator.to_dense(), outer.T @ expected @ outer) < 1e-10
    other = draw(6, 7, 3)
    rows = oracles.root(module, other)
    on = pulled.on(other, batch_size=4)
    assert oracles.relative(on.operator.to_dense(), matrix.T @ rows.T @ rows @ matrix / 7) < 1e-10


@few
@given(seed=SEEDS)
def test_held_out_spectra(seed: int) -> None:
    module, x = build("mlp", seed)
    fresh = draw(seed + 1, 7, 3)
    g = metric(module, x, geometry="euclidean")
    rows = oracles.root(module, fresh)
    for held_out in (fresh, g.on(fresh), list(fresh.split(4))):
        found = g.spectrum(4, held_out=held_out)
        assert found.vectors is not None and found.held_out is not None
        quotients = (found.vectors @ rows.T).square().sum(-1) / 7
        assert torch.allclose(found.held_out, quotients, rtol=1e-10)
        assert found.captured == pytest.approx(float(quotients.sum() / (rows.square().sum() / 7)), rel=1e-10)
    everything = g.pullback(basis.random(MetricField(module, x).space, 6)).spectrum(6, held_out=fresh)
    assert everything.captured == pytest.approx(1, rel=1e-10)
    same = g.spectrum(4, held_out=x)
    assert same.held_out is not None and torch.allclose(same.held_out, same.values, rtol=1e-10)


@pytest.mark.parametrize("sizes", [(5,), (1, 4), (2, 2, 1), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("name", ["convnet", "text", "tuple_output"])
def test_every_example_counts_the_same_in_any_batch(name: str, sizes: tuple[int, ...]) -> None:
    module, inputs = build(name)
    whole, parts = metric(module, inputs), metric(module, cut(inputs, *sizes))
    v = draw(0, 2, whole.dim)
    assert oracles.relative(parts.matvec(v), whole.matvec(v)) < 1e-13
    assert float(parts.trace(num_products=3)) == pytest.approx(float(whole.trace(num_products=3)), rel=1e-12)
    assert oracles.relative(parts.solve(v, 0.1).value, whole.solve(v, 0.1).value) < 1e-11


@pytest.mark.parametrize(
    ("where", "chosen"), [("0.*", "0."), (["2.weight", "2.bias"], "2."), (lambda n, p: n[0] == "0", "0.")]
)
def test_subsets_of_parameters_are_blocks_of_the_whole(where: Any, chosen: str) -> None:
    module, x = build("mlp")
    expected = oracles.root(module, x, where=lambda name: name.startswith(chosen))
    g = metric(module, x, geometry="euclidean", params=where)
    assert oracles.relative(g.operator.to_dense(), expected.T @ expected / 5) < 1e-10


@pytest.mark.parametrize("engine", ENGINES)
def test_float32_keeps_five_digits(engine: str) -> None:
    module, x = build("convnet")
    module, x = module.float(), x.float()
    expected = dense(module, x)
    g = metric(module, x, geometry="euclidean", engine=engine)
    v = draw(0, 2, g.dim).float()
    assert g.matvec(v).dtype == g.inner(v[0], v[1]).dtype == g.spectrum(3).values.dtype == torch.float32
    assert oracles.relative(g.matvec(v), v.double() @ expected) < 1e-5
    exact = torch.linalg.solve(expected + 0.01 * torch.eye(g.dim), v.double().T).T
    for method in ("dual", "dense", "cg"):
        assert oracles.relative(g.solve(v, 0.01, method=method).value, exact) < 1e-4
    values = torch.linalg.eigvalsh(expected).flip(0)
    for method in ("dual", "dense", "lanczos"):
        assert oracles.relative(g.spectrum(3, method=method).values, values[:3]) < 1e-5
    assert g.rank() == np.linalg.matrix_rank(expected.numpy(), hermitian=True)


@pytest.mark.parametrize("geometry", ["logits", "categorical"])
def test_bfloat16_models_have_a_float32_metric(geometry: str) -> None:
    module, x = build("mlp")
    module, x = module.bfloat16(), x.bfloat16()
    embed = EMBEDDINGS[geometry][1]
    expected = dense(module, x, embed)
    g = metric(module, x, geometry=geometry)
    assert g.operator.dtype == torch.float32
    assert oracles.relative(g.operator.to_dense(), expected) < 3e-2
    assert g.spectrum(3).ok and g.solve(draw(0, 31).float(), 0.1).ok


def test_the_metric_stays_where_it_was_made() -> None:
    module, x = build("mlp")
    expected = dense(module, x)
    g = metric(module, x, geometry="euclidean")
    field = MetricField(module, x, "euclidean")
    with torch.no_grad():
        module[0].weight.zero_()  # type: ignore[index, union-attr]
    assert oracles.relative(g.operator.to_dense(), expected) < 1e-10
    assert oracles.relative(field.at().operator.to_dense(), dense(module, x)) < 1e-10
    assert oracles.relative(field.at(g.root.theta).operator.to_dense(), expected) < 1e-10  # type: ignore[attr-defined]


def test_distances_from_the_start_are_zero_even_in_train_mode() -> None:
    module, x = build("training")
    field = MetricField(module, x, "categorical")
    with unchanged(module, x):
        here, again = field.map(field.map.point(), x)[0], field.map(field.map.point(), x)[0]
    assert bool((field.geometry.distance(here, again) == 0).all())


def test_norm_is_the_distance_to_first_order() -> None:
    module, x = build("encoder")
    field = MetricField(module, x, "categorical")
    theta, v = field.map.point(), draw(0, field.space.dim)
    v = v / field.at().norm(v)
    ratios = []
    for size in (1e-3, 1e-4, 1e-5):
        outputs = field.map(theta + size * v, x)[0], field.map(theta, x)[0]
        ratios.append(float(field.geometry.distance(*outputs).square().mean().sqrt()) / size)
    assert [abs(r - 1) < 50 * s for r, s in zip(ratios, (1e-3, 1e-4, 1e-5), strict=True)] == [True] * 3
    assert ratios[-1] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(("geometry", "lost"), [("logits", 1), ("categorical", 1), ("euclidean", 0), ("cosine", 1)])
def test_rank_bound_is_sharp(geometry: str, lost: int) -> None:
    """On a sphere and for centred logits one dimension an input cannot change: N (C - 1), reached by a wide network."""
    module, x = build("mlp")
    g = metric(module, x, geometry=geometry)
    assert g.rank_bound == 5 * (3 - lost) == torch.linalg.matrix_rank(g.root.to_dense())


def test_explain_and_repr() -> None:
    module, x = build("mlp")
    g = metric(module, x)
    assert repr(g) == "Metric(D=31, N=5, rank <= 10)"
    assert g.explain().startswith("root: 15 rows (5 examples) x 31 weights in torch.float64;")
    assert Metric(Dense(torch.eye(4)), 2).explain() == "Metric(D=4, N=2, rank <= 4)"


def test_the_gram_in_blocks_gives_the_same_solves_and_spectra() -> None:
    module, x = build("mlp")
    whole, tight = metric(module, x), metric(module, x, max_bytes=2 * 3 * 31 * 8)
    v = draw(0, 31)
    assert "does not fit" in tight.explain()
    assert oracles.relative(tight.solve(v, 0.1, method="dual").value, whole.solve(v, 0.1).value) < 1e-10
    assert oracles.relative(tight.spectrum(5).values, whole.spectrum(5).values) < 1e-10
