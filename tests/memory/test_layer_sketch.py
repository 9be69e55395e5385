"""Sketches of what linear maps see: the quadratic form, closed-form solves, merging, files, and steps that keep."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import MetricField
from fipgeo.memory import LayerSketch
from fipgeo.optim import FIP
from fipgeo.paths import Compensation, Position, Several

SEEDS = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(seed: int) -> nn.Sequential:
    """A grouped convolution, a normalisation scale and a linear layer without bias."""
    net = nn.Sequential(
        *(nn.Conv2d(2, 4, 3, padding=1, groups=2), nn.GroupNorm(2, 4), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(4 * 9, 5), nn.ReLU(), nn.Linear(5, 3, bias=False)),
    )
    net = net.double()
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(draw(seed + k, *p.shape) / 2)
    return net


def by_hand(net: nn.Sequential, other: nn.Sequential, x: Tensor) -> float:
    """Mean |change of a map's outputs|^2 on its old inputs, over the mean of the diagonal of A; the sum over maps."""
    total, squares = 0.0, torch.zeros(())
    for layer, moved in zip(net, other, strict=True):
        if isinstance(layer, nn.Conv2d):
            columns = nn.functional.unfold(x, 3, padding=1).transpose(1, 2).reshape(-1, 18)
            squares = (columns.square().sum(1) + 2) / (18 + 2)  # two groups, each with a one for the bias
        if isinstance(layer, nn.Linear):
            ones = 0 if layer.bias is None else 1
            squares = (x.square().sum(1) + ones) / (x.shape[1] + ones)
        if isinstance(layer, nn.Conv2d | nn.Linear):
            change = (moved(x) - layer(x)).square()
            if squares.any():  # a map whose inputs are all zero says nothing, whatever its weights
                total += float(change.sum() / len(squares) / squares.mean())
        elif isinstance(layer, nn.GroupNorm):
            pairs = zip(layer.parameters(), moved.parameters(), strict=True)
            total += sum(float((a - b).square().sum()) for a, b in pairs)
        x = layer(x)
    return total


@settings(deadline=None, max_examples=4)
@given(SEEDS)
@torch.no_grad()
def test_the_form_is_what_the_maps_would_change(seed: int) -> None:
    net, other, x = network(seed), network(seed + 50), draw(seed + 100, 6, 2, 3, 3)
    sketch = LayerSketch.of(MetricField(net, x), positions=None)
    there = Position(MetricField(other, x).map.point())
    assert sketch.loss(there) == pytest.approx(by_hand(net, other, x), rel=1e-9)
    assert sketch.loss(Position(sketch.origin)) == 0.0
    d = there.theta - sketch.origin
    root = sketch.tangent(there).root
    torch.testing.assert_close(root(d), sketch.residual(there))
    torch.testing.assert_close(root.to_dense(), root.to_dense().T)
    torch.testing.assert_close(root.to_dense() @ d, root(d))


@settings(deadline=None, max_examples=4)
@given(SEEDS, st.sampled_from([0.0, 1e-3, 1.0]), st.sampled_from([None, "0.weight 0.bias", "0.bias"]))
def test_steps_are_those_of_the_dense_metric(seed: int, damping: float, fixed: str | None) -> None:
    net, x = network(seed), draw(seed + 100, 12, 2, 3, 3)
    sketch = LayerSketch.of(MetricField(net, x), positions=None)
    free = torch.ones(sketch.space.dim, dtype=torch.bool)
    for name in (fixed or "").split():
        free[sketch.space.slices()[name]] = False
    moves = Compensation(sketch, Position(sketch.origin), free, damping=damping)
    root = sketch.tangent(Position(sketch.origin)).root.to_dense()[:, free]
    r = draw(seed + 1, sketch.space.dim)
    shift = moves.mu * torch.eye(int(free.sum()), dtype=torch.float64)
    inverse = torch.linalg.pinv(root, rtol=1e-6) if damping == 0 else torch.linalg.solve(root.T @ root + shift, root.T)
    expected = -torch.zeros_like(r).masked_scatter(free, inverse @ r)
    torch.testing.assert_close(moves(r), expected, rtol=1e-6, atol=1e-8)


@settings(deadline=None, max_examples=6)
@given(SEEDS, st.floats(0.1, 5))
def test_merged_sketches_differ_from_the_sum_by_a_constant(seed: int, weight: float) -> None:
    nets, x = [network(seed), network(seed + 50)], draw(seed + 100, 4, 2, 3, 3)
    one, two = (
        LayerSketch.of(MetricField(net, part), positions=None) for net, part in zip(nets, x.split(2), strict=True)
    )
    for a in (*one.maps, *two.maps):  # scales of maps are those of their sketch: make them alike
        a.moments.div_(a.moments.diagonal(dim1=1, dim2=2).mean())
    merged = one.merge(two, weights=(1.0, weight))
    both = Several([one, two], [1.0, weight])
    only_maps = torch.cat(
        [torch.arange(s.start, s.stop) for n, s in one.space.slices().items() if not n.startswith("1.")]
    )

    def gap(k: int) -> float:
        theta = merged.origin.clone()
        theta[only_maps] += draw(seed + k, len(only_maps))
        return both.loss(Position(theta)) - (1 + weight) * merged.loss(Position(theta))

    assert gap(1) == pytest.approx(gap(2), rel=1e-6, abs=1e-6)


def test_files_hold_all_of_it(tmp_path: Path) -> None:
    net, x = network(0), draw(1, 4, 2, 3, 3)
    sketch = LayerSketch.of(MetricField(net, x))
    sketch.save(tmp_path / "seen.safetensors")
    read = LayerSketch.load(tmp_path / "seen.safetensors", net)
    there = Position(draw(2, sketch.space.dim))
    assert torch.equal(read.residual(there), sketch.residual(there)) and read.nbytes == sketch.nbytes
    with pytest.raises(ValueError, match="^path: "):
        LayerSketch.load(tmp_path / "seen.safetensors", nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^other: "):
        sketch.merge(LayerSketch.of(MetricField(nn.Linear(2, 2).double(), draw(1, 3, 2))))
    with pytest.raises(ValueError, match=r"^weights: "):
        sketch.merge(sketch, weights=(1.0, 0.0))


@pytest.mark.parametrize("rates", [(0.05, 0.05), (0.05, 0.01)])
def test_old_outputs_stay_while_new_ones_are_learned(rates: tuple[float, float]) -> None:
    """Few old inputs leave null space in every map: there the old outputs stay exactly, however far the way is."""
    net, x, fresh = network(3), draw(1, 3, 2, 3, 3), draw(2, 40, 2, 3, 3)
    sketch, before = LayerSketch.of(MetricField(net, x), positions=None), net(x).detach()
    net[1].requires_grad_(False)
    moving = [(n, p) for n, p in net.named_parameters() if p.requires_grad]
    groups = [{"params": moving[:2], "lr": rates[0]}, {"params": moving[2:], "lr": rates[1]}]
    names = [{"params": [p for _, p in g["params"]], "param_names": [n for n, _ in g["params"]]} for g in groups]
    fixed = {"params": list(net[1].parameters()), "param_names": ["1.weight", "1.bias"]}
    optimizer = FIP([*({**g, **n} for g, n in zip(groups, names, strict=True)), fixed], sketch, damping=1e-9)
    target, start = torch.zeros(40, 3, dtype=torch.float64), copy.deepcopy(net)
    loss = torch.zeros(())
    for _ in range(40):
        optimizer.zero_grad()
        loss = (net(fresh) - target).square().mean()
        loss.backward()
        optimizer.step()
    changed = float((net(fresh) - start(fresh)).detach().square().mean())
    assert float((net(x) - before).detach().square().mean()) < 1e-4 * changed
    assert loss.item() < 0.8 * float((start(fresh) - target).detach().square().mean())
