"""Settings and fixtures shared by all tests: float64, reproducible examples, no window for figures."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("MPLBACKEND", "Agg")
torch.set_num_threads(1)  # tensors here are tiny, and threads that wait for a busy core take three times as long

settings.register_profile("default", deadline=None, max_examples=8)
settings.register_profile("ci", deadline=None, max_examples=8, derandomize=True, print_blob=True)
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
    """Figures for pages are drawn a single time, not until their layout has settled."""
    monkeypatch.setattr("fipgeo.plotting.svg._MAX_DRAWINGS", 0)
