"""The root as factors: activations and output derivatives of every layer, and no differentiation per product."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey
from fipgeo.jacobian.factored.build import Builder
from fipgeo.jacobian.factored.gram import column_squares, gram_of_segments
from fipgeo.linalg import LinearOperator


class FactoredRoot(LinearOperator):
    """R = dz/dtheta `[N * M, D]`, held layer by layer in the form that is fastest and fits.

    A linear layer or a convolution is held as its rows, or as two factors (its inputs, and the derivatives by its
    outputs) with which a product costs two forward passes of the layer whatever M is. Embeddings are held as factors;
    scales, shifts, biases and every parameter that no known function uses, as rows. The whole is compared with plain
    differentiation on the first batch, and parameters that disagree become rows.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`.
        survey: Rows and examples of every batch.
        max_bytes: Most memory to hold; making it takes an eighth of that beside.
        names: Only these parameters are held, the others count as constants; none for all.

    Raises:
        ValueError: It does not fit, an output depends on other examples, or rows belong to no single example.
    """

    def __init__(
        self, function: EmbeddedOutputs, theta: Tensor, survey: Survey, *, max_bytes: float, names: Collection[str] = ()
    ) -> None:
        super().__init__((survey.num_rows, len(theta)), dtype=theta.dtype, device=theta.device)
        with function.map.frozen():
            self.segments = tuple(Builder(function, theta, survey, max_bytes, names).segments())

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(segment.num_bytes for segment in self.segments)

    @property
    def block(self) -> int:
        """Vectors that a block method best multiplies together: several where products mostly read rows."""
        return 4 if 2 * sum(segment.row_bytes for segment in self.segments) > self.num_bytes else 1

    def double(self) -> FactoredRoot:
        """The same root with products in float64, block by block; what is held stays as it is."""
        out = copy.copy(self)
        out.dtype = torch.float64
        return out

    def restricted(self, chosen: Sequence[slice]) -> FactoredRoot:
        """The columns of some parameters, given by their coordinates; nothing is copied but rows."""
        ends = list(accumulate(where.stop - where.start for where in chosen))
        places = {
            where.start: slice(end - (where.stop - where.start), end) for where, end in zip(chosen, ends, strict=True)
        }
        out = FactoredRoot.__new__(FactoredRoot)
        LinearOperator.__init__(out, (self.shape[0], ends[-1]), dtype=self.dtype, device=self.device)
        out.segments = tuple(segment.restricted(places) for segment in self.segments)
        return out

    def chosen(self, free: Tensor) -> Tensor:
        """The columns at the true entries of a mask `[D]`, as a matrix `[N * M, |free|]`."""
        return torch.cat([segment.chosen(free) for segment in self.segments])

    def gram(self, *, single: bool = False) -> Tensor:
        """K = R R^T in float64, `[N * M, N * M]`, one parameter after the other.

        Args:
            single: Whether products are taken in the precision in which R is held, in less time.
        """
        return gram_of_segments(self.segments, single=single)

    def column_squares(self) -> Tensor:
        """The diagonal of R^T R in float64, `[D]`."""
        return column_squares(self.segments, self.shape[1])

    def _apply(self, x: Tensor) -> Tensor:
        return torch.cat([segment.apply(x) for segment in self.segments], -1)

    def _adjoint(self, y: Tensor) -> Tensor:
        out = torch.empty(len(y), self.shape[1], dtype=self.dtype, device=self.device)
        parts = y.split([len(s.matrix) for s in self.segments], -1)
        for place, (segment, part) in enumerate(zip(self.segments, parts, strict=True)):
            segment.adjoint(part, out, add=place > 0)
        return out


def gram_by_parameters(
    function: EmbeddedOutputs,
    theta: Tensor,
    survey: Survey,
    max_bytes: float,
    groups: Sequence[Sequence[str]],
    *,
    single: bool = False,
) -> Tensor:
    """K as a sum over groups of parameters, whose factors are made one group after the other.

    One differentiation of all outputs a group, where `gram_by_pairs` takes one for every pair of blocks.
    """
    out = torch.zeros(survey.num_rows, survey.num_rows, dtype=torch.float64, device=theta.device)
    for names in groups:
        out += FactoredRoot(function, theta, survey, max_bytes=max_bytes, names=names).gram(single=single)
    return out
