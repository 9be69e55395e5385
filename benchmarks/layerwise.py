"""Layer-wise reconstruction: SparseGPT and OBC, layer after layer, from the formulas of the papers.

A layer W `[rows, d]` with inputs X `[d, n]` of the network as pruned so far is to become sparse with the smallest
|W X - W' X|^2, whose Hessian for every row is H = X X^T (convolutions are unfolded to their patches). Removing weight j
from a row costs w_j^2 / (2 [H^-1]_jj), and the best move of the others is -w_j / [H^-1]_jj times column j of H^-1.

- SparseGPT (Frantar & Alistarh 2023): columns from left to right; the inverses that are needed are the rows of the
  upper Cholesky factor U of H^-1, and zeros are chosen by w^2 / U_jj^2 in blocks of 128 columns.
- OBC (Frantar & Alistarh, Optimal Brain Compression, 2022): always the cheapest weight next, over all rows, with H^-1
  down-dated after every removal.

The share of zeros of a layer is the same everywhere ("uniform") or what global magnitude would give it ("global").
Where there is BatchNorm, statistics are re-estimated at the end if that brings the outputs on the inputs nearer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import heapify, heappop, heapreplace

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from benchmarks.baselines import Found, Task, centred, counted, goal, masks, normalised, outputs, reestimate

Solver = Callable[[Tensor, Tensor, int], Tensor]
DAMPING = 0.01
"""Share of the mean diagonal of H that is added to its diagonal, as in SparseGPT's code."""


def reconstructed(task: Task, *, solver: str = "sparsegpt", shares: str = "uniform") -> Found:
    """All layers, from the first to the last as the network calls them."""
    solve: Solver = {"sparsegpt": sparsegpt, "obc": obc}[solver]
    model = copy.deepcopy(task.model)
    layers, forwards = order(model, task.inputs[:1]), 1.0
    asked = allotted(model, task.level, shares)
    for name in layers:
        h, used = hessian(model, name, task.inputs)
        forwards += used
        weight = dict(model.named_parameters())[name]
        with torch.no_grad():
            flat = solve(weight.detach().flatten(1).double(), h, asked[name])
            weight.copy_(flat.view(weight.shape))
    model, used = renormalised(model, task)
    return Found(model, forwards + used)


def allotted(model: nn.Module, level: float, shares: str) -> dict[str, int]:
    """Zeros of every layer, `goal` of them together."""
    if shares == "global":
        return {name: int((~keep).sum()) for name, keep in masks(model, level).items()}
    weights, want = counted(model), goal(model, level)
    found = {name: int(level * w.numel()) for name, w in weights.items()}
    for name in sorted(weights, key=lambda n: found[n] - level * weights[n].numel())[: want - sum(found.values())]:
        found[name] += 1
    return found


def renormalised(model: nn.Module, task: Task) -> tuple[nn.Module, float]:
    """With BatchNorm statistics re-estimated, if the outputs on the inputs come nearer to the dense network's."""
    if not normalised(model):
        return model, 0.0
    other = copy.deepcopy(model)
    used = reestimate(other, task.inputs)
    f0 = outputs(task.model, task.inputs)
    gaps = [float((centred(outputs(m, task.inputs)) - centred(f0)).square().mean()) for m in (model, other)]
    return (other if gaps[1] < gaps[0] else model), used + 3.0 * len(task.inputs)


def sparsegpt(weight: Tensor, h: Tensor, zeros: int, *, block: int = 128) -> Tensor:
    """W `[rows, d]` with exactly `zeros` zeros, chosen in blocks of columns (see the top of this file)."""
    w, h = prepared(weight, h)
    rows, d = w.shape
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    gone = torch.zeros_like(w, dtype=torch.bool)
    for start in range(0, d, block):
        end = min(start + block, d)
        want = round(zeros * end / d) - round(zeros * start / d)
        score = (w[:, start:end] / factor.diagonal()[start:end]).square()
        chosen = torch.zeros(score.numel(), dtype=torch.bool)
        chosen[score.flatten().argsort(stable=True)[:want]] = True
        gone[:, start:end] = chosen.view(rows, -1)
        for j in range(start, end):
            error = torch.where(gone[:, j], w[:, j], 0) / factor[j, j]
            w[:, j:] -= error[:, None] * factor[j, j:]
    return w.masked_fill(gone, 0)


def obc(weight: Tensor, h: Tensor, zeros: int) -> Tensor:
    """W `[rows, d]` with exactly `zeros` zeros, the cheapest removal of all rows always next.

    Rows do not feel each other, so each is traced alone and the traces are merged; the weights that stay solve the
    normal equations of their row, which is what the removals one after the other amount to.
    """
    w, h = prepared(weight, h)
    order, cost = traces(w, h, zeros)
    heap = [(float(cost[r, 0]), r) for r in range(len(w))]
    heapify(heap)
    count = [0] * len(w)
    for _ in range(zeros):
        _, r = heap[0]
        count[r] += 1
        if count[r] < w.shape[1]:
            heapreplace(heap, (float(cost[r, count[r]]), r))
        else:
            heappop(heap)
    out = torch.zeros_like(w)
    for r, k in enumerate(count):
        left = torch.ones(w.shape[1], dtype=torch.bool)
        left[order[r, :k]] = False
        if left.any():
            out[r, left] = torch.linalg.solve(h[left][:, left], h[left] @ w[r])
    return out


def traces(w: Tensor, h: Tensor, zeros: int, max_entries: int = 2**23) -> tuple[Tensor, Tensor]:
    """The greedy order in which each row alone loses its weights, and the cost of each removal, both `[rows, d]`.

    A row is traced no further than to `zeros` removals, the rest costs infinity.
    """
    rows, d = w.shape
    order, cost = torch.zeros(rows, d, dtype=torch.long), torch.full((rows, d), torch.inf, dtype=w.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    size = max(max_entries // d**2, 1)
    for which in torch.arange(rows).split(size):
        part, inv = w[which], inverse.expand(len(which), d, d).clone()
        index, k = torch.arange(d).expand(len(which), d), 0
        while k < min(zeros, d):
            count = min(max((d - k) // 6, 1), min(zeros, d) - k)
            picked, costs = removals(part, inv, count)
            order[which, k : k + count] = index.gather(1, picked)
            cost[which, k : k + count] = costs
            left = torch.ones_like(part, dtype=torch.bool).scatter(1, picked, False).nonzero()[:, 1]
            left, k = left.view(len(which), -1), k + count
            part, index = part.gather(1, left), index.gather(1, left)
            inv = inv.gather(1, left[:, :, None].expand(-1, -1, inv.shape[2]))
            inv = inv.gather(2, left[:, None].expand(-1, inv.shape[1], -1))
    return order, cost


def removals(w: Tensor, inv: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The next `count` removals in every row of W `[rows, m]`, changed in place like H^-1 `[rows, m, m]`."""
    here = torch.arange(len(w))
    gone = torch.zeros_like(w, dtype=torch.bool)
    picked, costs = [], []
    for _ in range(count):
        diagonal = inv.diagonal(dim1=1, dim2=2).clamp_min(torch.finfo(w.dtype).tiny)
        score = (w.square() / diagonal).masked_fill(gone, torch.inf)
        j = score.argmin(1)
        column, pivot = inv[here, :, j], diagonal[here, j]
        w -= (w[here, j] / pivot)[:, None] * column
        inv.baddbmm_(column[:, :, None], (column / pivot[:, None])[:, None], alpha=-1)
        gone[here, j] = True
        picked.append(j)
        costs.append(score[here, j])
    return torch.stack(picked, 1), torch.stack(costs, 1)


def prepared(weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Copies, H damped; inputs that are always zero are damped next to nothing, so that their weights go first."""
    h = h.clone()
    diagonal = h.diagonal()
    mean = diagonal.mean() if bool((diagonal > 0).any()) else torch.ones((), dtype=h.dtype)
    diagonal.add_(torch.where(diagonal > 0, DAMPING, 1e-6) * mean)
    return weight.clone(), h


class _Seen(Exception):
    """The layer has been reached: the rest of the forward pass is not needed."""


@torch.no_grad()
def hessian(model: nn.Module, name: str, inputs: Tensor, batch_size: int = 100) -> tuple[Tensor, float]:
    """X X^T / n `[d, d]` in float64 for the weight of that name, and the model evaluations it took."""
    owner, total, count = name.rpartition(".")[0], None, 0

    def note(x: Tensor) -> None:
        nonlocal total, count
        x = patches(dict(model.named_modules())[owner], x)
        gram = (x.T @ x).double()
        total, count = gram if total is None else total + gram, count + len(x)
        raise _Seen

    for part in inputs.split(batch_size):
        with watching(model, name, note):
            try:
                model(part)
            except _Seen:
                pass
    assert total is not None
    return total / count, float(len(inputs))


@torch.no_grad()
def order(model: nn.Module, x: Tensor) -> list[str]:
    """Names of the counted weights in the order in which the network first uses them."""
    seen: dict[str, None] = {}
    hooks = []
    for owner, module in model.named_modules():
        attention = isinstance(module, nn.MultiheadAttention)
        keys = ["in_proj_weight", "out_proj.weight"] if attention else ["weight"]
        names = [name for key in keys if (name := f"{owner}.{key}".lstrip(".")) in counted(model)]
        hooks.append(module.register_forward_pre_hook(lambda *_, names=names: seen.update(dict.fromkeys(names))))
    with slow_attention():
        model(x)
    for hook in hooks:
        hook.remove()
    return list(seen)


@contextmanager
def watching(model: nn.Module, name: str, note: Callable[[Tensor], object]) -> Iterator[None]:
    """Call `note` with the inputs `[..., d]` or images that meet the weight of that name in every forward pass.

    Attention does not call its output projection as a module: what meets it is what attention puts out while that
    projection is the identity.
    """
    modules = dict(model.named_modules())
    owner = modules[name.rpartition(".")[0]]
    parent = modules.get(name.rpartition(".")[0].rpartition(".")[0])
    with slow_attention():
        if not isinstance(parent, nn.MultiheadAttention):
            hook = owner.register_forward_pre_hook(lambda _m, args: (note(args[0]), None)[1])
            try:
                yield
            finally:
                hook.remove()
            return
        kept = parent.out_proj.weight.data, parent.out_proj.bias
        hook = parent.register_forward_hook(lambda _m, _x, out: (note(out[0]), None)[1])
        try:
            parent.out_proj.weight.data = torch.eye(len(kept[0])).to(kept[0])
            parent.out_proj.bias = None  # type: ignore[assignment]
            yield
        finally:
            parent.out_proj.weight.data, parent.out_proj.bias = kept
            hook.remove()


@contextmanager
def slow_attention() -> Iterator[None]:
    """Attention and encoder layers as plain calls of their modules, so that hooks on them run."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def patches(module: nn.Module, x: Tensor) -> Tensor:
    """Inputs of a layer as rows `[n, d]`; images are unfolded to the patches that a convolution sees."""
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1])
    if module.groups != 1 or isinstance(module.padding, str):
        raise ValueError(f"model: a convolution with groups={module.groups} and padding={module.padding!r}; expected 1")
    found = unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
    return found.transpose(1, 2).reshape(-1, found.shape[1])
