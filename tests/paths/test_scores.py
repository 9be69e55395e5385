"""Scores of weights and groups: the metric, what a layer sees, the inverse, and objects of one's own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo.paths import Kept, Position
from fipgeo.paths.objectives import (
    SCORES,
    Blocks,
    Columns,
    Lamp,
    Local,
    LocalInverse,
    Magnitude,
    MetricScore,
    Pattern,
    Rows,
    Score,
    Survivors,
    Unstructured,
    weight_mask,
)
from fipgeo.paths.objectives.allocation import Units

from .test_patterns import conv_net, images, sparse
from .toys import draw, filled, inputs, jacobian_by_backward, kept_of, mlp, stored

SEEDS = st.integers(0, 10**6)


def survivors(kept: Kept, pattern: Pattern, zero: Tensor | None = None) -> tuple[Survivors, Units]:
    counted = weight_mask(kept.function.map)
    held = torch.zeros_like(counted) if zero is None else zero
    groups = pattern.groups(kept.function.map, counted, None)
    theta = torch.where(held, 0, kept.start)
    at = Survivors(kept, Position(theta), (groups >= 0) & ~held, counted)
    return at, Units.among(groups, groups >= 0, held, counted)


@pytest.mark.parametrize("pattern", [Unstructured(), Rows(), Columns(), Blocks(2, 3)], ids=str)
def test_the_metric_values_a_group_by_its_joint_change(pattern: Pattern) -> None:
    module, x = mlp(4, hidden=4), inputs(5, 10)
    at, units = survivors(kept_of(module, x), pattern)
    jacobian = jacobian_by_backward(module, x)
    moved = torch.stack([jacobian[:, units.of == u] @ at.position.theta[units.of == u] for u in range(units.count)])
    exact = moved.square().sum(1) / len(x)
    source = torch.Generator().manual_seed(0)
    draws = torch.stack([MetricScore(1, 5).units(at, units.of, units.count, source) for _ in range(300)])
    error = draws.std(0) / len(draws) ** 0.5
    assert float((error / exact).max()) < 0.2  # else the next line could not fail
    assert bool(((draws.mean(0) - exact).abs() < 4.5 * error).all())
    if isinstance(pattern, Rows):  # cross terms matter: the sum over members is another number
        diagonal = (at.position.theta.square() * jacobian.square().sum(0) / len(x))[units.of >= 0]
        assert abs(float(diagonal.sum() / exact.sum()) - 1) > 0.05


def test_single_weights_of_a_small_problem_are_valued_exactly() -> None:
    module, x = mlp(4, hidden=4), inputs(5, 10)
    at, _ = survivors(kept_of(module, x), Unstructured())
    jacobian = jacobian_by_backward(module, x)
    exact = at.position.theta.square() * jacobian.square().sum(0) / len(x)
    rows = len(jacobian)
    few, many = (MetricScore(n, 1).weights(at, torch.Generator().manual_seed(0)) for n in (rows, rows - 1))
    torch.testing.assert_close(few, exact, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(many, exact, rtol=1e-3)  # one output more than the estimate pulls back


def test_the_joint_value_of_single_weights_is_the_diagonal() -> None:
    at, units = survivors(kept_of(mlp(4, norm=True), inputs(5, 16)), Unstructured())
    score = MetricScore(4, 8, batch_statistics=True)
    joint = score.units(at, units.of, units.count, torch.Generator().manual_seed(1))
    single = score.weights(at, torch.Generator().manual_seed(1))
    torch.testing.assert_close(joint, single[units.of >= 0])


def test_batch_statistics_undo_the_scale_of_a_channel() -> None:
    # one weight feeds a normalised unit: without batch statistics it matters, with them it is only a scale
    model = nn.Sequential(nn.Linear(1, 3, bias=False), nn.BatchNorm1d(3, eps=1e-12), nn.Linear(3, 3))
    filled(model, 2)
    model = model.double().eval()
    at, _ = survivors(kept_of(model, draw(0, 30, 1)), Unstructured())
    first = slice(0, 3)
    running = MetricScore(8, 10).weights(at, torch.Generator().manual_seed(0))[first]
    batch = MetricScore(8, 10, batch_statistics=True).weights(at, torch.Generator().manual_seed(0))[first]
    assert bool((batch < 1e-9 * running).all()) and bool((running > 1e-6).all())


@given(SEEDS)
@settings(max_examples=4)
def test_local_scores_are_those_of_each_maps_own_inputs(seed: int) -> None:
    module, x = mlp(seed), inputs(seed, 20)
    kept = kept_of(module, x)
    zero = weight_mask(kept.function.map) & (draw(seed, len(kept.start)) > 0.8)
    at, _ = survivors(kept, Unstructured(), zero)
    module.load_state_dict(kept.function.map.named(at.position.theta))
    hidden = [x, module[:2](x).detach()]
    for name, h in zip(("0.weight", "2.weight"), hidden, strict=True):
        w = module.get_parameter(name).detach()
        where, gram = kept.function.map.space.slices()[name], h.T @ h / len(x)
        power = (h @ w.T).square().mean()
        source = torch.Generator()
        found = Local().weights(at, source)[where].reshape(w.shape)
        torch.testing.assert_close(found, w.square() * h.square().mean(0) / power)
        inverse = LocalInverse(relative=False, damping=0.1).weights(at, source)[where].reshape(w.shape)
        mu = 0.1 * gram.diagonal().mean()
        for row, values in zip(w, inverse, strict=True):
            for j in row.nonzero()[:, 0].tolist():
                others = [i for i in row.nonzero()[:, 0].tolist() if i != j]  # least squares over the others, by hand
                small = gram[others][:, others] + mu * torch.eye(len(others)).double()
                left = gram[j, j] + mu - gram[j, others] @ torch.linalg.solve(small, gram[others, j])
                torch.testing.assert_close(values[j], row[j].square() * left)


def test_local_scores_read_kernels_groups_of_convolutions_and_say_what_they_cannot() -> None:
    x = images(0, channels=4)
    kept = kept_of(conv_net(0, groups=2), x)
    at, _ = survivors(kept, Unstructured())
    w = kept.function.map.named(kept.start)["0.weight"]
    patches = torch.nn.functional.unfold(x, (3, 2)).transpose(1, 2).reshape(-1, 2, 12)
    second = patches.square().mean(0).reshape(2, 1, 2, 3, 2).expand(2, 5, 2, 3, 2).reshape(w.shape)
    found = Local(relative=False).weights(at, torch.Generator())[: w.numel()].reshape(w.shape)
    torch.testing.assert_close(found, w.square() * second)

    table = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3)).double()
    at, _ = survivors(kept_of(table, torch.randint(6, (9, 2))), Unstructured())
    with pytest.raises(ValueError, match="score: '0.weight' is not"):
        Local().weights(at, torch.Generator())


def test_a_score_may_be_an_object_of_ones_own() -> None:
    class Late(Score):
        def weights(self, at: Survivors, generator: torch.Generator) -> Tensor:
            return torch.arange(len(at.alive), 0, -1.0)

    path = sparse(mlp(0), inputs(), 0.25, Unstructured(), score=Late())
    assert bool((stored(path[-1])["2.weight"].reshape(-1)[-12:] == 0).all())
    assert [type(s) for s in SCORES.values()] == [MetricScore, Magnitude, Lamp, Local, LocalInverse]
