"""Weight space, or the coefficients of a basis, as a `geoopt.Manifold`, so that geoopt's optimisers run in the metric.

geoopt is imported with this module, and this module when it is first used.
"""

from __future__ import annotations

from typing import Any

import geoopt
import torch
from torch import Tensor

from fipgeo.data import Generator, as_generator
from fipgeo.field import MetricField
from fipgeo.geodesics import Chart, Flow, as_chart, geodesic
from fipgeo.metrics import Metric

__all__ = ["OutputManifold", "zero_momentum_"]


class OutputManifold(geoopt.Manifold):
    r"""R^r with the metric h(c) = g(c) + lambda I of a network's outputs.

    Points are flat vectors `[r]`: coefficients of a `Chart`, or all weights. One `ManifoldParameter` holds them all,
    and a loss is a function of it through `named`. Tangents are `[..., r]`. Evaluations at one point share one metric.

    | geoopt | here |
    | --- | --- |
    | `inner`, `norm` | `<u, v>_h`; `component_inner` too, so that Adam's second moment is one number |
    | `egrad2rgrad` | h^{-1} u, the damped natural gradient |
    | `retr` | c + u, or c + u + a / 2 with the geodesic's acceleration a |
    | `expmap` | the geodesic |
    | `expmap_transp`, `transp_follow_expmap` | the geodesic with parallel transport |
    | `transp` | v itself: the points share their tangent space; linear, but it does not keep lengths |
    | `proju`, `projx` | the identity |

    Args:
        field: The metric as a function of the weights, or in the coordinates of a `Chart`.
        damping: lambda > 0, in the units of g's eigenvalues.
        order: Of the retraction's contact with the geodesic, 1 or 2; 2 costs a second derivative and a solve a step.
        rtol: Error of a step of the geodesics in `expmap` (see `geodesic`).

    Raises:
        ValueError: The damping is not positive, or the order is neither 1 nor 2.

    Examples:
        >>> net = torch.nn.Linear(2, 1, bias=False).double()
        >>> space = OutputManifold(MetricField(net, 2 * torch.eye(2).double(), "euclidean"), damping=1.0)
        >>> weights = geoopt.ManifoldParameter(space.chart.start, manifold=space)
        >>> space.egrad2rgrad(weights, torch.tensor([3.0, 6.0]).double()).round(decimals=6)  # g = 4 I / 2
        tensor([1., 2.], dtype=torch.float64)
        >>> torch.func.functional_call(net, space.named(weights), torch.ones(3, 2).double()).shape
        torch.Size([3, 1])
    """

    name = "OutputManifold"
    ndim = 1
    reversible = False

    def __init__(
        self, field: MetricField | Chart, damping: float, *, order: int = 1, rtol: float | None = None
    ) -> None:
        super().__init__()
        if not damping > 0:
            raise ValueError(f"damping: got {damping}, expected a positive number: g alone is singular")
        if order not in (1, 2):
            raise ValueError(f"order: got {order}, expected 1 or 2")
        self.chart = as_chart(field)
        self.damping, self.order, self.rtol = float(damping), order, rtol
        self._at: tuple[Tensor, Metric] | None = None

    def __deepcopy__(self, memo: Any) -> OutputManifold:
        """Itself: copies of a parameter stay in one space, and the network is not copied with them."""
        return self

    def named(self, x: Tensor) -> dict[str, Tensor]:
        """The weights at x by name, for `torch.func.functional_call`; differentiable by x."""
        return self.chart.named(x.as_subclass(Tensor))

    def metric(self, x: Tensor) -> Metric:
        """The metric g at x; the one made last is kept."""
        x = _plain(x)
        if self._at is None or not torch.equal(self._at[0], x):
            self._at = (x.clone(), self.chart.at(x))
        return self._at[1]

    def inner(self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False) -> Tensor:
        """`<u, v>_g + lambda u . v`, `[...]`; `<u, u>` where v is None."""
        metric = self.metric(x)
        a, b = torch.broadcast_tensors(_plain(u), _plain(u if v is None else v))
        found = (metric.root(a) * metric.root(b)).sum(-1) / metric.num_examples + self.damping * (a * b).sum(-1)
        return found.unsqueeze(-1) if keepdim else found

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """(g + lambda)^{-1} u, of ordinary gradients `[..., r]`.

        Raises:
            SolveError: The solve did not reach its tolerance; the message says what helps.
        """
        return self.metric(x).solve(_plain(u), self.damping).raise_for_outcome().value

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """The point x + u, with the acceleration of the geodesic for order 2."""
        x, u = _plain(x), _plain(u)
        if self.order == 1 or not bool(u.any()):
            return x + u
        return x + u + Flow(self.chart, self.damping)(x, u[None]).change[0] / 2

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """The end of the geodesic that starts at x with velocity u and lasts for a unit of time."""
        return self.expmap_transp(x, u)[0]  # type: ignore[return-value]

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Any:
        """The end of the geodesic, and v `[..., r]` carried there by parallel transport.

        Raises:
            ArithmeticError: The geodesic could not be followed; the message says why and what helps.
        """
        x, u = _plain(x), _plain(u)
        carried = None if v is None else _plain(v).reshape(-1, u.shape[-1])
        length = float(self.norm(x, u))
        if length == 0:
            return x, v
        path = geodesic(self.chart, x, u, length, damping=self.damping, rtol=self.rtol, carry=carried)
        if not path.ok:
            raise ArithmeticError(f"expmap: {path.message}")
        return path.end, None if v is None else path.carried[-1].reshape(v.shape)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """The vectors v `[..., r]` carried along the geodesic by parallel transport."""
        return self.expmap_transp(x, u, v)[1]

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """The same vector at y."""
        del x, y
        return v

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """The vector u itself: every vector is a tangent."""
        del x
        return u

    def projx(self, x: Tensor) -> Tensor:
        """The point x itself: every vector is a point."""
        return x

    def random_tangent(self, x: Tensor, *size: int, generator: Generator = None) -> Tensor:
        """Normal tangents at x with covariance h^{-1}, `[*size, r]`: of length about sqrt(r) in every direction of h.

        With xi and eta normal, (g + lambda)^{-1} (R^T xi / sqrt(N) + sqrt(lambda) eta) has that covariance.
        """
        metric, source = self.metric(x), as_generator(generator)
        rows, dim = metric.root.shape
        root = metric.root
        draw = torch.randn(*size, rows + dim, generator=source, dtype=torch.float64).to(root.device, root.dtype)
        pulled = root.adjoint(draw[..., :rows]) / metric.num_examples**0.5 + self.damping**0.5 * draw[..., rows:]
        return metric.solve(pulled, self.damping).raise_for_outcome().value

    def _check_shape(self, shape: Any, name: str) -> tuple[bool, str | None]:
        if tuple(shape[-1:]) == (self.chart.dim,):
            return True, None
        return False, f"{name} has shape {list(shape)}, expected [..., {self.chart.dim}]"

    def _check_point_on_manifold(self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Any:
        del x, atol, rtol
        return True, None

    def _check_vector_on_tangent(self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5) -> Any:
        del x, u, atol, rtol
        return True, None


def zero_momentum_(optimizer: geoopt.optim.RiemannianSGD) -> geoopt.optim.RiemannianSGD:
    r"""Start the momentum of a `RiemannianSGD` at zero, before its first step; returns the optimiser.

    geoopt starts the buffer with the Euclidean gradient e, so its first step goes along `momentum * e + h^{-1} e`: a
    covector and a tangent added, in different units. Embedded manifolds do not notice, for there both are nearly the
    same; with a metric made of data the first term can be larger than the second by orders of magnitude, and it lingers
    in the buffer. Started at zero, the first step goes along `h^{-1} e`. `RiemannianAdam` starts at zero by itself.

    Raises:
        ValueError: The optimiser has taken a step already.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            if optimizer.state[p]:
                raise ValueError("optimizer: it has taken a step already; call zero_momentum_ before the first one")
            if group["momentum"] > 0:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def _plain(x: Tensor) -> Tensor:
    """A tensor without geoopt's type and without a graph."""
    return x.detach().as_subclass(Tensor)
