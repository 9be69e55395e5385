"""A network whose weights are a learned combination of task vectors: theta(c) = theta_0 + B c."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.atlas.blocks import Block, JoinedBlock, block_of
from fipgeo.atlas.kinds import Kind, PerBlock
from fipgeo.atlas.sums import Compose, Sums, together
from fipgeo.checkpointing import CheckpointWatch
from fipgeo.io import load_record, save_record
from fipgeo.lazy import Entry, Factors, entries_of, value
from fipgeo.linalg import Function, LinearOperator
from fipgeo.model import OutputMap, unwrapped
from fipgeo.sources import Named
from fipgeo.space import WeightSpace
from fipgeo.tangent import TangentModel
from fipgeo.tangent.push import Expansion, called
from fipgeo.task_vectors import TaskVector

_FILE = "coefficients of a composition"


class Composition(nn.Module):
    """A network at theta_0 + B c, or its first-order expansion there, with the coefficients c to be trained.

    The weights are composed once in a forward pass, and the gradient in the coefficients is the inner products of the
    weights' gradient with the vectors. Vectors may be stored in float16 or bfloat16; sums are in float32, or in float64
    for a float64 network. The network itself is copied and its weights are frozen, so that c is all that an optimiser
    sees in `parameters()` with a gradient; a head to be trained beside it is thawed by
    `composition.module.head.requires_grad_(True)`, and must then not be among the vectors' tensors.

    Only parameters are composed. Buffers, such as the running statistics of BatchNorm, are the network's own and
    behave as in any module: used in eval mode, updated in train mode.

    With `linear=True` outputs are f(x; theta_0) + J(x; theta_0) B c by one forward-mode pass, evaluated as
    `TangentModel` does it, in eval mode always: they are linear in c, and a convex loss is convex in c. Then `fit_`
    needs one step, nothing is trained beside c, and `merge` gives a `TangentModel`.

    Args:
        module: The network at theta_0; it stays as it is.
        vectors: Task vectors over its parameters, or some of them. A tensor that a vector lacks counts as zero, and
            tensors that are zero take no memory. Vectors of factors stay factors, and streamed ones are read block by
            block whenever weights are composed or gradients taken; a part of a tensor has no factors, so `Partitions`
            multiplies them block by block. Tensors of 1,024 numbers at most that are of equal size, such as biases, are
            summed together, from a copy of their vectors in memory.
        kind: Which coefficient scales what: `Isotropic()`, `PerLayer()`, `PerBlock()`, `PerChannel.of(module)` or
            `Partitions(K, seed)`.
        dtype: To store the vectors in; None for their own.
        start: The value of all coefficients at the start; 0 is the network itself.
        linear: Linearise the network in its weights at theta_0.
        stream: Leave all vectors where they are, such as in the memory of the CPU for a network on a GPU, and bring one
            block at a time to the network whenever it is used.

    Attributes:
        coefficients: The parameter c `[n, S]`: n vectors, S columns as `labels` names them.
        module: The copy of the network.
        labels: What each column scales.

    Raises:
        ValueError: There is no vector, or a vector does not fit the network; every mismatch is listed.
        CheckpointError: When called where gradients are wanted: the network uses reentrant checkpoints.

    Examples:
        >>> net, tuned = nn.Linear(3, 2), nn.Linear(3, 2)
        >>> model = Composition(net, [TaskVector.between(net, tuned)])
        >>> model.coefficients.shape, model.labels
        (torch.Size([1, 2]), ['weight', 'bias'])
        >>> model(torch.ones(4, 3)).sum().backward()
        >>> model.coefficients.grad.shape
        torch.Size([1, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        vectors: Sequence[TaskVector],
        kind: Kind | None = None,
        *,
        dtype: torch.dtype | None = None,
        start: float = 0.0,
        linear: bool = False,
        stream: bool = False,
    ) -> None:
        super().__init__()
        self.linear = linear
        self.kind = PerBlock() if kind is None else kind
        self.module = copy.deepcopy(unwrapped(module))
        self.training = self.module.training
        self._trainable = {n for n, p in self.module.named_parameters() if p.requires_grad}
        for parameter in self.module.parameters():
            parameter.grad = None
            parameter.requires_grad_(False)
        named = dict(self.module.named_parameters())
        found = _fitting(self.module, vectors)
        sizes = {name: named[name].numel() for name in named if any(name in vector for vector in found)}
        self.labels = self.kind.labels(sizes)
        columns = self.kind.columns(sizes)
        wide = torch.float64 if any(named[name].dtype == torch.float64 for name in sizes) else torch.float32
        device = next((named[name].device for name in sizes), None)
        shape = (len(vectors), len(self.labels))
        self.coefficients = nn.Parameter(torch.full(shape, float(start), dtype=wide, device=device))
        self.names: list[str] = []
        self.blocks = nn.ModuleList()
        index: list[Tensor] = []
        keys: list[Hashable] = []
        for name, size in sizes.items():
            rows = [i for i, vector in enumerate(found) if name in vector and _moves(vector[name])]
            if not rows:
                continue
            stack, parts = [found[i][name] for i in rows], len(columns[name])
            place = self.kind.order(name, size)
            self.blocks.append(block_of(stack, dtype, named[name].device, place, parts, stream))
            self.names.append(name)
            index.append(torch.tensor(rows)[:, None] * shape[1] + columns[name])  # [n, K]
            keys.append((tuple(rows), named[name].dtype, named[name].device))
        blocks = self._blocks()
        self._groups, self._shapes = together(blocks, keys), [block.shape for block in blocks]
        shared = [[blocks[i] for i in group] for group in self._groups]
        self._summands = [JoinedBlock(of, wide) if len(of) > 1 else of[0] for of in shared]
        self.joined = nn.ModuleList(block for block in self._summands if isinstance(block, JoinedBlock))
        index = [torch.cat([index[i] for i in group], 1).flatten() for group in self._groups]
        self._sizes = [len(part) for part in index]
        places = (name.rpartition(".") for name in self.names)
        self._owners = [(self.module.get_submodule(path), key) for path, _, key in places]
        flat = torch.cat(index) if index else torch.zeros(0, dtype=torch.long)
        self.register_buffer("_index", flat.to(device), persistent=False)
        self._index: Tensor
        self._shared: dict[str, Tensor] | None = None
        self._expansion: Expansion | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The network's output at theta_0 + B c, or that of its expansion."""
        composed = self._used() if self._shared is None else self._shared
        if not (self.linear and self.names):
            traced = torch.compiler.is_compiling() or not torch.is_grad_enabled()
            with nullcontext() if traced else CheckpointWatch():
                return torch.func.functional_call(self.module, composed, args, kwargs)
        if self._expansion is None:
            names = frozenset(self.names)
            self._expansion = Expansion(OutputMap(self.module, lambda name, _: name in names, forward_fn=called))
        return self._expansion(composed, (args, kwargs))

    def weights(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """The composed tensors by name, differentiable in the coefficients; tensors no vector moves are left out.

        Args:
            coefficients: `[n, S]` in place of the module's own, for functions of the coefficients (torch.func).
        """
        return self._summed(coefficients, True)

    def displacements(self, coefficients: Tensor | None = None) -> dict[str, Tensor]:
        """B c by name: how far the composed tensors are from the network's. As `weights` otherwise."""
        return self._summed(coefficients, False)

    def _summed(self, coefficients: Tensor | None, based: bool) -> dict[str, Tensor]:
        flat = (self.coefficients if coefficients is None else coefficients).flatten()
        sums = self._sums(based)
        found = Compose.apply(flat, sums) if torch.is_grad_enabled() else sums.compose(flat)
        return dict(zip(self.names, found, strict=True))

    def _sums(self, based: bool, dtype: torch.dtype | None = None) -> Sums:
        """The sums, plus the network's own tensors, which are found without a walk through all of its modules."""
        bases: list[Any] = [owner._parameters[key] for owner, key in self._owners]
        dtypes = [dtype or bases[group[0]].dtype for group in self._groups]
        start = bases if based else None
        return Sums(self._summands, self._groups, self._index, self._sizes, self._shapes, start, dtypes)

    def _used(self) -> dict[str, Tensor]:
        """What a forward pass takes: weights, or tangents of the linearised network."""
        return self.displacements() if self.linear else self.weights()

    @contextmanager
    def once(self) -> Iterator[None]:
        """Compose once for all forward passes inside, with as many backward passes as you like.

        Gradients are gathered in the composed weights and taken to the coefficients when the block is left, which is
        therefore the place before the optimiser's step. The coefficients may not change inside.

        Raises:
            RuntimeError: Such a block is entered inside another.

        Examples:
            >>> net, tuned = nn.Linear(3, 2), nn.Linear(3, 2)
            >>> model = Composition(net, [TaskVector.between(net, tuned)])
            >>> with model.once():
            ...     for x in torch.ones(2, 4, 3):
            ...         model(x).sum().backward()
            >>> model.coefficients.grad is not None
            True
        """
        if self._shared is not None:
            raise RuntimeError("once: the composition is in such a block already; leave it first")
        composed = self._used()
        self._shared = {n: t.detach().requires_grad_(t.requires_grad) for n, t in composed.items()}
        try:
            yield
            pairs = [(composed[name], leaf.grad) for name, leaf in self._shared.items() if leaf.grad is not None]
            if pairs:
                torch.autograd.backward([tensor for tensor, _ in pairs], [grad for _, grad in pairs])
        finally:
            self._shared = None

    def operator(self, space: WeightSpace | None = None) -> LinearOperator:
        """B `[D, r]`: coefficients, read row by row, to displacements of the weights, in the sums' dtype.

        With a metric g of the same space, the metric of the coefficients is `g.pullback(B)`.

        Args:
            space: Where displacements lie; None for the space of all the network's parameters.

        Raises:
            ValueError: The space lacks a tensor that the vectors move.
        """
        space = WeightSpace.of(self.module, "*") if space is None else space
        missing = [name for name in self.names if name not in space.shapes]
        if missing:
            raise ValueError(f"space: it lacks {', '.join(missing[:6])}, which the vectors move; choose them too")
        slices, wide = space.slices(), self.coefficients.dtype
        size, sums = self.coefficients.numel(), self._sums(False, wide)

        def apply(c: Tensor) -> Tensor:
            out = c.new_zeros(len(c), space.dim)
            for name, part in zip(self.names, sums.compose(c), strict=True):
                out[:, slices[name]] = part.reshape(len(c), -1)
            return out

        def adjoint(v: Tensor) -> Tensor:
            parts = [v[:, slices[n]].reshape((len(v), *space.shapes[n])) for n in self.names]
            return sums.project(parts, size, wide) if parts else v.new_zeros(len(v), size)

        return Function(apply, adjoint, (space.dim, size), dtype=wide, device=self.coefficients.device)

    def merge(self) -> nn.Module:
        """The network with the composed weights, a plain module of its own: no cost remains.

        Of a linear composition, the `TangentModel` with tau = B c, which costs one forward-mode pass.
        """
        out = self.unload()
        if self.linear and self.names:
            names = frozenset(self.names)
            return TangentModel(out, lambda name, _: name in names, copy=False).assign_(self.displacements())
        named = dict(out.named_parameters())
        with torch.no_grad():
            for name, value in self.weights().items():
                named[name].copy_(value)
        return out

    def unload(self) -> nn.Module:
        """The network without the vectors, as it was given, with what was trained beside the coefficients."""
        out = copy.deepcopy(self.module)
        for name, parameter in out.named_parameters():
            parameter.grad = None
            parameter.requires_grad_(name in self._trainable)
        return out

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the coefficients and what they mean to one file; the network and the vectors are not in it."""
        meta = {"kind": _FILE, "of": self.kind.describe(), "labels": self.labels, "linear": self.linear}
        save_record(path, {"coefficients": self.coefficients}, meta, overwrite=overwrite)

    def load_(self, path: str | os.PathLike[str]) -> Composition:
        """Read coefficients that `save` wrote into this composition, in place.

        Raises:
            ValueError: They are of another kind, number of vectors, or network.
        """
        tensors, meta = load_record(path)
        if meta.get("kind") != _FILE:
            raise ValueError(f"{os.fspath(path)!r} holds a {meta.get('kind', 'record')!r}, expected {_FILE}")
        here = (self.kind.describe(), self.labels, list(self.coefficients.shape), self.linear)
        there = (meta["of"], meta["labels"], list(tensors["coefficients"].shape), meta.get("linear", False))
        for what, mine, theirs in zip(("kind", "columns", "shape", "flag linear"), here, there, strict=True):
            if mine != theirs:
                raise ValueError(f"{os.fspath(path)!r} has the {what} {theirs}, this composition {mine}")
        with torch.no_grad():
            self.coefficients.copy_(tensors["coefficients"])
        return self

    def _blocks(self) -> list[Block]:
        return [block for block in self.blocks if isinstance(block, Block)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Composition:
        """Casts and moves, as for any module; the expansion is made anew for the new dtype and device."""
        super()._apply(fn, recurse)
        self._expansion = None
        return self

    def extra_repr(self) -> str:
        """Sizes, for `print`."""
        n, s = self.coefficients.shape
        return f"{n} vectors, {s} columns ({type(self.kind).__name__}), {n * s:,} coefficients"


def _fitting(module: nn.Module, vectors: Sequence[TaskVector]) -> list[dict[str, Entry]]:
    """The vectors' parameters under the module's first names; all mismatches at once."""
    if not vectors:
        raise ValueError("vectors: got none, expected one task vector or more: TaskVector.between(base, tuned)")
    named, problems, out = Named.of(module), [], []
    for number, vector in enumerate(vectors):
        found: dict[str, Entry] = {}
        for name, tensor in entries_of(vector.parameters).items():
            first = named.find(name)
            if first is None or first in named.buffers:
                problems.append(f"vector {number}: the network has no parameter {name}")
            elif named.shapes[first] != tensor.shape:
                here = list(named.shapes[first])
                problems.append(f"vector {number}: {name} is {list(tensor.shape)}, the network's is {here}")
            else:
                found[first] = tensor
        out.append(found)
    if problems:
        raise ValueError("vectors: they do not fit the network: " + "; ".join(problems))
    return out


def _moves(entry: Entry) -> bool:
    """Whether a difference is not zero; a deferred one is made for a moment."""
    if isinstance(entry, Factors):
        return bool(entry.left.any()) and bool(entry.right.any())
    return bool(value(entry).any())
