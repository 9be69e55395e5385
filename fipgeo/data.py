"""Batches that can be passed over again and again, always in the same order, without touching the caller's state.

Products with a metric are sums over the data, so the data must be the same in every pass. Three kinds are accepted: a
tensor (or mapping or tuple of tensors) with examples first, a list of batches, and a loader that can be iterated anew.
A batch may have any structure; only `OutputMap` looks inside.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fipgeo.linalg import as_generator

Generator = torch.Generator | int | None
"""Where randomness comes from; None is the fixed seed 0, so that results repeat and no global state is consumed."""


class _Streams:
    """A state of the global random streams (torch on CPU and CUDA, numpy, Python)."""

    def __init__(self) -> None:
        self.state = self.read()

    @staticmethod
    def read() -> tuple[Any, ...]:
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
        return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()

    @staticmethod
    def write(state: tuple[Any, ...]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state_all(state[1])
        np.random.set_state(state[2])
        random.setstate(state[3])

    @staticmethod
    def seeded(seed: int) -> tuple[Any, ...]:
        outer = _Streams.read()
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        inner = _Streams.read()
        _Streams.write(outer)
        return inner


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Leave every global random stream (torch on CPU and CUDA, numpy, Python) as it was found."""
    state = _Streams.read()
    try:
        yield
    finally:
        _Streams.write(state)


class Batches(ABC):
    """A finite sequence of batches that is the same in every pass.

    Build one with `as_batches`. Subclasses say how batches are made (`__iter__`), how examples are set apart (`split`)
    and how a minibatch is drawn (`sample`).
    """

    @abstractmethod
    def __iter__(self) -> Iterator[Any]: ...

    @abstractmethod
    def shuffled(self, seed: int) -> Iterator[Any]:
        """One pass in an order that depends on `seed` alone."""

    @abstractmethod
    def split(self, fraction: float, generator: Generator = None) -> tuple[Batches, Batches]:
        """Two disjoint parts drawn at random; the second holds `fraction` of the examples (or batches), at least one.

        Raises:
            ValueError: There are too few examples (or batches) for two non-empty parts.
        """

    @abstractmethod
    def sample(self, size: int, generator: torch.Generator) -> Any:
        """A random batch: `size` examples without repetition where examples can be indexed, else one of the batches."""

    def first(self) -> Any:
        """The first batch.

        Raises:
            ValueError: There is none.
        """
        for batch in self:
            return batch
        raise ValueError("inputs: no batch came; expected at least one example")


class TensorBatches(Batches):
    """Examples in memory, examples first in every tensor, cut into batches of `batch_size`.

    Args:
        tree: A tensor, or a mapping or tuple of tensors, all with the same length.
        batch_size: Examples in a batch.
        argument: What the caller's argument is called, for messages.
    """

    def __init__(self, tree: Any, batch_size: int = 256, argument: str = "inputs") -> None:
        tensors = tensor_leaves(tree)
        lengths = {len(t) if t.dim() else None for t in tensors}
        if len(lengths) != 1 or None in lengths:
            raise ValueError(
                f"{argument}: tensors of lengths {sorted(map(str, lengths))}; expected one common number of examples"
            )
        if not len(tensors[0]):
            raise ValueError(f"{argument}: got 0 examples (shape {list(tensors[0].shape)}); expected at least one")
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        self.tree, self.batch_size = tree, int(batch_size)

    def __len__(self) -> int:
        return len(tensor_leaves(self.tree)[0])

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self), self.batch_size):
            yield map_tensors(self.tree, lambda t: t[start : start + self.batch_size])

    def shuffled(self, seed: int) -> Iterator[Any]:
        """One pass over the examples in a random order, the ragged rest left out."""
        order = torch.randperm(len(self), generator=as_generator(seed))
        size = min(self.batch_size, len(self))
        for start in range(0, len(self) - size + 1, size):
            yield self.take(order[start : start + size])

    def take(self, index: Tensor) -> Any:
        """The examples at `index`, as one batch."""
        return map_tensors(self.tree, lambda t: t[index.to(t.device)])

    def split(self, fraction: float, generator: Generator = None) -> tuple[Batches, Batches]:
        """Two disjoint parts drawn at random (see `Batches.split`)."""
        cut = _cut(len(self), fraction, "examples")
        order = torch.randperm(len(self), generator=as_generator(generator))
        kept, held = order[cut:].sort().values, order[:cut].sort().values
        return TensorBatches(self.take(kept), self.batch_size), TensorBatches(self.take(held), self.batch_size)

    def sample(self, size: int, generator: torch.Generator) -> Any:
        """`size` examples at random, without repetition."""
        return self.take(torch.randperm(len(self), generator=generator)[:size])


class ListBatches(Batches):
    """Batches of any structure, kept in a list."""

    def __init__(self, batches: list[Any], argument: str = "inputs") -> None:
        if not batches:
            raise ValueError(f"{argument}: got an empty list; expected at least one batch")
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)

    def shuffled(self, seed: int) -> Iterator[Any]:
        """One pass over the batches in a random order."""
        for index in torch.randperm(len(self.batches), generator=as_generator(seed)).tolist():
            yield self.batches[index]

    def split(self, fraction: float, generator: Generator = None) -> tuple[Batches, Batches]:
        """Two disjoint parts, whole batches drawn at random (see `Batches.split`)."""
        joined = _concatenated(self.batches)
        if joined is not None:
            return joined.split(fraction, generator)
        cut = _cut(len(self.batches), fraction, "batches (of unlike shapes, so they cannot be cut up)")
        order = torch.randperm(len(self.batches), generator=as_generator(generator)).tolist()
        kept, held = sorted(order[cut:]), sorted(order[:cut])
        return ListBatches([self.batches[i] for i in kept]), ListBatches([self.batches[i] for i in held])

    def sample(self, size: int, generator: torch.Generator) -> Any:
        """One of the batches at random."""
        return self.batches[int(torch.randint(len(self.batches), (), generator=generator))]


class LoaderBatches(Batches):
    """A loader that gives a fresh iterator every time (a `DataLoader`, say).

    Each pass runs on private random streams that start from the same state, so a shuffling loader gives one fixed
    order, and neither the global random streams nor the loader's own generators move.
    """

    def __init__(self, loader: Iterable[Any], argument: str = "inputs") -> None:
        self.loader, self.argument = loader, argument
        holders = [loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)]
        holders.append(getattr(holders[2], "sampler", None))
        found = {id(g): g for h in holders if isinstance(g := getattr(h, "generator", None), torch.Generator)}
        self.generators = [(g, g.get_state()) for g in found.values()]

    def __iter__(self) -> Iterator[Any]:
        return self.shuffled(0)

    def shuffled(self, seed: int) -> Iterator[Any]:
        """One pass whose random streams start from `seed`: another order for another seed, if the loader shuffles."""
        outer = [(g, g.get_state()) for g, _ in self.generators]
        inner = _Streams.seeded(seed)
        try:
            for generator, state in self.generators:
                generator.set_state(state) if seed == 0 else generator.manual_seed(seed)
            iterator = None
            while True:
                with preserved_rng():
                    _Streams.write(inner)
                    iterator = iter(self.loader) if iterator is None else iterator
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                    inner = _Streams.read()
                yield batch
        finally:
            for generator, state in outer:
                generator.set_state(state)

    def hold(self) -> Batches:
        """All batches in memory: as one tensor (or mapping or tuple of tensors) if they can be joined, else a list."""
        batches = list(self)
        return _concatenated(batches) or ListBatches(batches, self.argument)

    def split(self, fraction: float, generator: Generator = None) -> tuple[Batches, Batches]:
        """Two disjoint parts, held in memory (see `Batches.split`)."""
        return self.hold().split(fraction, generator)

    def sample(self, size: int, generator: torch.Generator) -> Any:
        """A random batch; this passes over the loader, so hold() it first when many are wanted."""
        return self.hold().sample(size, generator)


def as_batches(inputs: Any, batch_size: int | None = None, argument: str = "inputs") -> Batches:
    """Whatever the caller has, as `Batches`.

    Args:
        inputs: A tensor `[N, ...]` or numpy array, a mapping of tensors (one entry per keyword of the model), a list or
            tuple of batches, or a re-iterable loader. Batches may carry labels as `(x, y)`; labels are not used.
        batch_size: Examples in a batch when `inputs` is a tensor or a mapping of tensors (default 256); not allowed
            with ready-made batches.
        argument: What the caller's argument is called, for messages.

    Returns:
        The batches.

    Raises:
        TypeError: A one-shot iterator or generator, a Dataset without a loader, or not iterable at all.
        ValueError: No examples, or tensors of different lengths.

    Examples:
        >>> [len(b) for b in as_batches(torch.zeros(5, 2), batch_size=2)]
        [2, 2, 1]
    """
    if isinstance(inputs, Batches):
        return inputs
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    if isinstance(inputs, Tensor) or (isinstance(inputs, Mapping) and all(map(torch.is_tensor, inputs.values()))):
        return TensorBatches(inputs, 256 if batch_size is None else batch_size, argument)
    if batch_size is not None and not isinstance(inputs, Mapping):
        raise ValueError(f"batch_size: got {batch_size}, but {argument} already comes in batches; leave batch_size out")
    if isinstance(inputs, list | tuple):
        return ListBatches(list(inputs), argument)
    if not isinstance(inputs, Iterable) or isinstance(inputs, Mapping | str | bytes):
        if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not isinstance(inputs, Mapping | str):
            raise TypeError(f"{argument}: got the data set {type(inputs).__name__}; wrap it in a DataLoader")
        raise TypeError(
            f"{argument}: got {type(inputs).__name__}; expected a tensor, a list of batches or a re-iterable loader"
        )
    if iter(inputs) is inputs:
        raise TypeError(
            f"{argument}: got {type(inputs).__name__}, which can be passed over only once; every metric product passes"
            f" over the data again, so pass list({argument}) or a DataLoader"
        )
    return LoaderBatches(inputs, argument)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """The tensors in nested mappings and tuples, in order."""
    parts = list(tree.values()) if isinstance(tree, Mapping) else list(tree) if isinstance(tree, tuple) else [tree]
    return [t for part in parts for t in (tensor_leaves(part) if isinstance(part, Mapping | tuple) else [part])]


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same nesting of mappings and tuples with every tensor replaced by function(tensor)."""
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(map_tensors(value, function) for value in tree)
    return function(tree)


def _concatenated(batches: list[Any]) -> TensorBatches | None:
    """The batches joined along the examples, or None when their structures or shapes do not allow it."""
    trees = [tuple(b) if isinstance(b, list) else b for b in batches]
    if not trees or not all(isinstance(t, Tensor) for tree in trees for t in tensor_leaves(tree)):
        return None
    shapes = [[(t.shape[1:], t.dtype) if t.dim() else None for t in tensor_leaves(tree)] for tree in trees]
    kinds = {type(tree) for tree in trees} | {type(trees[0])}
    if None in shapes[0] or any(s != shapes[0] for s in shapes) or len(kinds) > 1:
        return None
    columns = [torch.cat(parts) for parts in zip(*map(tensor_leaves, trees), strict=True)]
    if len({len(column) for column in columns}) > 1:
        return None
    iterator = iter(columns)
    return TensorBatches(map_tensors(trees[0], lambda _: next(iterator)), max(len(tensor_leaves(tree)[0]) for tree in trees))


def _cut(count: int, fraction: float, what: str) -> int:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction}, expected a number between 0 and 1")
    if count < 2:
        raise ValueError(f"inputs: got {count} {what}; at least two are needed to set some apart; pass held_out= instead")
    return min(max(round(count * fraction), 1), count - 1)
