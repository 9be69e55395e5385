"""Where parameters meet activations: the linear maps inside a forward pass, found while it runs.

Most parameters act on an activation x by a map that is linear in both: `x W^T`, a convolution, a table look-up, a
scale, a shift. At such a *site* the derivative of the outputs is a product of two factors, x and the derivative by the
site's own output. A `TorchFunctionMode` sees these calls whatever module makes them, by the identity of the tensors.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Term:
    """One parameter at a site.

    Attributes:
        kind: "linear", "conv", "embedding", "scale" or "shift".
        name: The parameter.
        aligned: For "scale" and "shift", its shape as it is broadcast against the site's trailing axes.
        options: For "linear", whether the weight is `[in, out]`; for "conv", stride, padding, dilation and groups; for
            "embedding", the padding index.
        source: Place of the activation among all that were recorded; -1 for "shift", which needs none.
        inputs: Numbers in the activation for one example.
    """

    kind: str
    name: str
    aligned: tuple[int, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    source: int = -1
    inputs: int = 0


@dataclass(frozen=True)
class Site:
    """One call in the forward pass whose output is linear in parameters.

    Attributes:
        terms: The parameters.
        shape: Shape of the output.
        trail: How many of its last axes belong to one position; all axes before hold examples and positions.
    """

    terms: tuple[Term, ...]
    shape: tuple[int, ...]
    trail: int

    @property
    def numel(self) -> int:
        """Numbers in the output."""
        return math.prod(self.shape)

    @property
    def trailing(self) -> tuple[int, ...]:
        """Sizes of the trailing axes."""
        return self.shape[len(self.shape) - self.trail :]

    def arranged(self, t: Tensor, examples: int, outer: int = 0, *, major: bool = True, trail: int | None = None):
        """`t` with its examples first: `[*outer, L, *trail]` to `[*outer, n, positions, *trail]`.

        Args:
            t: A tensor with the leading axes of the site's output, after `outer` further ones.
            examples: n.
            outer: How many axes stand before.
            major: Whether the examples are the slow index of the leading axes, or the fast one.
            trail: Trailing axes of `t`, if other than those of the output.
        """
        trail = self.trail if trail is None else trail
        head, tail = t.shape[:outer], t.shape[t.dim() - trail :]
        if major:
            return t.reshape(*head, examples, -1, *tail)
        return t.reshape(*head, -1, examples, *tail).transpose(outer, outer + 1)


Found = tuple[Tensor, Term]
"""The factor that a term needs beside the derivative by the output (the activation), and the term."""

Read = tuple[list[Found], int] | None
"""What a function's output is linear in, and how many of its last axes belong to one position."""


class Recorder(TorchFunctionMode):
    """Lists the sites of a forward pass, keeps their activations, and adds a probe to every site's output.

    Args:
        names: Parameter names by `id` of the tensors in use.
        examples: n; look-ups that all examples share are repeated for each.
        probes: A list of tensors to add to the outputs of the sites, in order; their gradients are the second factors.
            Those that are missing are made, and put there; None for no probes.
        copies: Which activations to copy, since the model overwrites them later (`overwritten` of an earlier run).

    Attributes:
        sites: What was found, in order.
        inputs: The activations.
        outside: Parameters that some other function used as well, so that their sites do not tell all.
    """

    def __init__(
        self,
        names: Mapping[int, str],
        examples: int,
        probes: list[Tensor] | None = None,
        copies: Collection[int] = (),
    ) -> None:
        super().__init__()
        self.names, self.examples, self.probes, self.copies = names, examples, probes, copies
        self.sites: list[Site] = []
        self.inputs: list[Tensor] = []
        self.outside: set[str] = set()
        self._sources: dict[tuple[int, int], int] = {}
        self._originals: list[Tensor] = []  # alive, so that no `id` is given twice

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run one function, and note it if it is linear in a parameter."""
        kwargs = kwargs or {}
        used = [self.names[id(a)] for a in _flat((*args, *kwargs.values())) if id(a) in self.names]
        if not used:
            return func(*args, **kwargs)
        if func in COMPOSITE:
            with self:
                return opened(func)(*args, **kwargs)
        out = func(*args, **kwargs)
        read = self._read(func, out, args, kwargs)
        if read is None or len(read[0]) != len(used):
            if func is torch.Tensor.__setitem__ or any(isinstance(t, Tensor) and _smooth(t) for t in _flat([out])):
                self.outside.update(used)
            return out
        found, trail = read
        if out.shape[0] == 1 < self.examples and found[0][1].kind == "embedding" and out.dim() > trail:
            out = out.expand(self.examples, *out.shape[1:]).contiguous()
            found = [(x.expand(self.examples, *x.shape[1:]), term) for x, term in found]
        self.sites.append(Site(tuple(self._kept(x, term) for x, term in found), tuple(out.shape), trail))
        if self.probes is None:
            return out
        if len(self.probes) < len(self.sites):  # expanded: nothing is stored for it
            self.probes.append(out.new_zeros(()).detach().expand(out.shape).requires_grad_())
        return out + self.probes[len(self.sites) - 1].to(out.dtype)

    def _read(self, func: Callable, out: Any, args: tuple, kwargs: Any) -> Read:
        """The terms that a function's output has, if its leading axes hold examples and positions."""
        reader = READERS.get(func)
        read = None if reader is None or not isinstance(out, Tensor) else reader(self, func, out, args, kwargs)
        if read is None or not read[0]:
            return None
        lead, shared = out.shape[: out.dim() - read[1]], read[0][0][1].kind == "embedding"
        return read if lead.numel() % self.examples == 0 or (shared and lead and lead[0] == 1) else None

    def _kept(self, x: Tensor, term: Term) -> Term:
        """The term with a note of where its activation is kept."""
        return term if term.kind == "shift" else replace(term, source=self._keep(x), inputs=x.numel() // self.examples)

    def _keep(self, x: Tensor) -> int:
        """Keep an activation as it is now, once however often it is used."""
        key = (id(x), x._version)
        if key not in self._sources:
            self._sources[key] = len(self.inputs)
            self._originals.append(x)
            self.inputs.append(x.clone() if len(self.inputs) in self.copies else x)
        return self._sources[key]

    def overwritten(self) -> frozenset[int]:
        """The activations that were changed in place after they were recorded."""
        return frozenset(i for (_, version), i in self._sources.items() if self._originals[i]._version != version)

    def name(self, tensor: Any) -> str | None:
        """The name of a parameter; None for any other value."""
        return self.names.get(id(tensor))


COMPOSITE = {F.multi_head_attention_forward}
"""Python functions made of other functions, which are to be seen instead."""


def opened(func: Callable) -> Callable:
    """A Python function of torch as if no mode were active around it, so that the calls inside it are seen."""
    assert isinstance(func, types.FunctionType)
    no = dict.fromkeys(("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never)
    out = types.FunctionType(func.__code__, func.__globals__ | no, func.__name__, func.__defaults__, func.__closure__)
    out.__kwdefaults__ = func.__kwdefaults__
    return out


def _never(*args: Any) -> bool:
    del args
    return False


def _flat(values: Iterable[Any]) -> Iterator[Any]:
    """Values, and what is in lists and tuples among them."""
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flat(value)
        else:
            yield value


def _smooth(t: Tensor) -> bool:
    return t.is_floating_point() or t.is_complex()


def _bind(names: str, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = dict.fromkeys(names.split())
    return out | dict(zip(names.split(), args, strict=False)) | dict(kwargs)


def _linear(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
    a = _bind("input weight bias", args, kwargs)
    if a["weight"].dim() != 2:
        return None
    found = [(a["input"], Term("linear", seen.names[id(a["weight"])]))] if seen.name(a["weight"]) else []
    return found + _shift(seen, a["bias"], out, 1), 1


def _product(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
    a = _bind("input other", args, kwargs)
    x, weight = a["input"], a["other"] if a["other"] is not None else a.get("mat2")
    name = seen.name(weight)
    if weight is None or name is None or seen.name(x) or weight.dim() != 2 or x.dim() < 2:
        return None
    return [(x, Term("linear", name, options={"transposed": True}))], 1


def _addmm(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
    a = _bind("input mat1 mat2", args, kwargs)
    if a.keys() & {"alpha", "beta"} or seen.name(a["mat1"]) or a["input"].dim() != 1:
        return None
    name = seen.name(a["mat2"])
    found = [(a["mat1"], Term("linear", name, options={"transposed": True}))] if name else []
    return found + _shift(seen, a["input"], out, 1), 1


def _conv(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
    a = _bind("input weight bias stride padding dilation groups", args, kwargs)
    space = a["weight"].dim() - 2
    if out.dim() != space + 2:  # one image without an axis for examples
        return None
    sizes = {key: _tuple(a[key], default, space) for key, default in (("stride", 1), ("dilation", 1))}
    padding = a["padding"]
    if padding == "valid":
        padding = 0
    elif padding == "same":
        whole = [d * (k - 1) for d, k in zip(sizes["dilation"], a["weight"].shape[2:], strict=True)]
        if any(w % 2 for w in whole):
            return None
        padding = [w // 2 for w in whole]
    options = sizes | {"padding": _tuple(padding, 0, space), "groups": a["groups"] or 1}
    name = seen.name(a["weight"])
    found = [(a["input"], Term("conv", name, options=options))] if name else []
    return found + _shift(seen, a["bias"], out, 1 + space, (1,) * space), 1 + space


def _embedding(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
    a = _bind("input weight padding_idx max_norm norm_type scale_grad_by_freq sparse", args, kwargs)
    name = seen.name(a["weight"])
    if name is None or a["max_norm"] is not None or a["scale_grad_by_freq"]:
        return None
    return [(a["input"], Term("embedding", name, options={"padding_idx": a["padding_idx"]}))], 1


def _normalisation(names: str, channels_first: bool) -> Callable[..., Read]:
    """The reader of a normalisation: a scale of the normalised input, and a shift."""

    def read(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
        a = _bind(names, args, kwargs)
        weight, bias = a["weight"], a.get("bias")
        affine = [p for p in (weight, bias) if p is not None]
        if not affine:
            return None
        ones = (1,) * (out.dim() - 2) if channels_first else ()
        trail = 1 + len(ones) if channels_first else affine[0].dim()
        found = []
        if seen.name(weight):
            given = {key: value for key, value in a.items() if value is not None and key not in ("weight", "bias")}
            found = [(func(**given), Term("scale", seen.names[id(weight)], (*weight.shape, *ones)))]
        return found + _shift(seen, bias, out, trail, ones), trail

    return read


def _broadcast(kind: str) -> Callable[..., Read]:
    """The reader of `x + p` or `x * p` with a parameter p that all examples share."""

    def read(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
        if kwargs or len(args) != 2 or not all(isinstance(a, Tensor) for a in args):
            return None
        x, p = args if seen.name(args[1]) else args[::-1]
        aligned = tuple(p.shape)
        while aligned and aligned[0] == 1:
            aligned = aligned[1:]
        if seen.name(x) or len(aligned) >= out.dim() or (kind == "scale" and x.shape != out.shape):
            return None
        return [(x, Term(kind, seen.names[id(p)], aligned))], len(aligned)

    return read


def _expand(seen: Recorder, func: Callable, out: Tensor, args: tuple, kwargs: Any) -> Read:
    aligned = tuple(args[0].shape)
    if not aligned or aligned[0] != 1 or out.dim() != len(aligned) or out.shape[1:] != aligned[1:]:
        return None
    return [(args[0], Term("shift", seen.names[id(args[0])], aligned[1:]))], len(aligned) - 1


def _shift(seen: Recorder, bias: Any, out: Tensor, trail: int, ones: tuple[int, ...] = ()) -> list[Found]:
    name = seen.name(bias)
    return [(bias, Term("shift", name, (*bias.shape, *ones)))] if name else []


def _tuple(value: Any, default: int, count: int) -> tuple[int, ...]:
    value = default if value is None else value
    value = (value,) if isinstance(value, int) else tuple(value)
    return value * count if len(value) == 1 else value


READERS: dict[Callable, Callable[..., Read]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _normalisation("input normalized_shape weight bias eps", False),
    F.rms_norm: _normalisation("input normalized_shape weight eps", False),
    F.group_norm: _normalisation("input num_groups weight bias eps", True),
    F.batch_norm: _normalisation("input running_mean running_var weight bias training momentum eps", True),
    F.instance_norm: _normalisation("input running_mean running_var weight bias use_input_stats momentum eps", True),
    torch.Tensor.expand: _expand,
}
READERS |= dict.fromkeys((torch.conv1d, torch.conv2d, torch.conv3d, F.conv1d, F.conv2d, F.conv3d), _conv)
READERS |= dict.fromkeys(
    (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__), _product
)
READERS |= dict.fromkeys(
    (torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__), _broadcast("shift")
)
READERS |= dict.fromkeys(
    (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, torch.Tensor.__rmul__), _broadcast("scale")
)
