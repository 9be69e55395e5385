"""Commands: `python -m fipgeo merge`, `spectrum` and `path`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fipgeo.io import read_meta
from fipgeo.linalg import Spectrum
from fipgeo.merging import merge_checkpoints
from fipgeo.paths import PathResult


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is said in one line, and 1 is returned."""
    parser = argparse.ArgumentParser(prog="python -m fipgeo", description="Geometry of trained networks.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    add_merge(commands)
    add_figure(commands, "spectrum", draw_spectra, "the eigenvalues of saved spectra, one figure for all")
    add_figure(commands, "path", draw_paths, "what saved paths spent and won; a folder stands for the paths in it")
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
    parser.add_argument("-o", "--out", required=True, help="the .safetensors file to write, or a folder for shards")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.set_defaults(run=merge)


def merge(args: argparse.Namespace) -> None:
    """Write base + sum_i w_i (tuned_i - base) in the memory of a few tensors; the same call goes on after a stop."""
    weights: dict[str, float] = {}
    for path, weight in args.tuned:
        weights[path] = weights.get(path, 0.0) + weight
    merge_checkpoints(args.base, weights, args.out, overwrite=args.overwrite)


def add_figure(commands: argparse._SubParsersAction, name: str, draw: Any, said: str) -> None:
    """`spectrum a.safetensors b.safetensors -o out.png`, `path runs/ -o out.png`."""
    parser = commands.add_parser(name, help=f"draw {said}", description=draw.__doc__)
    parser.add_argument(
        "files", nargs="+", type=Path, help="what `.save(file)` wrote; several are drawn over each other"
    )
    parser.add_argument("-o", "--out", required=True, type=Path, help="the figure to write, .png, .svg or .pdf")
    parser.add_argument("--overwrite", action="store_true", help="replace the figure if it is there")
    parser.set_defaults(run=lambda args: write_figure(draw(args.files), args.out, args.overwrite))


def draw_spectra(files: Sequence[Path]) -> Any:
    """Draw the spectra that files hold; several are named by their files."""
    from matplotlib.figure import Figure

    ax = Figure(layout="constrained").subplots()
    for file, label in zip(files, labels(files), strict=True):
        Spectrum.load(file).plot(ax=ax, label=label)
    return ax.figure


def draw_paths(files: Sequence[Path]) -> Any:
    """Draw the paths that files, or folders of them, hold; several are named by their files."""
    from matplotlib import pyplot

    files = [found for file in files for found in (paths_in(file) if file.is_dir() else [file])]
    if not files:
        raise ValueError("the folder holds no saved path; PathResult.save writes them")
    axes = None
    for file, label in zip(files, labels(files), strict=True):
        axes = PathResult.load(file).plot(axes, label=label)
    assert axes is not None
    figure = next(iter(axes.values())).figure
    pyplot.close(figure)
    return figure


def paths_in(folder: Path) -> list[Path]:
    """The files of a folder that hold paths; networks or spectra may lie beside them."""
    return [file for file in sorted(folder.glob("*.safetensors")) if read_meta(file).get("kind") == "path"]


def labels(files: Sequence[Path]) -> list[str | None]:
    """No name for one file; for several their own, with the folder where that alone tells them apart."""
    if len(files) == 1:
        return [None]
    unlike = len({file.stem for file in files}) == len(files)
    return [file.stem if unlike else str(file.with_suffix("")) for file in files]


def write_figure(figure: Any, out: Path, overwrite: bool) -> None:
    """Write the figure, in the format that the suffix says."""
    if out.exists() and not overwrite:
        raise FileExistsError(f"{str(out)!r} is there already; pass --overwrite to replace it")
    figure.savefig(out, dpi=150)


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
