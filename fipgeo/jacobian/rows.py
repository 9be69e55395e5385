"""Rows of the root by plain differentiation: for all parameters or for some of them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev

from fipgeo.data import TensorBatches
from fipgeo.jacobian.autodiff import Function, pull_back, vectorised
from fipgeo.jacobian.embedded import EmbeddedOutputs, Weights
from fipgeo.trees import head, map_tensors

log = logging.getLogger(__name__)

BLOCK_BYTES = 2**28
"""Rows are made in blocks of about this size."""


class RowMaker:
    """Rows of R for chosen parameters, batch after batch.

    Where examples stand alone (checked on the first two), their rows come from each example's own outputs; otherwise
    from the whole batch, one output at a time. To be used inside `function.map.frozen()`.

    Args:
        function: z on fixed inputs.
        weights: The point by name.
        names: The parameters; None for all.
    """

    def __init__(self, function: EmbeddedOutputs, weights: Weights, names: Sequence[str] | None = None) -> None:
        self.function, self.weights, self.dtype = function, weights, function.map.space.dtype
        self.chosen = dict(weights) if names is None else {name: weights[name] for name in names}
        self.apart, self.tried = False, 0

    def blocks(self, batch: Any, examples: int, rows: int) -> Iterator[Tensor]:
        """Rows of one batch, `[some, columns]`, in order; columns follow the order of the names."""
        if self.tried < min(examples, 2):  # a batch of one shows nothing about larger ones
            self.apart, self.tried = self._examples_stand_alone(batch, examples), examples
        width = sum(t.numel() for t in self.chosen.values())
        height = max(BLOCK_BYTES // (width * self.dtype.itemsize), 1)
        if self.apart:
            yield from self._by_example(batch, max(height * examples // rows, 1))
        else:
            yield from self._by_cotangent(batch, rows, height)

    def _on(self, batch: Any) -> Function:
        f = self.function.on(batch)
        return lambda some: f({**self.weights, **some})

    def _ravel(self, tensors: Weights) -> Tensor:
        """Named tensors `[..., *shape]` with any leading axes to `[..., columns]`."""
        parts = [t.reshape(*t.shape[: t.dim() - self.chosen[name].dim()], -1) for name, t in tensors.items()]
        return torch.cat([part.to(self.dtype) for part in parts], -1)

    def _by_example(self, batch: Any, step: int) -> Iterator[Tensor]:
        """One vectorised reverse pass per output, on each example alone."""

        def rows(example: Any) -> Tensor:
            single = map_tensors(example, lambda t: t[None])
            return self._ravel(jacrev(self._on(single))(self.chosen))

        for part in TensorBatches(as_tree(batch), step):
            yield vectorised(rows)(part).flatten(0, 1)

    def _by_cotangent(self, batch: Any, rows: int, height: int) -> Iterator[Tensor]:
        """R^T e_i over the whole batch."""
        z, pull = pull_back(self._on(batch), self.chosen)
        for index in torch.arange(rows, device=z.device).split(min(height, 64)):
            part = z.new_zeros(len(index), rows).scatter_(1, index[:, None], 1.0)
            try:
                block = vectorised(lambda u: self._ravel(pull(u)[0]))(part)
            except (RuntimeError, ValueError) as error:
                log.info("rows are made one by one, since the model cannot be vectorised: %s", error)
                block = torch.stack([self._ravel(pull(u)[0]) for u in part])
            yield block

    def _examples_stand_alone(self, batch: Any, examples: int) -> bool:
        """Whether the rows of single examples equal those of the batch: tried on two, checked by one pullback."""
        try:
            whole, few = len(TensorBatches(as_tree(batch))), head(batch, 2)
            rows = torch.cat(list(self._by_example(few, 2)))
            z, pull = pull_back(self._on(batch), self.chosen)  # the whole batch: a small one may go another way
        except Exception as error:  # whatever a model says to a single example under vmap, whole batches are at hand
            log.info("rows are made from whole batches, since examples cannot be vectorised: %s", error)
            return False
        if whole != examples or len(rows) * examples != z.numel() * min(2, examples):
            return False
        u = torch.linspace(-1.0, 1.3, len(rows), dtype=z.dtype, device=z.device)
        expected = self._ravel(pull(torch.cat([u, u.new_zeros(z.numel() - len(u))]))[0])
        gap = (u.to(rows.dtype) @ rows - expected).norm()
        coarse = max(torch.finfo(t.dtype).eps for t in self.weights.values())
        return bool(gap <= max(1e-3, 8 * coarse) * expected.norm())


def as_tree(batch: Any) -> Any:
    """The batch as tensors, dicts and tuples of tensors.

    Raises:
        TypeError: Anything else is in it.
    """
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Mapping):
        return {key: as_tree(value) for key, value in batch.items()}
    if isinstance(batch, list | tuple):
        return tuple(as_tree(value) for value in batch)
    raise TypeError(f"the batch holds a {type(batch).__name__}")
