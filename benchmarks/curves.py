"""The pages docs/sparsity.md and docs/results.md: curves and tables made from benchmarks/results/sparsify.json.

Nothing is copied by hand and nothing is stored twice, so the pages cannot differ from the file.

    python -m benchmarks.curves FOLDER                      the curves as png files, to look at
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.records import RESULTS
from fipgeo.plotting import figure_svg

Record = dict[str, Any]
Points = dict[float, list[float]]
"""Level to the values of all seeds."""

FILE = RESULTS / "sparsify.json"
MISSING = "No measurements are on record yet.\n"

# Okabe and Ito's colours, one a family; members of a family differ in line and marker.
BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
STYLES = {
    "fipgeo": (BLUE, "-", "o"),
    "gradual magnitude + KD, taps": (RED, "-", "s"),
    "gradual magnitude + KD": (RED, "--", "s"),
    "OBC, global shares, then KD (Adam)": (GREEN, "-", "^"),
    "OBC, global shares": (GREEN, "--", "^"),
    "SparseGPT, global shares": (PINK, "-", "D"),
    "SparseGPT, uniform shares": (PINK, "--", "D"),
    "magnitude + KD (Adam)": (ORANGE, "-", "v"),
    "magnitude + KD (SGD)": (ORANGE, "--", "v"),
    "magnitude, statistics re-estimated": (BLACK, "--", "P"),
    "magnitude": (BLACK, ":", "X"),
    "replay (published FIP)": (SKY, "-.", "*"),
}
DEPTH = 30.0
"""Percentage points below the dense network that a plot shows at most."""


def page(path: Path = FILE) -> str:
    """The measured part of docs/sparsity.md: one plot for each network and number of inputs, and what is best."""
    if not path.exists():
        return MISSING
    body = json.loads(path.read_text())
    parts = [where(body)]
    for (network, inputs), curves in grouped(body["records"]).items():
        axes = drawn(curves, dense_of(body["records"], network))
        title = f"{network}, {inputs:,} unlabelled inputs"
        parts += [f"## {title}\n", figure_svg(axes, f"Test accuracy against sparsity on {title}") + "\n"]
        parts.append(matrix(curves, dense_of(body["records"], network)))
    return "\n".join(parts)


def table(path: Path = FILE) -> str:
    """The measured part of docs/results.md: every record with its cost and its verdict."""
    if not path.exists():
        return MISSING
    body = json.loads(path.read_text())
    shared = {f"{parsed(r['case'])[2]:,} unlabelled inputs, seed {r['seed']}" for r in body["records"]}
    same = len(shared) == 1  # then a sentence says it, and the table needs no columns
    heads = ["network", "zeros", *([] if same else ["inputs", "seed"]), "method"]
    heads += ["test accuracy", "CPU seconds", "evaluations", "changed, held out"]
    rows = []
    for r in sorted(body["records"], key=lambda r: (*parsed(r["case"])[::2], parsed(r["case"])[1], -r["value"])):
        network, level, inputs = parsed(r["case"])
        row = [network, percent(level), *([] if same else [f"{inputs:,}", str(r["seed"])]), r["method"]]
        row += [f"{r['value']:.2f} %", f"{r['cpu_seconds']:.0f}" if "cpu_seconds" in r else ""]
        row += [f"{r['forwards'] / 1000:,.0f} k" if "forwards" in r else ""]
        row.append(f"{r['changed']:.1%} (at most {r['upper']:.1%})" if "changed" in r else "")
        rows.append(row)
    note = f"All rows: {shared.pop()}.\n\n" if same else ""
    return where(body) + "\n" + note + markdown(heads, rows)


def where(body: Record) -> str:
    place = body["environment"]
    return (
        f"`{body['command'].strip()}` is the last command that wrote to the file; torch {place['torch']},"
        f" {place['processor']}, {place['threads']} thread(s).\n"
    )


def parsed(case: str) -> tuple[str, float, int]:
    """Network, level and number of inputs of a case `NETWORK/sparsity=LEVEL/inputs=COUNT`."""
    network, level, inputs = case.split("/")
    return network, float(level.removeprefix("sparsity=")), int(inputs.removeprefix("inputs="))


def grouped(records: Sequence[Record]) -> dict[tuple[str, int], dict[str, Points]]:
    """Network and inputs to the curves of all methods there, those of `STYLES` first and in its order."""
    found: dict[tuple[str, int], dict[str, Points]] = {}
    for r in records:
        network, level, inputs = parsed(r["case"])
        if level and r["figure"] == "test_accuracy":
            curves = found.setdefault((network, inputs), {})
            curves.setdefault(r["method"], {}).setdefault(level, []).append(r["value"])
    order = {method: place for place, method in enumerate(STYLES)}
    return {
        key: {m: curves[m] for m in sorted(curves, key=lambda m: order.get(m, len(order)))}
        for key, curves in found.items()
    }


def dense_of(records: Sequence[Record], network: str) -> float | None:
    values = [r["value"] for r in records if r["method"] == "dense" and parsed(r["case"])[0] == network]
    return values[0] if values else None


def drawn(curves: dict[str, Points], dense: float | None) -> Axes:
    """Accuracy against sparsity; the axis is the logarithm of the weights that are left."""
    axes = Figure(figsize=(6.4, 5.0), layout="constrained").subplots()
    levels = sorted({level for points in curves.values() for level in points})
    others = [method for method in curves if method not in STYLES]
    for method, points in curves.items():
        colour, line, marker = STYLES.get(method) or ("0.5", "-", "x+12345"[others.index(method) % 7])
        at = sorted(points)
        means = [sum(points[level]) / len(points[level]) for level in at]
        spread = [
            [m - min(points[level]) for m, level in zip(means, at, strict=True)],
            [max(points[level]) - m for m, level in zip(means, at, strict=True)],
        ]
        style = {"color": colour, "linestyle": line, "marker": marker, "label": method, "markersize": 5}
        ours = method == "fipgeo"
        x = [-math.log(1 - level) for level in at]
        axes.errorbar(x, means, spread, **style, linewidth=2.6 if ours else 1.3, zorder=3 if ours else 2, capsize=2)
    if dense is not None:
        axes.axhline(dense, color="0.5", linewidth=1, zorder=1, label=f"dense, {dense:.1f} %")
    lowest = min((v for points in curves.values() for values in points.values() for v in values), default=0.0)
    top = max([v for points in curves.values() for vs in points.values() for v in vs] + [dense or 0.0])
    axes.set_ylim(max(lowest, top - DEPTH) - 1, top + 1)
    axes.set_xticks([-math.log(1 - level) for level in levels], [percent(level) for level in levels])
    axes.minorticks_off()
    axes.set(xlabel="exact zeros among the weights of convolutions and linear layers", ylabel="test accuracy, %")
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def matrix(curves: dict[str, Points], dense: float | None) -> str:
    """Means over seeds, a row a method and a column a level; the best of a column is bold."""
    levels = sorted({level for points in curves.values() for level in points})
    means = {m: {level: sum(v) / len(v) for level, v in points.items()} for m, points in curves.items()}
    best = {level: max(points[level] for points in means.values() if level in points) for level in levels}
    rows = [] if dense is None else [["dense", *[f"{dense:.1f}"] * len(levels)]]
    for method, points in means.items():
        cells = [f"{points[level]:.1f}" if level in points else "" for level in levels]
        marks = [points.get(level) == best[level] for level in levels]
        rows.append([method, *(f"**{c}**" if bold else c for c, bold in zip(cells, marks, strict=True))])
    return markdown(["method", *map(percent, levels)], rows)


def percent(level: float) -> str:
    return f"{100 * level:g} %" if level else "dense"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def pictures(path: Path = FILE) -> Iterator[tuple[str, Axes]]:
    """Every plot with a name."""
    records = json.loads(path.read_text())["records"]
    for (network, inputs), curves in grouped(records).items():
        yield f"{network}-{inputs}", drawn(curves, dense_of(records, network))


if __name__ == "__main__":
    for name, axes in pictures():
        axes.figure.savefig(Path(sys.argv[1]) / f"{name}.png", dpi=120)  # type: ignore[union-attr]
