r"""Output geometries: embeddings in which small changes of the outputs are measured by plain Euclid.

A geometry is a map phi from outputs `[N, ..., C]` to embedded outputs `[N, ..., M]`; with z = phi(F(theta)) and
R = dz/dtheta the metric on weights is R^T R / N. Everything acts on the last axis; axes between the first and the last
(positions of a sequence, pixels) are further outputs of the same example.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Geometry(ABC):
    """An embedding of a network's outputs.

    Subclasses give `embed`; those whose embedding is curved also give `length`, the length of the geodesic that
    belongs to a straight chord, and `between`, its points.

    Attributes:
        lost: Dimensions of an embedded output along which it cannot change (1 on a sphere and for centred logits); they
            lower the rank of the metric.
    """

    lost: ClassVar[int] = 0

    @abstractmethod
    def embed(self, outputs: Tensor) -> Tensor:
        """phi: outputs `[N, ..., C]` to embedded outputs `[N, ..., M]`."""

    def length(self, chord: Tensor) -> Tensor:
        """Length of the geodesic between two embedded outputs whose straight distance is `chord`."""
        return chord

    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        """The point at time t in [0, 1] of the geodesic between embedded outputs `[..., M]`, run at constant speed."""
        return torch.lerp(start, end, t)

    def predict(self, outputs: Tensor) -> Tensor | None:
        """Predicted class or classes, or None where outputs are not predictions (regression, embeddings)."""
        del outputs
        return None

    def openness(self, outputs: Tensor) -> float:
        """How sensitive phi still is at these outputs: 1 fully, near 0 saturated (its metric protects nothing)."""
        del outputs
        return 1.0

    def distance(self, outputs: Tensor, reference: Tensor) -> Tensor:
        """Finite distance of two outputs `[N, ..., C]` along the last axis, `[N, ...]`; exactly 0 for equal outputs.

        Half-precision outputs are compared in float32.
        """
        return self.length((self.embed(widened(outputs)) - self.embed(widened(reference))).norm(dim=-1))


@dataclass(frozen=True)
class Euclidean(Geometry):
    """phi(f) = f: regression outputs, features, raw scores. Metric J^T J / N, distance |f - f0|.

    Examples:
        >>> Euclidean().distance(torch.ones(1, 4), torch.zeros(1, 4))
        tensor([2.])
    """

    def embed(self, outputs: Tensor) -> Tensor:
        """The outputs themselves."""
        return outputs


@dataclass(frozen=True)
class Logits(Geometry):
    """phi(f) = f - mean_C f: the scores of a classifier, up to the constant that softmax ignores.

    Unlike a softmax it does not saturate on confident inputs, which makes it the default for protecting a classifier.
    Metric J^T (I - 1 1^T / C) J / N, in squared logits.

    Examples:
        >>> f = torch.tensor([[1.0, 2.0, 3.0]])
        >>> Logits().embed(f + 5.0)
        tensor([[-1.,  0.,  1.]])
    """

    lost: ClassVar[int] = 1

    def embed(self, outputs: Tensor) -> Tensor:
        """Centred outputs.

        Raises:
            ValueError: There is only one class, so that centring would leave nothing.
        """
        if outputs.shape[-1] == 1:
            raise ValueError(
                "geometry: 'logits' needs at least two classes on the last axis, got 1; use geometry='bernoulli' for"
                " one logit per example or geometry='euclidean' for regression"
            )
        return outputs - outputs.mean(-1, keepdim=True)

    def predict(self, outputs: Tensor) -> Tensor:
        """The class of the largest logit."""
        return outputs.argmax(-1)


@dataclass(frozen=True)
class Gaussian(Geometry):
    """phi(f) = f / sigma: the Fisher geometry of a Gaussian with mean f and standard deviation sigma.

    Attributes:
        sigma: Standard deviation of the noise, in the units of the outputs; positive.
    """

    sigma: float = 1.0

    def __post_init__(self) -> None:
        """Check sigma."""
        if not (math.isfinite(self.sigma) and self.sigma > 0):
            raise ValueError(f"sigma: got {self.sigma}, expected a positive number")

    def embed(self, outputs: Tensor) -> Tensor:
        """Outputs in units of sigma."""
        return outputs / self.sigma


@dataclass(frozen=True)
class Categorical(Geometry):
    r"""phi(f) = 2 sqrt(softmax(f / T)), on a sphere of radius 2: the Fisher geometry of a classifier.

    Metric J^T (diag p - p p^T) J / N at T = 1 (Amari, Information Geometry and Its Applications, 2016, section 2.3);
    the finite distance is the Fisher-Rao arc 2 arccos sum sqrt(p q), computed from the chord as 4 asin(chord / 4),
    which stays exact for equal outputs. On inputs where p is nearly one-hot the metric is nearly zero and protects
    nothing; a temperature of 4 or so, or `Logits`, does not have that fault.

    Attributes:
        temperature: T > 0; larger is softer.

    Examples:
        >>> f = torch.tensor([[0.0, 0.0]])
        >>> [round(float(s), 6) for s in Categorical().embed(f).square().sum(-1)]
        [4.0]
    """

    temperature: float = 1.0

    lost: ClassVar[int] = 1

    def __post_init__(self) -> None:
        """Check the temperature."""
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"temperature: got {self.temperature}, expected a positive number")

    def embed(self, outputs: Tensor) -> Tensor:
        """2 exp(log_softmax(f / T) / 2), in log space throughout."""
        if outputs.shape[-1] == 1:
            raise ValueError(
                "geometry: 'categorical' needs at least two classes on the last axis, got 1; use geometry='bernoulli'"
            )
        return 2 * (torch.log_softmax(outputs / self.temperature, -1) / 2).exp()

    def length(self, chord: Tensor) -> Tensor:
        """Arc on the sphere of radius 2."""
        return 4 * torch.asin((chord / 4).clamp(max=1))

    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        """The Fisher-Rao geodesic, a great circle; its probabilities are (z / 2)^2.

        Examples:
            >>> f = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
            >>> z = Categorical().embed(f)
            >>> (Categorical().between(z[0], z[1], 0.5) / 2).square().round(decimals=6)
            tensor([0.5000, 0.5000])
        """
        return _great_circle(start, end, t, self.length((end - start).norm(dim=-1, keepdim=True)) / 2)

    def predict(self, outputs: Tensor) -> Tensor:
        """The most probable class."""
        return outputs.argmax(-1)

    def openness(self, outputs: Tensor) -> float:
        """Mean over inputs of (1 - sum p^2) / (1 - 1/C): 1 for uniform, 0 for one-hot."""
        p = torch.softmax(outputs.detach() / self.temperature, -1)
        return float((1 - p.square().sum(-1)).mean() / (1 - 1 / p.shape[-1]))


@dataclass(frozen=True)
class Bernoulli(Geometry):
    r"""phi(f) = 2 asin sqrt(sigmoid f) for each output: the Fisher geometry of independent yes/no outputs.

    Metric J^T diag(p (1 - p)) J / N. Written as pi/2 + 2 atan(tanh(f / 4)), which has finite slope everywhere.
    """

    def embed(self, outputs: Tensor) -> Tensor:
        """Angle of each output."""
        return math.pi / 2 + 2 * torch.atan(torch.tanh(outputs / 4))

    def predict(self, outputs: Tensor) -> Tensor:
        """Which outputs are more likely than not, packed per example."""
        return (outputs > 0).long()

    def openness(self, outputs: Tensor) -> float:
        """Mean of 4 p (1 - p): 1 at p = 1/2, 0 when certain."""
        p = torch.sigmoid(outputs.detach())
        return float((4 * p * (1 - p)).mean())


@dataclass(frozen=True)
class Cosine(Geometry):
    """phi(f) = f / |f|: directions of embeddings; distance is the angle in radians."""

    lost: ClassVar[int] = 1

    def embed(self, outputs: Tensor) -> Tensor:
        """Unit vectors along the last axis.

        Raises:
            ValueError: There is only one component, whose direction cannot change.
        """
        if outputs.shape[-1] == 1:
            raise ValueError(
                "geometry: 'cosine' needs at least two outputs on the last axis, got 1; use geometry='euclidean'"
            )
        return outputs / outputs.norm(dim=-1, keepdim=True)

    def length(self, chord: Tensor) -> Tensor:
        """Angle between unit vectors."""
        return 2 * torch.asin((chord / 2).clamp(max=1))

    def between(self, start: Tensor, end: Tensor, t: float) -> Tensor:
        """The great circle; NaN between opposite directions, which have many."""
        return _great_circle(start, end, t, self.length((end - start).norm(dim=-1, keepdim=True)))


def _great_circle(start: Tensor, end: Tensor, t: float, angle: Tensor) -> Tensor:
    """(sin((1 - t) a) start + sin(t a) end) / sin a for points of a sphere at an angle a, which may be 0."""
    whole = torch.sinc(angle / math.pi)
    first, last = (s * torch.sinc(s * angle / math.pi) / whole for s in (1 - t, t))
    return first * start + last * end


GEOMETRIES: dict[str, Geometry] = {
    "logits": Logits(),
    "euclidean": Euclidean(),
    "gaussian": Gaussian(),
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "cosine": Cosine(),
}


def as_geometry(geometry: str | Geometry) -> Geometry:
    """A geometry from its name or itself.

    Raises:
        ValueError: The name is unknown; the known ones are listed.
        TypeError: Neither a name nor a `Geometry`.

    Examples:
        >>> as_geometry("categorical")
        Categorical(temperature=1.0)
    """
    if isinstance(geometry, Geometry):
        return geometry
    if not isinstance(geometry, str):
        raise TypeError(f"geometry: got {geometry!r}, expected a name or a Geometry such as fipgeo.Categorical()")
    if geometry not in GEOMETRIES:
        raise ValueError(f"geometry: got {geometry!r}, expected one of {', '.join(map(repr, GEOMETRIES))}")
    return GEOMETRIES[geometry]


Masks = Sequence[Tensor | None] | None
"""For every output tensor a boolean mask `[n, ...]` of the positions that count, or None where all of them do."""


def widened(outputs: Tensor) -> Tensor:
    """Outputs in at least float32: half precision has too few digits for a logarithm, a mean or a difference."""
    return outputs.float() if outputs.dtype in (torch.bfloat16, torch.float16) else outputs


def over_entries(mask: Tensor, like: Tensor) -> Tensor:
    """A mask `[n, ...]` with further axes of length 1, so that it broadcasts over a tensor that has more."""
    return mask.reshape(mask.shape + (1,) * (like.dim() - mask.dim()))


def positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values with those of masked positions replaced by zeros; the mask covers the leading axes."""
    return values if mask is None else torch.where(over_entries(mask, values), values, torch.zeros_like(values))


def replaced(outputs: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs with ones at masked positions, where every geometry has a slope: padding makes no NaN."""
    return outputs if mask is None else torch.where(over_entries(mask, outputs), outputs, torch.ones_like(outputs))


def embed(geometry: Geometry, outputs: tuple[Tensor, ...], masks: Masks = None) -> Tensor:
    """z, all outputs of an example embedded and laid side by side: tensors `[n, ..., C]` to one `[n, M]`.

    Half-precision outputs are embedded in float32. Masked positions are zeros: they have no slope and no length.
    """
    masks = [None] * len(outputs) if masks is None else masks
    parts = [
        positions(geometry.embed(replaced(widened(f), mask)), mask).reshape(len(f), -1)
        for f, mask in zip(outputs, masks, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def between(
    geometry: Geometry, outputs: tuple[Tensor, ...], others: tuple[Tensor, ...], t: float, masks: Masks = None
) -> Tensor:
    """The embedded outputs `[n, M]` at time t of the geodesics from outputs to others, laid side by side as by `embed`.

    For a `Categorical` these are the great circles between sqrt(p) and sqrt(q): what an ensemble of two classifiers is
    in the Fisher-Rao metric. In flat geometries they are straight lines of z.
    """
    masks = [None] * len(outputs) if masks is None else masks
    parts = []
    for f, g, mask in zip(outputs, others, masks, strict=True):
        z, w = (geometry.embed(replaced(widened(x), mask)) for x in (f, g))
        parts.append(positions(geometry.between(z, w, t), mask).reshape(len(f), -1))
    return torch.cat(parts, -1)


def squared_distance(
    geometry: Geometry, outputs: tuple[Tensor, ...], reference: tuple[Tensor, ...], masks: Masks = None
) -> Tensor:
    """Squared finite distance per example `[n]`, summed over the positions that count and over the output tensors."""
    masks = [None] * len(outputs) if masks is None else masks
    parts = [
        positions(geometry.distance(replaced(f, mask), replaced(f0, mask)), mask).square().reshape(len(f), -1).sum(-1)
        for f, f0, mask in zip(outputs, reference, masks, strict=True)
    ]
    return torch.stack(parts).sum(0)


def changed_predictions(
    geometry: Geometry, outputs: tuple[Tensor, ...], reference: tuple[Tensor, ...], masks: Masks = None
) -> Tensor | None:
    """Which examples `[n]` predict anything else than the reference (at any position that counts).

    None without predictions.
    """
    masks = [None] * len(outputs) if masks is None else masks
    out: Tensor | None = None
    for f, f0, mask in zip(outputs, reference, masks, strict=True):
        now, before = geometry.predict(f), geometry.predict(f0)
        if now is None or before is None:
            return None
        changed = positions(now != before, mask).reshape(len(f), -1).any(-1)
        out = changed if out is None else out | changed
    return out
