"""Tensors of a path as bytes: what is zero or as it was before takes a bit an entry, and all comes back bit for bit.

Every tensor is written in the cheapest of five ways, beside a reference that the reader has already (the point before
it, say):

    =  as the reference: nothing is written
    z  a bit an entry that says where it is not zero, and those values
    c  a bit an entry that says where it differs from the reference, and those values
    b  a bit an entry: booleans
    w  whole

Equality is that of bits, so 0 and -0 differ and NaN equals itself. The bits of all tensors of a group are one tensor of
the file, the values of each dtype another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SAME, _ZERO, _CHANGED, _BOOL, _WHOLE = "=zcbw"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(eq=False)
class Packer:
    """Collects groups of tensors for one file.

    Attributes:
        tensors: What goes into the file, by name.
        tables: Names, dtypes and shapes, shared by all groups that have the same.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    tables: list[list[list[Any]]] = field(default_factory=list)

    def add(self, head: str, group: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> dict[str, Any]:
        """Pack a group under the names that start with `head`; what comes back leads `unpacked` to it."""
        table = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in group.items()]
        if table not in self.tables:
            self.tables.append(table)
        modes, masks, values = "", [np.zeros(0, np.uint8)], dict[str, list[Tensor]]()
        for (name, dtype, _), tensor in zip(table, group.values(), strict=True):
            mode, mask, rest = _pack(tensor, reference.get(name))
            modes += mode
            masks += [] if mask is None else [np.packbits(mask.numpy())]
            if rest is not None:
                values.setdefault(dtype, []).append(rest)
        bits = np.concatenate(masks)
        if len(bits):
            self.tensors[f"{head}.bits"] = torch.from_numpy(bits)
        self.tensors |= {f"{head}.{dtype}": torch.cat(parts).view(_dtype(dtype)) for dtype, parts in values.items()}
        return {"table": self.tables.index(table), "modes": modes}


def unpacked(
    head: str,
    entry: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    tables: list[list[list[Any]]],
    reference: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """The group that `Packer.add` wrote under `head`, given the same reference."""
    table, out = tables[entry["table"]], {}
    bits = tensors[f"{head}.bits"].numpy() if f"{head}.bits" in tensors else np.zeros(0, np.uint8)
    at, taken = 0, dict[str, int]()
    for (name, dtype, shape), mode in zip(table, entry["modes"], strict=True):
        if mode == _SAME:
            out[name] = reference[name].clone()
            continue
        size, mask = int(np.prod(shape, dtype=np.int64)), None
        if mode != _WHOLE:
            width = (size + 7) // 8
            mask = torch.from_numpy(np.unpackbits(bits[at : at + width], count=size)).bool()
            at += width
        if mode == _BOOL:
            assert mask is not None
            out[name] = mask.reshape(shape)
            continue
        count = size if mask is None else int(mask.sum())
        start = taken.get(dtype, 0)
        taken[dtype] = start + count
        rest = tensors[f"{head}.{dtype}"][start : start + count] if count else torch.zeros(0, dtype=_dtype(dtype))
        if mask is None:
            out[name] = rest.clone().reshape(shape)
            continue
        raw = torch.zeros(size, dtype=_INTEGERS[rest.element_size()])
        if mode == _CHANGED:
            raw = _bits(reference[name]).clone()
        raw[mask] = _bits(rest)
        out[name] = raw.view(rest.dtype).reshape(shape)
    return out


def _bits(tensor: Tensor) -> Tensor:
    """The entries in a row as integers of their size: indexing half-precision numbers may turn one NaN into another."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(_INTEGERS[flat.element_size()])


def _pack(tensor: Tensor, reference: Tensor | None) -> tuple[str, Tensor | None, Tensor | None]:
    """The way to write a tensor, the bits and the values of it, these as integers."""
    raw = _bits(tensor)
    like = reference is not None and reference.dtype == tensor.dtype and reference.shape == tensor.shape
    changed = None
    if reference is not None and like:
        changed = raw != _bits(reference)
        if not bool(changed.any()):
            return _SAME, None, None
    if tensor.dtype == torch.bool:
        return _BOOL, raw.bool(), None
    nonzero = raw != 0
    prices = {_WHOLE: raw.nbytes, _ZERO: len(raw) / 8 + int(nonzero.sum()) * raw.element_size()}
    if changed is not None:
        prices[_CHANGED] = len(raw) / 8 + int(changed.sum()) * raw.element_size()
    mode = min(prices, key=lambda key: prices[key])
    mask = {_WHOLE: None, _ZERO: nonzero, _CHANGED: changed}[mode]
    return mode, mask, raw if mask is None else raw[mask]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)
