"""Random matrices with known properties, and every operator node beside its matrix, made another way."""

from collections.abc import Callable

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

from fipgeo.linalg import (
    Adjoint,
    Dense,
    Diagonal,
    Function,
    Gram,
    Identity,
    LinearOperator,
    Stack,
    from_scipy,
)

Case = tuple[LinearOperator, Tensor]


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal entries."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(seed: int, n: int) -> Tensor:
    """A random orthogonal matrix."""
    return torch.linalg.qr(draw(seed, n, n)).Q


def prescribed(seed: int, values: Tensor) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    q = orthogonal(seed, len(values))
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


def root_with(seed: int, singular: Tensor, m: int, n: int) -> Tensor:
    """An `m x n` matrix with these singular values (as many as there are) and zeros."""
    r = len(singular)
    return (orthogonal(seed, m)[:, :r] * singular) @ orthogonal(seed + 1, n)[:, :r].T


def _dense(seed: int, m: int, n: int) -> Case:
    a = draw(seed, m, n)
    return Dense(a), a


def _adjoint(seed: int, m: int, n: int) -> Case:
    a = draw(seed, n, m)
    return Adjoint(Dense(a)), torch.from_numpy(a.numpy().T.copy())


def _function(seed: int, m: int, n: int) -> Case:
    """Convolution with a kernel, by the Fourier transform, cut to m outputs; its matrix entry by entry."""
    h = draw(seed, n)
    f = torch.fft.fft(h)

    def apply(x: Tensor) -> Tensor:
        full = torch.fft.ifft(torch.fft.fft(x) * f).real
        return torch.cat([full, full], -1)[:, :m]

    def adjoint(y: Tensor) -> Tensor:
        full = torch.cat([y, y.new_zeros(len(y), 2 * n - m)], -1)
        return torch.fft.ifft(torch.fft.fft(full[:, :n] + full[:, n:]) * f.conj()).real

    dense = torch.stack([torch.stack([h[(i - j) % n] for j in range(n)]) for i in range(m)])
    return Function(apply, adjoint, (m, n), dtype=torch.float64), dense


def _sum(seed: int, m: int, n: int) -> Case:
    a, b, c = draw(seed, m, n), draw(seed + 1, m, n), draw(seed + 2, n, m)
    expected = a.numpy() - b.numpy() + c.numpy().T
    return Dense(a) - Dense(b) + Dense(c).T, torch.from_numpy(expected)


def _scaled(seed: int, m: int, n: int) -> Case:
    a = draw(seed, m, n)
    return -(np.float64(3.0) * Dense(a)) / 2, a * -1.5


def _product(seed: int, m: int, n: int) -> Case:
    a, b = draw(seed, m, 3), draw(seed + 1, 3, n)
    return Dense(a) @ Dense(b), torch.einsum("ij,jk->ik", a, b)


def _stack(seed: int, m: int, n: int) -> Case:
    a, b = draw(seed, m, n), draw(seed + 1, m, n)
    return Stack([Dense(a), 2 * Identity(n, dtype=torch.float64), Dense(b)]), torch.cat([a, 2 * torch.eye(n), b])


def _scipy(seed: int, m: int, n: int) -> Case:
    a = draw(seed, m, n) * (draw(seed + 1, m, n) > 0)
    return from_scipy(csr_array(a.numpy())), a


def _gram(seed: int, m: int, n: int) -> Case:
    a = draw(seed, m, n)
    return Gram(Dense(a), 0.5), torch.einsum("ij,ik->jk", a, a) / 2


def _diagonal(seed: int, m: int, n: int) -> Case:
    d = draw(seed, n).square()
    return Diagonal(d), torch.stack([d[i] * torch.eye(n)[i] for i in range(n)])


def _damped(seed: int, m: int, n: int) -> Case:
    a = draw(seed, m, n)
    operator = Gram(Stack([Dense(a), Dense(a)]) @ Identity(n, dtype=torch.float64), 0.25) + 0.1 * Identity(n)
    return operator, torch.einsum("ij,ik->jk", a, a) / 2 + 0.1 * torch.eye(n)


def _dense_psd(seed: int, m: int, n: int) -> Case:
    a = prescribed(seed, draw(seed, n).square())
    return Dense(a, psd=True), a.clone()


NODES: dict[str, Callable[[int, int, int], Case]] = {
    "dense": _dense,
    "adjoint": _adjoint,
    "function": _function,
    "sum": _sum,
    "scaled": _scaled,
    "product": _product,
    "stack": _stack,
    "scipy": _scipy,
    "gram": _gram,
    "diagonal": _diagonal,
    "damped": _damped,
    "dense_psd": _dense_psd,
}
"""(seed, m, n) to an operator and its matrix; psd ones ignore m for their shape `(n, n)`."""

PSD = ("gram", "diagonal", "damped", "dense_psd")


class Counting(LinearOperator):
    """An operator that counts its stacked calls and the vectors in them."""

    def __init__(self, operator: LinearOperator) -> None:
        super().__init__(
            operator.shape,
            dtype=operator.dtype,
            device=operator.device,
            symmetric=operator.symmetric,
            psd=operator.psd,
        )
        self.operator, self.calls, self.vectors = operator, 0, 0

    def _count(self, x: Tensor) -> Tensor:
        self.calls, self.vectors = self.calls + 1, self.vectors + len(x)
        return x

    def _apply(self, x: Tensor) -> Tensor:
        return self.operator._apply(self._count(x))

    def _adjoint(self, y: Tensor) -> Tensor:
        return self.operator._adjoint(self._count(y))

    def _normal(self, x: Tensor) -> Tensor:
        return self.operator._normal(self._count(x))
