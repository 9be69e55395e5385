"""Linear compositions against a dense Jacobian, and their fits against dense least squares."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fipgeo import Composition, TangentModel, TaskVector, WeightSpace
from fipgeo.atlas import PerBlock, fit_
from fipgeo.atlas.expansion import Expander

from .test_composition import KINDS, bank, columns, draw

seeds = st.integers(0, 2**20)


def expanded(base: nn.Module, model: Composition, vectors: list[TaskVector], x: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs at theta_0 and J B, dense."""
    space = WeightSpace.of(base)

    def outputs(theta: Tensor) -> Tensor:
        return functional_call(base, space.unravel(theta), (x,))

    start = space.point(base)
    return outputs(start), jacrev(outputs)(start) @ columns(model, vectors, space)


@pytest.mark.parametrize("kind", ["isotropic", "per block", "partitions"])
@pytest.mark.parametrize("name", ["mixed", "tied"])
@given(seed=seeds)
@settings(max_examples=2)
def test_outputs_and_gradients_are_those_of_the_expansion(name: str, kind: str, seed: int) -> None:
    base, vectors, x = bank(name, seed)
    model = Composition(base, vectors, KINDS[kind], linear=True).train()
    f, a = expanded(base, model, vectors, x)
    c = 0.5 * draw(seed, *model.coefficients.shape)
    with torch.no_grad():
        model.coefficients.copy_(c)
    expected = f + a @ c.flatten()
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(model.merge()(x), expected, rtol=1e-9, atol=1e-10)
    loss = model(x).square().sum()
    loss.backward()
    assert model.coefficients.grad is not None
    gradient = 2 * (expected[..., None] * a).sum((0, 1))
    torch.testing.assert_close(model.coefficients.grad.flatten(), gradient, rtol=1e-8, atol=1e-9)
    model.coefficients.grad.zero_()
    with model.once():
        model(x).square().sum().backward()
    torch.testing.assert_close(model.coefficients.grad.flatten(), gradient, rtol=1e-8, atol=1e-9)
    found, derivative = Expander(model)(c, x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(derivative, a.reshape(derivative.shape), rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(Expander(model).outputs(c, x), expected, rtol=1e-8, atol=1e-9)


@given(seed=seeds, ridge=st.sampled_from([0.0, 1e-2]))
@settings(max_examples=3)
def test_the_square_loss_is_solved_in_closed_form(seed: int, ridge: float) -> None:
    base, vectors, x = bank("mixed", seed)
    x = torch.cat([x, draw(seed + 1, 20, *x.shape[1:])])
    model = Composition(base, vectors, PerBlock(), linear=True, start=0.1)
    f, a = expanded(base, model, vectors, x)
    y = draw(seed + 2, *f.shape)
    fit = fit_(model, (x, y), loss="square", ridge=ridge)
    rows, rest = a.flatten(0, 1), (y - f).flatten()
    n = len(x)
    if ridge:
        rows = torch.cat([rows, (n * ridge) ** 0.5 * torch.eye(rows.shape[1])])
        rest = torch.cat([rest, torch.zeros(rows.shape[1])])
    best = torch.linalg.lstsq(rows, rest, driver="gelsd").solution
    least = float((rows @ best - rest).square().sum()) / 2 / n
    assert fit.ok and fit.steps == 1
    assert fit.losses[-1] == pytest.approx(least, rel=1e-5)
    assert float((y - model(x).detach()).square().sum()) / 2 / n <= least * (1 + 1e-5)


def test_other_losses_have_one_minimum_whatever_the_start() -> None:
    base, vectors, x = bank("tied", 3)
    labels = torch.tensor([0, 1, 1, 0, 1])
    ends = []
    for start in (-1.0, 0.0, 2.0):
        model = Composition(base, vectors, linear=True, start=start)
        assert fit_(model, (x, labels), ridge=1e-2, rtol=1e-8, steps=20).ok
        ends.append(model.coefficients.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-3, atol=1e-4)


def test_it_is_a_module_like_any_other(tmp_path: Path) -> None:
    base, vectors, x = bank("mixed", 4)
    model = Composition(base, vectors, linear=True, start=0.2).train()
    before = {name: t.clone() for name, t in model.module.state_dict().items()}
    expected = model(x)
    assert all(torch.equal(t, before[name]) for name, t in model.module.state_dict().items())
    torch.testing.assert_close(copy.deepcopy(model)(x), expected)
    merged = model.merge()
    assert isinstance(merged, TangentModel) and merged.names == model.names
    torch.testing.assert_close(model.float()(x.float()), expected.float(), rtol=1e-4, atol=1e-4)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["coefficients"]
    model.save(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="has the flag linear True, this composition False"):
        Composition(base, vectors).load_(tmp_path / "c.safetensors")
    still = Composition(base, [vectors[0] * 0.0], linear=True)
    torch.testing.assert_close(still(x), base(x))
