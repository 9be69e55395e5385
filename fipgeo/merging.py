"""Checkpoints merged tensor by tensor: base + sum_i w_i (tuned_i - base), in the memory of a few tensors.

Files are safetensors, whole or in shards with an index. Nothing is built: no network, no state dict.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from fipgeo.io import TensorFile

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Dtypes as safetensors writes them."""
_PLAN = "plan.json"


class Checkpoint(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, read when they are asked for: of one file, an index, or a folder of shards.

    Args:
        path: A `.safetensors` file, a `.safetensors.index.json`, or a folder that holds either.

    Raises:
        FileNotFoundError: There is no such file, or the folder holds none.
        ValueError: A shard lacks a tensor that the index promises, or a file cannot be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path, where = Path(path), _located(Path(path))
        self.files: dict[str, TensorFile] = {}
        if where.suffix != ".json":
            file = TensorFile(where)
            self.files = dict.fromkeys(file, file)
            return
        listed: dict[str, str] = json.loads(where.read_text())["weight_map"]
        shards = {shard: TensorFile(where.parent / shard) for shard in dict.fromkeys(listed.values())}
        missing = [name for name, shard in listed.items() if name not in shards[shard]]
        if missing:
            raise ValueError(f"{where}: the shards lack {', '.join(missing[:6])}, which the index promises")
        self.files = {name: shards[shard] for name, shard in listed.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shards(self) -> dict[str, list[str]]:
        """Names of the tensors in each file, by the name of the file."""
        out: dict[str, list[str]] = {}
        for name, file in self.files.items():
            out.setdefault(file.path.name, []).append(name)
        return out

    def stamps(self) -> list[tuple[str, int, int]]:
        """Place, size and time of change of each file."""
        paths = dict.fromkeys(file.path for file in self.files.values())
        return [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in paths]

    def shape(self, name: str) -> torch.Size:
        """The shape of a tensor, from the header alone."""
        return self.files[name].shapes[name]

    def floating(self, name: str) -> bool:
        """Whether a tensor holds real numbers, from the header alone."""
        return self.files[name].floating[name]


def merge_checkpoints(
    base: str | os.PathLike[str],
    tuned: Mapping[str, float] | Mapping[Path, float],
    out: str | os.PathLike[str],
    *,
    overwrite: bool = False,
) -> Path:
    """Write base + sum_i w_i (tuned_i - base) to one safetensors file, or to a folder in the base's own shards.

    Tensors are merged one at a time in float32, or float64 where one of them is, and rounded once to the base's dtype.
    Those that hold no real numbers are the base's. The file or folder appears under its name when it is complete.
    Shards that an interrupted merge has written are kept in a hidden folder beside it, `.NAME.part`, and the same call
    goes on after them if weights and files are as they were.

    Args:
        base: Checkpoint that the others were tuned from: a file, an index, or a folder with one of them.
        tuned: Weight of each tuned checkpoint; negative to take back what it learned.
        out: Path of the result: a file that ends in .safetensors, or a folder for the shards and their index.
        overwrite: Replace a file that is there, or a folder that holds nothing but a checkpoint.

    Returns:
        The path of the result.

    Raises:
        FileExistsError: There is such a file or folder and `overwrite` is False, or the folder holds other files too.
        FileNotFoundError: A checkpoint is missing.
        ValueError: Names, shapes or kinds differ (all mismatches of all checkpoints are listed), or a checkpoint cannot
            be read, or `out` ends otherwise.

    Source: Ilharco et al., Editing Models with Task Arithmetic, ICLR 2023.

    Examples:
        >>> from fipgeo.io import save_record
        >>> folder = tempfile.TemporaryDirectory()
        >>> for name, value in (("base", 1.0), ("a", 3.0)):
        ...     save_record(f"{folder.name}/{name}.safetensors", {"w": torch.full((2,), value)}, {})
        >>> path = merge_checkpoints(
        ...     f"{folder.name}/base.safetensors", {f"{folder.name}/a.safetensors": 0.5}, f"{folder.name}/c.safetensors"
        ... )
        >>> Checkpoint(path)["w"]
        tensor([2., 2.])
        >>> folder.cleanup()
    """
    target = Path(out)
    whole = target.suffix == ".safetensors"
    if target.suffix and not whole:
        raise ValueError(f"out: got {str(target)!r}, expected a path that ends in .safetensors, or a folder")
    _refuse_existing(target, overwrite)
    start, others = Checkpoint(base), {Path(path): (Checkpoint(path), float(w)) for path, w in tuned.items()}
    problems = [f"{path}: {text}" for path, (other, _) in others.items() for text in _mismatches(start, other)]
    if problems:
        raise ValueError("tuned: the checkpoints do not fit the base: " + "; ".join(problems))
    if whole:
        with _replacing(target) as file:
            _write(file, list(start), start, list(others.values()))
            _refuse_existing(target, overwrite)
        return target
    work = _workplace(target, start, others)
    for shard, names in start.shards().items():
        if not (work / shard).exists():
            with _replacing(work / shard) as file:
                _write(file, names, start, list(others.values()))
    _finish(work, target, start, overwrite)
    return target


def _refuse_existing(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise FileExistsError(f"out: {str(target)!r} is there already; pass overwrite=True to replace it")
    other = [file.name for file in target.iterdir() if not _ours(file)] if target.is_dir() else []
    if other:
        raise FileExistsError(
            f"out: the folder {str(target)!r} holds {other[0]!r}, which is no part of a checkpoint; choose another one"
        )


def _ours(file: Path) -> bool:
    return file.name.endswith((".safetensors", ".safetensors.index.json"))


@contextmanager
def _replacing(target: Path) -> Iterator[BinaryIO]:
    """A file to be written, which appears under its name when the block ends well."""
    handle, fresh = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(fresh, 0o666 & ~_mask())
        os.replace(fresh, target)
    except BaseException:
        os.unlink(fresh)
        raise


def _workplace(target: Path, base: Checkpoint, others: Mapping[Path, tuple[Checkpoint, float]]) -> Path:
    """The folder in which shards are gathered: that of an interrupted merge of the same files, or a new one."""
    work = target.with_name(f".{target.name}.part")
    parts = {"base": (base, 1.0)} | {str(path.resolve()): part for path, part in others.items()}
    plan = json.dumps({name: [weight, checkpoint.stamps()] for name, (checkpoint, weight) in parts.items()})
    if not (work / _PLAN).exists() or (work / _PLAN).read_text() != plan:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        (work / _PLAN).write_text(plan)
    for left in work.glob(".*.part"):  # by a merge that was killed
        left.unlink()
    return work


def _finish(work: Path, target: Path, base: Checkpoint, overwrite: bool) -> None:
    """Write the index and give the folder its name."""
    shards = base.shards()
    total = sum((work / shard).stat().st_size for shard in shards)
    listed = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": listed}
    (work / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    _refuse_existing(target, overwrite)
    (work / _PLAN).unlink()
    if target.exists():
        old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
        os.replace(target, old)
        os.replace(work, target)
        shutil.rmtree(old)
    else:
        os.replace(work, target)


def _located(path: Path) -> Path:
    """The file or index that a path stands for."""
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.safetensors"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{str(path)!r} holds {len(found)} safetensors files and no index; name the file, or write its index"
        )
    return found[0]


def _mismatches(base: Checkpoint, other: Checkpoint) -> list[str]:
    out = [f"lacks {name}" for name in base if name not in other]
    out += [f"has {name}, which the base lacks" for name in other if name not in base]
    for name in base:
        if name in other and base.shape(name) != other.shape(name):
            out.append(f"{name} has shape {list(other.shape(name))}, in the base {list(base.shape(name))}")
        elif name in other and base.floating(name) != other.floating(name):
            out.append(f"{name} holds integers in one of the two and real numbers in the other")
    return out


def _write(file: BinaryIO, names: list[str], base: Checkpoint, others: list[tuple[Checkpoint, float]]) -> None:
    """The header, whose sizes are known from the base, and then the named tensors in order."""
    header, end = {}, 0
    for name in names:
        dtype = base[name].dtype
        if dtype not in _NAMES:
            raise ValueError(f"base: {name} is stored as {dtype}, which cannot be written; convert it first")
        size = base.shape(name).numel() * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(base.shape(name)), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header | {"__metadata__": {"format": "pt"}}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
    for name in names:
        merged = _merged(name, base, others) if base.floating(name) else base[name]
        file.write(merged.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _merged(name: str, base: Checkpoint, others: list[tuple[Checkpoint, float]]) -> Tensor:
    start = base[name]
    total, rest = None, 1.0 - sum(weight for _, weight in others)
    for other, weight in others:
        tensor = other[name]
        wide = torch.float64 if torch.float64 in (start.dtype, tensor.dtype) else torch.float32
        if total is None:
            total = start.to(wide) * rest if rest else torch.zeros_like(start, dtype=wide)
        total = total.to(torch.promote_types(total.dtype, wide)).add_(tensor.to(wide), alpha=weight)
    return start if total is None else total.to(start.dtype)


def _mask() -> int:
    """The permissions that new files are denied; asking means setting it for a moment."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
