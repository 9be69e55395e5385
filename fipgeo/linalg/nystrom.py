"""Low-rank approximations of psd operators, and the preconditioners they make."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fipgeo.linalg._stacks import as_generator, dots, gaussian, inner, wide
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Estimate, Outcome, Spectrum


@dataclass(frozen=True)
class LowRank:
    """`A ~ sum_i s_i u_i u_i^T`, with what is known of the rest.

    Attributes:
        values: s, `[r]`, descending, not negative.
        vectors: u, `[r, n]`, orthonormal rows.
        error: estimate of the trace of `A - U S U^T`; for psd A it bounds the norm of that rest. None if nothing
            measured it.
        num_products: vectors multiplied by A.
        outcome: `BREAKDOWN`: A is not psd. `NOT_FINITE`: a product was not.

    Examples:
        >>> found = LowRank(torch.tensor([4.0]), torch.tensor([[1.0, 0.0]]))
        >>> found(torch.tensor([[1.0, 2.0]]))
        tensor([[4., 0.]])
        >>> found.preconditioner(damping=1.0)(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    values: Tensor
    vectors: Tensor = field(repr=False)
    error: Estimate | None = None
    num_products: int = 0
    outcome: Outcome = Outcome.CONVERGED

    @classmethod
    def from_spectrum(cls, spectrum: Spectrum) -> "LowRank":
        """Known eigenpairs in the same role; negative values are left out.

        Raises:
            ValueError: if the spectrum has no vectors.
        """
        if spectrum.vectors is None:
            raise ValueError("the spectrum has no vectors; compute it with vectors=True")
        kept = spectrum.values >= 0
        return cls(spectrum.values[kept], spectrum.vectors[kept], None, 0, spectrum.outcome)

    @property
    def ok(self) -> bool:
        """Whether the approximation was made without trouble; `error` tells how good it is."""
        return self.outcome.ok

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """`U S U^T x` over the last axis, `[..., n]`."""
        return ((x @ self.vectors.T) * self.values) @ self.vectors

    def preconditioner(self, damping: float) -> Callable[[Tensor], Tensor]:
        """About `(A + damping I)^{-1}` times a constant, on stacks `[k, n]`, for `cg(preconditioner=...)`.

            P^{-1} x = x - U (1 - (s_r + damping) / (S + damping)) U^T x

        Directions outside the approximation are left as they are; those inside are brought down to the size of
        the smallest one. The condition number falls from `s_1 / damping` to about `s_r / damping`.

        Args:
            damping: of the system, not negative; positive if the smallest value is zero.

        Raises:
            ValueError: if damping is negative, or zero beside a zero value.

        Source: Frangella, Tropp & Udell, Randomized Nystroem preconditioning (2023), section 1.
        """
        smallest = float(self.values[-1]) if len(self.values) else 0.0
        if damping < 0 or (damping == 0 and len(self.values) and smallest == 0):
            raise ValueError(f"damping is {damping}, the smallest value {smallest:.3g}; expected damping > 0")
        weights = 1 - (smallest + damping) / (self.values.to(wide(self.values.device)) + damping)
        vectors = self.vectors

        @torch.no_grad()
        def precondition(x: Tensor) -> Tensor:
            inside = inner(x.to(vectors.dtype), vectors).to(weights.dtype) * weights
            return x - (inside.to(vectors.dtype) @ vectors).to(x.dtype)

        return precondition


@torch.no_grad()
def nystrom(
    operator: LinearOperator,
    rank: int,
    *,
    num_probes: int = 4,
    generator: torch.Generator | int | None = None,
) -> LowRank:
    """A randomised low-rank approximation of a psd operator from one stacked product.

    With an orthonormal random sketch W `[r, n]` and the images `Y = A W^T + nu W^T`,

        A ~ Y (W Y)^{-1} Y^T - nu I,    nu = eps |A W^T|_F

    The small shift nu keeps the core matrix positive definite under rounding and is taken off the eigenvalues
    again. Some random probes in the same stack, which the sketch does not see, estimate the trace of the rest.

    Args:
        operator: A, shape `(n, n)`, psd.
        rank: r, 1 to n.
        num_probes: vectors for the error estimate; 0 for none.
        generator: generator or seed; None for the fixed seed 0.

    Returns:
        LowRank; it costs `rank + num_probes` products in one stack.

    Raises:
        ValueError: if A is not declared psd, or rank or num_probes is out of range.

    Source: Frangella, Tropp & Udell, Randomized Nystroem preconditioning (2023), algorithm 2.1.

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> found = nystrom(Diagonal(torch.tensor([3.0, 2.0, 0.0, 0.0], dtype=torch.float64)), rank=2)
        >>> found.values.round(decimals=6), found.num_products
        (tensor([3., 2.], dtype=torch.float64), 6)
    """
    n = operator.shape[0]
    if not operator.psd:
        raise ValueError("operator is not declared psd; build it with psd=True, or take Gram of a root")
    if not 1 <= rank <= n or num_probes < 0:
        raise ValueError(f"rank {rank} and num_probes {num_probes}, expected rank 1 to {n} and num_probes at least 0")
    source = as_generator(generator)
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    sketch = torch.linalg.qr(gaussian((rank, n), like, source).T).Q.T.contiguous()
    probes = gaussian((num_probes, n), like, source)
    images = operator(torch.cat([sketch, probes]))
    products = rank + num_probes
    if not bool(torch.isfinite(images).all()):
        return LowRank(like, sketch[:0], None, products, Outcome.NOT_FINITE)
    image, probed = images[:rank], images[rank:]
    shift = torch.finfo(operator.dtype).eps * float(inner(image, image).trace().sqrt())
    if shift == 0:
        return LowRank(like.new_zeros(rank), sketch, _rest(probes, probed, 0 * probed), products)
    image = image + shift * sketch
    core = inner(sketch, image)
    weights, turns = torch.linalg.eigh((core + core.T) / 2)
    negative = float(weights[0]) < -10 * rank * shift
    kept = weights > 0.1 * shift
    q, triangle = torch.linalg.qr(image.T)
    small = triangle.to(weights.dtype) @ turns[:, kept] / weights[kept].sqrt()
    left, singular, _ = torch.linalg.svd(small, full_matrices=False)
    values = (singular.square() - shift).clamp(min=0).to(operator.dtype)
    vectors = (q @ left.to(q.dtype)).T.contiguous()
    found = LowRank(values, vectors)
    error = _rest(probes, probed, found(probes))
    return LowRank(values, vectors, error, products, Outcome.BREAKDOWN if negative else Outcome.CONVERGED)


def _rest(probes: Tensor, images: Tensor, approximated: Tensor) -> Estimate | None:
    """Hutchinson's estimate of the trace of the difference, None without probes."""
    if not len(probes):
        return None
    samples = dots(probes, images - approximated)
    error = float(samples.std()) / len(samples) ** 0.5 if len(samples) > 1 else float("nan")
    return Estimate(float(samples.mean()), error, len(samples))
