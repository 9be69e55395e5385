r"""What the linear maps of a network saw, in place of the inputs.

A linear map y = W x + b stays what it is on all inputs that it saw if W x + b does, and a network does if its maps do:

    L(theta) = sum over maps of tr (W - W_S) A (W - W_S)^T / s        A = mean (x, 1) (x, 1)^T,  s = tr A / size of A

with b as the last column of W. Unlike a metric of the outputs, whose directions turn as the weights move, this says the
same at every point: for L = 0 the old outputs are exactly what they were. It asks for more, so it leaves less room.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fipgeo.data import Generator
from fipgeo.field import MetricField
from fipgeo.io import load_record, save_record
from fipgeo.linalg import Function, LinearOperator
from fipgeo.memory.identity import Remembered, check_space, described, space_from, space_of
from fipgeo.paths.kept import Kept
from fipgeo.paths.layers import LayerGram, layer_grams
from fipgeo.paths.protected import Position, Solver, Tangent
from fipgeo.space import WeightSpace


@dataclass(frozen=True, eq=False)
class Map:
    """One linear map of the network.

    Attributes:
        weight: Name of its weights.
        bias: Name of its bias, None where it has none.
        groups: Parts that share no input.
        transposed: Whether the weights are `[in, out]`.
        moments: A `[groups, k, k]` in float64, k = in + 1 with a bias and in without.
    """

    weight: str
    bias: str | None
    groups: int
    transposed: bool
    moments: Tensor

    @classmethod
    def of(cls, gram: LayerGram) -> Map:
        """The map of which moments were taken."""
        moments = gram.gram
        if gram.bias is not None:
            moments = torch.cat([moments, gram.mean[:, None]], 1)
            ones = torch.ones_like(gram.mean[:, :1])
            moments = torch.cat([moments, torch.cat([gram.mean, ones], 1)[:, :, None]], 2)
        return cls(gram.weight, gram.bias, gram.groups, gram.transposed, moments)

    @property
    def scaled(self) -> Tensor:
        """A / s, of mean eigenvalue one."""
        return self.moments / self.moments.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-300)

    def rows(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """(W, b) as `[groups, out / groups, k]`."""
        weight = tensors[self.weight]
        matrix = weight.T if self.transposed else weight.flatten(1)
        if self.bias is not None:
            matrix = torch.cat([matrix, tensors[self.bias][:, None]], 1)
        return matrix.reshape(self.groups, -1, matrix.shape[1])

    def restored(self, rows: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """`rows` undone, by name."""
        matrix, out = rows.reshape(-1, rows.shape[-1]), {}
        if self.bias is not None:
            matrix, out[self.bias] = matrix[:, :-1], matrix[:, -1]
        out[self.weight] = (matrix.T if self.transposed else matrix).reshape(shapes[self.weight])
        return out


class LayerSketch(Remembered):
    """The inputs of all linear maps, by their second moments, as a protected function (see the top of this module).

    Weights of nothing linear (scales of normalisation layers, embeddings that are looked up) count with |theta -
    theta_S|^2, so that they are held about as strongly as the mean direction of a map. Norms' statistics must stay.

    Args:
        space: The weights.
        maps: The linear maps.
        origin: theta_S `[D]`.

    Examples:
        >>> net, x = nn.Linear(3, 2), torch.tensor([[1.0, 0.0, 0.0]])
        >>> sketch = LayerSketch.of(MetricField(net, x))
        >>> from fipgeo.optim import FIP
        >>> before, optimizer = net(x).detach(), FIP(net.named_parameters(), sketch, damping=0)
        >>> net(torch.eye(3)).square().sum().backward()
        >>> optimizer.step()
        >>> torch.allclose(net(x), before, atol=1e-6)
        True
    """

    def __init__(self, space: WeightSpace, maps: tuple[Map, ...], origin: Tensor) -> None:
        super().__init__(space)
        self.maps, self.origin = maps, origin
        self.eigen = [(e.clamp(min=0), v) for e, v in (torch.linalg.eigh(m.scaled) for m in maps)]
        self._roots = [_assembled(e.sqrt(), v).to(space.dtype) for e, v in self.eigen]

    @classmethod
    def of(cls, field: MetricField, *, positions: int | None = 64, generator: Generator = None) -> LayerSketch:
        """Sketch what the maps of a field's model see on its inputs, at the model's present weights.

        Args:
            field: Model and inputs; the geometry plays no part.
            positions: Positions of every example that convolutions and the like are looked at, drawn at random; None
                for all.
            generator: Source of these draws.

        Raises:
            ValueError: Bad inputs (see `OutputMap.check`).
        """
        theta = field.map.point()
        kept = Kept.of(field.function, theta)
        grams = layer_grams(kept, Position(theta), positions=positions, generator=generator)
        return cls(field.map.space, tuple(map(Map.of, grams.values())), theta)

    @property
    def num_rows(self) -> int:
        """As many as there are weights, D."""
        return self.space.dim

    @property
    def nbytes(self) -> int:
        """Memory of the moments and the origin."""
        return sum(m.moments.nbytes for m in self.maps) + self.origin.nbytes

    def residual(self, position: Position) -> Tensor:
        """(W - W_S) (A / s)^{1/2} of all maps, `[D]`."""
        return self.apply(self._roots, position.theta - self.origin.to(position.theta))

    def tangent(self, position: Position, max_bytes: int = 2**30) -> Tangent:
        """The same at every position."""
        del position, max_bytes
        return LayerTangent(self)

    def subset(self, max_rows: int, generator: torch.Generator) -> LayerSketch:
        """Itself."""
        del max_rows, generator
        return self

    def apply(self, matrices: list[Tensor], v: Tensor) -> Tensor:
        """(W, b) M of every map for a vector `[..., D]` of weights; the others as they are."""
        if v.dim() > 1:
            return torch.stack([self.apply(matrices, part) for part in v])
        tensors, slices, out = self.space.unravel(v), self.space.slices(), v.clone()
        for m, matrix in zip(self.maps, matrices, strict=True):
            rows = m.rows(tensors)
            for name, part in m.restored(rows @ matrix.to(rows), self.space.shapes).items():
                out[slices[name]] = part.reshape(-1)
        return out

    def merge(self, other: LayerSketch, *, weights: tuple[float, float] = (1.0, 1.0)) -> LayerSketch:
        """One sketch for this task and another, without loss.

        The sum of w_k tr (W - W_k) A_k (W - W_k)^T over two tasks is, up to a constant, one such term with
        A = w_1 A_1 + w_2 A_2 about the point (w_1 W_1 A_1 + w_2 W_2 A_2) A^+.

        Raises:
            ValueError: The sketches are of other weights or maps, or a weight is not positive.
        """
        check_space(self.space, other.space, "other")
        if [(m.weight, m.bias) for m in self.maps] != [(m.weight, m.bias) for m in other.maps]:
            raise ValueError("other: sketches other linear maps than this one; make both of the same model")
        if not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights: got {list(weights)}, expected two positive numbers")
        first, second = weights
        origin = (first * self.origin + second * other.origin.to(self.origin)) / (first + second)
        ends = [self.space.unravel(s.origin.double()) for s in (self, other)]
        maps, tensors = [], self.space.unravel(origin)
        for one, two in zip(self.maps, other.maps, strict=True):
            a, b = first * one.moments, second * two.moments
            joint = replace(one, moments=a + b)
            pulled = one.rows(ends[0]) @ a + two.rows(ends[1]) @ b
            values, vectors = torch.linalg.eigh(joint.moments)
            inverse = _assembled(_inverted(values.clamp(min=0), 0.0), vectors)
            aside = joint.rows(tensors).double()
            centre = aside + (pulled - aside @ joint.moments) @ inverse
            tensors = tensors | {n: t.to(origin) for n, t in joint.restored(centre, self.space.shapes).items()}
            maps.append(joint)
        return LayerSketch(self.space, tuple(maps), self.space.ravel(tensors))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the sketch to one `.safetensors` file (see `save_record`)."""
        tensors = {str(i): m.moments for i, m in enumerate(self.maps)} | {"origin": self.origin}
        maps = [[m.weight, m.bias, m.groups, m.transposed] for m in self.maps]
        save_record(path, tensors, described(self.space) | {"maps": maps}, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | WeightSpace | None = None) -> LayerSketch:
        """Read a sketch; checked against the weights of a model if one is given.

        Raises:
            ValueError: The file holds none, or one of other weights.
        """
        tensors, meta = load_record(path)
        if "maps" not in meta:
            raise ValueError(f"{str(path)!r} holds no layer sketch; pass a file that LayerSketch.save wrote")
        space = space_from(meta, path)
        if model is not None:
            own = space_of(model, list(space.shapes))
            check_space(own, space, "path")
            space = own
        maps = tuple(Map(w, b, g, t, tensors[str(i)]) for i, (w, b, g, t) in enumerate(meta["maps"]))
        return cls(space, maps, tensors["origin"].to(space.device))


class LayerTangent(Tangent):
    """The derivative of a layer sketch's residual, the same everywhere.

    Args:
        sketch: The sketch.
    """

    def __init__(self, sketch: LayerSketch) -> None:
        self.sketch, self.rank_bound = sketch, sketch.space.dim

    @property
    def root(self) -> LinearOperator:
        """The weights of every map times (A / s)^{1/2}: a symmetric operator."""
        s = self.sketch

        def product(v: Tensor) -> Tensor:
            return s.apply(s._roots, v)

        dim = s.space.dim
        return Function(product, None, (dim, dim), dtype=s.space.dtype, device=s.space.device, psd=True)

    def columns(self, free: Tensor) -> Tensor:
        """The chosen columns, one product each."""
        unit = torch.eye(self.sketch.space.dim, dtype=self.sketch.space.dtype, device=self.sketch.space.device)
        return self.root(unit[free]).T

    def prepare(self) -> LinearOperator:
        """The root itself."""
        return self.root

    def cost(self, *, columns: bool) -> float:
        """No model evaluation."""
        del columns
        return 0.0

    def solver(self, free: Tensor) -> Solver | None:
        """(A / s + mu)^{-1} of every map, where its weights and bias are all free or all fixed."""
        s = self.sketch
        parts = s.space.unravel(free)
        names = list(_names(s.maps))
        if any(bool(parts[n].any()) != bool(parts[n].all()) for n in names):
            return None
        if any(m.bias is not None and bool(parts[m.bias].any()) != bool(parts[m.weight].any()) for m in s.maps):
            return None
        mask, known = free.to(s.space.dtype), dict[float, list[Tensor]]()

        def solve(x: Tensor, mu: float) -> Tensor:
            if mu not in known:
                known.clear()
                known[mu] = [_assembled(_inverted(e, mu), v).to(s.space.dtype) for e, v in s.eigen]
            inside = s.apply(known[mu], x)
            for name in s.space.shapes.keys() - set(names):
                inside[s.space.slices()[name]] /= 1 + mu
            return inside * mask

        traces = (float(m.scaled.diagonal(dim1=1, dim2=2).sum()) * _height(m, s.space, parts) for m in s.maps)
        others = sum(float(parts[n].sum()) for n in s.space.shapes.keys() - set(names))
        return Solver(solve, sum(traces) + others)


def _height(m: Map, space: WeightSpace, free: Mapping[str, Tensor]) -> float:
    """Outputs of a group of a map; 0 where the map is fixed."""
    return m.rows({n: torch.empty(space.shapes[n]) for n in (m.weight, m.bias) if n}).shape[1] * bool(
        free[m.weight].any()
    )


def _names(maps: tuple[Map, ...]) -> Iterator[str]:
    """Weights and biases of linear maps."""
    for m in maps:
        yield m.weight
        if m.bias is not None:
            yield m.bias


def _assembled(values: Tensor, vectors: Tensor) -> Tensor:
    """V diag(values) V^T of stacks."""
    return (vectors * values[..., None, :]) @ vectors.mT


def _inverted(values: Tensor, mu: float) -> Tensor:
    """1 / (value + mu); for mu = 0 the pseudo-inverse."""
    if mu > 0:
        return 1 / (values + mu)
    seen = values > 1e-10 * values.amax(-1, keepdim=True)
    return torch.where(seen, 1 / torch.where(seen, values, 1), 0)
