"""Products in float64 with operators that live in a lower precision."""

import torch
from torch import Tensor

from fipgeo.linalg.nodes import Dense, Diagonal, Gram, Identity, Stack
from fipgeo.linalg.operator import Adjoint, LinearOperator, Product, Scaled, Sum

_BLOCK_NUMBERS = 2**22  # entries of a matrix that are held in float64 at a time


class WideDense(LinearOperator):
    """A matrix in low precision whose products are made in float64, block by block, without a float64 copy.

    Args:
        dense: the matrix, with its declarations.
    """

    def __init__(self, dense: Dense) -> None:
        kind = {"symmetric": dense.symmetric, "psd": dense.psd}
        super().__init__(dense.shape, dtype=torch.float64, device=dense.device, **kind)
        self.matrix = dense.matrix
        m, n = self.shape
        self.by_columns = n >= m
        self.step = max(1, _BLOCK_NUMBERS // max(1, min(m, n)))

    def _product(self, x: Tensor, matrix: Tensor, by_columns: bool) -> Tensor:
        """`x A^T` for A `[m, n]`, in blocks of columns or of rows."""
        m, n = matrix.shape
        out = x.new_zeros(len(x), m)
        for start in range(0, n if by_columns else m, self.step):
            part = slice(start, start + self.step)
            if by_columns:
                out.addmm_(x[:, part], matrix[:, part].to(x.dtype).T)
            else:
                out[:, part] = x @ matrix[part].to(x.dtype).T
        return out

    def _apply(self, x: Tensor) -> Tensor:
        return self._product(x, self.matrix, self.by_columns)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._product(y, self.matrix.T, not self.by_columns)


class Cast(LinearOperator):
    """An operator in low precision on float64 vectors: vectors are rounded at every call.

    Args:
        operator: A.
    """

    def __init__(self, operator: LinearOperator) -> None:
        kind = {"symmetric": operator.symmetric, "psd": operator.psd}
        super().__init__(operator.shape, dtype=torch.float64, device=operator.device, **kind)
        self.operator = operator

    def _apply(self, x: Tensor) -> Tensor:
        return self.operator(x.to(self.operator.dtype)).to(x.dtype)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator.adjoint(y.to(self.operator.dtype)).to(y.dtype)

    def _normal(self, x: Tensor) -> Tensor:
        return self.operator.normal(x.to(self.operator.dtype)).to(x.dtype)


def doubled(operator: LinearOperator) -> LinearOperator | None:
    """The same map with products in float64, or None where the operator has no such products.

    An operator of one's own takes part by a method `double() -> LinearOperator | None`.
    """
    if operator.dtype == torch.float64:
        return operator
    if callable(own := getattr(operator, "double", None)):
        found = own()
        return found if isinstance(found, LinearOperator) else None
    if isinstance(operator, Dense):
        return WideDense(operator)
    if isinstance(operator, Diagonal):
        return Diagonal(operator.entries.double())
    if isinstance(operator, Identity):
        return Identity(operator.shape[0], dtype=torch.float64, device=operator.device)
    if isinstance(operator, Product):
        parts, build = (operator.left, operator.right), Product
    elif isinstance(operator, Sum):
        parts, build = operator.terms, Sum
    elif isinstance(operator, Stack):
        parts, build = operator.blocks, lambda *blocks: Stack(blocks)
    elif isinstance(operator, Gram):
        scale = operator.scale
        parts, build = (operator.root,), lambda root: Gram(root, scale)
    elif isinstance(operator, Scaled):
        factor = operator.factor
        parts, build = (operator.operator,), lambda inner: Scaled(inner, factor)
    elif isinstance(operator, Adjoint):
        parts, build = (operator.operator,), Adjoint
    else:
        return None
    wider = [doubled(part) for part in parts]
    known = [part for part in wider if part is not None]
    return build(*known) if len(known) == len(wider) else None


def widened(operator: LinearOperator, dtype: torch.dtype) -> tuple[LinearOperator, bool]:
    """The operator for vectors in `dtype`, and whether its products have the precision of these.

    Only float64 vectors for an operator in lower precision change anything.
    """
    if dtype != torch.float64 or operator.dtype == dtype:
        return operator, True
    wider = doubled(operator)
    return (Cast(operator), False) if wider is None else (wider, True)
