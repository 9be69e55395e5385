"""Grids of cells that are measured one by one, so that a run can be broken off and several can share the work."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.records import RESULTS, processor, read, write

Record = dict[str, Any]


class Cell(NamedTuple):
    """What is measured at once.

    Attributes:
        about: What all its records share, and no other cell's do: case, seed and, where there is one, method.
        run: Measures it.
    """

    about: Record
    run: Callable[[], list[Record]]


def options(text: str | None, kinds: Sequence[str], seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments that all grids have.

    Args:
        text: Of the module.
        kinds: Of cells, all by default.
        seeds: By default.
    """
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", default=list(kinds), choices=list(kinds))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(seeds))
    parser.add_argument("--limit", type=float, default=float("inf"), help="no cell begins after so many seconds")
    parser.add_argument("--again", action="store_true", help="measure what is on record too")
    parser.add_argument("--plan", action="store_true", help="print the cells and stop")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="where the records are")
    return parser


def measure(name: str, cells: Iterable[Cell], args: argparse.Namespace) -> None:
    """Run the cells that are not on record yet, on one thread, and write each to `name`.json when it is done.

    Cells do not depend on one another: one that fails is said, and the others go on. Records get its CPU seconds and
    the processor, since a file is often filled on more than one machine.

    Raises:
        SystemExit: Some failed.
    """
    torch.set_num_threads(1)
    begun, failed, known = time.perf_counter(), 0, [] if args.again else read(name, args.folder)
    for about, run in cells:
        title = "  ".join(map(str, about.values()))
        if any(about.items() <= r.items() for r in known) or time.perf_counter() - begun > args.limit:
            continue
        if args.plan:
            print(title)
            continue
        spent = time.process_time()
        try:
            found = [about | record for record in run()]
        except Exception as error:
            failed += 1
            print(f"{title}  {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        cost = {"seconds": round(time.process_time() - spent, 1), "processor": processor()}
        write(name, [record | cost for record in found], args.folder)
        for r in found:
            print(f"{title}  {r['method']}  {r['figure']}  {r['value']} {r['unit']}", flush=True)
    if failed:
        sys.exit(f"{failed} cells failed")
