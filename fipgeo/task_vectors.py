"""Task vectors: differences of two networks' weights, and their arithmetic.

A task vector is tau = theta_tuned - theta_base on named tensors (Ilharco et al., Editing Models with Task Arithmetic,
ICLR 2023). Axis letters: D weights.
"""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, overload

import torch
from torch import Tensor, nn

from fipgeo.io import load_record, save_record
from fipgeo.sources import Named, Source
from fipgeo.space import WeightSpace, Where, select

Buffers = Literal["keep", "move"]

_KIND = "task vector"


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A difference of weights by name; tied tensors once, under their first name in the base.

    Vectors over the same tensors add, subtract, and are scaled; half-precision storage is summed in float32 and rounded
    once. Norms and dot products are over the parameters, buffers are left out.

    Attributes:
        tensors: The differences.
        buffers: Those of the names that are buffers (only under the policy "move").
        skipped: Tensors that are in the networks and not here, each with the reason.

    Examples:
        >>> base, tuned = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> tau = TaskVector.between(base, tuned)
        >>> (tau - tau).norm(), round((2 * tau).cosine(tau), 6), list(tau.tensors)
        (0.0, 1.0, ['weight', 'bias'])
        >>> torch.allclose(tau.apply_to(base).weight, tuned.weight)
        True
    """

    tensors: Mapping[str, Tensor]
    buffers: frozenset[str] = frozenset()
    skipped: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        base: Source,
        tuned: Source,
        params: Where = None,
        *,
        buffers: Buffers = "keep",
        dtype: torch.dtype | None = None,
    ) -> TaskVector:
        """The vector from one network to another: tuned - base.

        Args:
            base: Module, state dict or path of a safetensors file (read tensor by tensor).
            tuned: The same, of equal names and shapes; which tensors are tied is the base's to say.
            params: Which parameters are part: glob, globs, predicate, or None for all.
            buffers: "keep" leaves buffers such as the running statistics of BatchNorm as they are in the base; "move"
                makes the floating ones part of the vector. Integer tensors are never part. Of a state dict or file,
                names that end in running_mean, running_var or num_batches_tracked count as buffers, unless the other
                network is a module, which knows.
            dtype: Of what is stored; None for float32, or float64 where one of the two is. Differences are taken in
                that width and rounded once.

        Returns:
            The vector, on the base's devices.

        Raises:
            ValueError: Names, shapes or kinds of tensors differ (every mismatch is listed), a tied tensor of the base
                has two values in tuned, or `buffers` or `dtype` is unknown.
        """
        if buffers not in ("keep", "move"):
            raise ValueError(f"buffers: got {buffers!r}, expected 'keep' or 'move'")
        if dtype is not None and not dtype.is_floating_point:
            raise ValueError(f"dtype: got {dtype}, expected a floating dtype such as torch.bfloat16")
        one, two = Named.of(base, argument="base"), Named.of(tuned, argument="tuned")
        pairs, moved, skipped, problems = _pairs(one, two, params, buffers)
        _refuse(problems, "between: base and tuned do not fit")
        tensors: dict[str, Tensor] = {}
        for name, (mine, others) in pairs.items():
            start, *ends = one.values[mine], *(two.values[other] for other in others)
            if any(not torch.equal(ends[0], end) for end in ends[1:]):
                problems.append(f"{name} is tied in base and has {len(ends)} values in tuned ({', '.join(others)})")
            wide = _wide(start.dtype, ends[0].dtype)
            tensors[name] = (ends[0].to(start.device, wide) - start.to(wide)).to(dtype or wide)
        _refuse(problems, "between: base and tuned do not fit")
        return cls(tensors, moved, skipped)

    @classmethod
    def from_flat(cls, space: WeightSpace, vector: Tensor) -> TaskVector:
        """A flat displacement `[D]` of a weight space as a task vector; the tensors are copies.

        Raises:
            ValueError: The vector is not `[D]`.
        """
        if vector.shape != (space.dim,):
            raise ValueError(f"vector: got shape {list(vector.shape)}, expected [{space.dim}]")
        return cls({name: t.detach().clone() for name, t in space.unravel(vector).items()})

    def ravel(self, space: WeightSpace) -> Tensor:
        """The vector as a flat displacement `[D]` of a weight space; zero in tensors of the space it lacks.

        Raises:
            ValueError: A parameter of the vector is not in the space, or has another shape; all are listed.
        """
        names = self.parameters
        found = {space.aliases.get(name, name): tensor for name, tensor in names.items()}
        problems = [f"{name} is not in the space" for name in found if name not in space.shapes]
        problems += [
            f"{name} has shape {list(tensor.shape)}, the space {list(space.shapes[name])}"
            for name, tensor in found.items()
            if name in space.shapes and space.shapes[name] != tensor.shape
        ]
        _refuse(problems, "ravel: the vector does not lie in the space")
        zero = {n: torch.zeros(s, dtype=space.dtype, device=space.device) for n, s in space.shapes.items()}
        return space.ravel(zero | {name: t.to(space.device) for name, t in found.items()})

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The tensors that are no buffers."""
        return {name: tensor for name, tensor in self.tensors.items() if name not in self.buffers}

    @property
    def dim(self) -> int:
        """D, the number of parameters."""
        return sum(tensor.numel() for tensor in self.parameters.values())

    def map(self, function: Callable[[str, Tensor], Tensor]) -> TaskVector:
        """The vector with every tensor replaced by function(name, tensor)."""
        return replace(self, tensors={name: function(name, tensor) for name, tensor in self.tensors.items()})

    def to(self, target: torch.dtype | torch.device | str) -> TaskVector:
        """The vector in another floating dtype or on another device."""
        return self.map(lambda _, tensor: tensor.to(target))

    def select(self, params: Where) -> TaskVector:
        """The vector restricted to some of its tensors."""
        chosen = select(self.tensors, params)
        out = {name: "not chosen" for name in self.tensors if name not in chosen}
        kept = {name: self.tensors[name] for name in chosen}
        return TaskVector(kept, self.buffers & kept.keys(), {**self.skipped, **out})

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._with(other, 1.0)

    def __radd__(self, other: object) -> TaskVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start of sum(...)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._with(other, -1.0)

    def __neg__(self) -> TaskVector:
        return self.map(lambda _, tensor: -tensor)

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, TaskVector):
            return NotImplemented
        scale = float(factor)
        return self.map(lambda _, tensor: (tensor.to(_wide(tensor.dtype)) * scale).to(tensor.dtype))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1.0 / float(divisor))

    def dot(self, other: TaskVector) -> float:
        """The inner product over all parameters, summed in float64."""
        self._check(other)
        return math.fsum(_dot(tensor, other.tensors[name]) for name, tensor in self.parameters.items())

    def norm(self) -> float:
        """The Euclidean norm over all parameters."""
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """The cosine of the angle to another vector; 0 where one of the two is zero."""
        scale = self.norm() * other.norm()
        return self.dot(other) / scale if scale else 0.0

    def block_norms(self) -> dict[str, float]:
        """The Euclidean norm of every parameter tensor; their squares sum to the square of `norm`."""
        return {name: math.sqrt(_dot(tensor, tensor)) for name, tensor in self.parameters.items()}

    @overload
    def apply_to(self, target: nn.Module, scale: float = 1.0) -> nn.Module: ...

    @overload
    def apply_to(self, target: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]: ...

    def apply_to(self, target: nn.Module | Mapping[str, Tensor], scale: float = 1.0) -> nn.Module | dict[str, Tensor]:
        """A copy of a network that is moved: theta + scale * tau, in the network's own dtypes.

        Args:
            target: Module or state dict; itself it stays as it is. Tensors the vector lacks are copied.
            scale: How far; negative to take back what the vector learned.

        Returns:
            The same kind of thing; what was tied is tied again.

        Raises:
            ValueError: The target lacks a tensor of the vector, or has it in another shape; all are listed.
        """
        named = Named.of(target, argument="target")
        where = {name: named.find(name) for name in self.tensors}
        problems = [f"{name} is missing" for name, found in where.items() if found is None]
        problems += [
            f"{name} has shape {list(named.shapes[found])}, the vector {list(self.tensors[name].shape)}"
            for name, found in where.items()
            if found is not None and named.shapes[found] != self.tensors[name].shape
        ]
        _refuse(problems, "apply_to: the vector does not fit the target")
        moved: dict[str, Tensor] = {}
        for name, found in where.items():
            assert found is not None
            start, step = named.values[found], self.tensors[name].to(named.values[found].device)
            wide = _wide(start.dtype, step.dtype)
            moved[found] = torch.add(start.to(wide), step.to(wide), alpha=scale).to(start.dtype)
        if isinstance(target, nn.Module):
            out = copy.deepcopy(target)
            places = {**dict(out.named_parameters()), **dict(out.named_buffers())}
            with torch.no_grad():
                for name, value in moved.items():
                    places[name].copy_(value)
            return out
        values = {name: moved[name] if name in moved else named.values[name].clone() for name in named}
        return {name: values[named.aliases.get(name, name)] for name in target}

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the vector to one safetensors file (see `fipgeo.io.save_record`)."""
        meta = {"kind": _KIND, "buffers": sorted(self.buffers), "skipped": dict(self.skipped)}
        save_record(path, self.tensors, meta, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> TaskVector:
        """Read a vector that `save` wrote, bit for bit.

        Raises:
            ValueError: The file holds something else.
        """
        tensors, meta = load_record(path)
        if meta.get("kind") != _KIND:
            raise ValueError(f"{os.fspath(path)!r} holds a {meta.get('kind', 'record')!r}, expected a {_KIND!r}")
        return cls(tensors, frozenset(meta["buffers"]), meta["skipped"])

    def _with(self, other: TaskVector, scale: float) -> TaskVector:
        """Self + scale * other."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        self._check(other)

        def added(name: str, mine: Tensor) -> Tensor:
            theirs = other.tensors[name].to(mine.device)
            wide = _wide(mine.dtype, theirs.dtype)
            out = torch.promote_types(mine.dtype, theirs.dtype)
            return torch.add(mine.to(wide), theirs.to(wide), alpha=scale).to(out)

        return replace(self.map(added), skipped={**other.skipped, **self.skipped})

    def _check(self, other: TaskVector) -> None:
        """Both vectors are over the same tensors."""
        mine, theirs = self.tensors, other.tensors
        problems = [f"{name} is in the first alone" for name in mine if name not in theirs]
        problems += [f"{name} is in the second alone" for name in theirs if name not in mine]
        problems += [
            f"{name} has shape {list(t.shape)} and {list(theirs[name].shape)}"
            for name, t in mine.items()
            if name in theirs and theirs[name].shape != t.shape
        ]
        problems += [
            f"{name} is a buffer in one of the two alone"
            for name in mine
            if name in theirs and (name in self.buffers) != (name in other.buffers)
        ]
        _refuse(problems, "the two task vectors are not over the same tensors (restrict them with .select)")

    def __repr__(self) -> str:
        more = f", {len(self.buffers)} buffers" if self.buffers else ""
        left = f", {len(self.skipped)} tensors skipped" if self.skipped else ""
        return f"TaskVector(D={self.dim:,} in {len(self.parameters)} tensors{more}{left})"


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 if one of these is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _dot(a: Tensor, b: Tensor) -> float:
    return float(torch.dot(a.flatten().double(), b.to(a.device).flatten().double()))


def _refuse(problems: list[str], head: str) -> None:
    if problems:
        raise ValueError(f"{head}: " + "; ".join(problems))


def _pairs(
    base: Named, tuned: Named, params: Where, policy: Buffers
) -> tuple[dict[str, tuple[str, list[str]]], frozenset[str], dict[str, str], list[str]]:
    """Which tensors of the two networks belong together.

    Returns:
        By name, the base's name and the names of the tensors in tuned that stand for it; which of them are buffers;
        what is skipped and why; and what does not fit.
    """
    matches = {name: list(dict.fromkeys(filter(None, map(tuned.find, base.names_of(name))))) for name in base}
    buffers = base.buffers | {name for name, found in matches.items() if tuned.buffers & set(found)}
    chosen = _chosen(base, buffers, params)
    pairs: dict[str, tuple[str, list[str]]] = {}
    skipped: dict[str, str] = {}
    problems: list[str] = []
    for name, found in matches.items():
        integers = (name in base.integers, any(other in tuned.integers for other in found))
        if name in buffers and policy == "keep":
            skipped[name] = "a buffer, kept as it is in the base"
        elif name not in chosen and name not in buffers:
            skipped[name] = "not chosen"
        elif all(integers) or (integers[0] and not found):
            skipped[name] = "integers, which have no difference to scale"
        elif not found:
            problems.append(f"{name} is missing in tuned")
        elif any(integers):
            problems.append(f"{name} holds integers in one of the two and real numbers in the other")
        elif wrong := [list(tuned.shapes[other]) for other in found if tuned.shapes[other] != base.shapes[name]]:
            problems.append(f"{name} has shape {list(base.shapes[name])} in base and {wrong[0]} in tuned")
        else:
            pairs[name] = (name, found)
    if params is None:
        known = {other for found in matches.values() for other in found}
        left = [name for name in tuned if name not in known]
        problems += [f"{name} is in tuned alone" for name in left if policy == "move" or name not in tuned.buffers]
    return pairs, frozenset(buffers & pairs.keys()), skipped, problems


def _chosen(base: Named, buffers: frozenset[str] | set[str], params: Where) -> set[str]:
    """First names of the parameters that are asked for by any of their names."""
    owners = {name: name for name in base if name not in buffers}
    owners |= {alias: first for alias, first in base.aliases.items() if first in owners}
    shown = {name: torch.empty(base.shapes[first], device="meta") for name, first in owners.items()}
    return {owners[name] for name in select(shown, params)}
