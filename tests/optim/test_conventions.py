"""What torch asks of an optimiser: closures, groups, schedulers, saved states, scalers, and nothing else touched."""

import copy
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

from fipgeo import MetricField
from fipgeo.optim import FIP
from fipgeo.optim.frame import Scaled
from fipgeo.paths import Kept

from ..hygiene import snapshot
from ..models import CASES, build
from .test_laws import CLASSES, FEATURES, backward, draw, flat, mlp, train


def normed(seed: int = 0) -> nn.Sequential:
    net = mlp(seed)
    return nn.Sequential(net[0], nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), net[2])


def saved(state: dict[str, Any]) -> dict[str, Any]:
    """Through a file, as a checkpoint goes."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(net: nn.Module, optimizer: FIP, steps: range) -> None:
    """Train mode: statistics move, dropout is on."""
    net.train()
    for k in steps:
        torch.manual_seed(k)
        backward(net, k)
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cut", [4, 5, 7])
def test_a_save_on_the_way_changes_nothing(cut: int, dtype: torch.dtype) -> None:
    """Random rows, metrics of three steps, statistics on the move: all of it goes on from a file, bit for bit."""
    x = draw(1, 30, FEATURES).to(dtype)
    options: dict[str, Any] = {"max_rows": 12, "refresh": 3, "correct_every": 2, "lr": 0.1}

    def backward_(net: nn.Module, k: int) -> None:
        net.train()
        torch.manual_seed(k)
        net.zero_grad()
        (net((draw(k, 20, FEATURES) + 1).to(dtype)) - 1).square().mean().backward()

    def run(net: nn.Module, optimizer: FIP, steps: range) -> None:
        for k in steps:
            backward_(net, k)
            optimizer.step()

    net = normed().to(dtype)
    whole = copy.deepcopy(net)
    run(whole, FIP(whole.parameters(), MetricField(whole, x), **options), range(10))
    optimizer = FIP(net.parameters(), MetricField(net, x), **options)
    run(net, optimizer, range(cut))
    states = saved({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    fresh = normed(9).to(dtype)
    fresh.load_state_dict(states["model"])
    again = FIP(fresh.parameters(), MetricField(fresh, x), **options)
    again.load_state_dict(states["optimizer"])
    twice = saved(again.state_dict())  # a state that was loaded and not used is the state still
    again.load_state_dict(twice)
    run(fresh, again, range(cut, 10))
    for (name, a), b in zip(whole.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_state_goes_on_in_the_same_optimiser_too() -> None:
    net, x = mlp(0), draw(1, 8, FEATURES)
    optimizer = FIP(net.parameters(), MetricField(net, x))
    train(net, optimizer, 3)
    model, state = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    expected = train(net, optimizer, 9)
    net.load_state_dict(model)
    optimizer.load_state_dict(state)
    assert torch.equal(train(net, optimizer, 9), expected)


def test_states_of_other_optimisers() -> None:
    net, x = mlp(0), draw(1, 8, FEATURES)
    optimizer = FIP(net.parameters(), MetricField(net, x))
    sgd = torch.optim.SGD(net.parameters(), lr=0.3, momentum=0.9)
    train(net, sgd, 2)
    optimizer.load_state_dict(sgd.state_dict() | {"param_groups": optimizer.state_dict()["param_groups"]})
    train(net, optimizer, 2)
    other = nn.Sequential(nn.Linear(FEATURES, 2), nn.Linear(2, CLASSES))
    smaller = FIP(other.parameters(), MetricField(other, x))
    with pytest.raises(ValueError, match=r"state_dict: it was saved for D = 57 weights"):
        smaller.load_state_dict(optimizer.state_dict() | {"state": {}})


SCHEDULERS: dict[str, Callable[[FIP], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6, cycle_momentum=False),
    "one cycle of momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=6),
    "from zero": lambda o: lr_scheduler.LambdaLR(o, lambda k: k / 6),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_drive_it_as_they_drive_sgd(name: str) -> None:
    ends = []
    for kind in ("fip", "sgd"):
        net, x = mlp(0), draw(1, 8, FEATURES)
        if kind == "fip":
            optimizer = FIP(net.parameters(), MetricField(net, x), damping=None, clip=math.inf)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        scheduler = SCHEDULERS[name](optimizer)  # type: ignore[arg-type]
        for k in range(6):
            train(net, optimizer, 1, k)
            scheduler.step()
        ends.append(flat(net.parameters()))
    assert torch.allclose(*ends, atol=1e-12)


def test_a_rate_of_zero_holds_a_group_and_leaves_the_others_protected() -> None:
    net, x = mlp(0), draw(1, 4, FEATURES)
    groups = [{"params": net[0].parameters()}, {"params": net[2].parameters(), "lr": 0.0}]
    optimizer = FIP(groups, MetricField(net, x), damping=0.0, clip=math.inf)
    start = flat(net.parameters())
    other = mlp(0)
    other[2].requires_grad_(False)
    alone = FIP(other[0].parameters(), MetricField(other, x), damping=0.0, clip=math.inf)
    train(net, optimizer, 3)
    train(other, alone, 3)
    assert torch.equal(flat(net.parameters())[36:], start[36:])
    assert torch.allclose(flat(net.parameters()), flat(other.parameters()))
    optimizer.param_groups[1]["lr"] = 0.05
    train(net, optimizer, 1)
    assert not torch.equal(flat(net.parameters())[36:], start[36:])


def test_closure() -> None:
    ends = []
    for closed in (True, False):
        net, x = mlp(0), draw(1, 4, FEATURES)
        optimizer = FIP(net.parameters(), MetricField(net, x))

        def closure(net: nn.Module = net) -> Tensor:
            backward(net, 3)
            assert torch.is_grad_enabled()
            return torch.tensor(7.0)

        if closed:
            with torch.no_grad():
                assert optimizer.step(closure) == 7.0
        else:
            closure()
            assert optimizer.step() is None
        ends.append(flat(net.parameters()))
    assert torch.equal(*ends)


def test_parameters_without_a_gradient_stay() -> None:
    net, x = mlp(0), draw(1, 4, FEATURES)
    optimizer = FIP(net.parameters(), MetricField(net, x, "euclidean"), damping=0.0, clip=math.inf, correct_every=1)
    optimizer.step()  # no gradient at all
    train(net, optimizer, 1)
    before = flat(net.parameters())
    backward(net, 2)
    net.get_parameter("0.weight").grad = None
    rates = optimizer._frame
    optimizer.step()
    moved = flat(net.parameters()) - before
    assert optimizer._frame is not rates  # the metric of fewer weights is another one
    assert torch.equal(moved[:30], torch.zeros(30)) and moved[30:].norm() > 0
    optimizer.zero_grad(set_to_none=True)
    assert all(p.grad is None for p in net.parameters())
    backward(net, 3)
    optimizer.zero_grad(set_to_none=False)
    assert all(not p.grad.any() for p in net.parameters() if p.grad is not None)


def test_a_new_head_learns_without_a_metric() -> None:
    """Parameters outside the protected model get SGD steps, those inside are protected from the new head's loss."""
    net, head, x = mlp(0), nn.Linear(6, 2), draw(1, 4, FEATURES)
    trunk = nn.Sequential(*list(net)[:2])
    optimizer = FIP(trunk.parameters(), MetricField(net, x, "euclidean"), damping=0.0, momentum=0.0, clip=math.inf)
    optimizer.add_param_group({"params": head.parameters(), "lr": 0.1, "momentum": 0.0})
    before, weight, kept = flat(trunk.parameters()), head.weight.detach().clone(), net(x).detach()
    head(trunk(draw(2, 10, FEATURES))).square().mean().backward()
    assert head.weight.grad is not None
    optimizer.step()
    assert torch.allclose(head.weight, weight - 0.1 * head.weight.grad)
    assert not torch.equal(flat(trunk.parameters()), before)
    moved = (flat(trunk.parameters()) - before).norm()
    assert (net(x) - kept).norm() < 2 * moved**2


def test_scalers_unscale_and_skip() -> None:
    ends = []
    for scaler in (torch.amp.GradScaler("cpu", init_scale=256.0), torch.amp.GradScaler("cpu", enabled=False)):
        net, x = mlp(0).float(), draw(1, 4, FEATURES).float()
        optimizer = FIP(net.parameters(), MetricField(net, x))
        for k in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", enabled=False):
                loss = (net((draw(k, 20, FEATURES) + 1).float()) - 1).square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        ends.append(flat(net.parameters()))
        if scaler.is_enabled():
            before, state = ends[-1], copy.deepcopy(optimizer.state_dict())
            net[0].weight.grad.fill_(math.inf)  # type: ignore[union-attr]
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(flat(net.parameters()), before)
            assert optimizer.steps == state["metric"]["steps"]
    assert torch.allclose(*ends, rtol=1e-4)


def test_steps_do_not_feel_autocast() -> None:
    ends = []
    for cast in (True, False):
        net, x = mlp(0).float(), draw(1, 4, FEATURES).float()
        optimizer = FIP(net.parameters(), MetricField(net, x))
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        with torch.autocast("cpu", torch.bfloat16, enabled=cast):
            optimizer.step()
        ends.append(flat(net.parameters()))
    assert torch.equal(*ends)


def test_not_a_number_is_refused_and_nothing_moves() -> None:
    net, x = mlp(0), draw(1, 4, FEATURES)
    optimizer = FIP(net.parameters(), MetricField(net, x))
    train(net, optimizer, 2)
    before, state = flat(net.parameters()), copy.deepcopy(optimizer.state_dict())
    backward(net, 0)
    net[2].weight.grad[0, 0] = math.nan  # type: ignore[index]
    with pytest.raises(ValueError, match=r"grad: the gradient of '2.weight' is NaN"):
        optimizer.step()
    assert torch.equal(flat(net.parameters()), before) and optimizer.steps == state["metric"]["steps"]


@pytest.mark.parametrize("name", [n for n in CASES if n != "frozen_part"])
def test_every_kind_of_network_and_nothing_but_weights_changes(name: str) -> None:
    model, data = build(name)
    model.train()
    optimizer = FIP(model.parameters(), MetricField(model, data), correct_every=1, refresh=1)
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:
        p.grad = torch.full_like(p, 0.1)
    grads = [p.grad.clone() for p in params if p.grad is not None]
    before, points = snapshot(model, data), [p.detach().clone() for p in params]
    optimizer.step()
    after = snapshot(model, data)
    assert not {key for key in before if before[key] != after[key] and not key.startswith("parameter ")}
    assert any(not torch.equal(p, point) for p, point in zip(params, points, strict=True))
    assert all(p.grad is not None and torch.equal(p.grad, grad) for p, grad in zip(params, grads, strict=True))


def test_tied_weights_are_found_under_either_name() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    net[2].weight = net[0].weight
    x = draw(1, 3, 4)
    one, other = copy.deepcopy(net), copy.deepcopy(net)
    first = FIP(one.parameters(), MetricField(one, x))
    tail = other[2]
    second = FIP([{"params": tail.parameters()}, {"params": [other[0].bias]}], MetricField(other, x))
    for net_, optimizer in ((one, first), (other, second)):
        net_(draw(2, 9, 4)).square().mean().backward()
        optimizer.step()
    assert torch.equal(flat(one.parameters()), flat(other.parameters()))


def test_without_a_model_parameters_are_found_by_name() -> None:
    net, x = mlp(0), draw(1, 4, FEATURES)
    other = copy.deepcopy(net)
    field = MetricField(net, x)
    nameless = Scaled(Kept.of(field.function, field.map.point()), torch.ones(field.space.dim))
    found = train(net, FIP(net.named_parameters(), nameless), 4)
    torch.testing.assert_close(
        found, train(other, FIP(other.parameters(), MetricField(other, x)), 4), rtol=0, atol=1e-12
    )
    with pytest.raises(ValueError, match=r"^params: .* pass model.named_parameters\(\)"):
        FIP(net.parameters(), nameless)
    part = FIP(list(net.named_parameters())[:3], nameless)
    with pytest.raises(ValueError, match=r"^params: '2.bias' and 0 more .* were not handed in"):
        part.step()


def test_the_reference_is_that_of_the_start_whatever_the_statistics() -> None:
    net, x = normed(), draw(1, 8, FEATURES)
    net.eval()
    reference = net(x).detach()
    optimizer = FIP(net.parameters(), MetricField(net, x, "euclidean"))
    trained(net, optimizer, range(3))
    assert isinstance(optimizer.keep, Kept)
    assert torch.allclose(torch.cat(list(optimizer.keep.reference)), reference)
    again = FIP(net.parameters(), MetricField(net, DataLoader(list(x), 3), "euclidean"))  # type: ignore[arg-type]
    again.load_state_dict(optimizer.state_dict())
    assert isinstance(again.keep, Kept)
    assert torch.allclose(torch.cat(list(again.keep.reference)), reference)


def test_wrong_arguments_are_named() -> None:
    net, x = mlp(0), draw(1, 4, FEATURES)
    field = MetricField(net, x)
    wrong: dict[str, Any] = {"lr": -1.0, "momentum": 1.0, "damping": -1.0, "clip": 0.0, "refresh": 0, "max_rows": 0}
    for key, value in wrong.items():
        with pytest.raises(ValueError, match=rf"^{key}: got"):
            FIP(net.parameters(), field, **{key: value})
    for keep, kind in ((x, TypeError), ("old", TypeError), ([], ValueError)):
        with pytest.raises(kind, match=r"^keep: got .* expected MetricField"):
            FIP(net.parameters(), keep)
    with pytest.raises(ValueError, match=r"'0.weight' is a weight of the protected model but no coordinate"):
        FIP(net.parameters(), MetricField(net, x, params="2.*"))
    other = mlp(1)
    with pytest.raises(ValueError, match=r"keep: its parts belong to 2 models"):
        FIP(net.parameters(), [field, MetricField(other, x)])
    optimizer = FIP(net[0].parameters(), field)
    with pytest.raises(ValueError, match=r"^lr: got"):
        optimizer.add_param_group({"params": net[2].parameters(), "lr": math.nan})
    assert len(optimizer.param_groups) == 1
