"""The points and the state of a path as tensors and plain values of one file, each point written beside the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from fipgeo.paths.certificate import Certificate
from fipgeo.paths.packing import Packer, unpacked
from fipgeo.paths.point import PathPoint

_CERTIFICATE = tuple(f.name for f in fields(Certificate))
_NUMBERS = tuple(f.name for f in fields(PathPoint) if f.name not in ("certificate", "layers", "tensors"))
_WHOLE = ("step", "num_held_out", "worst_class")
_NONE = -1


def write_path(points: Sequence[PathPoint], state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and plain values that `read_path` turns into these points and this state again, bit for bit.

    The first stored point is whole, every other one holds what differs from the one before it (see `Packer`). The
    numbers of all points are one float64 matrix, which holds integers below 2^53 and NaN as they are.
    """
    packer, entries, last = Packer(), [], {}
    for index, point in enumerate(points):
        if point.tensors is not None:
            entries.append({"point": index} | packer.add(f"point.{index}", point.tensors, last))
            last = point.tensors
    named = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    sizes = {key: named[key].numel() for key in ("theta", "start") if key in named}
    entry = packer.add("state", named, _references(points, sizes))
    layers = list(dict.fromkeys(name for point in points for name in point.layers))
    counts = [[point.layers.get(name, (_NONE, _NONE)) for name in layers] for point in points]
    tensors = packer.tensors | {"numbers": torch.tensor([_row(point) for point in points], dtype=torch.float64)}
    if layers:
        tensors["layers"] = torch.tensor(counts, dtype=torch.int64)
    meta = {
        "columns": [*_NUMBERS, *_CERTIFICATE],
        "layers": layers,
        "tables": packer.tables,
        "stored": entries,
        "state": {key: value for key, value in state.items() if not isinstance(value, Tensor)},
        "state_tensors": entry | {"sizes": sizes},
    }
    return tensors, meta


def read_path(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> tuple[tuple[PathPoint, ...], dict[str, Any]]:
    """The points and the state that `write_path` wrote."""
    groups, last = dict[int, dict[str, Tensor]](), {}
    for entry in meta["stored"]:
        last = unpacked(f"point.{entry['point']}", entry, tensors, meta["tables"], last)
        groups[entry["point"]] = last
    points = []
    for index, row in enumerate(tensors["numbers"].tolist()):
        numbers = dict(zip(meta["columns"], row, strict=True))
        numbers |= {key: int(numbers[key]) for key in _WHOLE if numbers[key] == numbers[key]}
        proof = {key: numbers.pop(key) for key in _CERTIFICATE}
        certificate = None if proof["confidence"] != proof["confidence"] else Certificate(**proof)
        counts = tensors["layers"][index].tolist() if meta["layers"] else []
        layers = {n: (z, size) for n, (z, size) in zip(meta["layers"], counts, strict=True) if size != _NONE}
        point = PathPoint(**numbers, certificate=certificate, layers=layers, tensors=groups.get(index))
        points.append(point)
    entry = meta["state_tensors"]
    found = unpacked("state", entry, tensors, meta["tables"], _references(points, entry["sizes"]))
    return tuple(points), dict(meta["state"]) | found


def _row(point: PathPoint) -> list[float]:
    numbers = point.to_dict()
    return [float(numbers.get(key, float("nan"))) for key in (*_NUMBERS, *_CERTIFICATE)]


def _references(points: Sequence[PathPoint], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    """What the tensors of a state most likely equal: those of the first and of the last stored point."""
    out = {}
    stored = [point.tensors for point in points if point.tensors is not None]
    for key, head, index in (("start", "start_buffers", 0), ("theta", "buffers", -1)):
        if stored and key in sizes:
            tensors = stored[index]
            out[key] = _leading(tensors, sizes[key])
            out |= {f"{head}.{name}": tensor for name, tensor in tensors.items()}
    return out


def _leading(tensors: Mapping[str, Tensor], size: int) -> Tensor:
    """The first tensors one after the other, as far as they fill a vector of this size: weights come before buffers."""
    parts, left = [], size
    for tensor in tensors.values():
        if tensor.numel() > left:
            break
        parts.append(tensor.detach().cpu().reshape(-1))
        left -= tensor.numel()
    return torch.cat(parts) if parts else torch.zeros(0)
