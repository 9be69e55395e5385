"""Hidden outputs beside the outputs: distances by hand, Jacobians by autograd, what is left out and masked."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import FirstOrder, GaussNewton, MetricField
from fipgeo.jacobian import JacobianRoot
from fipgeo.paths import Compensation, Kept, Position
from fipgeo.paths.kept import Recomputed
from fipgeo.paths.taps import TappedOutputs

from .toys import centred, draw, filled, inputs, kept_of, mlp, same_bits

SEEDS = st.integers(0, 10**6)


class Residual(nn.Module):
    """Two blocks of two matrices each around a skip connection."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 5, bias=False)) for _ in range(2)
        )
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.hidden(x)[-1])

    def hidden(self, x: Tensor) -> list[Tensor]:
        """The input, and the sums behind every block."""
        out = [x]
        for block in self.blocks:
            out.append(out[-1] + block(out[-1]))
        return out


def residual(seed: int) -> Residual:
    model = Residual()
    filled(model, seed)
    return model.eval()


def by_hand(model: Residual, x: Tensor, theta: Tensor, weight: float) -> Tensor:
    """[z / s_z, sqrt(w / 2) h_t / s_t] by plain torch, as a function of flat weights."""

    def parts(flat: Tensor) -> list[Tensor]:
        named, start = {}, 0
        for name, p in model.named_parameters():
            named[name] = flat[start : start + p.numel()].reshape(p.shape)
            start += p.numel()
        hidden = torch.func.functional_call(_Hidden(model), {f"inner.{n}": t for n, t in named.items()}, (x,))
        blocks = [b - a for a, b in zip(hidden, hidden[1:], strict=False)]
        z = centred(torch.nn.functional.linear(hidden[-1], named["head.weight"], named["head.bias"]))
        return [z, *blocks]

    own = [p.detach() for p in parts(torch.cat([p.reshape(-1) for p in model.parameters()]).detach())]
    scales = [own[0].square().sum(1).mean().rsqrt()]
    scales += [(weight / 2) ** 0.5 * (h - h.mean()).square().sum(1).mean().rsqrt() for h in own[1:]]
    return torch.cat([s * p for s, p in zip(scales, parts(theta), strict=True)], 1)


class _Hidden(nn.Module):
    def __init__(self, inner: Residual) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.inner.hidden(x)


@given(SEEDS, st.floats(0.1, 10), st.integers(1, 12))
@settings(max_examples=4)
def test_the_tapped_distance_is_its_definition(seed: int, weight: float, batch_size: int) -> None:
    model, x = residual(seed), inputs(seed + 1, 12)
    kept = kept_of(model, x, batch_size=batch_size).tapped("blocks", weight)
    theta = kept.start + 0.2 * draw(seed + 2, len(kept.start))
    gap = by_hand(model, x, theta, weight) - by_hand(model, x, kept.start, weight)
    torch.testing.assert_close(kept.residual(Position(theta)), gap.detach().reshape(-1))
    assert kept.loss(Position(theta)) == pytest.approx(float(gap.square().sum(1).mean()), rel=1e-9)
    assert kept.loss(Position(kept.start)) == 0.0
    assert kept.scale == 1.0


@pytest.mark.parametrize("engine", ["autodiff", "linearised", "factored", "materialised"])
def test_every_engine_knows_the_jacobian_of_a_tapped_function(engine: str) -> None:
    model, x = residual(0), inputs(1, 6)
    kept = kept_of(model, x, batch_size=4).tapped("blocks")
    theta = kept.start + 0.1 * draw(2, len(kept.start))
    dense = torch.func.jacrev(lambda t: by_hand(model, x, t, 2.0).reshape(-1))(theta)
    root = JacobianRoot(kept.function, theta, engine=engine, survey=kept.survey)
    v, u = draw(3, 2, len(theta)), draw(4, 2, len(dense))
    torch.testing.assert_close(root(v), v @ dense.T)
    torch.testing.assert_close(root.adjoint(u), u @ dense)


@given(SEEDS)
@settings(max_examples=4)
def test_gauss_newton_on_a_tapped_function_is_dense_least_squares(seed: int) -> None:
    model, x = residual(seed), inputs(seed + 1, 6)
    kept = kept_of(model, x).tapped("blocks")
    away = Position(kept.start + 0.1 * draw(seed + 2, len(kept.start)))
    dense = torch.func.jacrev(lambda t: by_hand(model, x, t, 2.0).reshape(-1))(away.theta)
    free = draw(seed + 3, len(kept.start)) > 0
    moves = Compensation(kept, away, free, damping=1e-2)
    r = kept.residual(away)
    columns = dense * free
    normal = columns.T @ columns / 6 + moves.mu * torch.eye(len(free))
    torch.testing.assert_close(moves(r), -torch.linalg.solve(normal, columns.T @ r / 6), rtol=1e-6, atol=1e-8)


@given(SEEDS, st.integers(1, 9))
@settings(max_examples=2)
def test_signed_sums_keep_lengths_on_average(seed: int, width: int) -> None:
    model, x = residual(seed), inputs(seed + 1, 6)
    plain = kept_of(model, x)
    whole, first = plain.tapped("blocks"), plain.tapped("blocks", width=width)
    away = Position(whole.start + 0.3 * draw(seed + 2, len(whole.start)))
    assert first.shapes == ((6, 3 + 2 * min(width, 5)),)
    found = []
    for number in range(200):
        function = first.function
        assert isinstance(function, TappedOutputs)
        other = replace(function, seed=number)
        reference = tuple(other.embedded(f, batch) for batch, f in other.outputs(first.start))
        found.append(Kept(other, first.batches, reference, first.start).loss(away))
    values = torch.tensor(found)
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - whole.loss(away)) <= 5 * error + 1e-12


@given(SEEDS)
@settings(max_examples=4)
def test_a_reference_beyond_its_memory_is_recomputed(seed: int) -> None:
    function = kept_of(residual(seed), inputs(seed + 1, 11), batch_size=4)
    here = [
        Kept.of(function.function, function.start, taps="blocks", max_bytes=most) for most in (2**29, 11 * 13 * 8 - 1)
    ]
    assert isinstance(here[1].reference, Recomputed) and isinstance(here[0].reference, tuple)
    away = Position(function.start + 0.1 * draw(seed, len(function.start)))
    assert here[0].loss(away) == here[1].loss(away)
    assert here[0].survey == here[1].survey
    parts = [kept.draw(5, torch.Generator().manual_seed(seed)) for kept in here]
    torch.testing.assert_close(parts[0].reference, parts[1].reference)
    torch.testing.assert_close(here[0].reference[1], here[1].reference[-2])
    subsets = [kept.subset(40, torch.Generator().manual_seed(seed)).loss(away) for kept in here]
    assert subsets[0] == pytest.approx(subsets[1], rel=1e-9)
    free = torch.ones_like(function.start, dtype=torch.bool)
    ends = []
    for kept in here:
        plain = Kept(function.function, function.batches, function.reference, function.start)
        plain._tapped["blocks", 2.0, None] = kept
        corrector = FirstOrder(steps=3, batch_size=4)
        ends.append(corrector.correct(plain, away, free, {}, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(ends[0].position.theta, ends[1].position.theta)
    assert ends[1].cost == 4 / 3 * ends[0].cost


def test_taps_are_made_once() -> None:
    kept = kept_of(residual(0), inputs(1, 8))
    assert kept.tapped("blocks") is kept.tapped("blocks")
    assert kept.tapped("blocks") is not kept.tapped("blocks", 1.0)
    assert kept.tapped(None) is kept
    assert kept_of(mlp(0), inputs(1, 8)).tapped("blocks").function.__class__.__name__ == "EmbeddedOutputs"


def test_layers_are_all_matrices_but_the_last() -> None:
    function = kept_of(residual(0), inputs(1, 8)).tapped("layers").function
    assert isinstance(function, TappedOutputs)
    assert [tap.name for tap in function.taps] == ["blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2"]
    with pytest.raises(ValueError, match="taps: got 'everything', expected 'blocks'"):
        kept_of(residual(0), inputs(1, 8)).tapped("everything")


class Recurrent(nn.Module):
    """A layer that has its examples on the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x.transpose(0, 1)).tanh().mean(0))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_examples_are_found_on_whichever_axis_they_are(count: int) -> None:
    model, x = filled(Recurrent(), 0), draw(1, count, 2, 5)
    kept = kept_of(model, x).tapped(("inner",))
    assert isinstance(kept.function, TappedOutputs)
    if count != 2:
        assert kept.function.taps[0].axis == 1
    theta = kept.start + 0.1
    hidden = [
        torch.nn.functional.linear(x, flat[:20].reshape(4, 5), flat[20:24]).reshape(count, -1)
        for flat in (kept.start, theta)
    ]
    spread = (hidden[0] - hidden[0].mean()).square().sum(1).mean()
    plain = kept_of(model, x)
    expected = plain.loss(Position(theta)) / plain.scale + 2 * (hidden[1] - hidden[0]).square().sum(1).mean() / spread
    assert kept.loss(Position(theta)) == pytest.approx(float(expected), rel=1e-9)


def test_channels_last_costs_no_copy_and_changes_no_distance() -> None:
    model: Any = filled(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(12, 3)), 0)
    x = draw(1, 6, 2, 4, 4)
    plain = kept_of(model, x).tapped(("0",))
    wide = kept_of(model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last))
    last = wide.tapped(("0",))
    assert isinstance(plain.function, TappedOutputs) and isinstance(last.function, TappedOutputs)
    assert not plain.function.taps[0].last
    away = Position(plain.start + 0.1)
    assert plain.loss(away) == pytest.approx(last.loss(away), rel=1e-9)


class Tokens(nn.Module):
    """Token-level outputs of a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.head(x + self.block(x))


@given(SEEDS)
@settings(max_examples=4)
def test_padding_does_not_enter_tapped_distances(seed: int) -> None:
    model, x = filled(Tokens(), seed), draw(seed + 1, 6, 4, 5)
    mask = draw(seed + 2, 6, 4) > -0.3
    mask[:, 0] = True
    losses = []
    for fill in (0.0, 100.0):
        padded = {"x": torch.where(mask[..., None], x, fill), "mask": mask}
        field = MetricField(model, padded, mask="mask")
        kept = Kept.of(field.function, field.map.point(), taps="blocks")
        assert kept.live is not None
        live = torch.cat([mask.repeat_interleave(3, 1), mask.repeat_interleave(5, 1)], 1)
        assert torch.equal(torch.cat(tuple(kept.live)), live)
        assert not kept.reference[0][~live].any()
        found = kept.survey.lost
        assert found == int((~live).sum())
        losses.append(kept.loss(Position(kept.start + 0.1)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


def test_nothing_of_the_model_is_changed() -> None:
    model = residual(0).train()
    before = [p.detach().clone() for p in model.parameters()]
    kept = kept_of(model, inputs(1, 8)).tapped("layers")
    free = torch.ones_like(kept.start, dtype=torch.bool)
    GaussNewton(steps=1).correct(kept, Position(kept.start + 0.1), free, {}, torch.Generator())
    assert all(same_bits(a, b.detach()) for a, b in zip(before, model.parameters(), strict=True))
    assert all(m.training for m in model.modules()) and not any(m._forward_hooks for m in model.modules())
