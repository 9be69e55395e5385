r"""Layer-local correction: every linear map is solved for in closed form, one after the other.

    W = argmin  mean |W x - y_0|^2 + mu |W - W_now|^2      over W on the free weights of each row

x are the map's inputs in the present network, as corrected up to this map, and y_0 the outputs of the same map in the
start network. With W = W_now + V each row v of V is a small system of its own,

    (G_FF + mu)  v_F = c_F,        G = mean x x^T,   c = mean (y_0 - y) x,   F the free weights of the row

so that no derivative of the network is needed. It is exact for the metric in which layers do not hear of each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fipgeo.data import TensorBatches
from fipgeo.linalg import Function, cg
from fipgeo.paths.compensate import Compensation
from fipgeo.paths.correctors.base import Correction, Corrector, State, settled
from fipgeo.paths.kept import Kept, Position
from fipgeo.paths.layers import MAX_BYTES, Call, LayerGram, Moments, Targets, layer_grams, mask_of, owned, watch

MAX_SUPPORT = 2048
"""Rows with more free weights than that are solved by conjugate gradients."""


@dataclass(frozen=True)
class LayerLocal(Corrector):
    """Least squares in every linear map on the weights that are free, in forward order.

    A sweep is one pass of the start network and one of the present one, in which each map is solved for as soon as its
    inputs are there, so that maps further on see corrected inputs; all protected inputs go through together, or as many
    random ones as memory allows. Batches of unlike shapes cannot, and take a pass for each map. A sweep is kept, whole
    or in part, only if the residual on all protected inputs falls; mu then shrinks, otherwise it grows.

    Attributes:
        sweeps: Sweeps in one correction.
        final_sweeps: The same in the last one.
        damping: mu at first, as a multiple of the mean square of the map's inputs.
        positions: Positions of every input (pixels, tokens) that are looked at, drawn anew for every sweep; None for
            all.
        sequential: False to solve all maps on the inputs that they have at the start of the sweep.
        max_bytes: Most memory for activations.
    """

    sweeps: int = 1
    final_sweeps: int = 1
    damping: float = 1e-2
    positions: int | None = 16
    sequential: bool = True
    max_bytes: int = MAX_BYTES

    def correct(
        self,
        kept: Kept,
        position: Position,
        free: Tensor,
        state: State,
        generator: torch.Generator,
        *,
        moves: Compensation | None = None,
        final: bool = False,
    ) -> Correction:
        """Sweep, check on all protected inputs, adapt the damping; `moves` is not used (see `Corrector.correct`)."""
        del moves
        damping = float(state.get("damping", torch.tensor(self.damping)))
        loss, cost = kept.loss(position), float(kept.num_examples)
        for _ in range(self.final_sweeps if final else self.sweeps):
            aim, spent = self._sweep(kept, position, free, damping, generator)
            cost += spent
            for share in (1.0, 0.5, 0.25):
                theta = torch.where(free, position.theta + share * (aim - position.theta), position.theta)
                tried, now, spent = settled(kept, kept.moved(position, theta))
                cost += spent
                if now < loss:
                    position, loss, damping = tried, now, max(damping * (0.5 if share == 1 else 1.0), 1e-6)
                    break
            else:
                damping = min(4 * damping, 1e3)
        return Correction(position, {"damping": torch.tensor(damping, dtype=torch.float64)}, cost)

    def _sweep(
        self, kept: Kept, position: Position, free: Tensor, damping: float, generator: torch.Generator
    ) -> tuple[Tensor, float]:
        """Where the closed form wants to be, `[D]` (to be read at the free weights), and the evaluations spent."""
        open_ = kept.function.map.space.unravel(free)
        whole = isinstance(kept.batches, TensorBatches) or len(kept.survey.examples) == 1
        if self.sequential and whole:
            return self._threaded(kept, position, open_, damping, generator)
        cost, groups = 0.0, [None]
        options: Any = {"gaps": True, "generator": generator, "positions": self.positions}
        if self.sequential:
            order = [name for name in linear_maps(kept, position) if bool(open_[name].any())]
            groups = [[name] for name in order]
        for only in groups:
            grams = layer_grams(kept, position, only=only, max_bytes=self.max_bytes // 4, **options)
            steps = {n: step for gram in grams.values() for n, step in self._steps(gram, open_, damping).items()}
            position = replace(position, theta=_added(kept, position.theta, steps))
            cost += 2 * kept.num_examples
        return position.theta, cost

    def _threaded(
        self,
        kept: Kept,
        position: Position,
        open_: Mapping[str, Tensor],
        damping: float,
        generator: torch.Generator,
    ) -> tuple[Tensor, float]:
        """One pass of all inputs together (or as many as fit) in which every map is solved for as it is met."""
        model, start = kept.at(position).map, kept.function.map
        weights, weights0 = owned(model, position.theta), owned(start, kept.start)
        inputs, n, mask = self._joined(kept, position, generator)
        targets, sums, steps = Targets(self.positions, generator), {}, {}
        with model.frozen():
            outside = watch(start, weights0, inputs, n, targets)

            def solve(call: Call) -> Tensor | None:
                name = call.term.name
                index, target = targets.take(call)
                if name in outside or not bool(open_[name].any()):
                    return None
                moments = sums.setdefault(name, Moments(call))
                moments.add(call, index, target, mask, self.max_bytes // 4)
                if targets.left(call) or not moments.count:  # shared by several maps: once all of them were met
                    return None
                found = self._steps(moments.record(), open_, damping)
                steps.update(found)
                for n, step in found.items():
                    weights[n] += step.to(weights[n].dtype)
                return call.again() if found else None

            watch(model, weights, inputs, n, solve)
        return _added(kept, position.theta, steps), 2.0 * n

    def _joined(self, kept: Kept, position: Position, generator: torch.Generator) -> tuple[Any, int, Tensor | None]:
        """Protected inputs as one batch, as many as activations fit the memory, and the positions that count."""
        if not isinstance(kept.batches, TensorBatches):
            batch = kept.batches.first()
            return kept.function.inputs(batch), kept.num_examples, mask_of(kept, batch)
        largest, model, total = 0, kept.at(position).map, kept.num_examples
        count = min(2, total)

        def note(call: Call) -> None:
            nonlocal largest
            largest = max(largest, (call.x.numel() + call.out.numel()) * call.x.element_size() // count)

        few = kept.function.inputs(kept.batches.take(torch.arange(count)))
        with model.frozen():
            watch(model, owned(model, position.theta), few, count, note)
        size = min(total, max(self.max_bytes // (4 * max(largest, 1)), 1))
        batch = kept.batches.take(torch.randperm(total, generator=generator)[:size])
        return kept.function.inputs(batch), size, mask_of(kept, batch)

    def _steps(self, gram: LayerGram, open_: Mapping[str, Tensor], damping: float) -> dict[str, Tensor]:
        """What to add to the weights and the bias of one map."""
        mask = open_[gram.weight]
        rows, bias = gram.rows(mask), gram.bias if gram.bias in open_ else None
        last = torch.zeros_like(rows[..., :1]) if bias is None else open_[bias].reshape(*rows.shape[:2], 1)
        step = closest(gram, torch.cat([rows, last], -1), damping, self.max_bytes // 4)
        if not bool(torch.isfinite(step).all()):
            return {}
        found = {gram.weight: gram.restored(step[..., :-1], mask.shape)}
        return found if bias is None else found | {bias: step[..., -1].reshape(-1)}


def linear_maps(kept: Kept, position: Position) -> list[str]:
    """Names of the weights of linear maps in forward order."""
    found: dict[str, None] = {}
    model, inputs = kept.at(position).map, kept.function.inputs(kept.batches.first())
    weights, examples = owned(model, position.theta), kept.survey.examples[0]
    with model.frozen():
        outside = watch(model, weights, inputs, examples, lambda call: found.setdefault(call.term.name))
    return [name for name in found if name not in outside]


def closest(gram: LayerGram, free: Tensor, damping: float, max_bytes: int) -> Tensor:
    """V = argmin mean |V (x, 1) - (y_0 - y)|^2 + mu |V|^2 over V on the free entries.

    Args:
        gram: Moments with the gap.
        free: Boolean `[groups, out / groups, in + 1]`, the bias last.
        damping: mu as a multiple of mean |x|^2 / in; for the bias, of 1.
        max_bytes: Most memory for the systems that are factored at a time.

    Returns:
        V, float64, of the shape of `free`, zero where it is False.
    """
    assert gram.gap is not None
    out = torch.zeros_like(gram.gap)
    for g in range(gram.groups):
        second = torch.ones(free.shape[-1], free.shape[-1]).to(gram.gram)
        second[:-1, :-1], second[:-1, -1], second[-1, :-1] = gram.gram[g], gram.mean[g], gram.mean[g]
        size = float(gram.gram[g].diagonal().mean()) or 1.0
        second.diagonal()[:-1] += damping * size
        second.diagonal()[-1] += damping
        out[g] = _masked_solve(second, gram.gap[g], free[g], max_bytes)
    return out


def _masked_solve(a: Tensor, b: Tensor, free: Tensor, max_bytes: int) -> Tensor:
    """Rows v of `[r, k]` with (A v)_F = b_F and v = 0 off F, one support F for each row."""
    if bool((free == free[0]).all()):
        where, out = free[0].nonzero()[:, 0], torch.zeros_like(b)
        if len(where):
            out[:, where] = _factored_solve(a[where][:, where][None], b[:, where].T[None])[0].T
        return out
    support = free.sum(1)
    order, out = support.argsort(), torch.zeros_like(b)
    first = int((support == 0).sum())
    while first < len(order):
        last = first + 1
        while last < len(order) and 32 * (last + 1 - first) * int(support[order[last]]) ** 2 <= max_bytes:
            last += 1
        rows, width = order[first:last], int(support[order[last - 1]])
        if width > MAX_SUPPORT:
            out[rows] = _iterated_solve(a, b[rows], free[rows])
        else:
            where = torch.argsort(free[rows].int(), dim=1, descending=True, stable=True)[:, :width]
            live = free[rows].gather(1, where)
            part = a[where[:, :, None], where[:, None, :]] * (live[:, :, None] & live[:, None, :])
            part.diagonal(dim1=1, dim2=2).add_((~live).to(part))
            found = _factored_solve(part, (b[rows].gather(1, where) * live)[:, :, None])[:, :, 0]
            out[rows] = torch.zeros_like(b[rows]).scatter(1, where, found * live)
        first = last
    return out


def _factored_solve(a: Tensor, b: Tensor) -> Tensor:
    """A^{-1} b by Cholesky; where rounding made A indefinite, a little is added to its diagonal."""
    shift = 0.0
    for _ in range(8):
        factor, info = torch.linalg.cholesky_ex(a + shift * torch.eye(a.shape[-1]).to(a))
        if not bool(info.any()):
            return torch.cholesky_solve(b, factor)
        shift = max(10 * shift, 1e-12 * float(a.diagonal(dim1=1, dim2=2).mean()))
    return torch.full_like(b, torch.nan)


def _iterated_solve(a: Tensor, b: Tensor, free: Tensor) -> Tensor:
    """All rows by conjugate gradients with Jacobi's preconditioner, as one system."""
    mask, diagonal = free.to(a), a.diagonal()
    shape = (b.numel(), b.numel())

    def apply(x: Tensor) -> Tensor:
        rows = x.reshape(-1, len(a)) * mask.repeat(len(x), 1)
        return (rows @ a * mask.repeat(len(x), 1)).reshape(len(x), -1)

    system = Function(apply, None, shape, dtype=a.dtype, device=a.device, symmetric=True, psd=True)
    scaled = (mask / diagonal + (1 - mask)).reshape(-1)
    return cg(
        system, (b * mask).reshape(-1), rtol=1e-4, max_iters=200, preconditioner=lambda x: x * scaled
    ).value.reshape(b.shape)


def _added(kept: Kept, theta: Tensor, steps: Mapping[str, Tensor]) -> Tensor:
    """Theta + the steps, in theta's dtype."""
    space = kept.function.map.space
    zero = space.unravel(torch.zeros_like(theta))
    named = {name: steps[name].to(theta.dtype) if name in steps else t for name, t in zero.items()}
    return theta + space.ravel(named)
