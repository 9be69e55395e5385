"""Layer-local correction: the closed form is a regression on the support, and nothing is made worse."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo.data import ListBatches
from fipgeo.paths import Correction, Corrector, Kept, Position
from fipgeo.paths.correctors import local
from fipgeo.paths.correctors.local import LayerLocal, closest
from fipgeo.paths.layers import layer_grams

from .test_layers import Attention, Convs, Tied, moved
from .toys import draw, filled, inputs, kept_of, mlp, same_bits, same_tensors

SEEDS = st.integers(0, 10**6)
EXACT = LayerLocal(damping=1e-12, positions=None)


def correct(
    corrector: Corrector, kept: Kept, position: Position, free: Tensor, state: Mapping[str, Tensor] | None = None
) -> Correction:
    return corrector.correct(kept, position, free, state or {}, torch.Generator().manual_seed(0))


def regression(x: Tensor, y: Tensor, now: Tensor, free: Tensor) -> Tensor:
    """Row by row: the weights `[out, k]` nearest to y `[L, out]` on their support, the others as they are."""
    rows = []
    for target, row, mask in zip(y.T, now, free, strict=True):
        best = torch.linalg.lstsq(x[:, mask], target - x[:, ~mask] @ row[~mask]).solution
        rows.append(row.clone().masked_scatter(mask, best))
    return torch.stack(rows)


@pytest.mark.parametrize("max_bytes", [1, 2**30])
@given(seed=SEEDS)
@settings(max_examples=4)
def test_a_linear_layer_becomes_the_regression_on_its_support(max_bytes: int, seed: int) -> None:
    model, x = filled(nn.Linear(5, 3), seed), inputs(seed, 40)
    kept = kept_of(model, x, "euclidean")
    position, free = moved(kept, seed + 1), draw(seed + 2, 18) > 0
    found = correct(replace(EXACT, max_bytes=max_bytes, sequential=False), kept, position, free).position.theta
    ones = torch.cat([x, torch.ones(40, 1)], 1)
    joined = torch.cat([position.theta[:15].view(3, 5), position.theta[15:, None]], 1)
    mask = torch.cat([free[:15].view(3, 5), free[15:, None]], 1)
    best = regression(ones, model(x).detach(), joined, mask)
    torch.testing.assert_close(found, torch.cat([best[:, :5].reshape(-1), best[:, 5]]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("stride", "groups", "padding"), [(1, 1, 0), (2, 2, 1), (1, 4, 2)])
def test_a_convolution_becomes_the_regression_on_its_patches(stride: int, groups: int, padding: int) -> None:
    layer = nn.Conv2d(4, 4, 3, stride, padding, groups=groups, bias=False)
    model, x = filled(Convs(layer), 0), draw(1, 12, 4, 6, 6)
    kept = kept_of(model, x, "euclidean")
    position = moved(kept, 1)
    free = draw(2, len(position.theta)) > 0
    grams = layer_grams(kept, position, gaps=True, positions=None)["layer.weight"]
    shape = layer.weight.shape
    rows = grams.rows(free.view(shape))
    step = closest(grams, torch.cat([rows, torch.zeros_like(rows[..., :1])], -1), 1e-12, 2**20)
    found = position.theta.view(shape) + grams.restored(step[..., :-1], shape)
    columns = F.unfold(x, 3, 1, padding, stride).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    target = layer(x).detach().flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1))
    for g in range(groups):
        now = grams.rows(position.theta.view(shape))[g]
        best = regression(columns[g], target[:, g], now, rows[g])
        torch.testing.assert_close(grams.rows(found)[g], best, rtol=1e-6, atol=1e-7)


def test_the_damped_closed_form_is_the_regression_with_extra_rows(generator: torch.Generator) -> None:
    model, x = filled(nn.Linear(5, 3, bias=False), 0), inputs(0, 20)
    kept = kept_of(model, x, "euclidean")
    position, free = moved(kept, 1), torch.rand(3, 5, generator=generator) > 0.4
    grams = layer_grams(kept, position, gaps=True)["weight"]
    mu = 0.3 * float(x.square().mean())
    step = closest(grams, torch.cat([free, torch.zeros(3, 1, dtype=torch.bool)], 1)[None], 0.3, 2**20)[0, :, :-1]
    longer = torch.cat([x / 20**0.5, mu**0.5 * torch.eye(5)])
    gap = torch.cat([(model(x) - x @ position.theta.view(3, 5).T) / 20**0.5, torch.zeros(5, 3)]).detach()
    torch.testing.assert_close(step, regression(longer, gap, torch.zeros(3, 5), free))


def test_rows_too_wide_to_factor_are_solved_by_conjugate_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = kept_of(mlp(0), inputs())
    position, free = moved(kept, 1), draw(2, len(kept.start)) > -0.5
    factored = correct(LayerLocal(), kept, position, free).position.theta
    monkeypatch.setattr(local, "MAX_SUPPORT", 1)
    iterated = correct(LayerLocal(), kept, position, free).position.theta
    torch.testing.assert_close(iterated, factored, rtol=1e-2, atol=1e-2)
    assert not same_bits(iterated, factored)


def test_deeper_layers_see_corrected_inputs_and_one_sweep_restores_a_network_whose_weights_are_all_free() -> None:
    kept = kept_of(mlp(0), inputs())
    position, free = moved(kept, 1), torch.ones_like(kept.start, dtype=torch.bool)
    found = correct(EXACT, kept, position, free)
    assert kept.loss(found.position) < 1e-12 * kept.loss(position)
    apart = correct(replace(EXACT, sequential=False), kept, position, free)
    assert kept.loss(apart.position) > kept.loss(found.position)


def test_one_pass_of_everything_equals_a_pass_for_each_map() -> None:
    model, x = mlp(0), inputs()
    kept, free = kept_of(model, x), draw(2, len(kept_of(model, x).start)) > 0
    position = moved(kept, 1)
    batches = ListBatches(list(x.split(16)))  # as if their shapes did not let them be joined
    function = replace(kept.function, batches=batches)
    pieces = replace(kept, function=function, batches=batches, reference=tuple(kept.reference[0].split(16)))
    together, apart = correct(EXACT, kept, position, free), correct(EXACT, pieces, position, free)
    torch.testing.assert_close(apart.position.theta, together.position.theta, rtol=1e-7, atol=1e-7)
    assert apart.cost > together.cost


@pytest.mark.parametrize("sequential", [True, False])
@given(seed=SEEDS, norm=st.booleans(), size=st.floats(-3, 1).map(lambda e: 10.0**e))
@settings(max_examples=4)
def test_the_residual_never_rises_and_frozen_weights_stay_bit_for_bit(
    sequential: bool, seed: int, norm: bool, size: float
) -> None:
    kept = kept_of(mlp(seed, norm=norm), inputs(seed + 1, 30))
    position, free, state = moved(kept, seed + 2, size), draw(seed + 3, len(kept.start)) > 0, {}
    for _ in range(2):
        found = correct(LayerLocal(sequential=sequential), kept, position, free, state)
        assert kept.loss(found.position) <= kept.loss(position)
        assert same_bits(found.position.theta[~free], position.theta[~free])
        position, state = found.position, found.state


def test_runs_repeat_and_nothing_of_the_arguments_or_the_model_changes() -> None:
    model = mlp(1, norm=True).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kept = kept_of(model, inputs())
    position, free = moved(kept, 1), draw(2, len(kept.start)) > 0
    held = position.theta.clone()
    one, two = correct(LayerLocal(), kept, position, free), correct(LayerLocal(), kept, position, free)
    same_tensors({"theta": one.position.theta, **one.state}, {"theta": two.position.theta, **two.state})
    assert same_bits(position.theta, held) and model.training
    same_tensors(before, model.state_dict())


def test_with_no_free_weight_nothing_moves_and_at_the_start_the_function_stays() -> None:
    kept = kept_of(mlp(0), inputs())
    none = torch.zeros_like(kept.start, dtype=torch.bool)
    position = moved(kept, 1)
    assert same_bits(correct(LayerLocal(), kept, position, none).position.theta, position.theta)
    assert kept.loss(correct(LayerLocal(), kept, Position(kept.start), ~none).position) < 1e-20


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_with_padding_is_corrected(batch_first: bool, masked: bool) -> None:
    model = filled(Attention(batch_first), 0).eval()
    x, mask = draw(1, 12, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]] * 6, dtype=torch.bool)
    kept = kept_of(model, {"x": x, "mask": mask}, mask="mask" if masked else None)
    position, free = moved(kept, 2), draw(3, len(kept.start)) > -1
    found = correct(LayerLocal(), kept, position, free)
    assert kept.loss(found.position) < kept.loss(position)


def test_what_padding_holds_does_not_matter() -> None:
    model = filled(Attention(True), 0).eval()
    x, mask = draw(1, 12, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]] * 6, dtype=torch.bool)
    other = torch.where(mask[..., None], x, 100.0)
    thetas = []
    for values in (x, other):
        kept = kept_of(model, {"x": values, "mask": mask}, mask="mask")
        free = draw(3, len(kept.start)) > -1
        thetas.append(correct(LayerLocal(), kept, moved(kept, 2), free).position.theta)
    torch.testing.assert_close(thetas[0], thetas[1])


def test_shared_weights_and_batches_of_unlike_shapes() -> None:
    model = filled(Tied(), 0)
    source = torch.Generator().manual_seed(0)
    batches = [torch.randint(7, (4, length), generator=source) for length in (2, 3, 5)]
    kept = kept_of(model, batches, output_fn=lambda out: out.mean(1))
    position, free = moved(kept, 1, 0.1), torch.ones_like(kept.start, dtype=torch.bool)
    found = correct(LayerLocal(), kept, position, free)
    assert kept.loss(found.position) < kept.loss(position)
    table = kept.function.map.space.slices()["table.weight"]
    assert same_bits(found.position.theta[table], position.theta[table])


class Growing(nn.Module):
    """Its outputs leave the range of floats unless its weights are just so."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(torch.exp(self.layer(x)))


def test_a_position_that_overflows_is_no_error() -> None:
    kept = kept_of(filled(Growing(), 0), 0.1 * inputs(0, 20), "euclidean")
    position = Position(kept.start + 10)
    assert kept.loss(position) == float("inf")
    free = torch.ones_like(kept.start, dtype=torch.bool)
    assert kept.loss(correct(LayerLocal(), kept, position, free).position) < float("inf")
