"""How a walk begins: its inputs set apart, and a fresh start, a path to go on with, or one to go on from."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipgeo import io
from fipgeo.data import Batches, Generator, TensorBatches
from fipgeo.field import MetricField
from fipgeo.jacobian import EmbeddedOutputs
from fipgeo.linalg import as_generator
from fipgeo.outputs import Geometry
from fipgeo.paths.kept import Position
from fipgeo.paths.objectives import Objective
from fipgeo.paths.record import Leg, PathResult
from fipgeo.paths.state import PathState

CONTROL_SHARE, CONTROL_LEAST, CONTROL_MOST = 0.05, 16, 64


@dataclass(frozen=True, eq=False)
class Inputs:
    """The inputs of a walk by what they are for: no two of the three have an example in common.

    Attributes:
        protected: What steps are taken on.
        control: What steps are accepted or refused by, and sized by.
        verdict: What points are measured on, and nothing else.
        both: What is protected and what controls, together.
    """

    protected: Batches
    control: Batches
    verdict: Batches
    both: Batches

    @classmethod
    def of(cls, batches: Batches, held_out: Batches | float, generator: torch.Generator) -> Inputs:
        """Set apart first what is held out, then a twentieth of the rest, 16 to 64 and at most a quarter, for control.

        Batches of unlike shapes are set apart as a whole, a twentieth of them. A single example, or batch, that is left
        is protected and controls.
        """
        verdict = held_out
        if not isinstance(verdict, Batches):
            batches, verdict = batches.split(verdict, generator)
        batches, share = batches.hold(), CONTROL_SHARE
        if isinstance(batches, TensorBatches):
            count = len(batches)
            wanted = min(max(CONTROL_SHARE * count, CONTROL_LEAST), CONTROL_MOST)
            share = min(wanted, max(count / 4, 1)) / count
            single = count == 1
        else:
            single = sum(1 for _ in batches) == 1
        if single:
            return cls(batches, batches, verdict, batches)
        protected, control = batches.split(share, generator)
        return cls(protected, control, verdict, batches)


@dataclass(frozen=True, eq=False)
class Opening:
    """What a walk begins from.

    Attributes:
        path: The path to resume or to go on from; None for a fresh one.
        resumed: Whether the path is resumed, so that the state is its own.
        start: Where the whole path began: what every point is compared with.
        position: Where it stands.
        generator: The source of randomness as it was at the very beginning.
    """

    path: PathResult | None
    resumed: bool
    start: Position
    position: Position
    generator: torch.Generator

    @classmethod
    def of(
        cls,
        field: MetricField,
        objective: Objective,
        generator: Generator,
        resume: PathResult | None,
        after: PathResult | None,
    ) -> Opening:
        """Look at what is to be continued.

        Raises:
            ValueError: It is the path of another model or objective, or its last point was not stored.
        """
        if resume is not None:
            _check_resume(resume, objective, field)
            state = PathState.read(resume.state, field.space.device)
            return cls(resume, True, state.start, state.position, restored(resume.state["generator_start"]))
        if after is not None:
            ends = [_position(after, index, field) for index in (0, -1)]
            return cls(after, False, ends[0], ends[1], restored(after.state["generator_start"]))
        start = Position(field.map.point(), field.map.normalisation())
        return cls(None, False, start, start, as_generator(generator))

    def legs(self, objective: Objective) -> tuple[Leg, ...]:
        """The legs of the path that is walked now."""
        if self.path is None:
            return (Leg(objective.name, objective.maximise),)
        own = Leg(objective.name, objective.maximise, self.path[-1].step)
        return self.path.legs if self.resumed else (*self.path.legs, own)


def restored(state: Tensor) -> torch.Generator:
    """A generator in a given state."""
    generator = torch.Generator()
    generator.set_state(state)
    return generator


def settings_of(geometry: Geometry, objective: Objective, method: Any) -> dict[str, str]:
    """How a path is walked, in words that are the same in every process."""
    found = {"geometry": geometry, "objective": objective, "method": method}
    return {key: re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)) for key, value in found.items()}


def from_checkpoint(
    checkpoint: str | os.PathLike[str] | None,
    resume: PathResult | None,
    after: PathResult | None,
    settings: Mapping[str, str],
    field: MetricField,
    generator: Generator,
) -> PathResult | None:
    """The path to resume: the one in the checkpoint if there is such a file, else the caller's.

    Raises:
        ValueError: The file holds another path than the one that is asked for.
    """
    if resume is not None and after is not None:
        raise ValueError("after: got a path, and one to resume; pass resume= alone to go on with a path of two legs")
    if checkpoint is None:
        return resume
    io.remove_leftovers(checkpoint)
    if not Path(checkpoint).exists():
        return resume
    found = PathResult.load(checkpoint)
    known, origin = resume if resume is not None else after, found.points[0]
    begun = as_generator(generator).get_state() if known is None else known.state["generator_start"]
    start = field.map.point() if known is None else _position(known, 0, field).theta
    differ = [] if torch.equal(found.state["generator_start"], begun) else ["generator"]
    if origin.tensors is None or not _same(start, found, field):
        differ.append("weights of the start")
    if resume is None:
        fixed = [_fixed(found.settings), _fixed(settings)]
        differ += [key for key in fixed[1] if fixed[0].get(key) != fixed[1][key]]
        legs = () if after is None else after.legs
        earlier = [] if after is None else list(map(repr, after.points))
        if found.legs[:-1] != legs or list(map(repr, found.points[: len(earlier)])) != earlier:
            differ.append("earlier legs")
    if differ:
        raise ValueError(
            f"checkpoint: {os.fspath(checkpoint)} holds another path (other {', '.join(differ)}); name another file or"
            " delete this one, or pass resume=PathResult.load(...) to go on with it under other settings"
        )
    return found if resume is None else resume


def check_same(path: PathResult, distance: float, geometry: Geometry, argument: str) -> None:
    """The last point must measure as it did: other inputs, geometry or frozen tensors would make it another path."""
    before, known = path[-1].distance, path.settings.get("geometry")
    shown = settings_of(geometry, None, None)["geometry"]  # type: ignore[arg-type]
    if known != shown or abs(before - distance) > 1e-6 * max(before, 1e-3):
        raise ValueError(
            f"{argument}: the path's last point measured {before:.6g} in {known}, here {distance:.6g}"
            f" in {shown}; continue with the inputs, held_out, geometry and model that it was walked with"
        )


def under(function: EmbeddedOutputs, start: Position, batches: Batches) -> EmbeddedOutputs:
    """The function on some inputs, under the start's normalisation statistics."""
    return replace(function, map=function.map.with_buffers(start.buffers), batches=batches)


def _check_resume(resume: PathResult, objective: Objective, field: MetricField) -> None:
    if "theta" not in resume.state:
        raise ValueError("resume: the path was cut at a chosen point; pass after= to go on from there")
    differ = _differing(resume, field)
    dim = len(resume.state["theta"])
    if dim != field.space.dim or differ or resume.objective_name != objective.name:
        raise ValueError(
            f"resume: a path of {resume.objective_name!r} in {dim} weights, expected {objective.name!r} in"
            f" {field.space.dim}"
            + (f" (tensors that differ: {', '.join(differ[:4])})" if differ else "")
            + "; resume with the model, params and objective that it was walked with"
        )


def _differing(path: PathResult, field: MetricField) -> list[str]:
    stored = dict(path[0].tensors or {})
    return [n for n, shape in field.space.shapes.items() if n not in stored or stored[n].shape != shape]


def _position(path: PathResult, index: int, field: MetricField) -> Position:
    """The position of a stored point of another walk in this weight space."""
    tensors, differ = path[index].tensors, _differing(path, field)
    if tensors is None:
        raise ValueError(f"after: point {path[index].step} was not stored; walk with store='all' or cut with until()")
    if differ:
        raise ValueError(
            f"after: the path's points lack or differ in {', '.join(differ[:4])}; go on with the model and params that"
            " it was walked with"
        )
    device = field.space.device
    names = field.space.shapes
    theta = field.space.ravel({name: tensors[name].to(device) for name in names})
    buffers = {name: tensor.to(device) for name, tensor in tensors.items() if name not in names}
    return Position(theta.clone(), buffers)


def _same(start: Tensor, path: PathResult, field: MetricField) -> bool:
    return not _differing(path, field) and torch.equal(_position(path, 0, field).theta, start)


def _fixed(settings: Mapping[str, str]) -> dict[str, str]:
    """Settings without those that may change on the way: how far to go, and how much to keep."""
    return {key: re.sub(r"(max_steps|budget|store)=[^,)]*", "", text) for key, text in settings.items()}
