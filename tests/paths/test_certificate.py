"""Certificates: intervals and bounds against other routes, coverage by simulation, and picking one of several."""

import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom, bootstrap
from torch import Tensor, nn

from fipgeo import MetricField, PathResult, changed_upper_bound
from fipgeo.paths import Verdict
from fipgeo.paths.certificate import Certificate, certify, mean_interval

from .test_record import path_of, point
from .toys import draw, filled, inputs, loaded, mlp, sparse_path

SEEDS = st.integers(0, 10**6)


def skewed(seed: int, count: int) -> Tensor:
    """Squared distances as they come: many small, few large."""
    return draw(seed, count).exp()


def bent(seed: int, count: int) -> Tensor:
    """As skewed, but with no value that makes means of resamples fall into groups, between which quantiles jump."""
    return (draw(seed, count) / 2).exp()


@given(SEEDS, st.integers(50, 120), st.sampled_from([0.8, 0.9, 0.95]))
def test_the_interval_is_that_of_another_bootstrap(seed: int, count: int, confidence: float) -> None:
    values = bent(seed, count)
    low, high = mean_interval(values, confidence, num_samples=4000)
    other = bootstrap(
        (values.numpy(),), np.mean, n_resamples=4000, confidence_level=confidence, method="BCa", rng=seed
    ).confidence_interval
    width = other.high - other.low
    assert low == pytest.approx(other.low, abs=0.12 * width)  # both have the error of 4000 resamples
    assert high == pytest.approx(other.high, abs=0.12 * width)
    assert low < float(values.mean()) < high


@given(SEEDS, st.floats(1e-3, 1e3))
def test_the_interval_scales_with_the_values_and_repeats(seed: int, scale: float) -> None:
    values = skewed(seed, 40)
    assert mean_interval(values) == mean_interval(values)
    assert mean_interval(scale * values) == pytest.approx([scale * end for end in mean_interval(values)], rel=1e-9)


def test_the_interval_covers_the_mean_about_as_often_as_it_says() -> None:
    true, hits = math.exp(0.5), 0
    for seed in range(400):
        low, high = mean_interval(skewed(seed, 200), 0.9, num_samples=400)
        hits += low <= true <= high
    assert 0.83 <= hits / 400 <= 0.95  # 0.9 less what a long tail costs a bootstrap, 3 standard errors either way


def test_intervals_of_nothing_of_one_and_of_equal_values() -> None:
    assert mean_interval(torch.full((5,), 2.0)) == (2.0, 2.0)
    assert all(math.isnan(end) for end in mean_interval(torch.ones(1)))
    with pytest.raises(ValueError, match=r"values: got shape \[0\]"):
        mean_interval(torch.zeros(0))
    with pytest.raises(ValueError, match="confidence: got 1.0"):
        mean_interval(torch.ones(3), 1.0)


@given(SEEDS, st.integers(2, 5), st.integers(30, 80))
def test_the_worst_class_is_the_one_that_changed_most(seed: int, num_classes: int, count: int) -> None:
    source = torch.Generator().manual_seed(seed)
    classes = torch.randint(num_classes, (count,), generator=source)
    moved = torch.rand(count, generator=source) < 0.3
    found = certify(torch.ones(count), 1.0, moved, classes)
    shares = {int(c): float(moved[classes == c].double().mean()) for c in classes.unique()}
    each = 1 - 0.05 / len(shares)
    bounds = {c: changed_upper_bound(int(moved[classes == c].sum()), int((classes == c).sum()), each) for c in shares}
    assert found.worst_changed == pytest.approx(max(shares.values())) == pytest.approx(shares[found.worst_class])
    assert found.worst_upper == bounds[found.worst_class] and found.classes_upper == max(bounds.values())


def test_bounds_of_all_classes_hold_at_once() -> None:
    rng, rates, counts = np.random.default_rng(0), np.array([0.02, 0.05, 0.1, 0.3]), np.array([40, 60, 30, 50])
    wrong = 0
    for _ in range(400):
        moved = torch.cat([torch.from_numpy(rng.random(n) < r) for n, r in zip(counts, rates, strict=True)])
        classes = torch.repeat_interleave(torch.arange(4), torch.from_numpy(counts))
        each = 1 - 0.05 / 4
        bounds = [changed_upper_bound(int(moved[classes == c].sum()), int(counts[c]), each) for c in range(4)]
        assert certify(torch.ones(180), 1.0, moved, classes).classes_upper == max(bounds)
        wrong += any(bound < rate for bound, rate in zip(bounds, rates, strict=True))
    assert wrong / 400 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 400)


@given(SEEDS, st.sampled_from(["logits", "categorical"]))
def test_a_verdicts_certificate_is_that_of_plain_torch(seed: int, geometry: str) -> None:
    model, x = mlp(seed, norm=True), inputs(seed + 1, 40)
    field = MetricField(model, x, geometry, batch_size=7)
    verdict = Verdict(field.function, field.map.point())
    theta = field.map.point() + 0.3 * draw(seed + 2, field.space.dim)
    with torch.no_grad():
        f, f0 = loaded(model, field.map.named(theta))(x), model(x)
    found = verdict.measure(theta, certify=True)
    proof = found.certificate
    assert proof is not None and verdict.measure(theta).certificate is None
    surer = torch.softmax(f, 1).amax(1) - torch.softmax(f0, 1).amax(1)
    assert proof.confidence_change == pytest.approx(float(surer.mean()), abs=1e-12)
    moved, classes = f.argmax(1) != f0.argmax(1), f0.argmax(1)
    assert proof.worst_changed == max(float(moved[classes == c].double().mean()) for c in classes.unique())
    assert proof.distance_low <= found.distance <= proof.distance_high
    assert proof.drift_low == pytest.approx(proof.distance_low / verdict.spread)
    start = verdict.measure(field.map.point(), certify=True).certificate
    assert start is not None and (start.distance_high, start.worst_changed, start.confidence_change) == (0, 0, 0)


def test_yes_no_outputs_have_a_confidence_and_no_class() -> None:
    model, x = mlp(0), inputs(1, 30)
    field = MetricField(model, x, "bernoulli")
    theta = field.map.point() + 0.3 * draw(2, field.space.dim)
    proof = Verdict(field.function, field.map.point()).measure(theta, certify=True).certificate
    with torch.no_grad():
        p, p0 = (torch.sigmoid(m(x)) for m in (loaded(model, field.map.named(theta)), model))
    expected = torch.maximum(p, 1 - p).mean() - torch.maximum(p0, 1 - p0).mean()
    assert proof is not None and proof.confidence_change == pytest.approx(float(expected), abs=1e-12)
    assert proof.worst_class == -1 and math.isnan(proof.worst_upper)


def test_regression_has_an_interval_only() -> None:
    field = MetricField(filled(nn.Linear(5, 2), 0), inputs(1, 30), "euclidean")
    theta = field.map.point() + 0.3 * draw(2, field.space.dim)
    proof = Verdict(field.function, field.map.point()).measure(theta, certify=True).certificate
    assert proof is not None and 0 < proof.distance_low < proof.distance_high
    assert proof.worst_class == -1 and math.isnan(proof.confidence_change)


def test_points_of_a_path_carry_certificates_and_loggers_see_them() -> None:
    path = sparse_path(mlp(0), inputs(1, 60), 0.5)
    for p in path:
        assert isinstance(p.certificate, Certificate)
        assert p.certificate.drift_low <= p.drift <= p.certificate.drift_high
        assert asdict(p.certificate).items() <= p.to_dict().items()
        assert all(type(v) in (int, float) for v in p.to_dict().values())


# picking one of several points


def shown(rates: list[float], total: int, rng: np.random.Generator, together: bool) -> PathResult:
    """A path whose points change predictions at these rates, as one held-out set shows it."""
    draws = rng.random(total)  # whoever changes at a low rate changes at all higher ones
    counts = [int((draws < r).sum()) for r in rates] if together else rng.binomial(total, rates).tolist()
    made = [point(i, 0.1 * i, 0.0, 0.0) for i in range(len(rates))]
    return path_of([replace(p, changed=k / total, num_held_out=total) for p, k in zip(made, counts, strict=True)])


def broken(rates: list[float], limit: float, rule: str, together: bool, total: int = 120) -> float:
    """How often the point that comes out changes more than it may, over 300 held-out sets."""
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(300):
        try:
            best = shown(rates, total, rng, together).best(max_changed=limit, confidence=0.9, multiplicity=rule)
        except ValueError:
            continue
        wrong += rates[best.step] > limit
    return wrong / 300


RATES = {"one good": [0.0, *[0.102] * 8], "all bad": [0.101] * 9, "good and bad": [0.02, 0.11] * 4}


@pytest.mark.parametrize("rates", RATES.values(), ids=RATES)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("rule", ["sequence", "bonferroni"])
def test_the_picked_point_keeps_the_promise(rates: list[float], together: bool, rule: str) -> None:
    assert broken(rates, 0.1, rule, together) <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / 300)


def test_without_a_correction_picking_breaks_the_promise() -> None:
    assert broken(RATES["all bad"], 0.1, "none", together=False) > 0.25


def test_sequences_find_more_than_bonferroni_on_a_path_that_gets_worse() -> None:
    rates, rng, steps = [0.004 * i for i in range(12)], np.random.default_rng(2), {"sequence": 0, "bonferroni": 0}
    for _ in range(100):
        path = shown(rates, 300, rng, together=True)
        for rule in steps:
            steps[rule] += path.best(max_changed=0.05, confidence=0.95, multiplicity=rule).step
    assert steps["sequence"] > steps["bonferroni"]


def test_the_sequence_ends_at_the_first_point_that_fails() -> None:
    path = path_of([replace(point(i, 0.1 * i, 0.0, 0.0), changed=c) for i, c in enumerate([0, 0, 0.3, 0, 0])])
    assert path.best(max_changed=0.1, confidence=0.95).step == 1
    assert path.best(max_changed=0.1, confidence=0.95, multiplicity="bonferroni").step == 4
    assert path.best(max_changed=0.1).step == 4  # what was observed, without a promise
    with pytest.raises(ValueError, match="multiplicity: got 'holm', expected one of 'sequence'"):
        path.best(max_changed=0.1, confidence=0.95, multiplicity="holm")


def test_the_bound_is_exact_where_the_sequence_tests() -> None:
    # a point at exactly the limit passes with probability at most 1 - confidence
    passing = [k for k in range(121) if changed_upper_bound(k, 120, 0.9) <= 0.1]
    assert binom.cdf(max(passing), 120, 0.1) <= 0.1
