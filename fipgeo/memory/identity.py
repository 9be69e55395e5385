"""What sketches have in common: the weights they are of, also on disk, by names, shapes and a fingerprint of both."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from fipgeo.paths.protected import Protected
from fipgeo.space import WeightSpace

KIND = "sketch"


class Remembered(Protected):
    """A protected function that needs no input any more: a quadratic form about a point of weights.

    Args:
        space: The weights.
    """

    affine = True

    def __init__(self, space: WeightSpace) -> None:
        self._space = space

    @property
    def space(self) -> WeightSpace:
        """The weights."""
        return self._space

    @property
    def num_examples(self) -> int:
        """One: the mean over inputs is in the form."""
        return 1

    @property
    def cost(self) -> float:
        """No model evaluation."""
        return 0.0


def described(space: WeightSpace) -> dict[str, Any]:
    """A space in plain values, with its fingerprint."""
    return {
        "kind": KIND,
        "fingerprint": fingerprint(space),
        "shapes": [[name, list(shape)] for name, shape in space.shapes.items()],
        "aliases": dict(space.aliases),
        "dtype": str(space.dtype).removeprefix("torch."),
    }


def space_from(meta: Mapping[str, Any], path: str | os.PathLike[str]) -> WeightSpace:
    """The space that was described.

    Raises:
        ValueError: The values describe no sketch, or do not match their fingerprint.
    """
    if meta.get("kind") != KIND:
        raise ValueError(f"{str(path)!r} holds no sketch; pass a file that Sketch.save wrote")
    shapes = {name: torch.Size(shape) for name, shape in meta["shapes"]}
    space = WeightSpace(shapes, getattr(torch, meta["dtype"]), torch.device("cpu"), meta["aliases"])
    if meta["fingerprint"] != fingerprint(space):
        raise ValueError(f"{str(path)!r}: names and shapes do not match their fingerprint; write it again")
    return space


def space_of(model: nn.Module | WeightSpace, names: Sequence[str]) -> WeightSpace:
    """The space of those parameters of a model that carry the names; of all where none does."""
    if isinstance(model, WeightSpace):
        return model
    here = {name for name, _ in model.named_parameters()} & set(names)
    return WeightSpace.of(model, (lambda name, _: name in here) if here else "*")


def fingerprint(space: WeightSpace) -> str:
    """A name for the weights of a space: a hash of the names and shapes of its tensors, in order."""
    text = json.dumps([[name, list(shape)] for name, shape in space.shapes.items()])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_space(own: WeightSpace, other: WeightSpace, argument: str) -> None:
    """Refuse other weights than a sketch's own.

    Raises:
        ValueError: Names, shapes or their order differ; all differences are listed.
    """
    if list(own.shapes.items()) == list(other.shapes.items()):
        return
    names = [*own.shapes, *(name for name in other.shapes if name not in own.shapes)]
    pairs = ((n, own.shapes.get(n), other.shapes.get(n)) for n in names)
    told = [f"{n} is {_told(here)} in the sketch and {_told(there)} here" for n, here, there in pairs if here != there]
    what = "; ".join(told) or "the same tensors come in another order"
    raise ValueError(f"{argument}: other weights than the sketch's: {what}")


def _told(shape: Any) -> str:
    return "missing" if shape is None else str(list(shape))
