"""Readouts: the ridge system by another route, the group of sketches, what is remembered of examples without them."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import MetricField
from fipgeo.memory import HiddenFeatures, Readout, ReadoutSketch

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(draw(seed + k, *p.shape))
    return net


def task(seed: int, count: int, classes: int) -> tuple[Tensor, Tensor]:
    return draw(seed, count, 3), torch.arange(count) % classes


def hidden(net: nn.Module, x: Tensor) -> HiddenFeatures:
    return HiddenFeatures(MetricField(net, x))


def close(one: ReadoutSketch, other: ReadoutSketch) -> None:
    for name in ("gram", "cross", "energy"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-10, atol=1e-10)


@settings(deadline=None, max_examples=8)
@given(SEEDS, st.floats(1e-3, 1e3))
def test_the_weights_are_the_stacked_least_squares(seed: int, ridge: float) -> None:
    """Against least squares on the examples with sqrt(ridge) times the identity below them, centred for the bias."""
    x, y = task(seed, 20, 3)
    features = hidden(network(seed + 1), draw(seed + 9, 15, 3) + 1)  # so that means are not zero
    h, t = features(x), torch.eye(3, dtype=torch.float64)[y]
    stacked = torch.cat([h - h.mean(0), ridge**0.5 * torch.eye(h.shape[1], dtype=h.dtype)])
    wanted = torch.cat([t - t.mean(0), torch.zeros(h.shape[1], 3, dtype=h.dtype)])
    weight = torch.linalg.lstsq(stacked, wanted).solution.T
    found = ReadoutSketch.of(features, (x, y), batch_size=7).solve(ridge)
    torch.testing.assert_close(found.weight, weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.bias, t.mean(0) - weight @ h.mean(0), rtol=1e-5, atol=1e-7)


@settings(deadline=None, max_examples=6)
@given(SEEDS)
def test_the_ridge_is_that_of_least_generalised_cross_validation(seed: int) -> None:
    """Against the hat matrix of the examples themselves, on a grid of ridges around the one that was found."""
    x, y = task(seed, 24, 2)
    y = y ^ (x[:, 0] > 0).long()  # not pure noise
    features = hidden(network(seed + 1), draw(seed + 9, 15, 3) + 1)
    h, t = features(x), torch.eye(2, dtype=torch.float64)[y]
    h, t = h - h.mean(0), t - t.mean(0)

    def score(ridge: float) -> float:
        hat = h @ torch.linalg.solve(h.T @ h + ridge * torch.eye(h.shape[1]), h.T)
        return float((t - hat @ t).square().sum() / (len(t) - 1 - hat.trace()) ** 2)

    found = ReadoutSketch.of(features, (x, y)).solve().ridge
    top = float(torch.linalg.eigvalsh(h.T @ h).max())
    inside = [r for k in range(-10, 11) if 2e-11 * top < (r := found * 1.3**k) < 1e3 * top]
    assert score(found) <= min(map(score, inside)) * (1 + 1e-6)


@settings(deadline=None, max_examples=6)
@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_sketches_are_a_commutative_group_and_forgetting_is_exact(seed: int, few: int, more: int) -> None:
    first, second, third = task(seed, 11, few), task(seed + 1, 9, more), task(seed + 2, 7, 3)
    features = hidden(network(seed + 3), first[0])
    a, b, c = (ReadoutSketch.of(features, data) for data in (first, second, third))
    close(a + b, b + a)
    close((a + b) + c, a + (b + c))
    close(a + b, ReadoutSketch.of(features, tuple(map(torch.cat, zip(first, second, strict=True)))))
    forgotten = (a + b + c) - b
    assert forgotten.count == a.count + c.count
    width = max(a.num_outputs, c.num_outputs)
    left, right = forgotten.solve(1.0), (a + c).solve(1.0)
    torch.testing.assert_close(left.weight[:width], right.weight, rtol=1e-6, atol=1e-8)
    close(2.0 * a, a + a)


@settings(deadline=None, max_examples=6)
@given(SEEDS)
@torch.no_grad()
def test_distances_on_examples_are_known_without_them(seed: int) -> None:
    old, new = task(seed, 12, 2), task(seed + 1, 10, 3)
    features = hidden(network(seed + 2), old[0])
    a, b = ReadoutSketch.of(features, old), ReadoutSketch.of(features, new)
    before, after = a.readout(features, 0.1), (a + b).readout(features, 0.1)
    there = torch.cat([before(old[0]), torch.zeros(12, 1, dtype=torch.float64)], 1) - after(old[0])
    assert a.distance(before, after) == pytest.approx(float(there.square().sum(1).mean()), rel=1e-9)
    assert a.distance(before, before) == 0.0


def test_what_the_network_says_is_remembered_without_labels() -> None:
    x = draw(0, 30, 3)
    net = network(1)
    features = hidden(net, x)
    said = net(x).argmax(1)
    close(
        ReadoutSketch.of(features, x, targets="model"),
        ReadoutSketch.of(features, (x, said), num_outputs=3),
    )
    assert float((ReadoutSketch.of(features, x, targets="model").readout(features)(x).argmax(1) == said).sum()) >= 25


def test_numbers_are_learned_as_well_as_classes() -> None:
    x = draw(0, 40, 3)
    features = hidden(network(1), x)
    wanted = features(x) @ draw(2, features.num_features, 2) + 3.0
    readout = ReadoutSketch.of(features, (x, wanted)).readout(features, 1e-9)
    torch.testing.assert_close(readout(x), wanted, rtol=1e-5, atol=1e-5)


def test_a_readout_is_a_module_that_trains_and_is_copied() -> None:
    x, y = task(0, 12, 2)
    readout = ReadoutSketch.of(hidden(network(1), x), (x, y)).readout(hidden(network(1), x), 1.0)
    assert [n for n, p in readout.named_parameters() if p.requires_grad] == ["linear.weight", "linear.bias"]
    nn.functional.cross_entropy(readout(x), y).backward()
    assert readout.linear.weight.grad is not None and readout.linear.weight.grad.any()
    other = copy.deepcopy(readout)
    other.load_state_dict(readout.state_dict())
    assert torch.equal(other(x), readout(x)) and isinstance(other, Readout)
    assert readout.float()(x.float()).dtype == torch.float32


def test_a_file_gives_the_same_sketch(tmp_path: Path) -> None:
    x, y = task(0, 12, 2)
    sketch = ReadoutSketch.of(hidden(network(1), x), (x, y))
    sketch.save(tmp_path / "a.safetensors")
    found = ReadoutSketch.load(tmp_path / "a.safetensors")
    assert all(torch.equal(getattr(found, n), getattr(sketch, n)) for n in ("gram", "cross", "energy"))
    from fipgeo.io import save_record

    save_record(tmp_path / "b.safetensors", {}, {"kind": "other"})
    with pytest.raises(ValueError, match="holds no readout sketch"):
        ReadoutSketch.load(tmp_path / "b.safetensors")


def test_bad_arguments_are_named() -> None:
    x, y = task(0, 12, 2)
    features = hidden(network(1), x)
    sketch, other = ReadoutSketch.of(features, (x, y)), hidden(nn.Linear(3, 2).double(), x)
    with pytest.raises(ValueError, match="targets: got 'teacher'"):
        ReadoutSketch.of(features, x, targets="teacher")
    with pytest.raises(ValueError, match="data: got a batch of Tensor"):
        ReadoutSketch.of(features, x)
    with pytest.raises(ValueError, match="classes from 0 to num_outputs - 1"):
        ReadoutSketch.of(features, (x, y), num_outputs=1)
    with pytest.raises(ValueError, match="ridge: got 0"):
        sketch.solve(0.0)
    with pytest.raises(ValueError, match="features: are 3, the sketch is of"):
        sketch.readout(other)
    with pytest.raises(ValueError, match="other: is of 3 features"):
        _ = sketch + ReadoutSketch.of(other, (x, y))
    with pytest.raises(ValueError, match="other: has 12 examples, more than the 6"):
        _ = (0.5 * sketch) - sketch
    with pytest.raises(ValueError, match="weight: got -1"):
        _ = -1 * sketch
    twice = MetricField(nn.Linear(3, 2).double(), x, forward_fn=lambda model, batch: (model(batch),) * 2)
    pair = HiddenFeatures(twice)
    with pytest.raises(ValueError, match="'model' needs class scores"):
        ReadoutSketch.of(pair, x, targets="model")
