"""Sketches against dense metrics: errors that hold, merges that add up, files that come back, steps that are equal."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fipgeo.io
from fipgeo import MetricField, WeightSpace
from fipgeo.memory import Sketch
from fipgeo.paths import Compensation, Position, Several

SEEDS = st.integers(0, 10**6)
RANKS = st.integers(1, 40)
METHODS = st.sampled_from(["eigen", "stream"])
FEATURES, CLASSES = 4, 3
SHAPES = {"a.weight": torch.Size([4, 5]), "a.bias": torch.Size([7])}
SPACE = WeightSpace(SHAPES, torch.float64, torch.device("cpu"))


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).double()
    for i, p in enumerate(model.parameters()):
        p.data = 0.5 * draw(seed + i, *p.shape)
    return model


def field_of(model: nn.Module, seed: int, count: int = 8, batch_size: int = 3) -> MetricField:
    return MetricField(model, draw(seed, count, FEATURES), "euclidean", batch_size=batch_size)


def norm(matrix: Tensor) -> float:
    return float(torch.linalg.matrix_norm(matrix, 2))


def square(sketch: Sketch) -> Tensor:
    return sketch.rows.double().T @ sketch.rows.double()


def made(seed: int, rows: int = 6, *, at: int | None = None, error: float = 0.0) -> Sketch:
    """A sketch of random rows at a random point of a space of 27 weights."""
    f = draw(seed, rows, SPACE.dim) * torch.logspace(0, -2, rows).double()[:, None]
    return Sketch(SPACE, f, draw(seed + 1 if at is None else at, SPACE.dim), error=error)


@given(SEEDS, RANKS, METHODS)
@settings(max_examples=4)
def test_the_error_holds_against_the_dense_metric(seed: int, rank: int, method: str) -> None:
    field = field_of(net(seed), seed)
    g = field.at().operator.to_dense()
    sketch = Sketch.of(field, rank, method=method)
    gap = g - square(sketch)
    scale = norm(g)
    assert norm(gap) <= sketch.error + 1e-9 * scale
    assert float(torch.linalg.eigvalsh(gap)[0]) >= -1e-9 * scale if method == "stream" else True
    assert sketch.trace == pytest.approx(float(g.trace()))
    assert sketch.caught == pytest.approx(float(square(sketch).trace() / g.trace()))
    assert sketch.num_rows <= rank
    if rank >= int(torch.linalg.matrix_rank(g)):
        assert norm(gap) < 1e-7 * scale and sketch.error < 1e-3 * scale


@given(SEEDS, st.integers(1, 20))
@settings(max_examples=4)
def test_eigenpairs_make_the_nearest_sketch(seed: int, rank: int) -> None:
    field = field_of(net(seed), seed)
    g = field.at().operator.to_dense()
    values = torch.linalg.eigvalsh(g).flip(0)
    sketch = Sketch.of(field, rank)
    assert norm(g - square(sketch)) == pytest.approx(float(values[rank]), abs=1e-6 * float(values[0]))
    assert sketch.error == pytest.approx(float(values[rank]), abs=1e-3 * float(values[0]))
    assert sketch.measured_error(field.at()) == pytest.approx(float(values[rank]), rel=0.05, abs=1e-9)


@given(SEEDS, RANKS, st.integers(1, 8), st.integers(1, 9))
@settings(max_examples=4)
def test_the_order_of_a_stream_matters_no_more_than_the_error(seed: int, rank: int, batch: int, block: int) -> None:
    model, x = net(seed), draw(seed, 8, FEATURES)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(seed))
    here = Sketch.of(MetricField(model, x, "euclidean", batch_size=batch), rank, method="stream", block=block)
    there = Sketch.of(MetricField(model, x[order], "euclidean", batch_size=3), rank, method="stream")
    assert norm(square(here) - square(there)) <= max(here.error, there.error) + 1e-9
    assert here.trace == pytest.approx(there.trace)


@given(SEEDS, st.integers(1, 14), st.floats(0.01, 10.0), st.floats(0.01, 10.0))
@settings(max_examples=6)
def test_merged_errors_add_up(seed: int, rank: int, w1: float, w2: float) -> None:
    a, b = made(seed, error=0.3), made(seed + 7, 5, error=0.1)
    both = a.merge(b, weights=(w1, w2), rank=rank)
    gap = w1 * square(a) + w2 * square(b) - square(both)
    assert norm(gap) <= both.error - (0.3 * w1 + 0.1 * w2) + 1e-9
    assert both.trace == pytest.approx(w1 * a.trace + w2 * b.trace)
    assert both.num_rows == min(rank, 11) and bool((both.origin == b.origin).all())


@given(SEEDS, st.floats(0.01, 10.0), st.floats(0.01, 10.0))
@settings(max_examples=6)
def test_a_merge_of_full_rank_is_the_weighted_sum_up_to_a_constant(seed: int, w1: float, w2: float) -> None:
    a, b = made(seed), made(seed + 7, 5)
    same = Sketch(SPACE, a.rows + 0.3, b.origin + 1)  # rows that depend on others: tasks that can disagree
    both = a.merge(b, weights=(w1, w2), rank=11).merge(same, rank=17)
    points = [Position(draw(seed + 10 + i, SPACE.dim)) for i in range(4)]
    wanted = [w1 * a.loss(p) + w2 * b.loss(p) + same.loss(p) for p in points]
    gaps = [w - both.loss(p) for w, p in zip(wanted, points, strict=True)]
    assert min(gaps) > -1e-9 * max(wanted)
    assert max(gaps) - min(gaps) < 1e-9 * max(wanted)


@given(SEEDS, st.integers(1, 10))
@settings(max_examples=6)
def test_what_a_merge_loses_is_bounded_by_its_error(seed: int, rank: int) -> None:
    a, b = made(seed), made(seed + 7, 5)
    stack = Several([a, b])
    full, small = a.merge(b, rank=11), a.merge(b, rank=rank)
    compromise = full.origin + torch.linalg.pinv(full.rows) @ full.offset
    for i in range(4):
        p = Position(draw(seed + 10 + i, SPACE.dim))
        lost = full.loss(p) - small.loss(p)
        assert -1e-9 <= lost <= small.error * float((p.theta - compromise).square().sum()) + 1e-9
        assert stack.loss(p) == pytest.approx(full.loss(p), rel=1e-9)  # eleven independent rows of 27: no constant


@given(SEEDS, st.floats(-4, 2).map(lambda e: 10.0**e), st.booleans())
@settings(max_examples=6)
def test_steps_solve_the_dense_problem(seed: int, damping: float, part: bool) -> None:
    sketch = made(seed).merge(made(seed + 7, 5))
    free = draw(seed + 3, SPACE.dim) > (0 if part else -10)
    position = Position(draw(seed + 4, SPACE.dim))
    moves = Compensation(sketch, position, free, damping=damping)
    masked = sketch.rows * free
    eye = moves.mu * torch.eye(SPACE.dim).double()
    r, d = sketch.residual(position), draw(seed + 5, SPACE.dim)
    assert torch.allclose(r, sketch.rows @ (position.theta - sketch.origin) - sketch.offset, atol=1e-12)
    move = -torch.linalg.solve(masked.T @ masked + eye, masked.T @ r)
    assert torch.allclose(moves(r), move, atol=1e-8 * (1 + float(move.norm())))
    passed = d - torch.linalg.solve(masked.T @ masked + eye, masked.T @ (sketch.rows @ d))
    assert torch.allclose(moves.passed(d), passed, atol=1e-8 * (1 + float(d.norm())))
    assert moves.cost == 0.0


def test_a_sketch_and_inputs_go_together() -> None:
    model = net(3)
    field = field_of(model, 5)
    sketch = Sketch.of(field, 60)
    several = Several([sketch, sketch], [0.5, 0.5])
    position = Position(field.map.point() + 0.1 * draw(1, field.space.dim))
    assert several.loss(position) == pytest.approx(sketch.loss(position))
    d = draw(2, field.space.dim)
    free = torch.ones_like(d, dtype=torch.bool)
    alone, both = (Compensation(p, position, free, damping=0.1) for p in (sketch, several))
    moves = [m.passed(d) for m in (alone.damped(0.1), both.damped(0.1 * alone.scale / both.scale))]
    assert torch.allclose(moves[0], moves[1], atol=1e-9)


@given(SEEDS, st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), st.floats(-6, 3))
@settings(max_examples=6)
def test_few_digits_are_in_the_error(seed: int, dtype: torch.dtype, exponent: float) -> None:
    exact = made(seed)
    exact = Sketch(SPACE, exact.rows * 10**exponent, exact.origin)
    few = exact.to(dtype)
    gap = norm(square(exact) - square(few))
    assert 0 < gap <= few.error <= 0.05 * norm(square(exact))
    assert few.dtype == dtype and few.trace == exact.trace
    assert few.nbytes < exact.nbytes


@given(SEEDS, st.integers(1, 6))
def test_subsets_are_the_strongest_directions(seed: int, rank: int) -> None:
    sketch = made(seed)
    part = sketch.subset(rank, torch.Generator())
    values = torch.linalg.eigvalsh(square(sketch)).flip(0)
    assert norm(square(sketch) - square(part)) == pytest.approx(float(values[rank]), abs=1e-9)
    assert part.error == pytest.approx(float(values[rank]), abs=1e-9)
    assert (part is sketch) == (rank == 6) and sketch.subset(rank, torch.Generator()) is part


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_files_come_back(tmp_path, dtype) -> None:
    sketch = made(1).merge(made(2)).to(dtype)
    sketch.save(tmp_path / "s.safetensors")
    back = Sketch.load(tmp_path / "s.safetensors", SPACE)
    for a, b in [(sketch.rows, back.rows), (sketch.origin, back.origin), (sketch.offset, back.offset)]:
        assert bool((a == b).all()) and a.dtype == b.dtype
    assert (back.error, back.trace, back.dtype, repr(back)) == (sketch.error, sketch.trace, dtype, repr(sketch))
    assert back.space.shapes == SPACE.shapes and back.nbytes == sketch.nbytes
    with pytest.raises(FileExistsError):
        sketch.save(tmp_path / "s.safetensors")


def test_files_of_other_weights_are_refused(tmp_path) -> None:
    file = tmp_path / "s.safetensors"
    model = net(0)
    Sketch.of(field_of(model, 1), 3).save(file)
    assert Sketch.load(file, model).num_rows == 3
    with pytest.raises(ValueError, match=r"0.weight is \[5, 4\] in the sketch and \[6, 4\] here; 0.bias"):
        Sketch.load(file, nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES)))
    with pytest.raises(ValueError, match="missing here"):
        Sketch.load(file, nn.Linear(2, 2))
    fipgeo.io.save_record(tmp_path / "other.safetensors", {}, {"kind": "path"})
    with pytest.raises(ValueError, match="holds no sketch"):
        Sketch.load(tmp_path / "other.safetensors")
    tensors, meta = fipgeo.io.load_record(file)
    meta = json.loads(json.dumps(meta).replace("[5, 4]", "[4, 5]"))
    fipgeo.io.save_record(file, tensors, meta, overwrite=True)
    with pytest.raises(ValueError, match="fingerprint"):
        Sketch.load(file)


def test_what_makes_no_sense_is_refused() -> None:
    field, sketch = field_of(net(0), 1), made(0)
    for call, match in [
        (lambda: Sketch.of(field, 0), "rank"),
        (lambda: Sketch.of(field, 3, method="magic"), "method"),
        (lambda: sketch.merge(sketch, weights=(1.0, -1.0)), "weights"),
        (lambda: sketch.merge(sketch, rank=0), "rank"),
        (lambda: sketch.merge(Sketch.of(field, 3)), "other"),
        (lambda: sketch.subset(0), "rank"),
        (lambda: Sketch(SPACE, draw(0, 3, 5), draw(0, 27)), "rows"),
        (lambda: Sketch(SPACE, torch.ones(3, 27, dtype=torch.int64), draw(0, 27)), "int64"),
        (lambda: Sketch(SPACE, draw(0, 3, 27), draw(0, 27), offset=draw(0, 2)), "offset"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
