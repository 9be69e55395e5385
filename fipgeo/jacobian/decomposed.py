"""Operations whose second derivatives torch gets wrong or lacks, written out in arithmetic that it gets right.

Measured with torch 2.13: forward mode applied twice takes the statistics that layer, instance and batch normalisation
have saved (and the factors that `solve`, `det` and `householder_product` have saved) for constants, and is wrong
without a word; three reverse passes go wrong through `weight_norm`. GLU lacks a second derivative in forward mode, hard
sigmoid in every mode; `weight_norm` has no forward mode, and `EmbeddingBag` has first derivatives in reverse only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class Decomposed(TorchFunctionMode):
    """While it is entered, the operations of `RULES` are computed by arithmetic with exact derivatives of every order.

    Values agree with torch's own to rounding. Running statistics that a normalisation would update stay as they are.
    Code inside TorchScript is not seen.

    Examples:
        >>> x = torch.tensor([[1.0, 2.0, 6.0]], dtype=torch.float64)
        >>> with Decomposed():
        ...     y = F.layer_norm(x, (3,))
        >>> bool((y - F.layer_norm(x, (3,))).abs().max() < 1e-12)
        True
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The rule's value where there is a rule that applies, else torch's own."""
        del types
        rule = RULES.get(func)
        found = None if rule is None else rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {})) if found is None else found


def _standardised(x: Tensor, dims: list[int], eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) over some axes, in float32 or better, with the mean and the inverse deviation."""
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    mean = wide.mean(dims, keepdim=True)
    centred = wide - mean
    scale = (centred.square().mean(dims, keepdim=True) + eps).rsqrt()
    return centred * scale, mean, scale


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, like: Tensor) -> Tensor:
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).to(like.dtype)


def _columns(t: Tensor | None, x: Tensor) -> Tensor | None:
    """One number per channel, shaped to spread over `[N, C, ...]`."""
    return None if t is None else t.reshape(-1, *[1] * (x.dim() - 2))


def _layer_norm(
    input: Tensor,
    normalized_shape: Any,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    return _native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _native_layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    shape = (normalized_shape,) if isinstance(normalized_shape, int) else normalized_shape
    out, mean, scale = _standardised(input, list(range(-len(shape), 0)), eps)
    return _affine(out, weight, bias, input), mean, scale


def _f_batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    out = _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    return None if out is None else out[0]


def _batch_norm(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: Any,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor | None:
    del cudnn_enabled
    return _f_batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)


def _native_batch_norm(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: Any,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    del momentum
    if not training and running_mean is not None and running_var is not None:
        return None
    out, mean, scale = _standardised(input, [0, *range(2, input.dim())], eps)
    out = _affine(out, _columns(weight, input), _columns(bias, input), input)
    return out, mean.flatten(), scale.flatten()


def _f_instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: Any = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    del running_mean, running_var, momentum
    if not use_input_stats:
        return None
    out = _standardised(input, list(range(2, input.dim())), eps)[0]
    return _affine(out, _columns(weight, input), _columns(bias, input), input)


def _instance_norm(
    input: Tensor,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    use_input_stats: bool,
    momentum: Any,
    eps: float,
    cudnn_enabled: bool,
) -> Tensor | None:
    del cudnn_enabled
    return _f_instance_norm(input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    axes = [axis for axis in range(v.dim()) if dim == -1 or axis != dim % v.dim()]
    return v * (g / v.square().sum(axes, keepdim=True).sqrt()) if axes else v * (g / v.abs())


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _hardsigmoid(input: Tensor, inplace: bool = False) -> Tensor:
    out = (input + 3).clamp(0, 6) / 6
    return input.copy_(out) if inplace else out


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor | None:
    """Bags as rows of one matrix of indices, short ones filled up with entries that do not count."""
    del norm_type, scale_grad_by_freq, sparse
    if max_norm is not None:  # this one rewrites the table
        return None
    counts = torch.ones_like(input, dtype=torch.bool)
    if offsets is not None:
        ends = offsets[1:] if include_last_offset else torch.cat([offsets[1:], offsets.new_tensor([len(input)])])
        starts = offsets[: len(ends)]
        sizes = ends - starts
        place = starts[:, None] + torch.arange(max(int(sizes.max()), 1), device=input.device)
        counts = place < ends[:, None]
        place = place.clamp(max=len(input) - 1)
        input = input[place]
        per_sample_weights = None if per_sample_weights is None else per_sample_weights[place]
    if padding_idx is not None:
        counts = counts & (input != padding_idx % len(weight))
    rows = weight[input]
    if mode == "max":
        filled = rows.masked_fill(~counts[..., None], -torch.inf).amax(-2)
        return filled.masked_fill(~counts.any(-1, keepdim=True), 0.0)
    rows = rows * counts[..., None]
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[..., None]
    return rows.sum(-2) / (counts.sum(-1, keepdim=True).clamp(min=1) if mode == "mean" else 1)


def _solve(A: Tensor, B: Tensor, *, left: bool = True, out: Any = None) -> Tensor | None:
    if out is not None:
        return None
    if not left:
        flipped = _solve(A.mT, B.mT)
        return None if flipped is None else flipped.mT
    vector = B.dim() == 1 or (B.dim() == A.dim() - 1 and B.shape == A.shape[:-1])
    permutation, lower, upper = torch.linalg.lu(A)
    x = permutation.mT @ (B[..., None] if vector else B)
    x = torch.linalg.solve_triangular(lower, x, upper=False, unitriangular=True)
    x = torch.linalg.solve_triangular(upper, x, upper=True)
    return x[..., 0] if vector else x


def _factors(A: Tensor) -> tuple[Tensor, Tensor]:
    """The sign of the row exchanges, and the diagonal of U, in A = P L U."""
    permutation, _, upper = torch.linalg.lu(A)
    return torch.linalg.det(permutation.detach()), upper.diagonal(dim1=-2, dim2=-1)


def _det(A: Tensor, *, out: Any = None) -> Tensor | None:
    if out is not None:
        return None
    sign, diagonal = _factors(A)
    return sign * diagonal.prod(-1)


def _slogdet(A: Tensor, *, out: Any = None) -> Any:
    if out is not None or A.is_complex():
        return None
    sign, diagonal = _factors(A)
    parts = sign * diagonal.detach().sign().prod(-1), diagonal.abs().log().sum(-1)
    return torch.return_types.linalg_slogdet(parts)  # type: ignore[attr-defined]


def _logdet(A: Tensor) -> Tensor | None:
    if A.is_complex():
        return None
    sign, size = _slogdet(A)
    return size + sign.log()


def _cholesky_inverse(L: Tensor, upper: bool = False, *, out: Any = None) -> Tensor | None:
    if out is not None:
        return None
    eye = torch.eye(L.shape[-1], dtype=L.dtype, device=L.device)
    inverse = torch.linalg.solve_triangular(L, eye, upper=upper)
    return inverse @ inverse.mH if upper else inverse.mH @ inverse


def _householder_product(A: Tensor, tau: Tensor, *, out: Any = None) -> Tensor | None:
    """The first columns of H_1 ... H_k, with H_i = I - tau_i v_i v_i^H and v_i = (0, ..., 0, 1, the rest of column i).

    Reflections are applied from the last to the first.
    """
    if out is not None:
        return None
    m, n = A.shape[-2:]
    eye = torch.eye(m, n, dtype=A.dtype, device=A.device)
    vectors = A.tril(-1) + eye
    product = eye.expand(*A.shape[:-2], m, n)
    for i in reversed(range(tau.shape[-1])):
        v = vectors[..., i : i + 1]
        product = product - tau[..., i, None, None] * v @ (v.mH @ product)
    return product


RULES: dict[Any, Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    torch.native_layer_norm: _native_layer_norm,
    F.batch_norm: _f_batch_norm,
    torch.batch_norm: _batch_norm,
    torch.native_batch_norm: _native_batch_norm,
    F.instance_norm: _f_instance_norm,
    torch.instance_norm: _instance_norm,
    torch._weight_norm: _weight_norm,  # type: ignore[reportPrivateImportUsage]
    F.glu: _glu,
    F.hardsigmoid: _hardsigmoid,
    F.embedding_bag: _embedding_bag,
    torch.cholesky_inverse: _cholesky_inverse,
    torch.Tensor.cholesky_inverse: _cholesky_inverse,
    torch.linalg.solve: _solve,
    torch.linalg.householder_product: _householder_product,
    torch.orgqr: _householder_product,
    torch.Tensor.orgqr: _householder_product,
    torch.logdet: _logdet,
    torch.Tensor.logdet: _logdet,
}
RULES |= dict.fromkeys([torch.linalg.det, torch.det, torch.Tensor.det], _det)
RULES |= dict.fromkeys([torch.linalg.slogdet, torch.slogdet, torch.Tensor.slogdet], _slogdet)
"""What is written out; a rule that returns None leaves the call to torch."""
