"""What evolves along a path, and how it goes into a record and comes back bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fipgeo.paths.kept import Position


@dataclass(frozen=True, eq=False)
class PathState:
    """A path between two steps.

    Attributes:
        position: Where it stands.
        start: Where it began.
        size: Size of the next step.
        objective: The objective's state.
        corrector: The corrector's state.
        drift: Drift on the control inputs at this position.
        cost: Model evaluations so far.
        seconds: Wall time so far.
    """

    position: Position
    start: Position
    size: float
    objective: Mapping[str, Tensor] = field(default_factory=dict)
    corrector: Mapping[str, Tensor] = field(default_factory=dict)
    drift: float = 0.0
    cost: float = 0.0
    seconds: float = 0.0

    def flat(self) -> dict[str, Any]:
        """Tensors and plain values by name."""
        out: dict[str, Any] = {key: getattr(self, key) for key in ("size", "drift", "cost", "seconds")}
        out |= {"theta": self.position.theta, "start": self.start.theta}
        groups = {"buffers": self.position.buffers, "start_buffers": self.start.buffers}
        groups |= {"objective": self.objective, "corrector": self.corrector}
        return out | {f"{head}.{key}": value for head, group in groups.items() for key, value in group.items()}

    @classmethod
    def read(cls, flat: Mapping[str, Any], device: torch.device) -> PathState:
        """The state that `flat` wrote, on a device."""

        def group(head: str) -> dict[str, Tensor]:
            return {k[len(head) + 1 :]: v.to(device) for k, v in flat.items() if k.startswith(head + ".")}

        return cls(
            position=Position(flat["theta"].to(device), group("buffers")),
            start=Position(flat["start"].to(device), group("start_buffers")),
            objective=group("objective"),
            corrector=group("corrector"),
            **{key: flat[key] for key in ("size", "drift", "cost", "seconds")},
        )
