"""Linear operators `A: R^n -> R^m`, known by what they do to stacks of vectors, and their algebra."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from fipgeo.linalg import _dense

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


class LinearOperator(ABC):
    """A linear map `A: R^n -> R^m` of which only products are asked.

    Vectors come in stacks, stack axis first: `_apply` maps `[k, n]` to `[k, m]` and `_adjoint` maps `[k, m]`
    to `[k, n]`. A subclass writes these two (and `_normal`, if `A^T A x` costs less than the two after each
    other); everything else here is algebra on top of them.

    Args:
        shape: `(m, n)`, rows and columns of the matrix this stands for.
        dtype: real floating dtype of vectors and results.
        device: where vectors and results live.
        symmetric: declares `A = A^T`. Trusted, not verified; `symmetry_gap` measures it.
        psd: declares `<x, A x> >= 0`, and with it symmetry. Trusted, not verified; `psd_gap` measures it.

    Raises:
        ValueError: if a symmetric operator is not square or a size is negative.
        TypeError: if `dtype` is not a real floating dtype.

    Examples:
        >>> from fipgeo.linalg import Dense, Identity
        >>> A = Dense(torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0]]))
        >>> A(torch.ones(4, 3)).shape, (A @ torch.ones(3, 4)).shape, A.T.shape
        (torch.Size([4, 2]), torch.Size([2, 4]), (3, 2))
        >>> (2 * A @ A.T + Identity(2)).to_dense()
        tensor([[11.,  4.],
                [ 4.,  5.]])
    """

    __array_ufunc__ = None  # numpy scalars on the left hand over to __rmul__

    def __init__(
        self,
        shape: tuple[int, int],
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        symmetric: bool = False,
        psd: bool = False,
    ) -> None:
        rows, columns = shape
        if rows < 0 or columns < 0:
            raise ValueError(f"shape {tuple(shape)} has a negative size; expected (m, n), both at least 0")
        if not dtype.is_floating_point:
            raise TypeError(f"dtype {dtype} is not real floating; convert with tensor.to(torch.float64)")
        if (symmetric or psd) and rows != columns:
            raise ValueError(f"a symmetric or psd operator is square, not {tuple(shape)}; drop the declaration")
        self.shape = (int(rows), int(columns))
        self.dtype = dtype
        self.device = torch.device(device)
        self.symmetric = symmetric or psd
        self.psd = psd

    @abstractmethod
    def _apply(self, x: Tensor) -> Tensor:
        """`A x_i` for each row: `[k, n]` to `[k, m]`."""

    @abstractmethod
    def _adjoint(self, y: Tensor) -> Tensor:
        """`A^T y_i` for each row: `[k, m]` to `[k, n]`."""

    def _normal(self, x: Tensor) -> Tensor:
        """`A^T A x_i` for each row: `[k, n]` to `[k, n]`; override to make it one pass over the data."""
        return self._adjoint(self._apply(x))

    def _scaled_normal(self, x: Tensor, scale: float) -> Tensor:
        """`scale A^T A x_i` for each row; the factor goes to the shorter side, where that is open."""
        if self.shape[0] <= self.shape[1] and type(self)._normal is LinearOperator._normal:
            return self._adjoint(scale * self._apply(x))
        return scale * self._normal(x)

    @property
    def rank_bound(self) -> int:
        """An upper bound of the rank that follows from the shapes of the parts."""
        return min(self.shape)

    def __call__(self, x: Tensor) -> Tensor:
        """`A x` over the last axis: `[..., n]` to `[..., m]`, all vectors in one stack."""
        return self._over_rows(self._apply, x, self.shape[1], self.shape[0], "A(x)")

    def adjoint(self, y: Tensor) -> Tensor:
        """`A^T y` over the last axis: `[..., m]` to `[..., n]`."""
        return self._over_rows(self._adjoint, y, self.shape[0], self.shape[1], "A.adjoint(y)")

    def normal(self, x: Tensor) -> Tensor:
        """`A^T A x` over the last axis: `[..., n]` to `[..., n]`."""
        return self._over_rows(self._normal, x, self.shape[1], self.shape[1], "A.normal(x)")

    def _over_rows(
        self, product: Callable[[Tensor], Tensor], x: Tensor, size_in: int, size_out: int, call: str
    ) -> Tensor:
        if x.ndim == 0 or x.shape[-1] != size_in:
            raise ValueError(
                f"{call} got shape {tuple(x.shape)}, expected [..., {size_in}] for an operator of shape "
                f"{self.shape}; A(x) takes stacks [k, n], A @ X takes columns [n, k]"
            )
        if x.dtype != self.dtype:
            raise TypeError(f"{call} got {x.dtype} for an operator in {self.dtype}; convert with .to({self.dtype})")
        if x.device != self.device:
            raise ValueError(f"{call} got {x.device} for an operator on {self.device}; move with .to('{self.device}')")
        rows = x.reshape(x.shape[:-1].numel(), size_in)
        result = product(rows) if rows.shape[0] else rows.new_zeros(0, size_out)
        if result.shape != (rows.shape[0], size_out):
            raise ValueError(
                f"{type(self).__name__} returned shape {tuple(result.shape)} in {call}, expected "
                f"{(rows.shape[0], size_out)}; its _apply, _adjoint and _normal must map stacks to stacks"
            )
        return result.reshape(*x.shape[:-1], size_out)

    @property
    def T(self) -> "LinearOperator":  # noqa: N802
        """The adjoint operator `A^T: R^m -> R^n` (itself if symmetric)."""
        return self if self.symmetric else Adjoint(self)

    @overload
    def __matmul__(self, other: Tensor) -> Tensor: ...

    @overload
    def __matmul__(self, other: "LinearOperator") -> "LinearOperator": ...

    def __matmul__(self, other: "Tensor | LinearOperator") -> "Tensor | LinearOperator":
        """The matrix product: `A @ v` `[n]` to `[m]`, `A @ X` `[n, k]` to `[m, k]`, `A @ B` an operator."""
        if isinstance(other, LinearOperator):
            return Product(self, other)
        if not isinstance(other, Tensor):
            return NotImplemented
        if other.ndim < 2:
            return self(other)
        if other.shape[-2] != self.shape[1]:
            raise ValueError(
                f"A @ X got X of shape {tuple(other.shape)}, expected [{self.shape[1]}, k] for an operator "
                f"of shape {self.shape}; for a stack [k, n] call A(x)"
            )
        return self(other.mT).mT

    def __add__(self, other: "LinearOperator") -> "LinearOperator":
        return Sum(self, other) if isinstance(other, LinearOperator) else NotImplemented

    def __sub__(self, other: "LinearOperator") -> "LinearOperator":
        return Sum(self, Scaled(other, -1.0)) if isinstance(other, LinearOperator) else NotImplemented

    def __neg__(self) -> "LinearOperator":
        return Scaled(self, -1.0)

    def __mul__(self, factor: float) -> "LinearOperator":
        return Scaled(self, float(factor))

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> "LinearOperator":
        return Scaled(self, 1.0 / float(divisor))

    def __repr__(self) -> str:
        kind = ", psd" if self.psd else ", symmetric" if self.symmetric else ""
        return f"{type(self).__name__}(shape={self.shape}, dtype={self.dtype}, device='{self.device}'{kind})"

    def to_dense(self, max_bytes: int = 2**31) -> Tensor:
        """The matrix `[m, n]`, by `min(m, n)` products with basis vectors.

        Args:
            max_bytes: the largest matrix that may be made.

        Raises:
            ValueError: if the matrix needs more than `max_bytes`; the message holds the estimate.
        """
        return _dense.to_dense(self, max_bytes)

    def diagonal(self) -> Tensor:
        """The diagonal `A_ii`, `[n]`, of a square operator, by n products unless a subclass knows better.

        Raises:
            ValueError: if the operator is not square.
        """
        return _dense.diagonal(self)

    def gram(self) -> Tensor:
        """The Gram matrix of the rows, `A A^T` `[m, m]` in float64.

        By `min(m, n)` products if the rows fit 2 GiB, otherwise by m adjoint and m forward products in
        blocks. A subclass that has it more cheaply (from factors, from stored rows) overrides this.
        """
        return _dense.gram(self)

    def to_scipy(self) -> "ScipyOperator":
        """This operator as a `scipy.sparse.linalg.LinearOperator` on numpy arrays, vectors or columns.

        Raises:
            TypeError: if numpy has no counterpart of the dtype (bfloat16).
        """
        return _dense.to_scipy(self)


class Adjoint(LinearOperator):
    """`A^T` of an operator: forward and adjoint products change places.

    Args:
        operator: A, shape `(m, n)`; the adjoint has shape `(n, m)`.
    """

    def __init__(self, operator: LinearOperator) -> None:
        m, n = operator.shape
        kind = {"symmetric": operator.symmetric, "psd": operator.psd}
        super().__init__((n, m), dtype=operator.dtype, device=operator.device, **kind)
        self.operator = operator

    @property
    def rank_bound(self) -> int:
        """The bound of A."""
        return self.operator.rank_bound

    @property
    def T(self) -> LinearOperator:  # noqa: N802
        """A itself."""
        return self.operator

    def _apply(self, x: Tensor) -> Tensor:
        return self.operator._adjoint(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator._apply(y)


class Sum(LinearOperator):
    """`A_1 + A_2 + ...`; symmetric or psd if all terms are.

    Args:
        *terms: operators of one shape, dtype and device.

    Raises:
        ValueError: if shapes or devices differ, or there are no terms.
        TypeError: if dtypes differ.
    """

    def __init__(self, *terms: LinearOperator) -> None:
        first = require_alike("Sum", terms)
        for term in terms:
            if term.shape != first.shape:
                raise ValueError(f"Sum got shapes {[t.shape for t in terms]}; all terms must have one shape")
        symmetric, psd = all(t.symmetric for t in terms), all(t.psd for t in terms)
        super().__init__(first.shape, dtype=first.dtype, device=first.device, symmetric=symmetric, psd=psd)
        self.terms = terms

    @property
    def rank_bound(self) -> int:
        """The sum of the bounds of the terms."""
        return min(*self.shape, sum(t.rank_bound for t in self.terms))

    def _apply(self, x: Tensor) -> Tensor:
        return sum((t._apply(x) for t in self.terms[1:]), self.terms[0]._apply(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return sum((t._adjoint(y) for t in self.terms[1:]), self.terms[0]._adjoint(y))

    def diagonal(self) -> Tensor:
        """The sum of the diagonals."""
        return sum((t.diagonal() for t in self.terms[1:]), self.terms[0].diagonal())


class Scaled(LinearOperator):
    """`c A`; symmetric if A is, psd if A is and `c >= 0`.

    Args:
        operator: A.
        factor: c.
    """

    def __init__(self, operator: LinearOperator, factor: float) -> None:
        kind = {"symmetric": operator.symmetric, "psd": operator.psd and factor >= 0}
        super().__init__(operator.shape, dtype=operator.dtype, device=operator.device, **kind)
        self.operator, self.factor = operator, factor

    @property
    def rank_bound(self) -> int:
        """The bound of A."""
        return self.operator.rank_bound

    def _apply(self, x: Tensor) -> Tensor:
        return self.factor * self.operator._apply(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.factor * self.operator._adjoint(y)

    def _normal(self, x: Tensor) -> Tensor:
        return self.factor**2 * self.operator._normal(x)

    def diagonal(self) -> Tensor:
        """The diagonal of A, times c."""
        return self.factor * self.operator.diagonal()


class Product(LinearOperator):
    """`A B`, first B then A. No structure is concluded; `Gram` is the product that knows it is psd.

    Args:
        left: A, shape `(m, p)`.
        right: B, shape `(p, n)`.

    Raises:
        ValueError: if the inner sizes or the devices differ.
        TypeError: if the dtypes differ.
    """

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        require_alike("Product", (left, right))
        if left.shape[1] != right.shape[0]:
            raise ValueError(
                f"A @ B got shapes {left.shape} and {right.shape}; the columns of A ({left.shape[1]}) must "
                f"equal the rows of B ({right.shape[0]}); is one of them to be transposed (.T)?"
            )
        super().__init__((left.shape[0], right.shape[1]), dtype=left.dtype, device=left.device)
        self.left, self.right = left, right

    @property
    def rank_bound(self) -> int:
        """The smaller of the two bounds."""
        return min(self.left.rank_bound, self.right.rank_bound)

    def _apply(self, x: Tensor) -> Tensor:
        return self.left._apply(self.right._apply(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.right._adjoint(self.left._adjoint(y))

    def _normal(self, x: Tensor) -> Tensor:
        return self.right._adjoint(self.left._normal(self.right._apply(x)))


def require_alike(node: str, operators: Sequence[LinearOperator]) -> LinearOperator:
    """The first operator, after a check that all share one dtype and device."""
    if not operators:
        raise ValueError(f"{node} got no operators; give at least one")
    if len(dtypes := {op.dtype for op in operators}) > 1:
        raise TypeError(f"{node} got operators in {sorted(map(str, dtypes))}; build them in one dtype")
    if len(devices := {op.device for op in operators}) > 1:
        raise ValueError(f"{node} got operators on {sorted(map(str, devices))}; build them on one device")
    return operators[0]
