"""The root of the metric, R = dz/dtheta, behind one operator that picks how it is computed."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from fipgeo.jacobian.autodiff import AutodiffRoot
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.materialised import gram, inner_products, materialised_root
from fipgeo.linalg import Dense, LinearOperator

ENGINES = ("auto", "autodiff", "materialised")
MAX_BYTES = 2**30


class JacobianRoot(LinearOperator):
    """R = dz/dtheta `[N * M, D]` at a point, on fixed inputs.

    Engines give the same numbers at different prices:

    | engine | a product costs | holds |
    | --- | --- | --- |
    | autodiff | about 3 forward passes a vector, one pass over the data a stack | nothing |
    | materialised | 2 N M D flops a vector | N M D numbers; making them costs about 2 M forward passes |

    "auto" starts with autodiff and materialises when many products are announced (`prepare`) and R fits `max_bytes`.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`; a copy is kept, in the dtype of the space.
        engine: "auto", "autodiff" or "materialised".
        max_bytes: Most memory that rows may take.
        survey: Rows and examples of every batch, when a pass has already counted them.

    Raises:
        ValueError: Unknown engine; "materialised" does not fit `max_bytes`; or see `OutputMap.check`.
    """

    def __init__(
        self,
        function: EmbeddedOutputs,
        theta: Tensor,
        *,
        engine: str = "auto",
        max_bytes: int = MAX_BYTES,
        survey: Survey | None = None,
    ) -> None:
        if engine not in ENGINES:
            raise ValueError(f"engine: got {engine!r}, expected one of {', '.join(map(repr, ENGINES))}")
        space = function.map.space
        if theta.shape != (space.dim,):
            raise ValueError(f"theta: got shape {list(theta.shape)}, expected a flat point [{space.dim}]")
        with torch.inference_mode(False):
            self.theta = theta.detach().clone().to(space.device, space.dtype)
        self.function = function
        self.survey = function.survey(self.theta) if survey is None else survey
        super().__init__((self.survey.num_rows, space.dim), dtype=space.dtype, device=space.device)
        self.engine, self.max_bytes = engine, max_bytes
        if engine == "materialised" and not self.fits:
            raise ValueError(
                f"engine: 'materialised' needs {_gib(self.num_bytes)} for {self.shape[0]:,} x {self.shape[1]:,} rows,"
                f" but max_bytes is {_gib(max_bytes)}; raise max_bytes, or use engine='autodiff'"
            )
        self.rows: Dense | None = None
        self._gram: Tensor | None = None
        if survey is None:  # nobody has looked at the model's derivative rules either
            _ = self.autodiff
        if engine == "materialised":
            self.prepare()

    @property
    def rank_bound(self) -> int:
        """The rank exceeds neither D nor the dimensions along which the embedded outputs can change."""
        return min(self.shape[0] - self.survey.lost, self.shape[1])

    @cached_property
    def autodiff(self) -> AutodiffRoot:
        """The engine that stores nothing; looks at the model's derivative rules when it is first used."""
        return AutodiffRoot(self.function, self.theta, self.survey)

    @property
    def num_bytes(self) -> int:
        """Memory that R takes as rows."""
        return self.shape[0] * self.shape[1] * torch.finfo(self.dtype).bits // 8

    @property
    def fits(self) -> bool:
        """Whether R as rows fits `max_bytes`."""
        return self.num_bytes <= self.max_bytes

    def prepare(self) -> LinearOperator:
        """Announce many products: R is materialised if the engine lets it and it fits. Returns the operator in use."""
        if self.rows is None and self.engine != "autodiff" and self.fits:
            self.rows = materialised_root(self.function, self.theta, self.survey)
        return self._operator

    def gram(self) -> Tensor:
        """K = R R^T in float64, `[N * M, N * M]`; made once."""
        if self._gram is None:
            if self.prepare() is self.rows and self.rows is not None:
                self._gram = inner_products(self.rows.matrix, self.rows.matrix)
            else:
                self._gram = gram(self.function, self.theta, self.survey, self.max_bytes)
        return self._gram

    def explain(self) -> str:
        """Which engine is in use, why, and what it takes."""
        rows, dim = self.shape
        using = "autodiff" if self.rows is None else "materialised rows"
        fit = "fits" if self.fits else "does not fit"
        return (
            f"root: {rows:,} rows ({self.survey.num_examples:,} examples) x {dim:,} weights in {self.dtype};"
            f" as rows {_gib(self.num_bytes)}, which {fit} max_bytes = {_gib(self.max_bytes)};"
            f" engine {self.engine!r}, now using {using}; rank at most {self.rank_bound:,}"
        )

    @property
    def _operator(self) -> LinearOperator:
        return self.autodiff if self.rows is None else self.rows

    def _apply(self, x: Tensor) -> Tensor:
        return self._operator._apply(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._operator._adjoint(y)

    def _normal(self, x: Tensor) -> Tensor:
        return self._operator._normal(x)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**27 else f"{num_bytes / 2**20:.1f} MiB"
