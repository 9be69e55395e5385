"""Weights that their owner keeps on a manifold: `geoopt.ManifoldParameter`s, such as orthogonal or normalised ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo.linalg import Function, LinearOperator
from fipgeo.space import WeightSpace

Project = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Constraints:
    """The manifolds of some tensors of a weight space; all others are free.

    Steps are projected to the tangent spaces by `proju`, and weights are brought back by `projx`. Only the manifolds
    count, not the lengths that geoopt measures in them: steps are measured by the outputs.

    Attributes:
        space: The weight space.
        manifolds: By name of the tensor; Euclidean ones are not among them.

    Examples:
        >>> import geoopt
        >>> net = nn.Linear(2, 1, bias=False)
        >>> net.weight = geoopt.ManifoldParameter(torch.tensor([[0.6, 0.8]]), manifold=geoopt.Sphere())
        >>> found = Constraints.of(net, WeightSpace.of(net))
        >>> list(found.manifolds), found.projection(torch.tensor([0.6, 0.8]))(torch.tensor([0.6, 0.8])).tolist()
        (['weight'], [0.0, 0.0])
        >>> found.brought_back(torch.tensor([3.0, 4.0])).tolist() == torch.tensor([0.6, 0.8]).tolist()
        True
    """

    space: WeightSpace
    manifolds: Mapping[str, Any]

    @classmethod
    def of(cls, module: nn.Module, space: WeightSpace) -> Constraints:
        """Those of a module's parameters, as far as they are coordinates."""
        named = {n: getattr(p, "manifold", None) for n, p in module.named_parameters() if n in space.shapes}
        return cls(space, {n: m for n, m in named.items() if m is not None and m.name != "Euclidean"})

    def __bool__(self) -> bool:
        """Whether there is any."""
        return bool(self.manifolds)

    @property
    def mask(self) -> Tensor:
        """Boolean `[D]`: the coordinates of the constrained tensors."""
        nothing = torch.zeros(self.space.dim, dtype=torch.bool, device=self.space.device)
        return self.space.mask(lambda name, _: name in self.manifolds) if self else nothing

    def brought_back(self, theta: Tensor) -> Tensor:
        """Theta `[D]` with every constrained tensor replaced by the point of its manifold that `projx` gives.

        For spheres and orthogonal matrices that is the nearest one. A tensor that is not finite stays as it is.
        """
        if not self:
            return theta
        named = self.space.unravel(theta)
        found = {n: m.projx(named[n]) for n, m in self.manifolds.items() if bool(torch.isfinite(named[n]).all())}
        return self.space.ravel({**named, **found})

    def projection(self, theta: Tensor) -> LinearOperator:
        """The orthogonal projection to the tangent space at theta `[D]`, as a symmetric operator."""
        named = self.space.unravel(theta)

        def apply(vectors: Tensor) -> Tensor:
            parts = self.space.unravel(vectors)
            found = {n: _orthogonal(m)(named[n].expand_as(parts[n]), parts[n]) for n, m in self.manifolds.items()}
            return self.space.ravel({**parts, **found})

        dim = self.space.dim
        return Function(apply, apply, (dim, dim), dtype=theta.dtype, device=theta.device, symmetric=True, psd=True)

    def check(self, theta: Tensor) -> None:
        """Refuse a start that is not on its manifolds, and manifolds in which steps cannot be told.

        Raises:
            ValueError: A tensor is off its manifold.
            NotImplementedError: The `proju` of a manifold is no orthogonal projection of its tensor.
        """
        source = torch.Generator().manual_seed(0)
        for name, manifold in self.manifolds.items():
            point = self.space.unravel(theta)[name]
            on, why = manifold.check_point_on_manifold(point, explain=True, atol=1e-4, rtol=1e-4)
            if not on:
                raise ValueError(f"params: {name!r} is off its manifold {manifold}: {why}; call its proj_() first")
            u, v = torch.randn(2, *point.shape, generator=source, dtype=torch.float64).to(point)
            pu, pv = (_orthogonal(manifold)(point, w) for w in (u, v))
            gap = max(float((_orthogonal(manifold)(point, pu) - pu).norm()), float(((pu * v) - (u * pv)).sum().abs()))
            if not gap <= 1e-3 * float(u.norm() * v.norm()):
                raise NotImplementedError(
                    f"params: {name!r} lies on {manifold}, whose proju is no orthogonal projection of the tensor; leave"
                    " it out of params=, so that it stays where it is"
                )

    def refuse(self, argument: str, why: str, cure: str, among: Tensor | None = None) -> None:
        """Say that something cannot be done with constrained tensors.

        Args:
            argument: Of the caller.
            why: What would happen to them.
            cure: What to do.
            among: Boolean `[D]`; only tensors with a true entry matter. None for all.

        Raises:
            NotImplementedError: There is such a tensor.
        """
        where = self.space.slices()
        names = [n for n in self.manifolds if among is None or bool(among[where[n]].any())]
        if names:
            listed = ", ".join(f"{n!r} on {self.manifolds[n]}" for n in names[:4])
            raise NotImplementedError(f"{argument}: {listed} {why}; {cure.format(names=names[:4])}")


def _orthogonal(manifold: Any) -> Project:
    """(x, u) -> the tangent at x nearest to u.

    geoopt's canonical Stiefel manifold has another `proju`, which doubles rotations; its tangent spaces are the same.
    """
    import geoopt

    canonical = isinstance(manifold, geoopt.CanonicalStiefel)
    return geoopt.EuclideanStiefel().proju if canonical else manifold.proju
