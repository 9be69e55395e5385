"""Second derivatives of the embedded outputs along directions: z''[v, v] = d^2/dt^2 z(theta + t v) at t = 0.

torch's forward mode applied twice is silently wrong through layer, instance and batch normalisation and some of linear
algebra. Here those are written out (see `Decomposed`), and forward mode is compared with reverse mode before it is
believed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import jvp

from fipgeo.jacobian.autodiff import Function, _last_module, push_forward, push_transposed, vectorised
from fipgeo.jacobian.decomposed import Decomposed
from fipgeo.jacobian.embedded import EmbeddedOutputs, Survey, Weights
from fipgeo.model import NotFiniteError

log = logging.getLogger(__name__)

ROUTES = ("auto", "forward", "reverse", "difference")


class Taylor(NamedTuple):
    """z and its first two derivatives along a direction, from one pass over the data.

    Attributes:
        value: z, `[N * M]`.
        first: z'[v], `[N * M]`, or `[k, N * M]` for a stack.
        second: z''[v, v] or z''[v, w], shaped like `first`.
    """

    value: Tensor
    first: Tensor
    second: Tensor


Line = Callable[[Function, Weights, Weights, Weights], Taylor]
"""f, weights, v and w (the same object where w is v) to z, z'[v] and z''[v, w]."""


def line_forward(f: Function, weights: Weights, v: Weights, w: Weights) -> Taylor:
    """By forward mode applied twice: one forward pass that carries both tangents and their product."""
    with torch.enable_grad():  # no graph is kept; without it torch differentiates kernels that have no derivatives
        (z, first), (_, second) = jvp(lambda p: jvp(f, (p,), (v,)), (weights,), (w,))[:2]
    return Taylor(z.detach(), first.detach(), second.detach())


def line_reverse(f: Function, weights: Weights, v: Weights, w: Weights) -> Taylor:
    """By reverse mode only: u . z''[v, w] = d^2/ds dt u . z(theta + s v + t w) is a scalar, and linear in u."""
    dtype = torch.float32
    for p in weights.values():
        dtype = torch.promote_types(dtype, p.dtype)
    with torch.enable_grad():
        s = torch.zeros((), dtype=dtype, device=next(iter(weights.values())).device, requires_grad=True)
        t = s if v is w else torch.zeros_like(s, requires_grad=True)
        moved = {n: p + s.to(p.dtype) * v[n] for n, p in weights.items()}
        if v is not w:
            moved = {n: p + t.to(p.dtype) * w[n] for n, p in moved.items()}
        z = f(moved)
        u = torch.zeros_like(z, requires_grad=True)
        slope = _slope((u * z).sum(), s, graph=True)
        first = _slope(slope, u)
        return Taylor(z.detach(), first, _slope(_slope(slope, t, graph=True), u))


def _slope(value: Tensor, x: Tensor, *, graph: bool = False) -> Tensor:
    """The derivative of `value` by x, zero where there is no dependence."""
    if not value.requires_grad:
        return torch.zeros_like(x)
    found = torch.autograd.grad(value, x, create_graph=graph, retain_graph=True, allow_unused=True)[0]
    return torch.zeros_like(x) if found is None else found


def line_difference(f: Function, weights: Weights, v: Weights, w: Weights) -> Taylor:
    """By differences of z'[v] (see `_richardson`), for modules that have first derivatives only."""
    return Taylor(f(weights), _push(f, weights, v), _richardson(f, weights, v, w)[0])


LINES: dict[str, Line] = {"forward": line_forward, "reverse": line_reverse, "difference": line_difference}


def _richardson(f: Function, weights: Weights, v: Weights, w: Weights) -> tuple[Tensor, float]:
    """z''[v, w] by central differences at h and h / 2 extrapolated to h = 0, and an estimate of its relative error.

    h moves the weights by eps^(1/4) of their norm, where the errors of truncation, h^4, and rounding, eps / h, are both
    small.
    """
    step = _scale(weights, w) * _precision(weights) ** 0.25
    coarse, fine = (_central(f, weights, v, w, h) for h in (step, step / 2))
    found = (4 * fine - coarse) / 3
    return found, _relative(fine, found)


def _central(f: Function, weights: Weights, v: Weights, w: Weights, step: float) -> Tensor:
    ahead, behind = ({n: p + h * w[n] for n, p in weights.items()} for h in (step, -step))
    return (_push(f, ahead, v) - _push(f, behind, v)) / (2 * step)


def _push(f: Function, weights: Weights, v: Weights) -> Tensor:
    """z'[v] in forward mode, or in reverse mode where that is missing."""
    try:
        return push_forward(f, weights, v)
    except RuntimeError:
        return push_transposed(f, weights, v)


def _precision(weights: Weights) -> float:
    """Machine precision of the coarsest weights."""
    return max(torch.finfo(p.dtype).eps for p in weights.values())


def _norm(weights: Weights) -> float:
    return float(torch.stack([p.detach().double().square().sum() for p in weights.values()]).sum().sqrt())


def _scale(weights: Weights, w: Weights) -> float:
    """The multiple of w that moves the weights by their own norm (or by 1, if that is larger than their norm)."""
    return max(_norm(weights), 1.0) / (_norm(w) or 1.0)


def _relative(a: Tensor, b: Tensor, floor: float = 0.0) -> float:
    """|a - b| over the larger norm, or over `floor` where that is larger still; 0 for equal ones."""
    a, b = a.double(), b.double()
    gap = float((a - b).norm())
    return gap / max(float(a.norm()), float(b.norm()), floor) if gap else 0.0


@contextmanager
def _exact(function: EmbeddedOutputs) -> Iterator[None]:
    """The model frozen, and its operations such that they can be differentiated twice."""
    with function.map.frozen(), Decomposed():
        yield


class SecondOrder:
    """z, z'[v] and z''[v, w] at any point and along any directions, on fixed inputs.

    | route | a direction costs | needs |
    | --- | --- | --- |
    | forward | least | forward mode of forward mode |
    | reverse | more, and memory for nested graphs | reverse mode three times over |
    | difference | several first derivatives, half the digits, none at kinks | a first derivative |

    "auto" compares forward and reverse on the first batch, once, at construction. It takes forward where both agree,
    the one that differences of first derivatives support where they do not, reverse where forward mode is missing, and
    difference where neither runs and `allow_finite_difference` is set.

    Args:
        function: z on fixed inputs.
        theta: A point `[D]` for the comparison.
        survey: Rows and examples of every batch, when a pass has already counted them; otherwise one is made.
        route: "auto", "forward", "reverse" or "difference"; the latter three are not compared with anything.
        allow_finite_difference: Whether "auto" may end at "difference".
        chunk: Directions differentiated at once; memory grows with it.

    Attributes:
        route: The one in use.
        error: What is known about the relative error of z'' on the first batch: the gap between forward and reverse,
            the estimate of a difference, or NaN where nothing was compared.

    Raises:
        ValueError: Unknown route; or see `OutputMap.check`.
        NotImplementedError: A module lacks second derivatives; it is named.
        NotFiniteError: z'' is NaN or infinite at `theta`.

    Examples:
        >>> from fipgeo import OutputMap, as_batches
        >>> from fipgeo.outputs import Euclidean
        >>> net = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)).double()
        >>> z = EmbeddedOutputs(OutputMap(net), Euclidean(), as_batches(torch.ones(1, 1).double()))
        >>> theta = torch.tensor([2.0, 3.0]).double()  # z = theta_1 theta_2
        >>> [t.tolist() for t in SecondOrder(z, theta).taylor(theta, torch.ones(2).double())]
        [[6.0], [5.0], [2.0]]
    """

    def __init__(
        self,
        function: EmbeddedOutputs,
        theta: Tensor,
        *,
        survey: Survey | None = None,
        route: str = "auto",
        allow_finite_difference: bool = False,
        chunk: int = 8,
    ) -> None:
        if route not in ROUTES:
            raise ValueError(f"route: got {route!r}, expected one of {', '.join(map(repr, ROUTES))}")
        self.function, self.chunk, self.vectorised = function, chunk, True
        theta = self._checked("theta", theta, stacks=False)
        self.survey = function.survey(theta) if survey is None else survey
        self.route, self.error = self._choose(theta, route, allow_finite_difference)
        self._line = LINES[self.route]

    def taylor(self, theta: Tensor, v: Tensor, w: Tensor | None = None) -> Taylor:
        """z, z'[v] and z''[v, w] at a point, in one pass over the data.

        Args:
            theta: The point, `[D]`.
            v: Directions, `[D]` or `[k, D]`.
            w: The other directions of z'', shaped like v or `[D]`; v itself when None.
        """
        theta, v = self._checked("theta", theta, stacks=False), self._checked("v", v)
        other = v if w is None else self._checked("w", w)
        if other.dim() > 1 and other.shape != v.shape:
            raise ValueError(f"w: got shape {list(other.shape)}, expected [{v.shape[-1]}] or {list(v.shape)}")
        other = other.expand_as(v)
        map_ = self.function.map
        weights = {name: t.clone() for name, t in map_.named(theta).items()}  # see AutodiffRoot
        stack = map_.named(v.reshape(-1, v.shape[-1]))
        pair = (stack, stack if w is None else map_.named(other.reshape(-1, v.shape[-1])))
        with _exact(self.function):
            parts = [self._on(self.function.on(batch), weights, *pair) for batch in self.function.batches]
        value = torch.cat([part.value for part in parts])
        first, second = (torch.cat([part[i] for part in parts], -1) for i in (1, 2))
        shape = (*v.shape[:-1], len(value))
        return Taylor(value, first.reshape(shape), second.reshape(shape))

    def second(self, theta: Tensor, v: Tensor, w: Tensor | None = None) -> Tensor:
        """z''[v, w] alone (see `taylor`), `[N * M]` or `[k, N * M]`."""
        return self.taylor(theta, v, w).second

    def _on(self, f: Function, weights: Weights, v: Weights, w: Weights) -> Taylor:
        """One batch and a stack of directions: value `[rows]`, derivatives `[k, rows]`."""
        count = len(next(iter(v.values())))
        if count > 1 and self.vectorised and self.route == "forward":
            try:
                mapped: Callable[..., Any] = vectorised
                if v is w:
                    found = mapped(lambda a: self._line(f, weights, a, a), self.chunk)(v)
                else:
                    found = mapped(lambda pair: self._line(f, weights, *pair), self.chunk)((v, w))
                return Taylor(found[0][0], *found[1:])
            except (RuntimeError, ValueError) as error:
                log.info("directions are taken one at a time, since the model cannot be vectorised: %s", error)
                self.vectorised = False
        found = []
        for i in range(count):
            a = {n: t[i] for n, t in v.items()}
            found.append(self._line(f, weights, a, a if v is w else {n: t[i] for n, t in w.items()}))
        return Taylor(found[0].value, *(torch.stack(parts) for parts in list(zip(*found, strict=True))[1:]))

    def _checked(self, name: str, x: Tensor, *, stacks: bool = True) -> Tensor:
        space = self.function.map.space
        if x.shape[-1:] != (space.dim,) or x.dim() > (2 if stacks else 1):
            expected = f"[{space.dim}]" + (f" or [k, {space.dim}]" if stacks else "")
            raise ValueError(f"{name}: got shape {list(x.shape)}, expected {expected}")
        return x.detach().to(space.device, space.dtype)

    def _choose(self, theta: Tensor, route: str, allow: bool) -> tuple[str, float]:
        """The route to use, and what is known of its error, from the first batch."""
        f, weights = self.function.on(self.function.batches.first()), self.function.map.named(theta)
        draw = torch.randn(theta.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        v = self.function.map.named((draw / draw.norm()).to(theta) * (theta.norm() + 1))
        with _exact(self.function):
            found, failure = _attempts(("forward", "reverse") if route == "auto" else (route,), f, weights, v)
            if not found and allow and route == "auto":
                found, failure = _attempts(("difference",), f, weights, v)
            if not found:
                name = _last_module(self.function, lambda: line_forward(f, weights, v, v))
                raise NotImplementedError(
                    f"model: {name} has no second derivative ({failure}); replace it by a module that can be"
                    " differentiated twice, or pass allow_finite_difference=True for about half the digits"
                )
            name, error = next(iter(found)), float("nan")
            if len(found) == 2:
                name, error = _settled(found, f, weights, v)
            elif name == "difference":
                error = _richardson(f, weights, v, v)[1]
        if not bool(torch.isfinite(found[name].second).all()):
            raise NotFiniteError(
                "model: its outputs are finite, their second derivative is not; look for a square root, a norm or a"
                " division at zero in the forward"
            )
        return name, error


def _attempts(
    names: tuple[str, ...], f: Function, weights: Weights, v: Weights
) -> tuple[dict[str, Taylor], Exception | None]:
    """What those of the routes that run give, and what the first of the others said."""
    found: dict[str, Taylor] = {}
    failure: Exception | None = None
    for name in names:
        try:
            found[name] = LINES[name](f, weights, v, v)
        except RuntimeError as error:
            log.info("second derivatives by route %r are not available: %s", name, error)
            failure = failure or error
    return found, failure


def _settled(found: Mapping[str, Taylor], f: Function, weights: Weights, v: Weights) -> tuple[str, float]:
    """Forward if both routes agree, else the one that differences of first derivatives support; and the gap."""
    precision = _precision(weights) ** 0.5
    floor = precision * float(found["forward"].first.double().norm())
    gap = _relative(found["forward"].second, found["reverse"].second, floor)
    if gap <= min(8 * precision, 0.1):
        return "forward", gap
    expected = _richardson(f, weights, v, v)[0]
    gaps = {name: _relative(taylor.second, expected, floor) for name, taylor in found.items()}
    name = min(gaps, key=lambda n: gaps[n] if gaps[n] == gaps[n] else float("inf"))
    log.warning(
        "model: second derivatives by forward and by reverse mode differ by %.1e of their size; they are %.1e and %.1e"
        " away from differences of first derivatives, so %s mode is used",
        gap, gaps["forward"], gaps["reverse"], name,
    )  # fmt: skip
    return name, gaps[name]


def taylor(
    function: EmbeddedOutputs,
    theta: Tensor,
    v: Tensor,
    w: Tensor | None = None,
    *,
    survey: Survey | None = None,
    allow_finite_difference: bool = False,
) -> Taylor:
    """z, z'[v] and z''[v, w] once; for many points or directions make one `SecondOrder`, which compares routes once.

    Args:
        function: z on fixed inputs.
        theta: The point, `[D]`.
        v: Directions, `[D]` or `[k, D]`.
        w: The other directions of z'', shaped like v or `[D]`; v itself when None.
        survey: Rows and examples of every batch, when a pass has already counted them.
        allow_finite_difference: Whether differences of first derivatives may stand in where modules lack second ones.

    Raises:
        ValueError: Shapes; or see `OutputMap.check`.
        NotImplementedError: A module lacks second derivatives; it is named.
        NotFiniteError: z'' is NaN or infinite at `theta`.
    """
    made = SecondOrder(function, theta, survey=survey, allow_finite_difference=allow_finite_difference)
    return made.taylor(theta, v, w)


def second_derivative(
    function: EmbeddedOutputs,
    theta: Tensor,
    v: Tensor,
    w: Tensor | None = None,
    *,
    survey: Survey | None = None,
    allow_finite_difference: bool = False,
) -> Tensor:
    """z''[v, w] alone, `[N * M]` or `[k, N * M]` (see `taylor` for arguments and errors)."""
    return taylor(function, theta, v, w, survey=survey, allow_finite_difference=allow_finite_difference).second
