"""The solver against dense linear algebra, and the expansions it solves against plain autograd."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from fipgeo import Composition, TaskVector, metric
from fipgeo.atlas import Goal, Isotropic, Kind, Partitions, PerBlock, PerLayer, fit_, square
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.goals import Term
from fipgeo.atlas.proximal import Problem
from fipgeo.atlas.solve import Descent, Objective, farthest
from fipgeo.data import ListBatches, TensorBatches, as_batches
from fipgeo.linalg import Outcome

from ..models import Tied
from ..test_task_vectors import shaken
from .test_composition import MODELS, bank, draw

KINDS: dict[str, Kind] = {"isotropic": Isotropic(), "per block": PerBlock(), "partitions": Partitions(3)}
seeds = st.integers(0, 2**20)


class Words(nn.Module):
    """Embeddings with positions, a layer norm, a weight used as it is, a convolution of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.places = nn.Parameter(torch.ones(1, 4, 5))
        self.conv = nn.Conv1d(4, 4, 3, groups=2)
        self.norm = nn.LayerNorm(4)
        self.mix = nn.Parameter(torch.eye(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(self.table(x).transpose(1, 2) + self.places).transpose(1, 2)
        return self.head(torch.tanh(self.norm(h) @ torch.tanh(self.mix)))


def derivative(model: Composition, c: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    def f(c: Tensor) -> Tensor:
        return functional_call(model.module, model.weights(c), (x,))

    return f(c), jacrev(f)(c).flatten(-2)


def given_bank(name: str, seed: int) -> tuple[nn.Module, list[TaskVector], Tensor]:
    """A network, two vectors and inputs."""
    if name != "words":
        return bank(name, seed, 2)
    base = shaken(Words(), seed).eval()
    vectors = [TaskVector.between(base, shaken(base, seed + i)) for i in (1, 2)]
    return base, vectors, torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*MODELS, "words"])
@given(seed=seeds)
@settings(max_examples=3)
def test_expansions_are_the_derivative(name: str, kind: str, seed: int) -> None:
    base, vectors, x = given_bank(name, seed)
    model = Composition(base, vectors, KINDS[kind])
    c = 0.3 * draw(seed, *model.coefficients.shape)
    f, a = Expander(model)(c, (x,))
    expected, slope = derivative(model, c, x)
    torch.testing.assert_close(f, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a, slope.reshape(a.shape), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["mixed", "words"])
@given(seed=seeds)
@settings(max_examples=2)
def test_directions_are_those_of_the_derivative(name: str, seed: int) -> None:
    base, vectors, x = given_bank(name, seed)
    model = Composition(base, vectors)
    c = 0.3 * draw(seed, *model.coefficients.shape)
    f, a = Expander(model)(c, (x,))
    u = draw(seed + 1, 3, *f.shape)
    again, along = Expander(model).along(c, (x,), lambda _, __: u)
    torch.testing.assert_close(again, f)
    torch.testing.assert_close(along, torch.einsum("mno,nor->nmr", u.flatten(2), a), rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("most", [64, 2])
@pytest.mark.parametrize("kind", KINDS)
@given(seed=seeds)
@settings(max_examples=2)
def test_the_objective_has_the_slope_of_autograd_by_both_ways(kind: str, most: int, seed: int) -> None:
    base, vectors, x = bank("mixed", seed, 2)
    model = Composition(base, vectors, KINDS[kind])
    with torch.no_grad():
        model.coefficients.copy_(0.2 * draw(seed, *model.coefficients.shape))
    y = torch.arange(len(x)) % model(x).shape[-1]
    terms = [Term.of(model, Goal((x, y), weight=-0.5)), Term.of(model, Goal(x, "entropy"))]
    objective = Objective(model, terms, [term.batches for term in terms], 0.3)
    logs = model(x).log_softmax(1)
    loss = -0.5 * nn.functional.cross_entropy(model(x), y) - (logs.exp() * logs).sum(1).mean()
    loss = loss + 0.15 * model.coefficients.square().sum()
    (slope,) = torch.autograd.grad(loss, model.coefficients)
    c = model.coefficients.detach()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fipgeo.atlas.solve.METRIC", most)
        first = objective.metric(c, torch.Generator())
    assert len(first[0]) == 4 * min(most, len(x))  # two directions of two goals
    for value, found in (objective.slope(c), first[2:]):
        assert math.isclose(value, loss.item(), rel_tol=1e-9)
        torch.testing.assert_close(found, slope.flatten(), rtol=1e-7, atol=1e-9)


def test_the_mean_of_the_first_metrics_is_the_pulled_back_one(monkeypatch: pytest.MonkeyPatch) -> None:
    base, vectors, x = bank("tied", 3, 2)
    model = Composition(base, vectors)
    y = torch.arange(len(x)) % 2
    term = Term.of(model, Goal((x, y), weight=-2.0))
    objective = Objective(model, [term], [term.batches], 0.0)
    pulled = metric(base, [x], geometry="categorical").pullback(model.operator()).operator.to_dense()
    monkeypatch.setattr("fipgeo.atlas.solve.DIRECTIONS", 600)
    rows, signs, _, _ = objective.metric(model.coefficients.detach(), torch.Generator().manual_seed(0))
    assert bool(signs.eq(-1).all())
    torch.testing.assert_close(rows.T @ rows, 2 * pulled, rtol=0.1, atol=0.05 * float(2 * pulled.diagonal().max()))
    monkeypatch.setattr("fipgeo.atlas.solve.METRIC", 3)
    alike = Objective(model, [term], [TensorBatches((x[:1].expand(9, -1), y[:1].expand(9)))], 0.0)
    rows, _, _, _ = alike.metric(model.coefficients.detach(), torch.Generator().manual_seed(0))
    pulled = metric(base, [x[:1]], geometry="categorical").pullback(model.operator()).operator.to_dense()
    torch.testing.assert_close(rows.T @ rows, 2 * pulled, rtol=0.1, atol=0.05 * float(2 * pulled.diagonal().max()))
    monkeypatch.setattr("fipgeo.atlas.solve.DIRECTIONS", 1)
    rows, _, value, slope = objective.metric(model.coefficients.detach(), torch.Generator().manual_seed(0))
    assert len(rows) == 3 and bool(rows.any())
    cut = ListBatches([(x[:2], y[:2]), (x[2:], y[2:])])  # whole batches are told apart, not their examples
    for parts in (cut, ListBatches([(x, y)])):
        again = Objective(model, [term], [parts], 0.0)
        _, _, same, along = again.metric(model.coefficients.detach(), torch.Generator().manual_seed(0))
        assert same == pytest.approx(value)
        torch.testing.assert_close(along, slope)


def test_what_steps_cost_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    base, vectors, x = bank("tied", 5, 3)
    y = torch.arange(len(x)) % 2
    fit = fit_(Composition(base, vectors), (x, y), steps=1, rtol=0.0)
    first = len(x) * (1 + 3 + 3) / 3  # forward, the loss and two directions back, three vectors
    assert fit.passes == pytest.approx((first, first + len(x)))
    assert fit_(Composition(base, vectors), (x, y), steps=0).passes == pytest.approx((len(x) / 3,))
    monkeypatch.setattr("fipgeo.atlas.solve.METRIC", 2)
    few = fit_(Composition(base, vectors), (x, y), steps=1, rtol=0.0)
    first = 2 * (1 + 3 + 3) / 3 + len(x) - 2  # those in the metric are not gone through again
    assert few.passes == pytest.approx((first, first + len(x)))


class Bowl:
    """A square whose curvature is h times what its metric says, from a value and slope at (0, 0)."""

    ridge = 0.0

    def __init__(self, h: float) -> None:
        self.h, self.start = h, torch.tensor([-3.0, -4.0], dtype=torch.float64)

    def slope(self, c: Tensor) -> tuple[float, Tensor]:
        return float(self.start @ c + self.h / 2 * c @ c), self.start + self.h * c

    def metric(self, c: Tensor, _: torch.Generator) -> tuple[Tensor, Tensor, float, Tensor]:
        return torch.eye(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64), *self.slope(c)


@pytest.mark.parametrize(
    ("h", "reach", "after"), [(1.0, 0.5, 1.0), (0.25, 0.5, 1.0), (2.2, 5.0, 1.25), (1.95, 5.0, 2.5)]
)
def test_the_region_follows_what_steps_turn_out_to_be(h: float, reach: float, after: float) -> None:
    """As long as expected and at the rim: doubled; no fall: a quarter of the step; little fall: half of it."""
    descent = Descent(Bowl(h), torch.zeros(2, dtype=torch.float64), reach, torch.Generator())  # type: ignore[arg-type]
    gain = descent.step(0.0)
    assert descent.radius == pytest.approx(after, rel=1e-2) and gain is not None and (gain > 0) == (h < 2)


def test_the_curvature_learns_from_every_gradient() -> None:
    """Along the step it is that of the objective afterwards, also where the step is taken back."""
    for h in (0.5, 3.0):
        descent = Descent(Bowl(h), torch.zeros(2, dtype=torch.float64), 5.0, torch.Generator())  # type: ignore[arg-type]
        d = descent.curvature.step(descent.slope, descent.radius)
        descent.step(0.0)
        torch.testing.assert_close(descent.curvature(d), h * d)


def test_vectors_may_be_of_any_size() -> None:
    base, vectors, x = bank("tied", 6, 2)
    y = torch.arange(len(x)) % 2
    one, two = Composition(base, vectors), Composition(base, [vectors[0], 30.0 * vectors[1]])
    fits = [fit_(model, (x, y), steps=12, rtol=0.0) for model in (one, two)]
    assert fits[0].losses[-1] < 0.9 * fits[0].losses[0]
    torch.testing.assert_close(fits[0].losses[1:4], fits[1].losses[1:4], rtol=0.05, atol=0.0)


def test_layers_carry_the_expansion_where_they_are_known() -> None:
    base, vectors, x = bank("mixed", 3)
    expander = Expander(Composition(base, vectors))
    expander(0.1 * torch.ones(3, 11, dtype=torch.float64), (x,))
    assert expander._by_rows == {"unused", "mix", "scale"} & (expander._by_rows or set())
    assert "conv.weight" not in (expander._by_rows or ())


@given(seed=seeds)
@settings(max_examples=4)
def test_square_loss_of_a_linear_network_is_one_solve(seed: int) -> None:
    base = shaken(nn.Linear(4, 3), seed)
    vectors = [TaskVector.between(base, shaken(base, seed + i)) for i in (1, 2, 3)]
    x, y = draw(seed, 20, 4), draw(seed + 1, 20, 3)
    model, ridge = Composition(base, vectors), 0.1
    f, a = derivative(model, torch.zeros_like(model.coefficients), x)
    rows = a.flatten(0, 1)
    system = rows.T @ rows / 20 + ridge * torch.eye(rows.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(system, rows.T @ (y - f).flatten() / 20)
    fit = fit_(model, (x, y), loss="square", ridge=ridge, rtol=1e-12)
    assert fit.ok and len(fit.losses) == len(fit.passes) == fit.steps + 1
    torch.testing.assert_close(model.coefficients.detach().flatten(), expected, rtol=1e-4, atol=1e-5)


@given(seed=seeds, damping=st.sampled_from([1e3, 1e6]))
@settings(max_examples=4)
def test_a_short_step_is_the_natural_gradient(seed: int, damping: float) -> None:
    base, vectors, x = bank("tied", seed, 2)
    y = torch.arange(len(x)) % 2
    model = Composition(base, vectors)
    c = model.coefficients.detach()
    (slope,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.coefficients)
    pulled = metric(base, [x], geometry="categorical").pullback(model.operator())
    problem = Problem.at([Term.of(model, Goal((x, y)))], [as_batches((x, y))], c, 0.0)
    system = pulled.operator.to_dense() + damping * problem.weights.square().diag()
    expected = -torch.linalg.solve(system, slope.flatten())
    found = problem.solved(damping, None)
    torch.testing.assert_close(found.flatten(), expected, rtol=0.1, atol=0.02 * float(expected.norm()))


@given(seed=seeds)
@settings(max_examples=2)
def test_losses_fall_and_a_minimum_is_reached(seed: int) -> None:
    base, vectors, x = bank("tied", seed, 3)
    y = torch.randint(2, (len(x),), generator=torch.Generator().manual_seed(seed))
    model = Composition(base, vectors, PerLayer())
    (first,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), model.coefficients)
    fit = fit_(model, (x, y), ridge=0.2, steps=20, rtol=1e-6)
    assert all(later < earlier for earlier, later in zip(fit.losses, fit.losses[1:], strict=False))
    value = nn.functional.cross_entropy(model(x), y) + 0.1 * model.coefficients.square().sum()
    assert math.isclose(value.item(), fit.losses[-1], rel_tol=1e-9)
    (slope,) = torch.autograd.grad(value, model.coefficients)
    assert fit.outcome is not Outcome.NOT_FINITE and slope.norm() < 0.1 * first.norm()


def test_goals_are_summed_with_their_weights() -> None:
    base, vectors, x = bank("tied", 4, 3)
    y = torch.arange(len(x)) % 2
    one, two = Composition(base, vectors), Composition(base, vectors)
    fit_(one, (x, y), ridge=0.1, steps=80, rtol=1e-14)
    half = [Goal((x, y), weight=0.25), Goal((x, y), weight=0.75, output_fn=lambda out: out)]
    fit = fit_(two, half, ridge=0.1, steps=80, rtol=1e-14)
    torch.testing.assert_close(two.coefficients, one.coefficients, rtol=1e-4, atol=1e-5)
    assert fit_(two, half, ridge=0.1, target=fit.losses[-1] + 1e-3).steps == 0
    before = Composition(base, vectors)
    undone = fit_(before, [Goal((x, y), weight=-1.0), Goal(x, "entropy", weight=0.1)], ridge=1.0, steps=3)
    assert undone.losses[-1] < undone.losses[0]


def test_samples_and_settings() -> None:
    base, vectors, x = bank("tied", 5, 2)
    y = torch.arange(len(x)) % 2
    model = Composition(base, vectors)
    fit = fit_(model, (x, y), sample=3, steps=2, ridge=0.1, rtol=0.0)
    again = Composition(base, vectors)
    assert fit_(again, [(x, y)], sample=len(x), steps=0).steps == 0 and not again.coefficients.any()
    assert fit.passes[-1] == 3 * (1 + 3 + 2) / 3 + 2 * 3
    with pytest.raises(ValueError, match="loss: got 'hinge', expected one of"):
        fit_(model, (x, y), loss="hinge")
    with pytest.raises(ValueError, match="the loss needs labels"):
        fit_(model, x)
    with pytest.raises(ValueError, match="steps, reach, ridge, sample: got 1, 0.0"):
        fit_(model, (x, y), steps=1, reach=0.0)
    with pytest.raises(ValueError, match="goals: got goals and other things"):
        fit_(model, [Goal((x, y)), (x, y)])
    assert float(square(2.0).value(torch.zeros(1, 3), torch.tensor([1]))) == 2.0


def test_a_target_in_the_span_is_found() -> None:
    base = shaken(Tied(), 2).eval()
    vectors = [0.3 * TaskVector.between(base, shaken(base, i)) for i in (3, 4)]
    x = draw(1, 40, 4)
    model = Composition(base, vectors, Isotropic())
    y = (0.5 * vectors[0] - 0.25 * vectors[1]).apply_to(base)(x).detach()
    fit = fit_(model, (x, y), loss="square", rtol=1e-12, steps=30)
    expected = torch.tensor([[0.5], [-0.25]], dtype=torch.float64)
    torch.testing.assert_close(model.coefficients.detach(), expected, rtol=1e-4, atol=1e-4)
    assert fit.losses[-1] < 1e-8


@given(edge=st.floats(0.0, 0.999))
def test_a_way_ends_just_before_what_is_not_allowed(edge: float) -> None:
    start, end = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 2.0])
    place = float(farthest(start, end, lambda c: float(c[1]) / 2 <= edge)[1]) / 2
    assert place <= edge < place + 1 / 64
    assert torch.equal(farthest(start, end, lambda c: False), start)


@given(power=st.integers(0, 4))
def test_a_way_far_beyond_what_is_allowed_is_cut_as_finely(power: int) -> None:
    start, end, edge = torch.zeros(1), torch.ones(1, dtype=torch.float64), 0.7 * 10.0**-power
    place = float(farthest(start, end, lambda c: float(c) <= edge))
    assert place <= edge < place * (1 + 1 / 32)
