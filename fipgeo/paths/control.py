"""Step-size control: from the drift that a step has caused, and that was predicted, to the size of the next one."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepControl:
    """Step-size control as in an ODE solver with an embedded error estimate.

    The error e of a step is the drift it added, or its distance from what the tangent model had predicted if that is
    larger: the difference of predictor and corrector is what a solver with a predictor takes for its local error
    (Milne's device; Hairer, Norsett & Wanner, Solving Ordinary Differential Equations I, 1993, section III.1). Both
    grow with the square of the size h, so that a step is followed by one of size

        h * clip((tolerance / e)^0.5, 1/2, 3/2)      within [smallest, largest].

    A step is refused, and tried again at half its size, if it leaves the budget or adds more than `refuse` tolerances;
    at the smallest size only the budget can refuse.

    Attributes:
        initial: Size of the first step.
        smallest: No step is smaller.
        largest: No step is larger.
        tolerance: Drift that one step should add.
        refuse: Multiple of the tolerance beyond which a step is tried again.

    Examples:
        >>> control = StepControl(initial=0.2, smallest=0.1, largest=0.4, tolerance=0.02)
        >>> control.accepts(0.2, added=0.01, drift=0.3, budget=None), control.following(0.2, error=0.02)
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

    def error(self, added: float, predicted: float | None = None) -> float:
        """The error of a step from the drift that it added and the drift that was predicted, if any was.

        It lies between a hundredth and a hundred tolerances, so that one odd step is soon forgotten.
        """
        found = added if predicted is None or not math.isfinite(predicted) else max(added, abs(added - predicted))
        return min(max(found, self.tolerance / 100), 100 * self.tolerance)

    def smaller(self, size: float) -> float:
        """The size to try after a refusal."""
        return max(size / 2, self.smallest)

    def following(self, size: float, *, error: float) -> float:
        """The size of the step after an accepted one, from its error."""
        factor = (self.tolerance / error) ** 0.5
        return min(max(size * min(max(factor, 0.5), 1.5), self.smallest), self.largest)
