"""Networks along a path as one: their mean probability, their vote, and how far they differ."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fipgeo.model import unwrapped
from fipgeo.paths.point import PathPoint
from fipgeo.paths.record import PathResult
from fipgeo.trees import output_tensors


class PathEnsemble(nn.Module):
    """The mean probability of several points of a path, for a classifier.

    The module is copied once, in eval mode; a member holds the tensors in which it differs from that copy, and every
    forward runs the one module with the tensors of each member in turn.

    Args:
        model: The network whose path it is, with any weights.
        points: Stored points of the path.

    Attributes:
        steps: The steps of the points.

    Raises:
        ValueError: There is no point, a point was not stored, or it does not fit the model.

    Examples:
        >>> import torch
        >>> from fipgeo.attacks import pgd
        >>> from fipgeo.paths import robustify
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> path = robustify(net, x, pgd(0.1, 3), batch_size=20, refresh=2)
        >>> several = PathEnsemble.along(path, net, 3)
        >>> len(several), several(x).shape, several.votes(x).sum(1).unique().tolist()
        (3, torch.Size([200, 3]), [3])
    """

    def __init__(self, model: nn.Module, points: Iterable[PathPoint]) -> None:
        super().__init__()
        self.base = copy.deepcopy(unwrapped(model)).requires_grad_(False).eval()
        own = dict(self.base.named_parameters()) | dict(self.base.named_buffers())
        points = list(points)
        if not points:
            raise ValueError("points: got none, expected at least one stored point of a path")
        self.steps = tuple(point.step for point in points)
        self._names: list[dict[str, str]] = []
        for index, point in enumerate(points):
            if point.tensors is None:
                raise ValueError(
                    f"points: point {point.step} was not stored; walk with store='all' to keep every point"
                )
            odd = [n for n, t in point.tensors.items() if n not in own or own[n].shape != t.shape]
            if odd:
                raise ValueError(f"points: the model has no {odd[0]!r} of the shape that point {point.step} has")
            moved = {n: t for n, t in point.tensors.items() if not torch.equal(t.to(own[n]), own[n])}
            self._names.append({n: f"{index}:{n.replace('.', ':')}" for n in moved})
            for name, tensor in moved.items():
                self.register_buffer(self._names[-1][name], tensor.detach().to(own[name]))

    @classmethod
    def along(cls, path: PathResult, model: nn.Module, count: int = 5, *, begin: float = 0.0) -> PathEnsemble:
        """Points spread evenly over the length of a path, its end included.

        Args:
            path: The path; points that were not stored are passed over.
            model: The network whose path it is.
            count: Members, or as many as were stored if these are fewer.
            begin: Where the first one lies, as a share of the path's length: 0 is the network at its start.

        Raises:
            ValueError: count is below 1, begin is not in [0, 1], or no point was stored.
        """
        stored = [point for point in path if point.tensors is not None]
        if count < 1 or not 0 <= begin <= 1 or not stored:
            raise ValueError(
                f"along: got count={count}, begin={begin} and {len(stored)} stored points; expected at least one member"
                " and point, and a share of the length in [0, 1]"
            )
        end = stored[-1].arc_length
        lengths = torch.linspace(end, begin * end, min(count, len(stored)), dtype=torch.float64).tolist()
        chosen: list[PathPoint] = []
        for length in lengths:
            rest = [point for point in stored if point not in chosen]
            chosen.append(min(rest, key=lambda point: abs(point.arc_length - length)))
        return cls(model, sorted(chosen, key=lambda point: point.step))

    @classmethod
    def towards(cls, path: PathResult, model: nn.Module, shares: Sequence[float] = (0.4, 0.8, 1.2)) -> PathEnsemble:
        """Networks on the straight line from a path's start through its end, theta_0 + share (theta_end - theta_0).

        On the way back the old function returns sooner than what the path gained is lost (Wortsman et al., Robust
        Fine-Tuning of Zero-Shot Models, CVPR 2022); a share beyond 1 goes on in the same direction.

        Args:
            path: The path, with weights of its start and its end (`store="last"` will do).
            model: The network whose path it is.
            shares: Of the way, one for each member; buffers that are no floats are those of the end.

        Raises:
            ValueError: There is no share or one below 0, or the start or the end was not stored.
        """
        start, end = path[0], path[-1]
        if not shares or not all(share >= 0 for share in shares):
            raise ValueError(f"shares: got {list(shares)}, expected at least one, none of them below 0")
        if start.tensors is None or end.tensors is None:
            raise ValueError("towards: the start or the end was not stored; walk with store='all' or 'last'")
        pairs = {name: (start.tensors[name], there) for name, there in end.tensors.items()}
        points = [
            replace(end, tensors={n: a.lerp(b, share) if b.is_floating_point() else b for n, (a, b) in pairs.items()})
            for share in shares
        ]
        return cls(model, points)

    def __len__(self) -> int:
        """Number of members."""
        return len(self.steps)

    def each(self, *args: Any, **kwargs: Any) -> Tensor:
        """Log-probabilities of every member, `[K, n, C]`."""
        held = dict(self.named_buffers())
        outputs = []
        for names in self._names:
            tensors = {name: held[where] for name, where in names.items()}
            raw = functional_call(self.base, tensors, args, kwargs)
            outputs.append(output_tensors(raw)[0].log_softmax(-1))
        return torch.stack(outputs)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logarithm of the mean probability `[n, C]`, which is as good as scores for any loss on them."""
        return self.each(*args, **kwargs).logsumexp(0) - math.log(len(self))

    def votes(self, *args: Any, **kwargs: Any) -> Tensor:
        """How many members say so, `[n, C]`."""
        found = self.each(*args, **kwargs)
        return nn.functional.one_hot(found.argmax(-1), found.shape[-1]).sum(0)


@dataclass(frozen=True)
class Diversity:
    """How far members of an ensemble differ, pair by pair: `[K, K]`, of which the numbers are means off the diagonal.

    Attributes:
        disagreements: Share of inputs on which i and j predict different classes.
        divergences: Mean over inputs of KL(p_i || p_j), in nats.
        correlations: Correlation over inputs of being wrong; None without labels, NaN where one is never (or always)
            wrong.
    """

    disagreements: Tensor = field(repr=False)
    divergences: Tensor = field(repr=False)
    correlations: Tensor | None = field(default=None, repr=False)

    @property
    def disagreement(self) -> float:
        """Mean share of inputs on which two members disagree."""
        return _mean(self.disagreements)

    @property
    def divergence(self) -> float:
        """Mean KL divergence between two members."""
        return _mean(self.divergences)

    @property
    def correlation(self) -> float:
        """Mean correlation of the errors of two members; NaN without labels."""
        return float("nan") if self.correlations is None else _mean(self.correlations)

    def __str__(self) -> str:
        """One line."""
        errors = "" if self.correlations is None else f", errors correlated by {self.correlation:.2f}"
        return f"members disagree on {self.disagreement:.2%} of inputs, KL {self.divergence:.3g} nats{errors}"


def diversity(log_probabilities: Tensor, y: Tensor | None = None) -> Diversity:
    """How far the members of any ensemble differ on some inputs.

    Args:
        log_probabilities: Of every member, `[K, n, C]`, such as `PathEnsemble.each` gives them.
        y: Classes `[n]`, for the correlation of errors.

    Returns:
        The record.

    Raises:
        ValueError: The shapes do not fit.

    Examples:
        >>> import torch
        >>> p = torch.tensor([[[0.9, 0.1], [0.9, 0.1]], [[0.9, 0.1], [0.1, 0.9]]])
        >>> print(diversity(p.log()))
        members disagree on 50.00% of inputs, KL 0.879 nats
    """
    if log_probabilities.dim() != 3 or (y is not None and y.shape != log_probabilities.shape[1:2]):
        raise ValueError(
            f"log_probabilities: got shape {list(log_probabilities.shape)}"
            f"{'' if y is None else f' with y {list(y.shape)}'}, expected [members, n, classes] and [n]"
        )
    scores = log_probabilities.detach().double()
    guess, p = scores.argmax(-1), scores.exp()
    differ = (guess[:, None] != guess).double().mean(-1)
    floor = scores.clamp(min=torch.finfo(scores.dtype).min)  # 0 log 0 is 0
    cross = torch.einsum("inc,jnc->ij", p, floor) / scores.shape[1]
    divergences = (cross.diagonal()[:, None] - cross).clamp(min=0)
    if y is None:
        return Diversity(differ, divergences)
    wrong = (guess != y).double()
    wrong = wrong - wrong.mean(1, keepdim=True)
    size = wrong.norm(dim=1)
    return Diversity(differ, divergences, wrong @ wrong.T / (size[:, None] * size))


def _mean(matrix: Tensor) -> float:
    """Over the entries off the diagonal; 0 for one member."""
    off = matrix[~torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)]
    return float(off.mean()) if len(off) else 0.0
