"""Which parameter of an optimiser is which tensor of a weight space, and what it is that is protected there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.field import MetricField
from fipgeo.paths import Kept, Position, Protected, Several

EXPECTED = "expected MetricField(model, old_inputs), another protected function such as a Kept, or a list of them"


def protect(keep: Any, start: Position | None = None) -> Protected:
    """What is to be kept, as one protected function.

    Args:
        keep: A field (its outputs at the start are what is kept), a protected function, or several of them.
        start: Where fields take their outputs; None for their models as they are.

    Raises:
        TypeError: It is something else.
        ValueError: It is an empty list, the parts are functions of other weights, or a model does not take its inputs.
    """
    if isinstance(keep, Protected):
        return keep
    if isinstance(keep, MetricField):
        keep.map.check(keep.function.batches.first(), None if start is None else start.theta)
        return _kept(keep, start or present(keep))
    if isinstance(keep, Sequence) and not isinstance(keep, str):
        if not keep:
            raise ValueError(f"keep: got an empty list, {EXPECTED}")
        return Several([protect(part, start) for part in keep])
    raise TypeError(f"keep: got a {type(keep).__name__}, {EXPECTED}")


def first_field(keep: Any) -> MetricField | None:
    """The first of what is to be kept whose start is the optimiser's to remember, if there is one."""
    parts = keep if isinstance(keep, Sequence) else [keep]
    return next((part for part in parts if isinstance(part, MetricField)), None)


def present(field: MetricField) -> Position:
    """Where a field's model is: its weights and normalisation statistics, copied."""
    return Position(field.map.point(), field.map.normalisation())


def modules_of(protected: Protected) -> Iterator[nn.Module]:
    """The models behind a protected function; none behind a sketch."""
    if isinstance(protected, Several):
        for part in protected.parts:
            yield from modules_of(part)
    elif isinstance(protected, Kept):
        yield protected.function.map.module


def _kept(field: MetricField, start: Position) -> Kept:
    """The outputs at the start under the statistics of the start; later ones under those of the model at the time."""
    function = field.function
    kept = Kept.of(replace(function, map=function.map.with_buffers(start.buffers)), start.theta)
    cure = "fipgeo.adapt keeps them there; or leave them out of params="
    kept.constraints.refuse("keep", "would leave their manifolds with the steps of this optimiser", cure)
    return replace(kept, function=replace(kept.function, map=function.map))


class Coordinates:
    """The parameters of an optimiser as coordinates of the weight space of what it protects.

    A parameter is found by identity in the model behind the protected function, so tied weights are found under
    whichever name they were handed in; without a model, by its name.

    Args:
        protected: What is protected.

    Raises:
        ValueError: Its parts belong to several models.
    """

    def __init__(self, protected: Protected) -> None:
        modules = {id(module): module for module in modules_of(protected)}
        if len(modules) > 1:
            raise ValueError(
                f"keep: its parts belong to {len(modules)} models, expected one; make all fields of one model, with"
                " forward_fn= where tasks use it in several ways"
            )
        self.space = protected.space
        self.module = next(iter(modules.values()), None)
        self.slices = self.space.slices()
        self.params: dict[str, Tensor] = {}
        owned = dict(self.module.named_parameters()) if self.module is not None else {}
        self._names = {id(p): name for name, p in owned.items()}
        self._fixed = {name: p for name, p in owned.items() if name in self.slices}

    def add(self, param: Tensor, name: str | None) -> str | None:
        """The tensor of the space that a parameter is; None where the protected function does not depend on it.

        Args:
            param: The parameter.
            name: What the user calls it, if that was said.

        Raises:
            ValueError: It belongs to the model but is no coordinate, it has another shape or device than the space
                says, or it cannot be found for want of a name.
        """
        if self.module is not None:
            found = self._names.get(id(param))
        elif name is None:
            raise ValueError(
                "params: what is kept has no model to find parameters in, so their names must tell; pass"
                " model.named_parameters() in place of model.parameters()"
            )
        else:
            found = self.space.aliases.get(name, name)
            found = found if found in self.slices else None
        if found is None:
            return None
        if found not in self.slices:
            raise ValueError(
                f"params: {found!r} is a weight of the protected model but no coordinate of its metric, so nothing"
                " would keep the old outputs from what it does; leave it out, or choose it by params= of the field"
            )
        if param.shape != self.space.shapes[found]:
            raise ValueError(
                f"params: {found!r} has shape {list(param.shape)}, but {list(self.space.shapes[found])} in the space of"
                " what is kept; make the field after the model has its shape"
            )
        if param.device != self.space.device:
            raise ValueError(
                f"params: {found!r} is on {param.device}, what is kept on {self.space.device}; move the model before"
                " the field is made"
            )
        self.params[found] = param
        return found

    def theta(self) -> Tensor:
        """The present weights `[D]`; those that were not handed in are the model's.

        Raises:
            ValueError: There is no model, and some were not handed in.
        """
        tensors = self._fixed | self.params
        missing = [name for name in self.slices if name not in tensors]
        if missing:
            raise ValueError(
                f"params: {missing[0]!r} and {len(missing) - 1} more that the kept function depends on were not handed"
                " in, and it has no model to read them from; pass all of model.named_parameters()"
            )
        return self.space.ravel({name: t.detach() for name, t in tensors.items()})

    def flat(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Some tensors by name as a vector `[D]`, zero elsewhere."""
        out = torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        for name, tensor in tensors.items():
            out[self.slices[name]] = tensor.reshape(-1).to(out.dtype)
        return out

    def each(self, numbers: Mapping[str, float]) -> Tensor:
        """One number a tensor as a vector `[D]`, zero where there is none."""
        out = torch.zeros(self.space.dim, dtype=self.space.dtype, device=self.space.device)
        for name, number in numbers.items():
            out[self.slices[name]] = number
        return out

    def part(self, vector: Tensor, name: str) -> Tensor:
        """What of a vector `[D]` belongs to a tensor, in its shape."""
        return vector[self.slices[name]].view(self.space.shapes[name])
