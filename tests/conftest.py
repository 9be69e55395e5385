"""Settings and fixtures shared by all tests: float64, reproducible examples, no window for figures."""

import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import settings

from fipgeo.paths.correctors import FirstOrder, GaussNewton
from fipgeo.paths.kept import Kept

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)  # tensors here are tiny, and threads that wait for a busy core take three times as long

settings.register_profile("default", deadline=None, max_examples=5)
settings.register_profile("ci", deadline=None, max_examples=5, derandomize=True, print_blob=True)
settings.register_profile("thorough", deadline=None, max_examples=200)  # pytest --hypothesis-profile=thorough
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def float64_default() -> Iterator[None]:
    """New tensors are float64 in every test; the dtype that was the default before is so again afterwards."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def same_draws() -> None:
    """Global random streams start alike in every test, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded generator. Property tests draw a seed and build their own instead."""
    return torch.Generator().manual_seed(20240913)


@pytest.fixture(autouse=True)
def closed_figures() -> Iterator[None]:
    """Figures that a test left open are closed, if anything was drawn at all."""
    yield
    if "matplotlib.pyplot" in sys.modules:
        sys.modules["matplotlib.pyplot"].close("all")


@pytest.fixture
def drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures for pages are drawn a single time and as they are laid out at first: no test looks at them."""
    monkeypatch.setattr("fipgeo.plotting.svg._MAX_DRAWINGS", 0)
    monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda engine, figure: None)


@pytest.fixture
def walked_briefly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Correctors on pages do little of their work, and metrics there have few rows: no test reads how good they are."""
    first, second, subset = FirstOrder.correct, GaussNewton.correct, Kept.subset

    def few_minibatches(self: FirstOrder, *args: Any, **options: Any) -> Any:
        return first(replace(self, steps=min(self.steps, 5), final_steps=min(self.final_steps, 10)), *args, **options)

    def few_moves(self: GaussNewton, *args: Any, **options: Any) -> Any:
        return second(replace(self, steps=min(self.steps, 1), final_steps=min(self.final_steps, 2)), *args, **options)

    def few_rows(self: Kept, max_rows: int, generator: torch.Generator) -> Kept:
        return subset(self, min(max_rows, 128), generator)

    monkeypatch.setattr(FirstOrder, "correct", few_minibatches)
    monkeypatch.setattr(GaussNewton, "correct", few_moves)
    monkeypatch.setattr(Kept, "subset", few_rows)
