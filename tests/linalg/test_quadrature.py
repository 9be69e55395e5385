"""Spectral densities against eigenvalues known by another route: sums, counts, ranks and their errors."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.linalg import (
    Dense,
    Density,
    Diagonal,
    Estimate,
    Function,
    Gram,
    Outcome,
    Spectrum,
    dense_eigh,
    lanczos,
    lanczos_density,
)

from .cases import Counting, draw, prescribed, root_with

SPECTRA: dict[str, Tensor] = {
    "flat": torch.linspace(0.5, 1.5, 150).double(),
    "power law": torch.arange(1, 151).double() ** -1.5,
    "outliers and bulk": torch.cat([torch.tensor([40.0, 20.0, 10.0]), torch.linspace(0.01, 1, 147)]).double(),
    "low rank": torch.cat([torch.linspace(3, 1, 40), torch.zeros(110)]).double(),
}
SUMS: dict[str, tuple[Callable[[Density], Estimate], Callable[[Tensor], Tensor]]] = {
    "trace": (lambda d: d.trace(), lambda x: x.sum()),
    "log det": (lambda d: d.log_det(0.1), lambda x: (x + 0.1).log().sum()),
    "effective dimension": (lambda d: d.effective_dimension(0.1), lambda x: (x / (x + 0.1)).sum()),
    "exponential": (lambda d: d.spectral_sum(torch.exp), lambda x: x.exp().sum()),
    "effective rank": (
        lambda d: d.effective_rank(),
        lambda x: torch.special.entr(x / x.sum()).sum().exp(),
    ),
    "participation ratio": (lambda d: d.participation_ratio(), lambda x: x.sum().square() / x.square().sum()),
}


def operator(name: str, seed: int = 0) -> Dense:
    return Dense(prescribed(seed, SPECTRA[name]), psd=True)


@given(seed=st.integers(0, 2**20), n=st.integers(1, 14), psd=st.booleans(), known=st.integers(0, 14))
def test_a_full_frame_of_full_length_is_exact(seed: int, n: int, psd: bool, known: int) -> None:
    values = draw(seed, n).square() + 0.1 if psd else draw(seed, n)
    dense = prescribed(seed, values)
    deflate = dense_eigh(Dense(dense, symmetric=True), min(n, known)) if known else None
    found = lanczos_density(Dense(dense, psd=psd, symmetric=True), num_probes=20, num_steps=20, deflate=deflate)
    assert found.ok and found.dim == n and found.num_probes == n - min(n, known)
    for method, oracle in SUMS.values() if psd else [SUMS["trace"], SUMS["exponential"]]:
        estimate = method(found)
        assert estimate.value == pytest.approx(float(oracle(values)), rel=1e-7, abs=1e-9)
        assert estimate.std_error == pytest.approx(0, abs=1e-9)
    ordered = torch.linalg.eigvalsh(dense)
    between = torch.cat([ordered[:1] - 1, (ordered[1:] + ordered[:-1]) / 2, ordered[-1:] + 1])
    counts = found.cumulative(between)
    assert torch.allclose(counts.value, torch.arange(n + 1).double(), atol=1e-6)
    assert torch.allclose(found.cumulative(between, above=True).value, n - counts.value)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("deflated", [0, 3])
def test_sums_are_unbiased_and_their_errors_hold(name: str, deflated: int) -> None:
    """Within 1, 2 and 3 standard errors about as often as eight skew samples have it."""
    values, a = SPECTRA[name], operator(name)
    deflate = lanczos(a, deflated, rtol=1e-9) if deflated else None
    densities = []
    for seed in range(5):  # parts of a frame are frames
        frame = lanczos_density(a, num_probes=144, num_steps=20, deflate=deflate, generator=seed)
        parts = zip(frame.nodes.split(8), frame.weights.split(8), strict=True)
        densities += [replace(frame, nodes=nodes, weights=weights) for nodes, weights in parts]
    for what, (method, oracle) in SUMS.items():
        found = [method(density) for density in densities]
        errors = torch.tensor([one.value for one in found]) - oracle(values)
        claimed = torch.tensor([one.std_error for one in found])
        if float(claimed.max()) < 1e-9 * float(oracle(values)):
            assert float(errors.abs().max()) < 1e-6 * float(oracle(values))
            continue
        rmse, claim = (float(part.square().mean().sqrt()) for part in (errors, claimed))
        shares = [float((errors.abs() <= times * claimed).double().mean()) for times in (1, 2, 3)]
        assert 0.75 < claim / rmse < 1.35, what
        # ratios of sums are a little biased, and as skew as the outliers they rest on
        ratio_of_outliers = what in ("effective rank", "participation ratio") and not deflated and name != "flat"
        assert shares[0] > 0.5 and shares[1] > (0.7 if ratio_of_outliers else 0.82), what
        assert shares[2] > (0.8 if ratio_of_outliers else 0.91), what
        if not ratio_of_outliers:
            assert abs(float(errors.mean())) < 4 * rmse / len(found) ** 0.5, what


def test_deflation_takes_most_of_the_variance_of_outliers() -> None:
    a = operator("outliers and bulk")
    plain = lanczos_density(a, num_probes=8).trace()
    found = lanczos_density(a, num_probes=8, deflate=lanczos(a, 3)).trace()
    exact = float(SPECTRA["outliers and bulk"].sum())
    assert found.std_error < plain.std_error / 5 and abs(found.value - exact) < 4 * found.std_error


@pytest.mark.parametrize("name", SPECTRA)
def test_counts_hold_within_their_errors(name: str) -> None:
    values, a = SPECTRA[name], operator(name)
    bounds = torch.logspace(-2, 1, 13)
    exact = (values[None] <= bounds[:, None]).sum(1)
    found = [lanczos_density(a, num_probes=6, num_steps=25, generator=seed).cumulative(bounds) for seed in range(15)]
    errors = torch.stack([one.value for one in found]) - exact
    claimed = torch.stack([one.std_error for one in found])
    away = (errors.abs() > 1e-6).any(0)
    assert bool((claimed[:, ~away] < 3).all())
    if bool(away.any()):
        assert float((errors.abs() <= 3 * claimed + 1e-6)[:, away].double().mean()) > 0.85
        assert float(claimed.max()) < 25
    if name == "low rank":
        assert torch.allclose(found[0].value[bounds < 0.5], torch.tensor(110.0), atol=4 * float(claimed.max()))


@given(seed=st.integers(0, 2**20), log=st.booleans(), deflated=st.booleans())
@settings(max_examples=4)
def test_the_density_integrates_to_the_number_of_eigenvalues(seed: int, log: bool, deflated: bool) -> None:
    values = torch.cat([draw(seed, 40).abs() + 0.5, -torch.ones(10)])
    a = Dense(prescribed(seed, values), symmetric=True)
    found = lanczos_density(a, num_probes=4, num_steps=12, deflate=lanczos(a, 2) if deflated else None)
    places = torch.linspace(-4, 4, 2001) if log else torch.linspace(-20, 20, 2001)
    smooth = found.on(10**places if log else places, 0.05, log=log)
    whole = torch.trapezoid(smooth.value, places)
    assert whole == pytest.approx(float(found.cumulative(0.0, above=True).value) if log else 50.0, rel=1e-3)
    assert smooth.std_error.shape == smooth.value.shape and not smooth.std_error.isnan().any()
    inner = torch.trapezoid(found.on(10**places if log else places, 0.05, log=log, include_exact=False).value, places)
    assert whole - inner == pytest.approx(2.0 if deflated else 0.0, abs=1e-3)


def test_eigenvalues_stay_sharp_and_unresolved_nodes_are_spread() -> None:
    values = torch.cat([torch.tensor([9.0]), torch.linspace(0, 1, 149)])
    found = lanczos_density(Dense(prescribed(0, values), psd=True), num_probes=10, num_steps=12)
    peak = found.on(torch.tensor([9.0, 9.1]), 0.01).value
    assert peak[0] > 10 and peak[1] < 1e-3
    bulk = found.on(torch.linspace(0.1, 0.9, 200), 1e-4).value
    assert bulk.min() > 75 and bulk.max() < 300  # 149 at every place; nodes alone would give 0 and thousands
    raw = replace(found, residuals=None).on(torch.linspace(0.1, 0.9, 200), 1e-4).value
    assert raw.min() < 1e-3 and raw.max() > 1000


@given(seed=st.integers(0, 2**20), rank=st.integers(0, 6), scale=st.sampled_from([1e-8, 1.0, 1e8]))
def test_low_rank_operators_end_early(seed: int, rank: int, scale: float) -> None:
    root = root_with(seed, torch.linspace(2, 1, rank), 12, 60)
    counting = Counting(scale * Gram(Dense(root)))
    found = lanczos_density(counting, num_probes=5, num_steps=40, generator=seed)
    assert found.num_products == counting.vectors <= 5 * (rank + 3)
    assert counting.calls == counting.vectors / 5
    assert torch.allclose(found.weights.sum(1), torch.full((5,), 60.0))
    inside = found.weights * (found.nodes > 1e-9 * scale)
    assert found.trace().value == pytest.approx(float((inside * found.nodes).sum(1).mean()))
    assert (inside > 1e-9).sum(1).max() <= rank


def test_damping_makes_log_det_defined() -> None:
    found = lanczos_density(operator("low rank"), num_probes=6)
    singular = found.log_det()
    assert singular.outcome is Outcome.BREAKDOWN and "damping" in singular.outcome.message and singular.value < -1e3
    assert found.log_det(1e-3).ok
    indefinite = lanczos_density(Dense(prescribed(0, torch.linspace(-1, 1, 30)), symmetric=True))
    assert indefinite.log_det(0.5).outcome is Outcome.BREAKDOWN and indefinite.log_det(2.0).ok


def test_zero_operators_have_no_rank() -> None:
    found = lanczos_density(Diagonal(torch.zeros(30)))
    assert (found.trace().value, found.effective_rank().value, found.participation_ratio().value) == (0, 0, 0)
    assert float(found.cumulative(0.0).value) == pytest.approx(30) and found.tolerance() == 0


def test_nodes_that_may_stand_for_zeros_are_below_the_tolerance() -> None:
    values = torch.cat([torch.logspace(0, -2, 148), torch.zeros(50)])
    found = lanczos_density(Diagonal(values), num_probes=6, num_steps=20)
    assert 1e-6 < found.tolerance() < 1e-2
    assert float(found.cumulative(found.tolerance()).value) > 40
    resolved = lanczos_density(Diagonal(values), num_probes=6, num_steps=198)
    assert resolved.tolerance() < 1e-12


def test_scaling_the_operator_scales_the_spectrum() -> None:
    a = operator("power law")
    one, other = (lanczos_density(scale * a, num_probes=3, num_steps=20) for scale in (1.0, 2.0**40))
    assert torch.allclose(other.nodes / 2**40, one.nodes) and torch.allclose(other.weights, one.weights)
    assert other.effective_rank().value == pytest.approx(one.effective_rank().value)


def test_memory_limits_change_groups_not_results(monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(operator("power law"))
    whole = lanczos_density(counting, num_probes=6, num_steps=20)
    assert counting.calls == 20 and whole.num_products == 120
    grouped = lanczos_density(counting, num_probes=6, num_steps=20, max_bytes=2 * 20 * 150 * 8)
    assert counting.calls == 80
    assert torch.allclose(grouped.nodes, whole.nodes) and torch.allclose(grouped.weights, whole.weights, atol=1e-9)
    bare = lanczos_density(counting, num_probes=6, num_steps=80, max_bytes=1)  # ghosts, whose weights are right
    full = lanczos_density(counting, num_probes=6, num_steps=80)
    assert counting.calls == 240
    assert not torch.allclose(bare.nodes, full.nodes)
    for method, _ in SUMS.values():
        assert method(bare).value == pytest.approx(method(full).value, rel=1e-6)


def test_float32_operators_keep_their_figures() -> None:
    dense = prescribed(0, SPECTRA["outliers and bulk"])
    single, double = (lanczos_density(Dense(dense.to(dtype), psd=True)) for dtype in (torch.float32, torch.float64))
    assert single.eps == torch.finfo(torch.float32).eps and single.nodes.dtype == torch.float64
    exact = float((SPECTRA["outliers and bulk"] + 1e-2).log().sum())
    for found in (single, double):
        log_det = found.log_det(1e-2)
        assert abs(log_det.value - exact) < 4 * log_det.std_error
    assert lanczos_density(Dense(dense.bfloat16(), psd=True)).trace().value == pytest.approx(143, rel=0.5)


@pytest.mark.parametrize("after", [0, 3])
def test_products_that_are_not_finite_are_reported(after: int) -> None:
    calls = []

    def apply(x: Tensor) -> Tensor:
        calls.append(0)
        return x * (torch.nan if len(calls) > after else torch.arange(1.0, 31.0))

    found = lanczos_density(Function(apply, None, (30, 30), dtype=torch.float64, psd=True), num_steps=8)
    assert found.outcome is Outcome.NOT_FINITE and not found.ok
    for method, _ in SUMS.values():
        estimate = method(found)
        assert estimate.outcome is Outcome.NOT_FINITE and math.isnan(estimate.value) and math.isnan(estimate.std_error)
    for many in (found.cumulative(torch.ones(3)), found.on(torch.ones(3), 0.1, log=True)):
        assert bool(many.value.isnan().all()) and many.outcome is Outcome.NOT_FINITE


def test_one_probe_has_no_error_and_no_global_state_moves() -> None:
    before = torch.get_rng_state()
    found = lanczos_density(operator("flat"), num_probes=1, generator=3)
    assert math.isnan(found.trace().std_error) and math.isnan(found.effective_rank().std_error)
    assert torch.equal(found.nodes, lanczos_density(operator("flat"), num_probes=1, generator=3).nodes)
    assert not torch.equal(found.nodes, lanczos_density(operator("flat"), num_probes=1, generator=4).nodes)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_density_plots_itself() -> None:
    assert lanczos_density(operator("power law")).plot().get_xscale() == "log"


def test_misuse_is_refused() -> None:
    a = operator("flat")
    with pytest.raises(ValueError, match="take Gram"):
        lanczos_density(Dense(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="declared symmetric"):
        lanczos_density(Dense(torch.ones(3, 3)))
    with pytest.raises(ValueError, match="num_probes is 0"):
        lanczos_density(a, num_probes=0)
    with pytest.raises(ValueError, match="num_steps is 0"):
        lanczos_density(a, num_steps=0)
    with pytest.raises(ValueError, match="deflate has no vectors"):
        lanczos_density(a, deflate=Spectrum(torch.ones(1), None, None, dim=150))
    with pytest.raises(ValueError, match="vectors of size 3"):
        lanczos_density(a, deflate=dense_eigh(Diagonal(torch.ones(3)), 1))
    found = lanczos_density(a)
    with pytest.raises(ValueError, match="damping is -1"):
        found.log_det(-1)
    with pytest.raises(ValueError, match="for the rank take cumulative"):
        found.effective_dimension(0)
    with pytest.raises(ValueError, match="width is 0"):
        found.on(torch.ones(2), 0)
    with pytest.raises(ValueError, match="take torch.logspace"):
        found.on(torch.zeros(2), 0.1, log=True)
