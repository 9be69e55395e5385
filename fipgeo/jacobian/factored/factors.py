"""Blocks of the root for one parameter: rows as they are, or two factors whose products they are.

A parameter W that acts on an activation x at T positions of an example has the rows

    R[n, m] = sum_t b[n, m, t] (x) x[n, t]        b[n, m, t] = d z[n, m] / d y[n, t],   y = W x

so `R v` is one product `v x` and one contraction with b, and `R^T u` the reverse: as many flops as two forward passes
of the layer, whatever M is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fipgeo.jacobian.gram import STRIP

WIDE = 128
"""From this many outputs of a linear layer on, the rows of every embedded output are a matrix product of their own."""

PART_BYTES = 2**25
"""Rows are converted to another precision in blocks of about this size."""


class Block(ABC):
    """The columns of the root that belong to one parameter, for n examples of M rows each."""

    @abstractmethod
    def apply(self, v: Tensor) -> Tensor:
        """R v: tangents `[k, *shape]` to `[n, M, k]`."""

    @abstractmethod
    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u: `[n, M, k]` to `[k, *shape]`."""

    def write_adjoint(self, u: Tensor, out: Tensor, *, add: bool) -> None:
        """R^T u into `out` `[k, *shape]`, or added to it."""
        found = self.adjoint(u)
        out.add_(found) if add else out.copy_(found)

    @abstractmethod
    def rows(self, index: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """R for some entries along the first axis of the parameter, or for all, dense, `[n * M, columns]`.

        Args:
            index: The entries; None for `entries()`.
            out: Contiguous memory of that shape to write to.
        """

    @abstractmethod
    def entries(self) -> Tensor:
        """The entries along the first axis for which R is not zero."""

    def squares(self) -> Tensor | None:
        """Sums of squares of R over its rows, `[*shape]` in float64, where cheaper than by rows; None otherwise."""
        return None

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """What is held."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> Block:
        """The same block in another precision."""


@dataclass(frozen=True)
class LinearBlock(Block):
    """`y = x W^T`: x `[n, T, i]`, b `[n, M, T, o]`, W `[o, i]`, or `[i, o]` if transposed."""

    x: Tensor
    b: Tensor
    transposed: bool = False

    def apply(self, v: Tensor) -> Tensor:
        """R v."""
        n, t, i = self.x.shape
        x = self.x.reshape(1, n * t, i).expand(len(v), -1, -1)
        y = torch.bmm(x, v if self.transposed else v.mT).view(len(v), n, -1)  # [k, n, T o]
        return torch.bmm(self.b.flatten(2), y.permute(1, 2, 0))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        i, o = self.x.shape[-1], self.b.shape[-1]
        out = u.new_empty(u.shape[-1], *((i, o) if self.transposed else (o, i)))
        self.write_adjoint(u, out, add=False)
        return out

    def write_adjoint(self, u: Tensor, out: Tensor, *, add: bool) -> None:
        """R^T u into `out`, one product a vector and no copy of the result."""
        (n, t, i), k = self.x.shape, u.shape[-1]
        y = torch.bmm(u.transpose(1, 2), self.b.flatten(2)).view(n, k, t, -1)
        y = y.permute(1, 0, 2, 3).reshape(k, n * t, -1) if t > 1 else y[:, :, 0].transpose(0, 1)  # [k, n T, o]
        x = self.x.reshape(1, n * t, i).expand(k, -1, -1)
        left, right = (x, y) if self.transposed else (y, x)
        out.baddbmm_(left.mT, right, beta=1 if add else 0)

    def rows(self, index: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """R for some outputs, or inputs if transposed."""
        x = _picked(self.x, index) if self.transposed else self.x
        b = self.b if self.transposed else _picked(self.b, index)
        (n, m, _, o), i = b.shape, x.shape[-1]
        out = b.new_empty(n * m, i * o) if out is None else out
        if self.transposed or o >= WIDE:
            found = out.view(n, m, *((i, o) if self.transposed else (o, i)))
            for j in range(m):  # straight from b, with no copy that has the positions last
                left, right = (x, b[:, j]) if self.transposed else (b[:, j], x)
                found[:, j].baddbmm_(left.mT, right, beta=0)
        else:
            torch.bmm(b.transpose(2, 3).flatten(1, 2), x, out=out.view(n, m * o, i))
        return out

    def add_inner(self, out: Tensor, shift: float = 0.0, *, single: bool = False) -> bool:
        """Add the upper triangle of R R^T by an entrywise product: `(b b^T) o (x x^T + shift)`.

        Args:
            out: What to add to, `[n * M, n * M]`; below the diagonal it is left undefined.
            shift: One adds what the bias of the same layer contributes.
            single: Whether products are taken in the precision in which R is held, rather than in float64.

        Returns:
            Whether anything was added: only for one position an example.
        """
        if self.x.shape[1] != 1:
            return False
        x, b = self.x[:, 0], self.b.flatten(0, 1)[:, 0]
        x, b = (x, b) if single else (x.double(), b.double())
        m, step = self.b.shape[1], max(STRIP // self.b.shape[1], 1)
        for here in range(0, len(x), step):
            some = x[here : here + step]
            across = (some @ x[here:].T + shift).repeat_interleave(m, 1)
            found = (b[here * m : (here + step) * m] @ b[here * m :].T).view(len(some), m, -1)
            out[here * m : (here + step) * m, here * m :] += found.mul_(across[:, None]).flatten(0, 1)
        return True

    def squares(self) -> Tensor | None:
        """`sum_n x[n, i]^2 sum_m b[n, m, o]^2`, for one position an example."""
        if self.x.shape[1] != 1:
            return None
        found = self.b[:, :, 0].double().square().sum(1).T @ self.x[:, 0].double().square()
        return found.T if self.transposed else found

    def entries(self) -> Tensor:
        """All."""
        return torch.arange(self.x.shape[-1] if self.transposed else self.b.shape[-1], device=self.b.device)

    def tensors(self) -> list[Tensor]:
        """X and b."""
        return [self.x, self.b]

    def to(self, dtype: torch.dtype) -> LinearBlock:
        """The same block in another precision."""
        return LinearBlock(self.x.to(dtype), self.b.to(dtype), self.transposed)


@dataclass(frozen=True)
class ConvBlock(Block):
    """A convolution: x `[n * q, i, *in]`, b `[n, M, q, o, *out]`, W `[o, i / groups, *kernel]`."""

    x: Tensor
    b: Tensor
    kernel: tuple[int, ...]
    options: Mapping[str, Any]

    @property
    def _groups(self) -> int:
        return self.options["groups"]

    def apply(self, v: Tensor) -> Tensor:
        """R v."""
        if self._groups > 1 and len(v) > 1:
            return torch.cat([self.apply(one[None]) for one in v], -1)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        y = conv(self.x, v.flatten(0, 1), None, **self.options)  # [n q, k o, *out]
        n, q = len(self.b), self.b.shape[2]
        y = y.view(n, q, len(v), -1).transpose(1, 2).reshape(n, len(v), -1)
        return torch.bmm(self.b.flatten(2), y.transpose(1, 2))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        if self._groups > 1 and u.shape[-1] > 1:
            return torch.cat([self.adjoint(u[..., j : j + 1]) for j in range(u.shape[-1])])
        n, q, o = len(self.b), self.b.shape[2], self.b.shape[3]
        k = u.shape[-1]
        y = torch.bmm(u.transpose(1, 2), self.b.flatten(2)).view(n, k, q, o, *self.b.shape[4:])
        y = y.transpose(1, 2).reshape(n * q, k * o, *self.b.shape[4:])
        return self._weight_gradient(y, self.x, k * o).view(k, o, -1, *self.kernel)

    def _weight_gradient(self, y: Tensor, x: Tensor, outputs: int) -> Tensor:
        space = [0] * len(self.kernel)
        weight = x.new_empty(1).expand(outputs, x.shape[1] // self._groups, *self.kernel)
        a = self.options
        args = (None, a["stride"], a["padding"], a["dilation"], False, space, a["groups"], (False, True, False))
        return torch.ops.aten.convolution_backward(y, x, weight, *args)[1]

    def rows(self, index: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """R for some output channels."""
        patches = self.patches()  # [n, q, groups, i k, S]
        n, q, g, across, size = patches.shape
        b = self.b if index is None or len(index) == self.b.shape[3] else self.b.index_select(3, index)
        b = b.flatten(4)
        m, o = b.shape[1], b.shape[3]
        out = b.new_empty(n * m, o * across) if out is None else out
        if g == 1:
            left = b.permute(0, 1, 3, 2, 4).reshape(n, -1, q * size)
            right = patches[:, :, 0].transpose(1, 2).reshape(n, -1, q * size)
            torch.bmm(left, right.transpose(1, 2), out=out.view(n, m * o, across))
        else:
            group = (self.entries() if index is None else index) // (self.b.shape[3] // g)
            found = torch.einsum("nmqos,nqois->nmoi", b, patches[:, :, group])
            out.view(found.shape).copy_(found)
        return out

    def patches(self) -> Tensor:
        """Every window that the kernel meets, `[n, q, groups, i / groups * kernel, positions]`."""
        a = self.options
        x = F.pad(self.x, [pad for size in reversed(a["padding"]) for pad in (size, size)])
        for axis, size in enumerate(self.kernel):
            span = a["dilation"][axis] * (size - 1) + 1
            x = x.unfold(2 + axis, span, a["stride"][axis])[..., :: a["dilation"][axis]]
        n, q, space = len(self.b), self.b.shape[2], len(self.kernel)
        x = x.permute(0, 1, *range(2 + space, 2 + 2 * space), *range(2, 2 + space))
        return x.reshape(n, q, self._groups, -1, x.shape[-space:].numel())

    def entries(self) -> Tensor:
        """All output channels."""
        return torch.arange(self.b.shape[3], device=self.b.device)

    def tensors(self) -> list[Tensor]:
        """X and b."""
        return [self.x, self.b]

    def to(self, dtype: torch.dtype) -> ConvBlock:
        """The same block in another precision."""
        return ConvBlock(self.x.to(dtype), self.b.to(dtype), self.kernel, self.options)


@dataclass(frozen=True)
class EmbeddingBlock(Block):
    """A table look-up: ids `[n, T]`, b `[n, M, T, d]` (zero at padding), W `[V, d]`."""

    ids: Tensor
    b: Tensor
    size: int

    def apply(self, v: Tensor) -> Tensor:
        """R v."""
        y = v[:, self.ids].permute(1, 2, 3, 0)  # [n, T, d, k]
        return torch.bmm(self.b.flatten(2), y.reshape(len(self.b), -1, len(v)))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        k, d = u.shape[-1], self.b.shape[-1]
        y = torch.bmm(u.transpose(1, 2), self.b.flatten(2)).view(len(self.b), k, -1, d)
        out = y.new_zeros(k, self.size, d)
        return out.index_add_(1, self.ids.flatten(), y.transpose(0, 1).reshape(k, -1, d))

    def rows(self, index: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """R for some of the table's entries, in ascending order."""
        index = self.entries() if index is None else index
        place = torch.searchsorted(index, self.ids.contiguous()).clamp(max=len(index) - 1)
        hit = index[place] == self.ids
        found = self.b.new_zeros(*self.b.shape[:2], len(index), self.b.shape[-1])
        where = place[:, None, :, None].expand(*self.b.shape)
        found.scatter_add_(2, where, self.b * hit[:, None, :, None])
        return found.flatten(2).flatten(0, 1) if out is None else out.copy_(found.flatten(2).flatten(0, 1))

    def entries(self) -> Tensor:
        """Those that occur."""
        return torch.unique(self.ids)

    def tensors(self) -> list[Tensor]:
        """The ids and b."""
        return [self.ids, self.b]

    def to(self, dtype: torch.dtype) -> EmbeddingBlock:
        """The same block in another precision."""
        return EmbeddingBlock(self.ids, self.b.to(dtype), self.size)


@dataclass(frozen=True)
class RowsBlock(Block):
    """Rows that are held as they are: `[n * M, *shape]`; products convert them part by part where need be."""

    matrix: Tensor
    examples: int

    def apply(self, v: Tensor) -> Tensor:
        """R v."""
        out, right = v.new_empty(len(self.matrix), len(v)), v.flatten(1).T
        for place, rows in self._parts(v.dtype):
            torch.mm(rows, right, out=out[place])
        return out.view(self.examples, -1, len(v))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        out = u.new_empty(u.shape[-1], *self.matrix.shape[1:])
        self.write_adjoint(u, out, add=False)
        return out

    def write_adjoint(self, u: Tensor, out: Tensor, *, add: bool) -> None:
        """R^T u into `out`, with no copy of the result."""
        left, target = u.flatten(0, 1).T, out.flatten(1)
        for place, rows in self._parts(u.dtype):
            target.addmm_(left[:, place], rows, beta=1 if add or place.start else 0)

    def rows(self, index: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """R for some entries along the first axis."""
        whole = index is None or self.matrix.dim() == 1
        found = (self.matrix if whole else self.matrix[:, index]).flatten(1)
        return found if out is None else out.copy_(found)

    def entries(self) -> Tensor:
        """All."""
        return torch.arange(self.matrix.shape[1], device=self.matrix.device)

    def tensors(self) -> list[Tensor]:
        """The rows."""
        return [self.matrix]

    def to(self, dtype: torch.dtype) -> RowsBlock:
        """The block itself: products are taken in the precision of the vectors."""
        del dtype
        return self

    def _parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
        """Rows in a precision: all at once, or in blocks where they are converted."""
        rows = self.matrix.flatten(1)
        step = len(rows) if dtype == rows.dtype else max(1, PART_BYTES // (dtype.itemsize * max(rows.shape[1], 1)))
        for start in range(0, len(rows), max(step, 1)):
            yield slice(start, start + step), rows[start : start + step].to(dtype)


def _picked(t: Tensor, index: Tensor | None) -> Tensor:
    """Entries along the last axis, as a view where they are neighbours."""
    if index is None or len(index) == t.shape[-1]:
        return t
    first, last = int(index[0]), int(index[-1])
    return t[..., first : last + 1] if last - first + 1 == len(index) else t[..., index]
