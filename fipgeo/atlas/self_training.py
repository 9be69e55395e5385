"""Learning coefficients from inputs without labels: what the network is sure of teaches it the rest.

Axis letters: N examples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.expansion import Expander
from fipgeo.atlas.goals import Goal
from fipgeo.atlas.solve import Fit, fit_
from fipgeo.data import Generator, as_batches, as_generator
from fipgeo.model import ForwardFn, OutputFn


def self_train_(
    model: Composition,
    inputs: Tensor,
    strong: Callable[[Tensor, torch.Generator], Tensor],
    *,
    epochs: int = 10,
    most: int = 100,
    thresholds: tuple[float, float] = (0.9, 1.0),
    power: float = 0.5,
    share: float = 0.25,
    ridge: float = 1e-2,
    steps: int = 10,
    sample: int | None = None,
    generator: Generator = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
) -> list[Fit]:
    """Adapt a composition to inputs whose labels are unknown, in place.

    In every epoch all inputs are scored. The best ones of each class are trusted and get that class as their label
    (`trusted`). The others get their own softened scores as targets where these are sure enough (`pseudo_labels`), to
    be met on a changed view of the input. The objective is share * CE(trusted) + (1 - share) * mean over the others of
    -1[max q > w] q^T log p(strong view), and `fit_` finds the coefficients.

    Args:
        model: Its coefficients are the start and the result.
        inputs: `[N, ...]`, in the view that is scored.
        strong: (inputs, generator) -> inputs that are changed a lot and keep their class, such as crops.
        epochs: How often scores are taken anew.
        most: Trusted examples of a class, at most; no more than N / C.
        thresholds: The least w of the first epoch and the value that it grows towards.
        power: Of the scores in q; the published 0.5 makes them softer.
        share: Of the trusted examples in the objective.
        ridge: Weight of |c|^2 / 2.
        steps: Steps of `fit_` in an epoch.
        sample: Examples of each kind in a step; None for all.
        generator: Draws the views and the samples; the seed 0 if None.
        forward_fn: (network, batch) -> raw outputs.
        output_fn: Raw outputs -> scores `[n, C]`.

    Returns:
        The fit of each epoch.

    Raises:
        ValueError: `share` or a threshold is not between 0 and 1, or there are fewer inputs than classes.

    Source: Zhang et al., Knowledge Composition using Task Vectors with Learned Anisotropic Scaling, NeurIPS 2024, Eqs.
    15 and 16, after FixMatch (Sohn et al., NeurIPS 2020); steps in the metric in place of AdamW are ours.
    """
    low, high = thresholds
    if not (0 <= low <= high <= 1 and 0 < share <= 1):
        raise ValueError(
            f"thresholds, share: got {thresholds} and {share}, expected 0 <= low <= high <= 1 and a share in (0, 1]"
        )
    draws, expander, fits = as_generator(generator), Expander(model, forward_fn, output_fn), []
    for epoch in range(epochs):
        c = model.coefficients.detach()
        batches = as_batches(inputs, argument="inputs")
        scores = torch.cat([expander.outputs(c, batch) for batch in batches]).softmax(-1)
        places, classes = trusted(scores, most)
        goals = [Goal((inputs[places], classes), weight=share, forward_fn=forward_fn, output_fn=output_fn)]
        rest = torch.ones(len(inputs), dtype=torch.bool, device=scores.device)
        rest[places] = False
        targets, sure = pseudo_labels(scores[rest], low + (high - low) * epoch / epochs, power)
        if bool(sure.any()):
            view = strong(inputs[rest][sure], draws)
            weight = (1 - share) * float(sure.double().mean())
            goals.append(Goal((view, targets[sure]), weight=weight, forward_fn=forward_fn, output_fn=output_fn))
        fits.append(fit_(model, goals, ridge=ridge, steps=steps, sample=sample, generator=draws))
    return fits


def trusted(scores: Tensor, most: int = 100) -> tuple[Tensor, Tensor]:
    """The examples that score highest for each class, equally many for all classes.

    Args:
        scores: Probabilities `[N, C]`.
        most: Of one class, at most.

    Returns:
        Their places and classes, `[C k]` each, k = min(N / C rounded down, most). An example that is among the best of
        two classes goes to the one that scores higher, and the other takes its next best.

    Raises:
        ValueError: There are fewer examples than classes.

    Examples:
        >>> trusted(torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.6, 0.4]]))
        (tensor([0, 2]), tensor([0, 1]))
    """
    n, classes = scores.shape
    k = min(n // classes, most)
    if k < 1:
        raise ValueError(f"inputs: got {n} examples and {classes} classes, expected at least one example a class")
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    owner: dict[int, int] = {}
    left = [k] * classes
    for cell in order:
        place, label = divmod(cell, classes)
        if left[label] and place not in owner:
            owner[place] = label
            left[label] -= 1
    places = sorted(owner)
    return (
        torch.tensor(places, device=scores.device),
        torch.tensor([owner[place] for place in places], device=scores.device),
    )


def pseudo_labels(scores: Tensor, threshold: float, power: float = 0.5) -> tuple[Tensor, Tensor]:
    """Targets q = p^power / sum p^power, and whether the largest of each is above the threshold.

    Args:
        scores: Probabilities p `[N, C]`.
        threshold: In [0, 1].
        power: Below 1 for softer targets, above 1 for sharper ones.

    Returns:
        Targets `[N, C]` and flags `[N]`.

    Examples:
        >>> targets, sure = pseudo_labels(torch.tensor([[0.64, 0.36]]), 0.5)
        >>> [round(q, 3) for q in targets[0].tolist()], sure.tolist()
        ([0.571, 0.429], [True])
    """
    raised = scores.pow(power)
    targets = raised / raised.sum(-1, keepdim=True)
    return targets, targets.amax(-1) > threshold
