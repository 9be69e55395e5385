"""The root of the metric, R = dz/dtheta, behind one operator that picks how it is computed."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from fipgeo.basis import inclusion
from fipgeo.jacobian.autodiff import AutodiffRoot
from fipgeo.jacobian.cost import Costs, estimate, size
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.factored import FactoredRoot, gram_by_parameters
from fipgeo.jacobian.gram import gram_by_pairs, inner_products
from fipgeo.jacobian.linearised import LinearisedRoot
from fipgeo.jacobian.look import Look, look
from fipgeo.jacobian.materialised import materialised_root
from fipgeo.jacobian.sketch import drawn
from fipgeo.linalg import Dense, LinearOperator, doubled
from fipgeo.space import Where

log = logging.getLogger(__name__)

ENGINES = ("auto", "autodiff", "linearised", "factored", "materialised")
"""Names of the engines."""

MAX_BYTES = 2**30
"""Most memory that an engine may hold unless told otherwise: 1 GiB."""

MANY = 64
"""Products that `prepare` has in mind when no number is given."""


class JacobianRoot(LinearOperator):
    """R = dz/dtheta `[N * M, D]` at a point, on fixed inputs.

    Engines give the same numbers at different prices:

    | engine | a product R^T R v costs | holds |
    | --- | --- | --- |
    | autodiff | about 6 forward passes, one pass over the data for a whole stack | nothing |
    | linearised | about 4 forward passes | the graphs of one forward pass |
    | factored | 1 to 3 forward passes or less | inputs and output derivatives of layers, or rows, whichever is faster |
    | materialised | 4 N M D operations | N M D numbers |

    "auto" starts with autodiff. It changes to the engine whose set-up pays when products are announced (`prepare`), or
    when those that were asked for one by one have cost as much as that set-up; estimates are in `explain()`.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`; a copy is kept, in the dtype of the space.
        engine: One of `ENGINES`.
        max_bytes: Most memory that an engine may hold.
        survey: Rows and examples of every batch, when a pass has already counted them.

    Raises:
        ValueError: Unknown engine; an engine that was named does not fit `max_bytes`; or see `OutputMap.check`.
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
        self.function = drawn(function, self.theta)
        looked = look(self.function, self.theta) if survey is None else Look(survey, None)
        self.survey, self._rules = looked.survey, looked.rules
        super().__init__((self.survey.num_rows, space.dim), dtype=space.dtype, device=space.device)
        self.engine, self.max_bytes = engine, max_bytes
        self._using: LinearOperator | None = None
        self._gram: Tensor | None = None
        self._single: Tensor | None = None
        self._spent = 0.0
        self._unfit: set[str] = set()
        if survey is None:  # nobody has looked at the model's derivative rules either
            _ = self.autodiff
        if engine not in ("auto", "autodiff"):
            self._using = self._build(engine)

    @property
    def rank_bound(self) -> int:
        """The rank exceeds neither D nor the dimensions along which the embedded outputs can change."""
        return min(self.shape[0] - self.survey.lost, self.shape[1])

    @cached_property
    def autodiff(self) -> AutodiffRoot:
        """The engine that stores nothing; tries the model's derivative rules where nobody has yet."""
        return AutodiffRoot(self.function, self.theta, self.survey, rules=self._rules)

    @cached_property
    def costs(self) -> Costs:
        """The estimates by which "auto" chooses."""
        with self.function.map.frozen():
            return estimate(self.function, self.function.map.named(self.theta), self.survey, self.max_bytes)

    @property
    def using(self) -> str:
        """The engine in use."""
        kinds = {LinearisedRoot: "linearised", FactoredRoot: "factored", Dense: "materialised"}
        return "autodiff" if self._using is None else kinds[type(self._using)]

    @property
    def block(self) -> int:
        """Vectors that a block method best multiplies together: several where products wait for memory."""
        return self._using.block if isinstance(self._using, FactoredRoot) else 4 if self.rows is not None else 1

    @property
    def rows(self) -> Dense | None:
        """R as rows, if they are in memory."""
        return self._using if isinstance(self._using, Dense) else None

    @property
    def num_bytes(self) -> int:
        """Memory that R takes as rows."""
        return self.shape[0] * self.shape[1] * self.dtype.itemsize

    def prepare(self, products: int = MANY) -> LinearOperator:
        """Announce a number of products: "auto" sets up what pays for them. Returns the operator in use."""
        if self.engine == "auto" and self._using is None:
            self._change(self._cheapest(products))
        return self._operator

    def gram(self, *, single: bool = False) -> Tensor:
        """K = R R^T in float64, `[N * M, N * M]`; made once, from what is held or group by group within `max_bytes`.

        Args:
            single: Whether products in the precision of R do, summed up in float64: less time, seven digits.
        """
        if self._gram is not None or (single and self._single is not None):
            return self._single if self._gram is None else self._gram  # type: ignore[return-value]
        using = self.prepare(self.shape[0])
        if isinstance(using, FactoredRoot):
            found = using.gram(single=single)
        elif isinstance(using, Dense):
            found = inner_products(using.matrix, using.matrix, single=single)
        else:
            found = self._gram_in_parts(single)
        if single:
            self._single = found
        else:
            self._gram, self._single = found, None
        return found

    def restricted(self, params: Where) -> LinearOperator:
        """The columns of some parameters, from what is held where it is held; `[N * M, d]`.

        Raises:
            ValueError: No parameter fits.
        """
        space = self.function.map.space
        chosen = [space.slices()[name] for name in space.subset(params).shapes]
        if isinstance(self._using, FactoredRoot):
            return self._using.restricted(chosen)
        if isinstance(self._using, Dense):
            return Dense(torch.cat([self._using.matrix[:, where] for where in chosen], -1))
        return self @ inclusion(space, params)

    def column_squares(self) -> Tensor | None:
        """The diagonal of R^T R in float64, `[D]`, where the engine in use holds R; None otherwise."""
        if isinstance(self._using, FactoredRoot):
            return self._using.column_squares()
        if isinstance(self._using, Dense):
            return torch.linalg.vector_norm(self._using.matrix, dim=0, dtype=torch.float64).square()
        return None

    def materialise(self) -> Dense | None:
        """R as rows, made if they fit `max_bytes` and the engine was not named otherwise; None if not."""
        if self.rows is None and self.engine in ("auto", "materialised") and self.num_bytes <= self.max_bytes:
            self._using = self._build("materialised")
        return self.rows

    def chosen(self, free: Tensor) -> Dense:
        """The columns of R at the true entries of a mask `[D]`, as rows; the others are never all in memory."""
        try:
            found = FactoredRoot(self.function, self.theta, self.survey, max_bytes=self.max_bytes / 8).chosen(free)
            if found.shape == (self.shape[0], int(free.sum())):
                return Dense(found)
        except (ValueError, NotImplementedError, RuntimeError) as error:
            log.info("columns are chosen from whole rows: %s", error)
        return materialised_root(self.function, self.theta, self.survey, free)

    def double(self) -> LinearOperator | None:
        """The same root with float64 algebra over what is held; None where products pass through the model."""
        return doubled(self._using) if isinstance(self._using, FactoredRoot | Dense) else None

    def explain(self) -> str:
        """The engine in use, and estimates for every engine in forward passes over the data and memory."""
        rows, dim = self.shape
        return (
            f"root: {rows:,} rows ({self.survey.num_examples:,} examples) x {dim:,} weights in {self.dtype};"
            f" rank at most {self.rank_bound:,}\n"
            f"engine {self.engine!r}, now using {self.using}; max_bytes = {size(self.max_bytes)}\n"
            f"{self.costs.table(self.max_bytes)}"
        )

    def _cheapest(self, products: float) -> str:
        costs = self.costs
        open_ = {name: cost for name, cost in costs.engines.items() if name not in self._unfit}
        return replace(costs, engines=open_).cheapest(products, self.max_bytes)

    def _change(self, engine: str) -> None:
        """Set an engine up; what turns out not to work for this model is not tried again."""
        while engine != "autodiff":
            try:
                self._using = self._build(engine)
                return
            except (ValueError, NotImplementedError, RuntimeError) as error:
                log.info("engine %s is not used: %s", engine, error)
                self._unfit.add(engine)
                engine = self._cheapest(MANY)

    def _build(self, engine: str) -> LinearOperator:
        if engine == "factored":
            return FactoredRoot(self.function, self.theta, self.survey, max_bytes=self.max_bytes)
        if engine == "linearised":
            return LinearisedRoot(self.function, self.theta, self.survey, max_bytes=self.max_bytes)
        if self.num_bytes > self.max_bytes:
            raise ValueError(
                f"engine: 'materialised' needs {size(self.num_bytes)} for {self.shape[0]:,} x {self.shape[1]:,} rows,"
                f" but max_bytes is {size(self.max_bytes)}; raise max_bytes, or use engine='autodiff'"
            )
        return materialised_root(self.function, self.theta, self.survey)

    def _gram_in_parts(self, single: bool) -> Tensor:
        groups: list[list[str]] = [[]]
        used = 0.0
        for name, need in self.costs.bytes_by_name.items():
            if need > self.max_bytes:
                return gram_by_pairs(self.function, self.theta, self.survey, self.max_bytes)
            if groups[-1] and used + need > self.max_bytes:
                groups.append([])
                used = 0.0
            groups[-1].append(name)
            used += need
        try:
            return gram_by_parameters(self.function, self.theta, self.survey, self.max_bytes, groups, single=single)
        except ValueError as error:
            log.info("the Gram matrix is made from rows: %s", error)
            return gram_by_pairs(self.function, self.theta, self.survey, self.max_bytes)

    @property
    def _operator(self) -> LinearOperator:
        return self.autodiff if self._using is None else self._using

    def _spend(self, share: float, vectors: int) -> None:
        """Count what products have cost; change the engine once that is what the change costs."""
        if self.engine != "auto" or self._using is not None:
            return
        self._spent += share * vectors
        if self._spent < 4:  # nothing pays for itself so soon, and an estimate takes a forward pass
            return
        product = self.costs.engines["autodiff"].product
        best = self._cheapest(self._spent)
        if best != "autodiff" and self.costs.engines[best].setup <= self._spent * product:
            self._change(best)

    def _apply(self, x: Tensor) -> Tensor:
        self._spend(0.5, len(x))
        return self._operator._apply(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        self._spend(0.5, len(y))
        return self._operator._adjoint(y)

    def _normal(self, x: Tensor) -> Tensor:
        return self._scaled_normal(x, 1.0)

    def _scaled_normal(self, x: Tensor, scale: float) -> Tensor:
        self._spend(1.0, len(x))
        return self._operator._scaled_normal(x, scale)


def column_squares(root: LinearOperator) -> Tensor | None:
    """The diagonal of R^T R in float64, `[D]`, where R is held in memory; None otherwise."""
    if isinstance(root, JacobianRoot | FactoredRoot):
        return root.column_squares()
    return root.matrix.double().square().sum(0) if isinstance(root, Dense) else None
