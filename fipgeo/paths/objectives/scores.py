"""What a weight, or a group of weights, is worth to the function that a path keeps: the least is zeroed first.

A score is an object with two methods: `weights` values every weight by itself, `units` values sets of weights that
become zero together (by default the sum of their weights' values). Scores are chosen by name (`SCORES`), or given as
objects of one's own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.layers import LayerGram, layer_grams


@dataclass(frozen=True, eq=False)
class Survivors:
    """Where a score is asked for.

    Attributes:
        kept: The protected inputs.
        position: The weights and statistics.
        alive: Boolean `[D]`, the weights that may still become zero.
        counted: Boolean `[D]`, those of them and of the zeros held that count as weights.
    """

    kept: Kept
    position: Position
    alive: Tensor
    counted: Tensor


class Score(ABC):
    """What weights are worth."""

    @abstractmethod
    def weights(self, at: Survivors, generator: torch.Generator) -> Tensor:
        """The value of every weight by itself, `[D]`, not negative; those that are not alive do not matter."""

    def units(self, at: Survivors, units: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """The value `[count]` of zeroing all weights of a unit together; `units` `[D]` numbers them, -1 in none."""
        return summed(self.weights(at, generator), units, count)

    def cost(self, at: Survivors) -> float:
        """Model evaluations that one call takes."""
        del at
        return 0.0


def summed(values: Tensor, units: Tensor, count: int) -> Tensor:
    """Sum of values `[D]` over each unit, `[count]`, in double precision."""
    inside = units >= 0
    out = torch.zeros(count, dtype=torch.float64, device=values.device)
    return out.index_add_(0, units[inside], values[inside].double())


@dataclass(frozen=True)
class MetricScore(Score):
    """The squared change of the embedded outputs that the metric predicts, |sum_j w_j R_j|^2 / N over a unit.

    For a single weight this is w_j^2 g_jj; for several it holds their cross terms. Estimated by random output
    directions u as the mean of (sum_j w_j (R^T u)_j)^2 (see `metric_diagonal`); of single weights it is exact where
    all protected outputs are no more than the estimate would pull back.

    Attributes:
        samples: Random output directions.
        batch_size: Inputs that share one.
        batch_statistics: Whether BatchNorm layers normalise by the minibatch at hand, so that what re-estimated
            statistics would undo, such as the scale of a whole channel, costs nothing. Then `batch_size` must be large
            enough to have statistics.
    """

    samples: int = 128
    batch_size: int = 8
    batch_statistics: bool = False

    def weights(self, at: Survivors, generator: torch.Generator) -> Tensor:
        """w_j^2 g_jj."""
        theta = at.position.theta
        if self._few(at.kept):
            rows = at.kept.tangent(at.position).columns(torch.ones_like(theta, dtype=torch.bool))
            return theta.square() * rows.square().sum(0) / at.kept.num_examples
        source = (at.kept, at.position, self.samples, self.batch_size, generator)
        return theta.square() * metric_diagonal(*source, batch_statistics=self.batch_statistics)

    def units(self, at: Survivors, units: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """|sum_j w_j R_j|^2 / N over each unit."""
        total, seen = torch.zeros(count, dtype=torch.float64, device=units.device), 0
        pulls = _pulls(at.kept, at.position, self.samples, self.batch_size, generator, self.batch_statistics)
        for pull, examples in pulls:
            total += summed(at.position.theta * pull, units, count).square()
            seen += examples
        return total / seen

    def cost(self, at: Survivors) -> float:
        """A forward and a backward pass (twice its price) for each direction; the exact way takes no more."""
        return 3.0 * self.samples * min(self.batch_size, at.kept.num_examples)

    def _few(self, kept: Kept) -> bool:
        """Whether all protected outputs are no more than the examples of all directions, and have room as rows."""
        outputs = kept.num_rows if kept.live is None else sum(int(live.sum()) for live in kept.live)
        few = outputs <= self.samples * self.batch_size and 8 * outputs * kept.space.dim <= ROWS
        return few and not self.batch_statistics


@dataclass(frozen=True)
class Magnitude(Score):
    """w_j^2."""

    def weights(self, at: Survivors, generator: torch.Generator) -> Tensor:
        """w_j^2."""
        del generator
        return at.position.theta.square()


@dataclass(frozen=True)
class Lamp(Score):
    """w_j^2 over the sum of the squares in its tensor that are at least as large.

    Shares sparsity out between layers (Lee et al., Layer-Adaptive Sparsity for the Magnitude-based Pruning, ICLR 2021).
    """

    def weights(self, at: Survivors, generator: torch.Generator) -> Tensor:
        """w_j^2 / sum of w_i^2 over the alive i of the tensor with w_i^2 >= w_j^2."""
        del generator
        square = at.position.theta.square()
        out = torch.zeros_like(square)
        for where in at.kept.function.map.space.slices().values():
            own = torch.where(at.alive[where], square[where], 0)
            values, order = own.sort(stable=True)
            out[where] = torch.zeros_like(own).scatter(
                0, order, values / values.flip(0).cumsum(0).flip(0).clamp_min(1e-30)
            )
        return out


@dataclass(frozen=True)
class Local(Score):
    """w_j^2 G_jj, G = mean x x^T of the inputs x of the weight's own linear map: the squared change of its outputs.

    That is the square of |w| |x| (Sun et al., A Simple and Effective Pruning Approach for Large Language Models, 2024),
    here ranked within any allocation. Biases and normalisation scales count w_j^2.

    Attributes:
        relative: Divide by the mean square of the map's outputs, mean over rows of w^T G w, so that maps with outputs
            of different size can be ranked together.
    """

    relative: bool = True

    def weights(self, at: Survivors, generator: torch.Generator) -> Tensor:
        """w_j^2 G_jj, map by map."""
        return self._of_maps(at, generator)

    def cost(self, at: Survivors) -> float:
        """One pass over the protected inputs."""
        return float(at.kept.num_examples)

    def _of_maps(self, at: Survivors, generator: torch.Generator) -> Tensor:
        space, theta = at.kept.function.map.space, at.position.theta
        out, named, alive = theta.square(), space.unravel(theta), space.unravel(at.alive)
        wanted = {name for name, where in space.slices().items() if at.counted[where].any()}
        grams = layer_grams(at.kept, at.position, only=wanted, generator=_seed(generator))
        if unknown := wanted - set(grams):
            raise ValueError(
                f"score: {sorted(unknown)[0]!r} is not the matrix of a linear map or a convolution alone, so it has no"
                " layer inputs to be scored by; exclude it, or use score='metric'"
            )
        for name, where in space.slices().items():
            if name in wanted:
                found = grams[name]
                rows, free = found.rows(named[name]).double(), found.rows(alive[name])
                worth = self._of_rows(rows, free, found)
                if self.relative:
                    power = torch.einsum("goi,gij,goj->", rows, found.gram, rows) / rows[..., 0].numel()
                    worth = worth / power.clamp_min(torch.finfo(torch.float64).tiny)
                out[where] = found.restored(worth, named[name].shape).reshape(-1).to(out)
        return out

    def _of_rows(self, rows: Tensor, alive: Tensor, found: LayerGram) -> Tensor:
        """Values of weights `[groups, out / groups, in]`."""
        del alive
        return rows.square() * found.gram.diagonal(dim1=1, dim2=2)[:, None]


@dataclass(frozen=True)
class LocalInverse(Local):
    """w_j^2 / [(G_SS + mu)^{-1}]_jj: the change of a map's outputs after the row's other weights S make up for it.

    The optimal brain surgeon (Hassibi & Stork, Second Order Derivatives for Network Pruning, 1993) of every linear map
    by itself (Frantar & Alistarh, Optimal Brain Compression, 2022); S are the row's weights that are not zero. Rows
    with the same zeros share an inverse; otherwise each takes O(in^3).

    Attributes:
        damping: mu as a multiple of the mean diagonal of G.
    """

    damping: float = 1e-2

    def _of_rows(self, rows: Tensor, alive: Tensor, found: LayerGram) -> Tensor:
        out = torch.zeros_like(rows)
        for group, gram in enumerate(found.gram):
            shift = self.damping * gram.diagonal().mean().clamp_min(1e-30)
            damped = gram + shift * torch.eye(len(gram)).to(gram)
            supports, which = (alive[group] | (rows[group] != 0)).unique(dim=0, return_inverse=True)
            for index, support in enumerate(supports):
                mine = which == index
                inverse = torch.linalg.inv(damped[support][:, support]).diagonal()
                worth = torch.zeros_like(rows[group, mine])
                worth[:, support] = rows[group, mine][:, support].square() / inverse
                out[group, mine] = worth
        return out


SCORES: dict[str, Score] = {
    "metric": MetricScore(),
    "magnitude": Magnitude(),
    "lamp": Lamp(),
    "local": Local(),
    "obs": LocalInverse(),
}
"""Scores by name; add your own."""


def as_score(score: str | Score) -> Score:
    """A score from its name or itself.

    Raises:
        ValueError: The name is unknown; the known ones are listed.
    """
    if isinstance(score, Score):
        return score
    if score not in SCORES:
        raise ValueError(f"score: got {score!r}, expected one of {', '.join(map(repr, SCORES))}, or a Score")
    return SCORES[score]


PULLED = 2**24
"""Bytes of pulled-back output directions that are held at once."""

ROWS = 2**28
"""Bytes of rows of R up to which the score of a small problem is exact."""


def metric_diagonal(
    kept: Kept,
    position: Position,
    samples: int,
    batch_size: int,
    generator: torch.Generator,
    *,
    batch_statistics: bool = False,
) -> Tensor:
    """An unbiased estimate of diag g `[D]`: mean of (R_b^T u)^2 / n over minibatches b and random signs u.

    E (R_b^T u)_j^2 = sum over the minibatch's rows of R_rj^2, since the signs are independent (Bekas, Kokiopoulou &
    Saad, An Estimator for the Diagonal of a Matrix, 2007, applied to R^T R). With `batch_statistics` R_b is the
    derivative of a minibatch that BatchNorm layers normalise by itself.
    """
    total, seen = torch.zeros_like(position.theta), 0
    for pull, examples in _pulls(kept, position, samples, batch_size, generator, batch_statistics):
        total += pull.square()
        seen += examples
    return total / seen


def _pulls(
    kept: Kept, position: Position, samples: int, batch_size: int, generator: torch.Generator, batch_statistics: bool
) -> Iterator[tuple[Tensor, int]]:
    """R_b^T u `[D]` for random minibatches b and signs u, each with the number of examples in b."""
    function = kept.at(position)
    live_norms = batch_statistics and bool(function.map.normalisers)
    together = max(PULLED // max(position.theta.nbytes, 1), 1)  # making a model still takes longer than a small pass
    for first in range(0, samples, together):
        pulls = []
        with function.map.frozen(batch_statistics=live_norms), torch.enable_grad():
            for _ in range(first, min(first + together, samples)):
                batch, z0, live = kept.draw(batch_size, generator)
                theta = position.theta.detach().clone().requires_grad_()
                z = function.on(batch)(function.map.named(theta))
                count = z.numel() if live is None else int(live.sum())
                signs = torch.randint(2, (count,), generator=generator).to(z) * 2 - 1
                if live is not None:  # none is drawn for masked entries, so that more padding leaves the others alone
                    signs = torch.zeros_like(z).masked_scatter(live.reshape(-1), signs)
                (pull,) = torch.autograd.grad(z, theta, signs)
                pulls.append((pull, len(z0)))
        yield from pulls


def _seed(generator: torch.Generator) -> torch.Generator:
    """A generator of its own, so that how much is drawn from it changes no later draw."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return torch.Generator().manual_seed(seed)


def with_budget(score: Score, samples: int, batch_size: int) -> Score:
    """A metric score with this many samples; any other score as it is."""
    return replace(score, samples=samples, batch_size=batch_size) if isinstance(score, MetricScore) else score
