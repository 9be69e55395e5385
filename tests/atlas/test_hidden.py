"""Classifiers of all layers, against ridge regression on the features written out, and evidence against densities."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.nn import functional as F

from fipgeo import Composition, TaskVector
from fipgeo.atlas import HiddenClassifier, fit_hidden_
from fipgeo.atlas.hidden import evidence

from .test_composition import draw

seeds = st.integers(0, 2**20)


class Net(nn.Module):
    """A convolution, a norm with statistics, and linear maps of tokens and of features."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.token, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x)).relu()
        return self.last(self.token(h.flatten(2).mT).relu().mean(1))


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().double().eval()


def images(seed: int, count: int = 12, classes: int = 3) -> tuple[Tensor, Tensor]:
    y = torch.arange(count) % classes
    return draw(seed, count, 2, 6, 6) + draw(99, classes, 2, 6, 6)[y], y


def seen(model: nn.Module, x: Tensor, cells: list[int]) -> list[Tensor]:
    """The features, written out."""
    assert isinstance(model, Net)
    h = model.norm(model.conv(x)).relu().flatten(2).mT
    deep = model.token(h).relu().mean(1)
    parts = [x.unflatten(3, (c, -1)).unflatten(2, (c, -1)) for c in cells]
    pooled = [torch.cat([p.mean((3, 5)), p.amax((3, 5))], 1).flatten(1) for p in parts]
    return [*pooled, torch.cat([h.mean(1), h.amax(1)], 1), deep, model.last(deep)]


@torch.no_grad()
@given(seed=seeds, cells=st.sampled_from([[1], [1, 3], [2]]))
@settings(max_examples=6, deadline=None)
def test_scores_are_ridge_regression_on_all_that_the_maps_see(seed: int, cells: list[int]) -> None:
    model, (x, y), (new, _) = net(seed), images(seed), images(seed + 1, 5)
    found = HiddenClassifier(model, (x, y), cells=cells, early=0.0)
    parts = []
    for a, b in zip(seen(model, x, cells), seen(model, new, cells), strict=True):
        scale = (a.std(0) + 0.1 * a.std(0).mean()) * ((3 + len(cells)) * a.shape[1]) ** 0.5
        parts.append(((a - a.mean(0)) / scale, (b - a.mean(0)) / scale))
    h, other = (torch.cat(p, 1) for p in zip(*parts, strict=True))
    marks = F.one_hot(y).double()
    weight = torch.linalg.solve(h.T @ h + found.ridge * torch.eye(h.shape[1]), h.T @ (marks - marks.mean(0)))
    torch.testing.assert_close(found(new), other @ weight + marks.mean(0))


@given(seed=seeds)
@settings(max_examples=6, deadline=None)
def test_evidence_is_the_best_of_gaussian_densities(seed: int) -> None:
    rows, targets = draw(seed, 7, 4), draw(seed + 1, 7, 2)
    kernel = rows @ rows.T
    found = evidence(kernel, targets)

    def density(ridge: float) -> float:
        cov, total = kernel + ridge * torch.eye(7), 0.0
        for y in targets.T:
            noise = y @ torch.linalg.solve(cov, y) / 7
            total += float(MultivariateNormal(torch.zeros(7).double(), noise * cov).log_prob(y))
        return total

    constant = density(found.ridge) - float(found.log)
    assert constant == pytest.approx(density(2.0) - float(evidence_at(kernel, targets, 2.0)), abs=1e-6)
    unit = float(torch.linalg.eigvalsh(kernel).mean())
    tried = [found.ridge * factor for factor in (0.3, 0.7, 1.5, 4.0)]
    assert all(density(found.ridge) >= density(r) - 1e-9 for r in tried if 1e-5 * unit <= r <= 100 * unit)
    idle = evidence(kernel, torch.cat([targets, torch.zeros(7, 1)], 1))
    assert float(idle.log) == float(found.log)


def evidence_at(kernel: Tensor, targets: Tensor, ridge: float) -> float:
    """At another ridge, but for the same constant."""
    cov = kernel + ridge * torch.eye(len(kernel))
    noise = (targets * torch.linalg.solve(cov, targets)).sum(0) / len(kernel)
    return float(-(len(kernel) * noise.log().sum() + targets.shape[1] * torch.logdet(cov)) / 2)


def test_evidence_has_the_slope_of_its_values() -> None:
    rows, targets, way = draw(3, 6, 8), draw(4, 6, 2), draw(5, 6, 8)
    leaf = rows.clone().requires_grad_()
    evidence(leaf @ leaf.T, targets).log.backward()
    assert leaf.grad is not None
    ridge, step = evidence(rows @ rows.T, targets).ridge, 1e-5
    values = [evidence_at((r := rows + sign * step * way) @ r.T, targets, ridge) for sign in (1, -1)]
    assert float((leaf.grad * way).sum()) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_coefficients_make_the_labels_more_probable_and_leave_the_network_as_it_was() -> None:
    model, data = net().train(), images(1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    vectors = [TaskVector({k: 0.3 * draw(i, *t.shape) for k, t in model.named_parameters()}) for i in range(3)]
    composition = Composition(model, vectors)
    start = HiddenClassifier(model, data)
    assert len(start.maps) == 3  # the convolution is the first third
    found = fit_hidden_(composition, data, steps=10)
    assert found.evidence > start.evidence and bool(composition.coefficients.any())
    assert composition.coefficients.grad is None and model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(found(data[0]), HiddenClassifier(composition.merge(), data)(data[0]))
    cut = [(data[0][:5], data[1][:5]), (data[0][5:], data[1][5:])]
    torch.testing.assert_close(HiddenClassifier(model, cut)(data[0]), start(data[0]))


def test_of_several_starts_the_most_probable_is_taken() -> None:
    model, data = net(), images(1)
    vectors = [TaskVector({k: 0.3 * draw(i, *t.shape) for k, t in model.named_parameters()}) for i in range(3)]
    composition, starts = Composition(model, vectors), (-0.7, 0.4, 1.5)
    values = {0.0: HiddenClassifier(model, data).evidence}
    for start in starts:
        values[start] = HiddenClassifier(Composition(model, vectors, start=start).merge(), data).evidence
    best = max(values, key=lambda start: values[start])
    found = fit_hidden_(composition, data, starts=starts, steps=0)
    assert composition.coefficients.eq(best).all() and found.evidence == pytest.approx(values[best])
    others = [start for start in starts if start != best]
    fit_hidden_(composition, data, starts=others, steps=0)  # what it has is a start as well
    assert composition.coefficients.eq(best).all() and composition.coefficients.grad is None
    fitted = fit_hidden_(composition, data, starts=starts, steps=5)
    assert fitted.evidence > values[best]
    calls: list[int] = []

    def broken(x: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 2:
            raise RuntimeError("out of memory")
        return torch.ones(len(x), 1, dtype=torch.bool)

    unlucky = Composition(model, vectors)
    with pytest.raises(RuntimeError, match="out of memory"):
        fit_hidden_(unlucky, data, mask=broken, starts=(5.0, 6.0))
    assert float(unlucky.coefficients.detach().unique()) in (0.0, 5.0)  # never one that was only being tried
    single = Composition(model, vectors)
    fit_hidden_(single, (data[0][:2], torch.arange(2)), starts=starts, steps=0)  # one of each tells nothing
    assert not single.coefficients.any()


def test_padding_is_not_seen_where_a_mask_says_what_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()
    x, y, noise = draw(6, 7, 4, 3), torch.arange(7) % 3, 9 * draw(7, 7, 2, 3)
    padded, living = torch.cat([noise, x], 1), torch.tensor([[False, False, True, True, True, True]])
    known = HiddenClassifier(model, (x, y))
    masked = HiddenClassifier(model, (padded, y), mask=lambda batch: living.expand(len(batch), -1))
    torch.testing.assert_close(masked(padded), known(x))
    assert not torch.allclose(HiddenClassifier(model, (padded, y))(padded), known(x))
    composition = Composition(model, [TaskVector({k: draw(8, *t.shape) for k, t in model.named_parameters()})])
    mask = lambda batch: living.expand(len(batch), -1)  # noqa: E731
    one, other = (fit_hidden_(copy.deepcopy(composition), d, mask=m) for d, m in (((x, y), None), ((padded, y), mask)))
    torch.testing.assert_close(other(padded), one(x))
    with pytest.raises(ValueError, match=r"mask: gave shape \[7, 6\] for 7 examples"):
        HiddenClassifier(model, (padded, y), mask=lambda batch: torch.zeros(len(batch), 6))


def test_what_cannot_be_classified_is_said() -> None:
    model, (x, y) = net(), images(0)
    for data, says in (((x, y.double()), "needs classes"), (x, "needs classes"), ((x[:1], y[:1]), "1 examples of one")):
        with pytest.raises(ValueError, match=says):
            HiddenClassifier(model, data)
    with pytest.raises(ValueError, match=r"cells, early: got \[0\] and"):
        HiddenClassifier(model, (x, y), cells=[0])
    with pytest.raises(ValueError, match=r"no nn\.Linear or convolution"):
        HiddenClassifier(nn.Flatten(), (x, y))
    with pytest.raises(ValueError, match="got a linear composition"):
        fit_hidden_(Composition(model, [TaskVector({"last.bias": draw(0, 2)})], linear=True), (x, y))
