r"""Sketches: S random rows per example in place of M, for models with too many outputs to differentiate one by one.

    z_{n,s} = sum_t omega_{n,t,s} . phi(f_{n,t}) / sqrt(S)        signs omega, any geometry
    z_{n,s} = sum_t log p(y_{n,t,s} | f_{n,t}) / sqrt(S)          labels y drawn from the model, Fisher geometries

**The expectation is the metric.** Let x_t be the derivative along v of the summand of position t, for one example and
one sample. With signs x_t = omega_t . (J_t v), where E omega omega^T = I, so E x_t^2 = |J_t v|^2; distinct positions
have independent omega of mean zero, so E x_t x_t' = 0. With labels x_t = u(y_t) . v with the score
u(y) = d log p(y) / d theta; its mean sum_y p(y) u(y) is d(sum_y p(y)) / d theta = 0 and E u u^T is the Fisher of the
position by definition, so again E x_t x_t' = 0 for independent labels: the positions of a row may be added up first and
squared afterwards. Summed over the S samples and divided by S this makes E R^T R the sum over examples and positions,
whatever S is.

Draws are made once, at the point of the metric, by a counter-based generator: they depend on the seed, on the index of
the example in the data and on the position in the example, and on nothing else. They travel with the batch, so that
batches can be cut into examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Batches, Generator, ListBatches, as_generator
from fipgeo.jacobian.embedded import EmbeddedOutputs, changeable
from fipgeo.linalg import Estimate, LinearOperator
from fipgeo.outputs import Bernoulli, Categorical, Geometry, as_geometry, positions, replaced, widened

BLOCK = 2**23
"""Probabilities that are in memory at once, in float64, while labels are drawn."""

STACK = 16
"""Products with R^T that are taken at once."""

ROWS = ("example", "position")


@dataclass(frozen=True)
class Sketched(Geometry):
    """A geometry seen through S random rows per example: the same metric in expectation, for any number of outputs.

    For `Categorical` and `Bernoulli` the rows are log-likelihoods of labels drawn from the model at the point of the
    metric; other geometries get random signs. Memory is that of the outputs, plus S labels per position (for
    `Bernoulli` S bits per output, stored as bytes); with signs, reverse mode keeps S bytes per output.

    The sketch is a metric at one point: paths, which compare outputs of two points, take the geometry itself.

    Attributes:
        geometry: What is sketched, by name or itself.
        num_samples: S. The standard error of v^T g v falls with sqrt(S N) (see `sketch_error`).
        seed: Another one gives an independent sketch of the same metric.
        rows: "example" adds the positions of an example up to S rows; "position" keeps S rows for every position,
            which takes T times the rows and leaves out the noise of products between positions.

    Raises:
        ValueError: `num_samples` is less than 1, `rows` is unknown, or the geometry is a sketch already.

    Examples:
        >>> Sketched("categorical", num_samples=4)
        Sketched(geometry=Categorical(temperature=1.0), num_samples=4, seed=0, rows='example')
    """

    geometry: Geometry
    num_samples: int = 8
    seed: int = 0
    rows: str = "example"

    def __init__(
        self, geometry: str | Geometry = "categorical", num_samples: int = 8, seed: int = 0, rows: str = "example"
    ) -> None:
        if isinstance(geometry, Sketched):
            raise ValueError("geometry: got a sketch of a sketch; pass the geometry itself, with more num_samples")
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples: got {num_samples!r}, expected an integer of at least 1")
        if rows not in ROWS:
            raise ValueError(f"rows: got {rows!r}, expected one of {', '.join(map(repr, ROWS))}")
        for name, value in (("num_samples", num_samples), ("seed", int(seed)), ("rows", rows)):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "geometry", as_geometry(geometry))

    def embed(self, outputs: Tensor) -> Tensor:
        """Refused: rows need draws, and those are made at a point.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            f"geometry: {self!r} is a metric at one point and cannot embed the outputs of others; pass"
            f" geometry={self.geometry!r} where outputs are compared"
        )

    def distance(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """The distance of the geometry itself."""
        return self.geometry.distance(outputs, reference)

    def length(self, chord: Tensor) -> Tensor:
        """The length of the geometry itself."""
        return self.geometry.length(chord)

    def predict(self, outputs: Tensor) -> Tensor | None:
        """The predictions of the geometry itself."""
        return self.geometry.predict(outputs)

    def openness(self, outputs: Tensor) -> float:
        """The openness of the geometry itself."""
        return self.geometry.openness(outputs)

    def draw(self, outputs: tuple[Tensor, ...], index: Tensor) -> tuple[Tensor, ...]:
        """What is drawn for the outputs `[n, ..., C]` of the examples at `index` `[n]` of the data, for each of them.

        Returns:
            Labels `[n, ..., S]` (Categorical), yes or no `[n, ..., C, S]` (Bernoulli), or keys of signs `[n]`.
        """
        draws = []
        for leaf, f in enumerate(outputs):
            keys = _keys(self.seed, leaf, index.to(f.device))
            if isinstance(self.geometry, Categorical):
                self.geometry.embed(f[:1])  # refuses a single class
                draws.append(_labels(f / self.geometry.temperature, keys, self.num_samples))
            elif isinstance(self.geometry, Bernoulli):
                u = _uniforms(keys, math.prod(f.shape[1:]), self.num_samples).reshape(*f.shape, self.num_samples)
                draws.append(u < torch.sigmoid(f.double()).unsqueeze(-1))
            else:
                self.geometry.embed(f[:1])
                draws.append(keys)
        return tuple(draws)

    def sketched(self, outputs: Tensor, drawn: Tensor, mask: Tensor | None) -> Tensor:
        """Rows by position, `[n, ..., C]` to `[n, P, S]`, zero at masked positions; without the factor 1/sqrt(S)."""
        f = replaced(widened(outputs), mask)
        if isinstance(self.geometry, Categorical):
            f = f / self.geometry.temperature
            out = f.gather(-1, drawn) - f.logsumexp(-1, keepdim=True)
        elif isinstance(self.geometry, Bernoulli):
            out = (f.unsqueeze(-2) @ drawn.to(f.dtype)).squeeze(-2)
            out = out - torch.nn.functional.softplus(f).sum(-1, keepdim=True)
        else:
            out = _signed_sums(self.geometry.embed(f), drawn, self.num_samples)
        return positions(out, mask).reshape(len(f), -1, self.num_samples)


class DrawnBatches(Batches):
    """Batches as pairs of a batch and what was drawn for it.

    Args:
        batches: The batches.
        draws: For every batch a tuple of tensors, examples first.
    """

    def __init__(self, batches: Batches, draws: list[tuple[Tensor, ...]]) -> None:
        self.batches, self.draws = batches, draws

    def __iter__(self) -> Iterator[Any]:
        yield from zip(self.batches, self.draws, strict=True)

    def hold(self) -> Batches:
        """The pairs in memory."""
        return ListBatches(list(self))

    def shuffled(self, seed: int) -> Iterator[Any]:
        """One pass over the pairs in a random order."""
        return self.hold().shuffled(seed)

    def split(self, fraction: float, generator: Generator = None) -> tuple[Batches, Batches]:
        """Two disjoint parts, pairs of whole batches or examples (see `Batches.split`)."""
        return self.hold().split(fraction, generator)

    def sample(self, size: int, generator: torch.Generator) -> Any:
        """One of the pairs at random."""
        return self.hold().sample(size, generator)


@dataclass(frozen=True, eq=False)
class SketchedOutputs(EmbeddedOutputs):
    """z through a sketch whose draws are frozen, `[N * S]`, samples innermost; made by `drawn`.

    Its batches are pairs (batch, draws), and a row belongs to an example (or position) and a sample s: every S-th row
    makes an independent, unbiased estimate of the metric.
    """

    def renewed(self, batches: Batches) -> EmbeddedOutputs:
        """The same geometry on the user's other inputs, for which nothing is drawn yet."""
        return EmbeddedOutputs(self.map, self.geometry, batches, self.mask, self.per)

    def inputs(self, batch: Any) -> Any:
        """The batch of a pair."""
        return batch[0]

    def embedded(self, outputs: tuple[Tensor, ...], batch: Any) -> Tensor:
        """Rows `[n, S]`, or `[n, P * S]` where positions keep their own."""
        sketch = _sketch_of(self)
        masks = self.masks(outputs, batch)
        parts = [sketch.sketched(f, y, m) for f, y, m in zip(outputs, batch[1], masks, strict=True)]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        rows = rows.sum(1) if sketch.rows == "example" else rows.flatten(1)
        return rows / sketch.num_samples**0.5

    def changes(self, outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> Tensor:
        """Dimensions of the rows of every example, `[n]`: S, or those of the outputs where these are fewer."""
        sketch = _sketch_of(self)
        if sketch.rows == "example":
            return changeable(sketch.geometry, outputs, masks).clamp(max=sketch.num_samples)
        return changeable(sketch.geometry, outputs, masks, sketch.num_samples)


def drawn(function: EmbeddedOutputs, theta: Tensor) -> EmbeddedOutputs:
    """The function whose derivative is the root at theta: itself, or with the draws of its sketch made there.

    Args:
        function: z; if its geometry is `Sketched`, one pass over the data draws what that needs.
        theta: The point, `[D]`, from whose outputs labels are drawn.

    Examples:
        >>> from fipgeo.data import as_batches
        >>> from fipgeo.model import OutputMap
        >>> map_ = OutputMap(torch.nn.Linear(3, 1000))
        >>> z = drawn(EmbeddedOutputs(map_, Sketched("categorical", 4), as_batches(torch.zeros(5, 3))), map_.point())
        >>> z.survey(map_.point()).rows
        (20,)
    """
    if not isinstance(function.geometry, Sketched) or isinstance(function, SketchedOutputs):
        return function
    sketch, draws, start = function.geometry, [], 0
    for _, outputs in function.outputs(theta):
        index = torch.arange(start, start + len(outputs[0]))
        draws.append(sketch.draw(outputs, index))
        start += len(index)
    batches = DrawnBatches(function.batches, draws)
    return SketchedOutputs(function.map, sketch, batches, function.mask, function.per)


def replicates(metric: Any, v: Tensor) -> Tensor:
    """The S independent estimates of v^T g v that a sketched metric is the mean of.

    Args:
        metric: A metric of a `Sketched` geometry, or its root.
        v: `[..., D]`.

    Returns:
        `[..., S]`, in float64.

    Raises:
        TypeError: The metric is no sketch.
    """
    root, sketch = _sketch_root(metric)
    rows = root(v).double().unflatten(-1, (-1, sketch.num_samples))
    return rows.square().sum(-2) * (sketch.num_samples / root.survey.normaliser)


def sketch_error(metric: Any, v: Tensor) -> Tensor:
    """Standard error of v^T g v from sketching, from the spread of the S samples; the data count as given.

    For a length |v| = sqrt(v^T g v) it is this over 2 |v|. For an eigenvalue, pass the unit eigenvector: to first order
    that is the jackknife over samples. The largest eigenvalue of a sketch is also too large on average, for it is the
    largest of noisy numbers; `spectrum(k, held_out=other)` with a metric of another seed gives numbers that are not.
    The error is itself known to about 1 / sqrt(2 (S - 1)) of its size.

    Args:
        metric: A metric of a `Sketched` geometry, or its root.
        v: `[..., D]`, fixed before the draws were made.

    Returns:
        `[...]`, in float64; NaN for one sample.

    Raises:
        TypeError: The metric is no sketch.
    """
    samples = replicates(metric, v)
    if samples.shape[-1] == 1:
        return torch.full_like(samples[..., 0], math.nan)
    return samples.std(-1) / samples.shape[-1] ** 0.5


def sketch_trace(metric: Any, *, generator: Generator = None) -> Estimate:
    """The trace of the metric that is sketched, with one standard error for sketch and probes together.

    Every sample s gets random signs y_s over its own rows; |R_s^T y_s|^2 has the trace as its mean, so the S numbers
    are independent estimates. It costs S products with R^T.

    Args:
        metric: A metric of a `Sketched` geometry, or its root.
        generator: Of the signs.

    Raises:
        TypeError: The metric is no sketch.
    """
    root, sketch = _sketch_root(metric)
    count, size = sketch.num_samples, root.shape[0]
    own = as_generator(generator)
    signs = torch.randint(2, (size,), generator=own, device=own.device).to(root.device) * 2 - 1
    sample = torch.arange(size, device=root.device) % count
    norms = []
    for which in torch.arange(count, device=root.device).split(STACK):
        stack = (signs * (sample == which[:, None])).to(root.dtype)
        norms.append(root.adjoint(stack).double().norm(dim=-1))
    samples = torch.cat(norms).square() * (count / root.survey.normaliser)
    error = float(samples.std()) / count**0.5 if count > 1 else math.nan
    return Estimate(float(samples.mean()), error, count)


def _sketch_root(metric: Any) -> tuple[Any, Sketched]:
    root = metric if isinstance(metric, LinearOperator) else getattr(metric, "root", metric)
    function = getattr(root, "function", None)
    if not isinstance(function, SketchedOutputs):
        raise TypeError(
            f"metric: got {metric!r}, which is no sketch of a model's metric; make one with"
            " geometry=Sketched('categorical'), and map coefficients of a basis B to weights, B @ c, before asking"
        )
    return root, _sketch_of(function)


def _sketch_of(function: EmbeddedOutputs) -> Sketched:
    assert isinstance(function.geometry, Sketched)
    return function.geometry


# splitmix64 (Steele, Lea & Flood, Fast Splittable Pseudorandom Number Generators, 2014): any counter, any device


def _signed(value: int) -> int:
    """A 64-bit word as the signed integer of the same bits."""
    return (value + 2**63) % 2**64 - 2**63


_STEP, _FIRST, _SECOND = (_signed(w) for w in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _mixed(x: Tensor) -> Tensor:
    """The finaliser: 64-bit words to words without visible pattern."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    return x ^ ((x >> 31) & (2**33 - 1))


def _keys(seed: int, leaf: int, index: Tensor) -> Tensor:
    """One word for each example `[n]` and output tensor."""
    word = _mixed(torch.tensor(_signed(seed), device=index.device) * _STEP + _STEP)
    return _mixed(_mixed(word + _signed(leaf * _STEP)) + index * _STEP)


def _uniforms(keys: Tensor, count: int, num_samples: int) -> Tensor:
    """Numbers in [0, 1), `[n, count, S]` in float64; more samples or positions leave the first as they are."""
    device = keys.device
    place = torch.arange(count, device=device)[:, None] * 2**20 + torch.arange(num_samples, device=device)
    bits = _mixed(keys[:, None, None] + (place + 1) * _STEP)
    return ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53


def _labels(f: Tensor, keys: Tensor, num_samples: int) -> Tensor:
    """Labels `[n, ..., S]` from softmax(f), by inversion of the cumulated probabilities, in float64 and in blocks."""
    classes = f.shape[-1]
    flat = f.reshape(-1, classes)
    u = _uniforms(keys, len(flat) // len(f), num_samples).flatten(0, 1)
    out = []
    for part, numbers in zip(*(t.split(max(BLOCK // classes, 1)) for t in (flat, u)), strict=True):
        cumulated = torch.softmax(part.double(), -1).cumsum(-1)
        found = torch.searchsorted(cumulated, numbers * cumulated[:, -1:], right=True)
        out.append(found.clamp(max=classes - 1))
    return torch.cat(out).reshape(*f.shape[:-1], num_samples)


def _signed_sums(phi: Tensor, keys: Tensor, num_samples: int) -> Tensor:
    """omega_s . phi by position, `[n, ..., M]` to `[n, P, S]`: signs are bits of words made from a counter."""
    flat = phi.reshape(len(phi), -1, phi.shape[-1])
    shape, device = flat.shape[1:], phi.device
    place = torch.arange(shape[0], device=device)[:, None] * 2**32 + torch.arange(shape[1], device=device)
    sums = []
    for first in range(0, num_samples, 32):
        words = _mixed(_mixed(keys + _signed(first * _STEP))[:, None, None] + (place + 1) * _STEP)
        for bit in range(min(32, num_samples - first)):
            positive = torch.bitwise_and(words >> bit, 1).bool()
            sums.append(torch.where(positive, flat, -flat).sum(-1))
    return torch.stack(sums, -1).reshape(*phi.shape[:-1], num_samples)
