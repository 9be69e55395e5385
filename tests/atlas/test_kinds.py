"""How weights are shared out among coefficients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipgeo.atlas import Isotropic, Partitions, PerBlock, PerLayer, partition

SIZES = {"a.weight": 6, "a.bias": 2, "b.weight": 1, "scale": 1}


@given(size=st.integers(1, 60), parts=st.integers(1, 60), seed=st.integers(-(2**70), 2**70))
def test_parts_are_even_and_places_are_used_once(size: int, parts: int, seed: int) -> None:
    parts = min(size, parts)
    width = -(-size // parts)
    order = partition(size, parts, seed, "w").long()
    assert len(set(order.tolist())) == size and 0 <= int(order.min()) and int(order.max()) < parts * width
    counts = (order // width).bincount(minlength=parts)
    assert int(counts.max() - counts.min()) <= 1
    assert torch.equal(order, partition(size, parts, seed, "w").long())


def test_parts_depend_on_seed_and_name_and_never_change() -> None:
    assert partition(10, 3, 0, "layer.weight").tolist() == [1, 10, 3, 5, 6, 8, 2, 4, 0, 9]
    others = [partition(1000, 3, seed, name) // 334 for seed, name in ((0, "a"), (1, "a"), (0, "b"))]
    for i in range(3):
        for j in range(i):
            assert 0.23 < float((others[i] == others[j]).double().mean()) < 0.43  # as independent draws: 1 / 3


def test_parts_are_uniform() -> None:
    """Each weight is as often in each part."""
    share = torch.stack([(partition(12, 3, seed, "w") // 4) == 0 for seed in range(600)]).double().mean(0)
    assert float((share - 1 / 3).abs().max()) < 5 * (2 / 9 / 600) ** 0.5


def test_labels_and_columns() -> None:
    assert Isotropic().labels(SIZES) == ["all"]
    assert PerLayer().labels(SIZES) == ["a", "b", ""]
    assert PerBlock().labels(SIZES) == list(SIZES)
    parts = Partitions(2)
    assert parts.labels(SIZES) == ["a.weight[0]", "a.weight[1]", "a.bias[0]", "a.bias[1]", "b.weight[0]", "scale[0]"]
    assert [c.tolist() for c in parts.columns(SIZES).values()] == [[0, 1], [2, 3], [4], [5]]
    assert [c.tolist() for c in PerLayer().columns(SIZES).values()] == [[0], [0], [1], [2]]
    assert parts.describe() == {"name": "Partitions", "count": 2, "seed": 0}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="count: got 0 parts"):
        Partitions(0)
    with pytest.raises(ValueError, match="parts: got 4, expected between 1 and the 3 weights of w"):
        partition(3, 4, 0, "w")
