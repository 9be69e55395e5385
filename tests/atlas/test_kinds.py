"""How weights are shared out among coefficients."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Isotropic, Partitions, PerBlock, PerChannel, PerLayer, partition

from .test_composition import draw

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


def test_channels_are_slices_of_the_first_axis() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3))
    kind, sizes = PerChannel.of(net), {name: p.numel() for name, p in net.named_parameters()}
    assert kind.labels(sizes) == [*(f"0.weight[{k}]" for k in range(3)), "0.bias", "1.weight", "1.bias"]
    assert [c.tolist() for c in kind.columns(sizes).values()] == [[0, 1, 2], [3], [4], [5]]
    vectors = [TaskVector({n: draw(i, *p.shape) for n, p in net.named_parameters()}) for i in range(2)]
    model = Composition(net, vectors, kind)
    with torch.no_grad():
        model.coefficients.copy_(draw(2, 2, 6))
    along = sum(
        c[:3, None, None, None] * v.tensors["0.weight"] for c, v in zip(model.coefficients, vectors, strict=True)
    )
    torch.testing.assert_close(model.displacements()["0.weight"], along)
    assert kind.describe() == {"name": "PerChannel", "channels": {"0.weight": 3}}


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="channels: got 4 of w, whose 6 weights"):
        PerChannel({"w": 4}).labels({"w": 6})
    with pytest.raises(ValueError, match="count: got 0 parts"):
        Partitions(0)
    with pytest.raises(ValueError, match="parts: got 4, expected between 1 and the 3 weights of w"):
        partition(3, 4, 0, "w")
