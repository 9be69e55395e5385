"""Step-size control: from the drift that a step has caused to the size of the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepControl:
    """Proportional control of the step size, as in an ODE solver with an embedded error estimate.

    A step of size h that adds drift e is followed by one of size h * clip(sqrt(tolerance / e), 1/2, 3/2), within
    [smallest, largest]. A step is refused, and tried again at half its size, if it leaves the budget or adds more than
    `refuse` tolerances; at the smallest size only the budget can refuse.

    Attributes:
        initial: Size of the first step.
        smallest: No step is smaller.
        largest: No step is larger.
        tolerance: Drift that one step should add.
        refuse: Multiple of the tolerance beyond which a step is tried again.

    Examples:
        >>> control = StepControl(initial=0.2, smallest=0.1, largest=0.4, tolerance=0.02)
        >>> control.accepts(0.2, added=0.01, drift=0.3, budget=None), control.following(0.2, added=0.02)
        (True, 0.2)
    """

    initial: float
    smallest: float
    largest: float
    tolerance: float
    refuse: float = 4.0

    def __post_init__(self) -> None:
        """Check the order of the sizes."""
        if not 0 < self.smallest <= self.initial <= self.largest:
            raise ValueError(
                f"control: got smallest={self.smallest}, initial={self.initial}, largest={self.largest}; expected"
                " 0 < smallest <= initial <= largest"
            )
        if not (self.tolerance > 0 and self.refuse > 1):
            raise ValueError(f"control: got tolerance={self.tolerance}, refuse={self.refuse}; expected > 0 and > 1")

    def accepts(self, size: float, *, added: float, drift: float, budget: float | None) -> bool:
        """Whether a step of this size stands; one whose drift is no finite number never does."""
        if not drift <= (float("inf") if budget is None else budget) or not math.isfinite(drift):
            return False
        return size <= self.smallest or added <= self.refuse * self.tolerance

    def smaller(self, size: float) -> float:
        """The size to try after a refusal."""
        return max(size / 2, self.smallest)

    def following(self, size: float, *, added: float) -> float:
        """The size of the step after an accepted one."""
        factor = 1.5 if added <= 0 else min(max((self.tolerance / added) ** 0.5, 0.5), 1.5)
        return min(max(size * factor, self.smallest), self.largest)
