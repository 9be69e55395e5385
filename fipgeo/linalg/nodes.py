"""Leaves of the operator algebra: matrices, diagonals, functions, Gram operators and stacks of operators."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fipgeo.linalg._dense import basis_blocks
from fipgeo.linalg.operator import LinearOperator, require_alike


class Dense(LinearOperator):
    """A matrix that is in memory.

    Args:
        matrix: `[m, n]`, real floating; not copied.
        symmetric: declares `A = A^T`.
        psd: declares `A >= 0`.

    Raises:
        ValueError: if `matrix` is not two-dimensional.
        TypeError: if `matrix` is not real floating.

    Examples:
        >>> Dense(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))(torch.tensor([1.0, 1.0]))
        tensor([2., 2.])
    """

    def __init__(self, matrix: Tensor, symmetric: bool = False, psd: bool = False) -> None:
        if matrix.ndim != 2:
            raise ValueError(f"matrix has shape {tuple(matrix.shape)}, expected [m, n]; for a diagonal take Diagonal")
        m, n = matrix.shape
        super().__init__((m, n), dtype=matrix.dtype, device=matrix.device, symmetric=symmetric, psd=psd)
        self.matrix = matrix

    def _apply(self, x: Tensor) -> Tensor:
        return x @ self.matrix.T

    def _adjoint(self, y: Tensor) -> Tensor:
        return y @ self.matrix


class Diagonal(LinearOperator):
    """`diag(d)`: symmetric, and psd if no entry is negative.

    Args:
        entries: d, `[n]`, real floating; not copied.

    Raises:
        ValueError: if `entries` is not one-dimensional.

    Examples:
        >>> Diagonal(torch.tensor([1.0, 3.0])).psd
        True
    """

    def __init__(self, entries: Tensor) -> None:
        if entries.ndim != 1:
            raise ValueError(f"entries have shape {tuple(entries.shape)}, expected [n]; for a matrix take Dense")
        n, psd = len(entries), bool((entries >= 0).all())
        super().__init__((n, n), dtype=entries.dtype, device=entries.device, symmetric=True, psd=psd)
        self.entries = entries

    def _apply(self, x: Tensor) -> Tensor:
        return self.entries * x

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.entries * y

    def diagonal(self) -> Tensor:
        """The entries d."""
        return self.entries.clone()


class Identity(LinearOperator):
    """The identity of R^n.

    Args:
        n: dimension.
        dtype: of vectors; None for the default dtype.
        device: of vectors.

    Examples:
        >>> (3 * Identity(2)).to_dense()
        tensor([[3., 0.],
                [0., 3.]])
    """

    def __init__(self, n: int, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> None:
        super().__init__((n, n), dtype=dtype or torch.get_default_dtype(), device=device, psd=True)

    def _apply(self, x: Tensor) -> Tensor:
        return x

    def _adjoint(self, y: Tensor) -> Tensor:
        return y

    def diagonal(self) -> Tensor:
        """Ones, `[n]`."""
        return torch.ones(self.shape[0], dtype=self.dtype, device=self.device)


class Function(LinearOperator):
    """An operator from two functions on stacks.

    Args:
        apply: `[k, n]` to `[k, m]`, row by row `A x`.
        adjoint: `[k, m]` to `[k, n]`, row by row `A^T y`; None for a symmetric operator, where it is `apply`.
        shape: `(m, n)`.
        dtype: of vectors; None for the default dtype.
        device: of vectors.
        symmetric: declares `A = A^T`.
        psd: declares `A >= 0`.

    Raises:
        ValueError: if there is no adjoint and the operator is not declared symmetric.

    Examples:
        >>> shift = Function(lambda x: x.roll(1, -1), lambda y: y.roll(-1, -1), (3, 3))
        >>> shift(torch.tensor([1.0, 2.0, 3.0]))
        tensor([3., 1., 2.])
    """

    def __init__(
        self,
        apply: Callable[[Tensor], Tensor],
        adjoint: Callable[[Tensor], Tensor] | None,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        symmetric: bool = False,
        psd: bool = False,
    ) -> None:
        dtype = dtype or torch.get_default_dtype()
        super().__init__(shape, dtype=dtype, device=device, symmetric=symmetric, psd=psd)
        if adjoint is None and not self.symmetric:
            raise ValueError("adjoint is None; give the adjoint's function, or declare symmetric=True")
        self.functions = apply, adjoint or apply

    def _apply(self, x: Tensor) -> Tensor:
        return self.functions[0](x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.functions[1](y)


class Gram(LinearOperator):
    """`scale R^T R` of a root R: symmetric and psd, applied in one pass by the root's normal product.

    Args:
        root: R, shape `(m, n)`.
        scale: factor, not negative; 1/N makes a sum over N examples their mean.

    Raises:
        ValueError: if `scale` is negative.

    Examples:
        >>> Gram(Dense(torch.tensor([[1.0, 2.0]])), scale=0.5).to_dense()
        tensor([[0.5000, 1.0000],
                [1.0000, 2.0000]])
    """

    def __init__(self, root: LinearOperator, scale: float = 1.0) -> None:
        if not scale >= 0:
            raise ValueError(f"scale is {scale}, expected at least 0; for a negative Gram operator write -Gram(root)")
        n = root.shape[1]
        super().__init__((n, n), dtype=root.dtype, device=root.device, psd=True)
        self.root, self.scale = root, float(scale)

    @property
    def rank_bound(self) -> int:
        """The bound of the root."""
        return self.root.rank_bound

    def _apply(self, x: Tensor) -> Tensor:
        return self.root._scaled_normal(x, self.scale)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._apply(y)

    @torch.no_grad()
    def diagonal(self) -> Tensor:
        """`scale |R e_i|^2`, `[n]`, by `min(m, n)` products with the root."""
        m, n = self.shape[0], self.root.shape[0]
        squares = torch.zeros(m, dtype=self.dtype, device=self.device)
        if n < m:
            for _, rows in basis_blocks(self.root, n):
                squares += self.root._adjoint(rows).square().sum(0)
        else:
            for block, rows in basis_blocks(self.root, m):
                squares[block] = self.root._apply(rows).square().sum(-1)
        return self.scale * squares


class Stack(LinearOperator):
    """Operators on one domain above each other: `x -> (A_1 x, A_2 x, ...)`.

    Args:
        blocks: operators of shapes `(m_i, n)`; the stack has shape `(sum m_i, n)`.

    Raises:
        ValueError: if there are no blocks, or their columns or devices differ.
        TypeError: if their dtypes differ.

    Examples:
        >>> Stack([Identity(2), Dense(torch.ones(1, 2))])(torch.tensor([1.0, 2.0]))
        tensor([1., 2., 3.])
    """

    def __init__(self, blocks: Sequence[LinearOperator]) -> None:
        first = require_alike("Stack", blocks)
        if len({block.shape[1] for block in blocks}) > 1:
            raise ValueError(f"Stack got shapes {[block.shape for block in blocks]}; all need the same columns")
        self.sizes = [block.shape[0] for block in blocks]
        super().__init__((sum(self.sizes), first.shape[1]), dtype=first.dtype, device=first.device)
        self.blocks = tuple(blocks)

    @property
    def rank_bound(self) -> int:
        """The sum of the blocks' bounds."""
        return min(*self.shape, sum(block.rank_bound for block in self.blocks))

    def _apply(self, x: Tensor) -> Tensor:
        return torch.cat([block._apply(x) for block in self.blocks], dim=-1)

    def _adjoint(self, y: Tensor) -> Tensor:
        parts = [block._adjoint(part) for block, part in zip(self.blocks, y.split(self.sizes, -1), strict=True)]
        return sum(parts[1:], parts[0])

    def _normal(self, x: Tensor) -> Tensor:
        return sum((block._normal(x) for block in self.blocks[1:]), self.blocks[0]._normal(x))


def from_scipy(operator: Any, *, symmetric: bool = False, psd: bool = False) -> LinearOperator:
    """An operator from a scipy `LinearOperator`, a sparse matrix or a numpy array, on the CPU.

    Args:
        operator: anything `scipy.sparse.linalg.aslinearoperator` takes, real.
        symmetric: declares `A = A^T`; then no `rmatvec` is needed.
        psd: declares `A >= 0`.

    Raises:
        TypeError: if the operator is not real floating.

    Examples:
        >>> from_scipy(np.array([[0.0, 2.0]]))(torch.tensor([1.0, 3.0], dtype=torch.float64))
        tensor([6.], dtype=torch.float64)
    """
    from scipy.sparse.linalg import aslinearoperator

    wrapped = aslinearoperator(operator)
    if wrapped.dtype is None or wrapped.dtype.kind != "f":
        raise TypeError(f"operator has dtype {wrapped.dtype}, expected real floating; convert with .astype(float)")
    dtype = torch.from_numpy(np.empty(0, dtype=wrapped.dtype)).dtype

    def product(call: Callable[[np.ndarray], np.ndarray]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.from_numpy(np.array(call(x.detach().cpu().numpy().T).T, wrapped.dtype, order="C"))

    adjoint = None if symmetric or psd else product(wrapped.rmatmat)
    m, n = wrapped.shape
    return Function(product(wrapped.matmat), adjoint, (m, n), dtype=dtype, symmetric=symmetric, psd=psd)
