"""What a step is, against dense matrices and plain SGD, in float64."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fipgeo import MetricField
from fipgeo.optim import FIP
from fipgeo.paths import Kept, Several

FEATURES, CLASSES, DIM = 5, 3, 5 * 6 + 6 + 6 * 3 + 3
seeds = st.integers(0, 10**6)
few = settings(max_examples=4)  # laws of many steps


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(seed: int) -> nn.Sequential:
    net = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.copy_(draw(seed + k, *p.shape) / 2)
    return net


def flat(tensors: Any) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """D of the outputs by weights, one row an output, from torch.func alone."""
    weights = {name: p.detach() for name, p in net.named_parameters()}
    rows = jacrev(lambda w: functional_call(net, w, (x,)))(weights)
    return torch.cat([r.reshape(x.shape[0] * CLASSES, -1) for r in rows.values()], 1)


def inverse(rows: Tensor, examples: int, damping: float) -> Tensor:
    """mu (g + mu)^{-1}, dense."""
    g = rows.T @ rows / examples
    mu = damping * float(g.trace()) / min(rows.shape)
    return mu * torch.linalg.inv(g + mu * torch.eye(len(g)))


def backward(net: nn.Module, seed: int) -> None:
    """Gradients of a loss on new data."""
    net.zero_grad()
    (net(draw(seed, 20, FEATURES) + 1) - draw(seed + 1, 20, CLASSES)).square().mean().backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> Tensor:
    for k in range(steps):
        backward(net, seed + 2 * k)
        optimizer.step()
    return flat(net.parameters())


def plain(net: nn.Module, x: Tensor, **options: Any) -> FIP:
    """No clip, no corrections, outputs compared as they are."""
    options = {"clip": math.inf, "correct_every": 0} | options
    params = options.pop("params", None)
    return FIP(net.parameters() if params is None else params, MetricField(net, x, "euclidean"), **options)


@few
@given(seeds, st.floats(0, 0.95), st.floats(0, 0.1), st.booleans())
def test_without_a_metric_it_is_sgd(seed: int, momentum: float, decay: float, maximize: bool) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    other = copy.deepcopy(net)
    options: dict[str, Any] = {"lr": 0.03, "momentum": momentum, "weight_decay": decay, "maximize": maximize}
    found = train(net, plain(net, x, damping=math.inf, **options), 5)
    expected = train(other, torch.optim.SGD(other.parameters(), **options), 5)
    assert torch.allclose(found, expected, atol=1e-12)


@given(seeds, st.floats(-4, 2), st.floats(0, 0.1))
def test_a_step_is_the_damped_inverse_of_the_metric(seed: int, exponent: float, decay: float) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    optimizer = plain(net, x, damping=10**exponent, lr=0.1, momentum=0.7, weight_decay=decay, refresh=1)
    velocity = torch.zeros(DIM)
    for k in range(3):
        backward(net, seed + k)
        before = flat(net.parameters())
        wish = -flat(p.grad for p in net.parameters()) - decay * before
        g = inverse(jacobian(net, x), 4, 10**exponent)
        velocity = 0.7 * g @ velocity + g @ wish
        optimizer.step()
        assert torch.allclose(flat(net.parameters()), before + 0.1 * velocity, atol=1e-9)


@given(seeds)
def test_steps_share_the_metric_until_it_is_made_anew(seed: int) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    optimizer = plain(net, x, damping=0.1, lr=0.1, momentum=0.0, refresh=2)
    g = torch.zeros(DIM, DIM)
    for k in range(4):
        if k % 2 == 0:
            g = inverse(jacobian(net, x), 4, 0.1)
        backward(net, seed + k)
        before = flat(net.parameters())
        optimizer.step()
        assert torch.allclose(flat(net.parameters()) - before, -0.1 * g @ flat(p.grad for p in net.parameters()))


@given(seeds, st.floats(0.01, 1))
def test_steps_are_shortened(seed: int, clip: float) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    g = inverse(jacobian(net, x), 4, 0.1)
    backward(net, seed)
    before, step = flat(net.parameters()), -g @ flat(p.grad for p in net.parameters())
    plain(net, x, damping=0.1, lr=1.0, clip=clip).step()
    expected = step * min(1.0, clip / float(step.norm()))
    assert torch.allclose(flat(net.parameters()) - before, expected)


def groups_of(net: nn.Sequential, *options: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"params": net[0].parameters(), **options[0]}, {"params": net[2].parameters(), **options[1]}]


@few
@given(seeds, st.floats(0.05, 20), st.tuples(st.floats(0, 0.9), st.floats(0, 0.9)))
def test_in_the_null_space_outputs_stay_to_first_order_whatever_the_groups(
    seed: int, ratio: float, momenta: tuple[float, float]
) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    params = groups_of(net, {"lr": 0.1, "momentum": momenta[0]}, {"lr": 0.1 * ratio, "momentum": momenta[1]})
    optimizer = plain(net, x, params=params, damping=0.0)
    rows = jacobian(net, x)
    start = flat(net.parameters())
    moved = train(net, optimizer, 4, seed) - start
    assert moved.norm() > 1e-3
    assert (rows @ moved).norm() < 1e-8 * rows.norm() * moved.norm()


@given(seeds, st.floats(0.05, 20))
def test_rates_of_groups_against_a_dense_step(seed: int, ratio: float) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    top = max(1.0, ratio)
    s = torch.cat([torch.full((36,), 1 / top), torch.full((21,), ratio / top)])
    rows = jacobian(net, x) * s.sqrt()
    backward(net, seed)
    wish = -flat(p.grad for p in net.parameters())
    expected = 0.1 * top * s.sqrt() * (inverse(rows, 4, 0.1) @ (s.sqrt() * wish))
    before = flat(net.parameters())
    params = groups_of(net, {"lr": 0.1}, {"lr": 0.1 * ratio})
    plain(net, x, params=params, damping=0.1).step()
    assert torch.allclose(flat(net.parameters()) - before, expected)


@few
@given(seeds, st.floats(0.05, 20))
def test_rates_of_groups_are_those_of_sgd_without_a_metric(seed: int, ratio: float) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    other = copy.deepcopy(net)
    options: tuple[dict[str, Any], ...] = ({"lr": 0.1, "momentum": 0.5}, {"lr": 0.1 * ratio, "weight_decay": 0.1})
    found = train(net, plain(net, x, params=groups_of(net, *options), damping=None), 4)
    sgd = torch.optim.SGD(groups_of(other, options[0], options[1] | {"momentum": 0.9}), lr=1.0)
    assert torch.allclose(found, train(other, sgd, 4), atol=1e-12)


@few
@given(seeds)
def test_two_groups_alike_are_one_group(seed: int) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    other = copy.deepcopy(net)
    found = train(net, FIP(groups_of(net, {}, {}), MetricField(net, x)), 12)
    assert torch.equal(found, train(other, FIP(other.parameters(), MetricField(other, x)), 12))


@given(seeds)
def test_a_correction_is_the_gauss_newton_move(seed: int) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    other, reference, rows = copy.deepcopy(net), net(x).detach(), jacobian(net, x)
    train(other, plain(other, x, damping=1e-2), 1, seed)
    residual = (other(x) - reference).detach()
    gram = rows @ rows.T
    move = -rows.T @ torch.linalg.solve(gram + 1e-2 * gram.trace() / 12 * torch.eye(12), residual.reshape(-1))
    expected = flat(other.parameters()) + move
    train(net, plain(net, x, damping=1e-2, correct_every=1), 1, seed)
    assert torch.allclose(flat(net.parameters()), expected)
    assert (net(x) - reference).norm() < residual.norm()


def test_corrections_never_make_it_worse() -> None:
    """After a step far out of the tangent model's reach the move is not taken."""
    net, x = mlp(0), draw(0, 4, FEATURES)
    other = copy.deepcopy(net)
    options: dict[str, Any] = {"damping": 1e-9, "lr": 300.0}
    found = train(net, plain(net, x, correct_every=1, **options), 1)
    assert torch.equal(found, train(other, plain(other, x, **options), 1))


@few
@given(seeds)
def test_several_functions_are_kept_together(seed: int) -> None:
    net, x = mlp(seed), draw(seed, 6, FEATURES)
    first, second = (MetricField(net, part, "euclidean") for part in (x[:4], x[4:]))
    kept = [Kept.of(f.function, f.map.point()) for f in (first, second)]
    ends = []
    for keep in ([first, second], Several(kept), [first, kept[1]]):
        other = copy.deepcopy(net.state_dict())
        ends.append(train(net, FIP(net.parameters(), keep), 6))
        net.load_state_dict(other)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])
    rows = torch.cat([jacobian(net, x[:4]) / 2, jacobian(net, x[4:]) / 2**0.5])
    backward(net, seed)
    expected = flat(net.parameters()) - 0.1 * inverse(rows, 1, 0.2) @ flat(p.grad for p in net.parameters())
    FIP(net.parameters(), [first, second], damping=0.2, lr=0.1, clip=math.inf, correct_every=0).step()
    assert torch.allclose(flat(net.parameters()), expected)


@given(seeds)
def test_weights_that_were_not_handed_in_stay(seed: int) -> None:
    net, x = mlp(seed), draw(seed, 4, FEATURES)
    rows, start = jacobian(net, x)[:, 36:], flat(net.parameters())
    backward(net, seed)
    wish = -flat(p.grad for p in net[2].parameters())
    plain(net, x, params=net[2].parameters(), damping=0.1, lr=0.1).step()
    moved = flat(net.parameters()) - start
    assert torch.equal(moved[:36], torch.zeros(36))
    assert torch.allclose(moved[36:], 0.1 * inverse(rows, 4, 0.1) @ wish)


def test_random_rows_come_from_the_generator() -> None:
    ends = []
    for seed in (1, 1, 2):
        net, x = mlp(0), draw(0, 30, FEATURES)
        ends.append(train(net, plain(net, x, max_rows=12, refresh=2, lr=0.2, generator=seed), 5))
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_weights_move_nearly_as_wide_ones(dtype: torch.dtype) -> None:
    """The same weights, rounded, take the same first step to rounding."""
    net = mlp(0).to(dtype)
    wide, x = copy.deepcopy(net).double(), draw(0, 4, FEATURES)
    start = flat(wide.parameters())
    steps = []
    for model in (net, wide):
        for p, q in zip(model.parameters(), mlp(5).parameters(), strict=True):
            p.grad = q.detach().to(p.dtype)
        field = MetricField(model, x.to(next(model.parameters()).dtype), "euclidean")
        FIP(model.parameters(), field, damping=0.1, lr=1.0).step()
        steps.append(flat(model.parameters()).double() - start)
    assert all(p.dtype == dtype for p in net.parameters())
    assert (steps[0] - steps[1]).norm() < 30 * torch.finfo(dtype).eps * start.norm()
