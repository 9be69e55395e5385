"""Geodesics between two points: closed forms, paths of least energy found by another route, and what a miss says."""

import pytest
import torch
from torch import Tensor, nn

import fipgeo
from fipgeo import shoot
from fipgeo.linalg import Outcome

from .charts import Sphere, field_of, mlp


def test_a_linear_gaussian_model_is_hit_at_once() -> None:
    net = nn.Linear(3, 2)
    field, start, target = field_of(net, torch.randn(4, 3), "gaussian"), torch.zeros(8), torch.randn(8)
    found = shoot(field, start, target, damping=0.3)
    length = float((field.at(start).norm(target) ** 2 + 0.3 * target.square().sum()).sqrt())
    assert found.ok and len(found.history) == 1
    assert float((found.path.end - target).norm()) < 1e-8 and found.length == pytest.approx(length, abs=1e-8)
    assert torch.allclose(found.velocity, target)


def test_the_shortest_way_on_a_sphere_is_a_great_circle() -> None:
    module, target = Sphere(0.9, 0.1), torch.tensor([0.98, 0.2])
    found = shoot(field_of(module), None, target, damping=0, tol=1e-8, steps=4)
    one, two = module.embed(module.q.detach()), module.embed(target)
    angle = float(torch.arccos(one @ two))
    assert found.ok and float((found.path.end - target).norm()) < 1e-8
    assert found.length == pytest.approx(angle, abs=1e-8)
    jacobian: Tensor = torch.autograd.functional.jacobian(module.embed, module.q.detach())  # type: ignore[assignment]
    along = two - (one @ two) * one
    assert torch.allclose(jacobian @ found.velocity, angle * along / along.norm(), atol=1e-8)


def test_no_path_between_two_networks_has_less_energy() -> None:
    (net, x), damping, count = mlp(), 0.3, 16
    field = field_of(net, x)
    start = field.map.point()
    target = start + 0.3 * torch.randn(len(start), generator=torch.Generator().manual_seed(7))
    found = shoot(field, None, target, damping=damping, tol=1e-4, steps=2)
    assert found.ok

    def energy(corners: Tensor) -> Tensor:
        outputs = torch.stack([torch.func.functional_call(net, field.map.named(c), x).flatten() for c in corners])
        steps = [part.diff(dim=0).square().sum() for part in (outputs / len(x) ** 0.5, damping**0.5 * corners)]
        return (len(corners) - 1) * (steps[0] + steps[1])

    times = torch.linspace(0, 1, count + 1)[1:-1, None]
    inner = torch.lerp(start, target, times).requires_grad_()
    optimizer = torch.optim.LBFGS([inner], max_iter=60, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = energy(torch.cat([start[None], inner, target[None]]))
        loss.backward()
        return loss

    straight = float(closure().detach())
    optimizer.step(closure)  # type: ignore[arg-type]
    least = float(closure().detach())
    assert found.length**2 == pytest.approx(least, rel=2e-3) and straight > 1.005 * least
    middle, way = found.path.points[1], (target - start).norm()  # half of the length, so half of the time
    assert float((middle - inner[count // 2 - 1].detach()).norm() / way) < 5e-3
    other = mlp()[0]
    field.space.assign_(other, target)
    path = fipgeo.connect(net, other, x, held_out=x, geometry="euclidean", steps=20, lr=0.01, num_measured=3)
    corners = torch.stack([path.at(float(t)) for t in torch.linspace(0, 1, 41)])
    assert found.length**2 < float(energy(corners).detach())


def test_a_miss_says_so() -> None:
    field = field_of(Sphere(1.0, 0.0))
    short = shoot(field, None, torch.tensor([1.3, 0.4]), damping=0.1, max_shots=1, steps=1)
    assert short.outcome is Outcome.MAX_ITERATIONS and "max_shots" in short.message and short.gap == short.history[0]
    lost = shoot(field, None, torch.tensor([2.0, 1.0]), damping=0.1, steps=None, max_steps=1)
    assert not lost.ok and "could not be followed" in lost.message and "max_steps" in lost.message
    with pytest.raises(ValueError, match="target: it is the start"):
        shoot(field, None, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match=r"target: got shape \[3\]"):
        shoot(field, None, torch.zeros(3))
    with pytest.raises(ValueError, match="tol"):
        shoot(field, None, torch.zeros(2), tol=0)
