"""z(theta): the embedded outputs of a model on a data set, the function whose derivative is the root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Batches
from fipgeo.model import OutputError, OutputMap
from fipgeo.outputs import Geometry, embed

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found.

    Attributes:
        rows: Embedded outputs of every batch, all examples together.
        examples: Examples of every batch.
    """

    rows: tuple[int, ...]
    examples: tuple[int, ...]

    @property
    def num_rows(self) -> int:
        """N times M: rows of the root."""
        return sum(self.rows)

    @property
    def num_examples(self) -> int:
        """N."""
        return sum(self.examples)


@dataclass(frozen=True, eq=False)
class EmbeddedOutputs:
    """z = phi(F(theta)) on fixed inputs, flattened to `[N * M]`, batch after batch.

    Attributes:
        map: The model as a function of weights and a batch.
        geometry: The embedding phi.
        batches: The inputs.
    """

    map: OutputMap
    geometry: Geometry
    batches: Batches

    def on(self, batch: Any) -> Callable[[Weights], Tensor]:
        """z on one batch as a function of named weights: dict to `[n * M]`; call it inside `map.frozen()`."""
        return lambda weights: embed(self.geometry, self.map.call(weights, batch)).reshape(-1)

    def outputs(self, theta: Tensor) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        """Every batch with the outputs at theta.

        Raises:
            OutputError: Outputs are not finite.
        """
        for batch in self.batches:
            outputs = self.map(theta, batch)
            if not all(bool(torch.isfinite(f).all()) for f in outputs):
                raise OutputError("outputs: NaN or infinite values; check the weights and the scale of the inputs")
            yield batch, outputs

    def survey(self, theta: Tensor) -> Survey:
        """Count rows and examples by one pass, after a look at the model's behaviour on the first batch.

        Raises:
            ValueError: See `OutputMap.check`; or a batch or the whole data set is empty.
        """
        self.map.check(self.batches.first())
        rows, examples = [], []
        for _, outputs in self.outputs(theta):
            z = embed(self.geometry, outputs)
            if not len(z):
                raise OutputError(f"inputs: batch {len(rows)} holds 0 examples; expected at least one in every batch")
            rows.append(z.numel())
            examples.append(len(z))
        return Survey(tuple(rows), tuple(examples))
