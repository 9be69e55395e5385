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
from fipgeo.data import as_batches
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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [*MODELS, "words"])
@given(seed=seeds)
@settings(max_examples=3)
def test_expansions_are_the_derivative(name: str, kind: str, seed: int) -> None:
    if name == "words":
        base = shaken(Words(), seed).eval()
        vectors = [TaskVector.between(base, shaken(base, seed + i)) for i in (1, 2)]
        x = torch.randint(7, (6, 5), generator=torch.Generator().manual_seed(seed))
    else:
        base, vectors, x = bank(name, seed, 2)
    model = Composition(base, vectors, KINDS[kind])
    c = 0.3 * draw(seed, *model.coefficients.shape)
    f, a = Expander(model)(c, (x,))
    expected, slope = derivative(model, c, x)
    torch.testing.assert_close(f, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(a, slope.reshape(a.shape), rtol=1e-8, atol=1e-9)


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
    torch.testing.assert_close(model.coefficients.detach().flatten(), expected, rtol=1e-5, atol=1e-6)


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
    fit_(one, (x, y), ridge=0.1, steps=3)
    half = [Goal((x, y), weight=0.25), Goal((x, y), weight=0.75, output_fn=lambda out: out)]
    fit = fit_(two, half, ridge=0.1, steps=3)
    torch.testing.assert_close(two.coefficients, one.coefficients, rtol=1e-6, atol=1e-8)
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
    assert fit.passes[0] == 1.0 and fit.passes[-1] <= fit.passes[0] + 2 * 3 * (1 + 2 + 2 + 1 + 9) / 3
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
