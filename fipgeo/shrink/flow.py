"""What is known of the activations of one forward pass: which entries are one channel, and which never change.

A `TorchFunctionMode` sees every function that a forward calls, whatever module calls it. Beside each activation it
keeps two arrays of the same shape: the label of the unit that an entry belongs to, and whether the entry is the same
for every input of the network. Functions that move entries are run on these arrays as they were on the activation.
What a function does that is not known here is a *barrier*: the channels that reach it have to stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fipgeo.shrink.units import BLANK, FIXED, Units


@dataclass(frozen=True)
class Flow:
    """What is known of an activation, entry by entry.

    Attributes:
        labels: Unit of each entry (`FIXED`, `BLANK` or a unit), in the activation's shape.
        constant: Whether the entry has the same value for every input.
    """

    labels: Tensor
    constant: Tensor


@dataclass(frozen=True)
class Use:
    """A weight that reads channels along one of its axes.

    Attributes:
        weight: Its name.
        axis: The axis along which the channels lie.
        labels: Unit of each index.
        constant: Whether what comes in there is one number for every input, example and position.
        values: That number.
        bias: Where a constant that comes in can be added instead; None if nowhere.
    """

    weight: str
    axis: int
    labels: Tensor
    constant: Tensor
    values: Tensor
    bias: str | None


@dataclass(frozen=True)
class Call:
    """One call of a torch function.

    Attributes:
        name: The plain name of the function: "add" for `torch.add`, `Tensor.__iadd__` and `Tensor.add_`.
        func: The function.
        args: Positional arguments.
        kwargs: Named arguments.
        where: The function and the module that called it, in words.
    """

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    where: str

    def run(self) -> Any:
        """Do what was to be done."""
        return self.func(*self.args, **self.kwargs)

    def bound(self, names: str) -> dict[str, Any]:
        """The arguments by name, None for those left out."""
        out: dict[str, Any] = dict.fromkeys(names.split())
        return out | dict(zip(names.split(), self.args, strict=False)) | dict(self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments."""
        return list(tensors_in((*self.args, *self.kwargs.values())))


Rule = Callable[["Tracer", Call], Any]
"""Runs a call and notes what is known of its result."""


@dataclass
class Seen:
    """What a traced forward pass told.

    Attributes:
        units: The partition of the axes of weights.
        uses: Weights that read channels.
        groups: Number of groups of every grouped convolution, by the name of its weight.
        heads: Labels of the heads of every attention, by the name of its output weight.
    """

    units: Units = field(default_factory=Units)
    uses: list[Use] = field(default_factory=list)
    groups: dict[str, int] = field(default_factory=dict)
    heads: dict[str, Tensor] = field(default_factory=dict)


class Tracer(TorchFunctionMode):
    """Follows channels through a forward pass.

    Args:
        names: Names of parameters and buffers by `id`.
        rules: What is known of functions, by plain name.

    Attributes:
        seen: What was found.
        module: Name of the module whose forward runs, for messages.
    """

    def __init__(self, names: Mapping[int, str], rules: Mapping[str, Rule]) -> None:
        super().__init__()
        self.names, self.rules = names, rules
        self.seen = Seen()
        self.module = ""
        self._flows: dict[int, tuple[Tensor, Flow]] = {}  # the tensor stays alive, so that no `id` is given twice

    @property
    def units(self) -> Units:
        """The partition so far."""
        return self.seen.units

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run one function and note what is known of its result."""
        name = plain_name(func)
        call = Call(name, func, args, kwargs or {}, f"{name} in {self.module or 'the model'}")
        return self.rules.get(name, barrier)(self, call)

    def name(self, value: Any) -> str | None:
        """The name of a parameter or buffer; None for anything else."""
        return self.names.get(id(value))

    def flow(self, t: Tensor) -> Flow:
        """What is known of a tensor; parameters and buffers are constant, nothing is known of others."""
        if id(t) in self._flows:
            flow = self._flows[id(t)][1]
            return Flow(self.units.roots(flow.labels), flow.constant)
        constant = torch.full(t.shape, id(t) in self.names)
        return Flow(torch.full(t.shape, FIXED), constant)

    def note(self, t: Any, labels: Tensor, constant: Tensor) -> None:
        """Remember what is known of a tensor."""
        if isinstance(t, Tensor):
            shape = t.shape
            self._flows[id(t)] = t, Flow(labels.expand(shape).long().cpu(), constant.expand(shape).bool().cpu())

    def forget(self, t: Any) -> None:
        """Nothing is known of these tensors."""
        for tensor in tensors_in([t]):
            self._flows.pop(id(tensor), None)

    def pin(self, tensors: Iterable[Tensor], reason: str) -> None:
        """The channels in these tensors have to stay; so do the tensors themselves, if they are the module's own."""
        for t in tensors:
            if (name := self.name(t)) is not None:
                self.units.pin_tensor(name, reason)
            elif id(t) in self._flows:
                self.units.pin(self._flows[id(t)][1].labels, reason)


def barrier(tracer: Tracer, call: Call) -> Any:
    """The rule of functions of which nothing is known: the channels that reach them have to stay."""
    out = call.run()
    if any(True for _ in tensors_in([out])) or call.name == "setitem":
        tracer.pin(call.tensors(), call.where)
        tracer.forget(out if call.name != "setitem" else call.args[0])
    return out


def along(labels: Tensor, axis: int) -> Tensor | None:
    """Labels `[size]` along an axis if they depend on nothing else (padding aside), else None."""
    moved = labels.movedim(axis, 0).flatten(1)
    high, low = moved.amax(1), moved.amin(1)
    first = torch.where(high > 0, high, low)
    return first if bool(((moved == first[:, None]) | (moved == BLANK)).all()) else None


def varies(labels: Tensor, axis: int) -> bool:
    """Whether labels differ along an axis."""
    return bool((labels != labels.narrow(axis, 0, 1)).any())


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in nested lists, tuples and mappings, and in the attributes of other objects that hold any."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, Mapping):
            yield from tensors_in(value.values())
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)
        elif hasattr(value, "__dataclass_fields__") or hasattr(value, "logits"):
            yield from tensors_in(vars(value).values())


def plain_name(func: Callable) -> str:
    """The name of a torch function without the marks of its variants (in place, reflected, method, property)."""
    name = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    if name.startswith("__"):
        bare = name.strip("_")
        return bare[1:] if bare[0] in "ir" and bare[1:] in OPERATORS else bare
    return name.rstrip("_")


OPERATORS = {"add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor", "floordiv", "mod"}
