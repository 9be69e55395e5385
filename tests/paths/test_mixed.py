"""Mixing correctors: work goes where it pays, nothing gets worse, and a resumed path is the same path."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo import FirstOrder, GaussNewton
from fipgeo.paths import Compensation, Correction, Corrector, Kept, PathResult, Position
from fipgeo.paths.correctors.local import LayerLocal
from fipgeo.paths.correctors.mixed import Mixed

from .test_layers import moved
from .toys import draw, inputs, kept_of, mlp, same_bits, same_paths, same_tensors, sparse_path

SEEDS = st.integers(0, 10**6)
MEMBERS = (LayerLocal(), FirstOrder(steps=4, final_steps=8, batch_size=16, lr=0.01), GaussNewton(steps=1))


def correct(
    corrector: Corrector,
    kept: Kept,
    position: Position,
    free: Tensor,
    state: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Correction:
    return corrector.correct(kept, position, free, state or {}, torch.Generator().manual_seed(0), **options)


@dataclass(frozen=True)
class Shrink(Corrector):
    """Brings the weights nearer to the start by a factor, at a price, and keeps a log of the calls."""

    name: str
    factor: float
    price: float
    log: list

    def correct(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        state: Mapping[str, Tensor],
        generator: torch.Generator,
        *,
        moves: Compensation | None = None,
        final: bool = False,
    ) -> Correction:
        """Move along the line to the start."""
        self.log.append(self.name)
        calls = state.get("calls", torch.zeros(())) + 1
        theta = kept.start + self.factor * (position.theta - kept.start)
        return Correction(replace(position, theta=theta), {"calls": calls}, self.price)


def shrinking(*members: tuple[str, float, float]) -> tuple[Mixed, list, Kept, Tensor]:
    log: list[str] = []
    kept = kept_of(mlp(0), inputs())
    return Mixed(tuple(Shrink(*m, log) for m in members)), log, kept, torch.ones_like(kept.start, dtype=torch.bool)


def test_the_first_correction_tries_all_and_the_next_spends_on_the_best() -> None:
    mixed, log, kept, free = shrinking(("slow", 0.95, 100.0), ("fast", 0.5, 100.0))
    first = correct(mixed, kept, moved(kept, 1, 0.1), free)
    assert log == ["slow", "fast"] and first.state["rates"][1] > first.state["rates"][0] > 0
    second = correct(mixed, kept, moved(kept, 2, 0.1), free, first.state)
    assert log[2:] == ["fast", "fast"]
    assert float(second.state["1.calls"]) == 3 and float(second.state["0.calls"]) == 1


def test_a_rate_is_what_was_won_for_the_work() -> None:
    mixed, _, kept, free = shrinking(("one", 0.5, 100.0))
    position = moved(kept, 1, 1e-4)  # so near that the loss is a square
    found = correct(mixed, kept, position, free)
    spent = 100.0 + kept.num_examples
    assert float(found.state["rates"][0]) == pytest.approx(2 * torch.tensor(2.0).log().item() / spent, rel=1e-3)
    assert float(found.state["costs"][0]) == spent and found.cost == spent + kept.num_examples


def test_a_dear_member_needs_more_than_a_cheap_one() -> None:
    mixed, log, kept, free = shrinking(("dear", 0.5, 10_000.0), ("cheap", 0.9, 100.0))
    state = correct(mixed, kept, moved(kept, 1, 0.1), free).state
    correct(mixed, kept, moved(kept, 2, 0.1), free, state)
    assert set(log[2:]) == {"cheap"}


def test_what_makes_things_worse_is_undone_and_not_called_again() -> None:
    mixed, log, kept, free = shrinking(("worse", 1.5, 100.0), ("better", 0.9, 100.0))
    position = moved(kept, 1, 0.1)
    first = correct(mixed, kept, position, free)
    torch.testing.assert_close(first.position.theta, kept.start + 0.9 * (position.theta - kept.start))
    assert "0.calls" not in first.state and float(first.state["rates"][0]) == 0
    correct(mixed, kept, position, free, first.state)
    assert log[2:] == ["better", "better"]


def test_where_nothing_helps_the_position_stays() -> None:
    mixed, log, kept, free = shrinking(("worse", 1.5, 100.0), ("worst", 2.0, 100.0))
    position = moved(kept, 1, 0.1)
    first = correct(mixed, kept, position, free)
    assert same_bits(first.position.theta, position.theta)
    again = correct(mixed, kept, position, free, first.state)
    assert len(log) == 2 and same_bits(again.position.theta, position.theta)


def test_the_last_correction_goes_round_until_a_round_removes_too_little() -> None:
    mixed, log, kept, free = shrinking(("a", 0.5, 1.0), ("b", 0.9, 1.0))
    correct(replace(mixed, max_rounds=3), kept, moved(kept, 1, 0.1), free, final=True)
    assert log == ["a", "b"] * 3
    log.clear()
    correct(replace(mixed, max_rounds=3, tolerance=0.99), kept, moved(kept, 1, 0.1), free, final=True)
    assert log == ["a", "b"]


@given(SEEDS, st.booleans(), st.booleans())
@settings(max_examples=4)
def test_the_loss_never_rises_and_frozen_weights_stay_bit_for_bit(seed: int, norm: bool, final: bool) -> None:
    kept = kept_of(mlp(seed, norm=norm), inputs(seed + 1, 30))
    position, free, state = moved(kept, seed + 2), draw(seed + 3, len(kept.start)) > 0, {}
    for _ in range(2):
        found = correct(Mixed(MEMBERS), kept, position, free, state, final=final)
        assert kept.loss(found.position) <= kept.loss(position)
        assert same_bits(found.position.theta[~free], position.theta[~free])
        position, state = found.position, found.state


def test_runs_repeat_and_the_state_is_flat_tensors_that_are_not_written_to() -> None:
    kept = kept_of(mlp(0), inputs())
    position, free = moved(kept, 1), draw(2, len(kept.start)) > 0
    first = correct(Mixed(MEMBERS), kept, position, free)
    assert all(isinstance(value, Tensor) for value in first.state.values())
    assert {"rates", "costs", "0.damping", "1.exp_avg", "2.damping"} <= set(first.state)
    held = {key: value.clone() for key, value in first.state.items()}
    one = correct(Mixed(MEMBERS), kept, position, free, first.state)
    two = correct(Mixed(MEMBERS), kept, position, free, first.state)
    same_tensors(held, first.state)
    same_tensors({**one.state, "theta": one.position.theta}, {**two.state, "theta": two.position.theta})


def test_a_path_resumes_bit_for_bit() -> None:
    options = {"target": 0.6, "corrector": Mixed(MEMBERS), "generator": 5}
    whole = sparse_path(mlp(0), inputs(), **options)
    part = sparse_path(mlp(0), inputs(), options={"max_steps": 1}, **options)
    assert part.outcome == "max_steps" and len(part) < len(whole)
    resumed: PathResult = sparse_path(mlp(0), inputs(), resume=part, **options)
    same_paths(whole, resumed)


def test_wrong_options_say_what_was_expected() -> None:
    with pytest.raises(ValueError, match="members: got none"):
        Mixed(())
    with pytest.raises(ValueError, match="tolerance: got 2"):
        Mixed(MEMBERS, tolerance=2)
    with pytest.raises(ValueError, match="max_rounds: got 0"):
        Mixed(MEMBERS, max_rounds=0)
