r"""A sketch of the metric in place of the inputs that it was made of.

    g(theta_S) ~ F^T F, F [r, D]         |g - F^T F| <= error
    r(theta) = F (theta - o) - c         L(theta) = |r(theta)|^2 ~ |theta - theta_S|_g^2

L is the mean square change of the outputs in the tangent model at theta_S, the point of the sketch: there o = theta_S
and c = 0. No input is needed to know how much a step would change the outputs, and none to step without changing them.

**Several tasks.** Functions learned at several points theta_k ask for

    L(theta) = sum_k w_k |F_k (theta - theta_k)|^2 = |B (theta - o) - b|^2
    B = stack of sqrt(w_k) F_k,   b = stack of sqrt(w_k) (F_k (theta_k - o) + c_k)

for any one o, the latest point say, by which b stays small and loses no digits. With B = U S V^T,

    |B (theta - o) - b|^2 = sum_i (s_i v_i^T (theta - o) - u_i^T b)^2 + |(1 - U U^T) b|^2

The last term is what the tasks disagree about and no weights can mend; it does not depend on theta. So F = U_r^T B and
c = U_r^T b are again a sketch: the same function of theta up to this constant and the directions i > r. With a = B^+ b,
the least squares compromise of the tasks seen from o,

    0 <= L(theta) - L_r(theta) - constant = sum_{i > r} s_i^2 (v_i^T (theta - o - a))^2 <= s_{r+1}^2 |theta - o - a|^2

Errors of parts add with their weights, and s_{r+1}^2 comes on top: with g = sum_k w_k g_k and e_k the parts' errors,
|g - F^T F| <= sum_k w_k e_k + s_{r+1}^2.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fipgeo.data import Generator
from fipgeo.field import MetricField
from fipgeo.io import load_record, save_record
from fipgeo.jacobian import JacobianRoot, inner_products
from fipgeo.jacobian.rows import RowMaker
from fipgeo.linalg import Gram, LinearOperator, lanczos
from fipgeo.linalg.nodes import Dense
from fipgeo.memory.identity import Remembered, check_space, described, space_from, space_of
from fipgeo.memory.streaming import Stream, compressed
from fipgeo.metrics import Metric
from fipgeo.paths.protected import Position, Tangent
from fipgeo.space import WeightSpace

METHODS = ("eigen", "stream")
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


class Sketch(Remembered):
    """A compressed metric at a point that stands for the inputs it was made of, as a protected function.

    Make one with `Sketch.of`. It is small (`nbytes`), can be saved, merged with the sketches of other tasks and handed
    to everything that takes a protected function; a model or its inputs are not needed for that.

    Args:
        space: The weights.
        rows: F `[r, D]`, g ~ F^T F; in float16 or bfloat16 every row is stored with a scale of its own and algebra is
            in float32.
        origin: o `[D]`.
        offset: c `[r]`; None for zeros.
        error: What |g - F^T F| is at most, up to rounding.
        trace: tr g.

    Raises:
        ValueError: Shapes do not fit the space, or the dtype of the rows is none of the four.
    """

    def __init__(
        self,
        space: WeightSpace,
        rows: Tensor,
        origin: Tensor,
        *,
        offset: Tensor | None = None,
        error: float = 0.0,
        trace: float | None = None,
    ) -> None:
        if rows.dim() != 2 or rows.shape[1] != space.dim or origin.shape != (space.dim,) or not len(rows):
            raise ValueError(
                f"rows: got shape {list(rows.shape)} and an origin of shape {list(origin.shape)}, expected"
                f" [r, {space.dim}] with r at least 1, and [{space.dim}]"
            )
        if rows.dtype not in DTYPES:
            known = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
            raise ValueError(f"rows: got {rows.dtype}, expected one of {known}")
        offset = rows.new_zeros(len(rows), dtype=torch.float64) if offset is None else offset.double()
        if offset.shape != rows.shape[:1]:
            raise ValueError(f"offset: got shape {list(offset.shape)}, expected [{len(rows)}], one number a row")
        super().__init__(space)
        self._stored, self._scales = rows, None
        if rows.dtype in HALF:
            self._scales = torch.ones(len(rows), device=rows.device)
        self.origin, self.offset, self.error = origin, offset, float(error)
        self.trace = self._caught() if trace is None else float(trace)
        self._smaller: dict[int, Sketch] = {}

    @classmethod
    def of(
        cls,
        field: MetricField,
        rank: int,
        theta: Tensor | None = None,
        *,
        method: str = "eigen",
        dtype: torch.dtype | None = None,
        block: int | None = None,
        max_bytes: int = 2**30,
        generator: Generator = None,
    ) -> Sketch:
        """Sketch the metric of a field.

        | method | F | error | takes |
        | --- | --- | --- | --- |
        | "eigen" | the r strongest eigenpairs: no r rows are nearer to g | eigenvalue r + 1 | products with g |
        | "stream" | rows of R; what is weakest is left out on the way | a bound, a few times too large | one pass |

        Args:
            field: Model, inputs and geometry.
            rank: r, the rows of F; the rank of g at most is enough for no error at all.
            theta: The point `[D]`; the model's present weights when None.
            method: How, see above.
            dtype: Of the rows as they are stored; None for that of the space.
            block: Rows that "stream" collects before it merges them; None for r.
            max_bytes: Most memory for the products of "eigen".
            generator: Start vector of "eigen".

        Returns:
            The sketch.

        Raises:
            ValueError: rank is below 1, the method is unknown, or bad inputs (see `OutputMap.check`).

        Examples:
            >>> field = MetricField(nn.Linear(3, 2), torch.eye(3), "euclidean")
            >>> sketch = Sketch.of(field, 2)
            >>> sketch.num_rows, round(sketch.error, 2), round(sketch.caught, 2)
            (2, 0.33, 0.67)
        """
        if rank < 1:
            raise ValueError(f"rank: got {rank}, expected at least one row")
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, expected one of {', '.join(map(repr, METHODS))}")
        theta = field.map.point() if theta is None else theta
        root = JacobianRoot(field.function, theta, max_bytes=max_bytes)
        if method == "stream":
            found = cls._streamed(root, rank, block)
        else:
            found = cls._eigen(root, rank, generator)
        return found if dtype is None else found.to(dtype)

    @classmethod
    def _eigen(cls, root: JacobianRoot, rank: int, generator: Generator) -> Sketch:
        metric = Metric(root, root.survey.normaliser)
        most = metric.rank_bound
        spectrum = metric.spectrum(k=min(rank + 1, most), rtol=1e-4, generator=generator)
        assert spectrum.vectors is not None and spectrum.residuals is not None
        values, vectors = spectrum.values.clamp(min=0)[:rank], spectrum.vectors[:rank]
        rows = (values.double().sqrt()[:, None] * vectors.double()).to(root.dtype)
        rest = float(spectrum.values[rank].clamp(min=0)) if rank < len(spectrum.values) else 0.0
        error = rest + 2 * float(spectrum.residuals[:rank].double().norm())
        trace = max(float(metric.trace().value), float(values.double().sum()))
        return cls(root.function.map.space, rows, root.theta, error=error, trace=trace)

    @classmethod
    def _streamed(cls, root: JacobianRoot, rank: int, block: int | None) -> Sketch:
        function, survey = root.function, root.survey
        rank = min(rank, root.rank_bound)
        stream = Stream(rank, root.shape[1], block, dtype=root.dtype, device=root.device)
        with function.map.frozen():
            maker = RowMaker(function, function.map.named(root.theta))
            for batch, examples, height in zip(function.batches, survey.examples, survey.rows, strict=True):
                for rows in maker.blocks(batch, examples, height):
                    stream.add(rows)
        found, count = stream.finish(), survey.normaliser
        return cls(
            function.map.space, found / count**0.5, root.theta, error=stream.bound / count, trace=stream.trace / count
        )

    @property
    def num_rows(self) -> int:
        """The rank r of the sketch."""
        return len(self._stored)

    @property
    def rows(self) -> Tensor:
        """F `[r, D]`, in float32 at least."""
        if self._scales is None:
            return self._stored
        return self._stored.float() * self._scales[:, None]

    @property
    def dtype(self) -> torch.dtype:
        """How the rows are stored."""
        return self._stored.dtype

    @property
    def caught(self) -> float:
        """The share of the trace of g that F^T F has."""
        return min(self._caught() / self.trace, 1.0) if self.trace > 0 else 1.0

    @property
    def nbytes(self) -> int:
        """Memory of the rows, their scales, the origin and the offset."""
        parts = (self._stored, self._scales, self.origin, self.offset)
        return sum(part.nbytes for part in parts if part is not None)

    def residual(self, position: Position) -> Tensor:
        """The tangent model's change of the outputs since theta_S, `[r]`: F (theta - o) - c."""
        theta = position.theta
        return self.rows.to(theta) @ (theta - self.origin.to(theta)) - self.offset.to(theta)

    def tangent(self, position: Position, max_bytes: int = 2**30) -> Tangent:
        """F, at every position."""
        del max_bytes
        return SketchTangent(self.rows.to(position.theta))

    def subset(self, max_rows: int, generator: torch.Generator | None = None) -> Sketch:
        """The sketch of its strongest `max_rows` directions; nothing is drawn."""
        del generator
        return self.truncated(max_rows)

    def truncated(self, rank: int) -> Sketch:
        """The sketch of its strongest directions, what is left out added to the error; made once for every rank.

        Raises:
            ValueError: rank is below 1.
        """
        if rank < 1:
            raise ValueError(f"rank: got {rank}, expected at least one row")
        if rank >= self.num_rows:
            return self
        if rank not in self._smaller:
            rows, offset, left = compressed(self.rows, self.offset, rank)
            self._smaller[rank] = Sketch(
                self.space, rows, self.origin, offset=offset, error=self.error + left, trace=self.trace
            ).to(self.dtype)
        return self._smaller[rank]

    def merge(self, other: Sketch, *, weights: Sequence[float] = (1.0, 1.0), rank: int | None = None) -> Sketch:
        """One sketch for this function and another's, g = w_1 g_1 + w_2 g_2 (see the top of this module).

        Args:
            other: A sketch of the same weights, at any point; o is its origin afterwards.
            weights: w_1 and w_2.
            rank: Rows of the result; None for the larger of the two.

        Raises:
            ValueError: The sketches are of other weights, a weight is not positive, or rank is below 1.
        """
        check_space(self.space, other.space, "other")
        if len(weights) != 2 or not all(0 < w < float("inf") for w in weights):
            raise ValueError(f"weights: got {list(weights)}, expected two positive numbers")
        rank = max(self.num_rows, other.num_rows) if rank is None else rank
        if rank < 1:
            raise ValueError(f"rank: got {rank}, expected at least one row")
        dtype = torch.promote_types(self.rows.dtype, other.rows.dtype)
        origin, parts, offsets = other.origin, [], []
        for part, weight in zip((self, other), weights, strict=True):
            rows = part.rows.to(origin.device, dtype)
            shift = rows @ (part.origin.to(origin) - origin).to(dtype)
            parts.append(weight**0.5 * rows)
            offsets.append(weight**0.5 * (shift.double() + part.offset.to(origin.device)))
        rows, offset, left = compressed(torch.cat(parts), torch.cat(offsets), rank)
        error = weights[0] * self.error + weights[1] * other.error + left
        trace = weights[0] * self.trace + weights[1] * other.trace
        merged = Sketch(other.space, rows, origin, offset=offset, error=error, trace=trace)
        return merged.to(self.dtype) if self.dtype == other.dtype else merged

    def to(self, target: torch.dtype | torch.device | str) -> Sketch:
        """The sketch in another storage dtype or on another device.

        Rounding to fewer digits adds |F - F'| (|F| + |F'|) to the error, F' the rounded rows.
        """
        if not isinstance(target, torch.dtype):
            space = WeightSpace(self.space.shapes, self.space.dtype, torch.device(target), self.space.aliases)
            moved = [t.to(target) for t in (self._stored, self.origin, self.offset)]
            out = Sketch(space, moved[0], moved[1], offset=moved[2], error=self.error, trace=self.trace)
            out._scales = None if self._scales is None else self._scales.to(target)
            return out
        if target == self.dtype:
            return self
        rows = self.rows
        scales = rows.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny).float() if target in HALF else None
        stored = rows.to(target) if scales is None else (rows / scales[:, None]).to(target)
        out = Sketch(self.space, stored, self.origin, offset=self.offset, error=self.error, trace=self.trace)
        out._scales = scales
        if torch.finfo(target).eps > torch.finfo(rows.dtype).eps:
            gap = _norm(rows - out.rows.to(rows.dtype))
            out.error += gap * (2 * _norm(rows) + gap)
        return out

    def measured_error(self, metric: Metric, generator: Generator = None) -> float:
        """|g - F^T F| as Lanczos finds it, to two digits: what `error` bounds. Products with the metric.

        Args:
            metric: g at the point of the sketch, on its inputs or on others.
            generator: Start vector.
        """
        rest = metric.operator - Gram(Dense(self.rows.to(metric.root.device, metric.root.dtype)))
        return abs(float(lanczos(rest, 1, rtol=1e-2, generator=generator).values[0]))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the sketch to one `.safetensors` file (see `save_record`)."""
        tensors = {"rows": self._stored, "origin": self.origin, "offset": self.offset}
        if self._scales is not None:
            tensors["scales"] = self._scales
        meta = described(self.space) | {"error": self.error, "trace": self.trace}
        save_record(path, tensors, meta, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | WeightSpace | None = None) -> Sketch:
        """Read a sketch.

        Args:
            path: The file.
            model: Module or space whose weights it is to be of; None to take its word.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file holds no sketch, or one of other weights.
        """
        tensors, meta = load_record(path)
        space = space_from(meta, path)
        if model is not None:
            check_space(space, space_of(model, space.names), "model")
        found = cls(
            space,
            tensors["rows"],
            tensors["origin"],
            offset=tensors["offset"],
            error=meta["error"],
            trace=meta["trace"],
        )
        found._scales = tensors.get("scales", found._scales)
        return found

    def __repr__(self) -> str:
        """Size and quality."""
        rows, dim = self._stored.shape
        kind = str(self.dtype).removeprefix("torch.")
        return f"Sketch({rows} x {dim} in {kind}, error <= {self.error:.3g}, {self.caught:.1%} of the trace)"

    def _caught(self) -> float:
        return float(torch.linalg.vector_norm(self.rows, dim=1).double().square().sum())


class SketchTangent(Tangent):
    """The rows of a sketch as steps use them.

    Args:
        rows: F `[r, D]`.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.rank_bound = rows, min(rows.shape)

    @property
    def root(self) -> LinearOperator:
        """F as an operator."""
        return Dense(self.rows)

    def columns(self, free: Tensor) -> Tensor:
        """The columns of F at free weights."""
        return self.rows if bool(free.all()) else self.rows[:, free]

    def prepare(self) -> LinearOperator:
        """F as an operator."""
        return self.root

    def cost(self, *, columns: bool) -> float:
        """No model evaluation."""
        del columns
        return 0.0


def _norm(rows: Tensor) -> float:
    """Spectral norm of `[r, D]`."""
    return float(torch.linalg.eigvalsh(inner_products(rows, rows, single=True))[-1].clamp(min=0)) ** 0.5
