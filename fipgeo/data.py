"""Batches that can be passed over again and again, always in the same order, without touching the caller's state.

Products with a metric are sums over the data, so the data must be the same in every pass. Three kinds are accepted: a
tensor (or mapping or tuple of tensors) with examples first, a list of batches, and a loader that can be iterated anew.
A batch may have any structure; only `OutputMap` looks inside.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from fipgeo.linalg import as_generator
from fipgeo.trees import map_tensors, tensor_leaves

Generator = torch.Generator | int | None
"""Where randomness comes from; None is the fixed seed 0, so that results repeat and no global state is consumed."""


State = tuple[Any, ...]


def _read_streams() -> State:
    """The state of the global random streams (torch on CPU and CUDA, numpy, Python)."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state(), random.getstate()


def _write_streams(state: State) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
    np.random.set_state(state[2])
    random.setstate(state[3])


@contextmanager
def preserved_rng(*generators: torch.Generator) -> Iterator[None]:
    """Leave the global random streams (torch on CPU and CUDA, numpy, Python) and these generators as they were."""
    state, states = _read_streams(), [g.get_state() for g in generators]
    try:
        yield
    finally:
        _write_streams(state)
        for generator, before in zip(generators, states, strict=True):
            generator.set_state(before)


def stir(device: torch.device) -> None:
    """Move all global random streams, so that what follows draws other numbers than it would have."""
    torch.rand(17)
    if device.type == "cuda":
        torch.rand(17, device=device)
    np.random.random(17)
    random.random()


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

    def hold(self) -> Batches:
        """The same batches in memory; itself where they are."""
        return self

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
                f"{argument}: tensors of lengths {', '.join(sorted(map(str, lengths)))}; expected one common number of"
                " examples (a list, not a tuple, holds batches)"
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
            yield map_tensors(self.tree, lambda t, start=start: t[start : start + self.batch_size])

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

    def hold(self) -> Batches:
        """The batches joined into one tensor (or mapping or tuple of tensors) where their shapes allow it."""
        return _concatenated(self.batches) or self

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
        self.generators = tuple(found.values())
        self.states = [g.get_state() for g in self.generators]

    def __iter__(self) -> Iterator[Any]:
        return self.shuffled(0)

    def shuffled(self, seed: int) -> Iterator[Any]:
        """One pass whose random streams start from `seed`: another order for another seed, if the loader shuffles."""
        with preserved_rng(*self.generators):
            self._seed(seed)
            inner, states = _read_streams(), [g.get_state() for g in self.generators]
        iterator = None
        while True:
            # private streams during the loader's work only: between batches, and if it fails, the caller's are in place
            with preserved_rng(*self.generators):
                _write_streams(inner)
                for generator, state in zip(self.generators, states, strict=True):
                    generator.set_state(state)
                iterator = iter(self.loader) if iterator is None else iterator
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
                inner, states = _read_streams(), [g.get_state() for g in self.generators]
            yield batch

    def _seed(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        for generator, state in zip(self.generators, self.states, strict=True):
            generator.set_state(state) if seed == 0 else generator.manual_seed(seed)

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
        inputs: A tensor `[N, ...]` or numpy array, a mapping of tensors (one entry per keyword of the model), a tuple
            of tensors `(x, y)`, a list of batches, or a re-iterable loader. The model gets x; y is not used.
        batch_size: Examples in a batch when `inputs` is tensors (default 256); not allowed with ready-made batches.
        argument: What the caller's argument is called, for messages.

    Returns:
        The batches.

    Raises:
        TypeError: A one-shot iterator or generator, a data set without a loader, or not iterable at all.
        ValueError: No examples, or tensors of different lengths.

    Examples:
        >>> [len(b) for b in as_batches(torch.zeros(5, 2), batch_size=2)]
        [2, 2, 1]
    """
    if isinstance(inputs, Batches):
        return inputs
    if isinstance(inputs, np.ndarray):
        inputs = torch.from_numpy(inputs)
    parts = list(inputs.values()) if isinstance(inputs, Mapping) else inputs if isinstance(inputs, tuple) else [inputs]
    if parts and all(isinstance(part, Tensor) for part in parts):
        return TensorBatches(inputs, 256 if batch_size is None else batch_size, argument)
    if isinstance(inputs, Mapping):
        other = sorted({type(part).__name__ for part in parts if not isinstance(part, Tensor)})
        raise TypeError(f"{argument}: got a mapping with entries of {other}; expected tensors, or a list of batches")
    if batch_size is not None:
        raise ValueError(f"batch_size: got {batch_size}, but {argument} already comes in batches; leave batch_size out")
    if isinstance(inputs, list | tuple):
        return ListBatches(list(inputs), argument)
    indexed = hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__") and not isinstance(inputs, str | bytes)
    if isinstance(inputs, Dataset) or (indexed and not isinstance(inputs, Iterable)):
        raise TypeError(f"{argument}: got the data set {type(inputs).__name__}; wrap it in a DataLoader")
    if not isinstance(inputs, Iterable) or isinstance(inputs, str | bytes):
        raise TypeError(
            f"{argument}: got {type(inputs).__name__}; expected a tensor, a list of batches or a re-iterable loader"
        )
    if isinstance(inputs, Iterator):  # iter(inputs) would tell more, but a DataLoader draws a random number for it
        raise TypeError(
            f"{argument}: got {type(inputs).__name__}, which can be passed over only once; every metric product passes"
            f" over the data again, so pass list({argument}) or a DataLoader"
        )
    return LoaderBatches(inputs, argument)


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
    return TensorBatches(
        map_tensors(trees[0], lambda _: next(iterator)), max(len(tensor_leaves(tree)[0]) for tree in trees)
    )


def _cut(count: int, fraction: float, what: str) -> int:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction: got {fraction}, expected a number between 0 and 1")
    if count < 2:
        raise ValueError(
            f"inputs: got {count} {what}; at least two are needed to set some apart; pass held_out= instead"
        )
    return min(max(round(count * fraction), 1), count - 1)
