"""What solvers, eigensolvers and estimators hand back: values with a verdict and measured residuals."""

import enum
import math
import os
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fipgeo.io import load_record, save_record

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Outcome(enum.Enum):
    """How an iteration ended, best first; the value says what it means and what helps.

    Examples:
        >>> Outcome.CONVERGED.ok, Outcome.STAGNATED.ok
        (True, False)
    """

    CONVERGED = "the requested tolerance was reached, as measured with true products"
    STAGNATED = "rounding stops the residual above rtol; loosen it, add damping, or work in float64"
    MAX_ITERATIONS = (
        "the tolerance was not reached within the allowed work; raise max_iters or max_products, add "
        "damping, or give a preconditioner"
    )
    BREAKDOWN = (
        "a direction of negative or zero curvature was met, so the system is not positive definite; raise "
        "damping above the negative curvature, or check that the operator is psd (psd_gap)"
    )
    NOT_FINITE = "a product returned NaN or infinity; check the operator, the input, and overflow"

    @property
    def ok(self) -> bool:
        """Whether this is CONVERGED."""
        return self is Outcome.CONVERGED

    @property
    def message(self) -> str:
        """What happened and what helps."""
        return self.value

    @staticmethod
    def worst(outcomes: "list[Outcome]") -> "Outcome":
        """The most severe of several verdicts; CONVERGED for none.

        Examples:
            >>> Outcome.worst([Outcome.CONVERGED, Outcome.STAGNATED]).name
            'STAGNATED'
        """
        severity = list(Outcome)
        return max(outcomes, key=severity.index, default=Outcome.CONVERGED)


class SolveError(RuntimeError):
    """A solve did not converge and its caller asked for an exception.

    Attributes:
        solution: the record of the solve, with the best value found.
    """

    def __init__(self, message: str, solution: "Solution") -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class Solution:
    """The answer of a solver for one or many right-hand sides.

    Attributes:
        value: x, `[..., n]`.
        outcome: the verdict; the worst one of many right-hand sides.
        residual: `|b - A x| / |b|` for each right-hand side, `[...]`, from a true product with the returned
            value (0 where b = 0). `lsmr` reports that of the normal equations.
        num_iters: iterations, or refinements of a factorisation.
        num_products: vectors multiplied by the operator, its adjoint or its normal product; a stack of k
            counts k.
        history: relative residuals as the iteration estimated them, `[num_iters + 1, ...]`, or None.
        curvature: the smallest `<p, A p> / |p|^2` met, damping included, `[...]`; None if the method sees
            none.
    """

    value: Tensor
    outcome: Outcome
    residual: Tensor
    num_iters: int
    num_products: int
    history: Tensor | None = None
    curvature: Tensor | None = None

    @property
    def ok(self) -> bool:
        """Whether every right-hand side converged."""
        return self.outcome.ok

    def raise_for_outcome(self) -> "Solution":
        """This record if it converged.

        Raises:
            SolveError: otherwise, with the verdict and the largest residual.
        """
        if self.ok:
            return self
        worst = float(self.residual.max()) if self.residual.numel() else math.nan
        curvature = "" if self.curvature is None else f", smallest curvature {float(self.curvature.min()):.3g}"
        raise SolveError(
            f"{self.outcome.name}: {self.outcome.message} (relative residual {worst:.3g} after "
            f"{self.num_iters} iterations and {self.num_products} products{curvature})",
            self,
        )


@dataclass(frozen=True)
class Spectrum:
    """Largest eigenvalues of a symmetric operator `A: R^n -> R^n`, with what is known about their accuracy.

    Attributes:
        values: `[k]`, descending, in the dtype of the operator.
        vectors: `[k, n]`, orthonormal rows, or None if they were not asked for.
        residuals: `|A v_i - lambda_i v_i|`, `[k]`, absolute, from true products (some eigenvalue of A lies
            within it); None without vectors.
        dim: n.
        rank_bound: upper bound of the rank that follows from shapes, or None.
        complete: whether every eigenvalue outside `values` is zero to rounding.
        outcome: the verdict.
        num_products: vectors multiplied by the operator, its root or the root's adjoint.
        held_out: `<v_i, A' v_i>`, `[k]`, of the same vectors under another operator A', or None.
        captured: share of the trace of A' that lies in the span of the vectors, or None.

    Examples:
        >>> found = Spectrum(torch.tensor([2.0, 2.0, 0.0]), None, None, dim=3)
        >>> found.rank(), round(found.effective_rank(), 3), found.participation_ratio()
        (2, 2.0, 2.0)
    """

    values: Tensor
    vectors: Tensor | None = field(repr=False)
    residuals: Tensor | None
    dim: int
    rank_bound: int | None = None
    complete: bool = False
    outcome: Outcome = Outcome.CONVERGED
    num_products: int = 0
    held_out: Tensor | None = None
    captured: float | None = None

    @property
    def ok(self) -> bool:
        """Whether every pair converged."""
        return self.outcome.ok

    def tolerance(self) -> float:
        """The size below which a value is rounding: `eps max(10, k) max |lambda|`, eps that of `values`."""
        largest = float(self.values.abs().max()) if self.values.numel() else 0.0
        return torch.finfo(self.values.dtype).eps * max(10, len(self.values)) * largest

    def rank(self, tol: float | None = None) -> int:
        """How many values are above `tol`; with None, above both `tolerance()` and their own residual."""
        if tol is not None:
            return int((self.values > tol).sum())
        above = self.values > self.tolerance()
        if self.residuals is not None:
            above &= self.values > self.residuals
        return int(above.sum())

    def effective_rank(self) -> float:
        """`exp(- sum p_i log p_i)`, `p_i = lambda_i / sum lambda`, over the positive values that are here.

        Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007.
        """
        p = self._shares()
        return float(torch.exp(-torch.xlogy(p, p).sum())) if p.numel() else 0.0

    def participation_ratio(self) -> float:
        """`(sum lambda)^2 / sum lambda^2` over the positive values that are here."""
        p = self._shares()
        return float(1 / p.square().sum()) if p.numel() else 0.0

    def _shares(self) -> Tensor:
        positive = self.values[self.values > 0].double()
        return positive / positive.sum()

    def to_dict(self) -> dict[str, Any]:
        """Fields as tensors, numbers, strings and None; `from_dict` restores the record."""
        return {f.name: getattr(self, f.name) for f in fields(self)} | {"outcome": self.outcome.name}

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> "Spectrum":
        """The record that `to_dict` was made of.

        Raises:
            ValueError: if entries are missing or unknown, or the outcome has no such name.
        """
        names = {f.name for f in fields(cls)}
        if state.keys() != names:
            raise ValueError(f"state has entries {sorted(state)}, expected {sorted(names)}; use Spectrum.to_dict()")
        if state["outcome"] not in Outcome.__members__:
            raise ValueError(f"outcome {state['outcome']!r} is none of {list(Outcome.__members__)}")
        entries: dict[str, Any] = state | {"outcome": Outcome[state["outcome"]]}
        return cls(**entries)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the record to one safetensors file, which `load` and `python -m fipgeo spectrum` read.

        Raises:
            FileExistsError: there is such a file and `overwrite` is False.

        Examples:
            >>> import tempfile
            >>> folder = tempfile.TemporaryDirectory()
            >>> Spectrum(torch.tensor([2.0, 1.0]), None, None, dim=3).save(f"{folder.name}/a.safetensors")
            >>> Spectrum.load(f"{folder.name}/a.safetensors").values
            tensor([2., 1.])
            >>> folder.cleanup()
        """
        state = self.to_dict()
        tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
        plain = {name: value for name, value in state.items() if name not in tensors}
        save_record(path, tensors, {"kind": "spectrum", "fields": plain}, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Spectrum":
        """Read a record that `save` wrote.

        Raises:
            ValueError: the file holds no spectrum.
        """
        tensors, meta = load_record(path)
        if meta.get("kind") != "spectrum":
            raise ValueError(f"load: {os.fspath(path)} holds {meta.get('kind', 'no record of fipgeo')}, not a spectrum")
        return cls.from_dict(meta["fields"] | tensors)

    def plot(self, ax: "Axes | None" = None, **kwargs: Any) -> "Axes":
        """Draw the spectrum on a logarithmic axis; `kwargs` go to `fipgeo.plotting.plot_spectrum`."""
        from fipgeo import plotting

        return plotting.plot_spectrum(self, ax=ax, **kwargs)


@dataclass(frozen=True)
class Estimate:
    """A Monte Carlo value.

    Attributes:
        value: the estimate; NaN if a product was not finite.
        std_error: its standard error, rounding included; 0 for an exact value, NaN for a single sample.
        num_samples: random vectors it rests on; 0 for an exact value.
        num_products: vectors multiplied by the operator.
        outcome: the verdict; CONVERGED wherever the value is what it says.

    Examples:
        >>> found = Estimate(6.0, 0.5, num_samples=8, num_products=16)
        >>> float(found), found.ok
        (6.0, True)
    """

    value: float
    std_error: float
    num_samples: int
    num_products: int = 0
    outcome: Outcome = field(default=Outcome.CONVERGED, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the value is what it says."""
        return self.outcome.ok

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class TensorEstimate:
    """Monte Carlo values of many quantities from the same random vectors.

    Attributes:
        value: the estimates.
        std_error: the standard error of each entry, in the shape of `value`. Errors of different entries are
            not independent.
        num_samples: random vectors they rest on; 0 for exact values.
        num_products: vectors multiplied by the operator.
        outcome: the verdict; CONVERGED wherever the values are what they say.
    """

    value: Tensor
    std_error: Tensor
    num_samples: int
    num_products: int = 0
    outcome: Outcome = field(default=Outcome.CONVERGED, repr=False)

    @property
    def ok(self) -> bool:
        """Whether the values are what they say."""
        return self.outcome.ok
