"""The benchmark of geodesics: its loss along a path by hand, and a run of its quickest case."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks import geodesics, records


def test_losses_along_a_path_are_those_of_its_networks() -> None:
    a, b, x = nn.Linear(3, 2), nn.Linear(3, 2), torch.randn(20, 3)
    y = torch.arange(20) % 2
    found = fipgeo.connect(a, b, x, steps=1, bends=1, num_measured=3)
    losses, accuracies = geodesics.along(geodesics.line(found), nn.Linear(3, 2), x, y)
    for t, loss, accuracy in zip((0.0, 0.5, 1.0), losses, accuracies, strict=True):
        scores = torch.lerp(a(x), b(x), t)  # linear networks
        assert loss == pytest.approx(float(cross_entropy(scores, y).detach()))
        assert accuracy == float(scores.argmax(1).eq(y).double().mean())


def test_a_case_is_measured_once_and_on_record(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def brief(case: str, seed: int) -> list[dict[str, Any]]:
        return [{"method": "rk4", "figure": "order", "value": 4.0 + seed, "unit": "1"}]

    monkeypatch.setattr(geodesics, "speed", brief)
    arguments = ["--cases", "speed/tanh", "--seeds", "0", "1", "--folder", str(tmp_path)]
    geodesics.main(arguments)
    assert [r["value"] for r in records.read("geodesics", tmp_path)] == [4.0, 5.0]
    capsys.readouterr()
    geodesics.main(arguments)
    assert not capsys.readouterr().out
    for make in geodesics.NETWORKS.values():
        model, shape = make()
        assert model(torch.zeros(2, *shape)).shape == (2, 3)
