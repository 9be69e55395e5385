"""The driver: predictor, corrector, verdict, again and again until the objective is reached or the budget spent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Batches, Generator
from fipgeo.field import MetricField
from fipgeo.linalg import as_generator
from fipgeo.model import NotFiniteError
from fipgeo.outputs import Geometry
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import Corrector
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives import Objective
from fipgeo.paths.record import PathPoint, PathResult
from fipgeo.paths.state import PathState
from fipgeo.paths.verdict import Measured, Verdict

Callback = Callable[[Mapping[str, float]], Any]

OUTCOMES = {
    "reached": "the objective was reached",
    "budget": "no step, however small, stayed within the budget; raise budget or protect with more inputs to go on",
    "stalled": "every further step ended in outputs or derivatives that are not finite; take smaller steps, or exclude"
    " tensors that must not become zero",
    "max_steps": "max_steps were walked; pass resume= with a larger max_steps to go on",
}


@dataclass(frozen=True)
class Method:
    """How a path is walked.

    Attributes:
        control: Step sizes.
        corrector: What brings the outputs back.
        damping: mu of the predictor, as a multiple of the mean non-zero eigenvalue of the metric; None to step without
            a metric and leave everything to the corrector.
        max_rows: Embedded outputs in the predictor's metric; more protected inputs than that are sampled anew for
            every step.
        budget: Largest drift allowed, or None.
        max_steps: Accepted steps at most.
        store: "all" to keep the weights of every point, "last" to keep those of the start and the end only.
    """

    control: StepControl
    corrector: Corrector
    damping: float | None = 1e-2
    max_rows: int = 1024
    budget: float | None = None
    max_steps: int = 200
    store: str = "all"

    def __post_init__(self) -> None:
        """Check the budget and what is stored."""
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget: got {self.budget}, expected a positive drift, or None for no limit")
        if self.damping is not None and not self.damping > 0:
            raise ValueError(f"damping: got {self.damping}, expected a positive number, or None for no metric")
        for key, least in (("max_steps", 1), ("max_rows", 1)):
            if not getattr(self, key) >= least:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected at least {least}")
        if self.store not in ("all", "last"):
            raise ValueError(f"store: got {self.store!r}, expected 'all' or 'last'")


def walk(
    field: MetricField,
    objective: Objective,
    method: Method,
    *,
    held_out: Batches | float = 0.2,
    generator: Generator = None,
    progress: bool = False,
    callback: Callback | None = None,
    resume: PathResult | None = None,
) -> PathResult:
    """Walk from the model's present weights towards an objective while its outputs on the field's inputs stay.

    Args:
        field: Model, protected inputs and geometry. The model is not changed.
        objective: What to walk towards.
        method: How.
        held_out: Inputs for the verdict, or the share of the protected inputs to set apart for it.
        generator: Source of all randomness.
        progress: Show a bar.
        callback: Called with the numbers of every accepted point.
        resume: A path to continue; walked with the same arguments it goes on as if it had never stopped.

    Returns:
        The path.

    Raises:
        ValueError: The budget does not allow even the smallest first step; `resume` is the path of another model or
            objective; or bad inputs (see `OutputMap.check`).
    """
    with torch.inference_mode(False):
        return _prepared(field, objective, method, held_out, generator, resume).run(progress, callback)


def _prepared(
    field: MetricField,
    objective: Objective,
    method: Method,
    held_out: Batches | float,
    generator: Generator,
    resume: PathResult | None,
) -> _Walker:
    """Everything looked at and cached before the first step."""
    field.map.check(field.function.batches.first())
    random, begun = as_generator(generator), None
    if resume is not None:
        _check_resume(resume, objective, field)
        begun = PathState.read(resume.state, field.space.device)
        random = torch.Generator()
        random.set_state(resume.state["generator_start"])
    generator_start = random.get_state()
    if isinstance(held_out, Batches):
        field.map.check(held_out.first())
        inside, outside = field.function.batches, held_out
    else:
        inside, outside = field.function.batches.split(held_out, random)
    start = Position(field.map.point(), field.map.normalisation()) if begun is None else begun.start
    function = replace(field.function, map=field.map.with_buffers(start.buffers))
    protected, unseen = replace(function, batches=inside), replace(function, batches=outside)
    if function.mask is not None:  # a mask of other values than 0 and 1, or of nothing, is said before the first step
        protected.survey(start.theta)
        unseen.survey(start.theta)
    kept, verdict = Kept.of(protected, start.theta), Verdict(unseen, start.theta)
    walker = _Walker(objective, method, kept, verdict, objective.counted(field.map), random, generator_start)
    if resume is None or begun is None:
        walker.state = PathState(start, start, method.control.initial, objective=objective.begin(kept, start))
        walker.points = [walker.point(walker.state, walker.measure(start), None)]
    else:
        random.set_state(resume.state["generator"])
        walker.state, walker.points = begun, list(resume.points)
        _check_same(resume, walker.measure(begun.position), function.geometry)
    return walker


@dataclass(eq=False)
class _Walker:
    """What stays fixed along a path, and at the end of the list what does not: its state and its points."""

    objective: Objective
    method: Method
    kept: Kept
    verdict: Verdict
    counted: Tensor
    generator: torch.Generator
    generator_start: Tensor
    state: PathState = field(init=False)
    points: list[PathPoint] = field(init=False)

    def run(self, progress: bool, callback: Callback | None) -> PathResult:
        """Steps until an outcome is there."""
        control, budget, state, points = self.method.control, self.method.budget, self.state, self.points
        outcome = "reached" if self.objective.reached(state.objective) else ""
        clock = time.perf_counter() - state.seconds
        with _bar(progress, self.objective.name) as show:
            while not outcome:
                if len(points) > self.method.max_steps:
                    outcome = "max_steps"
                    break
                try:
                    tried, measured = self.step(state)
                except NotFiniteError:  # outputs overflowed on the way: there is no verdict, so the step is refused
                    tried, measured = state, Measured(math.inf, math.inf, math.nan, math.nan)
                tried = replace(tried, seconds=time.perf_counter() - clock)
                added = measured.drift - points[-1].drift
                if not control.accepts(state.size, added=added, drift=measured.drift, budget=budget):
                    if state.size <= control.smallest:
                        self.check_first(points, state.size, measured)
                        outcome = "budget" if math.isfinite(measured.drift) else "stalled"
                    state = replace(state, size=control.smaller(state.size), cost=tried.cost)
                    continue
                if self.method.store == "last" and len(points) > 1:
                    points[-1] = replace(points[-1], tensors=None)
                points.append(self.point(tried, measured, points[-1], state.position))
                state = replace(tried, size=control.following(state.size, added=added))
                show(points[-1])
                if callback is not None:
                    callback(points[-1].to_dict())
                outcome = "reached" if self.objective.reached(state.objective) else ""
        return self.result(state, points, outcome)

    def step(self, state: PathState) -> tuple[PathState, Measured]:
        """One whole step: predictor, corrector, verdict."""
        proposal = self.objective.propose(
            self.kept, state.position, state.objective, state.size, self.predictor, self.generator
        )
        corrected = self.method.corrector.correct(
            self.kept,
            proposal.position,
            proposal.free,
            state.corrector,
            self.generator,
            moves=proposal.moves,
            final=self.objective.landmark(proposal.state),
        )
        new = replace(
            state,
            position=corrected.position,
            objective=proposal.state,
            corrector=corrected.state,
            cost=state.cost + proposal.cost + corrected.cost + self.verdict.num_examples,
        )
        return new, self.measure(new.position)

    def predictor(self, position: Position, free: Tensor) -> Compensation | None:
        """The tangent moves at a position, on as many protected inputs as the method allows."""
        if self.method.damping is None:
            return None
        part = self.kept.subset(self.method.max_rows, self.generator)
        return Compensation(part, position, free, damping=self.method.damping)

    def measure(self, position: Position) -> Measured:
        """The verdict on a position."""
        function = replace(self.verdict.function, map=self.verdict.function.map.with_buffers(position.buffers))
        return self.verdict.measure(position.theta, function)

    def point(
        self, state: PathState, measured: Measured, last: PathPoint | None, before: Position | None = None
    ) -> PathPoint:
        """The record of a position."""
        theta = state.position.theta
        moved = 0.0 if before is None else float((theta - before.theta).norm())
        tensors = {n: t.clone() for n, t in self.kept.function.map.named(theta).items()}
        return PathPoint(
            step=0 if last is None else last.step + 1,
            arc_length=moved + (0.0 if last is None else last.arc_length),
            step_norm=moved,
            distance=measured.distance,
            drift=measured.drift,
            changed=measured.changed,
            changed_upper=measured.changed_upper,
            objective=self.objective.value(state.position, state.objective),
            sparsity=float((theta[self.counted] == 0).double().mean()),
            cost=state.cost,
            seconds=state.seconds,
            num_held_out=self.verdict.num_compared,
            tensors=tensors | dict(state.position.buffers),
        )

    def check_first(self, points: list[PathPoint], size: float, measured: Measured) -> None:
        """A budget below the very first step is a mistake of the caller's, not a path."""
        if len(points) == 1 and self.method.budget is not None and math.isfinite(measured.drift):
            raise ValueError(
                f"budget: {self.method.budget} is below the first step, whose smallest size ({size:.3g}) already drifts"
                f" by {measured.drift:.3g}; raise the budget above that, or protect with more inputs"
            )

    def result(self, state: PathState, points: list[PathPoint], outcome: str) -> PathResult:
        """The record of the path."""
        flat = state.flat()
        flat |= {"generator": self.generator.get_state(), "generator_start": self.generator_start}
        found = PathResult(
            points=tuple(points),
            objective_name=self.objective.name,
            maximise=self.objective.maximise,
            budget=self.method.budget,
            outcome=outcome,
            message=OUTCOMES[outcome],
            state=flat,
            settings={
                "geometry": repr(self.kept.function.geometry),
                "objective": repr(self.objective),
                "method": repr(self.method),
            },
        )
        return found if self.method.store == "all" else found.thinned([0, -1])


def _check_resume(resume: PathResult, objective: Objective, field: MetricField) -> None:
    dim, space = len(resume.state["theta"]), field.space
    stored = dict(resume[0].tensors or {})
    differ = [n for n, shape in space.shapes.items() if n not in stored or stored[n].shape != shape]
    if dim != space.dim or differ or resume.objective_name != objective.name:
        raise ValueError(
            f"resume: a path of {resume.objective_name!r} in {dim} weights, expected {objective.name!r} in {space.dim}"
            + (f" (tensors that differ: {', '.join(differ[:4])})" if differ else "")
            + "; resume with the model, params and objective that it was walked with"
        )


def _check_same(resume: PathResult, measured: Measured, geometry: Geometry) -> None:
    """The last point must measure as it did: other inputs, geometry or frozen tensors would make it another path."""
    before, now = resume[-1].distance, measured.distance
    if resume.settings.get("geometry") != repr(geometry) or abs(before - now) > 1e-6 * max(before, 1e-3):
        raise ValueError(
            f"resume: the path's last point measured {before:.6g} in {resume.settings.get('geometry')}, here {now:.6g}"
            f" in {geometry!r}; resume with the inputs, held_out, geometry and model that it was walked with"
        )


@contextmanager
def _bar(progress: bool, name: str) -> Iterator[Callable[[PathPoint], Any]]:
    """A bar that counts steps and shows where the path is; silent unless asked for."""
    if not progress:
        yield lambda point: None
        return
    from tqdm.auto import tqdm

    with tqdm(desc="path", unit="step") as bar:

        def show(point: PathPoint) -> None:
            bar.set_postfix_str(f"{name} {point.objective:.3f}, drift {point.drift:.4f}, changed {point.changed:.2%}")
            bar.update()

        yield show
