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

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """R on some of the output features only, dense, `[n * M, columns]`."""

    @property
    @abstractmethod
    def features(self) -> int:
        """How many output features there are to cut `rows` along."""

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
        n, t, _ = self.x.shape
        v = v.permute(2, 0, 1) if self.transposed else v.transpose(0, 1)  # [o, k, i]
        y = self.x.reshape(n * t, -1) @ v.reshape(-1, self.x.shape[-1]).T
        return torch.bmm(self.b.flatten(2), y.view(n, -1, v.shape[1]))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        n, t, i = self.x.shape
        y = torch.bmm(self.b.flatten(2).transpose(1, 2), u).view(n * t, -1)  # [n T, o k]
        w = (y.T @ self.x.reshape(n * t, i)).view(-1, u.shape[-1], i)
        return w.permute(1, 2, 0) if self.transposed else w.transpose(0, 1)

    def rows(self, start: int, stop: int) -> Tensor:
        """R on the output features from start to stop."""
        b = self.b[..., start:stop].flatten(0, 1)  # [n M, T, o]
        n, t, i = self.x.shape
        if t == 1:
            x = self.x.expand(n, self.b.shape[1], i).reshape(-1, 1, i)
            return (b.reshape(len(b), -1, 1) * x).flatten(1)
        left = b.view(n, -1, t, b.shape[-1]).transpose(2, 3).reshape(n, -1, t)  # [n, M o, T]
        return torch.bmm(left, self.x).reshape(len(b), -1)

    def inner(self) -> Tensor | None:
        """R R^T by an entrywise product, for one position an example: `(x x^T) o (b b^T)`; None otherwise."""
        if self.x.shape[1] != 1:
            return None
        x, b = self.x[:, 0], self.b.flatten(0, 1)[:, 0]
        m = self.b.shape[1]
        outer = (b @ b.T).view(len(x), m, len(x), m) * (x @ x.T)[:, None, :, None]
        return outer.view(len(b), len(b))

    @property
    def features(self) -> int:
        """Outputs o."""
        return self.b.shape[-1]

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

    def rows(self, start: int, stop: int) -> Tensor:
        """R on the output channels from start to stop."""
        patches = self.patches()  # [n, q, groups, i k, S]
        n, q, g, _, size = patches.shape
        b = self.b[:, :, :, start:stop].flatten(4)  # [n, M, q, o, S]
        m, width = b.shape[1], self.b.shape[3] // g
        if g == 1:
            left = b.permute(0, 1, 3, 2, 4).reshape(n, -1, q * size)
            right = patches[:, :, 0].transpose(1, 2).reshape(n, -1, q * size)
            return torch.bmm(left, right.transpose(1, 2)).reshape(n * m, -1)
        group = torch.arange(start, stop, device=b.device) // width
        return torch.einsum("nmqos,nqois->nmoi", b, patches[:, :, group]).reshape(n * m, -1)

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

    @property
    def features(self) -> int:
        """Outputs o."""
        return self.b.shape[3]

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
    entries: int

    def apply(self, v: Tensor) -> Tensor:
        """R v."""
        y = v[:, self.ids].permute(1, 2, 3, 0)  # [n, T, d, k]
        return torch.bmm(self.b.flatten(2), y.reshape(len(self.b), -1, len(v)))

    def adjoint(self, u: Tensor) -> Tensor:
        """R^T u."""
        k, d = u.shape[-1], self.b.shape[-1]
        y = torch.bmm(u.transpose(1, 2), self.b.flatten(2)).view(len(self.b), k, -1, d)
        out = y.new_zeros(k, self.entries, d)
        return out.index_add_(1, self.ids.flatten(), y.transpose(0, 1).reshape(k, -1, d))

    def rows(self, start: int, stop: int) -> Tensor:
        """R on the embedding features from start to stop, for the entries that occur."""
        used, index = torch.unique(self.ids, return_inverse=True)
        b = self.b[..., start:stop]
        out = b.new_zeros(*b.shape[:2], len(used), b.shape[-1])
        where = index[:, None, :, None].expand(*b.shape)
        return out.scatter_add_(2, where, b).flatten(0, 1).flatten(1)

    @property
    def features(self) -> int:
        """The width d."""
        return self.b.shape[-1]

    def tensors(self) -> list[Tensor]:
        """The ids and b."""
        return [self.ids, self.b]

    def to(self, dtype: torch.dtype) -> EmbeddingBlock:
        """The same block in another precision."""
        return EmbeddingBlock(self.ids, self.b.to(dtype), self.entries)
