"""Aligned channels and connecting paths: permutations undone, energies by their definition, drift made smaller."""

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import fipgeo
from fipgeo import align, connect
from fipgeo.between.energy import _energy


class Residual(nn.Module):
    """Convolutions with BatchNorm around a residual stream, flattened into a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.first, self.bn1 = nn.Conv2d(4, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.second, self.bn2 = nn.Conv2d(5, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.stem(x)))
        x = x + self.bn2(self.second(F.relu(self.bn1(self.first(x)))))
        return self.head(F.avg_pool2d(x, 2).flatten(1))


def drawn(module: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.randn(t.shape, generator=generator))
                if name.endswith("var"):
                    t.abs_().add_(0.5)
    return module.eval()


def shuffled(net: Residual, seed: int) -> Residual:
    """The same function with the channels of the stream and of the block in other orders."""
    generator, out = torch.Generator().manual_seed(seed), copy.deepcopy(net)
    stream, block = torch.randperm(4, generator=generator), torch.randperm(5, generator=generator)
    columns = (4 * stream[:, None] + torch.arange(4)).flatten()
    with torch.no_grad():
        for norm, order in ((out.bn, stream), (out.bn1, block), (out.bn2, stream)):
            for t in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                t.copy_(t[order])  # type: ignore[index]
        out.stem.weight.copy_(net.stem.weight[stream])
        out.first.weight.copy_(net.first.weight[block][:, stream])
        out.second.weight.copy_(net.second.weight[stream][:, block])
        for layer, order in ((out.first, block), (out.second, stream)):
            assert layer.bias is not None
            layer.bias.copy_(layer.bias[order])
        out.head.weight.copy_(net.head.weight[:, columns])
    return out


@given(st.integers(0, 10**6), st.sampled_from(["weights", "activations"]))
@settings(max_examples=4)
def test_a_permuted_copy_is_put_in_order_again(seed: int, by: str) -> None:
    drawn(a := Residual(), seed)
    b, x = shuffled(a, seed), torch.randn(40, 1, 4, 4)
    assert torch.allclose(a(x), b(x))
    stem = F.relu(a.bn(a.stem(x)))
    alive = [bool(h.flatten(2).amax((0, 2)).all()) for h in (stem, F.relu(a.bn1(a.first(stem))))]
    assume(by == "weights" or all(alive))  # channels that are zero on all inputs are alike
    before = copy.deepcopy(b.state_dict())
    found = align(a, b, x, by=by, generator=seed)
    assert all(torch.equal(p, q) for p, q in zip(found.state_dict().values(), a.state_dict().values(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(b.state_dict().values(), before.values(), strict=True))


@given(st.integers(0, 10**6))
@settings(max_examples=4)
def test_an_aligned_network_computes_the_same_and_lies_nearer(seed: int) -> None:
    a, b, x = drawn(Residual(), seed), drawn(Residual(), seed + 1), torch.randn(3, 1, 4, 4)
    found = align(a, b, x)
    assert torch.allclose(found(x), b(x))
    space = fipgeo.WeightSpace.of(a)
    start, far, near = (space.point(net) for net in (a, b, found))
    assert (near - start).norm() < (far - start).norm()
    assert torch.allclose(near.norm(), far.norm())


@given(st.integers(0, 10**6))
@settings(max_examples=4)
def test_aligned_activations_vary_together_as_much_as_any_order_allows(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, b, x = drawn(Residual(), seed), drawn(Residual(), seed + 1), torch.randn(6, 1, 4, 4, generator=generator)
    found = align(a, b, [x[:2], x[2:]], by="activations")
    assert torch.allclose(found(x), b(x))

    def block(net: Any) -> Tensor:
        stem = F.relu(net.bn(net.stem(x)))
        rows = F.relu(net.bn1(net.first(stem))).detach().movedim(1, 0).flatten(1)
        return rows - rows.mean(1, keepdim=True)

    one, two = block(a), block(found)
    shared = [float((one * two[list(order)]).sum()) for order in itertools.permutations(range(5))]
    assert shared[0] == pytest.approx(max(shared))
    with pytest.raises(ValueError, match="'weights' or 'activations'"):
        align(a, b, x, by="outputs")


def mlps(*seeds: int) -> list[nn.Module]:
    return [drawn(nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)), seed) for seed in seeds]


def test_a_path_between_networks_has_less_drift_and_energy_than_the_straight_line() -> None:
    (a, b), x = mlps(0, 1), torch.randn(200, 3)
    held = torch.randn(100, 3)
    before, scratch = copy.deepcopy((a.state_dict(), b.state_dict())), copy.deepcopy(a)
    found = connect(a, b, x, held_out=held, geometry="euclidean", steps=50, lr=0.03, num_measured=6, generator=1)
    assert found.largest_drift < 0.5 * found.straight_largest_drift
    assert found.least_energy < found.energy < found.straight_energy
    assert found.drift[0] == found.drift[-1] == 0 and str(found).startswith("largest drift")
    assert found.num_held_out == 100 and bool(found.changed.isnan().all())
    assert found.least_energy == pytest.approx(float((a(held) - b(held)).square().sum().detach() / 100))
    for t, drift in zip(found.times[1:-1].tolist(), found.drift[1:-1].tolist(), strict=True):
        found.apply_(scratch, t)
        with torch.no_grad():
            z, first, last = scratch(held), a(held), b(held)
        gap = z - torch.lerp(first, last, t)
        spread = (first - first.mean(0)).square().sum().sqrt()
        assert drift == pytest.approx(float(gap.square().sum().sqrt() / spread))
    for net, state in zip((a, b), before, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(net.state_dict().values(), state.values(), strict=True))
    again = connect(a, b, x, held_out=held, geometry="euclidean", steps=1, num_measured=6, generator=1)
    assert torch.allclose(again.straight_drift, found.straight_drift)
    with pytest.raises(ValueError, match="between 0"):
        found.at(1.5)
    assert len(found.plot().lines) == 2


def test_probabilities_are_kept_near_the_great_circle() -> None:
    (a, b), x = (mlps(0, 1)), torch.randn(200, 3)
    found = connect(a, b, x, held_out=x, geometry="categorical", steps=40, lr=0.03, num_measured=5, generator=1)
    assert found.largest_drift < 0.6 * found.straight_largest_drift
    assert found.least_energy <= found.energy < found.straight_energy
    other = copy.deepcopy(a)
    with torch.no_grad():
        p, q = (net(x).softmax(1) for net in (a, b))
        r = found.apply_(other, 0.25)(x).softmax(1)
        angle = torch.arccos((p * q).sqrt().sum(1, keepdim=True).clamp(max=1))
        aim = ((0.75 * angle).sin() * p.sqrt() + (0.25 * angle).sin() * q.sqrt()) / angle.sin()
        spread = (p.sqrt() - p.sqrt().mean(0)).square().sum().sqrt()
    assert float(found.drift[1]) == pytest.approx(float((r.sqrt() - aim).square().sum().sqrt() / spread))
    assert found.least_energy == pytest.approx(float((2 * angle).square().mean()))


@given(st.integers(0, 10**6))
def test_energy_is_the_least_one_plus_that_of_the_drift(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(6, 4, generator=generator)
    times = [0.0, *torch.rand(4, generator=generator).sort().values.tolist(), 1.0]
    rest = [f - torch.lerp(z[0], z[-1], t) for f, t in zip(z, times, strict=True)]
    found = _energy(list(z), times)
    assert found == pytest.approx(float(_energy(rest, times) + (z[-1] - z[0]).square().sum()))


def test_statistics_are_those_of_the_place_and_ends_keep_their_own() -> None:
    a, x = Residual(), torch.randn(24, 1, 4, 4)
    outputs = fipgeo.OutputMap(drawn(a, 3))
    for name, value in outputs.statistics(outputs.point(), [x]).items():
        a.get_buffer(name).copy_(value)
    b = shuffled(a, 5)
    options: dict[str, Any] = {"held_out": x, "steps": 1, "lr": 1e-9, "num_measured": 3}
    found = connect(a, b, x, align=True, **options)
    assert found.straight_largest_drift < 1e-6 and found.least_energy < 1e-20  # one network at both ends
    assert float(found.straight_changed.max()) == 0
    unaligned = connect(a, b, x, **options)
    assert unaligned.straight_largest_drift > 0.1 and float(unaligned.straight_changed.max()) > 0
    middle, end = copy.deepcopy(a), copy.deepcopy(a)
    unaligned.apply_(middle, 0.5)
    assert torch.allclose(middle.get_buffer("bn.running_mean"), middle.stem(x).mean((0, 2, 3)))
    found.apply_(end, 1.0)
    assert torch.allclose(end(x), b(x))
    assert torch.equal(end.get_buffer("bn.running_mean"), a.get_buffer("bn.running_mean"))


@pytest.mark.parametrize(
    ("change", "words"),
    [({"bends": 0}, "bends"), ({"steps": 0}, "steps"), ({"num_measured": 2}, "num_measured"), ({"lr": 0.0}, "lr")],
)
def test_bad_numbers_are_named(change: dict[str, Any], words: str) -> None:
    a, b = mlps(0, 1)
    with pytest.raises(ValueError, match=words):
        connect(a, b, torch.zeros(8, 3), **change)


def test_networks_of_other_shapes_are_refused_with_all_differences() -> None:
    a, b = nn.Linear(2, 3), nn.Linear(2, 4, bias=False)
    with pytest.raises(ValueError, match=r"bias is missing from b; weight is \[3, 2\] in a and \[4, 2\] in b"):
        connect(a, b, torch.zeros(4, 2))
