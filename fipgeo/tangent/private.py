"""A tau that tells little of any one example: a convex fit with bounded gradients, and Gaussian noise on its result."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from fipgeo.data import ListBatches, as_batches, as_generator
from fipgeo.jacobian import MAX_BYTES, EmbeddedOutputs, JacobianRoot
from fipgeo.linalg import Function, cg
from fipgeo.model import ForwardFn, OutputFn, OutputMap
from fipgeo.outputs import Euclidean
from fipgeo.tangent.model import TangentModel

ROUNDING = 1e-4
"""Jacobian norms are taken larger by this share, so that rounding does not lift a clipped one over the bound."""

SOFTMAX_BOUND = math.sqrt(2)
"""No gradient of cross-entropy in the logits, p - e_y, is longer."""


@dataclass(frozen=True)
class Privacy:
    """What a private fit promises; nothing here depends on the examples but for their number.

    Attributes:
        epsilon: Of the guarantee.
        delta: Of the guarantee.
        sensitivity: How far one example can move tau, at most.
        sigma: Standard deviation of the noise in every coordinate.
        examples: n.
    """

    epsilon: float
    delta: float
    sensitivity: float
    sigma: float
    examples: int


def fit_private_(
    model: TangentModel,
    data: Any,
    *,
    epsilon: float,
    delta: float,
    bound: float = 1.0,
    ridge: float = 1e-2,
    slack: float = 0.01,
    generator: torch.Generator | int | None = None,
    batch_size: int | None = None,
    forward_fn: ForwardFn | None = None,
    output_fn: OutputFn | None = None,
    max_bytes: int = MAX_BYTES,
) -> Privacy:
    r"""Write an (epsilon, delta)-differentially private tau into a model: output perturbation of a convex fit.

        P(tau) = 1/n sum_i CE(f_0(x_i) + s_i J_i tau, y_i) + ridge |tau|^2,    s_i = min(1, bound / |J_i|_F)

    The gradient of cross-entropy in the logits, p - e_y, is no longer than sqrt 2, and no clipped Jacobian is larger
    than `bound`: each term is convex and L-Lipschitz in tau with L = sqrt(2) bound, by construction. (Square loss has
    no such constant: its gradient grows with tau.) P is strongly convex by lambda = 2 ridge, so that the minimisers of
    two data sets that differ in one example are 2 L / (n lambda) apart at most (Chaudhuri, Monteleoni & Sarwate 2011,
    Lemma 7 and Corollary 8; Wu et al. 2017 for minimisers that are not reached). The iteration ends at a tau with
    |grad P| <= slack L / n, which by strong convexity lies within slack L / (n lambda) of the minimiser. Together

        Delta = 2 (1 + slack) L / (n lambda)

    bounds how far the result moves, and noise N(0, sigma^2) in every coordinate makes it private, with the least sigma
    for which Phi(Delta/(2 sigma) - epsilon sigma/Delta) - e^epsilon Phi(-Delta/(2 sigma) - epsilon sigma/Delta) <=
    delta (`gaussian_noise`).

    Assumptions: neighbours are data sets of the same public size in which one example, its label included, is another;
    an output depends on its own example only; theta_0, the head and all options were chosen without these examples.
    The guarantee is for exact real numbers: noise is drawn in float64, and the low bits of floating-point noise are
    known to leak under attacks made for that (Mironov 2012). The size of the noise grows with the square root of the
    number of trained weights, so train few of them.

    Args:
        model: A tangent model; its tau is overwritten. Its outputs are logits `[n, C]`.
        data: Examples with labels, as `fit_square_` takes them; labels are integers.
        epsilon: Above 0.
        delta: Between 0 and 1; below 1 / n to mean anything.
        bound: Largest Frobenius norm of an example's Jacobian `[C, D]`, larger ones are scaled down to it. Choose it
            without these examples.
        ridge: Weight of |tau|^2, above 0.
        slack: Share of the sensitivity that is left to the solver.
        generator: Where the noise comes from. None draws a seed from the operating system, and nothing else is
            private: whoever knows the seed takes the noise off.
        batch_size: Examples in a batch when `data` is tensors.
        forward_fn: (module, batch) -> raw outputs, for a module with a signature of its own.
        output_fn: Raw outputs -> the logits `[n, C]`.
        max_bytes: Most memory that products may hold between iterations.

    Returns:
        What is promised. How well the fit went is not among it, since that is not private.

    Raises:
        ValueError: An option is out of its range, or outputs and labels are not `[n, C]` and `[n]`.
        RuntimeError: The minimiser was not reached; nothing is written then.

    Source: Chaudhuri, Monteleoni & Sarwate, Differentially Private Empirical Risk Minimization, JMLR 2011; Wu et al.,
    Bolt-on Differential Privacy, SIGMOD 2017 (arXiv 1606.04722); Balle & Wang, ICML 2018 (arXiv 1805.06530).

    Examples:
        >>> x, y = torch.eye(2).repeat(50, 1), torch.tensor([0, 1]).repeat(50)
        >>> model = TangentModel(torch.nn.Linear(2, 2), "weight")
        >>> made = fit_private_(model, (x, y), epsilon=2.0, delta=1e-3, bound=1.5, ridge=0.05)
        >>> round(made.sensitivity, 3), made.examples
        (0.429, 100)
    """
    for name, value, low in (("bound", bound, 0.0), ("ridge", ridge, 0.0), ("slack", slack, 0.0)):
        if not (value > low and math.isfinite(value)):
            raise ValueError(f"{name}: got {value}, expected a positive number")
    noise = gaussian_noise(epsilon, delta)
    names = frozenset(model.names)
    output_map = OutputMap(model.base, lambda n, _: n in names, forward_fn=forward_fn, output_fn=output_fn)
    function = EmbeddedOutputs(output_map, Euclidean(), as_batches(data, batch_size, "data"))
    problem = _Problem(function, bound, 2 * ridge, max_bytes)
    count = len(problem.labels)
    lipschitz = SOFTMAX_BOUND * bound
    sensitivity = 2 * (1 + slack) * lipschitz / (count * 2 * ridge)
    tau = problem.minimiser(slack * lipschitz / count)
    sigma = noise * sensitivity
    random = as_generator(secrets.randbits(63) if generator is None else generator)
    drawn = torch.randn(len(tau), generator=random, dtype=torch.float64, device=random.device)
    noisy = tau.double() + sigma * drawn.to(tau.device)
    model.assign_(model.space.unravel(noisy.to(model.space.dtype)))
    return Privacy(epsilon, delta, sensitivity, sigma, count)


def gaussian_noise(epsilon: float, delta: float) -> float:
    r"""The least standard deviation of Gaussian noise, in units of the sensitivity, that is (epsilon, delta)-private.

    With noise s the least delta is Phi(1/(2 s) - epsilon s) - e^epsilon Phi(-1/(2 s) - epsilon s), which falls as s
    grows; s is found by bisection and rounded up.

    Args:
        epsilon: Above 0.
        delta: Between 0 and 1.

    Raises:
        ValueError: An argument is out of its range.

    Source: Balle & Wang, Improving the Gaussian Mechanism for Differential Privacy, ICML 2018 (arXiv 1805.06530),
    Theorem 8.

    Examples:
        >>> round(gaussian_noise(1.0, 1e-5), 3)
        3.731
    """
    if not (epsilon > 0 and math.isfinite(epsilon)) or not 0 < delta < 1:
        raise ValueError(f"epsilon, delta: got {epsilon} and {delta}, expected epsilon > 0 and 0 < delta < 1")
    low, high = 1e-6, 1.0
    while _delta(epsilon, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _delta(epsilon, middle) > delta else (low, middle)
    return high


def _delta(epsilon: float, noise: float) -> float:
    """The least delta of Gaussian noise at a sensitivity of one."""
    near, far = 1 / (2 * noise) - epsilon * noise, -1 / (2 * noise) - epsilon * noise
    logs = torch.special.log_ndtr(torch.tensor([near, far], dtype=torch.float64)).tolist()
    return math.exp(logs[0]) - math.exp(epsilon + logs[1])


class _Problem:
    """Cross-entropy of clipped examples plus lambda / 2 |tau|^2, with the products that its minimiser needs."""

    def __init__(self, function: EmbeddedOutputs, bound: float, strength: float, max_bytes: int) -> None:
        theta = function.map.point()
        starts, labels, scales = [], [], []
        for batch, outputs in function.outputs(theta):
            starts.append(_logits(outputs, batch))
            labels.append(batch[1].to(starts[-1].device).long())
            rows = JacobianRoot(function.renewed(ListBatches([batch])), theta, max_bytes=max_bytes)
            norms = rows.gram().diagonal().reshape(starts[-1].shape).sum(1).clamp_min(0).sqrt()
            scales.append((bound / (norms * (1 + ROUNDING))).clamp(max=1.0))
        self.start, self.labels = torch.cat(starts), torch.cat(labels)
        self.scale = torch.cat(scales).to(self.start)[:, None]
        self.root = JacobianRoot(function, theta, max_bytes=max_bytes)
        self.root.prepare()
        self.strength = strength
        self.targets = one_hot(self.labels, self.start.shape[1]).to(self.start)

    def moved(self, tau: Tensor) -> Tensor:
        """What tau does to the outputs, clipped, `[n, C]`."""
        return self.scale * self.root(tau).reshape(self.start.shape)

    def pulled(self, u: Tensor) -> Tensor:
        """The transpose of `moved`."""
        return self.root.adjoint((self.scale * u).reshape(-1))

    def value(self, change: Tensor, tau: Tensor) -> float:
        """P, from what tau does to the outputs."""
        loss = cross_entropy((self.start + change).double(), self.labels)
        return float(loss + self.strength / 2 * tau.double().square().sum())

    def minimiser(self, tolerance: float, max_iters: int = 100) -> Tensor:
        """A tau at which the gradient is no longer than the tolerance, by Newton's method with a line search."""
        count = len(self.labels)
        tau = torch.zeros(self.root.shape[1], dtype=self.root.dtype, device=self.root.device)
        change = torch.zeros_like(self.start)
        for _ in range(max_iters):
            p = (self.start + change).softmax(1)
            gradient = self.pulled(p - self.targets) / count + self.strength * tau
            if float(gradient.double().norm()) <= tolerance:
                return tau
            system = Function(
                self._curvature(p), None, (len(tau), len(tau)), dtype=tau.dtype, device=tau.device, psd=True
            )
            step = cg(system, -gradient, damping=self.strength, rtol=0.1).value
            pushed, slope, length = self.moved(step), float(gradient.double() @ step.double()), 1.0
            before = self.value(change, tau)
            while self.value(change + length * pushed, tau + length * step) > before + 0.1 * length * slope:
                length /= 2
                if length < 1e-6:
                    break
            tau = tau + length * step
            change = self.moved(tau)
        raise RuntimeError(
            f"data: the gradient did not fall to {tolerance:.2g} in {max_iters} Newton steps, so the noise would not"
            " cover it; use a larger ridge or slack, or a model in float64"
        )

    def _curvature(self, p: Tensor) -> Callable[[Tensor], Tensor]:
        """Products with the Hessian of the mean loss at probabilities p, for stacks `[k, D]`."""
        count = len(p)

        def product(x: Tensor) -> Tensor:
            def one(v: Tensor) -> Tensor:
                u = self.moved(v)
                return self.pulled(p * u - p * (p * u).sum(1, keepdim=True)) / count

            return torch.stack([one(v) for v in x])

        return product


def _logits(outputs: tuple[Tensor, ...], batch: Any) -> Tensor:
    """The logits `[n, C]` of a batch with labels `[n]`."""
    labelled = isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor)
    if len(outputs) != 1 or outputs[0].dim() != 2:
        raise ValueError(
            f"data: the module returned shapes {[list(f.shape) for f in outputs]}; expected logits [n, C], which"
            " output_fn=lambda out: ... picks"
        )
    if not labelled or batch[1].shape != outputs[0].shape[:1] or batch[1].is_floating_point():
        raise ValueError(f"data: expected batches (x, y) with integer classes y of shape [{len(outputs[0])}]")
    return outputs[0]
