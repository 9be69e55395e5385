r"""Adversarial examples: inputs within a small box around given ones on which a loss is as large as can be found.

    x_0 in the box,   x_{t+1} = P(x_t + a sign grad_x loss(x_t)),   P the nearest point of the box

One step from the input itself is the fast gradient sign method (Goodfellow, Shlens & Szegedy 2015), several from
a random point are projected gradient descent (Madry et al. 2018). Random starts come from a generator of the caller's,
and the model is left as it was, its buffers and modes included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo.data import Generator
from fipgeo.linalg import as_generator
from fipgeo.model import OutputMap

__all__ = ["Attack", "fgsm", "pgd", "withstands"]

Losses = Callable[[Tensor], Tensor]
"""Inputs `[n, ...]` -> the loss of each `[n]`, or their mean or sum as a scalar."""


@dataclass(frozen=True)
class Attack:
    """Signed gradient steps within a box |x' - x| <= eps.

    Make one with `fgsm` or `pgd`. Inputs that were normalised, x = (pixel - mean) / std with one mean and one std for
    each channel (axis 1), are attacked in units of the pixels: |pixel' - pixel| <= eps, and bounds are those of pixels.

    Attributes:
        eps: Half the edge of the box.
        steps: Gradient steps.
        step: Length of a step in units of eps; None for 2.5 / steps, at most 1.
        restarts: Random starts, of which the worst example counts; it takes a loss of each example.
        random: Whether to start at a random point of the box; else at the input.
        mean: What was subtracted from the pixels, one number or one a channel.
        std: What they were divided by.
        bounds: Smallest and largest pixel value; None for no bound.

    Raises:
        ValueError: A number is out of its range.
    """

    eps: float
    steps: int = 20
    step: float | None = None
    restarts: int = 1
    random: bool = True
    mean: float | tuple[float, ...] = 0.0
    std: float | tuple[float, ...] = 1.0
    bounds: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        """Check the numbers."""
        if not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps: got {self.eps}, expected a number of at least 0, such as 2 / 255")
        for key in ("steps", "restarts"):
            if not getattr(self, key) >= 1:
                raise ValueError(f"{key}: got {getattr(self, key)}, expected at least 1")
        if self.step is not None and not self.step > 0:
            raise ValueError(f"step: got {self.step}, expected a positive multiple of eps, or None")
        if not all(s > 0 for s in _listed(self.std)):
            raise ValueError(f"std: got {self.std}, expected positive numbers")
        if self.bounds is not None and not self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds: got {self.bounds}, expected the smallest and the largest value, such as (0, 1)")

    @property
    def passes(self) -> int:
        """Gradients of an example, each a forward and a backward pass."""
        return self.steps * self.restarts

    def __call__(
        self,
        model: nn.Module,
        x: Tensor,
        y: Tensor | None = None,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        *,
        generator: Generator = None,
    ) -> Tensor:
        """Adversarial examples of a model, found in eval mode; the model and the random streams stay as they are.

        Args:
            model: Any module that takes x.
            x: Inputs `[n, ...]`.
            y: Targets; None for the classes that the model predicts at x.
            loss_fn: (outputs, y) -> loss of each example `[n]`, or a scalar; None for cross entropy.
            generator: Source of the random starts.

        Returns:
            Examples shaped like x, without a graph. With losses `[n]` each is the worst point that was met, with
            a scalar the last one.

        Raises:
            ValueError: x is no floating tensor of as many channels as mean and std, or a scalar loss comes with
                restarts.
        """
        with _still(model) as outputs:
            target = outputs(x).argmax(1) if y is None else y
            measure = _each if loss_fn is None else loss_fn
            return self.ascend(lambda at: measure(outputs(at), target), x, generator)

    def ascend(self, losses: Losses, x: Tensor, generator: Generator = None) -> Tensor:
        """The same for any function of the inputs, which must treat examples apart (see `__call__`)."""
        random, (low, high) = as_generator(generator), self.box(x)
        best, top, at = x.detach().clone(), None, x
        for _ in range(self.restarts):
            at = self.start(low, high, x, random)
            for _ in range(self.steps):
                loss, slope = _slope(losses, at)
                best, top = _worse(best, top, at, loss)
                at = self.moved(at, slope, low, high)
            if top is not None:
                with torch.no_grad():
                    best, top = _worse(best, top, at, losses(at))
            elif self.restarts > 1:
                raise ValueError("restarts: choosing the worst one takes the loss of each example `[n]`; got a scalar")
        return at if top is None else best

    def box(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Lower and upper limits, shaped like x; an x beyond the bounds is not moved further out.

        Raises:
            ValueError: x is no floating tensor of as many channels as mean and std.
        """
        if not (isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0):
            got = f"{x.dtype} of {x.dim()} axes" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x: got {got}, expected a floating tensor with examples first")
        x = x.detach()
        mean, std = (self._along(key, x) for key in ("mean", "std"))
        low, high = x - self.eps / std, x + self.eps / std
        if self.bounds is not None:
            floor, ceiling = ((b - mean) / std for b in self.bounds)
            low = torch.minimum(torch.maximum(low, floor), x)
            high = torch.maximum(torch.minimum(high, ceiling), x)
        return low, high

    def start(self, low: Tensor, high: Tensor, x: Tensor, random: torch.Generator) -> Tensor:
        """A random point of the box, or x."""
        if not self.random:
            return x.detach()
        share = torch.rand(x.shape, generator=random, dtype=x.dtype, device=random.device).to(x.device)
        return low + share * (high - low)

    def moved(self, at: Tensor, slope: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """One step up the slope, back into the box."""
        length = min(1.0, 2.5 / self.steps) if self.step is None else self.step
        reach = length * self.eps / self._along("std", at)
        return torch.clamp(at + reach * slope.sign(), low, high)

    def _along(self, key: str, x: Tensor) -> Tensor:
        """Mean or std, to be broadcast over x."""
        values = _listed(getattr(self, key))
        if len(values) > 1 and (x.dim() < 2 or x.shape[1] != len(values)):
            raise ValueError(f"{key}: got {len(values)} numbers for inputs of shape {list(x.shape)}; one a channel")
        shape = (1, -1, *[1] * (x.dim() - 2)) if len(values) > 1 else ()
        return torch.tensor(values, dtype=x.dtype, device=x.device).reshape(shape)


def fgsm(eps: float, *, random: bool = False, **options: Any) -> Attack:
    """One step of length eps: from the input, or with `random` from a random point of the box (Wong et al. 2020).

    Args:
        eps: Half the edge of the box.
        random: Whether to start at a random point.
        options: `mean`, `std` and `bounds` of `Attack`.

    Examples:
        >>> import torch
        >>> net, x = torch.nn.Linear(3, 2), torch.zeros(4, 3)
        >>> (fgsm(0.1)(net, x) - x).abs().max().item() <= 0.1 + 1e-6
        True
    """
    return Attack(eps, 1, 1.0, random=random, **options)


def pgd(eps: float, steps: int = 20, **options: Any) -> Attack:
    """Projected gradient steps from a random point of the box.

    Args:
        eps: Half the edge of the box.
        steps: How many.
        options: `step`, `restarts`, `random`, `mean`, `std` and `bounds` of `Attack`.

    Examples:
        >>> pgd(2 / 255, 10, bounds=(0, 1)).passes
        10
    """
    return Attack(eps, steps, **options)


def withstands(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, *, batch_size: int = 250, generator: Generator = None
) -> Tensor:
    """Which inputs are classified rightly, and stay so at every point that the attack meets.

    An input is left alone once it is misclassified, so that this costs less than making the examples, and finds no
    fewer errors than their last points do. Its mean is the accuracy under attack.

    Args:
        model: Takes x, returns scores `[n, C]`; kept in eval mode and restored.
        x: Inputs `[n, ...]`.
        y: Classes `[n]`.
        attack: Which; its loss is the cross entropy.
        batch_size: Inputs at a time.
        generator: Source of the random starts.

    Returns:
        Boolean `[n]`.

    Examples:
        >>> import torch
        >>> net, x = torch.nn.Linear(2, 2), torch.tensor([[1.0, 0.0], [1.0, 0.9]])
        >>> _ = net.load_state_dict({"weight": torch.eye(2), "bias": torch.zeros(2)})
        >>> withstands(net, x, torch.tensor([0, 0]), pgd(0.1)).tolist()
        [True, False]
    """
    random = as_generator(generator)
    out = torch.zeros(len(x), dtype=torch.bool, device=x.device)
    with _still(model) as scores:
        for part in torch.arange(len(x), device=x.device).split(batch_size):
            left = part[_right(scores(x[part]), y[part])]
            for _ in range(attack.restarts):
                left = _left(scores, x, y, attack, left, random)
            out[left] = True
    return out


def _left(
    scores: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, attack: Attack, left: Tensor, random: torch.Generator
) -> Tensor:
    """Those indices of inputs that one run of an attack does not turn."""
    at = attack.start(*attack.box(x[left]), x[left], random)
    for last in [False] * attack.steps + [True]:
        if not len(left):
            break
        with torch.set_grad_enabled(not last):
            at = at.detach().requires_grad_(not last)
            outputs = scores(at)
            stay = _right(outputs.detach(), y[left])
            if last or not bool(stay.any()):
                return left[stay]
            (slope,) = torch.autograd.grad(cross_entropy(outputs, y[left], reduction="sum"), at)
        left = left[stay]
        at = attack.moved(at.detach()[stay], slope[stay], *attack.box(x[left]))
    return left


def _right(outputs: Tensor, y: Tensor) -> Tensor:
    return outputs.argmax(1) == y


def _each(outputs: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(outputs, y, reduction="none")


def _listed(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return (float(value),) if isinstance(value, int | float) else tuple(value)


def _slope(losses: Losses, at: Tensor) -> tuple[Tensor, Tensor]:
    """Losses and their gradient by the inputs."""
    with torch.enable_grad():
        at = at.detach().requires_grad_()
        loss = losses(at)
        (slope,) = torch.autograd.grad(loss.sum(), at)
    return loss.detach(), slope


def _worse(best: Tensor, top: Tensor | None, at: Tensor, loss: Tensor) -> tuple[Tensor, Tensor | None]:
    """For each example the point with the larger loss; nothing is known of points with a scalar loss."""
    if loss.dim() == 0:
        return best, None
    if top is None:
        return at.detach(), loss
    higher = (loss > top).reshape(-1, *[1] * (at.dim() - 1))
    return torch.where(higher, at, best), torch.maximum(loss, top)


@contextmanager
def _still(model: nn.Module) -> Iterator[Callable[[Tensor], Any]]:
    """The model in eval mode as a function of its inputs, which leaves no trace in it (see `OutputMap`)."""
    function = OutputMap(model, "*")
    with function.frozen():
        weights = function.named(function.point())
        yield lambda x: function.raw(weights, x)
