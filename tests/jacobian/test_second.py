"""Second derivatives against two other routes: differences of reverse-mode slopes, and Hessians of single outputs."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fipgeo.jacobian.second import SecondOrder, second_derivative, taylor
from fipgeo.jacobian.second_check import second_derivative_gap
from fipgeo.outputs import GEOMETRIES, Categorical, Geometry, as_geometry

from .. import oracles
from ..hygiene import unchanged
from ..models import CASES, build, cut
from .second_cases import (
    KINDS,
    NO_FORWARD,
    NO_HESSIAN,
    NO_SLOPE_TWICE,
    WRONG_IN_TORCH,
    by_differences,
    by_differences_of_outputs,
    by_hessians,
    by_torch,
    direction,
    function_of,
    line,
    make,
)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, record_property: Callable[[str, object], None]) -> None:
    module, inputs = make(kind)
    function = function_of(module, inputs)
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    found = SecondOrder(function, theta)
    assert found.route == ("reverse" if kind in NO_FORWARD else "forward")
    z, first, second = found.taylor(theta, v)
    assert second.norm() > 1e-3 * z.norm()
    outputs_only = by_differences_of_outputs(function, theta, v)
    assert oracles.relative(second, outputs_only) < 1e-6
    assert oracles.relative(z, line(function, theta, v)(torch.tensor(0.0)).detach()) < 1e-12
    if kind not in NO_SLOPE_TWICE:
        assert oracles.relative(second, by_differences(function, theta, v)) < 1e-8
        assert oracles.relative(first, oracles.root(module, inputs) @ v) < 1e-10
    if kind not in NO_SLOPE_TWICE | NO_HESSIAN and kind != "checkpoint":
        expected = by_hessians(module, inputs, v, [v, w], as_geometry("euclidean"))
        assert oracles.relative(second, expected[0]) < 1e-9
        assert oracles.relative(found.second(theta, v, w), expected[1]) < 1e-9
    try:
        gap = oracles.relative(by_torch(module, function, theta, v), second)
    except RuntimeError:  # no such derivative in torch
        return
    record_property("gap of torch's nested jvp", gap)
    assert kind in WRONG_IN_TORCH or gap < 1e-8, "silently wrong in torch, and missing in the list"


@pytest.mark.parametrize("name", CASES)
def test_every_network_of_the_table(name: str) -> None:
    module, inputs = build(name)
    function = function_of(module, cut(inputs, 2, 3))
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    found = SecondOrder(function, theta)
    z, first, second = found.taylor(theta, v)
    assert found.route == "forward" and found.error < 1e-9
    assert oracles.relative(second, by_differences(function, theta, v)) < 1e-7
    with function.map.frozen():
        assert oracles.relative(z, line(function, theta, v)(torch.tensor(0.0))) < 1e-12
    assert oracles.relative(first, oracles.root(module, inputs) @ v) < 1e-10
    if name != "weight_norm":  # torch's own Hessians are wrong there
        expected = by_hessians(module, inputs, v, [v, w], as_geometry("euclidean"))
        assert oracles.relative(second, expected[0]) < 1e-9
        assert oracles.relative(found.second(theta, v, w), expected[1]) < 1e-9


EVERY_GEOMETRY = [(name, g) for name in ("mlp", "text") for g in (*GEOMETRIES, Categorical(4.0))]


@pytest.mark.parametrize(("name", "geometry"), [*EVERY_GEOMETRY, ("encoder", "categorical")], ids=str)
def test_every_geometry(name: str, geometry: str | Geometry) -> None:
    module, inputs = build(name)
    function = function_of(module, inputs, geometry)
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    expected = by_hessians(module, inputs, v, [v, w], function.geometry)
    assert oracles.relative(second_derivative(function, theta, v), expected[0]) < 1e-9
    assert oracles.relative(second_derivative(function, theta, v, w), expected[1]) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "encoder", "weight_norm", "lstm"])
def test_routes_agree(name: str) -> None:
    module, inputs = build(name)
    function = function_of(module, cut(inputs, 2, 3))
    theta, v, w = function.map.point(), direction(function, 5, 2), direction(function, 6, 2)
    made = SecondOrder(function, theta)
    for other in (None, w, w[0]):
        expected = made.taylor(theta, v, other)
        for route, tolerance in {"forward": 1e-11, "reverse": 1e-11, "difference": 1e-8}.items():
            found = SecondOrder(function, theta, survey=made.survey, route=route)
            assert found.route == route
            for a, b in zip(found.taylor(theta, v, other), expected, strict=True):
                assert a.shape == b.shape and a.dtype == torch.float64 and not a.requires_grad
                assert oracles.relative(a, b) < tolerance


def test_stacks_are_single_directions_side_by_side() -> None:
    for name in ("mlp", "encoder", "in_place", "text"):
        module, inputs = build(name)
        function = function_of(module, cut(inputs, 2, 3))
        theta, v, w = function.map.point(), direction(function, 5, 5), direction(function, 6, 5)
        made = SecondOrder(function, theta, chunk=2)
        found, mixed = made.taylor(theta, v), made.second(theta, v, w)
        assert found.first.shape == found.second.shape == mixed.shape == (5, len(found.value)) and made.vectorised
        for i in range(5):
            single = made.taylor(theta, v[i])
            assert oracles.relative(found.first[i], single.first) < 1e-12
            assert oracles.relative(found.second[i], single.second) < 1e-12
            assert oracles.relative(mixed[i], made.second(theta, v[i], w[i])) < 1e-12


@settings(max_examples=4)
@given(
    name=st.sampled_from(["mlp", "encoder", "scaled_dot_product", "gru", "text", "weight_norm"]),
    seed=st.integers(0, 2**20),
    factor=st.floats(-30, 30),
)
def test_it_is_a_symmetric_bilinear_form(name: str, seed: int, factor: float) -> None:
    module, inputs = build(name, seed)
    function = function_of(module, inputs, "logits")
    theta, v, w = function.map.point(), direction(function, seed), direction(function, seed + 1)
    made = SecondOrder(function, theta)
    vv, ww, vw = made.second(theta, v), made.second(theta, w), made.second(theta, v, w)
    size = vv.norm() + ww.norm()
    assert (made.second(theta, factor * v) - factor**2 * vv).norm() <= 1e-11 * factor**2 * size
    assert (made.second(theta, w, v) - vw).norm() < 1e-11 * size
    assert (made.second(theta, v, v) - vv).norm() < 1e-11 * size
    both = made.second(theta, torch.stack([v + w, v - w]))
    assert (both.sum(0) - 2 * vv - 2 * ww).norm() < 1e-11 * size
    assert (both[0] - both[1] - 4 * vw).norm() < 1e-11 * size


@settings(max_examples=4)
@given(
    name=st.sampled_from(["mlp", "encoder", "text", "convnet"]),
    seed=st.integers(0, 2**20),
    sizes=st.sampled_from([(1, 4), (4, 1), (2, 3), (1, 1, 1, 1, 1)]),
)
def test_batches_do_not_matter(name: str, seed: int, sizes: tuple[int, ...]) -> None:
    module, inputs = build(name, seed)
    whole, parts = function_of(module, inputs), function_of(module, cut(inputs, *sizes))
    theta, v = whole.map.point(), direction(whole, seed, 2)
    for a, b in zip(taylor(whole, theta, v), taylor(parts, theta, v), strict=True):
        assert oracles.relative(a, b) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_gap_is_small_and_the_caller_finds_everything_as_it_was(name: str) -> None:
    module, inputs = build(name)
    batches = cut(inputs, 2, 3)
    with unchanged(module, batches):
        function = function_of(module, batches)
        made = SecondOrder(function, function.map.point())
        made.taylor(function.map.point(), direction(function, 5, 2))
        SecondOrder(function, function.map.point(), route="reverse").taylor(function.map.point(), direction(function))
        found = second_derivative_gap(function, function.map.point(), direction(function))
    assert found.gap < 1e-6 and found.kinked == 0 and found.dtype == torch.float64 and found.rounding < 1e-12
    assert f"z'' by {found.route} mode is" in found.explain() and "no kink" in found.explain()
