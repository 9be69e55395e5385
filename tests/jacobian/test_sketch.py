"""Sketches: exact expectations by exhaustion, dense oracles, draws that do not depend on batches, large outputs."""

import itertools
import math
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import Metric, OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot
from fipgeo.jacobian.sketch import (
    DrawnBatches,
    Sketched,
    SketchedOutputs,
    _keys,
    _labels,
    _signed_sums,
    _uniforms,
    drawn,
    replicates,
    sketch_error,
    sketch_trace,
)
from fipgeo.outputs import Bernoulli, Categorical, Cosine, Euclidean, Gaussian, Geometry, Logits

from .. import oracles
from ..models import Structured, build, cut

SEEDS = st.integers(0, 2**20)
KINDS = [Categorical(), Categorical(2.0), Bernoulli(), Euclidean(), Logits(), Gaussian(0.5), Cosine()]


class Tokens(nn.Module):
    """Logits of every position, `[n, T, C]`; the positions meet."""

    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(2, 2), nn.Linear(2, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(x)).cumsum(1))


def tokens(seed: int, examples: int = 5, length: int = 4, classes: int = 3) -> tuple[nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        module = Tokens(classes).double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return module, torch.randn(examples, length, 2, generator=generator)


def root_of(
    module: nn.Module, inputs: Any, geometry: Geometry, engine: str = "autodiff", **kwargs: Any
) -> JacobianRoot:
    map_ = OutputMap(module)
    function = drawn(EmbeddedOutputs(map_, geometry, as_batches(inputs), **kwargs), map_.point())
    return JacobianRoot(function, map_.point(), engine=engine)


def squared(root: JacobianRoot) -> Tensor:
    return root.normal(torch.eye(root.shape[1])) / root.survey.normaliser


def with_draws(module: nn.Module, x: Tensor, geometry: Sketched, draws: Tensor, **kwargs: Any) -> Tensor:
    """R^T R of a sketch whose draws are these."""
    map_ = OutputMap(module)
    batches = DrawnBatches(as_batches([x]), [(draws,)])
    root = JacobianRoot(SketchedOutputs(map_, geometry, batches, **kwargs), map_.point(), engine="autodiff")
    return root.normal(torch.eye(root.shape[1]))


@pytest.mark.parametrize("rows", ["example", "position"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_over_all_labels_is_the_fisher(temperature: float, rows: str) -> None:
    module, x = tokens(0, examples=1, length=2)
    p = torch.softmax(module(x).detach() / temperature, -1)[0]
    total = torch.zeros(1)
    for labels in itertools.product(range(3), repeat=2):
        probability = math.prod(float(p[t, y]) for t, y in enumerate(labels))
        draws = torch.tensor(labels).reshape(1, 2, 1)
        total = total + probability * with_draws(module, x, Sketched(Categorical(temperature), 1, rows=rows), draws)
    assert oracles.relative(total, oracles.fisher(module, x, temperature)) < 1e-12


def test_the_mean_over_all_answers_is_the_fisher() -> None:
    module, x = tokens(1, examples=1, length=2, classes=2)
    p = torch.sigmoid(module(x).detach()).flatten()
    total = torch.zeros(1)
    for answers in itertools.product([False, True], repeat=4):
        yes = torch.tensor(answers)
        probability = float(torch.where(yes, p, 1 - p).prod())
        total = total + probability * with_draws(module, x, Sketched("bernoulli", 1), yes.reshape(1, 2, 2, 1))
    jacobian = oracles.root(module, x)
    assert oracles.relative(total, jacobian.T @ torch.diag(p * (1 - p)) @ jacobian) < 1e-12


@pytest.mark.parametrize("rows", ["example", "position"])
def test_the_mean_over_labels_with_masked_positions(rows: str) -> None:
    module, x = tokens(2, examples=1, length=3)
    p = torch.softmax(module(x).detach(), -1)[0]
    total = torch.zeros(1)
    for labels in itertools.product(range(3), repeat=2):
        draws = torch.tensor([*labels, 0]).reshape(1, 3, 1)
        found = with_draws(
            module, x, Sketched(rows=rows, num_samples=1), draws, mask=lambda x: torch.tensor([[1, 1, 0]])
        )
        total = total + float(p[0, labels[0]] * p[1, labels[1]]) * found
    assert oracles.relative(total, oracles.fisher(module, x[:, :2])) < 1e-12


def test_the_mean_over_all_signs_is_the_metric() -> None:
    module, x = tokens(3, examples=1, length=2, classes=2)
    jacobian, total = oracles.root(module, x), torch.zeros(1)
    for signs in itertools.product([-1.0, 1.0], repeat=4):
        row = torch.tensor(signs) @ jacobian
        total = total + torch.outer(row, row) / 16
    assert oracles.relative(total, jacobian.T @ jacobian) < 1e-12
    # and the rows made are rows of signs: every one of the sixteen patterns comes, about as often as the others
    found = _signed_sums(torch.eye(4)[None].expand(4096, 4, 4), _keys(0, 0, torch.arange(4096)), 3)
    assert found.shape == (4096, 4, 3) and set(found.unique().tolist()) == {-1.0, 1.0}
    patterns = ((found > 0) * torch.tensor([1, 2, 4, 8])[:, None]).sum(1)
    assert int(torch.bincount(patterns.flatten(), minlength=16).min()) > 12288 / 16 * 0.8


@settings(max_examples=6)
@given(seed=SEEDS)
def test_labels_follow_the_model(seed: int) -> None:
    f = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(seed)) * 2
    f[0, 0, 1] = -torch.inf  # a class that never comes
    p = torch.softmax(f, -1)
    labels = _labels(f, _keys(seed, 0, torch.arange(2)), 4000)
    shares = nn.functional.one_hot(labels, 5).double().mean(-2)
    assert float(shares[0, 0, 1]) == 0
    assert bool(((shares - p).abs() <= 5 * (p * (1 - p) / 4000).sqrt() + 1e-9).all())
    u = _uniforms(_keys(seed, 0, torch.arange(50)), 40, 10)
    assert bool((u >= 0).all() and (u < 1).all()) and len(u.unique()) == u.numel()
    assert abs(float(u.mean()) - 0.5) < 5 / math.sqrt(12 * u.numel())
    other = _uniforms(_keys(seed + 1, 0, torch.arange(50)), 40, 10)
    for a, b in ((u, other), (u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u[..., 1:], u[..., :-1])):
        assert abs(float(((a - 0.5) * (b - 0.5)).mean())) * 12 < 5 / math.sqrt(a.numel())


@pytest.mark.parametrize("rows", ["example", "position"])
@pytest.mark.parametrize("geometry", KINDS, ids=str)
def test_many_samples_come_close_to_the_metric(geometry: Geometry, rows: str) -> None:
    module, x = tokens(4)
    expected = squared(root_of(module, x, geometry))
    root = root_of(module, x, Sketched(geometry, 400, rows=rows))
    found = replicates(root, torch.eye(root.shape[1]))
    v = torch.randn(6, root.shape[1], generator=torch.Generator().manual_seed(0))
    assert oracles.relative(found.mean(-1), expected.diagonal()) < 0.2
    gap = replicates(root, v).mean(-1) - torch.einsum("ki,ij,kj->k", v, expected, v)
    assert bool((gap.abs() < 5 * sketch_error(root, v)).all())


@pytest.mark.parametrize("geometry", KINDS, ids=str)
def test_the_trace_comes_with_its_error(geometry: Geometry) -> None:
    module, x = tokens(4)
    expected = float(squared(root_of(module, x, geometry)).trace())
    trace = sketch_trace(root_of(module, x, Sketched(geometry, 70)))
    assert abs(trace.value - expected) < 5 * trace.std_error < 2 * expected and trace.num_samples == 70


@pytest.mark.parametrize("engine", ["autodiff", "materialised"])
@pytest.mark.parametrize("rows", ["example", "position"])
@pytest.mark.parametrize("geometry", [Categorical(), Bernoulli(), Logits()], ids=str)
@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1), (1, 4)])
def test_draws_do_not_depend_on_batches(sizes: tuple[int, ...], geometry: Geometry, rows: str, engine: str) -> None:
    module, x = tokens(5)
    sketch = Sketched(geometry, 3, seed=7, rows=rows)
    expected = root_of(module, x, sketch).adjoint(torch.eye(15 if rows == "example" else 60))
    found = root_of(module, cut(x, *sizes), sketch, engine)
    assert found.survey.examples == sizes
    assert oracles.relative(found.to_dense(), expected) < 1e-12
    assert oracles.relative(found(expected[:2]), expected[:2] @ expected.T) < 1e-12


@settings(max_examples=4)
@given(seed=SEEDS, size=st.integers(1, 5), width=st.integers(4, 7))
def test_draws_do_not_depend_on_padding(seed: int, size: int, width: int) -> None:
    module, x = tokens(seed)
    sketch = Sketched("categorical", 4, seed)
    longer = torch.cat([x, torch.ones(5, width - 4, 2)], 1)
    found = root_of(
        module,
        as_batches(longer, batch_size=size),
        sketch,
        mask=lambda x: (torch.arange(x.shape[1]) < 4).expand(len(x), -1),
    )
    assert oracles.relative(squared(found), squared(root_of(module, x, sketch))) < 1e-12


def test_draws_depend_on_the_seed_and_stay_at_the_point() -> None:
    module, x = tokens(6)
    zero, again, one = (root_of(module, x, Sketched(num_samples=4, seed=s)) for s in (0, 0, 1))
    assert torch.equal(zero.to_dense(), again.to_dense()) and not torch.equal(zero.to_dense(), one.to_dense())
    fewer = root_of(module, x, Sketched(num_samples=2))  # the first samples are the same
    rows = zero.to_dense().reshape(5, 4, -1)[:, :2].flatten(0, 1) * 2**0.5
    assert oracles.relative(fewer.to_dense(), rows) < 1e-12
    before = zero.function
    assert drawn(before, zero.theta) is before
    plain = EmbeddedOutputs(before.map, Logits(), as_batches(x))
    assert drawn(plain, zero.theta) is plain
    fresh = before.renewed(as_batches(x))
    assert type(fresh) is EmbeddedOutputs
    redrawn = JacobianRoot(drawn(fresh, zero.theta), zero.theta, engine="autodiff")
    assert oracles.relative(redrawn.to_dense(), zero.to_dense()) < 1e-12


def test_several_output_tensors_share_rows() -> None:
    module, x = Structured(lambda f, h: (f, h)).double(), torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    exact = root_of(module, x, Categorical())
    root = root_of(module, x, Sketched("categorical", 2000))
    assert root.shape[0] == 6000 and root.rank_bound == min(3 * (1 + 3), root.shape[1])
    assert oracles.relative(squared(root), squared(exact)) < 0.1


def test_the_rank_bound_is_that_of_fewer_of_the_two() -> None:
    module, x = tokens(7, examples=2, length=2, classes=4)
    few, many = (root_of(module, x[:1], Sketched("logits", num_samples=count)) for count in (2, 50))
    assert few.rank_bound == 2 and many.rank_bound == 6
    assert int(torch.linalg.matrix_rank(squared(few))) == 2 and int(torch.linalg.matrix_rank(squared(many))) == 6
    assert root_of(module, x[:1], Sketched(num_samples=2, rows="position")).rank_bound == 4


def test_the_error_is_the_spread_over_seeds() -> None:
    module, x = tokens(8)
    v = torch.randn(OutputMap(module).space.dim, generator=torch.Generator().manual_seed(1))
    roots = [root_of(module, x, Sketched(num_samples=8, seed=seed)) for seed in range(60)]
    values = torch.stack([replicates(root, v).mean() for root in roots])
    told = torch.stack([sketch_error(root, v) for root in roots]).square().mean().sqrt()
    assert float(told / values.std()) == pytest.approx(1, abs=0.35)
    traces = [sketch_trace(root, generator=seed) for seed, root in enumerate(roots)]
    spread = torch.tensor([trace.value for trace in traces]).std()
    assert math.sqrt(sum(t.std_error**2 for t in traces) / 60) / float(spread) == pytest.approx(1, abs=0.35)
    assert math.isnan(float(sketch_error(root_of(module, x, Sketched(num_samples=1)), v)))


def test_errors_of_a_metric_and_of_its_eigenvalues() -> None:
    module, x = tokens(9, examples=40)
    root = root_of(module, x, Sketched(num_samples=16))
    metric, other = (Metric(r, 40) for r in (root, root_of(module, x, Sketched(num_samples=16, seed=1))))
    v = torch.ones(metric.dim)
    assert torch.allclose(replicates(metric, v).mean(-1), metric.norm(v).double().square(), rtol=1e-12)
    found = metric.spectrum(3, held_out=other)
    assert found.vectors is not None and found.held_out is not None
    error = sketch_error(metric, found.vectors)
    parts = replicates(metric, torch.eye(metric.dim)).shape
    assert error.shape == (3,) and parts == (metric.dim, 16)
    # the jackknife by leaving one sample out, which the error is to first order
    rows = root.to_dense().reshape(40, 16, -1)
    left = [torch.linalg.eigvalsh(r.T @ r)[-1] for r in (_without(rows, s) for s in range(16))]
    jackknife = math.sqrt(15 / 16 * float((torch.stack(left) - torch.stack(left).mean()).square().sum()))
    assert float(error[0]) == pytest.approx(jackknife, rel=0.1)
    exact = torch.linalg.eigvalsh(oracles.fisher(module, x))[-1]
    spread = math.hypot(float(error[0]), float(sketch_error(other, found.vectors[0])))
    assert abs(float(found.held_out[0] - exact)) < 4 * spread and abs(float(found.values[0] - exact)) < 4 * spread


def _without(rows: Tensor, sample: int) -> Tensor:
    kept = torch.cat([rows[:, :sample], rows[:, sample + 1 :]], 1).flatten(0, 1)
    return kept * math.sqrt(16 / 15 / 40)


def test_a_sketch_of_positions_is_a_mean_over_positions_too() -> None:
    module, x = tokens(10)
    root, exact = (root_of(module, x, g, per="position") for g in (Sketched(num_samples=2000), Categorical()))
    assert root.survey.normaliser == 20
    assert oracles.relative(squared(root), squared(exact)) < 0.08
    assert oracles.relative(replicates(root, torch.eye(root.shape[1])).mean(-1), squared(root).diagonal()) < 1e-12


def test_paired_batches_can_be_held_split_and_shuffled() -> None:
    module, x = tokens(11)
    batches = root_of(module, cut(x, 2, 2, 1), Sketched(num_samples=2)).function.batches
    whole = next(iter(batches.hold()))
    assert torch.equal(whole[0], x[:2]) and whole[1][0].shape == (2, 4, 2)
    pieces = root_of(module, x, Sketched(num_samples=2)).function.over(batches.hold())
    assert type(pieces) is SketchedOutputs and pieces.survey(OutputMap(module).point()).rows == (4, 4, 2)
    left, right = batches.split(0.4, 0)
    assert sum(len(b[0]) for b in left) == 3 and sum(len(b[1][0]) for b in right) == 2
    assert sum(len(b[0]) for b in batches.shuffled(1)) == 5
    assert len(batches.sample(1, torch.Generator().manual_seed(0))) == 2


LARGE = """
import resource, sys, time, torch
from torch import nn
from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot
from fipgeo.jacobian.sketch import Sketched, drawn
torch.set_num_threads(1)
V, T, S, N = 50_000, 16, 64, 4
net = nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, V))
x = torch.randint(100, (N, T), generator=torch.Generator().manual_seed(0))
warm = OutputMap(nn.Sequential(nn.Embedding(100, 4), nn.Linear(4, 5)))
for map_, measured in ((warm, False), (OutputMap(net), True)):
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    theta = map_.point()
    z = EmbeddedOutputs(map_, Sketched("categorical", S), as_batches(x, 1))
    root = JacobianRoot(drawn(z, theta), theta, engine="autodiff")
    size = float(root(torch.ones_like(theta)).norm()), float(root.adjoint(torch.ones(N * S)).norm())
    seconds, growth = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
assert size[1] > 0
print(seconds, growth * (1 if sys.platform == "darwin" else 1024), V * T * 4, S)
"""


def test_a_vocabulary_of_fifty_thousand_takes_the_memory_of_its_outputs() -> None:
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    seconds, growth, outputs, samples = map(float, done.stdout.split())
    assert seconds < 5
    assert (
        growth < outputs * samples / 2
    )  # about 13 times the outputs of a batch for any S, where S copies would be 64 times


def test_errors_name_the_argument() -> None:
    for options, message in (
        ({"num_samples": 0}, "num_samples: got 0, expected an integer of at least 1"),
        ({"num_samples": 2.0}, "num_samples: got 2.0, expected an integer"),
        ({"rows": "token"}, "rows: got 'token', expected one of 'example', 'position'"),
        ({"geometry": "fisher"}, "geometry: got 'fisher', expected one of"),
        ({"geometry": Sketched()}, "geometry: got a sketch of a sketch"),
    ):
        with pytest.raises(ValueError, match=message):
            Sketched(**options)  # type: ignore[arg-type]
    module, x = build("mlp")
    with pytest.raises(
        ValueError, match=r"geometry: Sketched\(.* is a metric at one point .* pass geometry=Categorical"
    ):
        Sketched().embed(x)
    with pytest.raises(TypeError, match="metric: got .*, which is no sketch of a model's metric; make one with"):
        sketch_error(root_of(module, x, Logits()), torch.zeros(31))
    narrow = nn.Linear(3, 1).double()
    for geometry in ("categorical", "logits"):
        with pytest.raises(ValueError, match="needs at least two"):
            root_of(narrow, x, Sketched(geometry))


def test_a_sketch_measures_and_predicts_as_its_geometry() -> None:
    sketch, f, f0 = Sketched(Categorical(2.0)), *torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    own = sketch.geometry
    assert torch.equal(sketch.distance(f, f0), own.distance(f, f0))
    assert torch.equal(sketch.predict(f), own.predict(f)) and sketch.openness(f) == own.openness(f)  # type: ignore[arg-type]
    assert torch.equal(sketch.length(f.abs()), own.length(f.abs()))
    assert replace(sketch, seed=3) == Sketched(Categorical(2.0), seed=3) != sketch


@pytest.mark.parametrize("geometry", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(geometry: Geometry, dtype: torch.dtype) -> None:
    module, x = tokens(12)
    root = root_of(module.to(dtype), x.to(dtype), Sketched(geometry, 4), "materialised")
    assert root.dtype == torch.float32 and bool(torch.isfinite(root.to_dense()).all())
    wide = OutputMap(module, dtype=torch.float64)
    function = drawn(EmbeddedOutputs(wide, Sketched(geometry, 4), as_batches(x.to(dtype))), wide.point())
    exact = JacobianRoot(function, wide.point())
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    moved = (root.to_dense() - exact.to_dense()).norm(dim=1) > tolerance * exact.to_dense().norm(dim=1).mean()
    assert float(moved.double().mean()) <= 0.2  # rounding may turn a label here and there
