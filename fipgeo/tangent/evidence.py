"""What the examples of a shard say about components: r x r numbers, from which weights of components are learned."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.data import as_batches
from fipgeo.io import load_record, save_record
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.outputs import Euclidean
from fipgeo.tangent.component import Component, base_of, digest, fingerprint
from fipgeo.tangent.fit import lacking

KIND = "evidence"
WHOLE = "*"
RIDGES = {"component": 1.0, "tensor": 0.01}
"""Of `learned_weights`, by what has a weight of its own; chosen on held-out images of parts with different classes."""

Learned = Mapping[str, float] | Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, eq=False)
class Evidence:
    r"""Sufficient statistics of a shard for the weights of components under square loss.

    With u_i = J tau_i the change of the outputs by a component, or by one of its tensors, and d = kappa e_y - f_0 what
    the outputs lack,

        sum over the shard of |f_0 + sum_i w_i u_i - kappa e_y|^2 = w^T A w - 2 w^T b + energy
        A_ij = sum u_i . u_j,   b_i = sum u_i . d,   energy = sum |d|^2

    A is the metric of the outputs on the shard, pulled back to the span of the components. Examples cannot be told from
    these numbers where there are more of them than rows, and none are needed again.

    Attributes:
        shard: Whose examples they are; `Pool.forget` takes a component and the evidence of its name together.
        digests: Component name to the digest of its values, in the order of the rows of A.
        base: Fingerprint of theta_0.
        gram: A `[r, r]`, in float64.
        cross: b `[r]`, in float64.
        energy: sum |d|^2.
        count: Outputs that the sums are over: examples times classes.
        rows: What each row of A is about: a component, and one of its tensors or "*" for all of them.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> part = Component("a", {"bias": torch.tensor([1.0, 0.0])}, fingerprint(net))
        >>> found = Evidence.of(net, [part], (torch.zeros(3, 2), torch.tensor([0, 0, 1])), "a")
        >>> found.gram.tolist(), found.count
        ([[3.0]], 6)
    """

    shard: str
    digests: dict[str, str]
    base: str
    gram: Tensor
    cross: Tensor
    energy: float
    count: int
    rows: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            object.__setattr__(self, "rows", tuple((name, WHOLE) for name in self.digests))

    @classmethod
    def of(
        cls,
        base: nn.Module,
        components: Iterable[Component],
        data: Any,
        shard: str,
        *,
        by: str = "component",
        kappa: float = 15.0,
        batch_size: int | None = None,
        forward_fn: ForwardFn | None = None,
        output_fn: OutputFn | None = None,
    ) -> Evidence:
        """Measure a shard: a forward-mode pass over its examples for each of the r rows; holds r N C numbers meanwhile.

        Each number is made of two rows at most, by operations that do not depend on how many there are, so it
        has the same bits whatever other components are measured beside it.

        Args:
            base: The module with theta_0, or a tangent model about it.
            components: What weights are wanted for.
            data: Examples with labels, as `fit_square_` takes them.
            shard: What to call it.
            by: "component" for one row and one weight each, or "tensor" for one of each tensor of each component.
            kappa: Score of the right class, as the components were trained.
            batch_size: Examples in a batch when `data` is tensors.
            forward_fn: (module, batch) -> raw outputs, for a module with a signature of its own.
            output_fn: Raw outputs -> the tensor `[n, ..., C]` that is compared with the labels.

        Raises:
            ValueError: A component belongs to another base, names repeat, `by` is another word, or the data has no
                labels.
        """
        if by not in ("component", "tensor"):
            raise ValueError(f"by: got {by!r}, expected 'component' or 'tensor'")
        code, parts = fingerprint(base), sorted(components, key=lambda c: c.name)
        for part in parts:
            part.check(code)
        named = {part.name: part.digest() for part in parts}
        if len(named) < len(parts):
            raise ValueError(f"components: {len(parts)} with {len(named)} names; give each its own")
        module, batches = base_of(base), as_batches(data, batch_size, "data")
        lack: Tensor | None = None
        changes: list[Tensor] = []
        rows = [(p, name) for p in parts for name in (sorted(p.tangents) if by == "tensor" else [WHOLE])]
        roots: dict[tuple[str, ...], JacobianRoot] = {}
        for part, name in rows:
            names = tuple(sorted(part.tangents)) if name == WHOLE else (name,)
            if names not in roots:
                where = OutputMap(module, lambda n, _, s=names: n in s, forward_fn=forward_fn, output_fn=output_fn)
                function = EmbeddedOutputs(where, Euclidean(), batches)
                roots[names] = JacobianRoot(function, where.point(), engine="autodiff")
                if lack is None:
                    lack = torch.cat([t.reshape(-1) for t in lacking(function, where.point(), kappa)]).double()
            root = roots[names]
            tau = root.function.map.space.ravel({n: part.tangents[n].to(root.device) for n in names})
            changes.append(root(tau.to(root.dtype)))
        if lack is None:
            raise ValueError("components: got none; expected at least one to measure")
        gram = torch.tensor([[_dot(u, v) for v in changes[: i + 1]] + [0.0] * (len(changes) - i - 1)
                             for i, u in enumerate(changes)], dtype=torch.float64)  # fmt: skip
        gram = gram + gram.tril(-1).T
        cross = torch.tensor([_dot(u, lack) for u in changes], dtype=torch.float64)
        kinds = tuple((part.name, name) for part, name in rows)
        return cls(shard, named, code, gram, cross, _dot(lack, lack), len(lack), kinds)

    @property
    def names(self) -> list[str]:
        """The components, in the order of the rows."""
        return list(self.digests)

    @property
    def by(self) -> str:
        """What has a row of its own: "component" or "tensor"."""
        return "component" if all(name == WHOLE for _, name in self.rows) else "tensor"

    def restricted(self, names: Collection[str]) -> Evidence:
        """The rows and columns of some components, bit for bit what measuring them alone gives.

        Raises:
            ValueError: A component was not measured.
        """
        odd = sorted(set(names) - set(self.digests))
        if odd:
            raise ValueError(f"names: shard {self.shard!r} has not measured {odd[0]!r}; it knows {self.names}")
        kept = torch.tensor([i for i, (name, _) in enumerate(self.rows) if name in names], dtype=torch.long)
        digests = {name: code for name, code in self.digests.items() if name in names}
        gram, cross, rows = self.gram[kept][:, kept], self.cross[kept], tuple(self.rows[i] for i in kept.tolist())
        return Evidence(self.shard, digests, self.base, gram, cross, self.energy, self.count, rows)

    def by_component(self) -> Evidence:
        """The same with one row for each component: evidence by tensor says it, up to rounding."""
        places = {name: i for i, name in enumerate(self.names)}
        sums = torch.zeros(len(places), len(self.rows), dtype=torch.float64)
        for j, (name, _) in enumerate(self.rows):
            sums[places[name], j] = 1.0
        gram, cross = sums @ self.gram @ sums.T, sums @ self.cross
        return Evidence(self.shard, self.digests, self.base, gram, cross, self.energy, self.count)

    def loss(self, weights: Tensor) -> float:
        """`rescaled_square_loss` of the composition on this shard's examples, from the numbers and a weight per row."""
        w = weights.double()
        return float(w @ self.gram @ w - 2 * w @ self.cross + self.energy) / self.count

    def digest(self) -> str:
        """A name for the numbers."""
        rest = torch.tensor([self.energy, float(self.count)], dtype=torch.float64)
        return digest({"gram": self.gram, "cross": self.cross, "rest": rest})

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write the evidence to one safetensors file (see `fipgeo.io.save_record`)."""
        meta = {
            "kind": KIND,
            "shard": self.shard,
            "components": [list(pair) for pair in self.digests.items()],
            "base": self.base,
            "rows": [list(pair) for pair in self.rows],
        }
        meta |= {"energy": self.energy, "count": self.count}
        save_record(path, {"gram": self.gram, "cross": self.cross}, meta, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Read what `save` wrote.

        Raises:
            ValueError: The file holds no evidence.
        """
        tensors, meta = load_record(path)
        if meta.get("kind") != KIND:
            raise ValueError(f"{str(path)!r} holds no evidence; pass a file that Evidence.save wrote")
        digests = {str(name): str(code) for name, code in meta["components"]}
        rows = tuple((str(name), str(tensor)) for name, tensor in meta.get("rows", []))
        numbers = tensors["gram"], tensors["cross"], meta["energy"], meta["count"]
        return cls(meta["shard"], digests, meta["base"], *numbers, rows)

    def __repr__(self) -> str:
        return f"Evidence({self.shard!r}: {self.count:,} outputs on {len(self.digests)} components)"


def learned_weights(names: Collection[str], evidence: Iterable[Evidence], *, ridge: float | None = None) -> Learned:
    r"""Weights of components that minimise the square loss on all shards together, pulled towards the mean.

        w = argmin  w^T A w - 2 w^T b + ridge sum_j A_jj (w_j - 1/n)^2,   A = sum_s A_s, b = sum_s b_s

    One linear system, of as many rows as the evidence has: with evidence by tensor each component has a weight for each
    of its tensors, and the composition is still one tangent model. The pull counts what a row changes of the outputs,
    so a component in other units gets the same model. Sums are taken in the order of the shards' names, so that the
    result depends on which components and which shards there are, and has the bits of a history in which there never
    were others.

    Args:
        names: The components that there are to be weights for.
        evidence: Of every shard, on all these components at least.
        ridge: Strength of the pull; with a large one weights are 1/n. None for 1 with a weight per component and 0.01
            with one per tensor. Shards measure what was trained on them, which flatters a component at home; the pull
            is against that.

    Returns:
        As `compose` takes them: a number by component, or numbers by component and tensor.

    Raises:
        ValueError: There is no evidence, a shard has not measured a component, two shards measured different values
            under one name, in different rows or on different bases, shards' names repeat, or ridge is not positive.

    Examples:
        >>> net = nn.Linear(2, 2)
        >>> tau = {"bias": torch.tensor([1.0, 0.0])}
        >>> x, y = torch.zeros(3, 2), torch.tensor([0, 0, 0])
        >>> part = Component("a", tau, fingerprint(net))
        >>> found = Evidence.of(net, [part], (x, y), "a", kappa=2.0)
        >>> missing = 2.0 - net(x)[0, 0].item()
        >>> abs(learned_weights(["a"], [found], ridge=1e-9)["a"] - missing) < 1e-5
        True
    """
    if ridge is not None and not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge: got {ridge}, expected a positive number")
    shards = sorted(evidence, key=lambda e: e.shard)
    order = sorted(names)
    if not shards:
        raise ValueError("evidence: got none; measure at least one shard with Evidence.of, or use weights='mean'")
    if not order:
        return {}
    restricted = [shard.restricted(order) for shard in shards]
    for one, two in zip(restricted, restricted[1:], strict=False):
        _check_pair(one, two)
    gram, cross = restricted[0].gram.clone(), restricted[0].cross.clone()
    for shard in restricted[1:]:
        gram, cross = gram + shard.gram, cross + shard.cross
    rows, by = restricted[0].rows, restricted[0].by
    sizes = gram.diagonal()
    least = 1e-6 * float(sizes.mean())
    pull = (RIDGES[by] if ridge is None else ridge) * sizes.clamp_min(least if least > 0 else 1.0)
    found = torch.linalg.solve(gram + pull.diag(), cross + pull / len(order)).tolist()
    if by == "component":
        return {name: w for (name, _), w in zip(rows, found, strict=True)}
    return {name: {t: w for (n, t), w in zip(rows, found, strict=True) if n == name} for name in order}


def _check_pair(one: Evidence, two: Evidence) -> None:
    """Refuse to add up two pieces of evidence of one shard, or of different things."""
    if one.shard == two.shard:
        raise ValueError(f"evidence: two pieces come from shard {one.shard!r}; expected one of each")
    if (one.base, one.digests) != (two.base, two.digests):
        raise ValueError(
            f"evidence: shards {one.shard!r} and {two.shard!r} measured different components or bases under the"
            " same names; measure the components that are to be composed"
        )
    if one.rows != two.rows:
        raise ValueError(
            f"evidence: shard {one.shard!r} measured by {one.by}, shard {two.shard!r} by {two.by}; measure all shards"
            " with the same by=..."
        )


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
