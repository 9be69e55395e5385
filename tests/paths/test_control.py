"""Laws of the step-size control, over random controls and drifts."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fipgeo import StepControl

POSITIVE = st.floats(1e-6, 1e3)
ADDED = st.floats(-10, 10)


@st.composite
def controls(draw: st.DrawFn) -> StepControl:
    smallest, initial, largest = sorted(draw(st.tuples(POSITIVE, POSITIVE, POSITIVE)))
    return StepControl(initial, smallest, largest, draw(POSITIVE), draw(st.floats(1.01, 100)))


@st.composite
def controls_and_sizes(draw: st.DrawFn) -> tuple[StepControl, float]:
    control = draw(controls())
    return control, draw(st.floats(control.smallest, control.largest))


PREDICTED = st.none() | st.floats(-10, 10)


@given(controls_and_sizes(), ADDED, PREDICTED)
def test_the_next_size_is_in_range_and_near_the_last(
    case: tuple[StepControl, float], added: float, predicted: float | None
) -> None:
    control, size = case
    following = control.following(size, error=control.error(added, predicted))
    assert control.smallest <= following <= control.largest
    assert following <= 1.5 * size * (1 + 1e-12)
    assert following >= min(0.5 * size, control.largest) * (1 - 1e-12)


@given(controls_and_sizes(), ADDED, ADDED)
def test_more_drift_never_gives_a_larger_step(case: tuple[StepControl, float], one: float, two: float) -> None:
    control, size = case
    sizes = [control.following(size, error=control.error(e)) for e in sorted((one, two))]
    assert sizes[1] <= sizes[0]


@given(controls_and_sizes(), ADDED, st.floats(-10, 10))
def test_an_error_is_the_drift_added_or_how_wrong_the_prediction_was(
    case: tuple[StepControl, float], added: float, predicted: float
) -> None:
    control, _ = case
    within = {e: min(max(e, control.tolerance / 100), 100 * control.tolerance) for e in (added, abs(added - predicted))}
    assert control.error(added, predicted) == max(within.values())
    assert control.error(added) == control.error(added, math.nan) == within[added]
    assert control.error(added, predicted) >= control.error(added)  # a prediction never makes steps larger


@given(controls_and_sizes())
def test_a_step_that_adds_the_tolerance_is_repeated(case: tuple[StepControl, float]) -> None:
    control, size = case
    assert control.following(size, error=control.tolerance) == pytest.approx(size, rel=1e-12)


@given(st.floats(0.02, 5), st.floats(0.5, 2), st.floats(1e-6, 1e3))
def test_the_next_step_adds_the_tolerance_if_errors_grow_with_the_square(
    size: float, near: float, tolerance: float
) -> None:
    """Without limits, a step of size h that added c h^2 is followed by one that adds the tolerance."""
    control = StepControl(1.0, 1e-6, 1e6, tolerance)
    constant = near * tolerance / size**2
    following = control.following(size, error=constant * size**2)
    assert constant * following**2 == pytest.approx(tolerance)


@given(st.floats(2.001, 99), st.floats(1e-6, 1e3))
def test_sizes_change_by_a_factor_from_a_half_to_three_halves(tolerances: float, tolerance: float) -> None:
    control = StepControl(1.0, 1e-6, 1e6, tolerance)
    assert control.following(1.0, error=2 * tolerances * tolerance) == pytest.approx(0.5)
    assert control.following(1.0, error=tolerance / (2 * tolerances)) == pytest.approx(1.5)


def sizes_on(control: StepControl, constant: float, noise: list[float]) -> list[float]:
    """Sizes where a step of size h adds constant h^2 times the noise."""
    size, sizes = control.initial, []
    for factor in noise:
        size = control.following(size, error=control.error(constant * size**2 * factor))
        sizes.append(size)
    return sizes


@given(st.floats(0.1, 10), st.floats(0.02, 0.9))
def test_sizes_settle_where_a_step_adds_the_tolerance(constant: float, initial: float) -> None:
    control = StepControl(initial, 1e-4, 100.0, tolerance=0.04)
    last = sizes_on(control, constant, [1.0] * 60)[-1]
    assert constant * last**2 == pytest.approx(0.04, rel=1e-9)


@given(st.integers(0, 10**6), st.floats(0.05, 0.6))
def test_noise_in_the_drift_moves_sizes_by_its_root_and_does_not_pile_up(seed: int, deviation: float) -> None:
    source = random.Random(seed)
    noise = [math.exp(max(min(source.gauss(0, deviation), math.log(1.49)), -math.log(1.49))) for _ in range(200)]
    control = StepControl(0.2, 1e-4, 100.0, tolerance=0.04)
    for size, factor in zip(sizes_on(control, 1.0, noise)[20:], noise[20:], strict=True):
        assert size == pytest.approx((0.04 / factor) ** 0.5)


@given(controls_and_sizes(), ADDED, st.floats(0, 10), st.none() | st.floats(1e-3, 10))
def test_no_step_beyond_the_budget_is_accepted(
    case: tuple[StepControl, float], added: float, drift: float, budget: float | None
) -> None:
    control, size = case
    accepted = control.accepts(size, added=added, drift=drift, budget=budget)
    if budget is not None and drift > budget:
        assert not accepted
    elif size == control.smallest or added <= control.refuse * control.tolerance:
        assert accepted
    else:
        assert not accepted


@given(controls_and_sizes(), st.none() | st.floats(1e-3, 10))
def test_a_drift_that_is_no_number_is_never_accepted_within_a_budget(
    case: tuple[StepControl, float], budget: float | None
) -> None:
    control, size = case
    for value in (math.nan, math.inf):
        assert not control.accepts(size, added=value, drift=value, budget=0.5 if budget is None else budget)


@given(controls_and_sizes())
def test_refusals_end_at_the_smallest_size(case: tuple[StepControl, float]) -> None:
    control, size = case
    tries = 0
    while size > control.smallest:
        smaller = control.smaller(size)
        assert control.smallest <= smaller < size
        size, tries = smaller, tries + 1
    assert tries <= math.log2(control.largest / control.smallest) + 1
    assert control.smaller(size) == control.smallest


@pytest.mark.parametrize(
    "sizes", [(0.0, 0.1, 0.2), (0.2, 0.1, 0.3), (0.1, 0.4, 0.3), (-0.1, 0.1, 0.2), (math.nan, 0.1, 0.2)]
)
def test_sizes_out_of_order_are_refused(sizes: tuple[float, float, float]) -> None:
    smallest, initial, largest = sizes
    with pytest.raises(ValueError, match=r"0 < smallest <= initial <= largest"):
        StepControl(initial, smallest, largest, tolerance=0.1)


@pytest.mark.parametrize(("tolerance", "refuse"), [(0.0, 4.0), (-1.0, 4.0), (0.1, 1.0), (math.nan, 4.0)])
def test_useless_tolerances_are_refused(tolerance: float, refuse: float) -> None:
    with pytest.raises(ValueError, match="tolerance"):
        StepControl(0.2, 0.1, 0.4, tolerance, refuse)
