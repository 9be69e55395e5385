"""Records: ranks, entropies, round trips, verdicts."""

from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fipgeo.linalg import Dense, Outcome, Spectrum, dense_eigh

from .cases import prescribed


def record(*values: float, dtype: torch.dtype = torch.float64) -> Spectrum:
    return Spectrum(torch.tensor(values, dtype=dtype), None, None, dim=len(values))


def test_rank_counts_what_rounding_and_residuals_allow() -> None:
    assert record(1.0, 1e-10, 1e-17, 0.0, -1e-17).rank() == 2
    assert record(1.0, 1e-10, dtype=torch.float32).rank() == 1
    assert record(1.0, 1e-10).rank(tol=1e-5) == 1
    assert record(0.0, 0.0).rank() == record().rank() == 0
    vague = replace(record(1.0, 1e-3), residuals=torch.tensor([1e-2, 1e-2]))
    assert vague.rank() == 1 and vague.rank(tol=0.0) == 2


def test_rank_does_not_grow_with_the_dimension() -> None:
    wide = replace(record(1.0, 1e-3, dtype=torch.float32), dim=10**7)
    assert wide.rank() == 2


@given(k=st.integers(1, 20), scale=st.sampled_from([1e-3, 1.0, 1e5]))
def test_flat_spectra_have_their_own_effective_rank(k: int, scale: float) -> None:
    flat = record(*[scale] * k, 0.0, -1e-18)
    assert flat.effective_rank() == pytest.approx(k) and flat.participation_ratio() == pytest.approx(k)
    peaked = record(scale, *[scale * 1e-3] * k)
    assert 1 < peaked.participation_ratio() < peaked.effective_rank() < k + 1
    assert record(0.0).effective_rank() == record(0.0).participation_ratio() == 0


def test_spectrum_round_trip() -> None:
    found = dense_eigh(Dense(prescribed(0, torch.linspace(3, 0, 6)), psd=True), 4)
    found = replace(found, held_out=torch.ones(4), captured=0.5, outcome=Outcome.STAGNATED)
    state = found.to_dict()
    plain = (torch.Tensor, int, float, bool, str, type(None))
    assert all(isinstance(entry, plain) for entry in state.values())
    again = Spectrum.from_dict(state)
    for field in fields(Spectrum):
        one, two = getattr(found, field.name), getattr(again, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
    with pytest.raises(ValueError, match="to_dict"):
        Spectrum.from_dict({"values": torch.ones(1)})
    with pytest.raises(ValueError, match="'GOOD' is none of"):
        Spectrum.from_dict(state | {"outcome": "GOOD"})
    with pytest.raises(FrozenInstanceError):
        found.dim = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_spectrum_plots_itself() -> None:
    axes = record(4.0, 1.0, 0.0).plot()
    assert axes.get_yscale() == "log"
    assert record(2.0, 1.0).plot(ax=axes, label="second") is axes


def test_outcomes_say_what_helps() -> None:
    assert [outcome for outcome in Outcome if outcome.ok] == [Outcome.CONVERGED]
    assert Outcome.worst([Outcome.CONVERGED, Outcome.NOT_FINITE, Outcome.STAGNATED]) is Outcome.NOT_FINITE
    assert Outcome.worst([]) is Outcome.CONVERGED
    assert all(word in Outcome.BREAKDOWN.message for word in ("negative", "damping", "psd_gap"))
