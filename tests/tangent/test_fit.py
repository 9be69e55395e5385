"""Losses as published, and the fit without epochs against a dense least-squares solution."""

import math

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import EXAMPLES, build, cut
from torch import Tensor, nn
from torch.nn import functional as F

import fipgeo
from fipgeo import TangentModel, fit_square_, rescaled_square_loss
from fipgeo.linalg import Identity, Outcome
from fipgeo.tangent import tangent_norm

seeds = st.integers(0, 2**31)


def problem(name: str, seed: int, kappa: float) -> tuple[TangentModel, object, Tensor, Tensor, Tensor]:
    """A model with inputs and labels, its dense Jacobian, and what its outputs lack of their targets."""
    module, x = build(name, seed)
    model = TangentModel(module)
    jacobian = oracles.root(module, x)
    with torch.no_grad():
        start = model(**x) if isinstance(x, dict) else model(x)
    y = torch.randint(start.shape[-1], start.shape[:-1], generator=torch.Generator().manual_seed(seed))
    return model, x, y, jacobian, (kappa * F.one_hot(y, start.shape[-1]) - start).flatten()


@pytest.mark.parametrize("name", ["convnet", "encoder", "lstm", "weight_norm", "text", "scaled_dot_product"])
@settings(max_examples=3)
@given(
    seed=st.integers(0, 100),
    ridge=st.sampled_from([1e-1, 1e-3]),
    gap=st.sampled_from([1e-2, 1e-5]),
    method=st.sampled_from(["auto", "cg", "dual"]),
)
def test_the_gap_is_a_bound_and_is_what_was_asked_for(
    name: str, seed: int, ridge: float, gap: float, method: str
) -> None:
    model, x, y, jacobian, lack = problem(name, seed, 5.0)
    count, dim = len(lack), jacobian.shape[1]
    both = torch.cat([jacobian / math.sqrt(count), math.sqrt(ridge) * torch.eye(dim)])
    best = torch.linalg.lstsq(both, torch.cat([lack / math.sqrt(count), torch.zeros(dim)])).solution

    def objective(tau: Tensor) -> float:
        return float((jacobian @ tau - lack).square().sum() / count + ridge * tau.square().sum())

    data = [(x, y)] if isinstance(x, dict) else (x, y)
    batch_size = None if isinstance(x, dict) else 2
    fit = fit_square_(model, data, kappa=5.0, ridge=ridge, gap=gap, method=method, batch_size=batch_size)
    assert method in ("auto", fit.method) and (fit.num_products == 0) == (fit.method == "dual")
    found = objective(model.space.ravel(model.tangents()).detach())
    assert fit.ok and math.isclose(fit.objective, found, rel_tol=1e-9)
    assert -1e-12 <= found - objective(best) <= fit.gap + 1e-12 * fit.start
    assert fit.gap <= gap * fit.start * (1 + 1e-9)
    assert math.isclose(fit.start, float(lack.square().sum()) / count, rel_tol=1e-12)


def test_a_fit_goes_on_from_where_the_model_is() -> None:
    model, x, y, _, _ = problem("convnet", 1, 15.0)
    batches = [(part, labels) for part, labels in zip(cut(x, 2, 3), y.split([2, 3]), strict=True)]
    first = fit_square_(model, batches, ridge=1e-3, method="cg")
    again = fit_square_(model, batches, ridge=1e-3, method="cg")
    assert again.num_products < first.num_products / 2 and again.ok
    short = fit_square_(model.assign_({}), batches, ridge=1e-3, gap=1e-9, max_iters=2)
    assert not short.ok and short.outcome is Outcome.MAX_ITERATIONS
    assert short.objective - first.objective <= short.gap
    free = fit_square_(model, batches, ridge=0.0, gap=1e-6)
    assert free.gap == math.inf and free.objective < 1e-6


def test_a_small_ridge_makes_the_dual_system_no_harder() -> None:
    model, x, y, jacobian, lack = problem("convnet", 3, 15.0)
    ridge, few = 1e-9, 3
    short = fit_square_(model, (x, y), ridge=ridge, max_iters=few)
    exact = fit_square_(model, (x, y), ridge=ridge, gap=1e-9)
    assert (short.method, short.ok) == ("cg", False) and (exact.method, exact.ok) == ("dual", True)
    kernel = jacobian @ jacobian.T + ridge * len(lack) * torch.eye(len(lack))
    tau = jacobian.T @ torch.linalg.solve(kernel, lack)
    assert (model.space.ravel(model.tangents()).detach() - tau).norm() < 1e-4 * tau.norm()


@given(seed=st.integers(0, 100), ridge=st.sampled_from([1e-1, 1e-3]), beta=st.sampled_from([0.1, 10.0]))
def test_a_penalty_is_part_of_the_objective(seed: int, ridge: float, beta: float) -> None:
    model, x, y, jacobian, lack = problem("mlp", seed, 5.0)
    assert isinstance(x, Tensor)
    elsewhere = torch.randn(4, *x.shape[1:], generator=torch.Generator().manual_seed(seed + 1))
    metric = fipgeo.metric(model.base, elsewhere, geometry="euclidean", params=model.names)
    other = oracles.root(build("mlp", seed)[0], elsewhere)
    fit = fit_square_(model, (x, y), kappa=5.0, ridge=ridge, gap=1e-9, penalty=beta * metric.operator)
    count, dim = len(lack), jacobian.shape[1]
    drift = beta * other.T @ other / 4
    system = jacobian.T @ jacobian / count + drift + ridge * torch.eye(dim)
    best = torch.linalg.solve(system, jacobian.T @ lack / count)
    tau = model.space.ravel(model.tangents()).detach()
    rest = (jacobian @ tau - lack).square().sum() / count
    assert fit.ok and fit.method == "cg"
    assert math.isclose(fit.objective, float(rest + tau @ drift @ tau + ridge * tau @ tau), rel_tol=1e-9)
    assert ridge * float((tau - best).square().sum()) <= fit.gap + 1e-12


def test_components_that_know_the_others_metric_sum_to_the_joint_model() -> None:
    """Every one solves the joint system for its own right-hand side."""
    module, x = build("mlp", 5)
    y, ridge = torch.arange(EXAMPLES) % 3, 1e-2
    whole = TangentModel(module)
    fit_square_(whole, (x, y), kappa=5.0, ridge=ridge, gap=1e-12)
    parts, share = [], EXAMPLES // 2
    for name, own, rest in (("a", slice(share), slice(share, None)), ("b", slice(share, None), slice(share))):
        n, others = len(y[own]), len(y[rest])
        metric = fipgeo.metric(module, x[rest], geometry="euclidean")
        model, penalty = TangentModel(module), others / n / 3 * metric.operator
        fit_square_(model, (x[own], y[own]), kappa=5.0, ridge=ridge * EXAMPLES / n, gap=1e-12, penalty=penalty)
        parts.append(fipgeo.Component.of(model, name))
    tau = whole.space.ravel(whole.tangents()).detach()
    found = fipgeo.compose(module, parts, "sum")
    assert (found.space.ravel(found.tangents()) - tau).norm() < 1e-4 * tau.norm()
    apart = []
    for own in (slice(share), slice(share, None)):
        model = TangentModel(module)
        fit_square_(model, (x[own], y[own]), kappa=5.0, ridge=ridge, gap=1e-12)
        apart.append(model.space.ravel(model.tangents()).detach())
    assert (sum(apart) - tau).norm() > 0.1 * tau.norm()


def test_some_weights_alone_are_fitted() -> None:
    module, x = build("mlp", 2)
    y = torch.arange(EXAMPLES) % 3
    model, whole = TangentModel(module, "2.*"), TangentModel(module)
    part, full = (fit_square_(m, (x, y), ridge=1e-3, gap=1e-8) for m in (model, whole))
    assert full.objective < part.objective < part.start
    reached = rescaled_square_loss(model(x), y) + 1e-3 * tangent_norm(model, squared=True)
    assert math.isclose(part.objective, reached.item(), rel_tol=1e-9)


@given(seed=seeds, kappa=st.floats(0.5, 20))
def test_the_loss_is_a_mean_over_examples_and_classes(seed: int, kappa: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    f, y = torch.randn(4, 3, 5, generator=generator), torch.randint(5, (4, 3), generator=generator)
    total = 0.0
    for row, label in zip(f.reshape(-1, 5), y.reshape(-1), strict=True):
        for c in range(5):
            total += (float(row[c]) - (kappa if c == int(label) else 0.0)) ** 2
    assert math.isclose(float(rescaled_square_loss(f, y, kappa)), total / f.numel(), rel_tol=1e-12)
    assert math.isclose(float(rescaled_square_loss(f, y, kappa, reduction="sum")), total, rel_tol=1e-12)
    shares = F.one_hot(y, 5).to(f)
    assert torch.equal(rescaled_square_loss(f, shares, kappa), rescaled_square_loss(f, y, kappa))


def test_the_norm_and_its_square() -> None:
    model = TangentModel(nn.Linear(3, 2))
    tangent_norm(model).backward()
    assert all(t.grad is not None and not t.grad.any() for t in model.tangents().values())
    model.assign_({"weight": torch.full((2, 3), 2.0), "bias": torch.tensor([3.0, 0.0])})
    assert math.isclose(tangent_norm(model, squared=True).item(), 33.0)
    assert math.isclose(tangent_norm(model, eps=1e-6).item(), math.sqrt(33 + 1e-6))


def test_what_does_not_fit_is_named() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    model = TangentModel(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="expected a ridge"):
        fit_square_(model, (x, y), ridge=-1.0)
    with pytest.raises(ValueError, match="expected a ridge"):
        fit_square_(model, (x, y), gap=0.0)
    for method, ridge in [("lsmr", 1e-3), ("dual", 0.0)]:
        with pytest.raises(ValueError, match="expected 'auto', 'cg', or 'dual' with a ridge"):
            fit_square_(model, (x, y), ridge=ridge, method=method)
    for penalty, method in ((Identity(8), "dual"), (Identity(3), "cg"), (-Identity(8), "cg")):
        with pytest.raises(ValueError, match=r"expected a psd operator \[8, 8\]"):
            fit_square_(model, (x, y), penalty=penalty, method=method)
    with pytest.raises(ValueError, match="with labels y"):
        fit_square_(model, x)
    with pytest.raises(ValueError, match="output_fn"):
        fit_square_(TangentModel(build("tuple_output")[0]), (x, y))
    with pytest.raises(ValueError, match="expected classes"):
        rescaled_square_loss(torch.zeros(4, 2), torch.zeros(4, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="expected shares"):
        rescaled_square_loss(torch.zeros(4, 2), torch.zeros(4))
