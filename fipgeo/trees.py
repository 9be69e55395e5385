"""Nested batches and outputs: mappings, tuples and lists with tensors inside."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor


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


def same_batch(a: Any, b: Any) -> bool:
    """Whether two batches hold the same tensors; what is no tensor is not looked at."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(same_batch(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(same_batch, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b)


def in_dtype(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A floating tensor in a dtype; integers and booleans, and everything where the dtype is None, as they are."""
    return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor


def rebuilt(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """The same structure of mappings, tuples and lists with every tensor replaced by function(tensor).

    Mappings keep their type, as named tuples do; what is neither a tensor nor a structure stays the object that it is.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, MutableMapping):
        out = copy.copy(tree)
        for key, value in tree.items():
            out[key] = rebuilt(value, function)
        return out
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(rebuilt(value, function) for value in tree))
    return type(tree)(rebuilt(value, function) for value in tree) if isinstance(tree, list | tuple) else tree


def copied(batch: Any, dtype: torch.dtype | None = None) -> Any:
    """The batch with its tensors copied, so that a forward that works in place leaves the caller's data alone.

    Args:
        batch: Nested mappings, tuples and lists.
        dtype: Of the floating tensors in the copy; None for their own.
    """
    return rebuilt(batch, lambda t: in_dtype(t.clone(), dtype))


FEW = 2
"""Examples on which a model is looked at before it is used in earnest."""


def head(batch: Any, count: int) -> Any:
    """The first examples of a batch in its own structure; the whole batch where it is not plainly examples first."""
    lengths = set(_lengths(batch))
    if len(lengths) != 1 or None in lengths or max(lengths) <= count:  # type: ignore[type-var]
        return batch
    return _cut(batch, count)


def _lengths(tree: Any) -> Iterator[int | None]:
    """Sizes of the first axis of every leaf; None for a leaf that has none."""
    if isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _lengths(value)
    else:
        yield len(tree) if isinstance(tree, Tensor) and tree.dim() else None


def _cut(tree: Any, count: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[:count]
    if isinstance(tree, MutableMapping):
        out = copy.copy(tree)
        for key, value in tree.items():
            out[key] = _cut(value, count)
        return out
    if isinstance(tree, Mapping):
        return {key: _cut(value, count) for key, value in tree.items()}
    parts = [_cut(value, count) for value in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def input_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors that a model gets of a batch: anywhere in nested mappings, and of x alone in `(x, y)`."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from input_tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree[:1]:
            yield from input_tensors(value)


def floats(tree: Any) -> Iterator[Tensor]:
    """The floating tensors anywhere in nested mappings, lists and tuples."""
    if isinstance(tree, Tensor):
        yield from (t for t in (tree,) if t.is_floating_point())
    elif isinstance(tree, Mapping | list | tuple):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from floats(value)


class OutputError(ValueError):
    """The model's outputs are not what a metric can be built on."""


def output_tensors(raw: Any) -> tuple[Tensor, ...]:
    """The output tensors inside whatever a model returned, `[n, ..., C]`, at least float32; `[n]` becomes `[n, 1]`.

    Raises:
        OutputError: An entry is no float tensor with examples first.
    """
    if isinstance(raw, Tensor):
        leaves: tuple[Any, ...] = (raw,)
    elif isinstance(getattr(raw, "logits", None), Tensor):
        leaves = (raw.logits,)
    elif isinstance(raw, Mapping):
        leaves = (raw["logits"],) if "logits" in raw else tuple(raw.values())
    elif isinstance(raw, list | tuple):
        leaves = tuple(raw)
    else:
        leaves = (raw,)
    for leaf in leaves:
        if not isinstance(leaf, Tensor) or not leaf.is_floating_point() or leaf.dim() < 1:
            got = f"{leaf.dtype} of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else type(leaf).__name__
            raise OutputError(
                f"outputs: the model returned a {type(raw).__name__} with an entry of {got}; expected float tensors"
                " with examples first. Pass output_fn=lambda out: ... that picks the outputs to compare"
            )
    columns = (
        leaf.unsqueeze(-1) if leaf.dim() == 1 else leaf for leaf in leaves
    )  # the last axis is never the examples
    return tuple(f.float() if f.dtype in (torch.bfloat16, torch.float16) else f for f in columns)
