"""What a path leaves behind: its points, each with what was measured there, and how to pick one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fipgeo import io
from fipgeo.paths.certificate import changed_upper_bound
from fipgeo.paths.point import PathPoint
from fipgeo.paths.storing import read_path, write_path

__all__ = ["Leg", "PathPoint", "PathResult"]

MULTIPLICITY = ("sequence", "bonferroni", "none")


@dataclass(frozen=True)
class Leg:
    """A part of a path that was walked towards one objective.

    Attributes:
        objective_name: What `objective` in its points is, with its unit.
        maximise: Whether more of it is better.
        begin: Step of the point where it begins, which is the last point of the leg before it.
    """

    objective_name: str
    maximise: bool
    begin: int = 0


@dataclass(frozen=True)
class PathResult(Sequence[PathPoint]):
    """A walked path: a sequence of points from the start to where it ended.

    Attributes:
        points: The accepted points, the start first.
        objective_name: What `objective` in the points of the last leg is, with its unit.
        maximise: Whether a larger objective is the better one.
        budget: The largest drift that was allowed, if any.
        outcome: Why the path ended: "reached", "budget", "stalled", "max_steps" or "stopped".
        message: The same in words, with what would take it further.
        state: What `resume=` continues from: tensors and plain values.
        settings: How the path was walked.
        legs: The objectives one after the other; one unless the path was continued with `after=`.
    """

    points: tuple[PathPoint, ...] = field(repr=False)
    objective_name: str
    maximise: bool
    budget: float | None
    outcome: str
    message: str
    state: Mapping[str, Any] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)
    legs: tuple[Leg, ...] = ()

    def __post_init__(self) -> None:
        """A path of one objective is one leg."""
        if not self.legs:
            object.__setattr__(self, "legs", (Leg(self.objective_name, self.maximise),))

    def __str__(self) -> str:
        """One line: how far it went and what it cost."""
        end = self.points[-1]
        return (
            f"path of {len(self) - 1} steps, {self.outcome}: {self.objective_name} {end.objective:.4g},"
            f" drift {end.drift:.3g}, changed {end.changed:.2%} (at most {end.changed_upper:.2%})"
            f" of {end.num_held_out} held-out inputs"
        )

    def __len__(self) -> int:
        """Number of points, the start included."""
        return len(self.points)

    def __getitem__(self, index: Any) -> Any:
        """A point, or a tuple of points for a slice."""
        return self.points[index]

    def __iter__(self) -> Iterator[PathPoint]:
        """The points from the start on."""
        return iter(self.points)

    def best(
        self,
        *,
        max_changed: float | None = None,
        max_drift: float | None = None,
        confidence: float | None = None,
        multiplicity: str = "sequence",
    ) -> PathPoint:
        """The stored point of the last leg that serves its objective best within what may be lost.

        With a confidence the promise is about inputs beyond those at hand: in at least that share of repetitions the
        point that comes out changes at most `max_changed` of the predictions. Several points are tested with the same
        inputs, and picking one of them would spend some of the confidence, so one of these makes up for it:

        - "sequence": points are tested in the order of the path, each at full confidence, up to the first that fails.
          No point behind that one is considered. The order was fixed before any held-out input was looked at, so the
          first point whose true rate is too high fails with the full confidence, and no correction is due (fixed
          sequences: Maurer, Hothorn & Lehmacher, Multiple comparisons in drug clinical trials, 1995).
        - "bonferroni": every one of K points is tested at 1 - (1 - confidence) / K. It can step over a bad point.
        - "none": each point at full confidence, as if it had been named beforehand.

        Args:
            max_changed: Largest share of changed predictions on the held-out inputs.
            max_drift: Largest drift, as it was observed.
            confidence: When given (0.95, say), `max_changed` bounds not the observed share but its exact upper
                confidence bound (Clopper & Pearson, 1934).
            multiplicity: What makes up for picking one of several points, see above.

        Returns:
            The point.

        Raises:
            ValueError: No stored point is within the limits; the message says how near the path came.
        """
        if multiplicity not in MULTIPLICITY:
            raise ValueError(
                f"best: multiplicity: got {multiplicity!r}, expected one of {', '.join(map(repr, MULTIPLICITY))}"
            )
        stored = self._stored()
        if max_changed is not None and all(p.changed != p.changed for p in self.points):
            raise ValueError("best: max_changed: outputs of this geometry predict no class; use max_drift instead")
        each = confidence
        if confidence is not None and multiplicity == "bonferroni":
            each = 1 - (1 - confidence) / max(len(stored), 1)
        candidates = stored
        if max_changed is not None:
            passed = [self._changed(p, each) <= max_changed for p in stored]
            if confidence is not None and multiplicity == "sequence":
                passed = passed[: [*passed, False].index(False)]
            candidates = [p for p, ok in zip(stored, passed, strict=False) if ok]
        if max_drift is not None:
            candidates = [p for p in candidates if p.drift <= max_drift]
        if not candidates:
            least = min((self._changed(p, each) for p in self.points), default=float("nan"))
            raise ValueError(
                f"best: no stored point has max_changed={max_changed}, max_drift={max_drift}; the least changed share"
                f"{'' if each is None else f' certified at {100 * each:.6g}%'} on {self.points[0].num_held_out}"
                f" held-out inputs is {least:.4f}; allow more, or pass more held_out inputs"
            )
        sign = 1 if self.maximise else -1
        return max(candidates, key=lambda p: (sign * p.objective, -p.drift))

    def at(self, *, objective: float) -> PathPoint:
        """The stored point of the last leg whose objective is nearest to a value; of equally near ones the first.

        Raises:
            ValueError: No point of the last leg was stored.

        Examples:
            >>> import torch
            >>> from fipgeo import sparsify
            >>> net = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
            >>> x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
            >>> sparsify(net, x, (0.25, 0.5), corrector="gauss-newton").at(objective=0.25).sparsity
            0.25
        """
        stored = self._stored()
        if not stored:
            raise ValueError("at: no point of the last leg was stored; walk with store='all' to keep every point")
        return min(stored, key=lambda p: abs(p.objective - objective))

    def until(self, point: PathPoint | int) -> PathResult:
        """The path up to a stored point, to go on from there with `after=`.

        Args:
            point: A point of the path, or its step.

        Returns:
            The shorter path. It can be continued with `after=`; what `resume=` needs is known at the end of a walk
            only.

        Raises:
            ValueError: The path has no such point, or it was not stored.
        """
        step = point if isinstance(point, int) else point.step
        if not 0 <= step < len(self):
            raise ValueError(f"until: got step {step}, expected one of 0 to {len(self) - 1}")
        if self.points[step].tensors is None:
            raise ValueError(f"until: point {step} was not stored; walk with store='all' to keep every point")
        legs = (self.legs[0], *(leg for leg in self.legs[1:] if leg.begin < step))
        generators = {k: v for k, v in self.state.items() if k.startswith("generator")}
        return replace(
            self,
            points=self.points[: step + 1],
            objective_name=legs[-1].objective_name,
            maximise=legs[-1].maximise,
            outcome="stopped",
            message="the path was cut at a chosen point; pass after= to go on from there",
            state=generators,
            legs=legs,
        )

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the path to one safetensors file: points, weights and the state to resume from.

        The start is written whole; of every other point the places of its zeros (a bit a weight) and its other
        weights, or what differs from the point before it, whichever is less. All comes back bit for bit.

        Raises:
            FileExistsError: There is such a file and `overwrite` is False.
        """
        tensors, meta = write_path(self.points, self.state)
        meta |= {key: getattr(self, key) for key in ("objective_name", "maximise", "budget", "outcome", "message")}
        meta |= {"kind": "path", "settings": dict(self.settings)}
        meta["legs"] = [[leg.objective_name, leg.maximise, leg.begin] for leg in self.legs]
        io.save_record(path, tensors, meta, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PathResult:
        """Read a path that `save` wrote.

        Raises:
            ValueError: The file holds no path.
        """
        tensors, meta = io.load_record(path)
        if meta.get("kind") != "path":
            raise ValueError(f"load: {os.fspath(path)} holds {meta.get('kind', 'no record of fipgeo')}, not a path")
        points, state = read_path(tensors, meta)
        keys = ("objective_name", "maximise", "budget", "outcome", "message", "settings")
        legs = tuple(Leg(*leg) for leg in meta["legs"])
        return cls(points=points, state=state, legs=legs, **{k: meta[k] for k in keys})

    def thinned(self, keep: Sequence[int]) -> PathResult:
        """The same path with the tensors of all points dropped but those at the indices `keep`."""
        chosen = {range(len(self))[i] for i in keep}
        points = tuple(p if i in chosen else replace(p, tensors=None) for i, p in enumerate(self.points))
        return replace(self, points=points)

    def plot(self, axes: Any = None, **kwargs: Any) -> Any:
        """Draw the path with `fipgeo.plotting.plot_path`."""
        from fipgeo import plotting

        return plotting.plot_path(self, axes=axes, **kwargs)

    def _stored(self) -> list[PathPoint]:
        """Points with tensors of the last leg, whose objective is the same for all of them."""
        begin = self.legs[-1].begin
        return [p for p in self.points if p.tensors is not None and (p.step > begin or len(self.legs) == 1)]

    @staticmethod
    def _changed(point: PathPoint, confidence: float | None) -> float:
        if confidence is None or point.changed != point.changed:
            return point.changed
        return changed_upper_bound(round(point.changed * point.num_held_out), point.num_held_out, confidence)
