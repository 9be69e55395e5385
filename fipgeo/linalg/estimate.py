"""Monte Carlo estimates from products with random vectors."""

import torch

from fipgeo.linalg import _stacks
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Estimate

_STACK_BYTES = 2**28


@torch.no_grad()
def trace(
    operator: LinearOperator, *, num_samples: int = 32, generator: torch.Generator | int | None = None
) -> Estimate:
    """`tr A` as the mean of `<s, A s>` over random signs s, with its standard error.

    The variance of one sample is `2 sum_{i != j} A_ij^2` for symmetric A: a diagonal operator is exact from
    one sample.

    Args:
        operator: A, shape `(n, n)`.
        num_samples: vectors; one product each, all in as few stacks as memory allows.
        generator: generator or seed; None for the fixed seed 0.

    Raises:
        ValueError: if A is not square or `num_samples` is less than 1.

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix (1989).

    Example:
        >>> from fipgeo.linalg import Diagonal
        >>> trace(Diagonal(torch.tensor([1.0, 2.0, 3.0])), num_samples=4)
        Estimate(value=6.0, std_error=0.0, num_samples=4)
    """
    n = operator.shape[0]
    if operator.shape != (n, n):
        raise ValueError(f"operator has shape {operator.shape}, a trace needs a square one; for |A|_F^2 take Gram(A)")
    if num_samples < 1:
        raise ValueError(f"num_samples is {num_samples}, expected at least 1")
    generator = _stacks.as_generator(generator)
    like = torch.empty(0, dtype=operator.dtype, device=operator.device)
    step = max(1, _STACK_BYTES // max(1, n * operator.dtype.itemsize))
    parts = []
    for start in range(0, num_samples, step):
        signs = _stacks.rademacher((min(step, num_samples - start), n), like, generator)
        parts.append(_stacks.dots(signs, operator(signs)))
    samples = torch.cat(parts)
    error = samples.std() / num_samples**0.5 if num_samples > 1 else torch.nan
    return Estimate(float(samples.mean()), float(error), num_samples)
