"""One call for each use: sparsify a network, teach it new data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import Batches, Generator, as_batches
from fipgeo.field import MetricField
from fipgeo.jacobian import MAX_BYTES
from fipgeo.jacobian.embedded import Mask
from fipgeo.model import ForwardFn, OutputFn
from fipgeo.outputs import Geometry
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import Corrector, FirstOrder, GaussNewton, LayerLocal
from fipgeo.paths.driver import Callback, Method, walk
from fipgeo.paths.objectives import Pattern, Score, Sparsity, Unstructured
from fipgeo.paths.objectives.allocation import Allocation
from fipgeo.paths.objectives.new_task import LossFn, NewTask, count_batches
from fipgeo.paths.protected import Protected
from fipgeo.paths.record import PathResult
from fipgeo.paths.saturation import check_openness, tempered
from fipgeo.space import Where

UNSTRUCTURED = Unstructured()

EXACT = StepControl(initial=0.2, smallest=0.05, largest=0.4, tolerance=0.03)
"""Step sizes where every correction is nearly complete, so that drift tells how far a step was."""

FEW_LEFT, FEW_ROWS = 0.5, 2048
"""Gauss-Newton keeps more of the function where at most so many weights are left, in units of protected outputs, or
where these are so few that it sees them all at every step."""

ROUGH = StepControl(initial=0.2, smallest=0.1, largest=0.25, tolerance=0.1)
"""Step sizes where corrections are cut short and the last one does most of the work."""

GRADUAL = StepControl(initial=0.1, smallest=0.07, largest=0.12, tolerance=0.1)
"""Step sizes for minibatches, which lose less to many small changes than to a few large ones."""


def sparsify(
    model: nn.Module,
    inputs: Any,
    sparsity: float | tuple[float, ...] | None = 0.9,
    *,
    geometry: str | Geometry = "logits",
    params: Where = None,
    exclude: Where = None,
    pattern: Pattern = UNSTRUCTURED,
    allocation: Allocation = "global",
    held_out: Any = 0.2,
    budget: float | None = None,
    corrector: str | Corrector = "auto",
    score: str | Score = "auto",
    max_steps: int = 200,
    store: str = "all",
    batch_size: int | None = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    mask: Mask = None,
    generator: Generator = None,
    progress: bool = False,
    callback: Callback | None = None,
    resume: PathResult | None = None,
    after: PathResult | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PathResult:
    """Walk to a sparse network that computes the same function; no labels are needed.

    Weights are set to zero, those first that the outputs feel least (`score` says how that is told), a share at a time;
    the others move so that the outputs on `inputs` return to where they were; what was lost is measured on `held_out`.

    Args:
        model: Any module; not changed. Write a point of the result into it with `path.best(...).apply_(model)`.
        inputs: Inputs whose outputs are to stay: tensor, list of batches or loader.
        sparsity: Share of zeros to reach among the counted weights, in [0, 1); several, increasing, are waypoints, at
            each of which the corrector does its full work (`path.at(objective=0.8)` picks one); None for a pattern
            that has a share of its own (`NofM`).
        geometry: How outputs are compared (see `MetricField`).
        params: Which parameters may move (None: all that require a gradient).
        exclude: Which tensors stay dense (globs or a predicate), besides biases and normalisation scales and shifts.
        pattern: Which weights become zero together: single ones, `NofM(2, 4)`, `Blocks`, `Rows`, `Columns`, `Groups`.
        allocation: How zeros are shared out between tensors (see `Sparsity`).
        held_out: Inputs for the verdict, or the share of `inputs` to set apart for it. They decide nothing,
            but that a point whose outputs on them are not finite is refused.
        budget: Largest drift allowed (see `Method`); None walks to the target whatever it costs.
        corrector: "gauss-newton", "first-order", "layer-local", a `Corrector`, or "auto": Gauss-Newton for small models
            without BatchNorm or recurrent layers where protected outputs are few (2,048) or at least twice the weights
            that will be left; first-order otherwise.
        score: What decides which weights become zero: "metric", "lamp", "local", "obs", "magnitude", a `Score`, or
            "auto": the metric with Gauss-Newton; magnitude for single weights of a network with BatchNorm that
            minibatches correct; lamp otherwise (see the docs, Paths).
        max_steps: Accepted steps at most.
        store: "all" or "last": which points keep their weights.
        batch_size: Examples in a batch when data are tensors (default 256).
        forward_fn: (model, batch) -> raw outputs.
        output_fn: raw outputs -> the tensor or tensors to compare.
        mask: Which positions of outputs `[n, T, ..., C]` are compared (see `MetricField`). An input counts as changed
            if the prediction at any of these positions is.
        generator: Source of all randomness; None for a fixed seed.
        progress: Show a bar.
        callback: Called with the numbers of every accepted point; the walk stops if it returns True.
        resume: A path to continue.
        after: A path with another objective to go on from (see `walk`).
        checkpoint: A file that holds the path after every step; if it is there, it is resumed.

    Returns:
        The path; its last point has exactly the asked number of zeros if `outcome` is "reached".

    Raises:
        ValueError: sparsity is not in [0, 1), the budget is below the first step, or bad inputs.

    Examples:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
        >>> path = sparsify(net, x, sparsity=0.5, corrector="gauss-newton")
        >>> path.outcome, path[-1].sparsity
        ('reached', 0.5)
    """
    wanted = Sparsity(sparsity, exclude, pattern=pattern, allocation=allocation)  # wrong targets are said at once
    data = _batches(inputs, batch_size, "inputs")
    field = MetricField(model, data, geometry, params, forward_fn=forward_fn, output_fn=output_fn, mask=mask)
    check_openness(field)
    chosen = _corrector(corrector, field, wanted)
    exact, gradual = isinstance(chosen, GaussNewton), isinstance(chosen, FirstOrder)
    if score == "auto":
        plain = gradual and bool(field.map.normalisers) and pattern == UNSTRUCTURED
        score = "metric" if exact else "magnitude" if plain else "lamp"
    objective = Sparsity(sparsity, exclude, score, pattern, allocation)
    method = Method(
        control=EXACT if exact else GRADUAL if gradual else ROUGH,
        corrector=chosen,
        damping=1e-2 if exact else None,
        budget=budget,
        max_steps=max_steps,
        store=store,
        join_control=True,
    )
    return walk(
        field,
        objective,
        method,
        held_out=_held_out(held_out, batch_size),
        generator=generator,
        progress=progress,
        callback=callback,
        resume=resume,
        after=after,
        checkpoint=checkpoint,
    )


def adapt(
    model: nn.Module,
    new_batches: Any,
    loss_fn: LossFn,
    *,
    keep: Any,
    budget: float | None = None,
    epochs: float = 1.0,
    lr: float = 0.05,
    momentum: float = 0.9,
    damping: float = 0.1,
    refresh: int = 10,
    feedback: float = 0.0,
    geometry: str | Geometry = "auto",
    params: Where = None,
    hold_zeros: bool = False,
    held_out: Any = 0.2,
    max_steps: int = 10_000,
    store: str = "last",
    batch_size: int | None = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    mask: Mask = None,
    generator: Generator = None,
    progress: bool = False,
    callback: Callback | None = None,
    resume: PathResult | None = None,
    after: PathResult | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PathResult:
    """Teach a network new data while its outputs on old inputs stay; no old labels are needed.

    Gradients of the new loss are passed through the damped inverse of the metric on `keep`, mu (g + mu)^{-1}, so that
    the network learns along directions which the old outputs do not feel. At the end a Gauss-Newton correction looks
    for weights near by where old outputs are what they were and outputs on the new data what they have become, and what
    was lost is measured on `held_out`.

    Args:
        model: Any module; not changed. Write the result into it with `path[-1].apply_(model)`.
        new_batches: `(x, y)` tensors, a list of such batches, or a loader.
        loss_fn: (outputs, y) -> scalar mean loss.
        keep: Old inputs whose outputs are to stay: tensor, list of batches or loader.
        budget: Largest drift allowed (see `PathPoint.drift`); None for no limit.
        epochs: Passes over the new data.
        lr: Learning rate at the start; it decays along a cosine.
        momentum: Heavy-ball coefficient.
        damping: mu as a multiple of the mean non-zero eigenvalue of the metric: smaller keeps more, learns less.
        refresh: Minibatches that share a metric, a step of the path: more cost less, and learn less where data are few.
        feedback: How much of what old outputs have changed each minibatch takes back beside the corrections between
            steps (see `NewTask`); 0.3 learns more of classes of one data set (see the docs, Learning).
        geometry: How outputs are compared (see `MetricField`). "auto" is `Categorical` at the lowest temperature of 2,
            4, 8, ... at which it is not saturated if the new targets are classes, as it leaves more room to learn than
            logits do, and "logits" otherwise; with `after`, that of the path.
        params: Which parameters may move (None: all that require a gradient).
        hold_zeros: Keep weights that are exactly zero at zero; rows of a head that has just grown may move.
        held_out: Old inputs for the verdict, or the share of `keep` to set apart for it.
        max_steps: Accepted steps (of `refresh` minibatches) at most.
        store: "all" or "last": which points keep their weights.
        batch_size: Examples in a batch when data are tensors (default 100 for new data).
        forward_fn: (model, batch) -> raw outputs, for old and new batches.
        output_fn: raw outputs -> the tensor or tensors to compare.
        mask: Which positions of the old outputs `[n, T, ..., C]` are compared (see `MetricField`); `loss_fn` masks new
            ones itself, and the correction at the end holds them where new batches have such a mask.
        generator: Source of all randomness; None for a fixed seed.
        progress: Show a bar.
        callback: Called with the numbers of every accepted point; the walk stops if it returns True.
        resume: A path to continue.
        after: A path with another objective to go on from (see `walk`).
        checkpoint: A file that holds the path after every step; if it is there, it is resumed.

    Returns:
        The path.

    Raises:
        TypeError: `keep` is a sketch: without inputs nothing can be measured (see `fipgeo.optim.FIP`).
        ValueError: The budget is below the first step, the loss is no finite scalar, or bad inputs.
    """
    old = _batches(keep, batch_size, "keep")
    new = _batches(new_batches, batch_size or 100, "new_batches")
    known = "logits" if geometry == "auto" else geometry
    field = MetricField(model, old, known, params, forward_fn=forward_fn, output_fn=output_fn, mask=mask)
    about: dict[str, Any] = {"feedback": feedback, "hold_zeros": hold_zeros, "num_batches": count_batches(new)}
    objective = NewTask(new, loss_fn, epochs=epochs, lr=lr, momentum=momentum, refresh=refresh, **about)
    if geometry == "auto":
        field = tempered(field, new, after)
    check_openness(field)
    method = Method(
        control=StepControl(initial=1.0, smallest=1 / 64, largest=1.0, tolerance=0.1),
        corrector=GaussNewton(steps=0, final_steps=3, max_rows=2048),
        damping=damping,
        budget=budget,
        max_steps=max_steps,
        store=store,
    )
    return walk(
        field,
        objective,
        method,
        held_out=_held_out(held_out, batch_size),
        generator=generator,
        progress=progress,
        callback=callback,
        resume=resume,
        after=after,
        checkpoint=checkpoint,
    )


def _batches(data: Any, batch_size: int | None, argument: str) -> Batches:
    """Data as batches; batch_size says how tensors are cut up, and ready-made batches stay as they are."""
    if isinstance(data, Protected):
        raise TypeError(
            f"{argument}: got {type(data).__name__}, which has no inputs to measure on what is lost; pass inputs, or"
            " train with fipgeo.optim.FIP(model.parameters(), keep), which takes sketches and several protected sets"
        )
    whole = isinstance(data, Tensor | Mapping) or (isinstance(data, tuple) and all(map(torch.is_tensor, data)))
    return as_batches(data, batch_size if whole else None, argument)


def _held_out(held_out: Any, batch_size: int | None) -> Batches | float:
    if isinstance(held_out, int | float):
        if not 0 < held_out < 1:
            raise ValueError(f"held_out: got {held_out}, expected inputs, or a share of the protected ones in (0, 1)")
        return float(held_out)
    return _batches(held_out, batch_size, "held_out")


def _corrector(corrector: str | Corrector, field: MetricField, wanted: Sparsity) -> Corrector:
    if isinstance(corrector, Corrector):
        return corrector
    if corrector == "auto":
        corrector = "gauss-newton" if _by_least_squares(field, wanted) else "first-order"
    kinds = {"gauss-newton": GaussNewton(), "first-order": FirstOrder(), "layer-local": LayerLocal()}
    if corrector not in kinds:
        known = ", ".join(map(repr, kinds))
        raise ValueError(f"corrector: got {corrector!r}, expected one of 'auto', {known} or a Corrector")
    return kinds[corrector]


def _by_least_squares(field: MetricField, wanted: Sparsity) -> bool:
    """Whether Gauss-Newton is quick on this model, and its least squares keep more than many minibatches do."""
    model = field.map.module
    theta = field.map.point()
    outputs = field.map(theta, field.function.batches.first())
    rows = max(sum(f[0].numel() for f in outputs), 1024)  # a step takes at least one batch
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())  # whose rows have no fast way
    if rows * field.space.dim * 4 > MAX_BYTES or field.map.normalisers or recurrent:
        return False
    target = wanted.target[-1] if isinstance(wanted.target, tuple) else wanted.target
    share = 0.5 if target is None else target  # patterns with a share of their own: half, as 2 in 4 leave
    left = field.space.dim - share * int(wanted.counted(field.map).sum())
    held = field.function.survey(theta).num_rows
    return held <= FEW_ROWS or left <= FEW_LEFT * held
