"""Weight space: which tensors of a module are coordinates, and in which order.

Inside the algebra a parameter vector is flat, `[D]`; at the edges it is a dict of named tensors. `WeightSpace` alone
owns the correspondence. Axis letters: D parameters, k stacked vectors.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

Where = str | Iterable[str] | Callable[[str, Tensor], bool] | None
"""How a subset of named tensors is chosen: a glob or several ("layer?.*.weight"), a predicate (name, tensor) -> bool,
or None for "all that require a gradient"."""

ALGEBRA_DTYPES = (torch.float32, torch.float64)


def select(named: Mapping[str, Tensor], where: Where, *, argument: str = "params") -> list[str]:
    """Names chosen by `where`, in the order of `named`.

    Args:
        named: Candidate tensors by name.
        where: Glob, several globs (their union), predicate, or None for every tensor.
        argument: What the caller's argument is called, for the message.

    Returns:
        The chosen names; never empty.

    Raises:
        ValueError: A glob (or the predicate) chose nothing; the nearest names are listed.
        TypeError: A pattern is no string.

    Examples:
        >>> w = {"fc.weight": torch.zeros(2, 2), "fc.bias": torch.zeros(2)}
        >>> select(w, "*.weight")
        ['fc.weight']
    """
    if where is None:
        return list(named)
    if callable(where):
        chosen = [name for name, tensor in named.items() if where(name, tensor)]
        if not chosen:
            raise ValueError(f"{argument}: the predicate chose none of {len(named)} tensors: {_listing(named)}")
        return chosen
    patterns = [where] if isinstance(where, str) else list(where)
    hits: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(
                f"{argument}: got a {type(pattern).__name__} among the patterns; expected globs such as '*.weight', or"
                " a predicate such as lambda name, tensor: name.startswith('head.')"
            )
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            near = difflib.get_close_matches(pattern, named, n=3, cutoff=0.3)
            raise ValueError(
                f"{argument}: the pattern {pattern!r} matches none of {len(named)} tensors"
                f" (nearest: {_listing(near or named)}); patterns are globs such as '*.weight'"
            )
        hits.update(found)
    if not hits:
        raise ValueError(f"{argument}: an empty list of patterns chooses nothing; leave it out to choose all")
    return [name for name in named if name in hits]


@dataclass(frozen=True, eq=False)
class WeightSpace:
    """Named tensors as the coordinates of R^D.

    Build it with `WeightSpace.of(module)`. Tied weights count once, under their first name.

    Attributes:
        shapes: Shape by name; the order of this dict is the order of the coordinates.
        dtype: Of flat vectors: the widest dtype of the tensors, and at least float32.
        device: Where the tensors live.
        aliases: Further names of tied tensors, each mapped to the name that carries the coordinates.

    Examples:
        >>> space = WeightSpace.of(nn.Linear(3, 2))
        >>> space.dim, list(space.shapes)
        (8, ['weight', 'bias'])
        >>> v = torch.arange(8.0)
        >>> bool((space.ravel(space.unravel(v)) == v).all())
        True
    """

    shapes: Mapping[str, torch.Size]
    dtype: torch.dtype
    device: torch.device
    aliases: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: nn.Module, params: Where = None) -> WeightSpace:
        """The space of a module's parameters.

        Args:
            module: Any module.
            params: Which parameters are coordinates: a glob, several globs, a predicate (name, parameter) -> bool, or
                None for all that require a gradient. Any name of a tied parameter will do.

        Returns:
            The space; its order is that of `module.named_parameters()`.

        Raises:
            ValueError: Nothing is chosen, a chosen parameter is not float32, float64, bfloat16 or float16 or has no
                values yet (a lazy module), or the chosen parameters live on several devices.
            NotImplementedError: A parameter is a DTensor (FSDP2, tensor parallel).
        """
        named = dict(module.named_parameters())
        every = dict(module.named_parameters(remove_duplicate=False))
        first = {id(p): name for name, p in named.items()}
        if not named:
            raise ValueError(f"model: {type(module).__name__} has no parameters, so there is no weight space")
        if params is None:
            hits = [name for name, p in named.items() if p.requires_grad]
            if not hits:
                raise ValueError(
                    "params: no parameter of the model requires a gradient; choose some with params='*'"
                    " (all of them) or another pattern"
                )
        else:
            hits = [first[id(every[name])] for name in select(every, params)]
        chosen = [name for name in named if name in set(hits)]
        tensors = {name: named[name] for name in chosen}
        _check_tensors(tensors)
        aliases = {n: first[id(p)] for n, p in every.items() if first[id(p)] in tensors and first[id(p)] != n}
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in tensors.values()) else torch.float32
        return cls({n: p.shape for n, p in tensors.items()}, dtype, next(iter(tensors.values())).device, aliases)

    @property
    def names(self) -> list[str]:
        """Names of the tensors in the order of the coordinates."""
        return list(self.shapes)

    @property
    def sizes(self) -> list[int]:
        """Number of coordinates of every tensor."""
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def dim(self) -> int:
        """D, the number of coordinates."""
        return sum(self.sizes)

    def slices(self) -> dict[str, slice]:
        """Where each tensor's coordinates lie in a flat vector."""
        out, start = {}, 0
        for name, size in zip(self.shapes, self.sizes, strict=True):
            out[name] = slice(start, start + size)
            start += size
        return out

    def ravel(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Named tensors `[..., *shape]` to one flat tensor `[..., D]` in the space's dtype and device.

        Raises:
            ValueError: Names are missing or shapes differ; all mismatches are listed at once.
        """
        problems = []
        lead: tuple[int, ...] | None = None
        for name, shape in self.shapes.items():
            tensor = tensors.get(name)
            if tensor is None:
                problems.append(f"{name} is missing")
                continue
            split = tensor.dim() - len(shape)
            if split < 0 or tensor.shape[split:] != shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, expected [..., {_dims(shape)}]")
            elif lead is None:
                lead = tuple(tensor.shape[:split])
            elif lead != tuple(tensor.shape[:split]):
                problems.append(f"{name} has leading axes {list(tensor.shape[:split])}, the others {list(lead)}")
        if problems:
            raise ValueError("ravel: " + "; ".join(problems))
        assert lead is not None
        flat = [tensors[name].reshape(*lead, size) for name, size in zip(self.shapes, self.sizes, strict=True)]
        return torch.cat([part.to(self.dtype) for part in flat], -1).to(self.device)

    def unravel(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat tensor `[..., D]` to named views `[..., *shape]`, by one split.

        Raises:
            ValueError: The last axis is not D.
        """
        if vector.shape[-1:] != (self.dim,):
            raise ValueError(f"unravel: got shape {list(vector.shape)}, expected the last axis to be D = {self.dim}")
        parts = vector.split(self.sizes, -1)
        lead = vector.shape[:-1]
        return {
            name: part.reshape(lead + shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def point(self, module: nn.Module) -> Tensor:
        """The module's weights as a flat copy `[D]`, detached."""
        named = dict(module.named_parameters())
        return self.ravel({name: named[name].detach() for name in self.shapes if name in named})

    def assign_(self, module: nn.Module, vector: Tensor) -> None:
        """Write a flat point `[D]` into the module's parameters, in place; nothing else of the module changes.

        Raises:
            ValueError: The vector is not `[D]`, or the module lacks a tensor of the space; nothing is written then.
        """
        named = dict(module.named_parameters())
        values = self.unravel(vector)
        missing = [name for name, value in values.items() if name not in named or named[name].shape != value.shape]
        if missing:
            raise ValueError(f"assign_: the module has no parameters {_listing(missing)} of the shapes of this space")
        with torch.no_grad():
            for name, value in values.items():
                named[name].copy_(value)

    def displacement(self, start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> Tensor:
        """The flat vector `[D]` from start to end, two state dicts (extra names are ignored, missing ones an error)."""
        return self.ravel(end) - self.ravel(start)

    def mask(self, where: Where, *, argument: str = "params") -> Tensor:
        """Boolean `[D]`: True on the coordinates of the tensors that `where` chooses."""
        chosen = set(self._select(where, argument))
        out = torch.zeros(self.dim, dtype=torch.bool, device=self.device)
        for name, where_ in self.slices().items():
            if name in chosen:
                out[where_] = True
        return out

    def subset(self, where: Where) -> WeightSpace:
        """The space of some of this one's tensors, in the same order."""
        chosen = self._select(where, "params")
        aliases = {alias: name for alias, name in self.aliases.items() if name in chosen}
        return WeightSpace({n: self.shapes[n] for n in chosen}, self.dtype, self.device, aliases)

    def _select(self, where: Where, argument: str) -> list[str]:
        """Names of the chosen tensors in order; a tied tensor is chosen by any of its names."""
        shapes = dict(self.shapes) | {alias: self.shapes[name] for alias, name in self.aliases.items()}
        found = select({n: torch.empty(shape, device="meta") for n, shape in shapes.items()}, where, argument=argument)
        owners = {self.aliases.get(name, name) for name in found}
        return [name for name in self.shapes if name in owners]

    def __repr__(self) -> str:
        return f"WeightSpace(D={self.dim:,} in {len(self.shapes)} tensors, {self.dtype}, {self.device})"


def _check_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse dtypes, layouts and devices that the algebra cannot hold; every offender is named."""
    lazy = [name for name, p in tensors.items() if nn.parameter.is_lazy(p)]
    if lazy:
        raise ValueError(f"params: {_listing(lazy)} have no shape yet; call the model on one batch first")
    floats = (*ALGEBRA_DTYPES, torch.bfloat16, torch.float16)
    wrong = [f"{name} ({p.dtype})" for name, p in tensors.items() if p.dtype not in floats]
    if wrong:
        raise ValueError(
            f"params: {_listing(wrong)} cannot be a coordinate: expected float32, float64, bfloat16 or float16;"
            " leave such tensors out with a pattern or a predicate"
        )
    sharded = [name for name, p in tensors.items() if type(p).__name__ == "DTensor" or hasattr(p.data, "device_mesh")]
    if sharded:
        raise NotImplementedError(
            f"params: {_listing(sharded)} are DTensors (FSDP2 or tensor parallel), which are not supported;"
            " gather the full parameters first"
        )
    devices = {str(p.device) for p in tensors.values()}
    if len(devices) > 1:
        raise ValueError(f"params: the chosen tensors live on several devices {sorted(devices)}; choose those of one")


def _listing(names: Iterable[str], limit: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _dims(shape: Sequence[int]) -> str:
    return ", ".join(str(s) for s in shape)
