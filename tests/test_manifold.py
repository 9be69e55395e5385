"""geoopt's laws and optimisers in the metric of a network's outputs."""

import copy
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

from fipgeo import MetricField
from fipgeo.basis import columns
from fipgeo.geodesics import Chart
from fipgeo.manifold import OutputManifold, zero_momentum_

from . import oracles
from .geodesics.charts import ONE, Sphere, mlp

GEOOPT: Any = geoopt  # its annotations do not know of its own arguments


def made(damping: float = 0.2, **options) -> tuple[OutputManifold, nn.Module, Tensor, Tensor]:
    """A manifold of a small network's weights, and h as a matrix by another route."""
    net, x = mlp()
    space = OutputManifold(MetricField(net, x, "euclidean"), damping, **options)
    root = oracles.root(net, x)
    return space, net, x, root.T @ root / len(x) + damping * torch.eye(root.shape[1])


def test_inner_products_gradients_and_random_tangents_are_those_of_h() -> None:
    space, _, _, h = made()
    point = space.chart.start
    u, v = torch.randn(2, 3, len(h))
    assert torch.allclose(space.inner(point, u, v), ((u @ h) * v).sum(-1))
    assert torch.allclose(space.norm(point, u) ** 2, space.inner(point, u))
    assert space.inner(point, u, keepdim=True).shape == (3, 1)
    natural = space.egrad2rgrad(point, u)
    assert torch.allclose(natural @ h, u)
    assert torch.allclose(space.inner(point, natural, v), (u * v).sum(-1))
    draws = space.random_tangent(point, 300, generator=1)
    covariance = draws.T @ draws / len(draws)
    assert float((covariance @ h - torch.eye(len(h))).norm()) < 0.12 * len(h)
    assert torch.equal(space.random_tangent(point, 2, generator=3), space.random_tangent(point, 2, generator=3))


@pytest.mark.parametrize("order", [1, 2])
def test_a_retraction_touches_the_geodesic_to_its_order(order: int) -> None:
    space, net, _, h = made(order=order, rtol=1e-8)
    point, u = space.chart.start, torch.randn(len(h), generator=torch.Generator().manual_seed(1))
    u = u / space.norm(point, u)
    gaps = [float((space.retr(point, s * u) - space.expmap(point, s * u)).norm()) for s in (0.2, 0.1)]
    assert order + 0.7 < torch.tensor(gaps[0] / gaps[1]).log2() < order + 1.5
    assert torch.equal(space.retr(point, 0 * u), point) and torch.equal(space.expmap(point, 0 * u), point)
    assert torch.equal(space.projx(point), point) and space.check_point(point)
    assert not space.check_point(point[1:]) and space.check_point_on_manifold(point)
    assert copy.deepcopy(space) is space


def test_transport_is_linear_and_along_geodesics_keeps_inner_products() -> None:
    space = OutputManifold(MetricField(Sphere(1.0, 0.2), ONE, "euclidean"), damping=1e-3, rtol=1e-5)
    x, u, v = space.chart.start, torch.tensor([0.1, 0.3]), torch.randn(3, 2)
    y, carried = space.expmap_transp(x, u, v)
    assert carried.shape == v.shape and torch.allclose(y, space.expmap(x, u))
    before, after = (space.inner(p, w[:, None], w[None]) for p, w in ((x, v), (y, carried)))
    assert torch.allclose(before, after, atol=1e-4)
    assert torch.allclose(space.transp_follow_expmap(x, u, 2 * v[:1] - v[1:2]), 2 * carried[:1] - carried[1:2])
    assert torch.equal(space.transp(x, y, v), v) and torch.equal(space.proju(x, v), v)


def trained(optimizer: torch.optim.Optimizer, space: OutputManifold, net: nn.Module, x: Tensor, y: Tensor, steps: int):
    """Losses of a full-batch regression; the manifold's one parameter is the optimiser's."""
    (weights,) = optimizer.param_groups[0]["params"]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (torch.func.functional_call(net, space.named(weights), x) - y).square().sum() / len(x) / 2
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam"])
def test_optimisers_of_geoopt_learn_a_small_network(name: str) -> None:
    space, net, x, _ = made(damping=1e-3)
    y = torch.randn(len(x), 2, generator=torch.Generator().manual_seed(4))
    weights = GEOOPT.ManifoldParameter(space.chart.start, manifold=space)
    if name == "adam":
        optimizer: torch.optim.Optimizer = GEOOPT.optim.RiemannianAdam([weights], lr=0.2, betas=(0.5, 0.9))
    else:
        momentum = 0.3 if name == "momentum" else 0.0
        optimizer = zero_momentum_(GEOOPT.optim.RiemannianSGD([weights], lr=0.5, momentum=momentum))
    before = space.chart.field.map.point()
    losses = trained(optimizer, space, net, x, y, 12)
    assert losses[-1] < (0.3 if name == "adam" else 0.01) * losses[0]
    assert torch.equal(space.chart.field.map.point(), before)  # the module is only read


def test_the_momentum_of_geoopt_starts_with_a_covector_unless_it_is_started_at_zero() -> None:
    space, net, x, h = made()
    y = torch.zeros(len(x), 2)
    start = space.chart.start
    for mended in (False, True):
        weights = GEOOPT.ManifoldParameter(start.clone(), manifold=space)
        optimizer = GEOOPT.optim.RiemannianSGD([weights], lr=0.1, momentum=0.9)
        if mended:
            zero_momentum_(optimizer)
        trained(optimizer, space, net, x, y, 1)
        gradient = oracles.root(net, x).T @ net(x).flatten().detach() / len(x)
        along = torch.linalg.solve(h, gradient) + (0 if mended else 0.9 * gradient)
        assert torch.allclose(weights.detach().as_subclass(Tensor), start - 0.1 * along)
    with pytest.raises(ValueError, match="before the first"):
        zero_momentum_(optimizer)


def test_ill_conditioned_coefficients_are_no_harder_than_others() -> None:
    net, x = mlp(1)
    field = MetricField(net, x, "euclidean")
    scales = torch.tensor([1.0, 0.1, 0.01])
    vectors = torch.randn(3, field.space.dim, generator=torch.Generator().manual_seed(2)) * scales[:, None]
    chart = Chart(field, columns(vectors))
    goal = torch.tensor([0.3, -0.5, 0.7])
    y = torch.func.functional_call(net, chart.named(goal), x)
    space = OutputManifold(chart, damping=1e-9)
    ours = GEOOPT.ManifoldParameter(torch.zeros(3), manifold=space)
    theirs = GEOOPT.ManifoldParameter(torch.zeros(3), manifold=GEOOPT.Euclidean(ndim=1))
    losses = trained(GEOOPT.optim.RiemannianSGD([ours], lr=1.0), space, net, x, y, 12)
    adam = trained(GEOOPT.optim.RiemannianAdam([theirs], lr=0.05), space, net, x, y, 60)
    assert losses[-1] < 1e-8 * losses[0] and torch.allclose(ours.detach().as_subclass(Tensor), goal, atol=1e-3)
    assert adam[-1] > 1e3 * losses[-1]


def test_bad_arguments_are_named() -> None:
    field = MetricField(Sphere(1.0, 0.2), ONE, "euclidean")
    with pytest.raises(ValueError, match="damping"):
        OutputManifold(field, 0.0)
    with pytest.raises(ValueError, match="order"):
        OutputManifold(field, 1.0, order=3)
