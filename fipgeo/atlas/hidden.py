r"""A classifier that sees a whole network, from a few labelled examples and in closed form.

    K = mean over maps l of H_l H_l^T / F_l        y_c ~ N(0, sigma_c^2 (K + r)), centred, for every class c

H_l `[n, F_l]` is what a linear map sees of n examples. The ridge r is the one under which the labels are most probable;
so are coefficients of task vectors, of which K is a function. Axis letters: n examples, F features, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import one_hot

from fipgeo.atlas.composition import Composition
from fipgeo.atlas.goals import labels_of
from fipgeo.data import as_batches

MEAN = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
MOST = {1: F.adaptive_max_pool1d, 2: F.adaptive_max_pool2d, 3: F.adaptive_max_pool3d}
CELLS = (1, 2, 4)
"""Parts of each axis of what a convolution sees."""
EARLY = 1 / 3
"""Share of the maps, the first ones, that are left out."""
LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
SHRINK = 0.1
"""Share of the mean deviation of a map's numbers that is added to the deviation of each."""
Mask = Callable[[Any], Tensor]
RIDGES = torch.logspace(-5, 2, 57, dtype=torch.float64)
"""Those that are tried, as multiples of the mean eigenvalue of K."""


class HiddenClassifier:
    """Scores by ridge regression on what the linear maps of a network see.

    A convolution sees an image: mean and maximum over the parts of coarse grids are kept. A map that sees tokens
    `[n, T, F]` gives both over the tokens. Numbers are standardised by the examples, and every map and grid counts
    alike; with a mask, those tokens count that are there. What the network puts out, `[n, C]`, counts as one more.
    The last layers know what the network was trained for; those before know the rest, which a new task may need.
    The system has an equation for each example, so this is for few of them; for many, and task after task, there is
    `fipgeo.memory.ReadoutSketch`.

    Args:
        network: Any module; it is kept, not copied, and evaluated in eval mode.
        data: The examples, `(x, y)` or batches of them, with classes y from 0; at least two.
        cells: Grids of so many parts along each axis; an axis that is shorter stays as it is.
        early: Share of the maps, the first ones, that are left out.
        mask: x -> boolean `[n, T]`: which tokens are no padding; None for all.

    Attributes:
        ridge: r.
        evidence: The log of the labels' probability, but for a constant.

    Raises:
        ValueError: Labels are missing, there are fewer than two examples, no linear map sees them one by one, or the
            mask leaves an example no token.

    Source: ridge regression on the features of all layers in place of the last is Head2Toe (Evci et al., ICML 2022,
    arXiv:2201.03529), there with features that are selected and trained on by gradients; the choice of r is empirical
    Bayes (MacKay, Bayesian Interpolation, 1992).

    Examples:
        >>> net = nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 2))
        >>> x = torch.randn(3, 9).repeat(2, 1)
        >>> known = HiddenClassifier(net, (x, torch.arange(6) % 3))
        >>> known(x).argmax(1)
        tensor([0, 1, 2, 0, 1, 2])
    """

    def __init__(
        self,
        network: nn.Module,
        data: Any,
        *,
        cells: Sequence[int] = CELLS,
        early: float = EARLY,
        mask: Mask | None = None,
    ) -> None:
        if not cells or min(cells) < 1 or not 0 <= early < 1:
            raise ValueError(f"cells, early: got {cells} and {early}, expected numbers from 1 up, and a share below 1")
        self.network, self.view = network, View(tuple(cells), early, mask)
        with torch.no_grad():
            rows, y = _examples(network, data, self.view)
            self.maps = [_standardised(part) for part in rows]
            kernel = _kernel(self.maps)
            targets = _targets(y)
            found = evidence(kernel, targets)
            self.ridge, self.evidence = found.ridge, float(found.log)
            eye = torch.eye(len(y), dtype=kernel.dtype, device=kernel.device)
            self.weights = torch.linalg.solve(kernel + found.ridge * eye, targets)
            self.shares = one_hot(y).to(kernel).mean(0)

    @torch.no_grad()
    def __call__(self, x: Any) -> Tensor:
        """Scores `[n, C]`, near 1 for the class of an input and near 0 for others."""
        rows = self.view(self.network, self.network, x)
        pairs = zip(rows, self.maps, strict=True)
        kernel = sum(((h - m.mean) / m.scale).double() @ m.rows.T / m.rows.shape[1] for h, m in pairs)
        return kernel / len(self.maps) @ self.weights + self.shares


class _Map(NamedTuple):
    """What one map saw of the examples: `[n, F]` standardised in float64, and by what, `[F]`."""

    rows: Tensor
    mean: Tensor
    scale: Tensor


class Evidence(NamedTuple):
    """How probable labels are.

    Attributes:
        log: Of their probability at the best ridge, but for a constant; differentiable in the kernel.
        ridge: The best.
    """

    log: Tensor
    ridge: float


def evidence(kernel: Tensor, targets: Tensor) -> Evidence:
    """How probable targets `[n, C]` are if y_c ~ N(0, sigma_c^2 (K + r)), each sigma and the one r at their best.

    Args:
        kernel: K `[n, n]`, in float64.
        targets: Classes for which all are zero tell nothing.
    """
    targets = targets[:, targets.any(0)]
    n, count = targets.shape
    values, vectors = torch.linalg.eigh(kernel.detach())
    values, squares = values.clamp(min=0), (vectors.T @ targets).square()
    ridges = RIDGES.to(values) * values.mean().clamp(min=torch.finfo(values.dtype).tiny)
    spread = values[:, None] + ridges
    noise = (squares.T @ spread.reciprocal()) / n  # [C, ridges]
    ridge = ridges[(n * noise.log().sum(0) + count * spread.log().sum(0)).argmin()]
    root = torch.linalg.cholesky(kernel + ridge * torch.eye(n, dtype=kernel.dtype, device=kernel.device))
    noise = (targets * torch.cholesky_solve(targets, root)).sum(0) / n
    return Evidence(-(n * noise.log().sum() + 2 * count * root.diagonal().log().sum()) / 2, float(ridge))


def fit_hidden_(
    model: Composition,
    data: Any,
    *,
    cells: Sequence[int] = CELLS,
    early: float = EARLY,
    mask: Mask | None = None,
    starts: Sequence[float] = (),
    steps: int = 15,
    lr: float = 0.02,
) -> HiddenClassifier:
    """Learn the coefficients by the evidence of a few labelled examples, in place, and the classifier there.

    The evidence asks that examples of one class look alike to the composed network, and those of others unlike, under
    the ridge that suits them best; no head is trained on the way, and all examples both teach and judge. Few steps are
    enough, and far ones would fit the examples (see `lr`).

    Args:
        model: Its coefficients are the start and the result; evaluated in eval mode.
        data: As for `HiddenClassifier`.
        cells: As there.
        early: As there.
        mask: As there.
        starts: Further starts, as common values of all coefficients: merges of the vectors that are closer to the task
            than the network itself, where tasks are related. The most probable one is taken, if there is a class with
            two examples: others do not tell what looks alike.
        steps: Of Adam on the log evidence.
        lr: About how far a coefficient may move in a step.

    Returns:
        The classifier of the merged network.

    Raises:
        ValueError: The composition is linear, or as for `HiddenClassifier`.

    Examples:
        >>> from fipgeo import TaskVector
        >>> net, tuned, x = nn.Linear(3, 4), nn.Linear(3, 4), torch.randn(6, 3)
        >>> model = Composition(net, [TaskVector.between(net, tuned)])
        >>> fit_hidden_(model, (x, torch.arange(6) % 3))(x).shape
        torch.Size([6, 3])
    """
    if model.linear:
        raise ValueError("model: got a linear composition, whose maps see what they saw before; pass linear=False")
    view = View(tuple(cells), early, mask)

    def log_evidence() -> Tensor:
        with model.once():
            rows, y = _examples(model, data, view)
            found = evidence(_kernel([_standardised(part) for part in rows]), _targets(y)).log
            if found.requires_grad:
                (-found).backward()
        return found.detach()

    if starts and _repeated(data):
        _choose(model.coefficients, starts, log_evidence)
    optimizer = torch.optim.Adam([model.coefficients], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.enable_grad():
            log_evidence()
        optimizer.step()
    optimizer.zero_grad()
    return HiddenClassifier(model.merge(), data, cells=cells, early=early, mask=mask)


@torch.no_grad()
def _choose(coefficients: Tensor, starts: Sequence[float], log_evidence: Callable[[], Tensor]) -> None:
    """The coefficients as they are, or a common value of them, by the evidence."""
    candidates = [coefficients.clone(), *(torch.full_like(coefficients, float(value)) for value in starts)]
    best, most = candidates[0], -math.inf
    try:
        for candidate in candidates:
            coefficients.copy_(candidate)
            if (found := float(log_evidence())) > most:
                best, most = candidate, found
    finally:
        coefficients.copy_(best)


class View(NamedTuple):
    """What is looked at of a network, as for `HiddenClassifier`."""

    cells: tuple[int, ...]
    early: float
    mask: Mask | None = None

    def __call__(self, network: nn.Module, module: nn.Module, x: Any) -> list[Tensor]:
        """Numbers `[n, F]` of each map and grid, in the order of the forward pass, and the output.

        Args:
            network: Is called.
            module: Holds the maps.
            x: `[n, ...]`.
        """
        found: list[tuple[nn.Module, Tensor]] = []

        def see(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            if isinstance(inputs[0], Tensor) and inputs[0].dim() > 1 and len(inputs[0]) == len(x):
                found.append((layer, inputs[0]))

        handles = [layer.register_forward_pre_hook(see) for layer in module.modules() if isinstance(layer, LINEAR)]
        training = [layer for layer in module.modules() if layer.training]
        module.eval()
        try:
            output = network(x)
        finally:
            for layer in training:
                layer.training = True
            for handle in handles:
                handle.remove()
        if not found:
            raise ValueError("network: no nn.Linear or convolution sees the examples one by one; nothing can be read")
        living = None if self.mask is None else self._living(x)
        late = found[round(self.early * len(found)) :]
        rows = [part for layer, seen in late for part in self.parts(layer, seen, living)]
        return [*rows, output] if isinstance(output, Tensor) and output.dim() == 2 else rows

    def _living(self, x: Any) -> Tensor:
        """The mask of a batch."""
        assert self.mask is not None
        living = self.mask(x).to(torch.bool)
        if living.dim() != 2 or len(living) != len(x) or not bool(living.any(1).all()):
            raise ValueError(
                f"mask: gave shape {list(living.shape)} for {len(x)} examples; expected [n, T] with a token in each row"
            )
        return living

    def parts(self, layer: nn.Module, seen: Tensor, living: Tensor | None = None) -> list[Tensor]:
        """Mean and maximum over the cells of each grid, or over tokens, of which those count that live `[n, T]`."""
        if isinstance(layer, nn.Linear):
            return [seen if seen.dim() == 2 else _over_tokens(seen, living)]
        axes, out = seen.dim() - 2, []
        for cells in self.cells:
            grid = [min(cells, size) for size in seen.shape[2:]]
            out.append(torch.cat([MEAN[axes](seen, grid), MOST[axes](seen, grid)], 1).flatten(1))
        return out


def _over_tokens(seen: Tensor, living: Tensor | None) -> Tensor:
    """Mean and maximum of `[n, T, ..., F]` over all axes between, of tokens that live `[n, T]`, `[n, 2 F]`."""
    rows = seen.flatten(1, -2)
    if living is None or living.shape[1] != seen.shape[1]:
        return torch.cat([rows.mean(1), rows.amax(1)], 1)
    each = living.view(*living.shape, *(1,) * (seen.dim() - 2)).expand_as(seen).flatten(1, -2)
    mean = rows.masked_fill(~each, 0.0).sum(1) / each.sum(1)
    return torch.cat([mean, rows.masked_fill(~each, -torch.inf).amax(1)], 1)


def _examples(network: nn.Module, data: Any, view: View) -> tuple[list[Tensor], Tensor]:
    """What every map sees of all examples, and their labels `[n]`."""
    module = network.module if isinstance(network, Composition) else network
    parts, labels = [], []
    for batch in as_batches(data, argument="data"):
        y = labels_of(batch)
        if y is None or y.is_floating_point() or y.dim() != 1:
            raise ValueError("data: a classifier needs classes; pass batches (x, y) with y `[n]` of whole numbers")
        parts.append(view(network, module, batch[0]))
        labels.append(y)
    y = torch.cat(labels).long()
    if len(y) < 2 or bool((y == y[0]).all()):
        raise ValueError(f"data: got {len(y)} examples of one class; expected examples of two classes or more")
    return [torch.cat(rows) for rows in zip(*parts, strict=True)], y


def _repeated(data: Any) -> bool:
    """Whether some class has two examples."""
    labels = [y.flatten().long() for batch in as_batches(data, argument="data") if (y := labels_of(batch)) is not None]
    return bool(labels) and len(torch.cat(labels).unique()) < sum(map(len, labels))


def _standardised(rows: Tensor) -> _Map:
    """In float64; numbers that are equal for all examples become zero."""
    mean, scale = rows.mean(0), rows.std(0)
    scale = (scale + SHRINK * scale.mean()).clamp(min=torch.finfo(rows.dtype).tiny)
    return _Map(((rows - mean) / scale).double(), mean, scale)


def _kernel(maps: list[_Map]) -> Tensor:
    """`[n, n]`; its rows and columns sum to zero, as those of the maps do."""
    return torch.stack([m.rows @ m.rows.T / m.rows.shape[1] for m in maps]).mean(0)


def _targets(y: Tensor) -> Tensor:
    """One-hot labels less their mean, `[n, C]` in float64."""
    marks = one_hot(y).double()
    return marks - marks.mean(0)
