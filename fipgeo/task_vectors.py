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
from functools import partial
from typing import overload

import torch
from torch import Tensor, nn

from fipgeo.io import TensorFile, load_record, read_meta, save_record
from fipgeo.lazy import Deferred, Entry, Factors, entries_of, gathered, mapped, value
from fipgeo.sources import Buffers, Named, Source, pairs
from fipgeo.space import WeightSpace, Where, select

_KIND = "task vector"
_LEFT, _RIGHT = "#left", "#right"


@dataclass(frozen=True, eq=False)
class TaskVector:
    """A difference of weights by name; tied tensors once, under their first name in the base.

    Vectors over the same tensors add, subtract, and are scaled; half-precision storage is summed in float32 and rounded
    once. Norms and dot products are over the parameters, buffers are left out.

    Tensors may be products of narrow factors (`from_factors`) or lie in a file (`load(path, stream=True)`). Such a
    tensor is made when it is asked for and not kept: sums and multiples of factors are factors, their inner products
    need no product in full, and what is computed from streamed tensors is computed at each use.

    Attributes:
        tensors: The differences; a mapping that reads or multiplies where they are not in memory.
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
        matched, moved, skipped, problems = pairs(one, two, params, buffers)
        _refuse(problems, "between: base and tuned do not fit")
        tensors: dict[str, Tensor] = {}
        for name, (mine, others) in matched.items():
            start, *ends = one.values[mine], *(two.values[other] for other in others)
            if any(not torch.equal(ends[0], end) for end in ends[1:]):
                problems.append(f"{name} is tied in base and has {len(ends)} values in tuned ({', '.join(others)})")
            wide = _wide(start.dtype, ends[0].dtype)
            tensors[name] = (ends[0].to(start.device, wide) - start.to(wide)).to(dtype or wide)
        _refuse(problems, "between: base and tuned do not fit")
        return cls(tensors, moved, skipped)

    @classmethod
    def from_factors(
        cls, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float = 1.0, *, transposed: bool = False
    ) -> TaskVector:
        """Low-rank differences scale * left @ right, kept as factors.

        Args:
            factors: By name, left `[m, r]` and right `[r, p]`; of LoRA, B and A.
            scale: Of all; of LoRA, alpha / r.
            transposed: The weights are `[p, m]`, the transposed products.

        Raises:
            ValueError: Two factors do not fit each other.

        Examples:
            >>> tau = TaskVector.from_factors({"w": (torch.ones(2, 1), torch.ones(1, 3))}, 0.5)
            >>> tau.tensors["w"].tolist(), round(tau.norm(), 4)
            ([[0.5, 0.5, 0.5], [0.5, 0.5, 0.5]], 1.2247)
        """
        entries: dict[str, Entry] = {}
        for name, (left, right) in factors.items():
            one, two = (right.mT, left.mT) if transposed else (left, right)
            shape = torch.Size([one.shape[0], two.shape[-1]])
            try:
                entries[name] = Factors(one.detach(), two.detach(), shape).scaled(scale)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error
        return cls(gathered(entries))

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
        found = {space.aliases.get(name, name): tensor for name, tensor in self.parameters.items()}
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
    def parameters(self) -> Mapping[str, Tensor]:
        """The tensors that are no buffers."""
        return gathered({name: e for name, e in entries_of(self.tensors).items() if name not in self.buffers})

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """The shape of every tensor; nothing is read or multiplied."""
        return {name: entry.shape for name, entry in entries_of(self.tensors).items()}

    @property
    def dim(self) -> int:
        """D, the number of parameters."""
        return sum(shape.numel() for name, shape in self.shapes.items() if name not in self.buffers)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> TaskVector:
        """The vector with every tensor replaced by function(name, tensor), of the same shape.

        Tensors that are not in memory are replaced at each use.
        """
        return self._with_entries(lambda name, entry: mapped(entry, partial(function, name)))

    def to(self, target: torch.dtype | torch.device | str) -> TaskVector:
        """The vector in another floating dtype or on another device."""
        return self._with_entries(
            lambda _, e: e.to(target) if isinstance(e, Factors) else mapped(e, lambda tensor: tensor.to(target))
        )

    def select(self, params: Where) -> TaskVector:
        """The vector restricted to some of its tensors."""
        shown = {name: torch.empty(shape, device="meta") for name, shape in self.shapes.items()}
        chosen = select(shown, params)
        out = {name: "not chosen" for name in self.tensors if name not in chosen}
        kept = {name: entry for name, entry in entries_of(self.tensors).items() if name in chosen}
        return TaskVector(gathered(kept), self.buffers & kept.keys(), {**self.skipped, **out})

    def __add__(self, other: TaskVector) -> TaskVector:
        return self._with(other, 1.0)

    def __radd__(self, other: object) -> TaskVector:
        return self if isinstance(other, int) and other == 0 else NotImplemented  # the start of sum(...)

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self._with(other, -1.0)

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __mul__(self, factor: float) -> TaskVector:
        if isinstance(factor, TaskVector):
            return NotImplemented
        scale = float(factor)

        def times(tensor: Tensor) -> Tensor:
            return (tensor.to(_wide(tensor.dtype)) * scale).to(tensor.dtype)

        return self._with_entries(lambda _, e: e.scaled(scale) if isinstance(e, Factors) else mapped(e, times))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> TaskVector:
        return self * (1.0 / float(divisor))

    def dot(self, other: TaskVector) -> float:
        """The inner product over all parameters, summed in float64."""
        self.check(other)
        theirs = entries_of(other.tensors)
        return math.fsum(_dot(entry, theirs[name]) for name, entry in entries_of(self.parameters).items())

    def norm(self) -> float:
        """The Euclidean norm over all parameters."""
        return math.sqrt(max(0.0, self.dot(self)))

    def cosine(self, other: TaskVector) -> float:
        """The cosine of the angle to another vector; 0 where one of the two is zero."""
        scale = self.norm() * other.norm()
        return self.dot(other) / scale if scale else 0.0

    def block_norms(self) -> dict[str, float]:
        """The Euclidean norm of every parameter tensor; their squares sum to the square of `norm`."""
        return {name: math.sqrt(max(0.0, _dot(e, e))) for name, e in entries_of(self.parameters).items()}

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
            f"{name} has shape {list(named.shapes[found])}, the vector {list(self.shapes[name])}"
            for name, found in where.items()
            if found is not None and named.shapes[found] != self.shapes[name]
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
        """Write the vector to one safetensors file (see `fipgeo.io.save_record`); factors stay factors."""
        shapes: dict[str, list[int]] = {}
        tensors: dict[str, Tensor] = {}
        for name, entry in entries_of(self.tensors).items():
            if isinstance(entry, Factors):
                shapes[name] = list(entry.shape)
                tensors |= {f"{name}{_LEFT}": entry.left, f"{name}{_RIGHT}": entry.right}
            else:
                tensors[name] = value(entry)
        order = {"names": list(self.tensors), "factors": shapes} if shapes else {}
        meta = {"kind": _KIND, "buffers": sorted(self.buffers), "skipped": dict(self.skipped), **order}
        save_record(path, tensors, meta, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, stream: bool = False) -> TaskVector:
        """Read a vector that `save` wrote, bit for bit.

        Args:
            path: The file.
            stream: Leave tensors in the file and read each one when it is used, every time; the file has to stay.

        Raises:
            ValueError: The file holds something else.
        """
        tensors, meta = (TensorFile(path), read_meta(path)) if stream else load_record(path)
        if meta.get("kind") != _KIND:
            raise ValueError(f"{os.fspath(path)!r} holds a {meta.get('kind', 'record')!r}, expected a {_KIND!r}")
        shapes = meta.get("factors", {})
        entries: dict[str, Entry] = {}
        for name in meta.get("names", tensors):
            if name in shapes:
                pair = tensors[f"{name}{_LEFT}"], tensors[f"{name}{_RIGHT}"]
                entries[name] = Factors(*pair, torch.Size(shapes[name]))
            elif isinstance(tensors, TensorFile):
                make, fill = partial(tensors.__getitem__, name), partial(tensors.read_into, name)
                entries[name] = Deferred(tensors.shapes[name], make, fill)
            else:
                entries[name] = tensors[name]
        return cls(gathered(entries), frozenset(meta["buffers"]), meta["skipped"])

    def _with_entries(self, function: Callable[[str, Entry], Entry]) -> TaskVector:
        return replace(self, tensors=gathered({n: function(n, e) for n, e in entries_of(self.tensors).items()}))

    def _with(self, other: TaskVector, scale: float) -> TaskVector:
        """Self + scale * other."""
        if not isinstance(other, TaskVector):
            return NotImplemented
        self.check(other)
        theirs = entries_of(other.tensors)

        def added(name: str, mine: Entry) -> Entry:
            other = theirs[name]
            if isinstance(mine, Factors) and isinstance(other, Factors) and mine.matches(other):
                return mine.added(other.scaled(scale))
            if isinstance(mine, Tensor) and isinstance(other, Tensor):
                return _added(mine, other, scale)
            return Deferred(mine.shape, lambda: _added(value(mine), value(other), scale))

        return replace(self._with_entries(added), skipped={**other.skipped, **self.skipped})

    def check(self, other: TaskVector) -> None:
        """Look whether another vector is over the same tensors.

        Raises:
            ValueError: It is not; every difference is listed.
        """
        mine, theirs = self.shapes, other.shapes
        problems = [f"{name} is in the first alone" for name in mine if name not in theirs]
        problems += [f"{name} is in the second alone" for name in theirs if name not in mine]
        problems += [
            f"{name} has shape {list(shape)} and {list(theirs[name])}"
            for name, shape in mine.items()
            if name in theirs and theirs[name] != shape
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
        return f"TaskVector(D={self.dim:,} in {len(self.tensors) - len(self.buffers)} tensors{more}{left})"


def _wide(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype that sums are taken in: float64 if one of these is, float32 otherwise."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _added(mine: Tensor, theirs: Tensor, scale: float) -> Tensor:
    theirs = theirs.to(mine.device)
    wide, out = _wide(mine.dtype, theirs.dtype), torch.promote_types(mine.dtype, theirs.dtype)
    return torch.add(mine.to(wide), theirs.to(wide), alpha=scale).to(out)


def _dot(a: Entry, b: Entry) -> float:
    if isinstance(a, Factors) and isinstance(b, Factors) and a.matches(b):
        return a.dot(b)
    one, two = value(a), value(b)
    return float(torch.dot(one.flatten().double(), two.to(one.device).flatten().double()))


def _refuse(problems: list[str], head: str) -> None:
    if problems:
        raise ValueError(f"{head}: " + "; ".join(problems))
