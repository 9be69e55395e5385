"""Blocks of the root for one parameter: rows as they are, or two factors whose products they are.

A parameter W that acts on an activation x at T positions of an example has the rows

    R[n, m] = sum_t b[n, m, t] (x) x[n, t]        b[n, m, t] = d z[n, m] / d y[n, t],   y = W x

so `R v` is one product `v x` and one contraction with b, and `R^T u` the reverse: as many flops as two forward passes
of the layer, whatever M is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    def rows(self, index: Tensor) -> Tensor:
        """R for some entries along the first axis of the parameter, dense, `[n * M, columns]`."""

    @abstractmethod
    def entries(self) -> Tensor:
        """The entries along the first axis for which R is not zero."""

    def inner(self) -> Tensor | None:
        """R R^T, `[n * M, n * M]`, where it is cheaper than by rows; None otherwise."""
        return None

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

    def rows(self, index: Tensor) -> Tensor:
        """R for some outputs, or inputs if transposed."""
        x = self.x[..., index] if self.transposed else self.x
        b = self.b if self.transposed else self.b[..., index]
        if self.transposed:
            return torch.einsum("nti,nmto->nmio", x, b).flatten(2).flatten(0, 1)
        left = b.transpose(2, 3).flatten(1, 2)  # [n, M o, T]
        return torch.bmm(left, x).view(b.shape[0] * b.shape[1], -1)

    def inner(self, shift: float = 0.0) -> Tensor | None:
        """R R^T by an entrywise product, for one position an example: `(b b^T) o (x x^T + shift)`.

        A shift of one adds what the bias of the same layer contributes.
        """
        if self.x.shape[1] != 1:
            return None
        x, b = self.x[:, 0], self.b.flatten(0, 1)[:, 0]
        m = self.b.shape[1]
        out = (b @ b.T).view(len(x), m, len(x), m)
        out *= (x @ x.T + shift)[:, None, :, None]
        return out.view(len(b), len(b))

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

    def rows(self, index: Tensor) -> Tensor:
        """R for some output channels."""
        patches = self.patches()  # [n, q, groups, i k, S]
        n, q, g, _, size = patches.shape
        b = self.b.index_select(3, index).flatten(4) if len(index) < self.b.shape[3] else self.b.flatten(4)
        m, width = b.shape[1], self.b.shape[3] // g
        if g == 1:
            left = b.permute(0, 1, 3, 2, 4).reshape(n, -1, q * size)
            right = patches[:, :, 0].transpose(1, 2).reshape(n, -1, q * size)
            return torch.bmm(left, right.transpose(1, 2)).reshape(n * m, -1)
        return torch.einsum("nmqos,nqois->nmoi", b, patches[:, :, index // width]).reshape(n * m, -1)

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

    def rows(self, index: Tensor) -> Tensor:
        """R for some of the table's entries, in ascending order."""
        place = torch.searchsorted(index, self.ids.contiguous()).clamp(max=len(index) - 1)
        hit = index[place] == self.ids
        out = self.b.new_zeros(*self.b.shape[:2], len(index), self.b.shape[-1])
        where = place[:, None, :, None].expand(*self.b.shape)
        return out.scatter_add_(2, where, self.b * hit[:, None, :, None]).flatten(2).flatten(0, 1)

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
    """Rows that are held as they are: `[n * M, *shape]`."""

    matrix: Tensor
    examples: int

    def apply(self, v: Tensor) -> Tensor:
        """R v."""
        return (self.matrix.flatten(1) @ v.flatten(1).T).view(self.examples, -1, len(v))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        return (u.flatten(0, 1).T @ self.matrix.flatten(1)).view(-1, *self.matrix.shape[1:])

    def rows(self, index: Tensor) -> Tensor:
        """R for some entries along the first axis."""
        return (self.matrix[:, index] if self.matrix.dim() > 1 else self.matrix).flatten(1)

    def entries(self) -> Tensor:
        """All."""
        return torch.arange(self.matrix.shape[1], device=self.matrix.device)

    def tensors(self) -> list[Tensor]:
        """The rows."""
        return [self.matrix]

    def to(self, dtype: torch.dtype) -> RowsBlock:
        """The same block in another precision."""
        return RowsBlock(self.matrix.to(dtype), self.examples)
