r"""A linear readout of hidden features, and all that need be remembered of the examples that it was learned from.

    f(x) = W h~(x)       h~ = (h, 1)
    A = sum h~ h~^T   [F + 1, F + 1]        B = sum h~ y^T   [F + 1, C]

The metric of f is A / N for every output, the same at all W, and |f - y|^2 is known at every W from A and B alone: a
sketch without error. A path that keeps such a function is straight, and its end is one linear system, so a network
learns task after task as if all their examples were there at once, in any order; subtracting a task forgets it.

Source: closed-form class-incremental learning by ridge regression, Zhuang et al., ACIL (NeurIPS 2022, arXiv:2205.14922)
and McDonnell et al., RanPAC (NeurIPS 2023, arXiv:2307.02251), both on a network's last features.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipgeo.data import as_batches
from fipgeo.io import load_record, save_record
from fipgeo.memory.hidden import HiddenFeatures

KIND = "readout"
TARGETS = ("labels", "model")


class Solved(NamedTuple):
    """The W of a ridge.

    Attributes:
        weight: `[C, F]`.
        bias: `[C]`.
        ridge: The ridge.
    """

    weight: Tensor
    bias: Tensor
    ridge: float


@dataclass(frozen=True, eq=False)
class ReadoutSketch:
    """A and B of some examples; `a + b` remembers both, `a - b` forgets b again, `0.5 * a` counts a by half.

    The system has an equation for each feature. Where examples are fewer, `fipgeo.atlas.HiddenClassifier` has one for
    each example.

    Attributes:
        gram: A `[F + 1, F + 1]`, float64; its last entry is N.
        cross: B `[F + 1, C]`, float64.
        energy: sum |y|^2 of every output, `[C]`, float64.

    Examples:
        >>> from fipgeo import MetricField
        >>> x, y = torch.eye(4), torch.tensor([0, 1, 0, 1])
        >>> features = HiddenFeatures(MetricField(nn.Linear(4, 2), x))
        >>> old, new = (ReadoutSketch.of(features, (x[i], y[i])) for i in ([0, 1], [2, 3]))
        >>> (old + new).readout(features, ridge=1e-6)(x).argmax(1)
        tensor([0, 1, 0, 1])
    """

    gram: Tensor
    cross: Tensor
    energy: Tensor

    @classmethod
    def of(
        cls,
        features: HiddenFeatures,
        data: Any,
        *,
        targets: str = "labels",
        num_outputs: int | None = None,
        batch_size: int | None = None,
    ) -> ReadoutSketch:
        """One pass over examples.

        Args:
            features: h.
            data: Batches `(x, y)` with classes `[n]` or numbers `[n, C]`; x alone will do without labels.
            targets: "labels" for y, as one-hot rows if they are classes; "model" for the class that the features' own
                network predicts: what it knows already is remembered without labels.
            num_outputs: C; None for the largest class plus 1. Sketches of fewer classes can be added to those of more.
            batch_size: Examples in a batch when `data` is tensors.

        Raises:
            ValueError: `targets` is another word, labels are missing or of another shape, or a class is no output.
        """
        if targets not in TARGETS:
            raise ValueError(f"targets: got {targets!r}, expected 'labels' or 'model'")
        found: ReadoutSketch | None = None
        for batch in as_batches(data, batch_size, "data"):
            h, outputs = features.both(batch)
            y = _wanted(batch, outputs, targets, num_outputs).to(h.device)
            rows = F.pad(h, (0, 1), value=1.0).double()
            part = cls(rows.T @ rows, rows.T @ y, y.square().sum(0))
            found = part if found is None else found + part
        assert found is not None
        return found

    @property
    def count(self) -> float:
        """N, examples by weight."""
        return float(self.gram[-1, -1])

    @property
    def num_outputs(self) -> int:
        """C."""
        return self.cross.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the numbers."""
        return self.gram.nbytes + self.cross.nbytes + self.energy.nbytes

    def __add__(self, other: ReadoutSketch) -> ReadoutSketch:
        return self._combined(other, 1.0)

    def __sub__(self, other: ReadoutSketch) -> ReadoutSketch:
        if other.count > self.count * (1 + 1e-12):
            raise ValueError(f"other: has {other.count:g} examples, more than the {self.count:g} it is taken from")
        return self._combined(other, -1.0)

    def __mul__(self, weight: float) -> ReadoutSketch:
        if not 0 < weight < math.inf:
            raise ValueError(f"weight: got {weight}, expected a positive number")
        return ReadoutSketch(weight * self.gram, weight * self.cross, weight * self.energy)

    __rmul__ = __mul__

    def solve(self, ridge: float | None = None) -> Solved:
        r"""The W that minimises sum |W h~ - y|^2 + ridge |W|^2, the bias free.

        Args:
            ridge: In units of examples; None for the one of least generalised cross-validation, which is known from A
                and B alone.

        Raises:
            ValueError: The ridge is not positive.
        """
        if ridge is not None and not 0 < ridge < math.inf:
            raise ValueError(f"ridge: got {ridge}, expected a positive number, or None to choose it")
        n, mean = self.gram[-1, -1], self.gram[:-1, -1] / self.gram[-1, -1]
        level = self.cross[-1] / n
        values, vectors = torch.linalg.eigh(self.gram[:-1, :-1] - n * torch.outer(mean, mean))
        values, pull = values.clamp(min=0), vectors.T @ (self.cross[:-1] - n * torch.outer(mean, level))
        if ridge is None:
            ridge = _cross_validated(values, pull, self.energy - n * level.square(), float(n))
        weight = (vectors @ (pull / (values + ridge)[:, None])).T
        return Solved(weight, level - weight @ mean, ridge)

    def readout(self, features: HiddenFeatures, ridge: float | None = None) -> Readout:
        """The network that `solve` gives.

        Raises:
            ValueError: The sketch is of another number of features.
        """
        if len(self.gram) != features.num_features + 1:
            raise ValueError(
                f"features: are {features.num_features}, the sketch is of {len(self.gram) - 1}; pass those it was made"
                " with"
            )
        return Readout(features, self.solve(ridge))

    def distance(self, one: Readout, other: Readout) -> float:
        """Mean over the remembered examples of |f_one - f_other|^2, exactly and without the examples.

        Outputs that only one of them has are 0 in the other.

        Raises:
            ValueError: A readout is of another number of features.
        """
        rows = [r.rows().to(self.gram) for r in (one, other)]
        if any(r.shape[1] != len(self.gram) for r in rows):
            raise ValueError(f"readouts: of {[r.shape[1] - 1 for r in rows]} features, expected {len(self.gram) - 1}")
        width = max(len(r) for r in rows)
        first, second = (F.pad(r, (0, 0, 0, width - len(r))) for r in rows)
        return float(torch.einsum("ca,ab,cb->", first - second, self.gram, first - second)) / self.count

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the numbers to one `.safetensors` file (see `fipgeo.io.save_record`)."""
        tensors = {"gram": self.gram, "cross": self.cross, "energy": self.energy}
        save_record(path, tensors, {"kind": KIND}, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> ReadoutSketch:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds none.
        """
        tensors, meta = load_record(path)
        if meta.get("kind") != KIND:
            raise ValueError(f"{str(path)!r} holds no readout sketch; pass a file that ReadoutSketch.save wrote")
        return cls(**tensors)

    def _combined(self, other: ReadoutSketch, sign: float) -> ReadoutSketch:
        if self.gram.shape != other.gram.shape:
            raise ValueError(
                f"other: is of {len(other.gram) - 1} features, this one of {len(self.gram) - 1}; make both with the"
                " same features"
            )
        width = max(self.num_outputs, other.num_outputs)
        mine, theirs = (
            (F.pad(s.cross, (0, width - s.num_outputs)), F.pad(s.energy, (0, width - s.num_outputs)))
            for s in (self, other)
        )
        gram, cross = self.gram + sign * other.gram, mine[0] + sign * theirs[0]
        return ReadoutSketch(gram, cross, mine[1] + sign * theirs[1])


class Readout(nn.Module):
    """A frozen network's hidden features and a linear layer on them; x to scores `[n, C]`.

    Args:
        features: h.
        solved: The layer's weights.

    Attributes:
        features: h.
        linear: The layer, an `nn.Linear` that can be trained further.
    """

    def __init__(self, features: HiddenFeatures, solved: Solved) -> None:
        super().__init__()
        self.features = features
        out, width = solved.weight.shape
        self.linear = nn.Linear(width, out).to(features.mean)
        with torch.no_grad():
            self.linear.weight.copy_(solved.weight)
            self.linear.bias.copy_(solved.bias)

    def forward(self, batch: Any) -> Tensor:
        """Scores `[n, C]`."""
        return self.linear(self.features(batch))

    def rows(self) -> Tensor:
        """W with the bias as its last column, `[C, F + 1]`, detached."""
        return torch.cat([self.linear.weight, self.linear.bias[:, None]], 1).detach()


def _wanted(batch: Any, outputs: tuple[Tensor, ...], targets: str, width: int | None) -> Tensor:
    """Rows y `[n, C]` in float64."""
    if targets == "model":
        if len(outputs) != 1 or outputs[0].dim() != 2:
            shapes = " and ".join(str(list(f.shape)) for f in outputs)
            raise ValueError(f"targets: 'model' needs class scores [n, C], but outputs are {shapes}; pass output_fn=")
        y: Any = outputs[0].argmax(1)
        width = width or outputs[0].shape[1]
    else:
        y = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        if not isinstance(y, Tensor) or y.dim() not in (1, 2) or (y.dim() == 2) != y.is_floating_point():
            what = f"y {list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else f"a batch of {type(batch).__name__}"
            raise ValueError(
                f"data: got {what}; expected batches (x, y) with classes y [n] or numbers y [n, C], or targets='model'"
                " for what the network itself says"
            )
    if y.dim() == 2:
        return y.double()
    most = int(y.max()) + 1
    if width is not None and most > width or int(y.min()) < 0:
        raise ValueError(f"labels: from {int(y.min())} to {most - 1}, expected classes from 0 to num_outputs - 1")
    return F.one_hot(y.long(), width or most).double()


def _cross_validated(values: Tensor, pull: Tensor, energy: Tensor, count: float) -> float:
    """The ridge of least N |y - f|^2 / (N - tr)^2, tr the dimensions that f uses up (Golub, Heath & Wahba 1979).

    Args:
        values: Eigenvalues of the centred A, `[F]`.
        pull: The centred B along the eigenvectors, `[F, C]`.
        energy: sum |y - mean y|^2 of every output, `[C]`.
        count: N.
    """
    from scipy.optimize import minimize_scalar

    squares, total, top = pull.square().sum(1), float(energy.sum()), float(values.max())
    if not top > 0:
        return 1.0

    def cost(log_ridge: float) -> float:
        ridge = math.exp(log_ridge)
        share = values / (values + ridge)
        rest = total - float((squares / (values + ridge) * (2 - share)).sum())
        return max(rest, 0.0) / max(count - 1 - float(share.sum()), 1e-9 * count) ** 2

    grid = [math.log(top) - 25.0 + 0.5 * k for k in range(65)]
    best = min(grid, key=cost)  # there can be several valleys
    return math.exp(minimize_scalar(cost, bounds=(best - 0.5, best + 0.5), method="bounded").x)
