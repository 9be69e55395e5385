"""Choices of inputs against dense algebra by another route, and the rules of every choice."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import MetricField
from fipgeo.memory import buffer, select

SEEDS = st.integers(0, 10**6)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def net(seed: int) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    for i, p in enumerate(model.parameters()):
        p.data = draw(seed + i, *p.shape)
    return model


def dense_gram(model: nn.Module, x: Tensor) -> Tensor:
    """K by reverse mode, one output at a time."""
    rows = []
    for z in model(x).flatten():
        slopes = torch.autograd.grad(z, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([s.flatten() for s in slopes]))
    r = torch.stack(rows)
    return r @ r.T


@given(SEEDS, st.integers(1, 9))
@settings(max_examples=6)
def test_leverage_is_the_trace_of_the_ridge_projector(seed: int, count: int) -> None:
    gram = dense_gram(net(seed), draw(seed, 10, 3))
    scores = buffer.leverage(gram, 2, count)
    eye = torch.eye(20).double()
    dimension = int(torch.linalg.matrix_rank(gram))

    def dense(ridge: float) -> Tensor:
        return torch.linalg.solve(gram + ridge * eye, gram).diagonal().reshape(-1, 2).sum(1)

    if 2 * count >= dimension:
        ridge = 1e-10 * float(gram.trace())
        assert float(scores.sum()) == pytest.approx(dimension, rel=1e-6)
    else:
        ridge, step = 1e-12 * float(gram.trace()), 16.0
        while step > 1 + 1e-9:  # climbs in ever smaller steps to where the scores add up to the room
            ridge, step = (ridge * step, step) if float(dense(ridge * step).sum()) > 2 * count else (ridge, step**0.5)
        assert float(scores.sum()) == pytest.approx(2 * count, rel=1e-9)
    assert torch.allclose(scores, dense(ridge), atol=1e-5)
    assert bool((scores >= 0).all()) and bool((scores <= 2 + 1e-9).all())


@given(SEEDS, st.integers(1, 10))
@settings(max_examples=6)
def test_diverse_takes_what_is_least_said_by_those_before(seed: int, count: int) -> None:
    gram = dense_gram(net(seed), draw(seed, 10, 3))
    chosen = buffer.diverse(gram, 2, count).tolist()
    assert len(set(chosen)) == count
    for k in range(count):
        rows = [2 * i + j for i in chosen[:k] for j in range(2)]
        said = gram[:, rows] @ torch.linalg.pinv(gram[rows][:, rows], hermitian=True) @ gram[rows] if rows else 0 * gram
        left = (gram - said).diagonal().reshape(-1, 2).sum(1)
        left[chosen[:k]] = -1
        assert float(left[chosen[k]]) >= float(left.max()) - 1e-6 * float(gram.trace())


def test_scores_of_a_field_are_those_of_its_dual_matrix(monkeypatch) -> None:
    model, x = net(1), draw(2, 12, 3)
    gram, width = buffer.dual_blocks(MetricField(model, x, "euclidean", batch_size=5))
    assert width == 2 and torch.allclose(gram, dense_gram(model, x))
    scores = buffer.leverage(gram, width, 3)
    picks = select(MetricField(model, x, "euclidean"), x, 4, by="diverse")
    assert bool((picks == buffer.diverse(gram, 2, 4)).all())
    monkeypatch.setattr(buffer, "dual_blocks", lambda field: (gram, width))
    draws = [select(MetricField(model, x, "euclidean"), x, 3, by="leverage", generator=s) for s in range(200)]
    seen = torch.bincount(torch.cat(draws), minlength=12).double()
    assert float(torch.corrcoef(torch.stack([seen, scores]))[0, 1]) > 0.8


@given(SEEDS, st.integers(1, 30))
@settings(max_examples=6)
def test_balanced_classes_differ_by_one_at_most(seed: int, count: int) -> None:
    model, x = net(seed), draw(seed, 30, 3)
    chosen = select(model, x, count, generator=seed)
    classes = model(x).argmax(1)
    had, got = torch.bincount(classes, minlength=2), torch.bincount(classes[chosen], minlength=2)
    assert int(got.sum()) == count == len(chosen.unique()) and bool((chosen.diff() > 0).all())
    short = got < had
    if bool(short.any()):
        assert int(got[short].min()) >= int(got.max()) - 1


@given(SEEDS, st.integers(24, 2000))
def test_as_many_inputs_as_fit(seed: int, nbytes: int) -> None:
    x = (draw(seed, 20, 3), torch.arange(20))  # 24 bytes and a label of 8
    if nbytes < 32:
        with pytest.raises(ValueError, match="one input takes 32"):
            select(net(0), x, nbytes=nbytes, by="random")
        return
    chosen = select(net(0), x, nbytes=nbytes, by="random", generator=seed)
    assert len(chosen) == min(nbytes // 32, 20) and bool((chosen.diff() > 0).all())


@pytest.mark.parametrize("by", buffer.BY)
def test_choices_repeat_and_batches_make_no_difference(by: str) -> None:
    model, x = net(1), draw(2, 12, 3)
    state = torch.get_rng_state()
    first = select(model, x, 5, by=by, generator=3)
    assert bool((first == select(model, [x[:7], x[7:]], 5, by=by, generator=3)).all())
    assert first.dtype == torch.int64 and len(first.unique()) == 5
    assert bool((torch.get_rng_state() == state).all())


def test_what_cannot_be_chosen_is_refused(monkeypatch) -> None:
    model, x = net(0), draw(0, 6, 3)
    tokens = nn.Sequential(nn.Linear(3, 4)).double()
    for call, match in [
        (lambda: select(model, x), "exactly one"),
        (lambda: select(model, x, 2, nbytes=100), "exactly one"),
        (lambda: select(model, x, 7), "between 1 and the 6"),
        (lambda: select(model, x, 0), "between 1"),
        (lambda: select(model, x, 2, by="age"), "by"),
        (lambda: select(tokens, draw(0, 5, 2, 3), 2), "class scores"),
        (lambda: select(nn.Conv1d(1, 1, 2).double(), [draw(0, 2, 1, 4), draw(0, 2, 1, 5)], 2), "differ from batch"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
    monkeypatch.setattr(buffer, "MAX_ROWS", 8)
    with pytest.raises(ValueError, match=r"draw\s+4 of them first"):
        select(model, x, 2, by="diverse")
