"""The sparsity benchmark: baselines do what their papers say, hit the exact level, repeat by seed; the grid resumes."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fipgeo

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the benchmarks are no package that is installed

from benchmarks import baselines, curves, layerwise, methods, records, sparsify  # noqa: E402
from benchmarks.baselines import Distillation, Pace, Task, counted, goal, zeros  # noqa: E402
from benchmarks.methods import BASELINES, FIXED  # noqa: E402
from fipgeo.paths.kept import Kept, Position  # noqa: E402


class Attentive(nn.Module):
    """A convolution, BatchNorm, an encoder layer with dropout, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 2, 2, bias=False), nn.BatchNorm2d(8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = torch.relu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.head(self.layer(tokens).mean(1))


def tiny(seed: int = 0) -> nn.Module:
    model, random = Attentive(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=random) / p[0].numel() ** 0.5)
    return model.eval()


def images(count: int = 24) -> Tensor:
    return torch.randn(count, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def task(level: float = 0.6, **options: Any) -> Task:
    return Task(tiny(), images(80), level, **({"pace": Pace(steps=6), "rate": 0.01} | options))


@pytest.mark.parametrize("method", list(BASELINES))
def test_every_baseline_hits_the_level_repeats_by_seed_and_leaves_the_dense_network_alone(method: str) -> None:
    given = task()
    before = copy.deepcopy(given.model.state_dict())
    found = [baselines.timed(BASELINES[method], replace(given, seed=seed)) for seed in (0, 0, 1)]
    assert all(zeros(f.model) == goal(given.model, given.level) for f in found)
    assert not any(m.training for m in found[0].model.modules())
    assert all(torch.equal(value, given.model.state_dict()[key]) for key, value in before.items())
    ends = [torch.cat([t.double().flatten() for t in f.model.state_dict().values()]) for f in found]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2]) == (method in FIXED)
    assert found[0].cpu_seconds > 0 and (found[0].forwards > 0 or method == "magnitude")


def test_one_shot_masks_are_held_through_distillation() -> None:
    given = task()
    keep = baselines.masks(given.model, given.level)
    found = baselines.distilled(given, optimizer="adam")
    assert all(torch.equal(w != 0, keep[name]) for name, w in counted(found.model).items())
    assert any(not torch.equal(a, b) for a, b in zip(found.model.parameters(), given.model.parameters(), strict=True))


def test_gradual_zeros_follow_the_cubic_schedule_and_are_never_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, held = [], baselines.hold

    def watched(model: nn.Module, keep: dict[str, Tensor]) -> None:
        held(model, keep)
        seen.append(torch.cat([(w == 0).flatten() for w in counted(model).values()]))

    monkeypatch.setattr(baselines, "hold", watched)
    given = task(pace=Pace(steps=20))
    baselines.gradual(given)
    assert all(bool((later >= earlier).all()) for earlier, later in zip(seen, seen[1:], strict=False))
    total = len(seen[0])
    half = [int(s.sum()) for s in seen if 0 < int(s.sum()) < goal(given.model, given.level)]
    shares = {round(given.level * (1 - (1 - m / 100) ** 3) * total) for m in range(101)}
    assert set(half) <= shares and len(set(half)) > 8


def test_magnitude_is_a_threshold_over_all_layers() -> None:
    model = tiny()
    flat = torch.cat([w.abs().flatten() for w in counted(model).values()])
    threshold = flat.sort().values[goal(model, 0.6) - 1]
    assert all(
        torch.equal(w.abs() > threshold, m)
        for w, m in zip(counted(model).values(), baselines.masks(model, 0.6).values(), strict=True)
    )
    names = {"conv.weight", "layer.self_attn.in_proj_weight", "layer.self_attn.out_proj.weight"}
    assert set(counted(model)) == names | {"layer.linear1.weight", "layer.linear2.weight", "head.weight"}


def test_reestimated_statistics_are_those_of_the_inputs() -> None:
    model, x = tiny(), images()
    used = baselines.reestimate(model, x)
    h = model.conv(x).detach()  # type: ignore[operator]
    assert torch.allclose(model.norm.running_mean, h.mean((0, 2, 3)))  # type: ignore[union-attr]
    assert torch.allclose(model.norm.running_var, h.var((0, 2, 3)))  # type: ignore[union-attr]
    assert used == len(x) and model.norm.momentum == 0.1 and not model.norm.training  # type: ignore[union-attr]


@pytest.mark.parametrize("cached", [True, False])
def test_distillation_is_its_definition(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cached:
        monkeypatch.setattr(baselines, "TAP_BYTES", 0)
    given, which = task(), torch.arange(10)
    student, x = tiny(5), given.inputs
    f, f0 = student(x)[which], given.model(x)[which]
    kl = 16 * nn.functional.kl_div((f / 4).log_softmax(1), (f0 / 4).softmax(1), reduction="batchmean")
    assert torch.allclose(Distillation(given, kind="kl")(student, which), kl)
    plain, taps = Distillation(given), Distillation(given, taps=True)
    gap = (f - f.mean(1, keepdim=True) - f0 + f0.mean(1, keepdim=True)).square().sum(1).mean()
    assert torch.allclose(plain(student, which), gap / plain.scale)
    assert max(plain(given.model, which).item(), taps(given.model, which).item()) < 1e-20
    assert taps.names == given_blocks(given.model)
    assert taps(student, which).item() > 1.01 * plain(student, which).item()


def given_blocks(model: nn.Module) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, nn.MultiheadAttention)]


def brute_force(w: Tensor, h: Tensor, count: int) -> Tensor:
    """Optimal brain surgeon: of all weights left the one that costs least, with a fresh inverse for every removal."""
    w, h = layerwise.prepared(w, h)
    left = torch.ones_like(w, dtype=torch.bool)
    for _ in range(count):
        best = None
        for r in range(len(w)):
            index = left[r].nonzero()[:, 0]
            inverse = torch.linalg.inv(h[index][:, index])
            for a, j in enumerate(index):
                cost = float(w[r, j] ** 2 / inverse[a, a])
                if best is None or cost < best[0]:
                    best = (cost, r, index, w[r, j] / inverse[a, a] * inverse[:, a], j)
        assert best is not None
        _, r, index, move, j = best
        w[r, index] -= move
        w[r, j], left[r, j] = 0, False
    return w


@pytest.mark.parametrize("count", [1, 13, 30, 47, 48])
def test_obc_is_optimal_brain_surgeon_one_weight_at_a_time(count: int) -> None:
    random = torch.Generator().manual_seed(count)
    w, x = torch.randn(6, 8, generator=random), torch.randn(8, 30, generator=random)
    h = x @ x.T / 30
    found = layerwise.obc(w, h, count)
    assert torch.allclose(found, brute_force(w, h, count), atol=1e-10) and int((found == 0).sum()) == count


def test_tracing_row_by_row_in_small_portions_changes_nothing() -> None:
    random = torch.Generator().manual_seed(0)
    w, x = torch.randn(5, 20, generator=random), torch.randn(20, 50, generator=random)
    whole, parts = layerwise.traces(w, x @ x.T, 60), layerwise.traces(w, x @ x.T, 60, max_entries=800)
    assert torch.equal(whole[0], parts[0]) and torch.allclose(whole[1], parts[1])


@pytest.mark.parametrize("block", [1, 3, 8])
def test_sparsegpt_leaves_the_best_later_columns_for_its_zeros(block: int) -> None:
    """Column by column against least squares over all columns to the right, a fresh solve for each."""
    random = torch.Generator().manual_seed(block)
    w, x = torch.randn(4, 8, generator=random), torch.randn(8, 30, generator=random)
    h = x @ x.T / 30
    found = layerwise.sparsegpt(w, h, 16, block=block)
    assert int((found == 0).sum()) == 16
    expected, damped = layerwise.prepared(w, h)
    for r in range(4):
        for j in range(8):
            if found[r, j] == 0:  # this entry goes, all later ones move, earlier ones are final
                later = slice(j + 1, 8)
                move = torch.linalg.solve(damped[later, later], damped[later, j]) * expected[r, j]
                expected[r, later] += move
                expected[r, j] = 0
    assert torch.allclose(found, expected, atol=1e-10)


def test_hessians_are_those_of_the_inputs_that_meet_each_weight() -> None:
    """Least squares by torch on recorded inputs; attention by its own formula."""
    model, x = tiny(), images()
    with torch.no_grad():
        tokens = torch.relu(model.norm(model.conv(x))).flatten(2).transpose(1, 2)  # type: ignore[operator]
        attention: Any = model.layer.self_attn  # type: ignore[union-attr]
        q, k, v = nn.functional.linear(tokens, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
        mixed = ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    cuts = x.unfold(2, 2, 2).unfold(3, 2, 2).reshape(-1, 4)
    expected = {"conv.weight": cuts, "layer.self_attn.in_proj_weight": tokens, "layer.self_attn.out_proj.weight": mixed}
    before = copy.deepcopy(model.state_dict())
    for name, rows in expected.items():
        rows = rows.reshape(-1, rows.shape[-1])
        h, used = layerwise.hessian(model, name, x, batch_size=7)
        assert torch.allclose(h, rows.T @ rows / len(rows)) and used == len(x)
    assert layerwise.order(model, x[:1])[:3] == list(expected) and layerwise.order(model, x[:1])[-1] == "head.weight"
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert not model.layer.self_attn.out_proj._forward_hooks  # type: ignore[union-attr]


@pytest.mark.parametrize("shares", ["uniform", "global"])
def test_shares_add_up(shares: str) -> None:
    model = tiny()
    found = layerwise.allotted(model, 0.77, shares)
    assert sum(found.values()) == goal(model, 0.77)
    if shares == "uniform":
        assert all(abs(found[name] - 0.77 * w.numel()) < 1 for name, w in counted(model).items())


def test_a_budget_of_seconds_ends_a_run_and_stretches_it() -> None:
    progress = list(Pace(budget_s=0.05))
    assert progress == sorted(progress) and 0 <= progress[0] < progress[-1] < 1
    assert list(Pace(steps=4)) == [0.0, 0.25, 0.5, 0.75]


@pytest.fixture
def grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Arguments of a grid on the tiny network."""
    y = tiny()(images(40)).argmax(1)
    monkeypatch.setattr(sparsify, "load", lambda _name, count: (tiny(), images(count), images(40), y))
    monkeypatch.setattr(sparsify, "held_out", lambda _name: images(40))
    quick = partial(fipgeo.sparsify, corrector=fipgeo.FirstOrder(steps=2, final_steps=3))
    monkeypatch.setattr(sparsify.fipgeo, "sparsify", quick)
    return ["--models", "net", "--inputs", "24", "--folder", str(tmp_path)]


def test_the_grid_measures_what_is_missing_and_nothing_twice(grid: list[str], tmp_path: Path, capsys) -> None:
    few = ["--levels", "0.5", "0.7", "--methods", "fipgeo", "magnitude", "magnitude + KD (Adam)", "--budget", "0.05"]
    sparsify.main([*grid, *few, "--plan"])
    assert len(capsys.readouterr().out.splitlines()) == 7 and not list(tmp_path.iterdir())
    sparsify.main([*grid, *few])
    found = records.read("sparsify", tmp_path)
    assert len(found) == 7 and {r["figure"] for r in found} == {"test_accuracy"}
    assert {r["method"] for r in found} == {"dense", "fipgeo", "magnitude", "magnitude + KD (Adam), 0.05 s"}
    for r in found:
        level = curves.parsed(r["case"])[1]
        assert r["zeros"] == pytest.approx(level, abs=1e-3) and r["seconds"] >= 0 and 0 <= r["value"] <= 100
    capsys.readouterr()
    sparsify.main([*grid, *few])
    assert capsys.readouterr().out == "" and records.read("sparsify", tmp_path) == found
    assert next(r["value"] for r in found if r["method"] == "dense") == 100
    assert_page_is_the_file(tmp_path / "sparsify.json")


def test_a_pattern_decides_the_level(grid: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, quick = [], sparsify.fipgeo.sparsify

    def noted(*args: Any, **options: Any) -> fipgeo.PathResult:
        asked.append((args[2], options["pattern"]))
        return quick(*args, **options)

    monkeypatch.setattr(sparsify.fipgeo, "sparsify", noted)
    sparsify.main([*grid, "--pattern", "1:4", "--methods", "fipgeo"])
    found = next(r for r in records.read("sparsify", tmp_path) if r["method"] != "dense")
    assert asked == [(None, fipgeo.NofM(1, 4))]
    assert found["method"] == "fipgeo, pattern=1:4" and curves.parsed(found["case"])[1] == 0.75
    assert 0.6 < found["zeros"] < 0.75  # the convolution has no run of four


def test_budgets_are_what_our_own_path_took_and_missing_ones_are_said(grid: list[str], tmp_path: Path, capsys) -> None:
    cell = sparsify.Cell("net", 0.5, 24, "magnitude + KD (Adam)", 0)
    args = sparsify.parsed(grid)
    with pytest.raises(ValueError, match="--budget"):
        sparsify.budget(cell, args)
    base = {"case": cell.case, "method": "fipgeo", "figure": "test_accuracy", "value": 1.0}
    records.write("sparsify", [base | {"seed": 0, "cpu_seconds": 3.0, "seconds": 9.0}], tmp_path)
    assert sparsify.budget(cell._replace(seed=1), args) == 3.0
    assert sparsify.budget(cell, sparsify.parsed([*grid, "--threads", "2"])) == 9.0
    with pytest.raises(SystemExit, match="1 cells failed"):
        sparsify.main([*grid, "--levels", "0.6", "--methods", "magnitude", "magnitude + KD (Adam)"])
    assert "pass --budget" in capsys.readouterr().err
    assert len(records.read("sparsify", tmp_path)) == 3


def test_rates_are_the_best_that_were_measured(grid: list[str], tmp_path: Path) -> None:
    assert methods.rate_of("net", methods.GRADUAL_TAPS, tmp_path) == methods.RATES[methods.GRADUAL]
    sparsify.main([*grid, "--tune", "--methods", methods.GRADUAL_TAPS, "--budget", "0.02"])
    found = records.read("rates", tmp_path)
    assert [r["rate"] for r in found] == list(methods.GRIDS[methods.GRADUAL])
    best = max(found, key=lambda r: r["value"])
    assert methods.rate_of("net", methods.GRADUAL_TAPS, tmp_path) == best["rate"]
    assert methods.rate_of("other", methods.GRADUAL, tmp_path) == methods.RATES[methods.GRADUAL]


def test_two_processes_may_write_at_once(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from benchmarks.records import write\n" + (
        "for i in range(8):\n"
        " write('many', [dict(case=f'{sys.argv[1]}{i}', method='m', figure='f', seed=0)], Path(sys.argv[2]))"
    )
    commands = [[sys.executable, "-c", code, name, str(tmp_path)] for name in "ab"]
    running = [subprocess.Popen(command, cwd=ROOT) for command in commands]
    assert [process.wait() for process in running] == [0, 0]
    assert len(records.read("many", tmp_path)) == 16 and [p.name for p in tmp_path.iterdir()] == ["many.json"]


def assert_page_is_the_file(path: Path) -> None:
    """Every figure of the file is in the table, every network has its plot with a text, every method its row."""
    body = json.loads(path.read_text())
    table, page = curves.table(path), curves.page(path)
    rows = {tuple(cell.strip() for cell in line.strip("| ").split(" | ")) for line in table.splitlines() if "|" in line}
    for r in body["records"]:
        network, level, _ = curves.parsed(r["case"])
        wanted = {network, curves.percent(level), r["method"], f"{r['value']:.2f} %"}
        assert any(wanted <= set(row) for row in rows)
    groups = curves.grouped(body["records"])
    assert page.count("<img alt=") == len(groups)
    assert all(f"| {method} |" in page for found in groups.values() for method in found)


@pytest.mark.usefixtures("drawn_once")
@pytest.mark.parametrize(("name", "made"), [("sparsity", curves.page), ("results", curves.table)])
def test_the_pages_show_what_the_file_holds_and_nothing_else(name: str, made: Any, tmp_path: Path, capsys) -> None:
    page = (ROOT / f"docs/{name}.md").read_text()
    (block,) = re.findall(r'```python exec="on"\n(.*?)```', page, flags=re.DOTALL)
    exec(compile(block, f"{name}.md", "exec"), {})
    file = ROOT / "benchmarks/results/sparsify.json"
    assert capsys.readouterr().out == made(file) + "\n"
    assert "|" not in page.replace(block, "")
    assert made(tmp_path / "sparsify.json") == curves.MISSING


def test_every_method_has_a_style_of_its_own() -> None:
    assert set(curves.STYLES) == {methods.OURS, *BASELINES}
    assert len(set(curves.STYLES.values())) == len(curves.STYLES)


def test_records_say_what_was_typed_but_not_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["/somewhere/benchmarks/sparsify.py", "--tune", "--folder", str(tmp_path), "--models", "net"]
    monkeypatch.setattr(sys, "argv", typed)
    path = records.write("rates", [{"case": "a", "method": "m", "figure": "f", "seed": 0}], tmp_path)
    assert json.loads(path.read_text())["command"] == "python -m benchmarks.sparsify --tune --models net"


def test_a_first_order_correction_is_the_training_of_the_baselines() -> None:
    """With the same zeros, inputs, minibatches and rate: so it is the paths that are compared, not two optimisers."""
    given = task(pace=Pace(steps=25))
    keep, start = baselines.masks(given.model, given.level), copy.deepcopy(given.model)
    baselines.hold(start, keep)
    trained = copy.deepcopy(start)
    baselines.train(given, trained, "adam", Distillation(given, taps=True))

    here = fipgeo.MetricField(start, given.inputs).map
    position = Position(here.point(), here.normalisation())
    free = torch.cat([keep.get(n, torch.ones_like(p, dtype=torch.bool)).flatten() for n, p in start.named_parameters()])
    function = fipgeo.MetricField(given.model, given.inputs, "logits").function
    kept = Kept.of(function, function.map.point())
    wanted = fipgeo.MetricField(trained, given.inputs).map.point()

    def off(batch_statistics: bool) -> float:
        """How far the correction ends from the training, in units of what the training has moved."""
        corrector = fipgeo.FirstOrder(final_steps=25, lr=given.rate, batch_statistics=batch_statistics)
        found = corrector.correct(kept, position, free, {}, given.generator, final=True).position.theta
        return float((found - wanted).norm() / (wanted - position.theta).norm())

    assert off(True) < 0.01  # rounding, which Adam makes larger
    assert off(False) > 0.1
