r"""What the linear maps of a network see: the second moments of their inputs, and how far their outputs have moved.

A linear map y = W x + b (a linear layer, or a convolution at one position of its output) feels its weights only through

    G = mean x x^T   [in, in]        and        C = mean (y_0 - y) x^T   [out, in]

where y_0 is the output of the same map in the start network. |W' x + b' - y_0|^2, and so the W' that is nearest to the
start, is known from these alone: no activation has to be stored. Means are over examples and positions that count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fipgeo.data import Generator
from fipgeo.jacobian.factored.capture import COMPOSITE, READERS, Read, Recorder, Term
from fipgeo.linalg import as_generator
from fipgeo.model import OutputMap
from fipgeo.outputs import over_entries
from fipgeo.paths.kept import Kept, Position

MAX_BYTES = 2**30
"""Most memory for activations and unfolded inputs at a time."""

LINEAR = {f for f, reader in READERS.items() if reader.__name__ in ("_linear", "_product", "_addmm", "_conv")}
"""Functions that multiply an activation by a weight matrix."""


@dataclass(frozen=True, eq=False)
class LayerGram:
    """Moments of the inputs x of one linear map, `in` of them for every output feature.

    Attributes:
        weight: Name of its weights.
        bias: Name of its bias, None where it has none (or none that is a coordinate).
        groups: Parts of the map that share no input (groups of a convolution; otherwise 1).
        transposed: Whether the weights are `[in, out]`.
        gram: mean x x^T, `[groups, in, in]`, float64.
        mean: mean x, `[groups, in]`, float64.
        gap: mean (y_0 - y) (x, 1)^T, `[groups, out / groups, in + 1]`, float64; None unless it was asked for.
        count: Examples times positions in the means.
    """

    weight: str
    bias: str | None
    groups: int
    transposed: bool
    gram: Tensor
    mean: Tensor
    gap: Tensor | None
    count: int

    def rows(self, weight: Tensor) -> Tensor:
        """Weights (or anything of their shape) as `[groups, out / groups, in]`."""
        matrix = weight.T if self.transposed else weight.flatten(1)
        return matrix.reshape(self.groups, -1, matrix.shape[1])

    def restored(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """`rows` undone: `[groups, out / groups, in]` in the weights' own shape."""
        matrix = rows.reshape(-1, rows.shape[-1])
        return matrix.T if self.transposed else matrix.reshape(shape)


def layer_grams(
    kept: Kept,
    position: Position,
    *,
    gaps: bool = False,
    only: Collection[str] | None = None,
    positions: int | None = 64,
    generator: Generator = None,
    max_bytes: int = MAX_BYTES,
) -> dict[str, LayerGram]:
    """The input moments of every linear map (see the head of this file), by the name of its weights, in forward order.

    Found are linear layers, convolutions (of any stride, padding, dilation and groups, unfolded) and products with a
    weight matrix inside any module, attention included. Left out are maps whose weights are no coordinates, or are used
    in another way as well (a token embedding that is also the output layer). Maps that are used several times are one:
    their moments are means over all uses. Masked positions do not count where an activation has the mask's axes first.

    Args:
        kept: The protected inputs; passed over once, or twice with `gaps`.
        position: Where the inputs of the maps are taken.
        gaps: Whether to compare outputs with the start network's, for `LayerGram.gap`.
        only: Names of the weights to look at, None for all.
        positions: Positions of every example that are looked at, drawn at random, or None for all of them.
        generator: Source of these draws.
        max_bytes: Most memory for unfolded inputs.

    Returns:
        One record for each map.

    Examples:
        >>> from torch import nn
        >>> from fipgeo import MetricField
        >>> field = MetricField(nn.Linear(3, 2), torch.eye(3))
        >>> kept = Kept.of(field.function, field.map.point())
        >>> layer_grams(kept, Position(kept.start))["weight"].gram * 3
        tensor([[[1., 0., 0.],
                 [0., 1., 0.],
                 [0., 0., 1.]]], dtype=torch.float64)
    """
    draws = as_generator(generator)
    model, start = kept.at(position).map, kept.function.map
    weights, weights0 = owned(model, position.theta), owned(start, kept.start)
    sums: dict[str, Moments] = {}
    outside: set[str] = set()
    with model.frozen():
        for batch, n in zip(kept.batches, kept.survey.examples, strict=True):
            outputs, mask, inputs = Targets(positions, draws, only), mask_of(kept, batch), kept.function.inputs(batch)
            if gaps:
                outside |= watch(start, weights0, inputs, n, outputs)

            def add(call: Call, outputs: Targets = outputs, mask: Tensor | None = mask) -> None:
                if only is not None and call.term.name not in only:
                    return
                index, target = outputs.take(call) if gaps else (call.sample(positions, draws), None)
                sums.setdefault(call.term.name, Moments(call)).add(call, index, target, mask, max_bytes)

            outside |= watch(model, weights, inputs, n, add)
    return {name: found.record() for name, found in sums.items() if name not in outside and found.count}


def owned(model: OutputMap, theta: Tensor) -> dict[str, Tensor]:
    """The weights by name, each with memory of its own."""
    return {name: t.clone() for name, t in model.named(theta).items()}


def mask_of(kept: Kept, batch: Any) -> Tensor | None:
    """Which positions of a batch count, boolean `[n, T]`; None where all do."""
    return None if kept.function.mask is None else kept.function.mask_of(batch) != 0


@dataclass(frozen=True, eq=False)
class Call:
    """One use of a linear map in a forward pass.

    Attributes:
        examples: n.
        term: The weights' part.
        bias: Name of the bias, or None.
        x: The activation.
        out: Its image.
        inside: Whether torch's own attention made the call, in which positions come before examples.
        again: Calls the function once more, with the weights as they are then.
    """

    examples: int
    term: Term
    bias: str | None
    x: Tensor
    out: Tensor
    inside: bool
    again: Callable[[], Tensor]

    @property
    def groups(self) -> int:
        """Parts that share no input."""
        return self.term.options.get("groups", 1)

    def sample(self, positions: int | None, generator: torch.Generator) -> Tensor | None:
        """Which positions to look at: of the grid of a convolution, or of all rows of a matrix; None for all."""
        conv = self.term.kind == "conv"
        total = math.prod(self.out.shape[2:]) if conv else self.out.shape[:-1].numel()
        wanted = total if positions is None else positions if conv else positions * self.examples
        if wanted >= total:
            return None
        return torch.randperm(total, generator=generator)[:wanted].sort().values.to(self.out.device)

    def images(self, index: Tensor | None) -> Tensor:
        """The outputs there, `[L, out]`; example by example."""
        if self.term.kind == "conv":
            out = self.out.flatten(2)
            return (out if index is None else out[:, :, index]).transpose(1, 2).flatten(0, 1)
        out = self.out.flatten(0, -2)
        return out if index is None else out[index]

    def counting(self, index: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """Which of these rows count, boolean `[L]`; None for all."""
        if mask is None or self.term.kind == "conv":
            return None
        flat = self.out.dim() == 2 and len(self.out) == mask.numel() and mask.dim() == 2
        if flat:  # examples and positions on one axis
            live = mask.T if self.inside else mask
        else:
            orders = [mask] if mask.dim() != 2 else [mask.T, mask] if self.inside else [mask, mask.T]
            fits = [m for m in orders if self.out.shape[:-1][: mask.dim()] == m.shape]
            if not fits:
                return None
            live = over_entries(fits[0], self.out[..., 0]).expand(self.out.shape[:-1])
        return live.reshape(-1).to(self.out.device) if index is None else live.reshape(-1)[index]

    def inputs(self, index: Tensor | None, max_bytes: int) -> Iterator[tuple[slice, Tensor]]:
        """The inputs there in pieces `[groups, l, in]`, each with the rows of `images` that it belongs to."""
        if self.term.kind != "conv":
            x = self.x.flatten(0, -2)
            x = x if index is None else x[index]
            step = max(max_bytes // (8 * x.shape[1] * x.element_size()), 1)
            for first in range(0, len(x), step):
                yield slice(first, first + step), x[None, first : first + step]
            return
        x, places = self._padded(), self._places(index)
        per_image, n = len(places), len(x)
        width = x.shape[1] * places.shape[1]
        step = max(max_bytes // (8 * per_image * width * x.element_size()), 1)
        for first in range(0, n, step):
            part = x[first : first + step].flatten(2)[:, :, places.reshape(-1)]  # [n, C, P * K]
            part = part.unflatten(2, places.shape).unflatten(1, (self.groups, -1))  # [n, g, C/g, P, K]
            rows = part.permute(1, 0, 3, 2, 4).reshape(self.groups, -1, width // self.groups)
            yield slice(first * per_image, (first + step) * per_image), rows

    def _padded(self) -> Tensor:
        padding = [p for size in reversed(self.term.options["padding"]) for p in (size, size)]
        return F.pad(self.x, padding)

    def _places(self, index: Tensor | None) -> Tensor:
        """For every position of the output the inputs that it sees, `[P, K]`, in the flattened padded grid."""
        options, device = self.term.options, self.x.device
        grid = [s + 2 * p for s, p in zip(self.x.shape[2:], options["padding"], strict=True)]
        total = self.out.shape[2:].numel()
        at = torch.arange(total, device=device) if index is None else index
        corner, offset = torch.zeros_like(at), torch.zeros(1, dtype=torch.long, device=device)
        kernel = self.term.aligned
        for axis, size in enumerate(grid):
            below = self.out.shape[3 + axis :].numel()
            where = at // below % self.out.shape[2 + axis]
            corner = corner * size + where * options["stride"][axis]
            steps = torch.arange(kernel[axis], device=device) * options["dilation"][axis]
            offset = (offset[:, None] * size + steps).reshape(-1)
        return corner[:, None] + offset


class Targets:
    """The start network's outputs at the positions drawn, kept until the present network comes by."""

    def __init__(self, positions: int | None, generator: torch.Generator, only: Collection[str] | None = None) -> None:
        self.positions, self.generator, self.only = positions, generator, only
        self.kept: dict[str, list[tuple[Tensor | None, Tensor]]] = {}

    def __call__(self, call: Call) -> None:
        """Note one use of a map in the start network."""
        if self.only is not None and call.term.name not in self.only:
            return
        index = call.sample(self.positions, self.generator)
        images = call.images(index)
        own = images if images.data_ptr() != call.out.data_ptr() else images.clone()  # a model may write into it
        self.kept.setdefault(call.term.name, []).append((index, own))

    def take(self, call: Call) -> tuple[Tensor | None, Tensor]:
        """The positions and outputs of the next use of the same map."""
        return self.kept[call.term.name].pop(0)

    def left(self, call: Call) -> int:
        """How many further uses of this map are to come."""
        return len(self.kept[call.term.name])


class Moments:
    """Running sums of (x, 1)(x, 1)^T and (y_0 - y)(x, 1)^T for one map; pieces in the map's dtype, sums in float64."""

    def __init__(self, call: Call) -> None:
        self.term, self.bias, self.groups = call.term, call.bias, call.groups  # not the call, which holds activations
        self.second: Tensor | None = None
        self.gap: Tensor | None = None
        self.count = 0

    def add(self, call: Call, index: Tensor | None, target: Tensor | None, mask: Tensor | None, max_bytes: int) -> None:
        """Add the rows of one use that count."""
        live = call.counting(index, mask)
        error = None if target is None else target - call.images(index)
        for where, x in call.inputs(index, max_bytes):
            rows = F.pad(x, (0, 1), value=1.0)
            if live is not None:
                rows = rows * live[where, None]
            second = rows.transpose(1, 2) @ rows
            self.second = second.double() if self.second is None else self.second + second
            if error is not None:
                e = error[where].unflatten(1, (call.groups, -1)).permute(1, 2, 0)
                gap = (e @ rows).double()
                self.gap = gap if self.gap is None else self.gap + gap
            self.count += rows.shape[1] if live is None else int(live[where].sum())

    def record(self) -> LayerGram:
        """The means."""
        assert self.second is not None
        second, term = self.second / self.count, self.term
        return LayerGram(
            term.name,
            self.bias,
            self.groups,
            bool(term.options.get("transposed")),
            second[:, :-1, :-1],
            second[:, -1, :-1],
            None if self.gap is None else self.gap / self.count,
            self.count,
        )


Visit = Callable[[Call], Any]
"""Called with every use of a linear map; a tensor that it returns takes the place of the map's output."""


def watch(model: OutputMap, weights: Mapping[str, Tensor], inputs: Any, examples: int, visit: Visit) -> set[str]:
    """Run the model on inputs and visit the linear maps as they are used; inside `model.frozen()`.

    Returns:
        The weights that are used in another way as well.
    """
    names = {id(t): name for name, t in weights.items()}
    with Watcher(names, examples, visit, weights) as seen:
        model.call(weights, inputs)
    several = Counter(name for name, _ in set(seen.kinds))
    return seen.outside | {name for name, kinds in several.items() if kinds > 1}


class Watcher(Recorder):
    """A recorder that keeps nothing: every linear map is handed on at once."""

    def __init__(self, names: Mapping[int, str], examples: int, visit: Visit, weights: Mapping[str, Tensor]) -> None:
        super().__init__(names, examples)
        self.visit, self.weights = visit, weights
        self.kinds: list[tuple[str, str]] = []
        self._latest: Tensor | None = None
        self._inside = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        """Run one function, and hand it on if it is a linear map."""
        before, outer = len(self.sites), self._inside
        self._inside = outer or func in COMPOSITE
        try:
            out = super().__torch_function__(func, types, args, kwargs)
        finally:
            self._inside = outer
        if func in COMPOSITE or len(self.sites) == before:
            return out
        site, x = self.sites[-1], self._latest
        term = next((t for t in site.terms if t.kind in ("linear", "conv")), None)
        if term is None or x is None:  # only the bias is a coordinate
            return out
        if term.kind == "conv":
            term = replace(term, aligned=tuple(self.weights[term.name].shape[2:]))
        bias = next((t.name for t in site.terms if t.kind == "shift"), None)
        self.kinds.append((term.name, repr((term.kind, term.options, bias))))
        changed = self.visit(
            Call(self.examples, term, bias, x, out, self._inside, lambda: func(*args, **(kwargs or {})))
        )
        return changed if isinstance(changed, Tensor) else out

    def _read(self, func: Callable, out: Any, args: tuple, kwargs: Any) -> Read:
        return super()._read(func, out, args, kwargs) if func in LINEAR else None

    def _keep(self, x: Tensor) -> int:
        self._latest = x
        return 0
