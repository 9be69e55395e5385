"""One call towards robustness against small changes of the inputs."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo.attacks import Attack
from fipgeo.data import Generator, TensorBatches
from fipgeo.field import MetricField
from fipgeo.linalg import as_generator
from fipgeo.model import OutputFn
from fipgeo.outputs import Geometry
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import NoCorrection
from fipgeo.paths.driver import Callback, Method, walk
from fipgeo.paths.objectives import Robustness
from fipgeo.paths.objectives.new_task import LossFn, count_batches
from fipgeo.paths.record import PathResult
from fipgeo.paths.saturation import check_openness
from fipgeo.space import Where


def robustify(
    model: nn.Module,
    inputs: Tensor,
    attack: Attack,
    *,
    share: float = 0.5,
    targets: Tensor | None = None,
    loss_fn: LossFn = cross_entropy,
    budget: float | None = None,
    epochs: float = 1.0,
    lr: float = 0.05,
    momentum: float = 0.9,
    damping: float | None = 0.1,
    refresh: int = 10,
    max_rows: int = 1024,
    geometry: str | Geometry = "logits",
    params: Where = None,
    held_out: Tensor | float = 0.2,
    max_steps: int = 10_000,
    store: str = "all",
    batch_size: int = 100,
    output_fn: OutputFn | None = None,
    generator: Generator = None,
    progress: bool = False,
    callback: Callback | None = None,
    resume: PathResult | None = None,
    after: PathResult | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PathResult:
    """Walk to a network that withstands an attack and computes the same on clean inputs; no labels are needed.

    Minibatches are attacked, and the gradient of the loss on what the attack found is passed through the damped inverse
    of the metric on clean inputs (see `Robustness`). `PathEnsemble.along(path, model)` averages networks of the path.

    Args:
        model: Any classifier of tensors; not changed. Write a point into it with `path[-1].apply_(model)`.
        inputs: Clean inputs `[N, ...]`, which are attacked and whose outputs are to stay.
        attack: Such as `fipgeo.attacks.pgd(2 / 255, 3, bounds=(0, 1))`; restarts are not used.
        share: Share of each minibatch that is attacked; the rest stays clean.
        targets: What `loss_fn` compares outputs with, labels `[N]` say; None for the model's own probabilities.
        loss_fn: (outputs, targets) -> scalar mean loss, which the attack raises and the path lowers.
        budget: Largest drift allowed (see `PathPoint.drift`); None for no limit.
        epochs: Passes over the inputs.
        lr: Learning rate at the start; it decays along a cosine.
        momentum: Heavy-ball coefficient.
        damping: mu as a multiple of the mean non-zero eigenvalue of the metric: smaller keeps more and gains less; None
            for no metric.
        refresh: Minibatches that share a metric, a step of the path.
        max_rows: Outputs in a metric (see `Method`).
        geometry: How outputs are compared (see `MetricField`).
        params: Which parameters may move (None: all that require a gradient).
        held_out: Inputs for the verdict, or the share of `inputs` to set apart for it, which are not attacked then.
        max_steps: Accepted steps at most.
        store: "all" or "last": which points keep their weights; an ensemble takes several.
        batch_size: Examples in a minibatch.
        output_fn: raw outputs -> the tensor of scores.
        generator: Source of all randomness; None for a fixed seed.
        progress: Show a bar.
        callback: Called with the numbers of every accepted point; the walk stops if it returns True.
        resume: A path to continue.
        after: A path with another objective to go on from (see `walk`).
        checkpoint: A file that holds the path after every step; if it is there, it is resumed.

    Returns:
        The path; `objective` of its points is the mean loss over a step's minibatches under attack.

    Raises:
        TypeError: inputs is no tensor, or attack no `Attack`.
        ValueError: The budget is below the first step, the loss is no finite scalar, or bad inputs.

    Examples:
        >>> import torch
        >>> from fipgeo.attacks import pgd
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> path = robustify(net, x, pgd(0.1, 3), batch_size=20, refresh=4)
        >>> path.outcome, path.objective_name, len(path)
        ('reached', 'adversarial loss', 3)
    """
    if not isinstance(inputs, Tensor):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected a tensor of clean inputs, which is attacked")
    options: dict[str, Any] = {"geometry": geometry, "params": params, "output_fn": output_fn}
    field = MetricField(model, TensorBatches(inputs, batch_size), **options)
    check_openness(field)
    data = TensorBatches((inputs, _scores(field) if targets is None else targets), batch_size)
    held: Any = held_out
    if isinstance(held_out, int | float):
        data, held = data.split(float(held_out), as_generator(generator))
        held = TensorBatches(held.tree[0], batch_size)
    assert isinstance(data, TensorBatches)
    field = MetricField(model, TensorBatches(data.tree[0], batch_size), **options)
    about: dict[str, Any] = {"lr": lr, "momentum": momentum, "refresh": refresh, "num_batches": count_batches(data)}
    objective = Robustness(data, loss_fn, epochs, attack=attack, share=share, **about)
    method = Method(
        control=StepControl(initial=1.0, smallest=1 / 64, largest=1.0, tolerance=0.1),
        corrector=NoCorrection(),
        **{"damping": damping, "max_rows": max_rows, "budget": budget, "max_steps": max_steps, "store": store},
    )
    return walk(
        field,
        objective,
        method,
        held_out=held,
        generator=generator,
        progress=progress,
        callback=callback,
        resume=resume,
        after=after,
        checkpoint=checkpoint,
    )


def _scores(field: MetricField) -> Tensor:
    """The model's own probabilities on the field's inputs, `[N, C]`."""
    point = field.map.point()
    outputs = [field.map(point, batch)[0] for batch in field.function.batches]
    return torch.cat(outputs).softmax(-1)
