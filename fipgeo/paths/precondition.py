r"""A block-diagonal stand-in for the metric, made of what the layers see: one block for every output feature.

    P = diag over output features o of   b_o (G_SS + lambda I),      S the free weights of o

G is the second moment of the inputs of o's layer (`layer_grams`) and b_o the mean square of the derivative of z by the
feature, from a random estimate of the metric's diagonal. Weights outside linear maps have the diagonal itself. These
are the Kronecker factors of Martens & Grosse (Optimizing neural networks with Kronecker-factored approximate curvature,
2015) with a diagonal second factor, inverted exactly on the support of every row of weights.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.layers import LayerGram, layer_grams
from fipgeo.paths.objectives.scores import metric_diagonal

MAX_NUMBERS = 2**26
"""Most numbers in the inverses of a layer; beyond, the layer gets the inverse of its diagonal."""


class _Block(NamedTuple):
    """The weights of one group of a layer.

    Attributes:
        places: Places of the free weights in the flat vector, `[out, s]`; D where a row has fewer than s.
        inverse: `[out, s, s]`, zero in the rows and columns beyond.
    """

    places: Tensor
    inverse: Tensor


class LayerPreconditioner:
    """x to P^{-1} x on stacks `[k, D]`, zero off the free weights; symmetric positive definite on them.

    Args:
        kept: The protected inputs; with taps, the metric of outputs and taps.
        position: Where the layers' inputs are taken.
        free: Boolean `[D]`.
        generator: Source of random output directions.
        damping: lambda as a multiple of the mean eigenvalue of G; and the least diagonal entry, over the mean one.
        samples: Random output directions for b.
        batch_size: Inputs that share one.

    Attributes:
        cost: Model evaluations that making it took.
    """

    def __init__(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        generator: torch.Generator,
        *,
        damping: float = 0.1,
        samples: int = 32,
        batch_size: int = 8,
    ) -> None:
        diagonal = metric_diagonal(kept, position, samples, batch_size, generator)
        grams = layer_grams(kept, position, generator=generator)
        self.cost = 3.0 * samples * batch_size + kept.num_examples
        self.free, self.dim = free, len(free)
        self.blocks: list[_Block] = []
        slices = kept.function.map.space.slices()
        places = torch.arange(self.dim, device=free.device)
        rest = free.clone()
        for name, gram in grams.items():
            where = slices[name]
            shape = kept.function.map.space.shapes[name]
            index = gram.rows(places[where].reshape(shape))
            for group, own in enumerate(index):
                block = _block(own, free, diagonal, gram, group, damping)
                if block is not None:
                    self.blocks.append(block)
                    rest[own] = False
        mean = diagonal[rest].mean() if bool(rest.any()) else torch.ones(())
        floor = damping * float(mean) or 1.0
        self.diagonal = torch.where(rest, 1 / (diagonal + floor), torch.zeros_like(diagonal))

    def __call__(self, x: Tensor) -> Tensor:
        """P^{-1} x, `[k, D]` or `[D]`."""
        out = x * self.diagonal
        if not self.blocks:
            return out
        padded = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
        out = torch.cat([out, torch.zeros_like(x[..., :1])], -1)
        for block in self.blocks:
            found = torch.einsum("ost,...ot->...os", block.inverse.to(x.dtype), padded[..., block.places])
            out[..., block.places] = found
        return out[..., :-1]


def _block(
    places: Tensor, free: Tensor, diagonal: Tensor, gram: LayerGram, group: int, damping: float
) -> _Block | None:
    """The inverse blocks of one group, for places `[out, in]` in the flat vector; None without a free weight."""
    g = gram.gram[group]
    chosen = free[places]
    width = int(chosen.sum(1).max())
    mean = float(g.diagonal().mean())
    if width == 0 or mean == 0 or len(places) * width**2 > MAX_NUMBERS:
        return None
    order = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]
    live = chosen.gather(1, order)
    matrix = g[order[:, :, None], order[:, None, :]] * (live[:, :, None] & live[:, None, :])
    matrix.diagonal(dim1=1, dim2=2).add_(torch.where(live, damping * mean, torch.ones_like(matrix[:, :, 0])))
    seen = torch.where(chosen, diagonal[places].double(), 0).sum(1) / torch.where(chosen, g.diagonal(), 0).sum(1)
    seen = torch.nan_to_num(seen, nan=0.0, posinf=0.0)
    seen = seen.clamp(min=1e-3 * float(seen.mean()) or 1.0)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix)) / seen[:, None, None]
    inverse = inverse * (live[:, :, None] & live[:, None, :])
    index = torch.where(live, places.gather(1, order), len(free))
    return _Block(index, inverse.to(diagonal.dtype))
