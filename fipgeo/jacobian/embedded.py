"""z(theta): the embedded outputs of a model on a data set, the function whose derivative is the root."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import Batches
from fipgeo.model import NotFiniteError, OutputError, OutputMap, output_gap
from fipgeo.outputs import Geometry, embed, over_entries
from fipgeo.trees import FEW, head, same_batch

Weights = Mapping[str, Tensor]

Mask = str | Callable[[Any], Tensor] | None
"""Which positions of an example count: a function of the batch that returns `[n, T]`, the name of such an entry of the
batch ("attention_mask"), or None for all. True or 1 counts, False or 0 does not."""

PER = ("example", "position")


@dataclass(frozen=True)
class Survey:
    """What one pass over the data found.

    Attributes:
        rows: Embedded outputs of every batch, all examples together, masked ones included (their rows are zero).
        examples: Examples of every batch.
        lost: Dimensions of all embedded outputs together along which they cannot change.
        positions: Positions that count in every batch, where the metric is a mean over positions; else None.
    """

    rows: tuple[int, ...]
    examples: tuple[int, ...]
    lost: int = 0
    positions: tuple[int, ...] | None = None

    @property
    def num_rows(self) -> int:
        """N times M: rows of the root."""
        return sum(self.rows)

    @property
    def num_examples(self) -> int:
        """N."""
        return sum(self.examples)

    @property
    def normaliser(self) -> int:
        """What R^T R is divided by: the examples, or the positions that count, of the whole data."""
        return self.num_examples if self.positions is None else sum(self.positions)


@dataclass(frozen=True, eq=False)
class EmbeddedOutputs:
    """z = phi(F(theta)) on fixed inputs, flattened to `[N * M]`, batch after batch.

    A mask `[n, T]` belongs to the output tensors `[n, T, ..., C]` that start with its axes; others, such as a pooled
    output `[n, C]`, are not masked. Rows of masked positions are zero, so shapes do not depend on the mask, and no
    product depends on how much padding a batch has.

    Attributes:
        map: The model as a function of weights and a batch.
        geometry: The embedding phi.
        batches: The inputs.
        mask: Which positions count.
        per: The metric is R^T R over the number of examples ("example"), or over the number of positions of the whole
            data that count ("position"), so that a long sequence weighs more than a short one.

    Raises:
        TypeError: `mask` is neither a name nor callable.
        ValueError: `per` is neither of the two.
    """

    map: OutputMap
    geometry: Geometry
    batches: Batches
    mask: Mask = None
    per: str = "example"

    def __post_init__(self) -> None:
        """Check the options."""
        if self.per not in PER:
            raise ValueError(f"per: got {self.per!r}, expected one of {', '.join(map(repr, PER))}")
        if not (self.mask is None or isinstance(self.mask, str) or callable(self.mask)):
            raise TypeError(
                f"mask: got a {type(self.mask).__name__}, expected the name of an entry of the batch such as"
                " 'attention_mask', or a function of the batch such as lambda batch: batch['ids'] != 0"
            )

    def over(self, batches: Batches) -> EmbeddedOutputs:
        """The same on other elements of the kind that `batches` has: pieces of them, or some of them."""
        return replace(self, batches=batches)

    def renewed(self, batches: Batches) -> EmbeddedOutputs:
        """The same model, geometry and mask on the user's other inputs; nothing that belonged to the old ones stays."""
        return replace(self, batches=batches)

    def inputs(self, batch: Any) -> Any:
        """What the model gets of an element of `batches`."""
        return batch

    def embedded(self, outputs: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The rows of z `[n, M]` of one batch, from its outputs."""
        return embed(self.geometry, outputs, self.masks(outputs, batch))

    def on(self, batch: Any, note: Callable[[tuple[Tensor, ...]], object] | None = None) -> Callable[[Weights], Tensor]:
        """The function z on one batch, of named weights: dict to `[n * M]`; call it inside `map.frozen()`.

        Args:
            batch: The batch.
            note: Gets the outputs of every evaluation, if given.
        """
        dtype = self.map.space.dtype
        inputs = self.inputs(batch)

        def z(weights: Weights) -> Tensor:
            outputs = self.map.call(weights, inputs)
            if note is not None:
                note(outputs)
            return self.embedded(outputs, batch).reshape(-1).to(dtype)

        return z

    def few(self, weights: Weights, first: Any = None) -> Any:
        """A few examples of the first batch, or all of it where the model does not take so few; inside `frozen()`."""
        first = self.batches.first() if first is None else first
        small = head(first, FEW)
        if small is first:
            return first
        try:
            self.on(small)(weights)
        except Exception:  # whatever it says: the whole batch is looked at instead, and its own errors are raised
            return first
        return small

    def masks(self, outputs: tuple[Tensor, ...], batch: Any) -> tuple[Tensor | None, ...]:
        """For each output tensor which positions count, `[n, ...]`, or None where all do.

        Raises:
            ValueError: The batch has no such entry, or the mask fits none of the outputs.
            TypeError: The mask is no tensor.
        """
        if self.mask is None:
            return (None,) * len(outputs)
        mask = self.mask_of(batch)
        chosen = mask != 0
        fits = [mask.dim() < f.dim() and f.shape[: mask.dim()] == mask.shape for f in outputs]
        if mask.dim() < 2 or not any(fits):
            shapes = " and ".join(str(list(f.shape)) for f in outputs)
            raise ValueError(
                f"mask: has shape {list(mask.shape)} and the outputs {shapes}; expected the examples and positions of"
                " at least one output [n, T, ..., C], such as [n, T]; pass mask=lambda batch: ... that gives them"
            )
        return tuple(chosen.to(f.device) if fit else None for f, fit in zip(outputs, fits, strict=True))

    def outputs(self, theta: Tensor) -> Iterator[tuple[Any, tuple[Tensor, ...]]]:
        """Every batch with the outputs at theta.

        Raises:
            OutputError: A batch is empty, or outputs are not finite.
        """
        for index, batch in enumerate(self.batches):
            outputs = self.map(theta, self.inputs(batch))
            if not all(len(f) for f in outputs):
                raise OutputError(f"inputs: batch {index} holds 0 examples; expected at least one in every batch")
            if not all(bool(torch.isfinite(f).all()) for f in outputs):
                raise NotFiniteError(
                    f"outputs: NaN or infinite values in batch {index}; check the weights and the scale of the inputs"
                )
            yield batch, outputs

    def survey(self, theta: Tensor) -> Survey:
        """Count rows, examples and positions by one pass, after a look at the model's behaviour on the first batch.

        Raises:
            ValueError: See `OutputMap.check`; or a batch is empty, two passes differ, z is not finite, or the mask
                holds other values than 0 and 1 or leaves no position at all.
        """
        first = self.batches.first()
        small = head(first, FEW)
        known: tuple[Tensor, ...] | None = None
        if small is not first:
            try:
                known = self.map.check(self.inputs(small), theta, twice=False)
            except Exception:  # whatever it says: the whole batch is looked at instead, and its own errors are raised
                known = None
        if known is None:
            known = self.map.check(self.inputs(first), theta, twice=False)
        return self.counted(theta, first, known)

    def counted(self, theta: Tensor, first: Any, known: tuple[Tensor, ...]) -> Survey:
        """The survey of a model that has been looked at.

        Args:
            theta: The point.
            first: The first batch of an earlier pass.
            known: Outputs of some examples at the head of it. Where those of the pass are others, the model is looked
                at twice on these few: it is random, or its outputs depend on the rest of their batch.
        """
        rows, examples, counted, lost = [], [], [], 0
        for index, (batch, outputs) in enumerate(self.outputs(theta)):
            if index == 0 and not same_batch(first, batch):
                raise ValueError(
                    "inputs: two passes over the data gave different first batches; switch augmentation and private"
                    " randomness of the loader off, or pass list(loader) for one fixed draw"
                )
            if index == 0 and output_gap(known, tuple(f[: len(known[0])] for f in outputs)) is not None:
                self.map.check(self.inputs(head(first, len(known[0]))), theta)
            self._check_mask(batch)
            z = self.embedded(outputs, batch)
            if not bool(torch.isfinite(z).all()):
                raise OutputError(
                    f"geometry: {self.geometry} is NaN or infinite at finite outputs of batch {index} (a direction"
                    " needs outputs that are not zero); use geometry='euclidean'"
                )
            rows.append(z.numel())
            examples.append(len(z))
            masks = self.masks(outputs, batch)
            free = int(self.changes(outputs, masks).sum())
            counted.append(int(_counted(outputs, masks).sum()) if self.per == "position" else free)
            lost += z.numel() - free
        if not rows:
            raise ValueError("inputs: a second pass over the data gave no batch; pass list(inputs) or a DataLoader")
        if not sum(counted):
            raise ValueError("mask: no position of any batch counts; expected True or 1 where the outputs matter")
        return Survey(tuple(rows), tuple(examples), lost, tuple(counted) if self.per == "position" else None)

    def changes(self, outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> Tensor:
        """Dimensions along which the rows of every example can change, `[n]`; none of them at masked positions."""
        return changeable(self.geometry, outputs, masks)

    def mask_of(self, batch: Any) -> Tensor:
        """The mask of a batch as the user gave it, `[n, T]`.

        Raises:
            TypeError: It is no tensor.
        """
        inputs = self.inputs(batch)
        assert self.mask is not None
        mask = _entry(inputs, self.mask) if isinstance(self.mask, str) else self.mask(inputs)
        if not isinstance(mask, Tensor):
            raise TypeError(f"mask: gave a {type(mask).__name__}, expected a tensor [n, T] of booleans or of 0 and 1")
        return mask

    def _check_mask(self, batch: Any) -> None:
        """Refuse masks to be added to attention scores, in which 0 counts and a large negative number does not."""
        if self.mask is None:
            return
        mask = self.mask_of(batch)
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(
                "mask: holds other values than 0 and 1; expected True or 1 at positions that count. A mask of the kind"
                " that is added to attention scores needs mask=lambda batch: batch[...] == 0"
            )


def changeable(
    geometry: Geometry, outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...], most: int | None = None
) -> Tensor:
    """Dimensions along which embedded outputs can change, by example `[n]`; `most` bounds those of one position."""
    total = torch.zeros(len(outputs[0]), dtype=torch.long, device=outputs[0].device)
    for f, mask in zip(outputs, masks, strict=True):
        width = geometry.embed(f.reshape(-1, f.shape[-1])[:1]).shape[-1] - geometry.lost
        total += (width if most is None else min(width, most)) * _valid(f, mask)
    return total


def _valid(f: Tensor, mask: Tensor | None) -> Tensor:
    """Positions of an output `[n, ..., C]` that count, by example: `[n]`."""
    chosen = torch.ones_like(f[..., 0], dtype=torch.bool) if mask is None else over_entries(mask, f[..., 0])
    return chosen.expand_as(f[..., 0]).reshape(len(f), -1).sum(1)


def _counted(outputs: tuple[Tensor, ...], masks: tuple[Tensor | None, ...]) -> Tensor:
    """Positions that count in a batch by example, `[n]`: those of the mask, else those that all long outputs have.

    Raises:
        ValueError: No output has positions, or several have different ones.
    """
    for mask in masks:
        if mask is not None:
            return mask.reshape(len(mask), -1).sum(1)
    shapes = {f.shape[1:-1] for f in outputs if f.dim() > 2}
    if len(shapes) != 1:
        what = f"outputs have positions {[list(shape) for shape in sorted(shapes)]}" if shapes else "no output has any"
        raise ValueError(f"per: 'position' needs outputs [n, T, C] with one common T, but {what}; use per='example'")
    return torch.full((len(outputs[0]),), shapes.pop().numel())


def _entry(batch: Any, name: str) -> Tensor:
    """The entry of a mapping batch, of the x of `(x, y)`, or the attribute of another kind of batch.

    Raises:
        ValueError: There is none; those that there are are listed.
    """
    if isinstance(batch, Mapping):
        if name in batch:
            return batch[name]
        known = ", ".join(map(repr, batch))
        raise ValueError(f"mask: the batch has no entry {name!r}; its entries are {known}")
    if hasattr(batch, name) and not isinstance(batch, Tensor | list):
        return getattr(batch, name)
    if isinstance(batch, list | tuple) and batch:
        return _entry(batch[0], name)
    raise ValueError(
        f"mask: got {name!r}, but the batch is a {type(batch).__name__}, which has no named entries; pass a mapping, or"
        " mask=lambda batch: ... that makes the mask"
    )
