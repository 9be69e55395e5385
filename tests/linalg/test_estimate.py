"""Trace and diagonal: right on average, exact where they can be, and with errors that hold."""

import inspect
import math
from collections.abc import Callable
from dataclasses import astuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fipgeo.linalg import (
    Dense,
    Diagonal,
    Estimate,
    Function,
    Gram,
    LinearOperator,
    Outcome,
    as_generator,
    diagonal,
    trace,
)

from .cases import NODES, PSD, Counting, draw, prescribed, root_with

TRACES = ("hutchinson", "hutch++", "xtrace", "xnystrace")
SHARP = ("hutch++", "xtrace", "xnystrace")
DIAGONALS = ("hutchinson", "xdiag")
SPECTRA: dict[str, Tensor] = {
    "flat": torch.linspace(0.5, 1.5, 80).double(),
    "power law": torch.arange(1, 81).double() ** -1.5,
    "steep": torch.exp(-torch.arange(80).double() / 4),
    "outliers and bulk": torch.cat([torch.tensor([40.0, 20.0, 10.0]), torch.linspace(0, 1, 77)]).double(),
}


def reference_xtrace(a: Tensor, omega: Tensor) -> list[float]:
    """The estimates as they are defined: a new subspace for every vector left out."""
    n, m = len(a), len(omega)
    found = []
    for i in range(m):
        others = torch.cat([omega[:i], omega[i + 1 :]])
        q = torch.linalg.qr(a @ others.T).Q
        v = omega[i] - q @ (q.T @ omega[i])
        found.append(float((q.T @ a @ q).trace() + (n - m + 1) * (v @ a @ v) / (v @ v)))
    return found


def reference_xnystrace(a: Tensor, omega: Tensor) -> list[float]:
    n, m = len(a), len(omega)
    found = []
    for i in range(m):
        others = torch.cat([omega[:i], omega[i + 1 :]]).T
        nystrom = a @ others @ torch.linalg.solve(others.T @ a @ others, others.T @ a)
        found.append(float(nystrom.trace() + (n - m + 1) * omega[i] @ (a - nystrom) @ omega[i]))
    return found


def reference_xdiag(a: Tensor, omega: Tensor) -> list[list[float]]:
    found = []
    for i in range(len(omega)):
        q = torch.linalg.qr(a @ torch.cat([omega[:i], omega[i + 1 :]]).T).Q
        rest = a - q @ (q.T @ a)
        found.append(((q @ (q.T @ a)).diagonal() + omega[i] * (rest @ omega[i])).tolist())
    return found


def jackknife(answers: list) -> Tensor:
    """From the answers formed without each vector."""
    without = torch.tensor(answers)
    return (without - without.mean(0)).square().sum(0).sqrt()


def leave_one(omega: Tensor) -> list[Tensor]:
    return [torch.cat([omega[:j], omega[j + 1 :]]) for j in range(len(omega))]


@given(seed=st.integers(0, 2**20), m=st.integers(2, 7))
def test_xtrace_is_what_it_is_defined_to_be(seed: int, m: int) -> None:
    a = draw(seed, 24, 24) / 5 + prescribed(seed + 1, torch.logspace(0, -2, 24))
    found = trace(Dense(a), num_products=2 * m, method="xtrace", generator=seed)
    omega = torch.randn(m, 24, generator=torch.Generator().manual_seed(seed))
    assert found.value == pytest.approx(sum(reference_xtrace(a, omega)) / m, rel=1e-7, abs=1e-9)
    means = [sum(values) / len(values) for values in (reference_xtrace(a, rest) for rest in leave_one(omega))]
    assert found.std_error == pytest.approx(float(jackknife(means)), rel=1e-5, abs=1e-9)
    assert (found.num_samples, found.num_products) == (m, 2 * m)


@given(seed=st.integers(0, 2**20), m=st.integers(2, 12))
def test_xnystrace_is_what_it_is_defined_to_be(seed: int, m: int) -> None:
    a = prescribed(seed, torch.logspace(0, -2, 24))
    found = trace(Dense(a, psd=True), num_products=m, method="xnystrace", generator=seed)
    omega = torch.linalg.qr(torch.randn(m, 24, generator=torch.Generator().manual_seed(seed)).T).Q.T
    assert found.value == pytest.approx(sum(reference_xnystrace(a, omega)) / m, rel=1e-9)
    means = [sum(values) / len(values) for values in (reference_xnystrace(a, rest) for rest in leave_one(omega))]
    assert found.std_error == pytest.approx(float(jackknife(means)), rel=1e-5)
    assert (found.num_samples, found.num_products) == (m, m)


@given(seed=st.integers(0, 2**20), m=st.integers(2, 7), symmetric=st.booleans())
def test_xdiag_is_what_it_is_defined_to_be(seed: int, m: int, symmetric: bool) -> None:
    a = prescribed(seed, torch.logspace(0, -2, 24))
    a = a if symmetric else a + draw(seed, 24, 24) / 5
    found = diagonal(Dense(a, symmetric=symmetric), num_products=2 * m, method="xdiag", generator=seed)
    bits = torch.randint(0, 2, (m, 24), generator=torch.Generator().manual_seed(seed))
    omega = (2 * bits - 1).double()
    if torch.linalg.matrix_rank(omega) < m:  # two equal or opposite vectors
        return
    expected = torch.tensor(reference_xdiag(a, omega)).mean(0)
    assert torch.allclose(found.value, expected, rtol=0, atol=1e-7)
    means = [torch.tensor(reference_xdiag(a, rest)).mean(0).tolist() for rest in leave_one(omega)]
    assert torch.allclose(found.std_error, jackknife(means), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", TRACES)
def test_the_trace_is_unbiased_and_its_error_holds(name: str, method: str) -> None:
    """Within 1, 2 and 3 standard errors at least as often as a normal law has it, less what 200 draws allow."""
    dense = prescribed(0, SPECTRA[name])
    count = 48 if method == "hutch++" else 24  # of which a third are samples
    found = [trace(Dense(dense, psd=True), num_products=count, method=method, generator=seed) for seed in range(200)]
    errors = torch.tensor([one.value for one in found]) - SPECTRA[name].sum()
    claimed = torch.tensor([one.std_error for one in found])
    rmse, rms_claim = float(errors.square().mean().sqrt()), float(claimed.square().mean().sqrt())
    assert abs(float(errors.mean())) < 3.5 * rmse / 200**0.5
    assert 0.9 * rmse < rms_claim < 6 * rmse
    shares = [float((errors.abs() <= times * claimed).double().mean()) for times in (1, 2, 3)]
    assert shares[0] > 0.55 and shares[1] > 0.86 and shares[2] > 0.95


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("method", DIAGONALS)
def test_the_diagonal_is_unbiased_and_its_errors_hold(name: str, method: str) -> None:
    dense = prescribed(0, SPECTRA[name])
    found = [diagonal(Dense(dense, psd=True), num_products=24, method=method, generator=seed) for seed in range(150)]
    errors = torch.stack([one.value for one in found]) - dense.diagonal()
    claimed = torch.stack([one.std_error for one in found])
    rmse, rms_claim = (stack.square().mean(0).sqrt() for stack in (errors, claimed))
    assert bool((errors.mean(0).abs() < 4.5 * rmse / 150**0.5).all())
    assert bool((rms_claim > 0.75 * rmse).all()) and bool((rms_claim < 8 * rmse).all())
    shares = [float((errors.abs() <= times * claimed).double().mean()) for times in (1, 2, 3)]
    assert shares[0] > 0.62 and shares[1] > 0.9 and shares[2] > 0.97


def test_sharp_methods_beat_hutchinson_where_the_spectrum_falls() -> None:
    for name, least in {"power law": 4, "steep": 4}.items():
        operator = Dense(prescribed(0, SPECTRA[name]), psd=True)
        for estimator, methods in ((trace, TRACES), (diagonal, DIAGONALS)):
            errors = {}
            for method in methods:
                runs = [estimator(operator, num_products=30, method=method, generator=seed) for seed in range(40)]
                exact = operator.diagonal() if estimator is diagonal else operator.diagonal().sum()
                errors[method] = torch.stack([torch.as_tensor(run.value) - exact for run in runs]).norm()
            assert all(least * errors[method] < errors["hutchinson"] for method in methods[1:])


@given(
    seed=st.integers(0, 2**20),
    rank=st.integers(1, 7),
    scale=st.sampled_from([1e-6, 1.0, 1e9]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    method=st.sampled_from(SHARP),
)
def test_low_rank_traces_are_exact_and_say_so(
    seed: int, rank: int, scale: float, dtype: torch.dtype, method: str
) -> None:
    root = root_with(seed, torch.linspace(2, 1, rank), 12, 60).to(dtype)
    operator = scale * Gram(Dense(root))
    found = trace(operator, num_products=24, method=method, generator=seed)
    exact, eps = scale * float(root.double().square().sum()), torch.finfo(dtype).eps
    assert abs(found.value - exact) < 200 * eps * exact
    assert 0 < found.std_error < 200 * eps * exact
    assert abs(found.value - exact) < 6 * found.std_error


@given(seed=st.integers(0, 2**20), rank=st.integers(1, 7), symmetric=st.booleans())
def test_low_rank_diagonals_are_exact_and_say_so(seed: int, rank: int, symmetric: bool) -> None:
    left = draw(seed, rank, 60)
    right = left if symmetric else draw(seed + 1, rank, 60)
    found = diagonal(Dense(left.T @ right, symmetric=symmetric), num_products=24, generator=seed)
    exact = (left * right).sum(0)
    assert torch.allclose(found.value, exact, atol=1e-11)
    assert bool((found.std_error < 1e-11).all()) and bool(
        ((found.value - exact).abs() <= 6 * found.std_error + 1e-14).all()
    )


@given(seed=st.integers(0, 2**20), method=st.sampled_from(TRACES), power=st.integers(-60, 60))
def test_estimates_scale_with_the_operator(seed: int, method: str, power: int) -> None:
    dense = prescribed(seed, torch.logspace(0, -2, 30))
    one = trace(Dense(dense, psd=True), num_products=9, method=method, generator=seed)
    other = trace(Dense(dense * 2.0**power, psd=True), num_products=9, method=method, generator=seed)
    assert other.value == pytest.approx(one.value * 2.0**power, rel=1e-9)
    assert other.std_error == pytest.approx(one.std_error * 2.0**power, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in NODES if name != "stack"])
@given(seed=st.integers(0, 2**20), n=st.integers(1, 9))
@settings(max_examples=4)
def test_every_node_is_exact_with_n_products(name: str, seed: int, n: int) -> None:
    operator, dense = NODES[name](seed, n, n)
    for method in ("auto", *SHARP[: 3 if name in PSD else 2]):
        found = trace(operator, num_products=max(3, n), method=method)
        assert (found.std_error, found.num_samples, found.num_products) == (0, 0, n)
        assert found.value == pytest.approx(float(dense.diagonal().sum()), abs=1e-10)
    entries = diagonal(operator, num_products=n)
    assert torch.allclose(entries.value, dense.diagonal(), atol=1e-10) and not entries.std_error.any()


@given(seed=st.integers(0, 2**20))
def test_hutchinson_has_the_variance_of_the_theory(seed: int) -> None:
    dense = prescribed(seed, draw(seed, 30).square())
    off = dense - dense.diagonal().diag()
    found = trace(Dense(dense, psd=True), method="hutchinson", num_products=400, generator=seed)
    assert abs(float(found) - float(dense.trace())) < 5 * found.std_error
    assert found.std_error == pytest.approx(float((2 * off.square().sum() / 400).sqrt()), rel=0.35)
    assert found == trace(Dense(dense, psd=True), method="hutchinson", num_products=400, generator=seed)
    entries = diagonal(Dense(torch.block_diag(dense, draw(0, 500, 500))), method="hutchinson", num_products=400)
    assert torch.allclose(entries.std_error[:30], (off.square().sum(1) / 400).sqrt(), rtol=0.35, atol=1e-12)


@pytest.mark.parametrize("method", TRACES)
def test_products_are_counted_and_come_in_few_stacks(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(Dense(prescribed(0, SPECTRA["power law"]), psd=True))
    found = trace(counting, num_products=31, method=method)
    assert counting.vectors == found.num_products and 30 <= found.num_products <= 31
    assert counting.calls <= 2
    monkeypatch.setitem(inspect.unwrap(trace).__globals__, "_STACK_BYTES", 5 * 80 * 8)
    again = trace(counting, num_products=31, method=method)
    assert counting.calls > 6
    assert astuple(again)[2:] == astuple(found)[2:]
    if method != "hutchinson":  # it draws as it goes
        assert again.value == pytest.approx(found.value)


@pytest.mark.parametrize("method", DIAGONALS)
def test_products_of_diagonals_are_counted(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(Dense(prescribed(0, SPECTRA["power law"]), psd=True))
    found = diagonal(counting, num_products=31, method=method)
    assert counting.vectors == found.num_products and 30 <= found.num_products <= 31 and counting.calls <= 2
    monkeypatch.setitem(
        inspect.unwrap(diagonal).__globals__, "_STACK_BYTES", 15 * 64 * 7
    )  # xdiag: seven entries at a time
    again = diagonal(counting, num_products=31, method=method)
    if method == "xdiag":
        assert torch.allclose(again.value, found.value) and torch.allclose(again.std_error, found.std_error)


def test_auto_takes_the_best_that_is_declared() -> None:
    dense = prescribed(0, SPECTRA["power law"])
    for operator, best in ((Dense(dense, psd=True), "xnystrace"), (Dense(dense), "xtrace")):
        assert trace(operator, num_products=20) == trace(operator, num_products=20, method=best)
    assert trace(Dense(dense), num_products=3) == trace(Dense(dense), num_products=3, method="hutchinson")
    for count, best in ((7, "hutchinson"), (8, "xdiag")):
        one, other = (diagonal(Dense(dense), num_products=count, method=m) for m in ("auto", best))
        assert torch.equal(one.value, other.value)


@pytest.mark.parametrize("method", TRACES)
def test_zero_operators_and_single_samples(method: str) -> None:
    zero = Diagonal(torch.zeros(50))
    assert astuple(trace(Dense(torch.zeros(50, 50), psd=True), num_products=9, method=method))[:2] == (0, 0)
    assert float(trace(zero, num_products=60, method=method)) == 0
    assert not diagonal(Dense(torch.zeros(50, 50)), num_products=9).value.any()
    least = {"hutch++": 3, "xtrace": 2}.get(method, 1)
    single = trace(Dense(prescribed(0, torch.ones(50)), psd=True), num_products=least, method=method)
    assert math.isnan(single.std_error) and single.value == pytest.approx(50, rel=0.1)
    assert math.isnan(float(diagonal(Dense(torch.ones(9, 9)), num_products=1).std_error[0]))


def broken(after: int) -> LinearOperator:
    """Products with NaN from the given call on."""
    calls = []

    def apply(x: Tensor) -> Tensor:
        calls.append(0)
        return x * (torch.nan if len(calls) > after else 1.0)

    return Function(apply, None, (40, 40), dtype=torch.float64, psd=True)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(("estimator", "method"), [(trace, m) for m in TRACES] + [(diagonal, m) for m in DIAGONALS])
def test_products_that_are_not_finite_are_reported(estimator: Callable, method: str, after: int) -> None:
    found = estimator(broken(after), num_products=12, method=method)
    if after and method in ("hutchinson", "xnystrace"):
        assert found.ok  # one stack is all they need
    else:
        assert found.outcome is Outcome.NOT_FINITE and not found.ok
        assert bool(torch.as_tensor(found.value).isnan().all()) and bool(torch.as_tensor(found.std_error).isnan().all())


def test_an_operator_wrongly_declared_psd_is_reported() -> None:
    found = trace(Dense(prescribed(0, torch.linspace(-1, 1, 40)), psd=True), num_products=12)
    assert found.outcome is Outcome.BREAKDOWN and math.isnan(found.value) and "psd_gap" in found.outcome.message


def test_the_same_seed_gives_the_same_numbers_and_no_global_state_moves() -> None:
    operator = Dense(torch.ones(90, 90), symmetric=True)
    before = torch.get_rng_state()
    for method in TRACES[:3]:
        one, two = (trace(operator, method=method, generator=g) for g in (1, as_generator(1)))
        assert one == two and isinstance(one, Estimate)
    assert trace(operator, method="hutchinson", generator=1) != trace(operator, method="hutchinson", generator=2)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_operators_are_taken() -> None:
    root = root_with(0, torch.linspace(2, 1, 5), 12, 60).to(torch.bfloat16)
    exact = float(root.double().square().sum())
    for method in TRACES:
        found = trace(Gram(Dense(root)), num_products=24, method=method)
        assert abs(found.value - exact) < max(3 * found.std_error, 0.1 * exact)
    entries = diagonal(Gram(Dense(root)), num_products=24)
    assert entries.value.dtype == torch.bfloat16 and float(entries.value.sum()) == pytest.approx(exact, rel=0.1)


def test_misuse_is_refused() -> None:
    wide, square = Dense(torch.ones(2, 3)), Dense(torch.ones(9, 9))
    for estimator in (trace, diagonal):
        with pytest.raises(ValueError, match="square one; for .* take Gram"):
            estimator(wide)
        with pytest.raises(ValueError, match="num_products is 0, expected at least 1"):
            estimator(square, num_products=0)
        with pytest.raises(ValueError, match="method is 'best', expected one of 'auto'"):
            estimator(square, method="best")
    with pytest.raises(ValueError, match="num_products is 2, expected at least 3 for method='hutch\\+\\+'"):
        trace(square, num_products=2, method="hutch++")
    with pytest.raises(ValueError, match="num_products is 0"):
        trace(square, method="hutchinson", num_products=0)
    with pytest.raises(ValueError, match="psd=True, or take method='xtrace'"):
        trace(square, method="xnystrace")
