"""The documentation is true: its examples run, every public name has a page, and its links lead somewhere."""

import importlib
import json
import re
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
import torch
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from torch import nn

import fipgeo

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
EXECUTED = 'exec="on"'
_python_block = RawFencedCodeBlockLexer(info_pattern=re.compile(r"python\b(?P<options>[^\n]*)\n"))


def python_blocks(page: Path, option: str = "") -> list[int]:
    """The lines of a page's python blocks that carry an option: those that `run_blocks` executes."""
    text = page.read_text()
    document = Document(text, str(page))
    regions = [region for region in _python_block(document) if option in region.lexemes["options"]]
    return [text.count("\n", 0, region.start) + 1 for region in regions]


def run_blocks(page: Path, namespace: dict[str, object], option: str = "") -> None:
    """Execute a page's python blocks in order, in one namespace; errors point at the line of the page."""
    evaluator = PythonEvaluator()

    def parse(document: Document):
        for region in _python_block(document):
            if option in region.lexemes["options"]:
                region.parsed, region.evaluator = region.lexemes["source"], evaluator
                yield region

    document = Document.parse(str(page), parse)
    document.namespace.update(namespace)
    for example in document.examples():
        example.evaluate()


def tiny_problem() -> dict[str, object]:
    """What the README's example takes as given, small enough for a test; float32, as a user has it."""
    generator = torch.Generator().manual_seed(7)
    old = torch.randn(48, 6, generator=generator)
    new = torch.randn(32, 6, generator=generator) + 2
    model = nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 4))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    batches = [(part, part.sum(1).gt(12).long()) for part in new.split(16)]
    loss_fn = nn.functional.cross_entropy
    return {"model": model, "inputs": old, "new_batches": batches, "loss_fn": loss_fn}


@pytest.fixture
def float32_default(float64_default: None) -> None:
    """Documentation is run with torch's own default; the fixture it builds on restores what was there."""
    torch.set_default_dtype(torch.float32)


def test_the_readme_example_runs_and_is_short(float32_default: None) -> None:
    blocks = python_blocks(README)
    assert len(blocks) == 1
    block = README.read_text().split("```python\n")[1].split("```")[0]
    assert sum(bool(line.strip()) for line in block.splitlines()) <= 10
    given = tiny_problem()
    model = given["model"]
    assert isinstance(model, nn.Module)
    before = [parameter.clone() for parameter in model.parameters()]
    run_blocks(README, given)
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert plt.get_fignums()


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: str(page.relative_to(DOCS)))
def test_executed_blocks_of_the_pages_run(page: Path, float32_default: None) -> None:
    run_blocks(page, {}, EXECUTED)


def test_blocks_for_transformers_run_where_it_is_installed(float32_default: None) -> None:
    page, option = DOCS / "tutorials" / "huggingface.md", 'title="with transformers installed"'
    assert len(python_blocks(page, option)) == 2
    pytest.importorskip("transformers")
    run_blocks(page, {}, option)


def test_blocks_are_found_and_failures_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('# A page\n\n```python exec="on" session="a"\nx = 1\n```\n\n```python\nno\n```\n\n')
    assert python_blocks(page) == [3, 7] and python_blocks(page, EXECUTED) == [3]
    run_blocks(page, {}, EXECUTED)
    with page.open("a") as file:
        file.write('```python exec="on"\nassert x == 2\n```\n')
    with pytest.raises(AssertionError) as caught:
        run_blocks(page, {}, EXECUTED)
    assert caught.traceback[-1].lineno + 1 == 12


def shown_names() -> set[str]:
    """Names that the API pages show: each documented object, and what each documented module exports."""
    names: set[str] = set()
    for page in (DOCS / "api").glob("*.md"):
        for target in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE):
            owner, _, name = target.rpartition(".")
            names.add(name)
            shown = getattr(importlib.import_module(owner), name, None)
            if shown is None:
                shown = importlib.import_module(target)
            if isinstance(shown, ModuleType):
                defined_here = [key for key, value in vars(shown).items() if is_defined_in(shown, value)]
                names |= set(getattr(shown, "__all__", defined_here))
    return {name for name in names if not name.startswith("_")}


def is_defined_in(module: ModuleType, value: object) -> bool:
    return getattr(value, "__module__", None) == module.__name__


def test_every_public_name_is_in_the_api_pages() -> None:
    public = {name for name in fipgeo.__all__ if not name.startswith("_")}
    assert not public - shown_names(), "these have no page under docs/api"


def test_every_public_name_exists_once_and_in_order() -> None:
    for name in fipgeo.__all__:
        assert getattr(fipgeo, name) is not None
    assert len(set(fipgeo.__all__)) == len(fipgeo.__all__)


LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md"]


@pytest.mark.parametrize("page", LINKING, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(page: Path) -> None:
    targets = [link.split("#")[0] for link in LINK.findall(page.read_text())]
    missing = [link for link in targets if link and "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_the_two_commands_stand_once_and_pin_the_same_torch() -> None:
    lines = [line for line in README.read_text().splitlines() if line.startswith("python3 -m venv .venv && ")]
    main_job, tests = lines
    assert main_job.endswith(".venv/bin/python examples/quickstart.py")
    assert tests.endswith(".venv/bin/python -m pytest -q -n auto")
    pins = [re.findall(r"torch==([\d.]+) -e '\.\[", line) for line in lines]
    assert pins[0] == pins[1] and len(pins[0]) == 1


def test_the_readme_table_is_what_the_benchmark_measured() -> None:
    """Every row: a network, a share of zeros, and the accuracies of the methods that the header names."""
    records = json.loads((ROOT / "benchmarks/results/sparsify.json").read_text())["records"]
    measured = {(r["case"], r["method"]): r["value"] for r in records if r["seed"] == 0}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in README.read_text().split("\n") if "|" in line
    ]
    methods = rows[0][2:]
    assert len(rows) > 4
    for name, zeros, *cells in rows[2:]:
        for method, cell in zip(methods, cells, strict=True):
            case = f"{name.strip('`')}/sparsity={float(zeros.removesuffix(' %')) / 100:g}/inputs=1000"
            assert cell == (f"{measured[case, method]:.1f}" if (case, method) in measured else "")
