r"""Which inputs to keep, when there is room for few.

    K = R R^T [N * M, N * M]          score of an input = trace of its block of K (K + N mu)^{-1}

The score, between 0 and M, is the ridge leverage of an input (Alaoui & Mahoney 2015): how much of what its outputs feel
is felt by no other input. mu is such that the scores add up to the embedded outputs that there is room for.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import Generator, TensorBatches, as_batches, as_generator
from fipgeo.field import MetricField
from fipgeo.jacobian import JacobianRoot
from fipgeo.paths.protected import equal_shares
from fipgeo.trees import tensor_leaves

BY = ("random", "balanced", "leverage", "diverse")
MAX_ROWS = 8192
"""Up to so many embedded outputs K is factored."""


def select(
    model: nn.Module | MetricField,
    inputs: Any,
    count: int | None = None,
    *,
    nbytes: int | None = None,
    by: str = "balanced",
    generator: Generator = None,
) -> Tensor:
    """Choose inputs to keep; no labels are needed.

    | by | which | takes |
    | --- | --- | --- |
    | "random" | any, all alike | nothing |
    | "balanced" | any, equally many of every class that the model predicts, as far as there are so many | one pass |
    | "leverage" | at random by leverage score, without repetition | K |
    | "diverse" | one after the other, always the input of whose derivative those before say least | K |

    "diverse" is a Cholesky decomposition of K with the strongest block as pivot.

    Args:
        model: Module, or a field for another geometry, other parameters or a model with a signature of its own.
        inputs: Tensor `[N, ...]`, mapping or tuple of such, or batches that can be joined.
        count: How many; as many as fit in nbytes when None.
        nbytes: Memory for the inputs: as many are chosen as fit, by the size of one.
        by: How, see above.
        generator: Source of randomness.

    Returns:
        Indices of the chosen inputs, `[count]` int64, in rising order ("diverse": in the order of choice).

    Raises:
        ValueError: Not exactly one of count and nbytes; there are fewer inputs, or not one fits; the method is unknown;
            "balanced" without one vector of class scores an input; or K is too large.

    Examples:
        >>> x = torch.linspace(-1, 1, 10)[:, None]
        >>> select(nn.Linear(1, 3), x, nbytes=17, by="random").shape
        torch.Size([4])
    """
    if by not in BY:
        raise ValueError(f"by: got {by!r}, expected one of {', '.join(map(repr, BY))}")
    batches = as_batches(inputs).hold()
    if not isinstance(batches, TensorBatches):
        raise ValueError("inputs: their shapes differ from batch to batch, so single ones have no index; pass a tensor")
    count = _count(batches, count, nbytes)
    random = as_generator(generator)
    if by == "random":
        return torch.randperm(len(batches), generator=random)[:count].sort().values
    field = (model if isinstance(model, MetricField) else MetricField(model, batches)).on(batches)
    if by == "balanced":
        return balanced(predicted(field), count, random)
    gram, width = dual_blocks(field)
    if by == "diverse":
        return diverse(gram, width, count)
    noise = torch.rand(len(batches), generator=random, dtype=torch.float64)
    keys = leverage(gram, width, count).cpu().clamp(min=1e-300).log() - (-noise.log()).log()  # Gumbel: a weighted draw
    return keys.topk(count).indices.sort().values


def predicted(field: MetricField) -> Tensor:
    """The class that the model predicts for every input of a field, `[N]`.

    Raises:
        ValueError: The outputs are not one `[n, C]` tensor.
    """
    found = []
    for _, outputs in field.function.outputs(field.map.point()):
        if len(outputs) != 1 or outputs[0].dim() != 2:
            shapes = " and ".join(str(list(f.shape)) for f in outputs)
            raise ValueError(f"by: 'balanced' needs class scores [n, C], but outputs are {shapes}; pass output_fn=")
        found.append(outputs[0].argmax(1).cpu())
    return torch.cat(found)


def balanced(classes: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Random indices `[count]` in rising order, of every class equally many as far as it has so many.

    Args:
        classes: The class of every input, `[N]`.
        count: How many.
        generator: Source of randomness.
    """
    order = torch.randperm(len(classes), generator=generator)
    members = [order[classes[order] == c] for c in classes.unique()]
    members = [members[i] for i in torch.randperm(len(members), generator=generator)]
    shares = equal_shares([len(m) for m in members], count)
    chosen = torch.cat([m[:share] for m, share in zip(members, shares, strict=True)])
    return chosen.sort().values


def dual_blocks(field: MetricField) -> tuple[Tensor, int]:
    """K in float64 with M rows an input, and M.

    Raises:
        ValueError: It would be larger than `MAX_ROWS`.
    """
    root = JacobianRoot(field.function, field.map.point())
    rows, examples = root.survey.num_rows, root.survey.num_examples
    if rows > MAX_ROWS:
        most = MAX_ROWS * examples // rows
        raise ValueError(
            f"by: scores of {examples:,} inputs need a matrix of {rows:,} rows, at most {MAX_ROWS:,} are factored; draw"
            f" {most:,} of them first, with by='balanced'"
        )
    return root.gram(single=True), rows // examples


def leverage(gram: Tensor, width: int, count: int) -> Tensor:
    """Ridge leverage scores `[N]` that add up to count * M, or to the rank of K if that is less.

    Args:
        gram: K `[N * M, N * M]`.
        width: M.
        count: How many inputs there is room for.
    """
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0)
    seen = values > 1e-9 * values.max()
    values, weight = values[seen], vectors[:, seen].square()
    low, high = -30.0, 30.0  # of log(N mu / mean eigenvalue); the sum of all scores falls with mu
    for _ in range(60 if count * width < len(values) else 0):
        middle = (low + high) / 2
        ridge = float(values.mean()) * math.exp(middle)
        low, high = (middle, high) if float((values / (values + ridge)).sum()) > count * width else (low, middle)
    ridge = float(values.mean()) * math.exp(low) if count * width < len(values) else 0.0
    return (weight @ (values / (values + ridge))).reshape(-1, width).sum(1)


def diverse(gram: Tensor, width: int, count: int) -> Tensor:
    """Indices `[count]` of inputs with the largest trace of what the ones before leave of their block of K.

    Args:
        gram: K `[N * M, N * M]`.
        width: M.
        count: How many.
    """
    left = gram.diagonal().clone()
    done, chosen = gram.new_zeros(len(gram), 0), []
    jitter = 1e-9 * float(left.max())
    for _ in range(count):
        traces = left.reshape(-1, width).sum(1)
        traces[chosen] = -math.inf
        pick = int(traces.argmax())
        rows = slice(pick * width, (pick + 1) * width)
        columns = gram[:, rows] - done @ done[rows].T
        block = columns[rows] + jitter * torch.eye(width).to(gram)
        values, vectors = torch.linalg.eigh((block + block.T) / 2)
        new = columns @ (vectors / values.clamp(min=jitter or 1.0).sqrt())
        done, chosen = torch.cat([done, new], 1), [*chosen, pick]
        left = (left - new.square().sum(1)).clamp(min=0)
    return torch.tensor(chosen)


def _count(batches: TensorBatches, count: int | None, nbytes: int | None) -> int:
    if (count is None) == (nbytes is None):
        raise ValueError(f"count: got {count} and nbytes {nbytes}, expected exactly one of the two")
    if nbytes is not None:
        one = sum(t.nbytes for t in tensor_leaves(batches.tree)) // len(batches)
        count = min(nbytes // max(one, 1), len(batches))
        if count < 1:
            raise ValueError(f"nbytes: got {nbytes}, but one input takes {one}")
    assert count is not None
    if not 1 <= count <= len(batches):
        raise ValueError(f"count: got {count}, expected between 1 and the {len(batches)} inputs that there are")
    return count
