"""What training a tangent model on one shard of data gave: tau by parameter names, bound to the weights it is about."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.io import load_record, save_record
from fipgeo.model import unwrapped
from fipgeo.tangent.model import TangentModel

KIND = "component"


def digest(tensors: Mapping[str, Tensor]) -> str:
    """A name for the values of named tensors: a hash of names, shapes and values, floats as float64.

    Casts to a wider type keep it, as they keep the values; so does another order of the names.

    Examples:
        >>> one, two = (torch.ones(2, dtype=dtype) for dtype in (torch.float32, torch.float64))
        >>> digest({"w": one}) == digest({"w": two}), digest({"w": one}) == digest({"v": one})
        (True, False)
    """
    code = hashlib.sha256()
    for name in sorted(tensors):
        t = tensors[name].detach().cpu()
        plain = t.double() if t.is_floating_point() else t
        code.update(f"{name}{list(t.shape)}".encode())
        code.update(plain.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return code.hexdigest()[:16]


def fingerprint(module: nn.Module) -> str:
    """A name for theta_0: the `digest` of a module's parameters and buffers, those of the base of a `TangentModel`."""
    return digest(base_of(module).state_dict())


def base_of(module: nn.Module) -> nn.Module:
    """The module that a tangent model expands; the module itself without wrappers if it is none."""
    module = unwrapped(module)
    return module.base if isinstance(module, TangentModel) else module


@dataclass(frozen=True, eq=False)
class Component:
    """tau of one shard, by parameter names.

    Attributes:
        name: Of the shard; components of one model have different names, and are added in their order.
        tangents: Tensors by parameter name.
        base: Fingerprint of the weights theta_0 that tau belongs to.
        notes: Plain values that travel along, such as the number of examples.

    Examples:
        >>> model = TangentModel(nn.Linear(3, 2))
        >>> part = Component.of(model, "january", notes={"examples": 100})
        >>> part
        Component('january': 8 weights in 2 tensors)
    """

    name: str
    tangents: Mapping[str, Tensor]
    base: str
    notes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: TangentModel, name: str, *, notes: Mapping[str, Any] | None = None) -> Component:
        """A copy of what a tangent model has learned."""
        tangents = {n: t.detach().clone() for n, t in model.tangents().items()}
        return cls(name, tangents, fingerprint(model), dict(notes or {}))

    def check(self, base: nn.Module | str) -> None:
        """Refuse another base than the component's own.

        Args:
            base: A module, a tangent model or a fingerprint.

        Raises:
            ValueError: The base has other weights or buffers than theta_0.
        """
        found = base if isinstance(base, str) else fingerprint(base)
        if found != self.base:
            raise ValueError(
                f"base: component {self.name!r} belongs to weights with the fingerprint {self.base}, the base given"
                f" has {found}; a tangent means nothing elsewhere, so load the weights (and the buffers, such as"
                " BatchNorm statistics) that it was trained about"
            )

    def digest(self) -> str:
        """A name for the values of tau, whatever the component is called."""
        return digest(self.tangents)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the component to one safetensors file (see `fipgeo.io.save_record`)."""
        meta = {"kind": KIND, "name": self.name, "base": self.base, "notes": dict(self.notes)}
        save_record(path, self.tangents, meta, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], base: nn.Module | None = None) -> Component:
        """Read a component, and check it against a base if one is given.

        Raises:
            ValueError: The file holds no component, or it belongs to another base.
        """
        tangents, meta = load_record(path)
        if meta.get("kind") != KIND:
            raise ValueError(f"{str(path)!r} holds no component; pass a file that Component.save wrote")
        out = cls(meta["name"], tangents, meta["base"], meta["notes"])
        if base is not None:
            out.check(base)
        return out

    def __repr__(self) -> str:
        size = sum(t.numel() for t in self.tangents.values())
        return f"Component({self.name!r}: {size:,} weights in {len(self.tangents)} tensors)"
