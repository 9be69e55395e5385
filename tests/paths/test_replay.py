"""The published path: its distance, its projection, its steps by hand, its frozen teacher, and its end."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths.toys import draw, inputs, kept_of, loaded, mlp, stored, weight_names
from torch import Tensor, nn

from fipgeo import MetricField, PathResult, StepControl, walk
from fipgeo.paths import Kept, Position
from fipgeo.paths.correctors import NoCorrection
from fipgeo.paths.driver import Method
from fipgeo.paths.objectives.replay import Replay, bhattacharyya

ALWAYS = StepControl(initial=1.0, smallest=1.0, largest=1.0, tolerance=1.0)


def replayed(model: nn.Module, objective: Replay, *, statistics: bool = False, seed: int = 0) -> PathResult:
    method = Method(ALWAYS, NoCorrection(statistics=statistics), damping=None)
    return walk(MetricField(model, inputs()), objective, method, generator=seed)


def by_definition(f: Tensor, f0: Tensor) -> Tensor:
    return -(f.softmax(-1) * f0.softmax(-1)).sqrt().sum(-1).log()


@given(st.integers(0, 10**6))
def test_the_distance_is_the_definition_and_a_quarter_of_kl_nearby(seed: int) -> None:
    f, f0 = draw(seed, 2, 7, 5)
    assert torch.allclose(bhattacharyya(f, f0), by_definition(f, f0), atol=1e-12)
    assert torch.allclose(bhattacharyya(f, f + 3.0), torch.zeros(7), atol=1e-12)
    near, p = f + 1e-3 * f0, f.log_softmax(-1)
    kl = (p.exp() * (p - near.log_softmax(-1))).sum(-1)
    assert torch.allclose(bhattacharyya(f, near), kl / 4, rtol=1e-2)


def test_the_distance_of_certain_opposites_is_finite_with_a_finite_slope() -> None:
    f = torch.tensor([2000.0, 0.0], requires_grad=True)
    value = bhattacharyya(f, torch.tensor([0.0, 2000.0]))
    value.backward()
    assert float(value.detach()) > 900 and f.grad is not None and bool(torch.isfinite(f.grad).all())


@given(st.integers(0, 10**6))
def test_one_step_is_the_formula(seed: int) -> None:
    """Against plain torch: gradient of the definition, magnitude projection by a threshold, a step of length lr."""
    model, x = mlp(seed), inputs()
    kept = kept_of(model, x)
    objective = Replay(0.5, steps=10, refresh=1, lr=0.02, weight=0.3, batch_size=len(x))
    start = kept.start + 0.3 * draw(seed + 1, len(kept.start))
    state = objective.begin(kept, Position(start))
    proposal = objective.propose(kept, Position(start), state, 1.0, lambda *_: None, torch.Generator().manual_seed(0))
    other = loaded(model, kept.function.map.named(start))
    by_definition(other(x), model(x).detach()).mean().backward()
    gradient = torch.cat([p.grad.flatten() for p in other.parameters() if p.grad is not None])
    names = weight_names(model)
    flat = torch.cat([p.detach().flatten() for n, p in other.named_parameters() if n in names])
    threshold = flat.abs().sort().values[round(0.5 * len(flat)) - 1]
    away = [p.detach() * (p.abs() <= threshold) * (n in names) for n, p in other.named_parameters()]
    u = gradient + 0.3 * torch.cat([part.flatten() for part in away])
    expected = start - 0.02 * u / u.norm()
    assert torch.allclose(proposal.position.theta, expected, atol=1e-12)
    assert bool(proposal.free.all()) and proposal.moves is None


@pytest.mark.parametrize("norm", [False, True])
def test_the_end_is_exactly_sparse_and_nothing_of_the_model_has_changed(norm: bool) -> None:
    model = mlp(norm=norm, dropout=True)
    before = copy.deepcopy(model.state_dict())
    path = replayed(model, Replay(0.7, steps=7, refresh=3, lr=0.05), statistics=norm)
    total = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    end = stored(path[-1])
    assert path.outcome == "reached" and len(path) == 4
    assert sum(int((end[name] == 0).sum()) for name in weight_names(model)) == round(0.7 * total)
    assert [point.sparsity for point in path][:-1] == [0.0, 0.0, 0.0]
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items()) and not model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_teacher_is_the_start_and_stays() -> None:
    """At the start nothing is to be brought back; elsewhere the gradient does not depend on what was walked between."""
    model, x = mlp(), inputs()
    kept = kept_of(model, x)
    objective = Replay(0.5)
    assert float(objective.gradient(kept, Position(kept.start), x).norm()) < 1e-12
    away = Position(kept.start + 0.1)
    first = objective.gradient(kept, away, x)
    replayed(model, Replay(0.5, steps=5, refresh=5))
    assert torch.equal(objective.gradient(kept, away, x), first) and float(first.norm()) > 1e-6


def test_the_same_seed_walks_the_same_path() -> None:
    paths = [replayed(mlp(), Replay(0.5, steps=6, refresh=2, batch_size=8), seed=seed) for seed in (3, 3, 4)]
    ends = [torch.cat([t.flatten() for t in stored(path[-1]).values()]) for path in paths]
    assert torch.equal(ends[0], ends[1]) and not torch.equal(ends[0], ends[2])


def test_statistics_are_taken_only_where_they_help() -> None:
    model = mlp(norm=True)
    kept = kept_of(model, inputs())
    position = Position(kept.start, kept.function.map.normalisation())
    free, random = torch.ones_like(kept.start, dtype=torch.bool), torch.Generator()

    def corrected(at: Position, final: bool, corrector: NoCorrection) -> Position:
        return corrector.correct(kept, at, free, {}, random, final=final).position

    assert corrected(position, True, NoCorrection(statistics=True)) is position  # nothing to win at the start
    off = Position(kept.start, {key: value + 2 for key, value in position.buffers.items()})
    assert corrected(off, False, NoCorrection(statistics=True)) is off
    assert corrected(off, True, NoCorrection()) is off
    assert kept.loss(corrected(off, True, NoCorrection(statistics=True))) < kept.loss(off)


@pytest.mark.parametrize("options", [{"target": 1.0}, {"target": -0.1}, {"lr": 0.0}, {"steps": 0}, {"weight": -1.0}])
def test_numbers_out_of_range_are_named(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Replay(**({"target": 0.5} | options))  # type: ignore[arg-type]


def test_a_mask_leaves_padding_out() -> None:
    """Outputs `[n, T, C]`: what stands at masked positions does not move the gradient."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()
    x, mask = draw(0, 5, 7, 4), torch.arange(7).expand(5, 7) < 4
    other = torch.where(mask[..., None], x, 9.0)
    gradients = []
    for batch in (x, other):
        field = MetricField(model, batch, mask=lambda b: (torch.arange(7) < 4).expand(len(b), 7))
        kept = Kept.of(field.function, field.map.point())
        gradients.append(Replay(0.5).gradient(kept, Position(kept.start + 0.1), batch))
    assert torch.allclose(gradients[0], gradients[1], atol=1e-12)
