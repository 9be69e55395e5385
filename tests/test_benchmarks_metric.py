"""The benchmark of the metric measures what it says: right constants, fair turns, records that replace themselves."""

import ast
import json
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the benchmarks are no package that is installed

from benchmarks import measure, metric, models, peers, speed  # noqa: E402
from benchmarks.figures import Bench  # noqa: E402
from benchmarks.measure import TooSlow, Unavailable, bounded, race  # noqa: E402

TINY = ["--models", "tiny", "--rounds", "2", "--limit", "20"]
QUICK = ["--figures", "products", "first", "top20", "solves", "jacobians", "examples", "weights"]


@pytest.fixture(autouse=True)
def float32_default(float64_default: None) -> Iterator[None]:
    """Speed is measured in single precision; the fixture this builds on restores what was there."""
    torch.set_default_dtype(torch.float32)
    yield


def dense(case: models.Case) -> torch.Tensor:
    """J of a small case in float64, one reverse pass a row."""
    own = case.fresh()
    model = own.model.double()
    assert isinstance(case.inputs, torch.Tensor)
    outputs = model(case.inputs.double()).flatten()
    rows = [torch.autograd.grad(z, list(model.parameters()), retain_graph=True) for z in outputs]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


@pytest.mark.parametrize("double", [False, True])
def test_the_reference_is_the_metric(double: bool) -> None:
    case = models.build("tiny", 5)
    j, v = dense(case), case.vectors(2)
    expected = v.double() @ j.T @ j / 5
    assert torch.allclose(peers.reference(case, double=double)(v).double(), expected, rtol=1e-4, atol=1e-5)


def test_the_right_hand_side_is_a_pulled_back_vector_of_unit_length() -> None:
    case = models.build("tiny", 5)
    j, b = dense(case), peers.pulled_back(case).double()
    inside = torch.linalg.lstsq(j.T, b[:, None]).solution[:, 0] @ j
    assert torch.allclose(inside, b, atol=1e-5) and abs(float(b.norm()) - 1) < 1e-5


@pytest.mark.parametrize("examples", [5, 300])  # 300 examples come in two batches of different lengths
def test_curvlinops_is_scaled_to_the_metric(examples: int) -> None:
    pytest.importorskip("curvlinops")
    case = models.build("tiny", examples)
    v = case.vectors(3)
    operator, expected = peers.CurvlinopsProduct(case), peers.reference(case)(v)
    assert torch.allclose(operator.matvec(v[0]) / operator.scale, expected[0], rtol=1e-4, atol=1e-5)
    assert torch.allclose(operator.matmat(v.T).T / operator.scale, expected, rtol=1e-4, atol=1e-5)
    assert operator.products == 4
    x = peers.solved(operator, expected[0], 0.1, 1e-6)
    assert torch.allclose(peers.reference(case)(x) + 0.1 * x, expected[0], rtol=1e-3, atol=1e-4)


def test_nngeometry_is_the_metric() -> None:
    pytest.importorskip("nngeometry")
    case = models.build("tiny", 5)
    v = case.vectors(1)[0]
    assert torch.allclose(peers.nngeometry_product(case)(v), peers.reference(case)(v), rtol=1e-4, atol=1e-5)


def test_the_networks_are_the_sizes_that_the_table_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FIPGEO_DATA", str(tmp_path))
    sizes = {name: models.build(name, 1).num_weights for name in ("mlp", "resnet20", "vit", "tiny")}
    assert sizes == {"mlp": 669_706, "resnet20": 269_722, "vit": 5_362_762, "tiny": 83}
    resnet = models.build("resnet20", 2)
    assert resnet.notes == {"weights": "random"} and resnet.name == "resnet20-N2" and resnet.num_outputs == 10
    again = models.build("mlp", 3), models.build("mlp", 3)
    assert torch.equal(again[0].inputs, again[1].inputs)  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(a, b) for a, b in zip(again[0].params.values(), again[1].params.values(), strict=True))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_language_models_are_cases_too(name: str) -> None:
    pytest.importorskip("transformers")
    case = models.build(name, 2, width=16)
    assert len(case.batches) == 1 and set(case.batches[0]) == {"input_ids", "attention_mask"}
    v = case.vectors(1)[0]
    bench = Bench(case, 1, 20.0, 1, "cpu", 2**30)
    assert torch.allclose(bench.metric().matvec(v), peers.reference(case)(v), rtol=1e-3, atol=1e-4)


def test_contestants_take_turns_and_those_that_fail_are_named() -> None:
    calls: list[str] = []

    def called(name: str, seconds: float):
        def call() -> str:
            calls.append(name)
            time.sleep(seconds)
            return name

        return call

    def broken() -> None:
        raise RuntimeError("no such kernel")

    contestants = {"slow": called("slow", 0.06), "quick": called("quick", 0.055), "broken": broken}
    found = race(contestants, rounds=3, limit=5.0, threads=2)
    assert found.clock == "wall" and found.failed == {"broken": "RuntimeError: no such kernel"}
    assert calls == ["slow", "quick", "slow", "quick", "quick", "slow", "slow", "quick"]
    ratio, (least, most) = found.ratio("quick", "slow")
    assert least <= ratio <= most and 0.5 < ratio < 1.5 and found.series["quick"].result == "quick"


def test_rounds_are_as_many_as_fit_and_slow_calls_are_stopped() -> None:
    found = race({"a": lambda: time.sleep(0.2)}, rounds=50, limit=0.7)
    assert 1 <= len(found.series["a"].wall) <= 3
    stuck = race({"a": lambda: time.sleep(5), "b": lambda: None}, rounds=1, limit=0.1)
    assert list(stuck.series) == ["b"] and stuck.failed["a"].startswith("stopped after")
    with pytest.raises(TooSlow), bounded(0.05):
        time.sleep(1)
    time.sleep(0.1)  # the alarm is off again


def test_reasons_name_no_place() -> None:
    error = OSError("cannot open " + "/" + "somewhere/file.so for reading")
    assert measure.reason(error) == "OSError: cannot open for reading"
    assert measure.reason(Unavailable("absent")) == "absent"


@pytest.mark.slow
@pytest.mark.usefixtures("drawn_once")
def test_a_run_writes_every_figure_and_a_second_one_replaces_them(
    tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric.main([*TINY, *QUICK, "--out", str(tmp_path)])
    monkeypatch.setattr(metric, "warm_up", lambda *_: None)  # one process is warm once
    text = (tmp_path / "metric.json").read_text()
    body = json.loads(text)
    figures = {r["figure"] for r in body["records"] if r["method"] == "fipgeo"}
    expected = set(metric.MARKS.values()) - {"peak_bytes"}
    more = {"agreement_reference", "time_ratio_block16", "time_ratio_block16_with_setup", "auto_ratio_top20"}
    assert figures >= expected | more | {"time_ratio_solve_next", "solve_residual_small_damping"}
    for r in body["records"]:
        assert {"case", "method", "figure", "value", "unit", "seed", "seconds", "spread"} <= set(r)
    assert set(body["environment"]["peers"]) == set(peers.PACKAGES)
    assert str(tmp_path) not in text
    absent = {name for name, version in body["environment"]["peers"].items() if version.startswith("absent")}
    named = {s["method"] for s in body["skipped"]}
    assert ("curvlinops" in named) == ("curvlinops" in absent)
    measured = [r for r in body["records"] if r["figure"] in ("time_ratio_top20", "time_ratio_solve")]
    assert all(r["residual"] < 1e-4 for r in measured)
    gaps = [r["value"] for r in body["records"] if r["figure"].startswith("agreement")]
    assert gaps and max(gaps) < 1e-5
    capsys.readouterr()
    metric.main([*TINY, *QUICK, "--out", str(tmp_path), "--missing"])
    assert "time_ratio_matvec" not in capsys.readouterr().out
    metric.main([*TINY, "--figures", "first", "--out", str(tmp_path)])
    again = json.loads((tmp_path / "metric.json").read_text())
    keys = [[tuple(r[k] for k in metric.KEY) for r in part["records"]] for part in (body, again)]
    assert sorted(keys[0]) == sorted(keys[1])
    assert_page_is_the_file(tmp_path / "metric.json", speed.page(tmp_path / "metric.json"))


def assert_page_is_the_file(path: Path, text: str) -> None:
    """Every ratio of the file is a row of the page, and every picture has its text."""
    body = json.loads(path.read_text())
    rows = {
        tuple(cell.strip() for cell in line.strip("| ").split(" | "))[:3] for line in text.splitlines() if "|" in line
    }
    for r in body["records"]:
        if r["figure"] in speed.TITLES and r["value"] is not None:
            assert (r["case"], r["method"], f"{r['value']:.2g}") in rows
    assert text.count("<img alt=") == len({r["figure"] for r in body["records"]} & set(speed.LINES))


def test_memory_is_counted(tmp_path: Path) -> None:
    args = metric.parsed(["--models", "tiny", "--examples", "5", "--probe", "fipgeo"])
    assert 0 <= metric.probe(args) < 2**27


@pytest.mark.usefixtures("drawn_once")
def test_the_page_shows_what_the_file_holds_and_nothing_else(tmp_path: Path, capsys) -> None:
    """The committed page holds no table of its own: what it prints is made from the file at that moment."""
    page = (ROOT / "docs/speed.md").read_text()
    (block,) = re.findall(r'```python exec="on"\n(.*?)```', page, flags=re.DOTALL)
    exec(compile(block, "speed.md", "exec"), {})
    file = ROOT / "benchmarks/results/metric.json"
    text = speed.page(file)
    assert capsys.readouterr().out == text + "\n"
    assert "|" not in page.replace(block, "").replace("|r_i|", "")
    assert speed.page(tmp_path / "metric.json") == speed.MISSING
    if file.exists():
        assert_page_is_the_file(file, text)


def test_files_and_functions_of_the_benchmarks_stay_small() -> None:
    for file in (ROOT / "benchmarks").glob("*.py"):
        text = file.read_text()
        assert len(text.splitlines()) <= 400, file.name
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                doc = len((ast.get_docstring(node) or "").splitlines())
                assert (node.end_lineno or 0) - node.lineno + 1 - doc <= 60, f"{file.name} {node.name}"
