"""Few labelled examples of a new task: coefficients, and classifiers of features that know the examples.

Axis letters: n examples, m stored examples, F features, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.goals import Goal, labels_of
from fipgeo.atlas.solve import Fit, fit_
from fipgeo.data import as_batches


class CacheAdapter(nn.Module):
    r"""A prior classifier plus the labels of stored examples, weighted by how near their features are.

        scores(f) = s cos(f, W) + alpha exp(-beta (1 - cos(f, K))) V

    K are the features of the stored examples, V their one-hot labels, W the prior classifier: embeddings of the
    classes' names, or their mean features (`class_means`). As made it needs no training; `fit_` trains the keys.

    Args:
        features: Of the stored examples, `[m, F]`.
        labels: Their classes, `[m]`, from 0.
        prior: W, `[C, F]`.
        sharpness: s, what cosines with the prior are multiplied by.
        alpha: Weight of the stored examples.
        beta: How fast their weight falls with distance.

    Attributes:
        keys: The parameter K `[m, F]`, of rows of length 1 at the start.

    Raises:
        ValueError: The shapes do not fit, a label is no class of the prior, or a setting is negative.

    Source: Tip-Adapter (Zhang et al., ECCV 2022, arXiv:2207.09519), Eqs. 3 to 6; with trained keys it is Tip-Adapter-F.

    Examples:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> adapter = CacheAdapter(features, labels, torch.eye(3), sharpness=1.0)
        >>> adapter(features).argmax(1).tolist()
        [0, 1, 2]
    """

    keys: nn.Parameter
    values: Tensor
    prior: Tensor

    def __init__(
        self,
        features: Tensor,
        labels: Tensor,
        prior: Tensor,
        *,
        sharpness: float = 16.0,
        alpha: float = 1.0,
        beta: float = 5.5,
    ) -> None:
        super().__init__()
        _check(features, labels, prior)
        if sharpness < 0 or alpha < 0 or beta < 0:
            raise ValueError(f"sharpness, alpha, beta: got {sharpness}, {alpha}, {beta}; expected numbers from 0 up")
        self.sharpness, self.alpha, self.beta = sharpness, alpha, beta
        self.keys = nn.Parameter(normalize(features.detach(), dim=1))
        self.register_buffer("values", one_hot(labels.long(), len(prior)).to(features))
        self.register_buffer("prior", normalize(prior.detach().to(features), dim=1))

    def forward(self, features: Tensor) -> Tensor:
        """Scores `[n, C]` of features `[n, F]`, differentiable in both the features and the keys."""
        rows = normalize(features, dim=1)
        near = (-self.beta * (1 - rows @ normalize(self.keys, dim=1).mT)).exp()
        return self.sharpness * rows @ self.prior.mT + self.alpha * near @ self.values

    def fit_(self, features: Tensor, labels: Tensor, *, steps: int = 100, lr: float = 1e-3) -> list[float]:
        """Train the keys by AdamW on cross-entropy, in place; the learning rate falls to zero along a cosine.

        Args:
            features: `[n, F]`, the stored ones or others.
            labels: `[n]`.
            steps: Each over all of them.
            lr: At the start; 0.001 as published.

        Returns:
            The loss before each step and after the last.
        """
        _check(features, labels, self.prior)
        features, labels = features.detach(), labels.long()
        optimizer = torch.optim.AdamW([self.keys], lr=lr, eps=1e-4)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        losses = []
        with torch.enable_grad():
            for _ in range(steps):
                optimizer.zero_grad()
                loss = cross_entropy(self(features), labels)
                loss.backward()
                optimizer.step()
                schedule.step()
                losses.append(loss.item())
        optimizer.zero_grad()
        with torch.no_grad():
            return [*losses, cross_entropy(self(features), labels).item()]


class LinearProbe(nn.Module):
    r"""A linear classifier of features to which every class adds its prior by a weight of its own.

        scores_k(f) = f . (w_k + alpha_k t_k)

    f and t are of length 1. Cross-entropy is convex in w and alpha. `fit_` minimises a quadratic that lies above it,
    first over w, then over alpha, whose curvature comes from the features: no learning rate is chosen and the loss
    never rises.

    Args:
        features: Of labelled examples, `[n, F]`.
        labels: Their classes, `[n]`, from 0.
        prior: t, `[C, F]`: embeddings of the classes' names, or their mean features (`class_means`).
        sharpness: What the cosine of a class's examples with its prior is multiplied by to make the first alpha.

    Attributes:
        weight: The parameter w `[C, F]`; at the start the mean features of the classes, zero for a class without any.
        blend: The parameter alpha `[C]`, equal for all classes at the start.

    Raises:
        ValueError: The shapes do not fit, or a label is no class of the prior.

    Source: LP++ (Huang et al., CVPR 2024, arXiv:2404.02285): the model, the start and block majorise-minimise. The
    published steps take 1/4, which bounds the curvature of one class alone; here it is the 1/2 of Böhning (1992),
    which bounds that of all classes at once, so that descent is certain.

    Examples:
        >>> features, labels = torch.eye(3), torch.tensor([0, 1, 2])
        >>> probe = LinearProbe(features, labels, torch.eye(3), sharpness=1.0)
        >>> losses = probe.fit_(features, labels, steps=20)
        >>> losses[-1] < losses[0], probe(features).argmax(1).tolist()
        (True, [0, 1, 2])
    """

    weight: nn.Parameter
    blend: nn.Parameter
    prior: Tensor

    def __init__(self, features: Tensor, labels: Tensor, prior: Tensor, *, sharpness: float = 16.0) -> None:
        super().__init__()
        _check(features, labels, prior)
        self.register_buffer("prior", normalize(prior.detach().to(features), dim=1))
        rows = normalize(features.detach(), dim=1)
        marks = one_hot(labels.long(), len(prior)).to(rows)
        counts = marks.sum(0)
        self.weight = nn.Parameter(marks.mT @ rows / counts.clamp(min=1)[:, None])
        near = ((rows @ self.prior.mT) * marks).sum(0)[counts > 0] / counts[counts > 0]
        self.blend = nn.Parameter((sharpness * near.mean()).expand(len(prior)).clone())

    def forward(self, features: Tensor) -> Tensor:
        """Scores `[n, C]` of features `[n, F]`."""
        return normalize(features, dim=1) @ (self.weight + self.blend[:, None] * self.prior).mT

    @torch.no_grad()
    def fit_(self, features: Tensor, labels: Tensor, *, steps: int = 300) -> list[float]:
        """Learn w and alpha in place.

        With p the softmax of the scores and y the one-hot labels, the gradients are (p - y)^T f / n by w and the
        sums of (p - y)_k f . t_k / n by alpha. They are divided by upper bounds of the curvature,
        lambda_max(f^T f) / 2n and sum (f . t_k)^2 / 2n.

        Args:
            features: `[n, F]`; they stay as they are, so a network that makes them is trained before.
            labels: `[n]`.
            steps: Of both blocks.

        Returns:
            The loss before each step and after the last; never rising.
        """
        _check(features, labels, self.prior)
        rows, n = normalize(features, dim=1), len(features)
        near = rows @ self.prior.mT
        marks = one_hot(labels.long(), len(self.prior)).to(rows)
        steep = torch.linalg.matrix_norm(rows, 2).square() / (2 * n)
        slopes = (near.square().sum(0) / (2 * n)).clamp(min=torch.finfo(rows.dtype).tiny)

        def gap() -> Tensor:
            return (rows @ self.weight.mT + self.blend * near).softmax(1) - marks

        losses = [cross_entropy(self(features), labels.long()).item()]
        for _ in range(steps):
            self.weight.sub_(gap().mT @ rows / (n * steep))
            self.blend.sub_((gap() * near).sum(0) / (n * slopes))
            losses.append(cross_entropy(self(features), labels.long()).item())
        return losses


def class_means(features: Tensor, labels: Tensor, classes: int | None = None) -> Tensor:
    """Mean directions of the features of each class, of length 1, `[C, F]`: a prior where classes have no embedding.

    Args:
        features: `[n, F]`.
        labels: `[n]`, from 0.
        classes: C; None for the largest label plus 1.

    Returns:
        The means; zero for classes without an example.

    Examples:
        >>> class_means(torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]), torch.tensor([0, 1, 1]))
        tensor([[1., 0.],
                [0., 1.]])
    """
    count = int(labels.max()) + 1 if classes is None else classes
    return normalize(one_hot(labels.long(), count).to(features).mT @ normalize(features, dim=1), dim=1)


@dataclass(frozen=True, eq=False)
class FewShot:
    """What a few examples made.

    Attributes:
        classifier: Features `[n, F]` to scores `[n, C]`.
        fits: How the coefficients were learned, one for each round.
        losses: Of the classifier's training, over all rounds; empty for the prior alone.
    """

    classifier: Callable[[Tensor], Tensor]
    fits: tuple[Fit, ...]
    losses: tuple[float, ...]


def few_shot_(
    model: Composition,
    data: Any,
    prior: Tensor,
    *,
    adapter: str | None = "probe",
    sharpness: float = 16.0,
    rounds: int = 1,
    ridge: float = 0.0,
    steps: int = 100,
) -> FewShot:
    """Transfer to a task from a few labelled examples: coefficients in place, then a classifier of the features.

    The coefficients are learned under the cosines with the prior, times `sharpness`. The classifier is then made of
    and trained on the features of the composed network, which takes no further pass through it. In further rounds the
    coefficients are learned under that classifier's scores, and it is made anew.

    Args:
        model: A composition whose output is features `[n, F]`.
        data: The examples, batches `(x, y)` with y from 0.
        prior: Of the classes, `[C, F]`: embeddings of their names, or `class_means` of the features at the start.
        adapter: "cache" for `CacheAdapter`, "probe" for `LinearProbe`, None for the prior alone.
        sharpness: Of the prior's scores.
        rounds: Of coefficients and classifier.
        ridge: As in `fit_`.
        steps: As in `fit_`, for each round.

    Returns:
        The classifier of the composed network's features, and how learning went.

    Raises:
        ValueError: The adapter is unknown, there are no rounds, or the data have no labels.

    Source: Zhang et al., Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, NeurIPS 2024
    (arXiv:2407.02880), section 5.2, which adds both classifiers to learned coefficients; the linear probe after them,
    as there.

    Examples:
        >>> from fipgeo import TaskVector
        >>> net, tuned, x = nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(12, 3)
        >>> y = torch.arange(12) % 3
        >>> model = Composition(net, [TaskVector.between(net, tuned)])
        >>> found = few_shot_(model, (x, y), class_means(net(x), y), adapter="cache")
        >>> found.classifier(model(x)).shape
        torch.Size([12, 3])
    """
    if adapter not in (None, "cache", "probe") or rounds < 1:
        raise ValueError(
            f"adapter, rounds: got {adapter!r}, {rounds}; expected 'cache', 'probe' or None, and at least 1"
        )
    batches = as_batches(data, argument="data").hold()
    unit = normalize(prior.detach(), dim=1)
    classifier: Callable[[Tensor], Tensor] = lambda features: sharpness * normalize(features, dim=1) @ unit.mT  # noqa: E731
    fits, losses = [], []
    for _ in range(rounds):
        current = classifier
        goal = Goal(batches, output_fn=lambda features: current(features))  # noqa: B023
        fits.append(fit_(model, goal, ridge=ridge, steps=steps))
        if adapter is None:
            continue
        features, labels = _features(model, batches)
        kind = CacheAdapter if adapter == "cache" else LinearProbe
        made = kind(features, labels, prior, sharpness=sharpness)
        losses += made.fit_(features, labels)
        classifier = made.requires_grad_(False)
    return FewShot(classifier, tuple(fits), tuple(losses))


@torch.no_grad()
def _features(model: Composition, batches: Any) -> tuple[Tensor, Tensor]:
    """What the composed network makes of all examples in eval mode, and their labels."""
    net = model.merge().eval()
    features, labels = [], []
    for batch in batches:
        y = labels_of(batch)
        if y is None:
            raise ValueError("data: a classifier needs labels; pass batches (x, y) with a tensor y")
        features.append(net(batch[0]))
        labels.append(y)
    return torch.cat(features), torch.cat(labels)


def _check(features: Tensor, labels: Tensor, prior: Tensor) -> None:
    if features.dim() != 2 or labels.shape != features.shape[:1] or prior.dim() != 2 or len(features) == 0:
        raise ValueError(
            f"features, labels, prior: got shapes {list(features.shape)}, {list(labels.shape)} and"
            f" {list(prior.shape)}; expected [n, F], [n] and [C, F] with n at least 1"
        )
    if prior.shape[1] != features.shape[1]:
        raise ValueError(f"prior: got {prior.shape[1]} features, expected the {features.shape[1]} of the examples")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= len(prior):
        raise ValueError(
            f"labels: got {labels.dtype} from {labels.min().item()} to {labels.max().item()}; expected classes from"
            f" 0 to {len(prior) - 1}; number them with torch.searchsorted(y.unique(), y)"
        )
