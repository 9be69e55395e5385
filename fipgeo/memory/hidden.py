r"""What all linear maps of a frozen network see of an input, as one row of features.

    h(x) = the inputs of every linear map, averaged over the cells of a coarse grid, each number standardised

A convolution sees an image [C, H, W]: its mean over each of k by k parts is kept, C k^2 numbers. A map
that sees tokens [T, C] gives their mean over the positions that count. Deep layers know what the network was trained
for; early ones know the rest, which a new task may need.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipgeo.data import Batches, Generator, ListBatches
from fipgeo.field import MetricField
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.linalg import as_generator
from fipgeo.model import default_forward
from fipgeo.outputs import Euclidean, widened
from fipgeo.paths.layers import Call, Watcher, owned
from fipgeo.trees import input_tensors

POOL = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
FINEST = 3
WIDTH = 2560
"""Default of the most features: a system of so many equations is solved in seconds."""


class HiddenFeatures(nn.Module):
    """A frozen copy of a network that gives its hidden activations, x to h(x) `[n, F]`, without gradient.

    Found are the linear maps that `LayerSketch` knows, attention included; of several that see the same (queries, keys
    and values) one counts. Numbers that are the same for all `inputs` are left out. Where there are more than `width`,
    they become that many rectified random projections relu(P h + b), P ~ N(0, 1 / F) and b ~ N(0, 1 / 4).

    Args:
        field: Model, which is copied, and inputs, by which numbers are standardised. Its mask says which positions
            count; its geometry and its choice of parameters play no part (a frozen network needs `params="*"`).
        cells: Parts of each axis of what a convolution sees; an axis that is shorter stays as it is. None for 3, or 2
            or 1 where that makes more than `width` numbers.
        width: Most features; None for as many as there are.
        generator: Source of P and b.

    Attributes:
        num_features: F.

    Raises:
        ValueError: cells or width is not positive, no linear map sees the inputs, or they are bad. When called: the
            batch went through other maps than `inputs` did.

    Source: random projections before a linear classifier are from RanPAC (McDonnell et al., NeurIPS 2023,
    arXiv:2307.02251).

    Examples:
        >>> net, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 3)
        >>> features = HiddenFeatures(MetricField(net, x))
        >>> features(x).shape, features(x).mean(0).abs().max() < 1e-4
        (torch.Size([64, 11]), tensor(True))
    """

    places: Tensor
    mean: Tensor
    scale: Tensor
    projection: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        field: MetricField,
        *,
        cells: int | None = None,
        width: int | None = WIDTH,
        generator: Generator = None,
    ) -> None:
        super().__init__()
        if min(cells or 1, width or 1) < 1 or 0 in (cells, width):
            raise ValueError(f"cells, width: got {cells} and {width}, expected at least 1, or None")
        self.model = copy.deepcopy(field.map.module).requires_grad_(False)
        self._map, self.mask = field.map.with_module(self.model), field.function.mask
        for name in ("places", "mean", "scale", "projection", "shift"):
            self.register_buffer(name, None)
        batches = field.function.batches
        self._map.check(batches.first())
        for self.cells in (FINEST, 2, 1) if cells is None else (cells,):
            if self._choose(batches.first()) <= (width or math.inf):
                break
        self._standardise(batches)
        self._project(width, generator)

    @property
    def num_features(self) -> int:
        """F."""
        return len(self.places) if self.projection is None else self.projection.shape[1]

    def forward(self, batch: Any) -> Tensor:
        """Features `[n, F]` of a batch (of its inputs, where it holds labels too)."""
        return self.both(batch)[0]

    def both(self, batch: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Features `[n, F]` of a batch, and the outputs of the network on it."""
        found, outputs = self._seen(batch)
        names = [name for name, _ in found]
        if names != self._names:
            raise ValueError(
                f"batch: went through {len(names)} linear maps, those that features were made of through"
                f" {len(self._names)}, or through others; features need a network that takes one way for all inputs"
            )
        h = (self._joined(found) - self.mean) / self.scale
        if self.projection is not None and self.shift is not None:
            h = (h @ self.projection + self.shift).relu()
        return h, outputs

    def _choose(self, first: Any) -> int:
        """Which maps count, by the first batch: of several that see the same, one. How many numbers that makes."""
        found, _ = self._seen(first)
        if not found:
            raise ValueError("model: no linear map sees the inputs example by example; there are no hidden features")
        self._names = [name for name, _ in found]
        self._blocks = [i for i, (_, rows) in enumerate(found) if not any(_same(rows, r) for _, r in found[:i])]
        self.places = torch.arange(sum(found[i][1].shape[1] for i in self._blocks), device=found[0][1].device)
        return len(self.places)

    def _standardise(self, batches: Batches) -> None:
        """The numbers that vary, their means and deviations, by all inputs."""
        count, total, squares = 0, 0.0, 0.0
        dtype = torch.float32
        for batch in batches:
            found = self._joined(self._seen(batch)[0])
            rows, dtype = found.double(), found.dtype
            count, total, squares = count + len(rows), total + rows.sum(0), squares + rows.square().sum(0)
        mean = torch.as_tensor(total / count)
        scale = torch.as_tensor(squares / count - mean.square()).clamp(min=0).sqrt()
        varied = scale > 1e-6 * (mean.abs() + scale.mean())
        if not bool(varied.any()):
            raise ValueError(f"inputs: nothing that the network computes differs between the {count} inputs")
        self.places, self.mean, self.scale = (t[varied] for t in (self.places, mean, scale))
        self.mean, self.scale = self.mean.to(dtype), self.scale.to(dtype)

    def _project(self, width: int | None, generator: Generator) -> None:
        """Draw P and b where there are more numbers than features are wanted."""
        count, random = len(self.places), as_generator(generator)
        if width is not None and count > width:
            drawn = torch.randn(count + 1, width, generator=random, dtype=torch.float64).to(self.mean)
            self.projection, self.shift = drawn[:-1] / count**0.5, drawn[-1] / 2

    def _joined(self, found: list[tuple[str, Tensor]]) -> Tensor:
        """The numbers that count, `[n, F_0]`."""
        return torch.cat([found[i][1] for i in self._blocks], 1)[:, self.places]

    def _seen(self, batch: Any) -> tuple[list[tuple[str, Tensor]], tuple[Tensor, ...]]:
        """What every linear map saw, in the order of the forward pass, with its name, and the outputs."""
        model = self._map.with_module(self.model)  # anew, as the module may have moved
        if model.caller.forward_fn is default_forward and isinstance(batch, tuple | list):
            batch = batch[0]  # labels are neither the network's nor the mask's
        function = EmbeddedOutputs(model, Euclidean(), ListBatches([batch]), self.mask)
        weights, n = owned(model, model.point()), len(next(input_tensors(batch)))
        mask = None if self.mask is None else function.mask_of(batch) != 0
        found: list[tuple[str, Tensor]] = []

        def add(call: Call) -> None:
            rows = pooled(call, self.cells, mask)
            if rows is not None:
                found.append((call.term.name, rows))

        with model.frozen(), Watcher({id(t): name for name, t in weights.items()}, n, add, weights):
            outputs = model.call(weights, batch)
        return found, outputs


def pooled(call: Call, cells: int, mask: Tensor | None) -> Tensor | None:
    """What a linear map saw of every example, `[n, C]`, as means over cells or positions; None where it saw several.

    Args:
        call: One use of the map.
        cells: Parts of each axis of a convolution's input.
        mask: Which positions count, boolean `[n, T]`.
    """
    x, n = widened(call.x), call.examples
    if call.term.kind == "conv":
        grid = [min(cells, size) for size in x.shape[2:]]
        return POOL[len(grid)](x, grid).flatten(1) if len(x) == n else None
    axis = next((i for i in ((1, 0) if call.inside else (0, 1)) if x.dim() > i + 1 and x.shape[i] == n), None)
    if axis is None and len(x.flatten(0, -2)) % n:
        return None
    rows = x.flatten(0, -2)
    live = call.counting(None, mask)
    weight = rows.new_ones(len(rows)) if live is None else live.to(rows)
    rows = torch.cat([rows * weight[:, None], weight[:, None]], 1)
    fast = axis == 1 or (axis is None and call.inside)  # examples are the fast index of the rows
    sums = rows.unflatten(0, (-1, n)).sum(0) if fast else rows.unflatten(0, (n, -1)).sum(1)
    return sums[:, :-1] / sums[:, -1:].clamp(min=1)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
