"""Old outputs and new ones as the goal of one correction: rows, shares, taps, masks, and what it saves."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

from fipgeo import FirstOrder, GaussNewton, adapt
from fipgeo.paths import Kept, Position
from fipgeo.paths.joined import Joined
from fipgeo.paths.kept import Recomputed

from .toys import centred, draw, filled, inputs, jacobian_by_backward, kept_of, labels, loaded, mlp

SEEDS = st.integers(0, 10**6)


def joined(model: nn.Module, old: Any, new: list[Any], other: nn.Module) -> tuple[Kept, Position]:
    """The model's outputs on old inputs beside those of another model on new ones."""
    kept = kept_of(model, old)
    there = Position(kept.function.map.space.point(other))
    return Joined.here(kept, new, there), there


@given(seed=SEEDS)
@settings(max_examples=6, deadline=None)
def test_old_rows_are_zero_at_the_start_and_new_ones_where_they_were_taken(seed: int) -> None:
    model, other, old, new = mlp(seed), mlp(seed + 1), inputs(seed, 7), inputs(seed + 2, 9)
    both, there = joined(model, old, [new[:4], new[4:]], other)
    here = Position(both.start)
    a, b = centred(model(old)) - centred(other(old)), centred(model(new)) - centred(other(new))
    size = a.numel()
    assert both.num_examples == 16 and not both.residual(here)[:size].any() and not both.residual(there)[size:].any()
    torch.testing.assert_close(both.residual(here)[size:], b.flatten())
    torch.testing.assert_close(both.residual(there)[:size], -a.flatten())
    dense = torch.cat([jacobian_by_backward(other, x) for x in (old, new)])
    torch.testing.assert_close(both.tangent(there).root.to_dense(), dense)


@given(seed=SEEDS, rows=st.integers(2, 60))
@settings(max_examples=6, deadline=None)
def test_a_subset_has_half_of_its_rows_from_each(seed: int, rows: int) -> None:
    both, there = joined(mlp(seed), inputs(seed, 12), [inputs(seed + 2, 12)], mlp(seed + 1))
    width = both.shapes[0][1]
    few = both.subset(rows, torch.Generator().manual_seed(seed))
    halves = [max(rows // 2 // width, 1)] * 2 if rows < both.num_rows else [12, 12]
    assert [n for n, _ in few.shapes] == halves
    assert few.residual(Position(both.start))[: halves[0] * width].abs().max() < 1e-14
    assert few.residual(there)[halves[0] * width :].abs().max() < 1e-14
    part = few.draw(2, torch.Generator().manual_seed(seed))
    assert len(part.reference) == min(2, halves[0])


def test_taps_are_those_of_the_start_and_of_the_position() -> None:
    model, other = mlp(1), mlp(2)
    both, there = joined(model, inputs(1, 6), [inputs(2, 6)], other)
    tapped = both.tapped("layers")
    rows = kept_of(model, inputs(1, 6)).tapped("layers").num_rows
    assert tapped.num_rows == 2 * rows > both.num_rows
    assert not tapped.residual(Position(tapped.start))[:rows].any() and not tapped.residual(there)[rows:].any()
    assert both.tapped(None) is both


def test_outputs_too_large_to_be_kept_stay_alone() -> None:
    kept = Kept.of(kept_of(mlp(1), inputs(1, 6)).function, kept_of(mlp(1), inputs(1, 6)).start, max_bytes=1)
    assert isinstance(kept.reference, Recomputed)
    assert Joined.here(kept, [inputs(2, 3)], Position(kept.start)) is kept


@pytest.mark.parametrize("corrector", [GaussNewton(steps=0, final_steps=3), FirstOrder(steps=0, final_steps=60)])
@pytest.mark.parametrize("listed", [False, True])
def test_a_correction_takes_back_old_outputs_and_leaves_new_ones(corrector: Any, listed: bool) -> None:
    model, other = mlp(1, hidden=40), mlp(1, hidden=40)
    filled(other, 1)
    with torch.no_grad():
        for p in other.parameters():
            p += 0.1 * draw(5, *p.shape)
    old, new = inputs(1, 20), inputs(2, 20)
    both, there = joined(model, [old[:11], old[11:, :]] if listed else old, [new], other)
    free = torch.ones_like(there.theta, dtype=torch.bool)
    alone, random = both.halves[0], torch.Generator().manual_seed(0)  # type: ignore[attr-defined]
    ends = [corrector.correct(k, there, free, {}, random, final=True).position for k in (both, alone)]
    lost, kept = (both.halves[1].loss(end) for end in ends), [both.halves[0].loss(end) for end in ends]  # type: ignore[attr-defined]
    held, taken_back = lost
    assert kept[0] < 0.5 * alone.loss(there) and held < 0.5 * taken_back


def test_adapt_takes_labels_off_new_pairs_and_leaves_other_batches_as_they_are() -> None:
    new = (draw(5, 60, 5), labels(5, 60))
    for keep in (inputs(1, 30), [inputs(1, 30)[:11], inputs(1, 30)[11:]]):
        path = adapt(mlp(0, hidden=20), new, cross_entropy, keep=keep, epochs=5, batch_size=10, lr=0.2)
        end = loaded(mlp(0, hidden=20), path[-1].tensors)
        assert cross_entropy(end(new[0]), new[1]) < cross_entropy(mlp(0, hidden=20)(new[0]), new[1])
