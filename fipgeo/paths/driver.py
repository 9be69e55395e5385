"""The driver: predictor, corrector, verdict, again and again until the objective is reached or the budget spent."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Batches, Generator, as_batches
from fipgeo.field import MetricField
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.model import NotFiniteError
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.control import StepControl
from fipgeo.paths.correctors import Corrector
from fipgeo.paths.joined import Joined
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.objectives import Objective, Proposal
from fipgeo.paths.record import Leg, PathPoint, PathResult
from fipgeo.paths.start import Inputs, Opening, check_same, from_checkpoint, settings_of, under
from fipgeo.paths.state import PathState
from fipgeo.paths.verdict import Measured, Verdict, spread_of

Callback = Callable[[Mapping[str, float]], Any]

OUTCOMES = {
    "reached": "the objective was reached",
    "budget": "no step, however small, stayed within the budget; raise budget or protect with more inputs to go on",
    "stalled": "every further step ended in outputs or derivatives that are not finite; take smaller steps, or exclude"
    " tensors that must not become zero",
    "max_steps": "max_steps were walked; pass resume= with a larger max_steps to go on",
    "stopped": "the walk was stopped on the way; pass resume= to go on",
}


@dataclass(frozen=True)
class Method:
    """How a path is walked.

    Attributes:
        control: Step sizes.
        corrector: What brings the outputs back.
        damping: mu of the predictor, as a multiple of the mean non-zero eigenvalue of the metric; 0 to step in its null
            space; None or infinity to step without a metric and leave everything to the corrector.
        order: Of the predictor. 2 takes back, by the predictor's own moves, what outputs turned out to change beyond
            first order in the step, z(theta + v) - z(theta) - R v, for two more evaluations of the inputs of that
            metric: in its null space the drift of a step of length h is then of order h^3 instead of h^2.
        max_rows: Embedded outputs in the predictor's metric; more protected inputs than that are sampled anew for
            every step.
        budget: Largest drift allowed on the control inputs, or None. The drift of a point is measured on others, and
            can be a little above it.
        max_steps: Accepted steps at most.
        store: "all" to keep the weights of every point, "last" to keep those of the start, of the objective's
            landmarks (the waypoints of a sparsity, say) and of the end only.
        join_control: Protect the control inputs too in the correction that arrives, where nothing depends on them any
            more: there is no budget, and no step follows.
    """

    control: StepControl
    corrector: Corrector
    damping: float | None = 1e-2
    order: int = 1
    max_rows: int = 1024
    budget: float | None = None
    max_steps: int = 200
    store: str = "all"
    join_control: bool = False

    def __post_init__(self) -> None:
        """Check the budget and what is stored."""
        if self.budget is not None and not self.budget > 0:
            raise ValueError(f"budget: got {self.budget}, expected a positive drift, or None for no limit")
        if self.damping is not None and not self.damping >= 0:
            raise ValueError(
                f"damping: got {self.damping}, expected 0 (null space), a positive number, or None for no metric"
            )
        if self.order not in (1, 2):
            raise ValueError(f"order: got {self.order}, expected 1 or 2")
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
    held_out: Any = 0.2,
    generator: Generator = None,
    progress: bool = False,
    callback: Callback | None = None,
    resume: PathResult | None = None,
    after: PathResult | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> PathResult:
    """Walk from the model's present weights towards an objective while its outputs on the field's inputs stay.

    The inputs are divided into three parts without common examples. Steps are taken on the protected ones; a twentieth
    of them (see `Inputs.of`) is set apart as control inputs, on whose drift a step is accepted or refused and the next
    one sized; the held-out ones measure the points and decide nothing, so that certificates are not biased by choices.

    Weights that are `geoopt.ManifoldParameter`s stay on their manifolds (see `Constraints`).

    Args:
        field: Model, protected inputs and geometry. The model is not changed.
        objective: What to walk towards.
        method: How.
        held_out: Inputs for the verdict, or the share of the protected inputs to set apart for it.
        generator: Source of all randomness.
        progress: Show a bar.
        callback: Called with the numbers of every accepted point; the walk stops if it returns True.
        resume: A path to continue; walked with the same arguments it goes on as if it had never stopped.
        after: A path to go on from with another objective: from its last point (or a chosen one, `path.until(point)`),
            still compared with the start of the first leg on the same inputs.
        checkpoint: A file, ending in ".safetensors", that holds the path after every accepted step. If it is there
            already, it is resumed, so that the same call after a crash goes on where it was, bit for bit.

    Returns:
        The path.

    Raises:
        ValueError: The budget does not allow even the smallest first step; `resume`, `after` or the checkpoint is the
            path of another model or objective; or bad inputs (see `OutputMap.check`).
        NotImplementedError: Zeros are asked for in a weight that is kept on a manifold.
    """
    if not isinstance(held_out, Batches | int | float):
        held_out = as_batches(held_out, None, "held_out")
    with torch.inference_mode(False):
        settings = settings_of(field.function.geometry, objective, method)
        resume = from_checkpoint(checkpoint, resume, after, settings, field, generator)
        opening = Opening.of(field, objective, generator, resume, after)
        walker = _prepared(field, objective, method, held_out, opening, settings)
        return walker.run(progress, callback, checkpoint)


def _prepared(
    field: MetricField,
    objective: Objective,
    method: Method,
    held_out: Batches | float,
    opening: Opening,
    settings: Mapping[str, str],
) -> _Walker:
    """Everything looked at and cached before the first step."""
    field.map.check(field.function.batches.first())
    if isinstance(held_out, Batches):
        field.map.check(held_out.first())
    start, random, path = opening.start, opening.generator, opening.path
    generator_start = random.get_state()
    inputs = Inputs.of(field.function.batches, held_out, random)
    functions = [under(field.function, start, part) for part in (inputs.protected, inputs.control, inputs.verdict)]
    if field.function.mask is not None:  # a mask of other values than 0 and 1, or of nothing, is said at once
        for function in functions:
            function.survey(start.theta)
    kept, unit = Kept.of(functions[0], start.theta), spread_of(functions[0], start.theta)
    kept.constraints.check(opening.position.theta)
    walker = _Walker(
        objective, method, kept, Verdict(functions[1], start.theta, unit), Verdict(functions[2], start.theta), random
    )
    walker.both = under(field.function, start, inputs.both)
    walker.generator_start, walker.legs, walker.settings = generator_start, opening.legs(objective), settings
    walker.counted = objective.counted(field.map)
    if path is not None:
        random.set_state(path.state["generator"])
        walker.points = list(path.points)
        found = walker.measure(walker.verdict, opening.position).distance
        check_same(path, found, field.function.geometry, "resume" if opening.resumed else "after")
    if path is not None and opening.resumed:
        walker.state = PathState.read(path.state, field.space.device)
        return walker
    drift = walker.measure(walker.control, opening.position).drift
    begun = objective.begin(kept, opening.position)
    walker.state = PathState(opening.position, start, method.control.initial, objective=begun, drift=drift)
    if path is None:
        walker.points = [walker.point(walker.state, None)]
    else:
        walker.state = replace(walker.state, cost=path[-1].cost, seconds=path[-1].seconds)
    return walker


@dataclass(eq=False)
class _Walker:
    """What stays fixed along a path, and at the end of the list what does not: its state and its points."""

    objective: Objective
    method: Method
    kept: Kept
    control: Verdict
    verdict: Verdict
    generator: torch.Generator
    both: EmbeddedOutputs = field(init=False)
    generator_start: Tensor = field(init=False)
    counted: Tensor = field(init=False)
    legs: tuple[Leg, ...] = field(init=False)
    settings: Mapping[str, str] = field(init=False)
    state: PathState = field(init=False)
    points: list[PathPoint] = field(init=False)

    def run(self, progress: bool, callback: Callback | None, checkpoint: str | os.PathLike[str] | None) -> PathResult:
        """Steps until an outcome is there."""
        begin, clock = self.legs[-1].begin, time.perf_counter() - self.state.seconds
        outcome = "reached" if self.objective.reached(self.state.objective) else ""
        self.keep(checkpoint)
        with _bar(progress, self.objective.name) as show:
            while not outcome:
                if self.points[-1].step - begin >= self.method.max_steps:
                    outcome = "max_steps"
                    break
                tried, point, added, predicted = self.attempt(clock)
                if point is None:
                    outcome = self.refused(tried)
                    continue
                self.accept(tried, point, self.method.control.error(added, predicted))
                self.keep(checkpoint)
                show(point)
                asked = callback is not None and callback(point.to_dict()) is True
                outcome = "stopped" if asked else ""
                outcome = "reached" if self.objective.reached(self.state.objective) else outcome
        found = self.result(outcome)
        if checkpoint is not None:
            found.save(checkpoint, overwrite=True)
        return found

    def attempt(self, clock: float) -> tuple[PathState, PathPoint | None, float, float | None]:
        """One step: where it ends, its point if it is accepted, the drift it adds and what was predicted."""
        control, state = self.method.control, self.state
        try:
            tried, predicted = self.step(state)
            tried = replace(tried, drift=self.measure(self.control, tried.position).drift)
        except NotFiniteError:  # outputs overflowed on the way: there is no drift, so the step is refused
            tried, predicted = replace(state, drift=math.inf), None
        tried = replace(tried, seconds=time.perf_counter() - clock)
        added = tried.drift - state.drift
        if not control.accepts(state.size, added=added, drift=tried.drift, budget=self.method.budget):
            return tried, None, added, predicted
        try:
            return tried, self.point(tried, self.points[-1], state.position), added, predicted
        except NotFiniteError:  # nothing can be said about such a point; only this of the verdict's can refuse a step
            return replace(tried, drift=math.inf), None, added, predicted

    def accept(self, tried: PathState, point: PathPoint, error: float) -> None:
        """Go on from a point."""
        last, begin = self.points[-1], self.legs[-1].begin
        if self.method.store == "last" and last.step > begin and not self.objective.landmark(self.state.objective):
            self.points[-1] = replace(last, tensors=None)
        self.points.append(point)
        self.state = replace(tried, size=self.method.control.following(self.state.size, error=error))

    def refused(self, tried: PathState) -> str:
        """Go back and make the step smaller; the outcome if it cannot be."""
        control, state, outcome = self.method.control, self.state, ""
        if state.size <= control.smallest:
            self.check_first(state.size, tried.drift)
            outcome = "budget" if math.isfinite(tried.drift) else "stalled"
        self.state = replace(state, size=control.smaller(state.size), cost=tried.cost)
        return outcome

    def step(self, state: PathState) -> tuple[PathState, float | None]:
        """Predictor and corrector; what the tangent model expects is in units of drift."""
        proposal = self.objective.propose(
            self.kept, state.position, state.objective, state.size, self.predictor, self.generator
        )
        begun, bent = self.straightened(state.position, proposal)
        final = self.objective.landmark(proposal.state)
        kept = self.held(begun, proposal.state) if final and not self.method.corrector.idle else self.kept
        corrected = self.method.corrector.correct(
            kept,
            begun,
            proposal.free,
            state.corrector,
            self.generator,
            moves=proposal.moves if kept is self.kept else None,
            final=final,
        )
        spent = proposal.cost + bent + corrected.cost + self.control.num_examples
        if kept is not self.kept:  # references that were taken for this correction
            spent += kept.num_examples - self.kept.num_examples * isinstance(kept, Joined)
        new = replace(
            state,
            position=self.kept.moved(corrected.position, corrected.position.theta),
            objective=proposal.state,
            corrector=corrected.state,
            cost=state.cost + spent,
        )
        return new, None if proposal.predicted is None else proposal.predicted / self.control.spread

    def held(self, begun: Position, state: Mapping[str, Tensor]) -> Kept:
        """What a correction at a landmark holds: beside the protected inputs what has been won, or control inputs."""
        won = self.objective.beside(self.kept)
        if won:
            return Joined.here(self.kept, won, begun)
        free = self.method.join_control and self.method.budget is None and self.objective.reached(state)
        return Kept.of(self.both, self.kept.start) if free else self.kept

    def straightened(self, before: Position, proposal: Proposal) -> tuple[Position, float]:
        """Where a correction begins, without what outputs change beyond first order; and evaluations for that."""
        after, moves = self.kept.moved(proposal.position, proposal.position.theta), proposal.moves
        if self.method.order == 1 or moves is None:
            return after, 0.0
        first = moves.root(after.theta - before.theta)
        bend = moves.kept.residual(after) - moves.kept.residual(before) - first
        return self.kept.moved(after, after.theta + moves(bend)), 4.0 * moves.num_examples  # two and two by R

    def predictor(self, position: Position, free: Tensor) -> Compensation | None:
        """The tangent moves at a position, on as many protected inputs as the method allows."""
        if self.method.damping is None or math.isinf(self.method.damping):
            return None
        part = self.kept.subset(self.method.max_rows, self.generator)
        return Compensation(part, position, free, damping=self.method.damping)

    def measure(self, on: Verdict, position: Position, *, certify: bool = False) -> Measured:
        """How far a position is from the start, on the control inputs or on the verdict's."""
        function = replace(on.function, map=on.function.map.with_buffers(position.buffers))
        return on.measure(position.theta, function, certify=certify)

    def point(self, state: PathState, last: PathPoint | None, before: Position | None = None) -> PathPoint:
        """The record of a position."""
        theta, space = state.position.theta, self.kept.function.map.space
        measured = self.measure(self.verdict, state.position, certify=True)
        moved = 0.0 if before is None else float((theta - before.theta).norm())
        tensors = {n: t.clone() for n, t in self.kept.function.map.named(theta).items()}
        zero = (theta == 0) & self.counted
        parts = {n: (int(zero[where].sum()), int(self.counted[where].sum())) for n, where in space.slices().items()}
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
            control_drift=state.drift,
            certificate=measured.certificate,
            layers={name: pair for name, pair in parts.items() if pair[1]},
            tensors=tensors | dict(state.position.buffers),
        )

    def check_first(self, size: float, drift: float) -> None:
        """A budget below the very first step is a mistake of the caller's, not a path."""
        budget, steps = self.method.budget, self.points[-1].step - self.legs[-1].begin
        if steps == 0 and budget is not None and math.isfinite(drift):
            raise ValueError(
                f"budget: {budget} is below the first step, whose smallest size ({size:.3g}) already drifts"
                f" by {drift:.3g}; raise the budget above that, or protect with more inputs"
            )

    def keep(self, checkpoint: str | os.PathLike[str] | None) -> None:
        """Write the path as far as it is."""
        if checkpoint is not None:
            self.result("stopped").save(checkpoint, overwrite=True)

    def result(self, outcome: str) -> PathResult:
        """The record of the path."""
        flat = self.state.flat()
        flat |= {"generator": self.generator.get_state(), "generator_start": self.generator_start}
        return PathResult(
            points=tuple(self.points),
            objective_name=self.objective.name,
            maximise=self.objective.maximise,
            budget=self.method.budget,
            outcome=outcome,
            message=OUTCOMES[outcome],
            state=flat,
            settings=dict(self.settings),
            legs=self.legs,
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
