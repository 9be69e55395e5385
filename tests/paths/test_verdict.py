"""The verdict: the confidence bound against scipy and its own definition, the distance against plain torch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, binomtest
from torch import Tensor, nn

from fipgeo import MetricField, OutputMap, changed_upper_bound
from fipgeo.outputs import Categorical, Euclidean
from fipgeo.paths import Verdict

from .toys import draw, filled, inputs, loaded, mlp, verdict_by_hand

COUNTS = st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))
CONFIDENCES = st.floats(0.5, 0.999)


@given(COUNTS, CONFIDENCES)
def test_the_bound_is_scipys_exact_one_sided_interval(counts: tuple[int, int], confidence: float) -> None:
    changed, total = counts
    test = binomtest(changed, total, alternative="less")
    expected = test.proportion_ci(confidence_level=confidence, method="exact").high
    assert changed_upper_bound(changed, total, confidence) == pytest.approx(expected, rel=1e-9)


@given(COUNTS, CONFIDENCES)
def test_the_bound_solves_its_defining_equation(counts: tuple[int, int], confidence: float) -> None:
    changed, total = counts
    bound = changed_upper_bound(changed, total, confidence)
    assert changed / total <= bound <= 1
    if changed < total:
        assert binom.cdf(changed, total, bound) == pytest.approx(1 - confidence, rel=1e-6)
    else:
        assert bound == 1


@given(st.integers(1, 80), st.floats(0.001, 0.999), CONFIDENCES)
def test_the_bound_covers_every_rate_at_least_as_often_as_it_says(total: int, rate: float, confidence: float) -> None:
    covered = [k for k in range(total + 1) if changed_upper_bound(k, total, confidence) >= rate]
    assert sum(binom.pmf(covered, total, rate)) >= confidence - 1e-9
    assert covered == list(range(total + 1 - len(covered), total + 1))  # more changes never lower the bound


def test_the_bound_is_sharp() -> None:
    # the rate just above the bound for k changes is missed with probability P(X <= k) = 1 - confidence, no less
    bound = changed_upper_bound(3, 50)
    missed = [k for k in range(51) if changed_upper_bound(k, 50) < bound + 1e-9]
    assert sum(binom.pmf(missed, 50, bound + 1e-9)) == pytest.approx(0.05, abs=1e-6)


@given(COUNTS, CONFIDENCES)
def test_more_confidence_and_fewer_inputs_raise_the_bound(counts: tuple[int, int], confidence: float) -> None:
    changed, total = counts
    bound = changed_upper_bound(changed, total, confidence)
    assert bound <= changed_upper_bound(changed, total, (1 + confidence) / 2)
    assert changed_upper_bound(2 * changed, 2 * total, confidence) <= bound + 1e-12


@pytest.mark.parametrize(("changed", "total"), [(-1, 10), (11, 10), (0, 0)])
def test_impossible_counts_are_refused(changed: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"changed: got {changed} of {total}"):
        changed_upper_bound(changed, total)


@pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, math.nan])
def test_impossible_confidences_are_refused(confidence: float) -> None:
    with pytest.raises(ValueError, match="confidence: got"):
        changed_upper_bound(1, 10, confidence)


def verdict_of(model: nn.Module, x: Tensor, geometry: str = "logits") -> tuple[Verdict, OutputMap]:
    field = MetricField(model, x, geometry, batch_size=7)
    return Verdict(field.function, field.map.point()), field.map


@pytest.mark.parametrize("geometry", ["logits", "euclidean", "categorical", "bernoulli", "gaussian", "cosine"])
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_start_is_at_distance_zero_exactly(geometry: str, mode: str) -> None:
    model = mlp(3, norm=True, dropout=True).train(mode == "train")
    verdict, output_map = verdict_of(model, inputs(2, 30), geometry)
    for _ in range(2):
        found = verdict.measure(output_map.point())
        assert (found.distance, found.drift) == (0.0, 0.0)
        assert found.changed == 0.0 or (math.isnan(found.changed) and geometry in ("euclidean", "gaussian", "cosine"))
    assert model.training is (mode == "train")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_start_is_at_distance_zero_in_low_precision(dtype: torch.dtype) -> None:
    model = mlp(3).to(dtype)
    verdict, output_map = verdict_of(model, inputs(2, 30).to(dtype))
    assert verdict.measure(output_map.point()).distance == 0.0


@given(st.integers(0, 10**6), st.floats(1e-6, 1.0))
def test_distance_drift_and_changes_are_those_of_plain_torch(seed: int, size: float) -> None:
    model, x = mlp(seed, norm=True).train(), inputs(seed + 1, 23)
    verdict, output_map = verdict_of(model, x)
    theta = output_map.point() + size * draw(seed + 2, len(output_map.point()))
    found = verdict.measure(theta)
    distance, drift, changed = verdict_by_hand(loaded(model, {}), loaded(model, output_map.named(theta)), x)
    assert found.distance == pytest.approx(distance, rel=1e-12)
    assert found.drift == pytest.approx(drift, rel=1e-12)
    assert found.changed == changed
    assert found.changed_upper == changed_upper_bound(round(changed * 23), 23)


def test_the_finite_distance_of_a_softmax_is_the_arc() -> None:
    model, x = mlp(1), inputs(2, 9)
    verdict, output_map = verdict_of(model, x, "categorical")
    theta = output_map.point() + draw(5, len(output_map.point()))
    with torch.no_grad():
        p, q = (torch.softmax(m(x), 1) for m in (model, loaded(model, output_map.named(theta))))
    arc = 2 * torch.acos((p.sqrt() * q.sqrt()).sum(1))
    assert verdict.measure(theta).distance == pytest.approx(math.sqrt(float(arc.square().mean())), rel=1e-9)


def test_structured_outputs_are_measured_together() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(5, 2), nn.Linear(5, 4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.a(x), self.b(x)

    model, x = filled(Two(), 0), inputs(3, 8)
    field = MetricField(model, x, Euclidean())
    verdict = Verdict(field.function, field.map.point())
    theta = field.map.point() + 0.1 * draw(4, field.space.dim)
    with torch.no_grad():
        gaps = [f - f0 for f, f0 in zip(loaded(model, field.map.named(theta))(x), model(x), strict=True)]
    expected = math.sqrt(sum(float(g.square().sum()) for g in gaps) / 8)
    found = verdict.measure(theta)
    assert found.distance == pytest.approx(expected, rel=1e-12)
    assert math.isnan(found.changed) and math.isnan(found.changed_upper)


def test_one_output_for_all_inputs_has_a_distance_all_the_same() -> None:
    model = filled(nn.Linear(5, 3), 0)
    with torch.no_grad():
        model.weight.zero_()  # type: ignore[operator]
    field = MetricField(model, inputs(0, 6), Categorical())
    verdict = Verdict(field.function, field.map.point())
    found = verdict.measure(field.map.point() + 0.1 * draw(1, field.space.dim))
    assert 0 < found.drift == found.distance


def test_outputs_that_are_not_finite_are_named() -> None:
    model, x = mlp(0), inputs(0, 6)
    verdict, output_map = verdict_of(model, x)
    with pytest.raises(ValueError, match=r"outputs: .*(NaN|infinite|finite)"):
        verdict.measure(torch.full_like(output_map.point(), torch.nan))
