"""A linear map recorded once as the operators that depend on its input, and replayed without everything else.

`torch.func.linearize` does the same by symbolic tracing; here the operators run while they are noted, so recording
costs little more than one evaluation, and Python may look at any value that does not depend on the input.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import functionalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from fipgeo.jacobian.graphs import storages

aten = torch.ops.aten

# operators that may overwrite their first argument where nothing else looks at it any more
IN_PLACE: dict[Any, Any] = {
    aten.add.Tensor: aten.add_.Tensor,
    aten.sub.Tensor: aten.sub_.Tensor,
    aten.mul.Tensor: aten.mul_.Tensor,
    aten.div.Tensor: aten.div_.Tensor,
    aten.mul.Scalar: aten.mul_.Scalar,
    aten.div.Scalar: aten.div_.Scalar,
    aten.neg.default: aten.neg_.default,
}


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """What `aten.copy` gives, by operators that can be vectorised."""
    del non_blocking
    return source.to(target.dtype).expand_as(target)


# operators that vmap lacks, or takes for tensors of some strides only
STACKED: dict[Any, Any] = {aten.copy.default: _copy, aten.view.default: aten.reshape.default}


class NotTapedError(RuntimeError):
    """The function cannot be recorded."""


@dataclass(eq=False)
class Step:
    """One operator: its arguments with None in place of values, which values those are, and where results go.

    `stacked` is the operator for vectorised runs, where some that write in place would be slow.
    """

    operator: Any
    arguments: list[Any]
    form: Any
    inputs: dict[int, int]
    outputs: list[int | None]
    many: bool
    stacked: Any = None
    done: list[int] = field(default_factory=list)


@dataclass
class Note:
    """What is known about a value: shape, strides and dtype, and whether its memory is its own."""

    layout: tuple[Any, ...]
    own: bool


class _Recorder(TorchDispatchMode):
    """Notes every operator with an argument that depends on the inputs."""

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self.values: Any = WeakIdKeyDictionary()
        self.notes: list[Note] = []
        self.steps: list[Step] = []
        for t in inputs:
            self._add(t, own=False)

    def _add(self, t: Tensor, own: bool) -> int:
        self.values[t] = len(self.notes)
        self.notes.append(Note((t.shape, t.stride(), t.dtype), own))
        return len(self.notes) - 1

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not of use here, and it would import the compiler, which takes seconds."""
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        flat, form = tree_flatten((args, kwargs or {}))
        inputs = {i: self.values[a] for i, a in enumerate(flat) if isinstance(a, Tensor) and a in self.values}
        out = func(*args, **(kwargs or {}))
        if not inputs:
            return out
        if func._schema.is_mutable:
            raise NotTapedError(f"{func} writes into a tensor")
        if torch.Tag.data_dependent_output in func.tags:
            raise NotTapedError(f"{func} looks at a value that depends on the input")
        if not isinstance(out, Tensor | list | tuple):  # a question about shapes
            return out
        many = not isinstance(out, Tensor)
        shared = storages(a for a in flat if isinstance(a, Tensor))
        outputs: list[int | None] = []
        for o in out if many else [out]:
            own = isinstance(o, Tensor) and not many and not storages([o]).keys() & shared.keys()
            if not own:
                for value in inputs.values():
                    self.notes[value].own = False
            outputs.append(self._add(o, own) if isinstance(o, Tensor) else None)
        rest = [None if i in inputs else a for i, a in enumerate(flat)]
        self.steps.append(Step(func, rest, form, inputs, outputs, many, STACKED.get(func)))
        return out


class Tape:
    """A linear function of some tensors as a list of operators on them; everything else in it is constant.

    Args:
        function: A linear function of tensors, one tensor out. It is run once; in-place operators are made functional.
        inputs: Tensors like those that will come.

    Raises:
        NotTapedError: An operator cannot be recorded.
    """

    def __init__(self, function: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        with _Recorder(inputs) as recorder:
            out = functionalize(function)(*inputs)
        if out not in recorder.values:
            if not recorder.steps and not bool(out.any()):
                self.steps, self.out, self.zero = [], -1, out
                return
            raise NotTapedError("the result was lost on the way")
        self.out = recorder.values[out]
        self.zero: Tensor | None = None
        self.steps = _live(recorder.steps, self.out)
        _join_products(self.steps, recorder.notes, self.out)
        _mark_last_uses(self.steps, self.out)
        _overwrite(self.steps, recorder.notes)

    def __call__(self, *inputs: Tensor, stacked: bool = False) -> Tensor:
        """The function at other inputs; run it without grad mode, and with `stacked` when it is under vmap."""
        if self.zero is not None:
            return self.zero.clone()
        values: dict[int, Tensor] = dict(enumerate(inputs))
        for step in self.steps:
            flat = step.arguments.copy()
            for place, value in step.inputs.items():
                flat[place] = values[value]
            args, kwargs = tree_unflatten(flat, step.form)
            result = (step.stacked if stacked and step.stacked else step.operator)(*args, **kwargs)
            del flat, args, kwargs
            for value in step.done:
                del values[value]
            if step.many:
                values.update((v, r) for v, r in zip(step.outputs, result, strict=True) if v is not None)
            else:
                assert step.outputs[0] is not None
                values[step.outputs[0]] = result
            del result
        return values[self.out]

    def constants(self) -> list[Tensor]:
        """The tensors that the operators take besides values."""
        return [a for step in self.steps for a in step.arguments if isinstance(a, Tensor)]

    def adopt(self, tensors: Iterable[Tensor]) -> None:
        """Use these tensors in place of equal constants, so that both are in memory once."""
        known: dict[Any, list[Tensor]] = {}
        for t in tensors:
            if not t._is_zerotensor():
                known.setdefault((t.shape, t.stride(), t.dtype), []).append(t)
        for step in self.steps:
            for i, a in enumerate(step.arguments):
                if isinstance(a, Tensor) and not a._is_zerotensor():
                    twins = known.setdefault((a.shape, a.stride(), a.dtype), [])
                    twin = next((t for t in twins if t.data_ptr() == a.data_ptr() or torch.equal(t, a)), None)
                    if twin is None:
                        twins.append(a)
                    else:
                        step.arguments[i] = twin


def _live(steps: list[Step], out: int) -> list[Step]:
    """The steps that the result needs."""
    needed, kept = {out}, []
    for step in reversed(steps):
        if needed.intersection(step.outputs):
            kept.append(step)
            needed.update(step.inputs.values())
    return kept[::-1]


def _mark_last_uses(steps: list[Step], out: int) -> None:
    last = {value: step for step in steps for value in step.inputs.values()}
    for step in steps:
        step.done = sorted({v for v in step.inputs.values() if last[v] is step and v != out})
        step.done += [v for v in step.outputs if v is not None and v not in last and v != out and step.many]


def _join_products(steps: list[Step], notes: list[Note], out: int) -> None:
    """One operator for a + b @ c where the product is used once: one pass less over memory."""
    uses = Counter(value for step in steps for value in step.inputs.values())
    uses[out] += 1
    makers = {step.outputs[0]: step for step in steps if step.operator is aten.mm.default}
    for step in list(steps):
        if step.operator is not aten.add.Tensor or len(step.arguments) != 2 or set(step.inputs) != {0, 1}:
            continue
        for product, other in ((step.inputs[1], step.inputs[0]), (step.inputs[0], step.inputs[1])):
            mm = makers.get(product)
            alike = notes[product].layout == notes[other].layout
            if mm is None or uses[product] != 1 or not alike:
                continue
            steps.remove(mm)
            inputs = {0: other} | {place + 1: value for place, value in mm.inputs.items()}
            step.operator, step.arguments, step.inputs = aten.addmm.default, [None, *mm.arguments], inputs
            step.form = tree_flatten((tuple(step.arguments), {}))[1]
            break


def _overwrite(steps: list[Step], notes: list[Note]) -> None:
    """Let operators write into their first argument where it is not used again."""
    for step in steps:
        replacement = aten.addmm_.default if step.operator is aten.addmm.default else IN_PLACE.get(step.operator)
        target = step.inputs.get(0)
        if replacement is None or target is None or list(step.inputs.values()).count(target) > 1:
            continue
        result = step.outputs[0]
        assert result is not None
        if target in step.done and notes[target].own and notes[target].layout == notes[result].layout:
            step.stacked = aten.addmm.default if replacement is aten.addmm_.default else replacement
            step.operator = replacement
