"""Published ways to change task vectors before they are added, as functions of task vectors.

What comes out are task vectors again, so coefficients can be learned over them: `Composition(net, elect(vectors))`.
All work on the parameters; buffers pass through unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fipgeo.data import Generator, as_generator
from fipgeo.task_vectors import TaskVector


def trim(vector: TaskVector, keep: float) -> TaskVector:
    """The weights of largest magnitude over all tensors together, zero in place of the others.

    Args:
        vector: Any.
        keep: Share of the weights that stay, rounded up to a whole number; those equal to the last stay too.

    Raises:
        ValueError: `keep` is not in (0, 1].

    Source: TIES-Merging (Yadav et al., NeurIPS 2023), first step.

    Examples:
        >>> trim(TaskVector({"w": torch.tensor([1.0, -3.0, 2.0, 0.5])}), 0.5).tensors["w"].tolist()
        [0.0, -3.0, 2.0, 0.0]
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: got {keep}, expected a share of the weights in (0, 1]")
    sizes = torch.cat([tensor.abs().flatten() for tensor in vector.parameters.values()])
    count = max(1, -int(-keep * len(sizes) // 1))
    smallest = sizes.kthvalue(len(sizes) - count + 1).values
    return _on_parameters(vector, lambda _, tensor: tensor.where(tensor.abs() >= smallest, 0.0))


def elect(vectors: Sequence[TaskVector]) -> list[TaskVector]:
    """Each vector where its sign is that of the sum of all, zero elsewhere.

    Raises:
        ValueError: There is no vector, or they are not over the same tensors.

    Source: TIES-Merging (Yadav et al., NeurIPS 2023), second step.
    """
    if not vectors:
        raise ValueError("vectors: got none, expected one task vector or more")
    total = vectors[0]
    for vector in vectors[1:]:
        total = total + vector

    def agreeing(name: str, tensor: Tensor) -> Tensor:
        return tensor.where(tensor.sign() == total.tensors[name].sign().to(tensor), 0.0)

    return [_on_parameters(vector, agreeing) for vector in vectors]


def ties(vectors: Sequence[TaskVector], keep: float = 0.2) -> TaskVector:
    """Trimmed, sign-elected vectors, merged by the mean over those that are not zero at a weight.

    Args:
        vectors: Over the same tensors.
        keep: As in `trim`.

    Returns:
        The merged vector, to be scaled by a coefficient.

    Source: TIES-Merging (Yadav et al., NeurIPS 2023).
    """
    chosen = elect([trim(vector, keep) for vector in vectors])
    total = chosen[0]
    for vector in chosen[1:]:
        total = total + vector

    def mean(name: str, tensor: Tensor) -> Tensor:
        count = torch.stack([vector.tensors[name] != 0 for vector in chosen]).sum(0)
        return tensor / count.clamp(min=1).to(tensor)

    return _on_parameters(total, mean)


def dare(vector: TaskVector, drop: float, *, generator: Generator = None) -> TaskVector:
    """Every weight set to zero with probability p, the others divided by 1 - p, so that the mean stays.

    Args:
        vector: Any.
        drop: p, in [0, 1).
        generator: Source of the draws, a generator on the CPU or a seed; None for the seed 0.

    Raises:
        ValueError: `drop` is not in [0, 1).

    Source: DARE (Yu et al., Language Models are Super Mario, ICML 2024).
    """
    if not 0 <= drop < 1:
        raise ValueError(f"drop: got {drop}, expected a probability in [0, 1)")
    draws = as_generator(generator)

    def dropped(_: str, tensor: Tensor) -> Tensor:
        kept = torch.rand(tensor.shape, generator=draws, dtype=torch.float64) >= drop
        return (tensor / (1 - drop)).where(kept.to(tensor.device), 0.0)

    return _on_parameters(vector, dropped)


def lines(
    vector: TaskVector, alpha: float, beta: float, *, depth_of: Callable[[str], int | None] | None = None
) -> TaskVector:
    """Tensors scaled by alpha + beta l / (L - 1), l the number of their layer of L: shallow layers move less.

    Args:
        vector: Any.
        alpha: Scale of the first layer.
        beta: How much more the last layer is scaled.
        depth_of: Name of a tensor -> number of its layer, or None for tensors outside the layers. By default the first
            number in the name. Tensors outside are scaled as the first layer if they come before every layer, and as
            the last one otherwise.

    Source: LiNeS (Wang et al., LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging,
    ICLR 2025).

    Examples:
        >>> tau = TaskVector({f"{i}.weight": torch.ones(1) for i in range(3)})
        >>> [t.item() for t in lines(tau, 0.5, 1.0).tensors.values()]
        [0.5, 1.0, 1.5]
    """
    found = {name: (_first_number if depth_of is None else depth_of)(name) for name in vector.parameters}
    rank = {depth: i for i, depth in enumerate(sorted({d for d in found.values() if d is not None}))}
    last = max(1, len(rank) - 1)
    scales, inside = {}, False
    for name, depth in found.items():
        inside = inside or depth is not None
        layer = rank[depth] if depth is not None else last * inside
        scales[name] = alpha + beta * layer / last
    return _on_parameters(vector, lambda name, tensor: tensor * scales[name])


def _first_number(name: str) -> int | None:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(number[1]) if number else None


def _on_parameters(vector: TaskVector, function: Callable[[str, Tensor], Tensor]) -> TaskVector:
    """The vector with its parameters replaced in their own dtypes, computed in at least float32."""

    def wide(name: str, tensor: Tensor) -> Tensor:
        if name in vector.buffers:
            return tensor
        up = tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
        return function(name, up).to(tensor.dtype)

    return vector.map(wide)
