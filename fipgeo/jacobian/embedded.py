"""z(theta): the embedded outputs of a model on a data set, the function whose derivative is the root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Batches
from fipgeo.model import NotFiniteError, OutputError, OutputMap
from fipgeo.outputs import Geometry, embed
from fipgeo.trees import same_batch

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found.

    Attributes:
        rows: Embedded outputs of every batch, all examples together.
        examples: Examples of every batch.
        lost: Dimensions of all embedded outputs together along which they cannot change.
    """

    rows: tuple[int, ...]
    examples: tuple[int, ...]
    lost: int = 0

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
        """The function z on one batch, of named weights: dict to `[n * M]`; call it inside `map.frozen()`."""
        dtype = self.map.space.dtype
        return lambda weights: embed(self.geometry, self.map.call(weights, batch)).reshape(-1).to(dtype)

    def outputs(self, theta: Tensor) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        """Every batch with the outputs at theta.

        Raises:
            OutputError: A batch is empty, or outputs are not finite.
        """
        for index, batch in enumerate(self.batches):
            outputs = self.map(theta, batch)
            if not all(len(f) for f in outputs):
                raise OutputError(f"inputs: batch {index} holds 0 examples; expected at least one in every batch")
            if not all(bool(torch.isfinite(f).all()) for f in outputs):
                raise NotFiniteError(
                    f"outputs: NaN or infinite values in batch {index}; check the weights and the scale of the inputs"
                )
            yield batch, outputs

    def survey(self, theta: Tensor) -> Survey:
        """Count rows and examples by one pass, after a look at the model's behaviour on the first batch.

        Raises:
            ValueError: See `OutputMap.check`; or a batch is empty, two passes differ, or z is not finite.
        """
        first = self.batches.first()
        self.map.check(first, theta)
        rows, examples, lost = [], [], 0
        for index, (batch, outputs) in enumerate(self.outputs(theta)):
            if index == 0 and not same_batch(first, batch):
                raise ValueError(
                    "inputs: two passes over the data gave different first batches; switch augmentation and private"
                    " randomness of the loader off, or pass list(loader) for one fixed draw"
                )
            z = embed(self.geometry, outputs)
            if not bool(torch.isfinite(z).all()):
                raise OutputError(
                    f"geometry: {self.geometry} is NaN or infinite at finite outputs of batch {index} (a direction"
                    " needs outputs that are not zero); use geometry='euclidean'"
                )
            rows.append(z.numel())
            examples.append(len(z))
            lost += self.geometry.lost * sum(f.numel() // f.shape[-1] for f in outputs)
        if not rows:
            raise ValueError("inputs: a second pass over the data gave no batch; pass list(inputs) or a DataLoader")
        return Survey(tuple(rows), tuple(examples), lost)
