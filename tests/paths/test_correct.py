"""Correctors: the protected loss falls, frozen weights stay bit for bit, state and randomness are explicit."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import FirstOrder, GaussNewton
from fipgeo.paths import Compensation, Correction, Corrector, Kept, Position
from fipgeo.paths.correctors import first_order

from .toys import draw, filled, inputs, kept_of, loaded, mlp, same_bits, same_tensors

SEEDS = st.integers(0, 10**6)
KINDS = {
    "gauss-newton": GaussNewton(),
    "first-order": FirstOrder(steps=20, batch_size=16, lr=0.01),
    "sgd": FirstOrder(steps=20, batch_size=16, lr=0.01, optimizer="sgd"),
    "natural": FirstOrder(steps=20, batch_size=16, lr=0.01, optimizer="natural"),
    "preconditioned": GaussNewton(steps=1, precondition=True, memory=0.5),
}
EXACT = ("gauss-newton", "preconditioned")


def perturbed(seed: int, size: float, *, norm: bool = False, x: object = None) -> tuple[Kept, Position, Tensor]:
    """A position away from the start, and a mask that frees about half of the weights."""
    kept = kept_of(mlp(seed, norm=norm), inputs(seed + 1, 30) if x is None else x)
    theta = kept.function.map.point()
    free = draw(seed + 2, len(theta)) > 0
    return kept, Position(theta + size * draw(seed + 3, len(theta)), kept.function.map.normalisation()), free


def correct(
    corrector: Corrector, kept: Kept, position: Position, free: Tensor, state: Mapping[str, Tensor] | None = None
) -> Correction:
    return corrector.correct(kept, position, free, state or {}, torch.Generator().manual_seed(0))


@given(SEEDS)
@settings(max_examples=3)
def test_a_first_order_step_has_no_unit(seed: int) -> None:
    """One step of SGD is the gradient of |z - z_0|^2 over that of the start, whatever the outputs are measured in."""
    kept, position, free = perturbed(seed, 0.1)
    step = FirstOrder(steps=1, batch_size=30, lr=0.01, optimizer="sgd", taps=None)
    moved = correct(step, kept, position, free).position.theta - position.theta
    total = sum(z0.square().sum() for z0 in kept.reference)
    slope = 2 * kept.tangent(position).root.adjoint(kept.residual(position)) / total
    torch.testing.assert_close(moved, -0.01 * slope * free, rtol=1e-6, atol=1e-9)


@given(SEEDS, st.floats(-3, 1).map(lambda e: 10.0**e), st.booleans(), st.booleans())
@settings(max_examples=4)
def test_gauss_newton_never_increases_the_loss(seed: int, size: float, norm: bool, subset: bool) -> None:
    kept, position, free = perturbed(seed, size, norm=norm)
    corrector = GaussNewton(steps=2, max_rows=30 if subset else 1024)
    before, state = kept.loss(position), {}
    for _ in range(2):
        found = correct(corrector, kept, position, free, state)
        after = kept.loss(found.position)
        assert after <= before
        position, state, before = found.position, found.state, after


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", [False, True])
@given(seed=SEEDS)
@settings(max_examples=3)
def test_all_lower_the_loss_and_leave_frozen_weights_bit_identical(kind: str, norm: bool, seed: int) -> None:
    kept, position, free = perturbed(seed, 0.2, norm=norm)
    found = correct(KINDS[kind], kept, position, free)
    if kind in EXACT or not norm:  # a few steps on batches of 16 do not make up for the noise of their statistics
        assert kept.loss(found.position) < kept.loss(position)
    else:
        assert kept.loss(found.position) < 3 * kept.loss(position)
    assert same_bits(found.position.theta[~free], position.theta[~free])
    assert bool((found.position.theta[free] != position.theta[free]).any())
    assert found.cost > 0


@pytest.mark.parametrize("kind", KINDS)
def test_with_no_free_weight_nothing_moves(kind: str) -> None:
    kept, position, free = perturbed(0, 0.2)
    found = correct(KINDS[kind], kept, position, torch.zeros_like(free))
    assert same_bits(found.position.theta, position.theta)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_start_the_function_stays(kind: str) -> None:
    kept, _, free = perturbed(0, 0.0)
    found = correct(KINDS[kind], kept, Position(kept.function.map.point()), free)
    assert kept.loss(found.position) < 1e-20
    kept, position, free = perturbed(0, 2e-16)  # no more than rounding, and nothing to walk after
    assert kept.loss(correct(KINDS[kind], kept, position, free).position) < 1e-20


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_and_state_are_not_written_to_and_runs_repeat(kind: str) -> None:
    kept, position, free = perturbed(1, 0.2, norm=True)
    held = position.theta.clone(), free.clone(), {n: t.clone() for n, t in position.buffers.items()}
    one = correct(KINDS[kind], kept, position, free)
    two = correct(KINDS[kind], kept, position, free)
    assert same_bits(position.theta, held[0]) and same_bits(free, held[1])
    same_tensors(position.buffers, held[2])
    assert same_bits(one.position.theta, two.position.theta)
    same_tensors(one.position.buffers, two.position.buffers)
    same_tensors(one.state, two.state)


def test_gauss_newton_solves_a_linear_network_in_one_step() -> None:
    model = filled(nn.Linear(5, 3), 0)
    kept = kept_of(model, inputs(0, 40), "euclidean")
    theta = kept.function.map.point()
    free = torch.ones_like(theta, dtype=torch.bool)
    found = correct(GaussNewton(steps=1, damping=1e-9), kept, Position(theta + draw(1, len(theta))), free)
    torch.testing.assert_close(found.position.theta, theta, rtol=0, atol=1e-6)


def test_gauss_newton_with_pruned_weights_reaches_the_least_squares_floor() -> None:
    # zero half of a linear layer: the best that the others can do is a regression on their own inputs
    model, x = filled(nn.Linear(5, 1), 0), inputs(0, 40)
    kept = kept_of(model, x, "euclidean")
    theta = kept.function.map.point()
    free = torch.tensor([True, False, True, False, True, True])
    found = correct(GaussNewton(steps=2, damping=1e-9), kept, Position(theta * free), free)
    columns = torch.cat([x, torch.ones(40, 1)], 1)
    target = columns @ theta
    best = torch.linalg.lstsq(columns[:, free], target).solution
    floor = float((columns[:, free] @ best - target).square().mean())
    assert kept.loss(found.position) == pytest.approx(floor, rel=1e-6)


def test_gauss_newton_remembers_its_damping() -> None:
    kept, position, free = perturbed(2, 0.1)
    first = correct(GaussNewton(steps=1), kept, position, free)
    assert float(first.state["damping"]) < GaussNewton().damping
    resumed = correct(GaussNewton(steps=1), kept, first.position, free, first.state)
    fresh = correct(GaussNewton(steps=1), kept, first.position, free)
    assert not same_bits(resumed.position.theta, fresh.position.theta)


def test_gauss_newton_takes_a_chord_step_with_the_predictors_moves() -> None:
    kept, position, free = perturbed(2, 0.1)
    moves = Compensation(kept, position, free, damping=1e-2)
    found = GaussNewton(steps=0).correct(kept, position, free, {}, torch.Generator(), moves=moves)
    assert kept.loss(found.position) < kept.loss(position)
    assert same_bits(found.position.theta[~free], position.theta[~free])


def test_the_last_correction_may_work_more() -> None:
    kept, position, free = perturbed(2, 0.3)
    corrector = FirstOrder(steps=10, final_steps=30, batch_size=16, lr=0.01)
    once = corrector.correct(kept, position, free, {}, torch.Generator())
    thrice = corrector.correct(kept, position, free, {}, torch.Generator(), final=True)
    assert thrice.cost == 3 * once.cost


@pytest.mark.parametrize(
    ("norm", "optimizer", "rate"), [(False, "adam", 2e-3), (True, "adam", 4e-3), (True, "sgd", 0.05)]
)
def test_the_rate_depends_on_the_optimizer_and_on_normalisation(norm: bool, optimizer: str, rate: float) -> None:
    kept, position, free = perturbed(2, 0.1, norm=norm)
    correctors = [FirstOrder(steps=3, optimizer=optimizer, lr=lr) for lr in (None, rate)]
    runs = [correct(corrector, kept, position, free) for corrector in correctors]
    assert same_bits(runs[0].position.theta, runs[1].position.theta)


def test_the_last_first_order_correction_takes_new_statistics_only_where_they_help() -> None:
    # outputs that are right already: the statistics at the start are not those of the inputs, so new ones are worse
    model, x = mlp(4, norm=True), inputs(5, 32)
    kept = kept_of(model, x)
    position = Position(kept.function.map.point(), kept.function.map.normalisation())
    assert kept.better_normalised(position) is position
    free = torch.zeros_like(position.theta, dtype=torch.bool)
    found = FirstOrder(final_steps=2).correct(kept, position, free, {}, torch.Generator(), final=True)
    assert kept.loss(found.position) == 0.0
    away = kept.renormalised(Position(position.theta + 0.5, position.buffers))
    assert kept.loss(kept.better_normalised(replace(away, buffers=position.buffers))) <= kept.loss(away)


def test_between_corrections_some_inputs_tell_the_statistics_and_at_the_end_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(first_order, "ROUGHLY", 10)
    kept = kept_of(mlp(4, norm=True), inputs(5, 40), batch_size=10)
    position = Position(kept.function.map.point() + 0.5, kept.function.map.normalisation())
    free, corrector = (
        torch.ones_like(position.theta, dtype=torch.bool),
        FirstOrder(steps=2, final_steps=2, batch_size=8),
    )
    rough = correct(corrector, kept, position, free)
    there = Position(rough.position.theta, position.buffers)
    same_tensors(rough.position.buffers, kept.renormalised(there, 10).buffers)
    assert any(not same_bits(t, rough.position.buffers[n]) for n, t in kept.renormalised(there).buffers.items())
    last = corrector.correct(kept, position, free, {}, torch.Generator().manual_seed(0), final=True)
    assert last.cost - rough.cost == 3 * 40 - 10
    there = Position(last.position.theta, position.buffers)
    same_tensors(last.position.buffers, kept.better_normalised(there).buffers)


def test_gauss_newton_remembers_its_moves() -> None:
    kept, position, free = perturbed(2, 0.1)
    corrector = GaussNewton(steps=1, memory=0.9, damping=1.0)
    first = correct(corrector, kept, position, free)
    move = first.position.theta - position.theta
    torch.testing.assert_close(first.state["move"], move)
    whole = correct(replace(corrector, memory=0.0), kept, position, free)
    torch.testing.assert_close(move, 0.1 * (whole.position.theta - position.theta))
    half = free & (draw(7, len(free)) > 0)
    second = correct(corrector, kept, first.position, half, first.state)
    assert same_bits(second.position.theta[~half], first.position.theta[~half])  # not carried on by what is remembered


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussNewton(memory=1.0), "memory: got 1.0"),
        (lambda: FirstOrder(optimizer="lion"), "optimizer: got 'lion', expected one of 'adam', 'sgd', 'natural'"),
    ],
)
def test_options_that_mean_nothing_are_refused(make: Callable[[], Corrector], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Growing(nn.Module):
    """Its outputs leave the range of floats after a modest step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(torch.exp(self.layer(x)))


def test_a_trial_step_that_overflows_is_refused_not_raised() -> None:
    kept = kept_of(filled(Growing(), 0), 0.1 * inputs(0, 20), "euclidean")
    theta = kept.function.map.point()
    theta[-3:] -= 4  # with such biases the Jacobian is tiny, so the undamped step is far too long
    position = Position(theta)
    found = correct(GaussNewton(damping=1e-6), kept, position, torch.ones_like(theta, dtype=torch.bool))
    assert kept.loss(found.position) <= kept.loss(position)


def test_first_order_re_estimates_normalisation_on_the_protected_inputs() -> None:
    model, x = mlp(4, norm=True), inputs(5, 32)
    kept = kept_of(model, x)
    position = Position(kept.function.map.point(), kept.function.map.normalisation())
    found = correct(KINDS["first-order"], kept, position, torch.ones_like(position.theta, dtype=torch.bool))
    hidden = x @ model[0].weight.T + model[0].bias  # type: ignore[operator]
    assert not torch.allclose(found.position.buffers["1.running_mean"], hidden.mean(0))  # the weights have moved
    tensors = kept.function.map.named(found.position.theta) | dict(found.position.buffers)
    layer = loaded(model, tensors)[0]  # type: ignore[index]
    with torch.no_grad():
        moved = layer(x)
    torch.testing.assert_close(found.position.buffers["1.running_mean"], moved.mean(0))
    torch.testing.assert_close(found.position.buffers["1.running_var"], moved.var(0))


@pytest.mark.parametrize("kind", KINDS)
def test_lists_of_unlike_batches_are_corrected_too(kind: str) -> None:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = mlp(0)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x).mean(1)

    batches = [draw(i, 4, 2 + i % 3, 5) for i in range(6)]
    kept = kept_of(Mean(), batches)
    theta = kept.function.map.point()
    position = Position(theta + 0.2 * draw(9, len(theta)))
    free = torch.ones_like(theta, dtype=torch.bool)
    small = replace(KINDS[kind], max_rows=24) if kind in EXACT else KINDS[kind]
    assert kept.loss(correct(small, kept, position, free).position) < kept.loss(position)


class Residual(nn.Module):
    """Two blocks of two matrices each around a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)) for _ in range(2)
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def hidden_loss(kept: Kept, position: Position) -> float:
    """Relative change of the blocks' outputs over all protected inputs."""
    model, batch = kept.function.map, kept.batches.first()
    with model.frozen():
        before = model.tapped(model.named(kept.start), batch, model.blocks())[1]
        after = model.tapped(model.named(position.theta), batch, model.blocks())[1]
    return sum(float((a - b).square().mean() / b.var()) for a, b in zip(after, before, strict=True))


def test_taps_bring_hidden_outputs_back() -> None:
    kept = kept_of(filled(Residual(), 0), inputs(1, 40))
    assert kept.function.map.blocks() == ["blocks.0", "blocks.1"]
    theta = kept.function.map.point()
    away = Position(theta + 0.2 * draw(3, len(theta)))
    free = torch.ones(len(theta), dtype=torch.bool)
    found = {
        taps: correct(FirstOrder(steps=150, batch_size=40, lr=0.01, taps=taps), kept, away, free).position
        for taps in ("blocks", None)
    }
    assert hidden_loss(kept, found["blocks"]) < 0.2 * hidden_loss(kept, found[None])
    assert kept.loss(found["blocks"]) < 0.05 * kept.loss(away)


def test_a_tap_that_is_no_module_is_named() -> None:
    kept, position, free = perturbed(0, 0.1)
    with pytest.raises(ValueError, match="taps: the model has no module 'layer9'; its modules are 0, 1, 2"):
        correct(FirstOrder(steps=1, taps=("layer9",)), kept, position, free)


def test_a_constant_tap_is_left_out() -> None:
    model = filled(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), 0)
    with torch.no_grad():
        for p in next(model.children()).parameters():
            p.zero_()
    kept = kept_of(model, inputs(1, 20))
    theta = kept.function.map.point()
    free = torch.ones(len(theta), dtype=torch.bool)
    found = correct(FirstOrder(steps=3, taps=("0",)), kept, Position(theta + 0.1), free)
    assert torch.isfinite(found.position.theta).all()
