"""The dense linearisation of the tangent benchmark, on the network that needs no data."""

import pytest
import torch

from benchmarks import exactness


def test_an_lstm_is_its_dense_linearisation(monkeypatch: pytest.MonkeyPatch) -> None:
    assert exactness.difference("lstm") < 1e-12

    class Off(exactness.fipgeo.TangentModel):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 + 1e-6)

    monkeypatch.setattr(exactness.fipgeo, "TangentModel", Off)
    assert exactness.difference("lstm") > 1e-7  # what is a little off is seen
