"""The figures of the metric benchmark: each function measures one or a few on one case and returns records.

Ratios are ours over curvlinops', below 1 is faster. `spread` is the smallest and the largest ratio of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

import fipgeo
from benchmarks import peers
from benchmarks.measure import Race, Series, Unavailable, bounded, clock_for, host_round_trips, race, reason, timed
from benchmarks.models import Case
from benchmarks.peers import CurvlinopsProduct
from fipgeo.jacobian import ENGINES, JacobianRoot

K = 20
RESIDUAL = 1e-4
DAMPING = 1e-3
SMALL_DAMPING = 1e-5
TARGET = 1e-6
LARGEST_BLOCK = 2**30
"""Bytes that a stack of vectors may take; larger figures are left out and named."""
PEER = "curvlinops"


@dataclass
class Bench:
    """A case under measurement, with the settings of the run and what came of it.

    Attributes:
        records: What was measured.
        skipped: What was not, each with its reason.
    """

    case: Case
    rounds: int
    limit: float
    threads: int
    device: str
    max_bytes: int
    records: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def metric(self, case: Case | None = None, engine: str = "auto") -> fipgeo.Metric:
        """Our metric of the case, as a user would make it, on the batches that the peers get."""
        case = case or self.case
        return fipgeo.metric(
            case.model,
            case.batches,
            geometry="euclidean",
            engine=engine,
            max_bytes=self.max_bytes,
            forward_fn=case.forward_fn,
        )

    def race(self, contestants: Mapping[str, Callable[[], Any]], **options: Any) -> Race:
        """`measure.race` with the settings of the run."""
        settings = {"rounds": self.rounds, "limit": self.limit, "device": self.device, "threads": self.threads}
        return race(contestants, **settings, **options)

    def note(self, figure: str, value: float | None, unit: str, *, method: str = "fipgeo", **more: Any) -> None:
        """Keep a record."""
        base = {"case": self.case.name, "method": method, "figure": figure, "value": _short(value), "unit": unit}
        sizes = {"examples": self.case.num_examples, "weights": self.case.num_weights}
        where = {"device": self.device, "threads": self.threads}
        more = {key: _short(entry) for key, entry in more.items()}
        self.records.append(
            {
                **base,
                "seed": self.case.seed,
                "seconds": None,
                "spread": None,
                **more,
                **sizes,
                **where,
                **self.case.notes,
            }
        )

    def skip(self, figure: str, method: str, why: str) -> None:
        """Name what was left out."""
        self.skipped.append(
            {"case": self.case.name, "method": method, "figure": figure, "seed": self.case.seed, "reason": why}
        )

    def ratios(self, figure: str, found: Race, **more: Mapping[str, Any]) -> None:
        """A record a contestant: its time over the peer's. Fields of `more` are mappings from contestant to entry."""
        for name, why in found.failed.items():
            self.skip(figure, name, why)
        for name, series in found.series.items():
            value, spread = found.ratio(name, PEER) if PEER in found.series else (None, None)
            extra = {key: entries[name] for key, entries in more.items() if name in entries}
            self.note(figure, value, f"x {PEER}", method=name, spread=spread, **_times(series, found.clock), **extra)

    def auto_ratio(self, task: str, found: Race) -> None:
        """How far the automatic choice is from the best single engine."""
        single = [name for name in found.series if name.startswith("fipgeo ")]
        if "fipgeo" in found.series and single:
            best = min(single, key=lambda name: found.series[name].seconds(found.clock))
            value, spread = found.ratio("fipgeo", best)
            seconds = found.series["fipgeo"].seconds(found.clock)
            self.note(f"auto_ratio_{task}", value, "x best engine", spread=spread, seconds=seconds, best=best)


def engines() -> dict[str, str]:
    """Method names of ours and their engines: "fipgeo" chooses by itself."""
    return {"fipgeo": "auto"} | {f"fipgeo {name}": name for name in ENGINES if name != "auto"}


def products(bench: Bench) -> None:
    """agreement_curvlinops, time_ratio_matvec with set-up beside it, time_ratio_block16, host_round_trips."""
    v = bench.case.vectors(1)[0]
    truth = peers.reference(bench.case)(v)
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    setup: dict[str, float] = {}
    explained: dict[str, str] = {}
    results: dict[str, Tensor] = {}
    clock = clock_for(bench.device, bench.threads)

    def start(method: str, make: Callable[[], Callable[[Tensor], Tensor]]) -> None:
        def begin() -> tuple[Callable[[Tensor], Tensor], Tensor]:
            call = make()
            return call, call(v)

        try:
            with bounded(bench.limit):
                wall, cpu, (call, product) = timed(begin, bench.device)
        except Exception as error:
            bench.skip("time_ratio_matvec", method, reason(error))
            return
        product = product * bench.case.num_outputs / 2 if method == PEER else product
        gap = float((product - truth).norm() / truth.norm())
        calls[method], setup[method] = call, cpu if clock == "cpu" else wall
        bench.note("agreement_reference", gap, "relative error", method=method)
        results[method] = product

    def ours(engine: str, method: str) -> Callable[[Tensor], Tensor]:
        g = bench.metric(engine=engine)
        call = prepared(g)
        explained[method] = g.explain()
        return call

    start(PEER, lambda: CurvlinopsProduct(bench.case).matvec)
    for method, engine in engines().items():
        start(method, lambda engine=engine, method=method: ours(engine, method))
    start("nngeometry", lambda: peers.nngeometry_product(bench.case))
    if PEER in results:
        for method in results.keys() - {PEER}:
            gap = float((results[method] - results[PEER]).norm() / results[PEER].norm())
            bench.note("agreement_curvlinops", gap, "relative error", method=method)
    found = bench.race({method: (lambda call=call: call(v)) for method, call in calls.items()})
    steady = {name: series.seconds(found.clock) for name, series in found.series.items()}
    extra = {name: max(setup[name] - steady[name], 0.0) for name in steady}
    even = {name: _break_even(name, steady, extra) for name in steady if name != PEER and PEER in steady}
    bench.ratios("time_ratio_matvec", found, setup_seconds=extra, break_even_products=even, engine=explained)
    bench.auto_ratio("matvec", found)
    for name, count in even.items():
        bench.note("setup_seconds", extra[name], "s", method=name, seconds=extra[name])
        bench.note("break_even_products", count, "products", method=name)
    if bench.device != "cpu":
        for name in ("fipgeo", PEER):
            if name in calls:
                trips = host_round_trips(lambda name=name: calls[name](v))
                bench.note("host_round_trips", trips, "waits a product", method=name)
    _blocks(bench, {name: call for name, call in calls.items() if name.startswith("fipgeo")})


def _blocks(bench: Bench, ours: dict[str, Callable[[Tensor], Tensor]]) -> None:
    if 16 * bench.case.num_weights * 4 > LARGEST_BLOCK:
        for figure in ("time_ratio_block16", "time_ratio_block16_with_setup"):
            bench.skip(figure, "fipgeo", "16 vectors would not fit beside the network")
        return
    stack = bench.case.vectors(16)
    columns = stack.T.contiguous()
    operator = _operator(bench)
    contestants: dict[str, Callable[[], Any]] = {name: (lambda call=call: call(stack)) for name, call in ours.items()}
    if operator is not None:
        contestants = {PEER: lambda: operator.matmat(columns)} | contestants
    found = bench.race(contestants)
    bench.ratios("time_ratio_block16", found)
    bench.auto_ratio("block16", found)
    prepare = {PEER: lambda: _fresh(bench, lambda case: CurvlinopsProduct(case).matmat(columns))}
    prepare["fipgeo"] = lambda: _fresh(bench, lambda case: bench.metric(case).matvec(stack))
    bench.ratios("time_ratio_block16_with_setup", bench.race({}, prepare=prepare, warm=False))


def first(bench: Bench) -> None:
    """time_ratio_first: one product of a metric that nobody has used, everything included."""
    v = bench.case.vectors(1)[0]
    prepare = {
        PEER: lambda: _fresh(bench, lambda case: CurvlinopsProduct(case).matvec(v)),
        "fipgeo": lambda: _fresh(bench, lambda case: bench.metric(case).matvec(v)),
    }
    bench.ratios("time_ratio_first", bench.race({}, prepare=prepare))


def top20(bench: Bench) -> None:
    """time_ratio_top20: the 20 largest eigenpairs to a true residual of 1e-4 of the largest, from a fresh metric."""
    if K * bench.case.num_weights * 4 > LARGEST_BLOCK:
        return bench.skip("time_ratio_top20", "fipgeo", "a basis of 80 vectors would not fit beside the network")
    judge = peers.reference(bench.case)
    k = min(K, bench.metric().rank_bound)

    def spectrum(case: Case, engine: str) -> tuple[Tensor, Tensor, int]:
        found = bench.metric(case, engine).spectrum(k, rtol=RESIDUAL)
        assert found.vectors is not None
        return found.values, found.vectors, found.num_products

    def eigsh(case: Case) -> tuple[Tensor, Tensor, int]:
        operator = CurvlinopsProduct(case)
        values, vectors = peers.eigenpairs(operator, k, tolerance, case.seed)
        return values, vectors, operator.products

    # ARPACK stops at |r_i| <= tol lambda_i: the loosest tol that can serve is tried first, else its strictest
    try:
        with bounded(bench.limit):
            largest, _, _ = spectrum(bench.case, "auto")
    except Exception as error:
        return bench.skip("time_ratio_top20", "fipgeo", reason(error))
    tolerance = float(min(1e-2, RESIDUAL * largest[0] / largest[-1].clamp_min(1e-12 * largest[0])))
    prepare = {PEER: lambda: _fresh(bench, eigsh)}
    prepare |= {name: (lambda e=e: _fresh(bench, lambda case: spectrum(case, e))) for name, e in engines().items()}
    found = bench.race({}, prepare=prepare, warm=False)
    if PEER in found.series and tolerance > RESIDUAL and _worst(judge, found.series[PEER].result) > RESIDUAL:
        tolerance = RESIDUAL
        found = bench.race({}, prepare=prepare, warm=False)
    residual = {name: _worst(judge, series.result) for name, series in found.series.items()}
    counts = {name: series.result[2] for name, series in found.series.items()}
    bench.ratios("time_ratio_top20", found, residual=residual, products=counts, tol={PEER: tolerance})
    bench.auto_ratio("top20", found)


def solves(bench: Bench) -> None:
    """time_ratio_solve, time_ratio_solve_next and solve_residual_small_damping."""
    if 2 * bench.case.num_weights * 4 > LARGEST_BLOCK:
        return bench.skip("time_ratio_solve", "fipgeo", "the vectors would not fit beside the network")
    judge, exact = peers.reference(bench.case), peers.reference(bench.case, double=True)
    largest = _largest(judge, bench.case)
    rhs, other = peers.pulled_back(bench.case), peers.pulled_back(bench.case, seed=3)

    def counted(case: Case, damping: float, b: Tensor) -> tuple[Tensor, int]:
        operator = CurvlinopsProduct(case)
        return peers.solved(operator, b, damping, TARGET), operator.products

    def ours(g: fipgeo.Metric, damping: float, b: Tensor) -> tuple[Tensor, int]:
        found = g.solve(b, damping, rtol=TARGET)
        return found.value, found.num_products

    def compare(figure: str, damping: float, b: Tensor, again: fipgeo.Metric | None = None) -> Race:
        prepare = {PEER: lambda: _fresh(bench, lambda case: counted(case, damping, b))}
        prepare["fipgeo"] = (
            (lambda: _fresh(bench, lambda case: ours(bench.metric(case), damping, b)))
            if again is None
            else (lambda: lambda: ours(again, damping, b))
        )
        found = bench.race({}, prepare=prepare, warm=False)
        measured = {name: series.result for name, series in found.series.items()}
        residual = {name: _left(judge, x, b, damping) for name, (x, _) in measured.items()}
        double = {name: _left(exact, x.double(), b.double(), damping) for name, (x, _) in measured.items()}
        counts = {name: count for name, (_, count) in measured.items()}
        if figure == "solve_residual_small_damping":
            for name, why in found.failed.items():
                bench.skip(figure, name, why)
            for name, series in found.series.items():
                more = {"products": counts[name], "residual_double": double[name]}
                bench.note(
                    figure, residual[name], "|b - A x| / |b|", method=name, **_times(series, found.clock), **more
                )
        else:
            bench.ratios(figure, found, residual=residual, residual_double=double, products=counts)
        return found

    compare("time_ratio_solve", DAMPING * largest, rhs)
    try:
        with bounded(bench.limit):
            kept = bench.metric()
            kept.solve(rhs, DAMPING * largest, rtol=TARGET)
    except Exception as error:
        return bench.skip("time_ratio_solve_next", "fipgeo", reason(error))
    compare("time_ratio_solve_next", DAMPING * largest, other, kept)
    compare("solve_residual_small_damping", SMALL_DAMPING * largest, rhs, kept)


def jacobians(bench: Bench) -> None:
    """jacobian_seconds: building all of J, on as many examples as fit max_bytes."""
    entries = bench.case.num_examples * bench.case.num_outputs * bench.case.num_weights
    if entries * 4 > bench.max_bytes:
        return bench.skip("jacobian_seconds", "fipgeo", "J does not fit max_bytes")

    def ours() -> Any:
        return prepared(bench.metric(bench.case, "materialised"))

    found = bench.race({"fipgeo": ours} | peers.jacobian_builders(bench.case))
    for name, why in found.failed.items():
        bench.skip("jacobian_seconds", name, why)
    for name, series in found.series.items():
        bench.note("jacobian_seconds", series.seconds(found.clock), "s", method=name, **_times(series, found.clock))


def scaling(bench: Bench, figure: str) -> None:
    """seconds_by_examples or seconds_by_weights: one product, set-up amortised; a record a method."""
    v = bench.case.vectors(1)[0]
    call = prepared(bench.metric())
    operator = _operator(bench)
    contestants: dict[str, Callable[[], Any]] = {"fipgeo": lambda: call(v)}
    if operator is not None:
        contestants[PEER] = lambda: operator.matvec(v)
    found = bench.race(contestants)
    for name, why in found.failed.items():
        bench.skip(figure, name, why)
    for name, series in found.series.items():
        bench.note(figure, series.seconds(found.clock), "s", method=name, **_times(series, found.clock))


def prepared(g: fipgeo.Metric) -> Callable[[Tensor], Tensor]:
    """The product of a metric that has been told that many will follow."""
    if isinstance(g.root, JacobianRoot):
        g.root.prepare()
    return g.matvec


def _operator(bench: Bench) -> CurvlinopsProduct | None:
    try:
        return CurvlinopsProduct(bench.case)
    except Unavailable:
        return None


def _fresh(bench: Bench, call: Callable[[Case], Any]) -> Callable[[], Any]:
    own = bench.case.fresh()
    return lambda: call(own)


def _break_even(name: str, steady: Mapping[str, float], setup: Mapping[str, float]) -> int | None:
    """Products after which ours, set-up included, has taken less time; None for never."""
    saved = steady[PEER] - steady[name]
    return None if saved <= 0 else max(1, int(-(-(setup[name] - setup[PEER]) // saved)))


def _times(series: Series, clock: str) -> dict[str, Any]:
    both = {f"{name}_seconds": series.seconds(name) for name in ("wall", "cpu")}
    return {"seconds": series.seconds(clock), **both, "rounds": len(series.wall), "clock": clock}


def _worst(judge: Callable[[Tensor], Tensor], pairs: tuple[Tensor, Tensor, int]) -> float:
    """The largest |g v - lambda v| / lambda_max of the pairs, with unit v."""
    values, vectors = pairs[0].to(pairs[1].dtype), pairs[1]
    gaps = [float((judge(v) - value * v).norm() / v.norm()) for value, v in zip(values, vectors, strict=True)]
    return max(gaps) / float(values[0])


def _left(judge: Callable[[Tensor], Tensor], x: Tensor, rhs: Tensor, damping: float) -> float:
    return float((rhs - judge(x) - damping * x).norm() / rhs.norm())


def _largest(judge: Callable[[Tensor], Tensor], case: Case, steps: int = 12) -> float:
    """The largest eigenvalue by the power method: a scale for the damping, the same for all."""
    v, value = case.vectors(1, seed=4)[0], 0.0
    for _ in range(steps):
        moved = judge(v / v.norm())
        value, v = float(moved.norm()), moved
    return value


def _short(value: Any) -> Any:
    if isinstance(value, list):
        return [_short(entry) for entry in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


FIGURES: dict[str, Callable[[Bench], None]] = {
    "products": products,
    "first": first,
    "top20": top20,
    "solves": solves,
    "jacobians": jacobians,
}
