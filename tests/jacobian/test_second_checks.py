"""What second derivatives are compared with before they are believed, and what is said where they are not."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fipgeo.jacobian import second
from fipgeo.jacobian.decomposed import RULES, Decomposed
from fipgeo.jacobian.second import SecondOrder, Taylor, line_forward, second_derivative, taylor
from fipgeo.jacobian.second_check import second_derivative_gap
from fipgeo.model import NotFiniteError

from .. import oracles
from ..hygiene import unchanged
from ..models import build
from .second_cases import (
    by_differences_of_outputs,
    direction,
    function_of,
    linalg,
    make,
)


class NoSecond(nn.Module):
    """Has first derivatives in both modes, and in none a second (called so that it is not written out)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.hardsigmoid(x)


def test_a_module_without_second_derivative_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), NoSecond(), nn.Linear(4, 2), nn.Tanh())
    function = function_of(module, torch.randn(5, 3))
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    with unchanged(module), pytest.raises(NotImplementedError, match=r"model: 3 \(NoSecond\) has no second derivative"):
        second_derivative(function, theta, v)
    found = SecondOrder(function, theta, allow_finite_difference=True)
    assert found.route == "difference" and 0 < found.error < 1e-4
    expected = by_differences_of_outputs(function, theta, v)
    assert oracles.relative(second_derivative(function, theta, v, allow_finite_difference=True), expected) < 1e-6
    symmetry = oracles.relative(found.second(theta, v, w), found.second(theta, w, v))
    assert symmetry < 1e-7


def test_forward_mode_is_not_believed_where_it_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = make("solve_ex")
    function = function_of(module, inputs)
    found = SecondOrder(function, function.map.point())
    assert found.route == "reverse" and found.error < 1e-6
    assert "so reverse mode is used" in caplog.text


def test_reverse_mode_is_not_believed_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(second.LINES, "reverse", lambda *args: Taylor(*(2 * t for t in line_forward(*args))))
    module, inputs = make("LayerNorm")
    function = function_of(module, inputs)
    found = SecondOrder(function, function.map.point())
    assert found.route == "forward" and found.error < 1e-6


def test_code_that_cannot_be_seen_is_caught_by_the_comparison() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    function = function_of(scripted, torch.randn(5, 3))  # type: ignore[arg-type]
    theta, v = function.map.point(), direction(function)
    expected = by_differences_of_outputs(function, theta, v)
    assert oracles.relative(second_derivative(function, theta, v), expected) < 1e-6


def test_an_infinite_second_derivative_is_reported() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() ** 1.5

    module = nn.Sequential(nn.Linear(3, 4, bias=False), Root())
    function = function_of(module, torch.zeros(5, 3))
    with pytest.raises(NotFiniteError, match="their second derivative is not"):
        second_derivative(function, function.map.point(), direction(function))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", ["mlp", "encoder", "lstm"])
def test_low_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module, inputs = build(name)
    module, inputs = module.to(dtype), inputs.to(dtype)
    function = function_of(module, inputs)
    theta = function.map.point()
    v = torch.cat([t.reshape(-1) for t in function.map.named(direction(function)).values()]).float()
    found = taylor(function, theta, v)
    reference = copy.deepcopy(module).double()
    wide = function_of(reference, inputs.double())
    expected = SecondOrder(wide, theta.double()).taylor(theta.double(), v.double())
    assert all(t.dtype == torch.float32 for t in found)
    for a, b in zip(found, expected, strict=True):
        assert oracles.relative(a, b) < tolerance


def test_bad_arguments() -> None:
    module, inputs = build("mlp")
    function = function_of(module, inputs)
    theta, v = function.map.point(), direction(function)
    with pytest.raises(ValueError, match="route: got 'jvp', expected one of 'auto', 'forward'"):
        SecondOrder(function, theta, route="jvp")
    with pytest.raises(ValueError, match=r"theta: got shape \[3\], expected \[31\]"):
        SecondOrder(function, torch.zeros(3))
    made = SecondOrder(function, theta)
    with pytest.raises(ValueError, match=r"v: got shape \[30\], expected \[31\] or \[k, 31\]"):
        made.taylor(theta, v[1:])
    with pytest.raises(ValueError, match=r"w: got shape \[4, 31\], expected \[31\] or \[3, 31\]"):
        made.taylor(theta, v.expand(3, -1), v.expand(4, -1))
    with pytest.raises(ValueError, match="steps: got"):
        second_derivative_gap(function, theta, v, steps=(1e-5, 1e-5))
    with pytest.raises(ValueError, match="one direction .* that is not zero"):
        second_derivative_gap(function, theta, 0 * v)


def test_the_gap_is_measured_in_float64_whatever_the_model() -> None:
    module, inputs = build("encoder")
    module, inputs = module.float(), inputs.float()
    function = function_of(module, {"x": inputs})
    with unchanged(module, inputs):
        found = second_derivative_gap(function, function.map.point(), direction(function))
    assert found.gap < 1e-6 and found.dtype == torch.float64 and 1e-9 < found.rounding < 1e-4


def test_the_gap_finds_wrong_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, F.layer_norm)

    def fails(*args: object) -> Taylor:
        raise RuntimeError(args)

    monkeypatch.setitem(second.LINES, "reverse", fails)
    module, inputs = make("LayerNorm")
    function = function_of(module, inputs)
    assert second_derivative_gap(function, function.map.point(), direction(function)).gap > 1e-2


def test_kinks_are_counted_and_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2), nn.Tanh())
    inputs = torch.randn(8, 3)
    with torch.no_grad():
        module[0].bias[0] = -module[0].weight[0] @ inputs[3]  # type: ignore[index, operator]
    function = function_of(module, inputs)
    found = second_derivative_gap(function, function.map.point(), direction(function))
    assert found.kinked == 1 / 8 and found.gap < 1e-6 and min(found.gaps) > 0.9
    assert "12.5% of the outputs have a kink" in found.explain()


def bags() -> dict[str, Callable[[], Tensor]]:
    """Ways to call the function: bags as rows or by offsets, with empty ones, padding and weights."""
    table, ids = torch.randn(9, 4), torch.tensor([1, 2, 3, 2, 5, 5, 0])
    offsets = torch.tensor([0, 3, 3, 4])
    weights = torch.rand(7)
    calls: dict[str, Callable[[], Tensor]] = {}
    for mode in ("sum", "mean", "max"):
        calls[f"{mode} rows"] = lambda mode=mode: F.embedding_bag(ids[:6].view(2, 3), table, mode=mode)
        calls[f"{mode} offsets"] = lambda mode=mode: F.embedding_bag(ids, table, offsets, mode=mode)
        calls[f"{mode} padding"] = lambda mode=mode: F.embedding_bag(ids, table, offsets, mode=mode, padding_idx=2)
        ends = torch.tensor([0, 3, 3, 4, 7])
        calls[f"{mode} last"] = lambda mode=mode, ends=ends: F.embedding_bag(
            ids, table, ends, mode=mode, include_last_offset=True, padding_idx=-7
        )
    calls["weights"] = lambda: F.embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=weights)
    calls["weights, rows"] = lambda: F.embedding_bag(
        ids[:6].view(2, 3), table, mode="sum", per_sample_weights=weights[:6].view(2, 3)
    )
    return calls


@pytest.mark.parametrize("call", bags())
def test_bags_have_the_values_of_torch(call: str) -> None:
    function = bags()[call]
    torch.manual_seed(0)
    expected = function()
    with Decomposed():
        assert torch.allclose(function(), expected, rtol=1e-13)


def test_values_are_those_of_torch() -> None:
    x, a, images = torch.randn(4, 6), torch.randn(2, 3, 3), torch.randn(2, 3, 4, 4)
    mean, var, weight = torch.randn(3), torch.rand(3) + 0.5, torch.rand(3) + 0.5
    lower = linalg.cholesky(a @ a.mT + torch.eye(3))
    calls: list[Callable[[], Any]] = [
        lambda: F.layer_norm(x, (6,), x[0], x[1], 0.3),
        lambda: F.layer_norm(x.half(), (6,)),
        lambda: torch.native_layer_norm(x, (6,), x[0], None, 0.3),
        lambda: F.batch_norm(images, mean, var, weight, mean),
        lambda: F.batch_norm(images, None, None, weight, mean, training=True),
        lambda: torch.native_batch_norm(images, weight, mean, None, None, True, 0.1, 0.2),  # type: ignore[arg-type]
        lambda: F.instance_norm(images, weight=weight, bias=mean, eps=0.2),
        lambda: F.instance_norm(images, mean, var, use_input_stats=False),
        lambda: torch.instance_norm(images, weight, mean, None, None, True, 0.1, 0.2, False),
        lambda: torch.instance_norm(images, weight, mean, mean, var, False, 0.1, 0.2, False),
        lambda: torch._weight_norm(a, weight.view(1, 3, 1), 1),  # type: ignore[reportPrivateImportUsage]
        lambda: F.glu(x, 0),
        lambda: F.hardsigmoid(10 * x, inplace=True),
        lambda: [linalg.solve(a, a.sin()), linalg.solve(a, a[:, 0]), linalg.solve(a[0], a[1, 0])],
        lambda: [linalg.solve(a, a.sin(), left=False), a.det(), torch.det(a[0]), linalg.det(a - a)],
        lambda: [*a.slogdet(), *torch.slogdet(-a), torch.logdet(a), (-a).logdet()],
        lambda: [torch.cholesky_inverse(lower), lower.mT.cholesky_inverse(upper=True)],
        lambda: [torch.orgqr(a, weight.expand(2, 3)), linalg.householder_product(images, images[:, :, 0, :2])],
        lambda: linalg.slogdet(a).logabsdet,
    ]
    for number, call in enumerate(calls):
        expected, found = call(), None
        with Decomposed():
            found = call()
        pairs = [(expected, found)] if isinstance(expected, Tensor) else zip(expected, found, strict=True)
        for b, c in pairs:
            tolerance = 2e-3 if b.dtype == torch.half else 1e-10
            assert b.dtype == c.dtype and b.shape == c.shape or number == 5, number
            assert torch.allclose(b.reshape(-1), c.reshape(-1), rtol=tolerance, atol=tolerance, equal_nan=True), number
