"""The documentation is true: its examples run, every public name has a page, and its links lead somewhere."""

import importlib
import pkgutil
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
import torch
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer
from torch import nn

import fipgeo

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(DOCS.rglob("*.md"))]
EXECUTED = 'exec="on"'
NOT_RUN = {  # blocks of the pages that no test runs, by a line of theirs, and why
    "from torch.sparse import to_sparse_semi_structured": "needs a CUDA device",
    "from transformers import": "needs a library that this one does not ask for",
}
_python_block = RawFencedCodeBlockLexer(info_pattern=re.compile(r"python\b(?P<options>[^\n]*)\n"))


def python_blocks(page: Path, option: str = "") -> list[int]:
    """The lines of a page's python blocks that carry an option: those that `run_blocks` executes."""
    text = page.read_text()
    document = Document(text, str(page))
    regions = [region for region in _python_block(document) if option in region.lexemes["options"]]
    return [text.count("\n", 0, region.start) + 1 for region in regions]


def run_blocks(page: Path, namespace: dict[str, object], option: str = "") -> None:
    """Execute a page's python blocks in order; errors point at the line of the page.

    Blocks that the site executes share names where they are of one session, as there; others share all.
    """
    evaluator, spaces = PythonEvaluator(), dict[str, dict[str, object]]()

    def parse(document: Document):
        for region in _python_block(document):
            if option in (options := region.lexemes["options"]):
                named = re.search(r'session="(\w+)"', options)
                session = named[1] if named else f"line {region.start}" if EXECUTED in options else ""
                region.parsed, region.evaluator = region.lexemes["source"], partial(evaluate, session)
                yield region

    def evaluate(session: str, example: Example) -> None:
        example.namespace = spaces.setdefault(session, dict(namespace))
        evaluator(example)

    for example in Document.parse(str(page), parse).examples():
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


def small(width: int = 6, classes: int = 4, seed: int = 7) -> nn.Sequential:
    """A network of two linear layers, `layer1` and `layer4`, with weights that depend on the seed alone."""
    model = nn.Sequential()
    model.add_module("layer1", nn.Linear(width, 12))
    model.add_module("tanh", nn.Tanh())
    model.add_module("layer4", nn.Linear(12, classes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
    return model


def given(page: str) -> dict[str, object]:
    """What the blocks of an API page take as given: names that a reader has, with small things in their place."""
    import geoopt

    problem = tiny_problem()
    x = problem["inputs"]
    assert isinstance(x, torch.Tensor)
    y = x.sum(1).gt(0).long()
    network = small()
    names: dict[str, object] = {
        **{"fipgeo": fipgeo, "torch": torch, "TaskVector": fipgeo.TaskVector, "Composition": fipgeo.Composition},
        **{"Goal": fipgeo.atlas.Goal, "geoopt": geoopt, "network": network, "inputs": x, "x": x, "y": y},
        **{"batches": [(x[:24], y[:24]), (x[24:], y[24:])], "loss_fn": problem["loss_fn"]},
    }
    if page == "atlas":
        return names | {
            "base": network,
            "networks": [small(seed=8), small(seed=9)],
            "target": (x, y),
            "control": (x, y),
        }
    if page == "geodesics":
        linear, other = small()[0], small(seed=8)[0]  # flat, so that a step goes far
        vectors = torch.randn(3, 6 * 12 + 12, generator=torch.Generator().manual_seed(1))
        basis = fipgeo.basis.columns(vectors)
        return names | {"network": linear, "direction": vectors[0], "basis": basis, "a": linear, "b": other}
    if page == "tangent":
        shards = {"march": [(x[:24], y[:24])], "april": [(x[24:], y[24:])]}
        pool = fipgeo.tangent.Pool(network)
        for seed, name in enumerate(shards):
            model = fipgeo.TangentModel(network, "layer4.*")
            tangents = {n: torch.full_like(t, 0.1 * (seed + 1)) for n, t in model.tangents().items()}
            pool.add(fipgeo.Component.of(model.assign_(tangents), name))
        return names | {"shards": shards, "pool": pool}
    if page == "robustness":
        images = torch.rand(40, 3, 4, 4, generator=torch.Generator().manual_seed(2))
        classes = images.mean((1, 2, 3)).gt(0.5).long()
        network = nn.Sequential(nn.Flatten(), *small(48))
        return names | {"network": network, "inputs": images, "x_test": images, "y_test": classes}
    assert page == "optim"
    return names | {"model": network, "old_inputs": x, "new_batches": problem["new_batches"], "steps": 2}


@pytest.fixture
def float32_default(float64_default: None) -> None:
    """Documentation is run with torch's own default; the fixture it builds on restores what was there."""
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("float32_default", "walked_briefly")
def test_the_readme_example_runs_and_is_short() -> None:
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
@pytest.mark.usefixtures("float32_default", "drawn_once", "walked_briefly")
def test_executed_blocks_of_the_pages_run(page: Path) -> None:
    run_blocks(page, {}, EXECUTED)


@pytest.mark.parametrize("page", ["atlas", "geodesics", "optim", "robustness", "tangent"])
@pytest.mark.usefixtures("float32_default", "drawn_once", "walked_briefly")
def test_blocks_of_the_api_pages_run_with_what_they_take_as_given(page: str) -> None:
    path = DOCS / "api" / f"{page}.md"
    assert python_blocks(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run_blocks(path, given(page))


def test_every_python_block_is_run() -> None:
    """By one of the tests above, or it is on the list of those that are not, with a reason."""
    run, unused = 0, set(NOT_RUN)
    for page in PAGES:
        text = page.read_text()
        found = python_blocks(page)
        assert len(found) == len(re.findall(r"^ *(?:```|~~~)\s*py", text, flags=re.MULTILINE)), page
        if page == README or page.parent.name == "api":
            run += len(found)
            continue
        executed = set(python_blocks(page, EXECUTED))
        run += len(executed)
        for line in set(found) - executed:
            block = "\n".join(text.splitlines()[line - 1 :]).split("```")[1]
            reasons = [key for key in NOT_RUN if key in block]
            assert reasons, f"{page.name}, line {line}: no test runs this block"
            unused -= set(reasons)
    assert run >= 110, "blocks were lost"  # a floor: raise it when pages come
    assert not unused, "these blocks are gone"


def test_blocks_are_found_and_failures_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('# A page\n\n```python exec="on" session="a"\nx = 1\n```\n\n```python\nno\n```\n\n')
    assert python_blocks(page) == [3, 7] and python_blocks(page, EXECUTED) == [3]
    run_blocks(page, {}, EXECUTED)
    with page.open("a") as file:
        file.write('```python exec="on" session="a"\nassert x == 2\n```\n')
    with pytest.raises(AssertionError) as caught:
        run_blocks(page, {}, EXECUTED)
    assert caught.traceback[-1].lineno + 1 == 12
    page.write_text(page.read_text().replace('"a"\nassert', '"b"\nassert'))
    with pytest.raises(NameError):
        run_blocks(page, {}, EXECUTED)


def modules() -> list[ModuleType]:
    """The library, and its packages and modules that say what they export."""
    names = [found.name for found in pkgutil.iter_modules(fipgeo.__path__) if not found.name.startswith("_")]
    public = [importlib.import_module(f"fipgeo.{name}") for name in names]
    return [fipgeo, *(module for module in public if hasattr(module, "__all__"))]


def shown_names() -> set[tuple[str, int]]:
    """What the API pages show, each name with the identity of its object.

    These are the documented objects, and what the documented modules export. An export whose name is that of a module
    beside it is hidden by that module: griffe finds the file first, so such an object counts only where it is named.
    """
    shown: set[tuple[str, int]] = set()
    for page in (DOCS / "api").glob("*.md"):
        for target in re.findall(r"^::: (\S+)", page.read_text(), flags=re.MULTILINE):
            owner, _, name = target.rpartition(".")
            found = getattr(importlib.import_module(owner), name, None)
            found = importlib.import_module(target) if found is None else found
            shown.add((name, id(found)))
            if isinstance(found, ModuleType):
                here = [key for key, value in vars(found).items() if is_defined_in(found, value)]
                files = {m.name for m in pkgutil.iter_modules(getattr(found, "__path__", []))}
                exports = [key for key in getattr(found, "__all__", here) if key not in files]
                shown |= {(key, id(getattr(found, key))) for key in exports}
    return shown


def is_defined_in(module: ModuleType, value: object) -> bool:
    return getattr(value, "__module__", None) == module.__name__


@pytest.mark.parametrize("module", modules(), ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_api_pages(module: ModuleType) -> None:
    shown = shown_names()
    missing = [
        key for key in module.__all__ if not key.startswith("_") and (key, id(getattr(module, key))) not in shown
    ]
    assert not missing, "these have no page under docs/api"


def test_every_public_name_exists_once_and_in_order() -> None:
    for name in fipgeo.__all__:
        assert getattr(fipgeo, name) is not None
    assert len(set(fipgeo.__all__)) == len(fipgeo.__all__)


def test_names_that_pages_refer_to_exist() -> None:
    """[`text`][dotted.name]: each is an object, found from the module where it is documented."""
    names = {name for page in PAGES for name in re.findall(r"\]\[(fipgeo[.\w]*)\]", page.read_text())}
    assert len(names) > 40
    for name in names:
        parts = name.split(".")
        found: object = fipgeo
        for place, part in enumerate(parts[1:], start=2):
            try:
                found = importlib.import_module(".".join(parts[:place]))
            except ModuleNotFoundError:
                found = getattr(found, part)


def test_docstrings_have_only_what_the_pages_can_show() -> None:
    """`Example:` would be no section of theirs, and roles of another format would stand there as they are."""
    for file in sorted((ROOT / "fipgeo").rglob("*.py")):
        assert not re.search(
            r"^ *(?:Example|Note|Return|Raise|Arg):$|:math:`|:class:`", file.read_text(), re.MULTILINE
        ), file


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
