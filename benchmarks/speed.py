"""The page docs/speed.md: tables and plots made from benchmarks/results/metric.json when the page is built.

Nothing is copied by hand and nothing is stored twice, so the page cannot differ from the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from fipgeo.plotting import figure_svg

Record = dict[str, Any]

TITLES = {
    "time_ratio_matvec": "One product, set-up amortised",
    "time_ratio_first": "The first product of a fresh metric",
    "time_ratio_block16": "Sixteen vectors at once, set-up amortised",
    "time_ratio_block16_with_setup": "Sixteen vectors at once on a fresh metric",
    "time_ratio_top20": "The 20 largest eigenpairs, everything included",
    "time_ratio_solve": "A damped solve on a fresh metric",
    "time_ratio_solve_next": "Each further right-hand side",
}
LINES = {"seconds_by_examples": ("examples", "examples N"), "seconds_by_weights": ("weights", "weights D")}
PEER = "curvlinops"
MISSING = "No measurements are on record yet.\n"


def page(path: Path) -> str:
    """The measured part of the page, in markdown."""
    if not path.exists():
        return MISSING
    body = json.loads(path.read_text())
    records = body["records"]
    parts = [_where(body), _summary(records), *plots(records)]
    parts += [_ratios(title, _of(records, figure)) for figure, title in TITLES.items()]
    parts += [_setup(records), _small_damping(records), _auto(records), _memory(records), _jacobians(records)]
    parts += [_agreement(records), _skipped(body.get("skipped", []))]
    return "\n".join(part for part in parts if part)


def plots(records: Sequence[Record]) -> list[str]:
    """Seconds of a product over the number of examples and of weights, on double logarithmic axes."""
    made = []
    for figure, (key, label) in LINES.items():
        found = _of(records, figure)
        if not found:
            continue
        axes = Figure(figsize=(6, 3.6), layout="constrained").subplots()
        marks = iter("osD^vP*X")
        for network in dict.fromkeys(_network(r) for r in found):
            mark = next(marks, "o")
            for method, style in ((PEER, "--"), ("fipgeo", "-")):
                points = sorted((r[key], r["value"]) for r in found if (_network(r), r["method"]) == (network, method))
                colour = "C0" if method == "fipgeo" else "C1"
                axes.plot(*zip(*points, strict=True), style, marker=mark, color=colour, label=f"{network}, {method}")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="seconds a product")
        # less than a decade would get a label at every minor tick, and they overlap
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(frameon=False)
        made.append(figure_svg(axes, f"Seconds of one product over {label}, beside {PEER}") + "\n")
    return made


def _where(body: dict[str, Any]) -> str:
    place = body["environment"]
    device = place["gpu"] if place.get("gpu") else place["processor"]
    peers = ", ".join(f"{name} {version}" for name, version in place.get("peers", {}).items())
    return (
        f"`{body['command']}` is the last command that wrote to the file; torch {place['torch']}, {device},"
        f" {place['threads']} thread(s). Peers: {peers}.\n"
    )


def _summary(records: Sequence[Record]) -> str:
    """Ours over curvlinops', a row a case and a column a task."""
    found = {(r["case"], r["figure"]): r for r in records if r["method"] == "fipgeo" and r["figure"] in TITLES}
    cases = list(dict.fromkeys(case for case, _ in found))
    heads = [figure.removeprefix("time_ratio_").replace("_", " ") for figure in TITLES]
    rows = [[case, *(_number(found.get((case, figure), {}).get("value")) for figure in TITLES)] for case in cases]
    return _table("Time over curvlinops' time: below 1 is faster", ["case", *heads], rows)


def _ratios(title: str, records: Sequence[Record]) -> str:
    rows = []
    for r in records:
        spread = "" if not r["spread"] else f"{_number(r['spread'][0])} to {_number(r['spread'][1])}"
        numbers = [_number(r["value"]), spread, _number(r["seconds"]), _number(r.get("wall_seconds"))]
        rows.append(
            [r["case"], r["method"], *numbers, r["rounds"], _number(r.get("products")), _number(r.get("residual"))]
        )
    heads = ["case", "method", "ratio", "smallest to largest", "seconds", "wall", "rounds", "products", "true residual"]
    return _table(title, heads, _without_empty(heads, rows))


def _setup(records: Sequence[Record]) -> str:
    even = {(r["case"], r["method"]): r["value"] for r in _of(records, "break_even_products")}
    rows = [
        [r["case"], r["method"], _number(r["value"]), _number(even.get((r["case"], r["method"]))) or "never"]
        for r in _of(records, "setup_seconds")
    ]
    return _table("Set-up, and products until it has paid off", ["case", "method", "seconds", "products"], rows)


def _small_damping(records: Sequence[Record]) -> str:
    rows = [
        [r["case"], r["method"], _number(r["value"]), _number(r["residual_double"]), r["products"]]
        for r in _of(records, "solve_residual_small_damping")
    ]
    heads = ["case", "method", "residual", "residual in float64", "products"]
    return _table("Solve at a damping of 1e-5 of the largest eigenvalue", heads, rows)


def _auto(records: Sequence[Record]) -> str:
    rows = [
        [r["case"], r["figure"].removeprefix("auto_ratio_"), _number(r["value"]), r["best"].removeprefix("fipgeo ")]
        for r in records
        if r["figure"].startswith("auto_ratio")
    ]
    return _table("The automatic choice over the best single engine", ["case", "task", "ratio", "best engine"], rows)


def _memory(records: Sequence[Record]) -> str:
    rows = [
        [r["case"], r["method"], f"{r['value'] / 2**20:.0f}", f"{r['max_bytes'] / 2**20:.0f}"]
        for r in _of(records, "peak_bytes")
    ]
    return _table("Peak memory above network and inputs, MiB", ["case", "method", "peak", "max_bytes"], rows)


def _jacobians(records: Sequence[Record]) -> str:
    rows = [[r["case"], r["method"], _number(r["value"])] for r in _of(records, "jacobian_seconds")]
    return _table("Building the whole Jacobian, seconds", ["case", "method", "seconds"], rows)


def _agreement(records: Sequence[Record]) -> str:
    rows = [[r["case"], r["method"], _number(r["value"])] for r in _of(records, "agreement_curvlinops")]
    return _table("Relative difference of a product from curvlinops'", ["case", "method", "difference"], rows)


def _skipped(entries: Sequence[Record]) -> str:
    rows = [[s["case"], s["figure"], s["method"], s["reason"].replace("|", "/")] for s in entries]
    return _table("Left out", ["case", "figure", "method", "why"], rows)


def _of(records: Sequence[Record], figure: str) -> list[Record]:
    return [r for r in records if r["figure"] == figure]


def _network(record: Record) -> str:
    return record["case"].partition("-")[0]


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.2g}"


def _without_empty(heads: list[str], rows: list[list[Any]]) -> list[list[Any]]:
    """The rows without the columns that are empty in all of them; `heads` loses the same ones."""
    empty = [i for i in range(len(heads)) if rows and all(row[i] == "" for row in rows)]
    for i in reversed(empty):
        del heads[i]
    return [[cell for i, cell in enumerate(row) if i not in empty] for row in rows]


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    if not rows:
        return ""
    lines = [f"## {title}\n", "| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)]) + "\n"
