"""Geodesics against closed forms, against Christoffel symbols by another route, and their laws."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import Metric, Outcome, geodesic
from fipgeo.basis import columns
from fipgeo.geodesics import TABLEAUX, Chart, Flow, as_chart

from .. import oracles
from ..models import build
from .charts import Polar, Product, Sphere, Surface, field_of, image, mlp, pushed


def direction(dim: int, seed: int = 3) -> Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("method", TABLEAUX)
def test_straight_lines_in_polar_coordinates_and_the_order_of_every_method(method: str) -> None:
    module = Polar(1.0, 0.3)
    start, v = module.q.detach(), torch.tensor([0.2, 1.0])
    gaps = []
    for steps in (3, 6):
        path = geodesic(field_of(module), None, v, 1.0, damping=0, method=method, steps=steps)
        assert path.ok and len(path) == steps + 1 and path.lengths[-1] == 1.0
        u = pushed(module, start, v)
        line = module.embed(start) + path.lengths[:, None] * u / u.norm()
        gaps.append(float((image(module, path.points) - line).norm(dim=1).max().detach()))
    order = math.log2(gaps[0] / gaps[1])
    assert TABLEAUX[method].order - 0.4 < order < TABLEAUX[method].order + 1.2


@given(st.integers(0, 10**6))
@settings(max_examples=2)
def test_great_circles_and_transport_along_them(seed: int) -> None:
    draw = torch.rand(5, generator=torch.Generator().manual_seed(seed))
    module = Sphere(0.8 + float(draw[0]), float(draw[1]))
    start, v = module.q.detach(), draw[2:4] - 0.5
    path = geodesic(field_of(module), None, v, 0.2, damping=0, steps=4, carry=torch.eye(2))
    p, u = module.embed(start), pushed(module, start, v)
    u = u / u.norm()
    t = path.lengths[-1]
    assert path.ok and path.speed_error < 1e-8
    assert torch.allclose(image(module, path.points)[-1], p * t.cos() + u * t.sin(), atol=1e-8, rtol=0)
    side = torch.linalg.cross(p, u)  # keeps its place in space, as the plane of the circle does
    ahead = u * t.cos() - p * t.sin()
    for i in range(2):
        w = pushed(module, start, torch.eye(2)[i])
        expected = (w @ u) * ahead + (w @ side) * side
        assert torch.allclose(pushed(module, path.end, path.carried[-1, i]), expected, atol=1e-8, rtol=0)


def test_with_more_weights_than_outputs_and_no_damping_outputs_go_straight() -> None:
    module = Product(1.0, 2.0)
    path = geodesic(field_of(module), None, torch.tensor([1.0, 0.5]), 1.0, damping=0, steps=8)
    assert torch.allclose(image(module, path.points)[:, 0], 2.0 + path.lengths, atol=1e-9)
    assert path.output_length == pytest.approx(1.0, abs=1e-9) and path.energy == pytest.approx(0.5, abs=1e-9)


def test_a_linear_model_is_flat_under_any_damping() -> None:
    net = nn.Linear(3, 2)
    field, theta = field_of(net, torch.randn(4, 3)), torch.zeros(8)
    v = direction(8)
    path = geodesic(field, theta, v, 3.0, damping=0.7)
    speed = float((field.at(theta).norm(v) ** 2 + 0.7 * v.square().sum()).sqrt())
    assert len(path) == 2 and torch.allclose(path.end, 3.0 * v / speed)
    assert path.damping == 0.7 and path.arc_length == pytest.approx(3.0) and path.energy == pytest.approx(1.5)


def test_one_logistic_weight_moves_its_angle_evenly() -> None:
    net = nn.Linear(1, 1, bias=False)
    nn.init.constant_(net.weight, -0.4)
    path = geodesic(field_of(net, torch.ones(1, 1), "bernoulli"), None, torch.ones(1), 0.4, damping=0, steps=4)
    angles = 2 * torch.asin(torch.sigmoid(path.points[:, 0]).sqrt())
    assert torch.allclose(angles - angles[0], path.lengths, atol=1e-8)


@given(st.integers(0, 10**6))
@settings(max_examples=2)
def test_acceleration_is_that_of_christoffel_symbols(seed: int) -> None:
    net, x = mlp(seed)
    field, damping = field_of(net, x), 0.3
    theta, v = field.map.point(), direction(field.space.dim, seed)

    def pushed_metric(at: Tensor) -> Tensor:
        field.space.assign_(net, at)
        root = oracles.root(net, x)
        return root.T @ (root @ v) / len(x)

    slopes = oracles.slope(pushed_metric, theta, 1e-4)  # [i, j] = d_j (g v)_i
    field.space.assign_(net, theta)
    dense = oracles.root(net, x)
    damped = dense.T @ dense / len(x) + damping * torch.eye(len(v))
    expected = -torch.linalg.solve(damped, slopes @ v - slopes.T @ v / 2)
    found = Flow(as_chart(field), damping)(theta, v[None]).change[0]
    assert oracles.relative(found, expected) < 1e-6


NETWORKS = {"tanh": lambda: mlp(), "gelu": lambda: _convnet(), "layer_norm": lambda: build("encoder", 1)}


def _convnet() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 2, 3, padding=1)
    return nn.Sequential(convolution, nn.GELU(), nn.Flatten(), nn.Linear(32, 3)), torch.randn(4, 1, 4, 4)


@pytest.mark.parametrize("name", NETWORKS)
def test_damped_speed_is_conserved_and_that_of_the_outputs_is_not(name: str) -> None:
    net, x = NETWORKS[name]()
    field = field_of(net, x)
    path = geodesic(field, None, direction(field.space.dim), 1.0, damping=0.05, rtol=3e-4)
    assert path.ok and path.lengths[-1] == 1.0
    assert path.speed_error < 1e-3 and path.speeds[0] == pytest.approx(1)
    assert float((path.output_speeds / path.output_speeds[0] - 1).abs().max()) > 10 * path.speed_error
    metric = field.at(path.end)
    v = path.velocities[-1]
    assert path.output_speeds[-1] == pytest.approx(float(metric.norm(v)))
    assert path.speeds[-1] == pytest.approx(float((metric.norm(v) ** 2 + 0.05 * v.square().sum()).sqrt()))


def test_there_and_back_in_pieces_with_inner_products_kept() -> None:
    net, x = mlp()
    field = field_of(net, x)
    start, v = field.map.point(), direction(field.space.dim)
    vectors = torch.stack([direction(len(v), 5), direction(len(v), 6)])
    options: dict[str, Any] = {"damping": 0.3}
    whole = geodesic(field, None, v, 0.4, steps=2, carry=vectors, **options)
    first = geodesic(field, start, v, 0.2, steps=1, **options)
    second = geodesic(field, first.end, first.velocities[-1], 0.2, steps=1, **options)
    assert torch.allclose(second.end, whole.end, atol=1e-10)
    back = geodesic(field, whole.end, -whole.velocities[-1], 0.4, steps=2, **options)
    assert torch.allclose(back.end, start, atol=1e-5)

    def products(metric: Metric, rows: Tensor) -> Tensor:
        images = metric.root(rows)
        return images @ images.T / metric.num_examples + 0.3 * rows @ rows.T

    ahead, after = (torch.cat([whole.velocities[[i]], whole.carried[i]]) for i in (0, -1))
    assert torch.allclose(products(field.at(start), ahead), products(field.at(whole.end), after), atol=1e-5)
    assert torch.equal(whole.carried[0], vectors)


def test_coefficients_of_an_orthogonal_basis_are_the_same_geometry() -> None:
    net, x = mlp()
    field = field_of(net, x)
    start, v = field.map.point(), direction(field.space.dim)
    turn = torch.linalg.qr(torch.randn(len(v), len(v))).Q
    chart = Chart(field, columns(turn.T))
    found = geodesic(chart, None, turn.T @ v, 0.5, damping=0.1, method="rk4", steps=2)
    expected = geodesic(field, None, v, 0.5, damping=0.1, method="rk4", steps=2)
    assert torch.allclose(found.weights(), expected.weights(), atol=1e-10)
    assert torch.allclose(chart.named(torch.zeros(len(v)))["0.weight"], net[0].weight)  # type: ignore[index]
    assert torch.allclose(found.weights(0), start)


def test_what_is_followed_can_be_written_and_nothing_else_changes() -> None:
    net, x = mlp()
    field = field_of(net, x)
    before = field.map.point()
    path = geodesic(field, None, direction(len(before)), 0.3)
    assert torch.equal(field.map.point(), before)
    assert path.damping == pytest.approx(1e-3 * field.at().trace().value / field.at().rank_bound)
    assert path.apply_(net) is net and torch.equal(field.map.point(), path.end)


class Kink(Surface):
    def embed(self, q: Tensor) -> Tensor:
        return torch.stack([q[0], q[1].relu()])


class Wall(Surface):
    def embed(self, q: Tensor) -> Tensor:
        return torch.stack([q[0], (1 - q[1]).sqrt()])


def test_the_record_says_what_went_wrong() -> None:
    path = geodesic(field_of(Sphere(1.0, 0.0)), None, torch.tensor([0.1, 1.0]), 3.0, damping=0, max_steps=3)
    assert path.outcome is Outcome.MAX_ITERATIONS and "max_steps" in path.message and 0 < path.lengths[-1] < 3
    kink = geodesic(field_of(Kink(0.0, -0.5)), None, torch.tensor([0.0, 1.0]), 1.0, damping=0.1)
    assert kink.speed_error > 1  # the metric jumps, and the equation cannot know
    wall = geodesic(field_of(Wall(0.0, 0.0)), None, torch.tensor([1.0, 1.0]), 5.0, damping=0.1, steps=2)
    assert wall.outcome is Outcome.NOT_FINITE and "not finite" in wall.message and len(wall) < 3
    net, x = mlp()
    single = field_of(net.float(), x.float())
    poor = geodesic(single, None, direction(single.space.dim), 1.0, damping=1e-12)
    assert not poor.ok and len(poor) == 1 and "residual" in poor.message and poor.speed_error == 0
    assert geodesic(single, None, direction(single.space.dim), 0.5, damping=0.1).speed_error < 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"velocity": torch.zeros(2)}, "velocity"),
        ({"velocity": torch.ones(3)}, "velocity"),
        ({"theta": torch.ones(3)}, "theta"),
        ({"length": 0.0}, "length"),
        ({"damping": -1.0}, "damping"),
        ({"method": "euler"}, "dopri5"),
        ({"method": "rk4"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"carry": torch.ones(2)}, "carry"),
    ],
)
def test_bad_arguments_are_named(change: dict, words: str) -> None:
    arguments: dict[str, Any] = {"theta": None, "velocity": torch.ones(2), "length": 1.0} | change
    with pytest.raises(ValueError, match=words):
        geodesic(field_of(Sphere(1.0, 0.0)), **arguments)


def test_charts_check_their_parts() -> None:
    field = field_of(Sphere(1.0, 0.0))
    with pytest.raises(TypeError, match="Chart"):
        geodesic(field.at(), None, torch.ones(2), 1.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="basis"):
        Chart(field, columns(torch.ones(1, 3)))
    with pytest.raises(ValueError, match="origin"):
        Chart(field, columns(torch.ones(1, 2)), torch.zeros(3))
    with pytest.raises(ValueError, match="origin"):
        Chart(field, None, torch.zeros(2))
