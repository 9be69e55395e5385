"""Records on disk: named tensors and plain values in one safetensors file, written atomically.

A record is a mapping of tensors plus a dictionary of plain values (json types). The tensors are the file's
tensors; the dictionary is a json string in the file's header under the key ``fipgeo``, beside the number of
the schema that wrote it. Nothing in such a file can be executed when it is read.
"""

import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

__all__ = ["TensorFile", "load_record", "read_meta", "remove_leftovers", "save_record"]

_KEY = "fipgeo"
_SCHEMA = 1
_SUFFIX = ".safetensors"
_MAX_META_BYTES = 16 * 2**20
_DTYPES = frozenset(
    {
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    }
)


def save_record(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write tensors and plain values to one file, all of it or nothing.

    The file is written beside its destination under a temporary name, flushed to the disk and then renamed,
    so a crash leaves either the old file or the new one. Values, shapes and dtypes come back bit for bit;
    device, strides, ``requires_grad`` and sharing of memory between tensors do not.

    Args:
        path: Destination, ending in ``.safetensors``, in a folder that exists.
        tensors: Dense tensors of any shape by name, on any device, float64 to bfloat16, integer or bool.
        meta: Plain values: dictionaries with string keys, lists, strings, finite numbers, booleans, None.
        overwrite: Replace a file that is there already.

    Raises:
        FileExistsError: If ``path`` is there and ``overwrite`` is false.
        FileNotFoundError: If the folder of ``path`` is not there.
        TypeError: If a name is not a string, a value is not a dense tensor of a storable dtype, or ``meta``
            holds something json would not give back as it was.
        ValueError: If ``path`` has another suffix, or ``meta`` holds NaN, an infinity or too much text.

    Examples:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_record(f"{folder.name}/step.safetensors", {"theta": torch.arange(3)}, {"step": 7})
        >>> tensors, meta = load_record(f"{folder.name}/step.safetensors")
        >>> tensors["theta"].tolist(), meta
        ([0, 1, 2], {'step': 7})
        >>> folder.cleanup()
    """
    target = Path(path)
    if target.suffix != _SUFFIX:
        raise ValueError(f"path is {str(path)!r}; a record ends in {_SUFFIX!r}; rename it")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"the folder {str(target.parent)!r} of path is not there; create it first")
    header = {_KEY: _encode(meta)}
    stored = _storable(tensors)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{str(target)!r} is there already; pass overwrite=True to replace it")
    with _replacing(target) as temporary:
        save_file(stored, temporary, metadata=header)


def load_record(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file that `save_record` wrote.

    Args:
        path: The file.

    Returns:
        The tensors by name, on the CPU and independent of the file, and the dictionary of plain values.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is not a safetensors file, is cut short, was not written by `save_record`, or was
            written under a newer schema.
    """
    source = Path(path)
    with _reading(source) as file:
        meta = _decode((file.metadata() or {}).get(_KEY), source)
        # the clone frees the tensor from the mapped file, which may be replaced or cut while it is in use
        return {name: file.get_tensor(name).clone() for name in file.keys()}, meta


def read_meta(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary of plain values of a file that `save_record` wrote; no tensor is read.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: As in `load_record`.
    """
    source = Path(path)
    with _reading(source) as file:
        return _decode((file.metadata() or {}).get(_KEY), source)


class TensorFile(Mapping[str, Tensor]):
    """The tensors of any safetensors file by name, each read when it is asked for and not kept.

    Args:
        path: The file, written by whatever program.

    Attributes:
        shapes: Shape of every tensor, from the header alone.
        floating: Whether each tensor holds real numbers, from the header alone.

    Raises:
        FileNotFoundError: If the file is not there.
        ValueError: If it is not a safetensors file or is cut short.

    Examples:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> save_record(f"{folder.name}/step.safetensors", {"theta": torch.arange(3)}, {})
        >>> file = TensorFile(f"{folder.name}/step.safetensors")
        >>> list(file), file.shapes["theta"], file.floating["theta"], file["theta"]
        (['theta'], torch.Size([3]), False, tensor([0, 1, 2]))
        >>> folder.cleanup()
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.shapes: dict[str, torch.Size] = {}
        self.floating: dict[str, bool] = {}
        with _reading(self.path) as file:
            for name in file.keys():
                part = file.get_slice(name)
                self.shapes[name] = torch.Size(part.get_shape())
                self.floating[name] = part.get_dtype().startswith(("F", "BF"))

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.shapes:
            raise KeyError(name)
        with _reading(self.path) as file:
            return file.get_tensor(name).clone()

    def read_into(self, name: str, out: Tensor) -> None:
        """Copy a tensor from the file into another of its shape, in that one's dtype, without a copy in between."""
        with _reading(self.path) as file:
            out.copy_(file.get_tensor(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@contextmanager
def _reading(source: Path) -> Iterator[Any]:
    """An open safetensors file on the CPU; what cannot be read is named by its path."""
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {str(source)!r}")
    try:
        with safe_open(source, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        message = f"{str(source)!r} is not a readable safetensors file ({error}); write or copy it again"
        raise ValueError(message) from error


def remove_leftovers(path: str | os.PathLike[str]) -> int:
    """Remove the temporary files that writers of ``path`` left beside it because they were killed.

    Call it where nobody else writes to the same path; their files would look the same.

    Args:
        path: The destination that `save_record` was given.

    Returns:
        How many files were removed.
    """
    target = Path(path)
    found = [file for file in target.parent.glob(".*.tmp") if _temporary_of(file, target)]
    for file in found:
        file.unlink(missing_ok=True)
    return len(found)


def _temporary_of(file: Path, target: Path) -> bool:
    """Whether a file is a temporary one that `_replacing` makes for the target."""
    name, _, code = file.name.removesuffix(".tmp").rpartition(".")
    return name == f".{target.name}" and len(code) == 12 and set(code) <= set("0123456789abcdef")


def _encode(meta: Mapping[str, Any]) -> str:
    """The header string: schema and plain values as json."""
    if not isinstance(meta, Mapping):
        raise TypeError(f"meta is a {type(meta).__name__}; expected a dictionary with string keys")
    plain = _plain(meta, "meta")
    text = json.dumps({"schema": _SCHEMA, "meta": plain}, allow_nan=False, separators=(",", ":"))
    size = len(text.encode())
    if size > _MAX_META_BYTES:
        raise ValueError(
            f"meta takes {size} bytes as json, at most {_MAX_META_BYTES} fit; move long lists of numbers into tensors"
        )
    return text


def _decode(text: str | None, source: Path) -> dict[str, Any]:
    """The plain values of a header string, once it is known to be ours."""
    if text is None:
        raise ValueError(f"{str(source)!r} has no {_KEY!r} header entry; it was not written by save_record")
    try:
        content = json.loads(text, parse_constant=_no_such_number)
        schema, meta = content["schema"], content["meta"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"the {_KEY!r} header entry of {str(source)!r} is damaged: {error!r}") from error
    if not isinstance(schema, int) or not 1 <= schema <= _SCHEMA:
        raise ValueError(
            f"{str(source)!r} was written under schema {schema!r}, this version reads up to {_SCHEMA}; update fipgeo"
        )
    if not isinstance(meta, dict):
        raise ValueError(f"the {_KEY!r} header entry of {str(source)!r} holds a {type(meta).__name__}")
    return meta


def _no_such_number(text: str) -> float:
    """Refuse the NaN and infinities that Python's parser would let through."""
    raise ValueError(f"{text} is not json")


def _plain(value: Any, where: str) -> Any:
    """A copy of ``value`` in json types only; what json would change or refuse is named by its place."""
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        if not math.isfinite(value):
            raise ValueError(f"{where} is {value}; json has no such number, use None or a tensor")
        return value
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise TypeError(f"{where} has the key {key!r} of type {type(key).__name__}; use str({key!r})")
        return {key: _plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    if type(value) is list:
        return [_plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    kind = type(value).__name__
    remedies = {"tuple": "list(...)", "Tensor": "the tensors argument, or .tolist()"}
    remedy = remedies.get(kind, "int(...), float(...) or str(...)")
    raise TypeError(f"{where} is a {kind}, which json does not give back; use {remedy}")


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detached contiguous CPU tensors, no two of which share memory."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"tensors has the key {name!r} of type {type(name).__name__}; use str({name!r})")
        if not isinstance(tensor, Tensor):
            raise TypeError(f"tensors[{name!r}] is a {type(tensor).__name__}; wrap it: torch.as_tensor(...)")
        if tensor.layout is not torch.strided or tensor.is_meta:
            kind = "meta" if tensor.is_meta else str(tensor.layout)
            raise TypeError(f"tensors[{name!r}] is a {kind} tensor; store dense values: .to_dense()")
        if tensor.dtype not in _DTYPES:
            raise TypeError(
                f"tensors[{name!r}] has dtype {tensor.dtype}, which is not stored; "
                "convert it, for example with .to(torch.float64) or torch.view_as_real"
            )
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage().data_ptr()
        stored[name] = plain.clone() if memory in seen else plain
        seen.add(memory)
    return stored


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder that takes the target's place when the block ends well."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # as any new file's; the writer below may make a private one
        yield temporary
        temporary.chmod(mode)
        _flush(temporary)
        os.replace(temporary, target)
        if os.name == "posix":  # the rename itself is durable once the folder is on the disk
            _flush(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
