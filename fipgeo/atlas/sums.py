"""The weighted sums of all tensors' vectors as one linear map of the coefficients, with its derivatives.

Axis letters: n vectors, K parts of a block, r coefficients.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from fipgeo.atlas.blocks import Block, FactoredBlock

SMALL = 1024
"""Numbers of a tensor up to which those of equal size are summed together."""


def together(blocks: Sequence[Block], keys: Sequence[Hashable]) -> list[list[int]]:
    """Places of blocks that are summed together: small ones of the same key and size, and all others alone."""
    groups: dict[Hashable, list[int]] = {}
    for i, (block, key) in enumerate(zip(blocks, keys, strict=True)):
        small = block.shape.numel() <= SMALL and not isinstance(block, FactoredBlock)
        groups.setdefault((key, block.size, block.shape.numel()) if small else i, []).append(i)
    return list(groups.values())


@dataclass(frozen=True, eq=False)
class Sums:
    """The weighted sums of all blocks, as one linear map from flat coefficients `[..., r]` to tensors.

    Attributes:
        blocks: The blocks.
        groups: Places of every block's tensors among the sums.
        index: Places of all blocks' weights among the coefficients, one block after the other.
        sizes: How many of them each block has.
        shapes: Of the tensors.
        bases: What is added to each sum; None for nothing.
        dtypes: Of the sums of each block.
    """

    blocks: Sequence[Block]
    groups: Sequence[Sequence[int]]
    index: Tensor
    sizes: Sequence[int]
    shapes: Sequence[torch.Size]
    bases: Sequence[Tensor] | None
    dtypes: Sequence[torch.dtype]

    def compose(self, flat: Tensor) -> tuple[Tensor, ...]:
        """The sums `[..., *shape]`."""
        pieces, lead = flat.index_select(-1, self.index).split(self.sizes, -1), flat.shape[:-1]
        out: list[Any] = [None] * len(self.shapes)
        for block, group, dtype, weights in zip(self.blocks, self.groups, self.dtypes, pieces, strict=True):
            base = None if self.bases is None else _joined([self.bases[i] for i in group])
            if lead or base is None:
                whole = block.compose(weights.reshape(lead + block.size), base)
            else:
                whole = block.compose_one(weights, base)
            whole = whole if whole.dtype == dtype else whole.to(dtype)
            if len(group) == 1:
                out[group[0]] = whole
                continue
            for i, part in zip(group, whole.view((*lead, len(group), -1)).unbind(-2), strict=True):
                shape = self.shapes[i]
                out[i] = part.view(lead + shape) if len(shape) != 1 else part
        return tuple(out)

    def project(self, grads: Sequence[Tensor | None], size: int, dtype: torch.dtype) -> Tensor:
        """The adjoint, `[..., r]`; None stands for zero."""
        given = zip(grads, self.shapes, strict=True)
        lead = next((g.shape[: g.dim() - len(shape)] for g, shape in given if g is not None), torch.Size())
        like = self.index.new_zeros((), dtype=dtype)
        met: list[Tensor] = []
        for block, group, count in zip(self.blocks, self.groups, self.sizes, strict=True):
            some = [grads[i] for i in group]
            if all(g is None for g in some):
                met.append(like.new_zeros((*lead, count)))
                continue
            pairs = zip(group, some, strict=True)
            known = [like.new_zeros(lead + self.shapes[i]) if g is None else g for i, g in pairs]
            gradient = _joined(known, lead).to(dtype)
            met.append(block.project(gradient).flatten(-2) if lead else block.project_one(gradient))
        out = like.new_zeros((*lead, size))
        return out.index_add_(-1, self.index, torch.cat(met, -1)) if met else out


def _joined(tensors: Sequence[Tensor], lead: Sequence[int] = ()) -> Tensor:
    """Tensors of a block, flat, one after the other behind the leading axes; one alone stays as it is."""
    return tensors[0] if len(tensors) == 1 else torch.cat([t.reshape(*lead, -1) for t in tensors], -1)


class Compose(Function):
    """All sums in one node of the graph, linear in the coefficients.

    Nothing of the size of the vectors is kept for the backward pass, which takes inner products with them. Works under
    torch.func's jvp, vjp and vmap over the coefficients, and for derivatives of any order.
    """

    @staticmethod
    def forward(flat: Tensor, sums: Sums) -> tuple[Tensor, ...]:
        """`[r]` to tensors `[*shape]`."""
        return sums.compose(flat)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember where the vectors are."""
        flat, ctx.sums = inputs
        ctx.size, ctx.wide = flat.shape[-1], flat.dtype
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Inner products of the gradients with the vectors."""
        return Project.apply(ctx.sums, ctx.size, ctx.wide, *grads), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """The sums for the tangent of the coefficients, without what is added to them."""
        return Compose.apply(tangents[0], replace(ctx.sums, bases=None))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Stacks of coefficients are one product."""
        del info
        flat, sums = args
        return Compose.apply(flat.movedim(in_dims[0], 0), sums), (0,) * len(sums.shapes)


class Project(Function):
    """Inner products of tensors with all blocks' vectors, `[r]`: the adjoint of `Compose`."""

    @staticmethod
    def forward(sums: Sums, size: int, dtype: torch.dtype, *grads: Tensor | None) -> Tensor:
        """Tensors `[*shape]` to `[r]`."""
        return sums.project(grads, size, dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        """Remember where the vectors are, and which tensors there were."""
        ctx.sums, ctx.size, ctx.wide, *grads = inputs
        ctx.given = [g is not None for g in grads]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """The sums again."""
        found = Compose.apply(grads[0], replace(ctx.sums, bases=None))
        return None, None, None, *(t if given else None for t, given in zip(found, ctx.given, strict=True))

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """Inner products of the tangents."""
        return Project.apply(ctx.sums, ctx.size, ctx.wide, *tangents[3:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        """Stacks of tensors are one product."""
        sums, size, dtype, *grads = args
        moved = [
            g if g is None else g.expand(info.batch_size, *g.shape) if dim is None else g.movedim(dim, 0)
            for g, dim in zip(grads, in_dims[3:], strict=True)
        ]
        return Project.apply(sums, size, dtype, *moved), 0
