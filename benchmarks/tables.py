"""Tables for the documentation: any file of records as markdown, a table a case, a row a method, a column a figure.

python -m benchmarks.tables learn old_accuracy new_accuracy        as it goes into a page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.curves import markdown
from benchmarks.records import RESULTS

MISSING = "No measurements are on record yet.\n"


def table(
    path: Path, figures: Mapping[str, str], cases: Sequence[str] | None = None, extra: Mapping[str, str] | None = None
) -> str:
    """One table for each case: means over seeds, with the half range where there are several.

    Args:
        path: A json file of records.
        figures: Figure -> heading of its column; rows are sorted by the last column, the best first.
        cases: Which, and in which order; None for all on record.
        extra: Key of a record beside its value, such as its seconds -> heading, for more columns.
    """
    if not path.exists():
        return MISSING
    body = json.loads(path.read_text())
    records = [r for r in body["records"] if r["figure"] in figures]
    known = list(dict.fromkeys(r["case"] for r in records))
    parts = []
    for case in known if cases is None else [c for c in cases if c in known]:
        rows: dict[str, list[list[float]]] = {}
        for method in dict.fromkeys(r["method"] for r in records if r["case"] == case):
            mine = [r for r in records if (r["case"], r["method"]) == (case, method)]
            columns = [[r["value"] for r in mine if r["figure"] == figure] for figure in figures]
            columns += [_values(mine, key) for key in extra or {}]
            rows[method] = [list({r["seed"] for r in mine}), *columns]
        last = len(figures)
        order = sorted(rows, key=lambda m: -sum(rows[m][last]) / max(len(rows[m][last]), 1))
        digits = [_digits([v for row in rows.values() for v in row[place]]) for place in range(len(rows[order[0]]))]
        cells = [[method, str(len(rows[method][0])), *map(_cell, rows[method][1:], digits[1:])] for method in order]
        heads = ["method", "seeds", *figures.values(), *(extra or {}).values()]
        parts.append(f"**{case}**\n\n" + markdown(heads, cells))
    return "\n".join(parts) or MISSING


def _values(records: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """A key's value for each seed."""
    return list({r["seed"]: r[key] for r in records if key in r}.values())


def _digits(column: Sequence[float]) -> int:
    """Decimals of a column: enough for its shares or seconds, the same in all rows."""
    largest = max(map(abs, column), default=0.0)
    return 0 if largest >= 1000 else 3 if largest < 1 else 1


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    mean, half = sum(values) / len(values), (max(values) - min(values)) / 2
    return f"{mean:,.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


if __name__ == "__main__":
    print(table(RESULTS / f"{sys.argv[1]}.json", {name: name.replace("_", " ") for name in sys.argv[2:]}))
