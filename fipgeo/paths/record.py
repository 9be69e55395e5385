"""What a path leaves behind: its points, each with what was measured there, and how to pick one of them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo import io
from fipgeo.model import unwrapped
from fipgeo.paths.verdict import changed_upper_bound


@dataclass(frozen=True)
class PathPoint:
    """One point of a path: what was measured there, and (if it was stored) its weights.

    Attributes:
        step: Number of accepted steps before it; 0 is the start.
        arc_length: Length of the path so far, the sum of |theta_{i+1} - theta_i| in weights.
        step_norm: |theta_i - theta_{i-1}|.
        distance: Root mean square over held-out inputs of the geometry's finite distance to the start's outputs.
        drift: The same in units of the outputs' own spread, their root mean square distance from their mean over the
            inputs: 0 the same function, 1 as far off as a constant function would be.
        changed: Share of held-out inputs whose prediction differs from the start's; NaN where outputs predict nothing.
        changed_upper: Exact (Clopper-Pearson) upper 95 % confidence bound on that share.
        objective: What the objective measures (sparsity, loss on new data).
        sparsity: Exact zeros among the coordinates the objective counts, as a share.
        cost: Evaluations of the model on one input so far, forwards and backwards each counted once.
        seconds: Wall time so far.
        num_held_out: Inputs behind `changed`.
        tensors: The point's weights, and the buffers that the path moved, by name; None if not stored.
    """

    step: int
    arc_length: float
    step_norm: float
    distance: float
    drift: float
    changed: float
    changed_upper: float
    objective: float
    sparsity: float
    cost: float
    seconds: float
    num_held_out: int
    tensors: Mapping[str, Tensor] | None = field(default=None, repr=False, compare=False)

    def apply_(self, model: nn.Module) -> nn.Module:
        """Write this point's weights (and normalisation statistics) into a model of the same shape, in place.

        Returns:
            The model.

        Raises:
            ValueError: The point's tensors were not stored, or the model lacks some of them or has other shapes; all
                mismatches are listed and nothing is written.
        """
        if self.tensors is None:
            raise ValueError(f"apply_: point {self.step} was not stored; walk with store='all' to keep every point")
        own = unwrapped(model)
        targets = dict(own.named_parameters()) | dict(own.named_buffers())
        problems = [
            f"{name} {list(t.shape)}" + ("" if name in targets else " is missing from the model")
            for name, t in self.tensors.items()
            if name not in targets or targets[name].shape != t.shape
        ]
        if problems:
            raise ValueError(f"apply_: the model does not fit the path's tensors: {'; '.join(problems)}")
        with torch.no_grad():
            for name, value in self.tensors.items():
                targets[name].copy_(value)
        return model

    def to_dict(self) -> dict[str, float]:
        """The measured numbers by name, ready for a logger."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tensors"}


@dataclass(frozen=True)
class PathResult(Sequence[PathPoint]):
    """A walked path: a sequence of points from the start to where it ended.

    Attributes:
        points: The accepted points, the start first.
        objective_name: What `objective` in the points is, with its unit.
        maximise: Whether a larger objective is the better one.
        budget: The largest drift that was allowed, if any.
        outcome: Why the path ended: "reached", "budget", "stalled" or "max_steps".
        message: The same in words, with what would take it further.
        state: What `resume=` continues from: tensors and plain values.
        settings: How the path was walked.
    """

    points: tuple[PathPoint, ...] = field(repr=False)
    objective_name: str
    maximise: bool
    budget: float | None
    outcome: str
    message: str
    state: Mapping[str, Any] = field(repr=False)
    settings: Mapping[str, Any] = field(default_factory=dict)

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
        self, *, max_changed: float | None = None, max_drift: float | None = None, confidence: float | None = None
    ) -> PathPoint:
        """The stored point that serves the objective best within what may be lost.

        Args:
            max_changed: Largest share of changed predictions on the held-out inputs.
            max_drift: Largest drift.
            confidence: When given (0.95, say), `max_changed` bounds not the observed share but its exact upper
                confidence bound (Clopper & Pearson, 1934), so that it holds beyond the inputs at hand. It is the bound
                for one point; picking the best of several spends some of it.

        Returns:
            The point.

        Raises:
            ValueError: No stored point is within the limits; the message says how near the path came.
        """
        candidates = [p for p in self.points if p.tensors is not None]
        if max_drift is not None:
            candidates = [p for p in candidates if p.drift <= max_drift]
        if max_changed is not None:
            candidates = [p for p in candidates if self._changed(p, confidence) <= max_changed]
        if max_changed is not None and all(p.changed != p.changed for p in self.points):
            raise ValueError("best: max_changed: outputs of this geometry predict no class; use max_drift instead")
        if not candidates:
            least = min((self._changed(p, confidence) for p in self.points), default=float("nan"))
            raise ValueError(
                f"best: no stored point has max_changed={max_changed}, max_drift={max_drift}; the least changed share"
                f"{'' if confidence is None else f' certified at {confidence:.0%}'} on {self.points[0].num_held_out}"
                f" held-out inputs is {least:.4f}; allow more, or pass more held_out inputs"
            )
        sign = 1 if self.maximise else -1
        return max(candidates, key=lambda p: (sign * p.objective, -p.drift))

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the path to one safetensors file: points, weights and the state to resume from.

        Raises:
            FileExistsError: There is such a file and `overwrite` is False.
        """
        tensors = {
            f"points.{p.step}.{name}": t for p in self.points if p.tensors is not None for name, t in p.tensors.items()
        }
        plain = {}
        for key, value in self.state.items():
            if isinstance(value, Tensor):
                tensors[f"state.{key}"] = value
            else:
                plain[key] = value
        meta = {
            "kind": "path",
            "points": [{k: _plain(v) for k, v in p.to_dict().items()} for p in self.points],
            "objective_name": self.objective_name,
            "maximise": self.maximise,
            "budget": self.budget,
            "outcome": self.outcome,
            "message": self.message,
            "state": plain,
            "settings": dict(self.settings),
        }
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
        points = []
        for entry in meta["points"]:
            head = f"points.{entry['step']}."
            own = {name[len(head) :]: t for name, t in tensors.items() if name.startswith(head)}
            numbers: dict[str, Any] = {k: float("nan") if v is None else v for k, v in entry.items()}
            points.append(PathPoint(**numbers, tensors=own or None))
        state = dict(meta["state"]) | {k[6:]: t for k, t in tensors.items() if k.startswith("state.")}
        keys = ("objective_name", "maximise", "budget", "outcome", "message", "settings")
        return cls(points=tuple(points), state=state, **{k: meta[k] for k in keys})

    def thinned(self, keep: Sequence[int]) -> PathResult:
        """The same path with the tensors of all points dropped but those at the indices `keep`."""
        chosen = {range(len(self))[i] for i in keep}
        points = tuple(p if i in chosen else replace(p, tensors=None) for i, p in enumerate(self.points))
        return replace(self, points=points)

    def plot(self, axes: Any = None, **kwargs: Any) -> Any:
        """Draw the path with `fipgeo.plotting.plot_path`."""
        from fipgeo import plotting

        return plotting.plot_path(self, axes=axes, **kwargs)

    @staticmethod
    def _changed(point: PathPoint, confidence: float | None) -> float:
        if confidence is None:
            return point.changed
        return changed_upper_bound(round(point.changed * point.num_held_out), point.num_held_out, confidence)


def _plain(value: float) -> float | None:
    return None if value != value else value
