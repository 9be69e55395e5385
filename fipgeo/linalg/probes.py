"""How far an operator is from what it declares: relative violations, 0 for a perfect operator.

Values of some multiples of eps are rounding. Use them in the tests of a new operator.
"""

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, dots, gaussian, inner, norms
from fipgeo.linalg.operator import LinearOperator

Generator = torch.Generator | int | None


@torch.no_grad()
def adjoint_gap(operator: LinearOperator, *, num_probes: int = 4, generator: Generator = None) -> float:
    """The largest `|<A x, y> - <x, A^T y>|` over random pairs, relative to `max(|A x| |y|, |x| |A^T y|)`.

    Args:
        operator: A, shape `(m, n)`.
        num_probes: vectors on either side; every pair is compared.
        generator: generator or seed; None for the fixed seed 0.

    Examples:
        >>> from fipgeo.linalg import Function
        >>> adjoint_gap(Function(lambda x: x.roll(1, -1), lambda y: y.roll(1, -1), (3, 3))) > 0.1
        True
    """
    m, n = operator.shape
    x, y = _probes(operator, (num_probes, n), (num_probes, m), generator)
    ax, aty = operator(x), operator.adjoint(y)
    size = torch.maximum(torch.outer(norms(ax), norms(y)), torch.outer(norms(x), norms(aty)))
    return _largest((inner(ax, y) - inner(x, aty)).abs(), size)


@torch.no_grad()
def symmetry_gap(operator: LinearOperator, *, num_probes: int = 4, generator: Generator = None) -> float:
    """The largest `|<A x, y> - <x, A y>|` over random pairs, relative to `max(|A x| |y|, |x| |A y|)`.

    Args:
        operator: A, square.
        num_probes: vectors on either side; every pair is compared.
        generator: generator or seed; None for the fixed seed 0.

    Raises:
        ValueError: if the operator is not square.

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> symmetry_gap(Diagonal(torch.tensor([1.0, -2.0, 3.0]))) < 1e-5
        True
    """
    n = _square(operator)
    x, y = _probes(operator, (num_probes, n), (num_probes, n), generator)
    ax, ay = operator(torch.cat([x, y])).split(num_probes)
    size = torch.maximum(torch.outer(norms(ax), norms(y)), torch.outer(norms(x), norms(ay)))
    return _largest((inner(ax, y) - inner(x, ay)).abs(), size)


@torch.no_grad()
def psd_gap(operator: LinearOperator, *, num_probes: int = 16, generator: Generator = None) -> float:
    """How negative `<x, A x>` gets, relative to `|x| |A x|`; 0 if never.

    Tried are random vectors, which find a negative part of some weight, and their images `A x`, which amplify
    eigenvalues of large size. A small gap is evidence, no proof.

    Args:
        operator: A, square.
        num_probes: random vectors; each costs two products.
        generator: generator or seed; None for the fixed seed 0.

    Raises:
        ValueError: if the operator is not square.

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> psd_gap(Diagonal(torch.tensor([1.0, 2.0]))), psd_gap(Diagonal(torch.tensor([1.0, -9.0]))) > 0.5
        (0.0, True)
    """
    n = _square(operator)
    x, _ = _probes(operator, (num_probes, n), (0, n), generator)
    ax = operator(x)
    aax = operator(ax)
    first = _largest(-dots(x, ax), norms(x) * norms(ax))
    second = _largest(-dots(ax, aax), norms(ax) * norms(aax))
    return max(0.0, first, second)


@torch.no_grad()
def dense_gap(operator: LinearOperator, dense: Tensor) -> float:
    """The largest relative Frobenius error of forward, adjoint and normal products against a matrix.

    Args:
        operator: A, shape `(m, n)`, small.
        dense: the matrix it should be, `[m, n]`, made by another route.

    Raises:
        ValueError: if the shapes differ.

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> dense_gap(Diagonal(torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        0.0
    """
    m, n = operator.shape
    if dense.shape != (m, n):
        raise ValueError(f"dense has shape {tuple(dense.shape)}, expected that of the operator, {operator.shape}")
    domain = torch.eye(n, dtype=operator.dtype, device=operator.device)
    codomain = torch.eye(m, dtype=operator.dtype, device=operator.device)
    pairs = [
        (operator(domain).T, dense),
        (operator.adjoint(codomain), dense),
        (operator.normal(domain), dense.T @ dense),
    ]
    gaps = [_largest((found - expected).norm()[None], expected.norm()[None]) for found, expected in pairs]
    return max(gaps)


def _square(operator: LinearOperator) -> int:
    m, n = operator.shape
    if m != n:
        raise ValueError(f"operator has shape {operator.shape}, expected a square one; take adjoint_gap")
    return n


def _probes(
    operator: LinearOperator, first: tuple[int, int], second: tuple[int, int], generator: Generator
) -> tuple[Tensor, Tensor]:
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    source = as_generator(generator)
    return gaussian(first, like, source), gaussian(second, like, source)


def _largest(gaps: Tensor, sizes: Tensor) -> float:
    """The largest `gap / size`; a gap without size counts as it is, NaN as infinity."""
    relative = torch.where(sizes > 0, gaps / sizes, gaps)
    return float(torch.nan_to_num(relative, nan=torch.inf).max()) if relative.numel() else 0.0
