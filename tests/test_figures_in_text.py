"""Measured numbers in the README and on the pages are read from the committed results; none stands there by itself."""

import ast
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest

import fipgeo

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks import readme  # noqa: E402


def test_the_readme_is_what_its_command_writes() -> None:
    committed = readme.README.read_text()
    assert readme.rewritten(committed) == committed, "run: python -m benchmarks.readme"


MEASURED = re.compile(r"\d+\.\d+|\b\d[\d,]* ?(?:s|ms|seconds|minutes|[KMG]i?B)\b|\d times\b|\b\d*[2-46-9] %")
"""What measurements look like: decimals, times, sizes, factors, shares that are no round number."""
UNMEASURED = re.compile(
    r"(?i)arxiv|doi:|torch|python|apache|\bor newer|capability|eigenvalue|pixels may move|\(0\.1\)|fit 1 GiB"
    r"|, 1 GiB unless given|^\|.*(the same|mean non-zero)"
)
"""What else stands beside such numbers: versions, papers, default values."""


def prose(page: Path) -> list[str]:
    """The paragraphs and table rows of a page, without code, formulas and targets of links, and what blocks say."""
    text = page.read_text()
    if page == readme.README:
        text = readme.PLACE.sub("", text)
    said = [
        part.value
        for options, source in re.findall(r"```python ([^\n]*)\n(.*?)```", text, flags=re.DOTALL)
        if 'exec="on"' in options and "source=" not in options
        for part in ast.walk(ast.parse(source))
        if isinstance(part, ast.Constant) and isinstance(part.value, str) and "\n" in part.value
    ]
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"\\\(.*?\\\)", r"`[^`]*`", r"(?<=\])\([^)]*\)"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    return [" ".join(block.split()) for block in [*re.split(r"\n(?=\s*(?:\n|[-|*] ))", text), *said]]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_measured_number_stands_free(page: Path) -> None:
    """It is read from the results by a block of the page, or it is no measurement."""
    for block in prose(page):
        assert UNMEASURED.search(block) or not MEASURED.search(block), block


def test_free_numbers_are_seen(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for free in (
        "It took 12 s.",
        "98 % were right.",
        "2.1 times faster",
        '```python exec="on"\nprint("""\n3 MiB\n""")\n```',
    ):
        page.write_text(f"# A page\n\nAt 95 %, as `x = 1.5`.\n\n{free}\n")
        assert any(MEASURED.search(text) for text in prose(page)), free


def test_defaults_that_the_page_on_choosing_names_are_those_of_the_signatures() -> None:
    def default(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    rows = [line for line in (ROOT / "docs/choosing.md").read_text().splitlines() if line.startswith("|")]
    for functions, name in (
        ((fipgeo.Method, fipgeo.GaussNewton), "`Method` of a path, `GaussNewton`"),
        ((fipgeo.adapt, fipgeo.robustify), "`adapt`, `robustify`"),
        ((fipgeo.optim.FIP,), "`FIP`"),
    ):
        row = next(line for line in rows if line.startswith(f"| {name} |"))
        said = float(row.split("|")[3].split()[0])
        assert [default(function, "damping") for function in functions] == [said] * len(functions)
    assert default(fipgeo.geodesic, "damping") is None
    text = (ROOT / "docs/choosing.md").read_text()
    assert f"`reach={default(fipgeo.atlas.fit_, 'reach')}` at the start" in text


def test_the_inputs_that_a_promise_takes() -> None:
    bound = fipgeo.changed_upper_bound
    fewest = next(n for n in range(1, 1000) if bound(0, n) <= 0.01)
    assert f"at most 1 % changed predictions at 95 % takes {fewest} held-out inputs" in " ".join(
        (ROOT / "docs/faq.md").read_text().split()
    )
    assert f"1 % at 95 % needs {fewest} of them" in " ".join((ROOT / "docs/paths.md").read_text().split())
