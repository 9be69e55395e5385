"""Trace and diagonal of an operator from products with random vectors, with errors that hold."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from fipgeo.linalg import _leave_out
from fipgeo.linalg._stacks import as_generator, dots, gaussian, inner, norms, rademacher, wide
from fipgeo.linalg.operator import LinearOperator
from fipgeo.linalg.result import Estimate, Outcome, TensorEstimate

_STACK_BYTES = 2**28
_INDEFINITE = 1e-3  # H below minus this share of its largest eigenvalue is no rounding

Generator = torch.Generator | int | None


@torch.no_grad()
def trace(
    operator: LinearOperator,
    *,
    num_products: int = 32,
    method: str = "auto",
    generator: Generator = None,
) -> Estimate:
    """`tr A` with its standard error, in few stacks of products.

    ===========  ========  ==================================================================================
    method       vectors   error
    ===========  ========  ==================================================================================
    hutchinson   p         like `p^-1/2 |A|_F`: the mean of `<s, A s>` over random signs s
    hutch++      p / 3     exact on the images of p / 3 vectors, Hutchinson with as many outside
    xtrace       p / 2     every vector serves both ends: in turn each is left out of the subspace and used outside
    xnystrace    p         the same with Nystrom approximations of a psd operator, which need one product a vector
    ===========  ========  ==================================================================================

    All but the first fall as fast as the spectrum does, and are exact to rounding where the rank is less than
    the number of vectors. All are unbiased. The error of the last two is a jackknife over the vectors, which
    is at least as large as the true one on average.

    Args:
        operator: A, shape `(n, n)`.
        num_products: p, vectors multiplied by A at most. For p >= n the diagonal is summed, and exact
            (except by "hutchinson").
        method: one of the above; "auto" takes "xnystrace" for a declared psd operator, otherwise "xtrace"
            (from four products on, below that "hutchinson").
        generator: generator or seed; None for the fixed seed 0.

    Returns:
        Estimate. `NOT_FINITE` with value NaN: a product was not finite. `BREAKDOWN` with value NaN: the
        operator declared psd is not.

    Raises:
        ValueError: if A is not square, `num_products` too small for the method, the method unknown, or
            "xnystrace" was asked of an operator that is not declared psd.

    Source: Hutchinson, A stochastic estimator of the trace of the influence matrix (1989); Meyer, Musco,
    Musco & Woodruff, Hutch++ (2021); Epperly, Tropp & Webber, XTrace (2024); for the error, Epperly & Tropp,
    Efficient error and variance estimation for randomized matrix computations (2024).

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> values = torch.arange(1, 1001, dtype=torch.float64) ** -2.0
        >>> found = trace(Diagonal(values), num_products=50)
        >>> abs(found.value - float(values.sum())) < 3 * found.std_error < 0.01
        True
    """
    _require_square(operator, "trace")
    least = {"auto": 1, "hutchinson": 1, "hutch++": 3, "xtrace": 2, "xnystrace": 1}
    _require(method, num_products, least, "num_products")
    if method == "xnystrace" and not operator.psd:
        raise ValueError("xnystrace needs a psd operator; build it with psd=True, or take method='xtrace'")
    n = operator.shape[0]
    if method == "auto":
        method = "xnystrace" if operator.psd else "xtrace" if num_products >= 4 else "hutchinson"
        method = "xtrace" if num_products >= n else method
    if method != "hutchinson" and num_products >= n:
        total = float(operator.diagonal().sum(dtype=wide(operator.device))) if n else 0.0
        return _estimate(total, 0.0, 0, n)
    estimators = {"hutchinson": _hutchinson, "hutch++": _hutch_plus_plus, "xtrace": _xtrace, "xnystrace": _xnystrace}
    return estimators[method](operator, num_products, as_generator(generator))


@torch.no_grad()
def diagonal(
    operator: LinearOperator,
    *,
    num_products: int = 32,
    method: str = "auto",
    generator: Generator = None,
) -> TensorEstimate:
    """`diag A` with a standard error for each entry.

    "hutchinson" is the mean of `s * A s` over p random signs s: entry i errs by `(sum_{j != i} A_ij^2 / p)^1/2`
    for symmetric A. "xdiag" takes `diag(P A)` exactly, P the projector on the images of p / 2 sign vectors, and
    samples the rest, each vector left out of the subspace in turn: much better where the spectrum falls (as
    that of metrics and Hessians does), about twice the error where it is flat.

    A sum over entries errs by less or more than their errors suggest, since one draw moves all of them; the
    sum of all is better had from `trace`. With few vectors the error of a single entry is itself uncertain
    (by a factor of two with six vectors); its mean square over the entries is not.

    Args:
        operator: A, shape `(n, n)`; if it is not symmetric, "xdiag" uses adjoint products.
        num_products: p, vectors multiplied by A or its adjoint at most; for p >= n the diagonal is exact.
        method: "auto" takes "xdiag" from eight products on.
        generator: generator or seed; None for the fixed seed 0.

    Returns:
        TensorEstimate: `value` `[n]` in the dtype of A and `std_error` `[n]` (NaN for one sample).
        `NOT_FINITE` with NaN everywhere: a product was not finite.

    Raises:
        ValueError: if A is not square, `num_products` too small for the method, or the method unknown.

    Source: Bekas, Kokiopoulou & Saad, An estimator for the diagonal of a matrix (2007); Epperly, Tropp &
    Webber, XTrace (2024), section 5.

    Examples:
        >>> from fipgeo.linalg import Diagonal
        >>> found = diagonal(Diagonal(torch.tensor([1.0, 2.0, 3.0])), num_products=2)
        >>> found.value, found.std_error
        (tensor([1., 2., 3.]), tensor([0., 0., 0.]))
    """
    _require_square(operator, "diagonal")
    _require(method, num_products, {"auto": 1, "hutchinson": 1, "xdiag": 4}, "num_products")
    n = operator.shape[0]
    if num_products >= n:
        return _entries(operator.diagonal(), torch.zeros(n, dtype=operator.dtype, device=operator.device), 0, n)
    if method == "auto":
        method = "xdiag" if num_products >= 8 else "hutchinson"
    estimator = _xdiag if method == "xdiag" else _hutchinson_diagonal
    return estimator(operator, num_products, as_generator(generator))


def _hutchinson(operator: LinearOperator, p: int, generator: torch.Generator) -> Estimate:
    n, parts = operator.shape[0], []
    for size in _chunks(operator, p):
        signs = rademacher((size, n), _like(operator), generator)
        parts.append(dots(signs, operator(signs)))
    samples = torch.cat(parts)
    error = float(samples.std()) / p**0.5 if p > 1 else math.nan
    return _estimate(float(samples.mean()), error, p, p)


def _hutch_plus_plus(operator: LinearOperator, p: int, generator: torch.Generator) -> Estimate:
    """`tr Q^T A Q` plus the mean of `<v, A v>`, `v = (I - Q Q^T) s`: given Q, independent samples."""
    n, count = operator.shape[0], p // 3
    images = _products(operator, rademacher((count, n), _like(operator), generator))
    if not _finite(images):
        return _failed(count, count)
    q = _leave_out.Sketch(images).q.to(operator.dtype)
    num_outside = p - count - len(q)
    signs = rademacher((num_outside, n), _like(operator), generator)
    outside = signs - inner(signs, q).to(q.dtype) @ q
    z = _products(operator, torch.cat([q, outside]))
    h, samples = dots(q, z[: len(q)]), dots(outside, z[len(q) :])
    error = float(samples.std()) / num_outside**0.5 if num_outside > 1 else math.nan
    return _estimate(float(h.sum() + samples.mean()), error + _rounding(operator, h), num_outside, p)


def _xtrace(operator: LinearOperator, p: int, generator: torch.Generator) -> Estimate:
    m = p // 2
    omega = gaussian((m, operator.shape[0]), _like(operator), generator)
    images = _products(operator, omega)
    if not _finite(images):
        return _failed(m, m)
    sketch = _leave_out.Sketch(images)
    used = m + len(sketch.q)
    z = _products(operator, sketch.q.to(operator.dtype))
    if not _finite(z):
        return _failed(m, used)
    values, error = _leave_out.xtrace(sketch, omega, z)
    error = float(error) if m > 1 else math.nan
    return _estimate(float(values.mean()), error + _rounding(operator, dots(sketch.q, z)), m, used)


def _xnystrace(operator: LinearOperator, p: int, generator: torch.Generator) -> Estimate:
    """Of `A + shift I`, which is positive definite beyond rounding; `n shift` is subtracted in the end."""
    n = operator.shape[0]
    omega = torch.linalg.qr(gaussian((p, n), _leave_out.workable(_like(operator)), generator).T).Q.T.to(operator.dtype)
    images = _products(operator, omega)
    if not _finite(images):
        return _failed(p, p)
    h = _leave_out.small(omega, images)
    least, largest = (float(torch.linalg.eigvalsh((h + h.T) / 2)[end]) for end in (0, -1))
    if least < -_INDEFINITE * abs(largest):
        return Estimate(math.nan, math.nan, p, p, Outcome.BREAKDOWN)
    shift = max(torch.finfo(operator.dtype).eps * float(norms(images).max()) * p**0.5, -2 * least)
    if shift == 0:
        return _estimate(0.0, 0.0, p, p)
    frame = _leave_out.small(omega, omega)
    r = torch.linalg.qr(_leave_out.workable(images + shift * omega).T, mode="r").R.cpu().double()
    found = _leave_out.xnystrace((h + h.T) / 2 + shift * frame, r, n)
    if found is None:
        return Estimate(math.nan, math.nan, p, p, Outcome.BREAKDOWN)
    error = float(found[1]) if p > 1 else math.nan
    return _estimate(float(found[0].mean()) - n * shift, error + _rounding(operator, h.diagonal()), p, p)


def _hutchinson_diagonal(operator: LinearOperator, p: int, generator: torch.Generator) -> TensorEstimate:
    n, first = operator.shape[0], None
    dtype = wide(operator.device)
    total = torch.zeros(n, dtype=dtype, device=operator.device)
    squares = torch.zeros_like(total)
    for size in _chunks(operator, p):
        signs = rademacher((size, n), _like(operator), generator)
        samples = (signs * operator(signs)).to(dtype)
        first = samples[0] if first is None else first
        total += (samples - first).sum(0)  # differences keep an exact diagonal exact
        squares += (samples - first).square().sum(0)
    assert first is not None
    value = first + total / p
    variance = (squares - total.square() / p).clamp(min=0) / (p - 1) if p > 1 else torch.full_like(value, math.nan)
    return _entries(value.to(operator.dtype), (variance / p).sqrt().to(operator.dtype), p, p)


def _xdiag(operator: LinearOperator, p: int, generator: torch.Generator) -> TensorEstimate:
    n, m = operator.shape[0], p // 2
    omega = rademacher((m, n), _like(operator), generator)
    images = _products(operator, omega)
    nothing = torch.full((n,), math.nan, dtype=operator.dtype, device=operator.device)
    if not _finite(images):
        return _entries(nothing, nothing, m, m)
    sketch = _leave_out.Sketch(images)
    used = m + len(sketch.q)
    z = _products(operator if operator.symmetric else operator.adjoint, sketch.q.to(operator.dtype))
    value, error = nothing, nothing.clone()
    step = max(1, _STACK_BYTES // (64 * m))  # a few float64 stacks at a time
    for start in range(0, n, step):
        columns = slice(start, start + step)
        value[columns], error[columns] = _leave_out.xdiag(sketch, columns, omega, z)
    q, size = sketch.q, norms(z).square().sum().sqrt()
    rounding = norms(q.T) * size + norms(z.T) * len(q) ** 0.5  # entry i of Q^T Z, from errors of either factor
    return _entries(value, error + (4 * torch.finfo(operator.dtype).eps * rounding).to(error.dtype), m, used)


def _products(product: Callable[[Tensor], Tensor], stack: Tensor) -> Tensor:
    """`A x` for all rows, in stacks of at most 256 MiB."""
    step = max(1, _STACK_BYTES // max(1, stack.shape[1] * stack.element_size()))
    return torch.cat([product(part) for part in stack.split(step)]) if len(stack) else stack


def _chunks(operator: LinearOperator, count: int) -> list[int]:
    step = max(1, _STACK_BYTES // max(1, operator.shape[0] * operator.dtype.itemsize))
    return [min(step, count - start) for start in range(0, count, step)]


def _like(operator: LinearOperator) -> Tensor:
    return torch.empty(0, dtype=operator.dtype, device=operator.device)


def _finite(rows: Tensor) -> bool:
    return bool(torch.isfinite(norms(rows)).all())


def _rounding(operator: LinearOperator, captured: Tensor) -> float:
    """What rounding adds to the error of a sum of inner products `[r]`."""
    return 4 * torch.finfo(operator.dtype).eps * float(captured.abs().sum())


def _estimate(value: float, error: float, num_samples: int, num_products: int) -> Estimate:
    if not math.isfinite(value):
        return _failed(num_samples, num_products)
    return Estimate(value, error, num_samples, num_products)


def _failed(num_samples: int, num_products: int) -> Estimate:
    return Estimate(math.nan, math.nan, num_samples, num_products, Outcome.NOT_FINITE)


def _entries(value: Tensor, error: Tensor, num_samples: int, num_products: int) -> TensorEstimate:
    outcome = Outcome.CONVERGED if bool(torch.isfinite(value).all()) else Outcome.NOT_FINITE
    return TensorEstimate(value, error, num_samples, num_products, outcome)


def _require_square(operator: LinearOperator, name: str) -> None:
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"operator has shape {operator.shape}, a {name} needs a square one; for |A|_F^2 take Gram(A)")


def _require(method: str, count: int, least: dict[str, int], name: str) -> None:
    if method not in least:
        raise ValueError(f"method is {method!r}, expected one of {', '.join(map(repr, least))}")
    if count < least[method]:
        raise ValueError(f"{name} is {count}, expected at least {least[method]} for method={method!r}")
