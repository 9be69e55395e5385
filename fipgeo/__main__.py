"""Commands: `python -m fipgeo merge ...`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fipgeo.merging import merge_checkpoints


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is said in one line, and 1 is returned."""
    parser = argparse.ArgumentParser(prog="python -m fipgeo", description="Geometry of trained networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_merge(commands)
    args = parser.parse_args(arguments)
    try:
        args.run(args)
    except (OSError, ValueError) as error:
        print(f"{parser.prog} {args.command}: {error}", file=sys.stderr)
        return 1
    return 0


def add_merge(commands: argparse._SubParsersAction) -> None:
    """`merge base.safetensors a.safetensors:0.4 b.safetensors:-0.2 -o out.safetensors`."""
    parser = commands.add_parser(
        "merge", help="base + sum of weights times (tuned - base), tensor by tensor", description=merge.__doc__
    )
    parser.add_argument("base", help="checkpoint: a .safetensors file, its index, or a folder of shards")
    parser.add_argument("tuned", nargs="+", type=weighted, help="tuned checkpoint and its weight, path:weight")
    parser.add_argument("-o", "--out", required=True, help="the file to write")
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    parser.set_defaults(run=merge)


def merge(args: argparse.Namespace) -> None:
    """Write base + sum_i w_i (tuned_i - base) in the memory of a few tensors."""
    weights: dict[str, float] = {}
    for path, weight in args.tuned:
        weights[path] = weights.get(path, 0.0) + weight
    merge_checkpoints(args.base, weights, args.out, overwrite=args.overwrite)


def weighted(text: str) -> tuple[str, float]:
    """A path and its weight, from `path:weight`."""
    path, colon, weight = text.rpartition(":")
    try:
        return path, float(weight) if colon and path else float("x")
    except ValueError as error:
        expected = "expected a path and a weight such as a.safetensors:0.4"
        raise argparse.ArgumentTypeError(f"got {text!r}, {expected}") from error


if __name__ == "__main__":
    sys.exit(main())
