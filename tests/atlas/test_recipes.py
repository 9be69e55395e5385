"""Published recipes against their definitions, weight by weight."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fipgeo import TaskVector
from fipgeo.atlas import dare, elect, lines, ties, trim

SHAPES = {"0.w": (3, 4), "0.b": (3,), "1.w": (2, 3)}
seeds = st.integers(0, 2**20)


def vector(seed: int) -> TaskVector:
    draws = torch.Generator().manual_seed(seed)
    return TaskVector({name: torch.randn(shape, generator=draws) for name, shape in SHAPES.items()})


def flat(tau: TaskVector) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tau.tensors.values()])


@given(seed=seeds, keep=st.floats(0.01, 1.0))
def test_trimming_keeps_the_largest(seed: int, keep: float) -> None:
    x, found = flat(vector(seed)), flat(trim(vector(seed), keep))
    count = int(torch.tensor(keep * len(x)).ceil())
    largest = x.abs().argsort(descending=True)[:count]
    expected = torch.zeros_like(x).index_copy(0, largest, x[largest])
    assert torch.equal(found, expected)


@given(seed=seeds, keep=st.sampled_from([0.2, 0.5, 1.0]), count=st.integers(1, 4))
def test_ties_weight_by_weight(seed: int, keep: float, count: int) -> None:
    vectors = [vector(seed + i) for i in range(count)]
    rows = torch.stack([flat(trim(tau, keep)) for tau in vectors])
    expected = []
    for column in rows.T.tolist():
        sign = sum(column) > 0
        agreeing = [value for value in column if value != 0 and (value > 0) == sign]
        expected.append(sum(agreeing) / len(agreeing) if agreeing else 0.0)
    torch.testing.assert_close(flat(ties(vectors, keep)), torch.tensor(expected), rtol=1e-12, atol=1e-12)


@given(seed=seeds)
def test_elected_vectors_never_pull_against_each_other(seed: int) -> None:
    vectors = [vector(seed + i) for i in range(3)]
    chosen = torch.stack([flat(tau) for tau in elect(vectors)])
    assert bool(((chosen >= 0).all(0) | (chosen <= 0).all(0)).all())
    total = torch.stack([flat(tau) for tau in vectors]).sum(0)
    assert torch.equal(chosen.sum(0).sign(), total.sign())


def test_dropping_keeps_the_mean() -> None:
    tau = vector(1)
    draws = torch.stack([flat(dare(tau, 0.75, generator=seed)) for seed in range(800)])
    kept = draws != 0
    torch.testing.assert_close(draws[kept], (4 * flat(tau)).expand_as(draws)[kept])
    assert abs(float(kept.double().mean()) - 0.25) < 5 * (0.1875 / kept.numel()) ** 0.5
    assert torch.equal(flat(dare(tau, 0.3)), flat(dare(tau, 0.3, generator=0)))
    assert torch.equal(flat(dare(tau, 0.0)), flat(tau))


def test_layers_are_scaled_by_depth() -> None:
    names = ["stem", "layers.0.w", "layers.0.b", "layers.10.w", "layers.2.w", "head"]
    scales = lines(TaskVector({name: torch.ones(1) for name in names}), 0.25, 0.5).tensors
    assert [scales[name].item() for name in names] == [0.25, 0.25, 0.25, 0.75, 0.5, 0.75]
    same = lines(TaskVector({"w": torch.ones(1)}), 0.25, 0.5).tensors
    assert same["w"].item() == 0.25
    by_hand = lines(TaskVector({"a": torch.ones(1), "b": torch.ones(1)}), 1.0, 1.0, depth_of="ba".index).tensors
    assert (by_hand["a"].item(), by_hand["b"].item()) == (2.0, 1.0)


def test_buffers_and_storage_stay() -> None:
    tau = TaskVector({"w": torch.randn(8).bfloat16(), "m": torch.ones(2)}, frozenset({"m"}))
    for found in (trim(tau, 0.5), dare(tau, 0.5), lines(tau, 0.1, 1.0), ties([tau, tau]), elect([tau])[0]):
        assert found.tensors["w"].dtype == torch.bfloat16 and found.buffers == {"m"}
    assert torch.equal(dare(tau, 0.5).tensors["m"], torch.ones(2))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="keep: got 0"):
        trim(vector(0), 0)
    with pytest.raises(ValueError, match="drop: got 1"):
        dare(vector(0), 1)
    with pytest.raises(ValueError, match="vectors: got none"):
        ties([])
