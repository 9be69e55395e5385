"""Timing: contestants take turns in one process, so that a busy machine slows all of them alike."""

from __future__ import annotations

import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SHORTEST = 0.05
"""Seconds that one turn takes at least; faster products are repeated within their turn."""


class Unavailable(Exception):
    """A package, an engine or a figure is not to be had for a case; the message says why."""


class TooSlow(Unavailable):
    """A call was stopped at its time limit."""


def reason(error: BaseException) -> str:
    """Why something was left out, in a line without places on one machine."""
    words = " ".join(str(error).split())
    text = words if isinstance(error, Unavailable) else f"{type(error).__name__}: {words}"
    return " ".join(word for word in text.split(" ") if not word.strip("'\"(),:;`").startswith("/"))[:200]


def data_folder_exists() -> bool:
    """Whether the folder with pretrained networks is there."""
    default = Path(__file__).parents[2] / "shared" / "data"
    return (Path(os.environ.get("FIPGEO_DATA", default)) / "zoo.py").exists()


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Stop what runs inside after so many seconds of wall time.

    Raises:
        TooSlow: The time is over.
    """

    def stop(*_: Any) -> None:
        raise TooSlow(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass
class Series:
    """Seconds of one contestant, one entry a round, and what its last call returned."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    result: Any = None

    def seconds(self, clock: str) -> float:
        """The median of a clock, "cpu" or "wall"."""
        return statistics.median(getattr(self, clock))


@dataclass
class Race:
    """What `race` measured: a series for each contestant, and why the others have none."""

    series: dict[str, Series]
    failed: dict[str, str]
    clock: str

    def ratio(self, name: str, over: str) -> tuple[float, list[float]]:
        """Median, and smallest and largest, of the ratios round by round."""
        ours, theirs = getattr(self.series[name], self.clock), getattr(self.series[over], self.clock)
        ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
        return statistics.median(ratios), [min(ratios), max(ratios)]


def clock_for(device: str, threads: int) -> str:
    """CPU time of the process on one thread, which other work on the machine disturbs least; else wall time."""
    return "cpu" if device == "cpu" and threads == 1 else "wall"


def settle(device: str) -> None:
    """Wait until an accelerator has done what was asked of it."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(call: Callable[[], Any], device: str, repeats: int = 1) -> tuple[float, float, Any]:
    """Wall and CPU seconds of one call (the mean of several), and what it returned."""
    settle(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = None
    for _ in range(repeats):
        result = call()
    settle(device)
    return (time.perf_counter() - wall) / repeats, (time.process_time() - cpu) / repeats, result


def race(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int,
    limit: float,
    device: str = "cpu",
    threads: int = 1,
    warm: bool = True,
    prepare: Mapping[str, Callable[[], Callable[[], Any]]] | None = None,
) -> Race:
    """Time contestants in turns.

    Each gets one untimed turn first; one that fails there or takes longer than its share of the limit is out. Rounds
    are as many as asked for, or as many as fit into the limit, at least one.

    Args:
        contestants: The calls by name.
        rounds: Most rounds.
        limit: Seconds for all rounds of all contestants.
        device: Waited for before a clock is read, if it is an accelerator.
        threads: Threads that torch uses.
        warm: Whether the untimed turn comes first; without it the first turn counts.
        prepare: Where every turn needs an untimed preparation: name to a function that returns the timed call. These
            contestants are timed too.

    Returns:
        The series.
    """
    makers: dict[str, Callable[[], Callable[[], Any]]] = {n: (lambda c=c: c) for n, c in contestants.items()}
    makers |= dict(prepare or {})
    series: dict[str, Series] = {}
    failed: dict[str, str] = {}
    repeats: dict[str, int] = {}
    spent = 0.0
    for name, make in makers.items():
        try:
            with bounded(limit):
                wall, cpu, result = timed(make(), device)
        except Exception as error:  # whatever a peer raises, it is named and the others go on
            failed[name] = reason(error)
            continue
        series[name] = Series([] if warm else [wall], [] if warm else [cpu], result)
        repeats[name] = max(1, min(100, int(SHORTEST / max(wall, 1e-9)))) if warm and name in contestants else 1
        spent += wall * repeats[name]
    fitting = int(limit / max(spent, 1e-9))
    order = list(series)
    for turn in range(max(1, min(rounds, fitting)) - (0 if warm else 1)):
        taken: dict[str, tuple[float, float, Any]] = {}
        try:
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                with bounded(4 * limit):
                    taken[name] = timed(makers[name](), device, repeats[name])
        except TooSlow:
            break
        for name, (wall, cpu, result) in taken.items():
            series[name].wall.append(wall)
            series[name].cpu.append(cpu)
            series[name].result = result
    kept = {name: entry for name, entry in series.items() if entry.wall}
    failed |= {name: f"no round within {limit:.0f} s" for name in series if name not in kept}
    return Race(kept, failed, clock_for(device, threads))


def host_round_trips(call: Callable[[], Any]) -> int:
    """How often a call on an accelerator makes the host wait: values read, and waits asked for."""
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        call()
    waits = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
    return sum(event.count for event in profile.key_averages() if event.key in waits)
