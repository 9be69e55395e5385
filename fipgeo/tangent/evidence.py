"""What the examples of a shard say about components: r x r numbers, from which weights of components are learned."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable
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


@dataclass(frozen=True, eq=False)
class Evidence:
    r"""Sufficient statistics of a shard for the weights of r components under square loss.

    With u_i = J tau_i the change of the outputs by a component, and d = kappa e_y - f_0 what the outputs lack,

        sum over the shard of |f_0 + sum_i w_i u_i - kappa e_y|^2 = w^T A w - 2 w^T b + energy
        A_ij = sum u_i . u_j,   b_i = sum u_i . d,   energy = sum |d|^2

    A is the metric of the outputs on the shard, pulled back to the span of the components. Examples cannot be told from
    these numbers where there are more of them than components, and none are needed again.

    Attributes:
        shard: Whose examples they are; `Pool.forget` takes a component and the evidence of its name together.
        digests: Component name to the digest of its values, in the order of the rows of A.
        base: Fingerprint of theta_0.
        gram: A `[r, r]`, in float64.
        cross: b `[r]`, in float64.
        energy: sum |d|^2.
        count: Outputs that the sums are over: examples times classes.

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

    @classmethod
    def of(
        cls,
        base: nn.Module,
        components: Iterable[Component],
        data: Any,
        shard: str,
        *,
        kappa: float = 15.0,
        batch_size: int | None = None,
        forward_fn: ForwardFn | None = None,
        output_fn: OutputFn | None = None,
    ) -> Evidence:
        """Measure a shard: one forward-mode pass over its examples for each component; holds r N C numbers meanwhile.

        Each number is made of two components at most, by operations that do not depend on how many there are, so it
        has the same bits whatever other components are measured beside it.

        Args:
            base: The module with theta_0, or a tangent model about it.
            components: What weights are wanted for.
            data: Examples with labels, as `fit_square_` takes them.
            shard: What to call it.
            kappa: Score of the right class, as the components were trained.
            batch_size: Examples in a batch when `data` is tensors.
            forward_fn: (module, batch) -> raw outputs, for a module with a signature of its own.
            output_fn: Raw outputs -> the tensor `[n, ..., C]` that is compared with the labels.

        Raises:
            ValueError: A component belongs to another base, names repeat, or the data has no labels.
        """
        code, parts = fingerprint(base), sorted(components, key=lambda c: c.name)
        for part in parts:
            part.check(code)
        named = {part.name: part.digest() for part in parts}
        if len(named) < len(parts):
            raise ValueError(f"components: {len(parts)} with {len(named)} names; give each its own")
        module, batches = base_of(base), as_batches(data, batch_size, "data")
        lack: Tensor | None = None
        changes: list[Tensor] = []
        roots: dict[tuple[str, ...], JacobianRoot] = {}
        for part in parts:
            names = tuple(sorted(part.tangents))
            if names not in roots:
                where = OutputMap(module, lambda n, _, s=names: n in s, forward_fn=forward_fn, output_fn=output_fn)
                function = EmbeddedOutputs(where, Euclidean(), batches)
                roots[names] = JacobianRoot(function, where.point(), engine="autodiff")
                if lack is None:
                    lack = torch.cat([t.reshape(-1) for t in lacking(function, where.point(), kappa)]).double()
            root = roots[names]
            tau = root.function.map.space.ravel({n: t.to(root.device) for n, t in part.tangents.items()})
            changes.append(root(tau.to(root.dtype)))
        if lack is None:
            raise ValueError("components: got none; expected at least one to measure")
        gram = torch.tensor([[_dot(u, v) for v in changes[: i + 1]] + [0.0] * (len(parts) - i - 1)
                             for i, u in enumerate(changes)], dtype=torch.float64)  # fmt: skip
        gram = gram + gram.tril(-1).T
        cross = torch.tensor([_dot(u, lack) for u in changes], dtype=torch.float64)
        return cls(shard, named, code, gram, cross, _dot(lack, lack), len(lack))

    @property
    def names(self) -> list[str]:
        """The components, in the order of the rows."""
        return list(self.digests)

    def restricted(self, names: Collection[str]) -> Evidence:
        """The rows and columns of some components, bit for bit what measuring them alone gives.

        Raises:
            ValueError: A component was not measured.
        """
        odd = sorted(set(names) - set(self.digests))
        if odd:
            raise ValueError(f"names: shard {self.shard!r} has not measured {odd[0]!r}; it knows {self.names}")
        rows = torch.tensor([i for i, name in enumerate(self.digests) if name in names], dtype=torch.long)
        digests = {name: code for name, code in self.digests.items() if name in names}
        gram, cross = self.gram[rows][:, rows], self.cross[rows]
        return Evidence(self.shard, digests, self.base, gram, cross, self.energy, self.count)

    def loss(self, weights: Tensor) -> float:
        """`rescaled_square_loss` of the composition on this shard's examples, from the numbers alone."""
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
        return cls(
            meta["shard"], digests, meta["base"], tensors["gram"], tensors["cross"], meta["energy"], meta["count"]
        )

    def __repr__(self) -> str:
        return f"Evidence({self.shard!r}: {self.count:,} outputs on {len(self.digests)} components)"


def learned_weights(names: Collection[str], evidence: Iterable[Evidence], *, ridge: float = 0.1) -> dict[str, float]:
    r"""Weights of components that minimise the square loss on all shards together, pulled towards the mean.

        w = argmin  sum_s (w^T A_s w - 2 w^T b_s) + ridge a |w - 1/n|^2,   a = mean of the diagonal of sum_s A_s

    One r x r system. Sums are taken in the order of the shards' names, so that the result depends on which components
    and which shards there are, and has the bits of a history in which there never were others.

    Args:
        names: The components that there are to be weights for.
        evidence: Of every shard, on all these components at least.
        ridge: Strength of the pull; with a large one weights are 1/n.

    Raises:
        ValueError: There is no evidence, a shard has not measured a component, two shards measured different values
            under one name or speak of different bases, shards' names repeat, or ridge is not positive.

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
    if not (ridge > 0 and math.isfinite(ridge)):
        raise ValueError(f"ridge: got {ridge}, expected a positive number")
    shards = sorted(evidence, key=lambda e: e.shard)
    order = sorted(names)
    if not shards:
        raise ValueError("evidence: got none; measure at least one shard with Evidence.of, or use weights='mean'")
    if not order:
        return {}
    restricted = [shard.restricted(order) for shard in shards]
    for one, two in zip(restricted, restricted[1:], strict=False):
        if one.shard == two.shard:
            raise ValueError(f"evidence: two pieces come from shard {one.shard!r}; expected one of each")
        if (one.base, one.digests) != (two.base, two.digests):
            raise ValueError(
                f"evidence: shards {one.shard!r} and {two.shard!r} measured different components or bases under the"
                " same names; measure the components that are to be composed"
            )
    gram, cross = restricted[0].gram.clone(), restricted[0].cross.clone()
    for shard in restricted[1:]:
        gram, cross = gram + shard.gram, cross + shard.cross
    size = gram.diagonal().mean()
    pull = ridge * (size if bool(size > 0) else torch.ones_like(size))
    system = gram + pull * torch.eye(len(order), dtype=torch.float64)
    found = torch.linalg.solve(system, cross + pull / len(order))
    return dict(zip(order, found.tolist(), strict=True))


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b.double()).sum())
