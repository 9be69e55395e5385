"""Numbers in the README and on the pages are those on record: each sentence is made anew from the committed results."""

import inspect
import json
import re
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import pytest

import fipgeo

ROOT = Path(__file__).resolve().parent.parent
RESNET, LENET = "akamaster_cifar10_resnet20", "sfd_mnist_lenet5"
SKETCH, VIEWS = "fipgeo, layer sketch, no input kept", "fipgeo, views=20, epochs=3, refresh=20"


@cache
def records(name: str) -> list[dict[str, Any]]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())["records"]


def found(name: str, key: str = "value", **about: Any) -> list[Any]:
    """What the records of a file that fit a description say."""
    values = [r[key] for r in records(name) if all(r[k] == v for k, v in about.items())]
    assert values, f"{name}.json has no record of {about}"
    return values


def pruned(network: str, zeros: str, method: str) -> str:
    case = f"{network}/sparsity={zeros}/inputs=1000"
    return f"{mean(found('sparsify', case=case, method=method, figure='test_accuracy')):.1f}"


def learned(method: str) -> str:
    case = "mnist_fashion/kept=50"
    old, new = (mean(found("learn", case=case, method=method, figure=f"{which}_accuracy")) for which in ("old", "new"))
    seeds = found("learn", "seed", case=case, method=method, figure="old_accuracy")
    return f"{old:.1f} % and {new:.1f} %" + (f", mean of {len(seeds)} seeds." if len(seeds) > 1 else ".")


def held(inputs: int) -> str:
    case, method = f"{LENET}/sparsity=0.9000/held_out={inputs}", "certificate at 95 %: distance"
    return f"{100 * found('coverage', case=case, method=method)[0]:.1f} %"


def connected(case: str) -> str:
    methods = ("straight line", "aligned by weights", "aligned line", "path")
    line, weights, aligned, path = (
        f"{found('geodesics', case=case, figure='excess_loss', method=method)[0]:.2f}" for method in methods
    )
    return (
        f"by {line} on the straight line, by {weights} after alignment by weights, by {aligned} after alignment by"
        f" activations, and by {path} on the path between the networks so aligned"
    )


def saved() -> str:
    about = {"method": "rough chord, 4 steps, random, null space", "figure": "saved_products"}
    lenet, resnet = (f"{found('geodesics', case=f'predictor/{n}', **about)[0]:.1f}" for n in ("lenet5", "resnet8"))
    return (
        f"four such steps reached the drift of plain ones with {lenet} (LeNet-5) and {resnet} (a ResNet-8) times fewer"
    )


def costs(case: str, figure: str) -> list[float]:
    return [round(value, 1) for value in found("tangent", case=case, figure=figure)]


def streamed(case: str) -> str:
    weights, files, block = (found("atlas", case=case, figure=f)[0] for f in ("weights", "files", "largest block"))
    ours, fixed = (found("atlas", case=case, figure="step", method=m)[0] for m in ("fipgeo", "fixed weights"))
    return (
        f"22 vectors of {weights / 1e6:.1f} million weights, {files} MiB of float16 files whose largest block has"
        f" {block} MiB, a training step took {ours} MiB above the network; with the composed weights held fixed it"
        f" takes {fixed} MiB"
    )


def sentences() -> list[tuple[str, str]]:
    """Page and sentence."""
    dense = [pruned(network, "0", "dense") for network in (RESNET, LENET)]
    gradual = "gradual magnitude + KD, taps"
    whole, last, vit = f"{RESNET}/all", f"{RESNET}/last block", "smmk47_cifar10_vit/all"
    forward, training = costs(whole, "forward"), [costs(case, "training step")[0] for case in (whole, vit)]
    (partly,), (slowest,) = {*costs(last, "forward")}, {round(v) for v in costs(vit, "forward")}
    passes = found("learn", "passes", method=VIEWS)[0]
    longer = found("learn", "passes", case="mnist_fashion/kept=50", method="fine-tuning")[0]
    assert passes == found("learn", "passes", method=SKETCH)[0]
    return [
        (
            "README.md",
            f"Dense: {dense[0]} (CIFAR-10 ResNet-20), {dense[1]} (MNIST LeNet-5).",
        ),
        (
            "README.md",
            f"higher on the ResNets ({pruned(RESNET, '0.9', gradual)} against {pruned(RESNET, '0.9', 'fipgeo')} at 90 %"
            f" zeros) and, at 95 %, lower on LeNet-5 ({pruned(LENET, '0.95', gradual)} against"
            f" {pruned(LENET, '0.95', 'fipgeo')}).",
        ),
        ("README.md", f"in {passes} passes over the new data ({longer} for fine-tuning)"),
        ("README.md", f"in 20 views each: {learned(VIEWS)}"),
        ("README.md", f"a sketch of what the layers saw in their place: {learned(SKETCH)}"),
        ("README.md", f"fine-tuning: {learned('fine-tuning')}"),
        ("docs/paths.md", f"in {held(100)} of 200 repetitions with 100 inputs and in {held(1000)} with 1,000"),
        (
            "docs/api/tangent.md",
            f"a composed ResNet-20 takes {min(forward)} to {max(forward)} times a plain one, {partly} times where only"
            f" the last block and the head are linear; of a small ViT about {slowest} times",
        ),
        ("docs/api/atlas.md", streamed("stream/10 units")),
        ("docs/api/geodesics.md", connected("connect/dense-chreg")),
        ("docs/api/geodesics.md", saved()),
        ("docs/api/tangent.md", f"A training step takes {training[0]} and {training[1]} times a plain one"),
    ]


@pytest.mark.parametrize(("page", "sentence"), sentences(), ids=lambda text: text[:40])
def test_sentences_say_what_is_on_record(page: str, sentence: str) -> None:
    assert sentence in " ".join((ROOT / page).read_text().split())


UNMEASURED = re.compile(
    r"(?i)arxiv|doi:|torch|python|apache|\bor newer|capability|eigenvalue|pixels may move|\(0\.1\)"
    r"|^\|.*(the same|mean non-zero)"
)
"""What decimals that are no measurements stand beside: versions, papers, default values."""


def prose(page: Path) -> list[str]:
    """The paragraphs and table rows of a page without code, formulas and targets of links."""
    text = page.read_text()
    for pattern in (r"```.*?```", r"\$\$.*?\$\$", r"\\\(.*?\\\)", r"`[^`]*`", r"(?<=\])\([^)]*\)"):
        text = re.sub(pattern, "", text, flags=re.DOTALL)
    blocks = re.split(r"\n(?=\s*(?:\n|[-|*] ))", text)
    return [" ".join(block.split()) for block in blocks]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_no_other_decimals_stand_in_the_prose(page: Path) -> None:
    """A figure with a decimal point is held to the records, is no measurement, or belongs into a generated block."""
    known = {
        number for name, sentence in sentences() if ROOT / name == page for number in re.findall(r"\d+\.\d+", sentence)
    }
    for block in prose(page):
        if page.name == "README.md" and block.startswith("|"):  # the table, which tests/test_docs.py holds
            continue
        if not UNMEASURED.search(block):
            assert not set(re.findall(r"\d+\.\d+", block)) - known, block


def test_defaults_that_the_page_on_choosing_names_are_those_of_the_signatures() -> None:
    def default(function: Any, name: str) -> Any:
        return inspect.signature(function).parameters[name].default

    rows = [line for line in (ROOT / "docs/choosing.md").read_text().splitlines() if line.startswith("|")]
    for functions, name in (
        ((fipgeo.Method, fipgeo.GaussNewton), "`Method` of a path, `GaussNewton`"),
        ((fipgeo.adapt, fipgeo.robustify), "`adapt`, `robustify`"),
        ((fipgeo.optim.FIP,), "`FIP`"),
        ((fipgeo.atlas.fit_,), "`atlas.fit_`"),
    ):
        row = next(line for line in rows if line.startswith(f"| {name} |"))
        said = float(row.split("|")[3].split()[0])
        assert [default(function, "damping") for function in functions] == [said] * len(functions)
    assert default(fipgeo.geodesic, "damping") is None


def test_the_inputs_that_a_promise_takes() -> None:
    bound = fipgeo.changed_upper_bound
    fewest = next(n for n in range(1, 1000) if bound(0, n) <= 0.01)
    assert f"at most 1 % changed predictions at 95 % takes {fewest} held-out inputs" in " ".join(
        (ROOT / "docs/faq.md").read_text().split()
    )
    assert f"1 % at 95 % needs {fewest} of them" in " ".join((ROOT / "docs/paths.md").read_text().split())
