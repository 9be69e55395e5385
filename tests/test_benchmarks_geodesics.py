"""The benchmark of geodesics: its loss along a path by hand, and a run of its quickest case."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import fipgeo
from benchmarks import geodesics, predictors, records


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


def test_only_settings_that_are_not_on_record_are_measured(tmp_path: Path, monkeypatch: Any) -> None:
    asked: list[str] = []

    def brief(case: str, seed: int, inputs: int, settings: list[str]) -> Any:
        asked.extend(settings)
        for setting in settings:
            yield [{"method": f"chord, 2 steps, {setting}", "figure": "saved_products", "value": 1.0, "unit": "times"}]

    monkeypatch.setattr(predictors, "measured", brief)
    arguments = ["--cases", "predictor/lenet5", "--folder", str(tmp_path)]
    first, *others = predictors.SETTINGS
    geodesics.main([*arguments, "--settings", first])
    geodesics.main(arguments)
    assert asked == [first, *others]
    geodesics.main([*arguments, "--settings", first, "--again"])
    assert asked == [first, *others, first]


def test_predictors_drift_less_by_their_order_and_what_they_save_is_counted(monkeypatch: Any) -> None:
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 10))
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) / 2)
    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(5))
    monkeypatch.setattr(predictors.pretrained, "load", lambda name, count: (net, x[:count], x, None))
    mover = predictors.Mover("toy", 6, "random", 0.0, 0)
    length = mover.length()
    assert mover.walk("first order", 1, length) == pytest.approx(0.1, rel=1e-3)
    length /= 2
    orders = {"first order": 1, "second order": 2, "chord": 2}
    for method, order in orders.items():
        few, many = (mover.walk(method, n, length) for n in (4, 8))
        assert order - 0.4 < torch.tensor(few / many).log2() < order + 0.8
    plain = mover.walk("first order", 4, length)
    for method in ("rough second order", "rough chord"):
        assert mover.walk(method, 4, length) < 0.3 * plain
        assert len(mover.counted[method]) == 4 and min(mover.counted[method]) >= 1
    assert predictors.steps_for({1: 0.4, 2: 0.2, 4: 0.1}, 0.1) == (4.0, False)
    assert predictors.steps_for({1: 0.4, 2: 0.2}, 0.1) == (2.0, True)
