"""What may import what, what `import fipgeo` may load, how large things may grow, what text may not say."""

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "fipgeo"
FILES = sorted(PACKAGE.rglob("*.py"))

# A unit (a module or a folder directly in fipgeo) imports from itself and from levels above its own line.
LEVELS = [
    {"io", "lazy", "trees", "tasks", "grids", "checkpointing"},
    {"linalg"},
    {"space", "outputs", "data"},
    {"sources"},
    {"basis", "constraints", "merging", "model", "task_vectors"},
    {"attacks", "jacobian", "shrink", "heads", "adapters"},
    {"low_rank", "metrics"},
    {"field"},
    {"paths", "tangent", "geodesics"},
    {"memory"},
    {"optim", "atlas", "manifold", "between", "sequences"},
    {"__main__"},
]
ALONE = {"plotting"}  # imports nothing of ours, except for annotations; ours import it only inside a method
LEVEL = {unit: number for number, units in enumerate(LEVELS) for unit in units}
LEAVES = {"io"}  # imports nothing of ours

HEAVY = {"matplotlib", "scipy", "geoopt", "tqdm"}  # imported inside the functions that need them
LIGHT = {"torch", "numpy"}  # may be imported at the top of a file
LIGHT_OF = {
    "manifold": {"torch", "geoopt"},
    "io": {"torch", "safetensors"},
    "plotting": {"torch", "numpy", "matplotlib"},
}

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60


class Import:
    """One imported module or name: where it is, what it is, and whether it runs when the file is imported."""

    def __init__(self, file: Path, line: int, target: str, place: str) -> None:
        self.file, self.line, self.target, self.place = file, line, target, place

    @property
    def unit(self) -> str:
        """The part of our package that does the import; empty for ``fipgeo/__init__.py``."""
        parts = self.file.relative_to(PACKAGE).with_suffix("").parts
        return "" if parts == ("__init__",) else parts[0]

    @property
    def target_unit(self) -> str:
        """The part of our package that is imported; empty where the target is the package or not ours."""
        parts = self.target.split(".")
        return parts[1] if parts[0] == "fipgeo" and len(parts) > 1 else ""

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.target}"


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def walk(node: ast.AST, place: str = "module") -> Iterator[tuple[ast.Import | ast.ImportFrom, str]]:
    """The imports below a node, each with its place: module, function or typing."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, place
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield from walk(child, "function")
        elif isinstance(child, ast.If) and is_type_checking(child.test):
            for statement in child.body:
                yield from walk(ast.Module([statement], []), "typing")
            for statement in child.orelse:
                yield from walk(ast.Module([statement], []), place)
        else:
            yield from walk(child, place)


@cache
def parsed(file: Path) -> ast.Module:
    """The tree of a file."""
    return ast.parse(file.read_text())


def imports(file: Path) -> Iterator[Import]:
    """The imports of a file by full name; ``from a import b`` counts as a.b, relative ones are resolved."""
    package = (*file.relative_to(ROOT).parent.parts,)
    for node, place in walk(parsed(file)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        else:
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += node.module.split(".") if node.module else []
            targets = [".".join([*base, alias.name]) for alias in node.names]
        for target in targets:
            yield Import(file, node.lineno, target, place)


@cache
def all_imports() -> list[Import]:
    """Those of every file of the package."""
    return [found for file in FILES for found in imports(file)]


def wrong_arrow(found: Import) -> str:
    """Why an import of our own is not allowed; empty if it is."""
    source, target = found.unit, found.target_unit
    if found.target.split(".")[0] != "fipgeo" or not source or source == target:
        return ""
    if target in ALONE:
        return "" if found.place in ("function", "typing") else "plotting is imported inside a method only"
    if source in ALONE:
        return "" if found.place == "typing" else "plotting reads records and imports nothing of ours"
    if source in LEAVES:
        return "a leaf imports nothing of ours"
    if found.place == "function":
        return "an import inside a function hides a cycle; split the module instead"
    if source not in LEVEL or target not in LEVEL:
        return f"{source if source not in LEVEL else target or 'fipgeo'!r} is not in the table of this test"
    return "" if LEVEL[target] < LEVEL[source] else "this arrow points up or sideways"


def test_our_own_imports_follow_the_table() -> None:
    wrong = [f"{found}: {reason}" for found in all_imports() if (reason := wrong_arrow(found))]
    assert not wrong, "\n".join(wrong)


def test_every_part_of_the_package_is_in_the_table() -> None:
    units = {file.relative_to(PACKAGE).with_suffix("").parts[0] for file in FILES} - {"__init__"}
    assert units <= set(LEVEL) | ALONE


def test_other_packages_are_imported_where_they_may_be() -> None:
    wrong = []
    for found in all_imports():
        name = found.target.split(".")[0]
        if name in sys.stdlib_module_names or name == "fipgeo":
            continue
        if name not in LIGHT.union(HEAVY, *LIGHT_OF.values()):
            wrong.append(f"{found}, which is not a dependency")
        elif found.place == "function" and name not in HEAVY:
            wrong.append(f"{found} inside a function, though it is not a heavy package")
        elif found.place == "module" and name not in LIGHT_OF.get(found.unit, LIGHT):
            wrong.append(f"{found} at the top of the file")
        elif found.place == "module" and found.target.startswith("matplotlib.pyplot"):
            wrong.append(f"{found} at the top of the file")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("file", "line", "reason"),
    [
        ("linalg/a.py", "from fipgeo.space import WeightSpace", "up or sideways"),
        ("linalg/a.py", "from .. import metrics", "up or sideways"),
        ("outputs.py", "from .space import WeightSpace", "up or sideways"),
        ("metrics.py", "if x:\n    import fipgeo.paths.driver", "up or sideways"),
        ("metrics.py", "from fipgeo import plotting", "inside a method only"),
        ("paths/a.py", "def f():\n    from fipgeo.metrics import Metric", "hides a cycle"),
        ("io.py", "from fipgeo.linalg import Spectrum", "a leaf"),
        ("plotting/a.py", "from fipgeo.linalg import Spectrum", "reads records"),
        ("metrics.py", "from fipgeo.utils import helper", "'utils' is not in the table"),
        ("metrics.py", "from fipgeo import __version__", "'__version__' is not in the table"),
        ("metrics.py", "def plot(self):\n    from fipgeo import plotting", ""),
        ("plotting/a.py", "if TYPE_CHECKING:\n    from fipgeo.linalg import Spectrum", ""),
        ("paths/driver.py", "from ..linalg.solve import cg\nfrom .result import Path\nimport fipgeo.io", ""),
        ("__init__.py", "from fipgeo.paths import sparsify", ""),
    ],
)
def test_the_table_catches_wrong_arrows(tmp_path, monkeypatch, file, line, reason) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    monkeypatch.setitem(globals(), "PACKAGE", tmp_path / "fipgeo")
    path = tmp_path / "fipgeo" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(line)
    reasons = [wrong_arrow(found) for found in imports(path)]
    assert reasons
    assert any(reason in given for given in reasons) if reason else not any(reasons)


def test_import_loads_nothing_heavy() -> None:
    heavy = ["matplotlib", "matplotlib.pyplot", "scipy.sparse.linalg", "geoopt"]
    code = f"import sys, fipgeo; print([name for name in {heavy} if name in sys.modules])"
    code += "; import fipgeo.plotting; print('matplotlib.pyplot' in sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.split() == ["[]", "False"]


def test_files_and_functions_stay_small() -> None:
    large = []
    for file in FILES:
        text = file.read_text()
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            large.append(f"{file.relative_to(ROOT)} has {lines} lines, at most {MAX_FILE_LINES}")
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                first, last = node.body[0], node.end_lineno or node.lineno
                doc = (first.end_lineno or 0) - first.lineno + 1 if ast.get_docstring(node) else 0
                if (lines := last - node.lineno + 1 - doc) > MAX_FUNCTION_LINES:
                    place = f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
                    large.append(f"{place} has {lines} lines without docstring, at most {MAX_FUNCTION_LINES}")
    assert not large, "\n".join(large)


def project_files() -> list[Path]:
    """Files under version control or about to be; every file outside hidden folders where there is no git."""
    if (ROOT / ".git").exists() and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\0")
        files = [ROOT / name for name in names if name]
    else:
        top = [path for path in ROOT.iterdir() if not path.name.startswith(".") or path.name == ".ci"]
        files = [file for path in top for file in ([path] if path.is_file() else path.rglob("*"))]
    skipped = ROOT / "docs" / "assets" / "katex"  # not our text
    return [file for file in files if file.is_file() and skipped not in file.parents]


def test_no_text_names_a_place_on_one_machine() -> None:
    folders = ("work", "tmp", "home", "root", "Users", "opt", "mnt")
    places = [f"/{folder}/" for folder in folders] + [f"C:{chr(92)}"]
    found = []
    for file in project_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture or another binary file
            continue
        lines = text.splitlines() if any(place in text for place in places) else []
        for number, line in enumerate(lines, 1):
            # a folder counts where a path can start, not inside a web address or a relative path
            if any(f"{before}{place}" in f" {line}" for place in places for before in " \"'`=(:[,>"):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)
