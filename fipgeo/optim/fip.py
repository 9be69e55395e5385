r"""Gradient descent with momentum in the damped metric of a function that is to stay.

    u = beta u + mu (g + mu)^{-1} (-grad)        theta <- theta + lr u        g the metric of the protected function

and now and then theta <- theta - R^T (R R^T + N mu)^{-1} r, the Gauss-Newton move that takes back what the protected
outputs have changed, r.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fipgeo.data import Generator
from fipgeo.linalg import as_generator
from fipgeo.optim.coordinates import Coordinates, first_field, present, protect
from fipgeo.optim.frame import Frame
from fipgeo.paths import Position


class _Moving(NamedTuple):
    """A parameter that has a gradient, its group, and which tensor of the weight space it is, if any."""

    param: Tensor
    group: dict[str, Any]
    name: str | None


class FIP(torch.optim.Optimizer):
    r"""SGD with momentum that leaves the outputs on old inputs where they are.

    With g = R^T R / N the metric of the protected function, a step is

        d = mu (g + mu)^{-1} (-grad - weight_decay theta),      d <- d min(1, clip / |d|)
        u = momentum u + d,                                     theta <- theta + lr u

    Directions that the protected outputs feel are damped and free ones pass: `damping=math.inf` is `torch.optim.SGD`,
    and for `damping` -> 0 the protected outputs do not change in first order. Every `correct_every` steps the
    Gauss-Newton move -R^T (R R^T + N mu)^{-1} r takes back what they have changed in second order; it is kept if the
    residual r falls. The metric is made anew every `refresh` steps, and the velocity u is passed through it then. It is
    also made anew when parameters get gradients that had none, or the reverse.

    Which weights move: those that are handed in and have a gradient, as in every torch optimiser. Other weights of the
    protected model stay, and moves that take changes back do not use them. Parameters that do not belong to the
    protected model, such as a new head, get plain SGD steps. Tied weights count once.

    Learning rate, momentum, weight decay and `maximize` may differ from group to group. The metric knows the ratios of
    the learning rates, so that the protected outputs stay whatever they are; with unlike momenta the velocity is passed
    through the metric at every step for the same purpose. The norm that `clip` bounds is that of all parameters.

    What is protected is looked at in eval mode under the BatchNorm statistics of the time; the reference is that of the
    start. If the model trains in train mode, its statistics move and the protected outputs with them, which corrections
    then work against: keep normalisation layers in eval mode where old outputs matter.

    `state_dict()` holds all it takes to go on as if nothing had happened: velocities, step counts, the state of the
    generator, the point and statistics at which the present metric was made, and (where `keep` has fields) the weights
    and statistics at which their outputs were taken. Loading makes metric and reference anew from these, bit for bit.
    The inputs themselves, and functions that were handed in ready-made, are yours to hand in again.

    Args:
        params: Parameters, (name, parameter) pairs or parameter groups, as for every torch optimiser.
        keep: What is to stay: a `MetricField` (its model's present outputs on its inputs), a protected function
            (`Kept`, a sketch, `Several`), or a list of them.
        lr: Learning rate.
        momentum: Heavy-ball coefficient.
        damping: mu as a multiple of the mean non-zero eigenvalue of the metric: smaller keeps more and learns less; 0
            for its null space, `math.inf` or None for no metric.
        clip: Steps d longer than this are shortened to it.
        weight_decay: Weight of |theta|^2 / 2 in the loss.
        refresh: Steps that share a metric.
        max_rows: Embedded outputs in a metric; more protected inputs than that are sampled anew for every metric.
        correct_every: Steps between corrections; 0 for none, as always where what is kept is affine in the weights
            (sketches): there is no second order to take back.
        maximize: Whether to climb.
        generator: Source of the draws of rows; None for a fixed seed.

    Raises:
        TypeError: `keep` is nothing that can be protected.
        ValueError: A number is out of its range, or a parameter belongs to the protected model but not to the space of
            its metric.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from fipgeo import MetricField
        >>> seeded = torch.Generator().manual_seed(0)
        >>> old, x = torch.randn(8, 6, generator=seeded), 2 + torch.randn(32, 6, generator=seeded)
        >>> net = nn.Sequential(nn.Linear(6, 24), nn.Tanh(), nn.Linear(24, 2))
        >>> before = net(old).detach()
        >>> optimizer = FIP(net.parameters(), MetricField(net, old, "euclidean"))
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     loss = nn.functional.mse_loss(net(x), torch.ones(32, 2))
        ...     loss.backward()
        ...     optimizer.step()
        >>> loss.item() < 0.1, (net(old) - before).abs().max().item() < 0.1
        (True, True)
    """

    def __init__(
        self,
        params: Iterable[Any],
        keep: Any,
        *,
        lr: float = 0.05,
        momentum: float = 0.9,
        damping: float | None = 1e-2,
        clip: float = 1.0,
        weight_decay: float = 0.0,
        refresh: int = 10,
        max_rows: int = 1024,
        correct_every: int = 5,
        maximize: bool = False,
        generator: Generator = None,
    ) -> None:
        self.damping = math.inf if damping is None else damping
        self.clip, self.refresh, self.max_rows, self.correct_every = clip, refresh, max_rows, correct_every
        for name, value, fits, expected in (
            ("damping", self.damping, self.damping >= 0, "0 (null space), a positive number, or None for no metric"),
            ("clip", clip, clip > 0, "a positive length, or math.inf for no bound"),
            ("refresh", refresh, refresh >= 1, "at least 1 step"),
            ("max_rows", max_rows, max_rows >= 1, "at least 1 row"),
            ("correct_every", correct_every, correct_every >= 0, "a number of steps, or 0 for no corrections"),
        ):
            if not fits:
                raise ValueError(f"{name}: got {value}, expected {expected}")
        self.generator = as_generator(generator)
        self._given, self._field = keep, first_field(keep)
        self._start = None if self._field is None else present(self._field)
        self.keep = protect(keep, self._start)
        self._coordinates = Coordinates(self.keep)
        self._names: dict[Tensor, str | None] = {}
        self._frame: Frame | None = None
        self._held: dict[str, Any] | None = None
        self.steps, self._age = 0, 0
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "maximize": maximize})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; the metric knows them from their first gradient on.

        Args:
            param_group: "params", and what differs from the defaults.

        Raises:
            ValueError: A number is out of its range, or a parameter fits nothing (see the class).
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            for key, least, most in (("lr", 0, math.inf), ("momentum", 0, 1), ("weight_decay", 0, math.inf)):
                if not least <= float(group[key]) < most:
                    raise ValueError(f"{key}: got {group[key]}, expected a number in [{least}, {most})")
            called = group.get("param_names", [None] * len(group["params"]))
            found = [(p, self._coordinates.add(p, n)) for p, n in zip(group["params"], called, strict=True)]
        except ValueError:
            self.param_groups.pop()
            raise
        self._names.update(found)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step from the gradients of the parameters; those without a gradient stay.

        Args:
            closure: Evaluates the model anew and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            ValueError: A gradient is NaN or infinite; nothing has changed then.
            NotFiniteError: The protected outputs are not finite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [
            _Moving(p, group, self._names[p])
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if moving:
            with torch.autocast(moving[0].param.device.type, enabled=False):
                self._move(moving)
        return loss

    def _move(self, moving: list[_Moving]) -> None:
        """Step and, when it is time, correction."""
        wishes = [self._wish(entry) for entry in moving]
        frame = self._renewed(moving)
        steps = self._passed(frame, moving, wishes)
        size = math.sqrt(sum(float(step.double().square().sum()) for step in steps))
        factor = min(1.0, self.clip / size) if size else 1.0
        moments = [float(entry.group["momentum"]) for entry in moving]
        memory = [m * self._velocity(entry) for m, entry in zip(moments, moving, strict=True)]
        if len({m for m, entry in zip(moments, moving, strict=True) if entry.name is not None}) > 1:
            memory = self._passed(frame, moving, memory)
        for entry, old, step in zip(moving, memory, steps, strict=True):
            velocity = old + factor * step
            self.state[entry.param]["momentum_buffer"] = velocity
            _add(entry.param, float(entry.group["lr"]) * velocity)
        self.steps, self._age = self.steps + 1, self._age + 1
        if frame is not None and self.correct_every and not self.keep.affine and self.steps % self.correct_every == 0:
            self._correct(frame)

    def _wish(self, entry: _Moving) -> Tensor:
        """The displacement that the loss asks for, -grad with weight decay."""
        param, group, name = entry
        grad = param.grad
        assert grad is not None
        grad = (grad.to_dense() if grad.layout != torch.strided else grad).to(self._dtype(param))
        if not math.isfinite(float(grad.sum())) and not bool(torch.isfinite(grad).all()):
            what = f" of {name!r}" if name is not None else f" of a parameter of shape {list(param.shape)}"
            raise ValueError(
                f"grad: the gradient{what} is NaN or infinite; skip this step (torch.amp.GradScaler does), or lower lr"
            )
        wish = grad if group["maximize"] else -grad
        return wish - float(group["weight_decay"]) * param.to(wish.dtype) if group["weight_decay"] else wish

    def _passed(self, frame: Frame | None, moving: list[_Moving], wishes: list[Tensor]) -> list[Tensor]:
        """Wishes through the metric; those of parameters that it does not know as they are."""
        if frame is None:
            return wishes
        known = {e.name: wish for e, wish in zip(moving, wishes, strict=True) if e.name in frame.rates}
        answer = frame.passed(self._coordinates.flat({name: w for name, w in known.items() if name is not None}))
        return [
            wish if e.name is None or e.name not in known else self._coordinates.part(answer, e.name)
            for e, wish in zip(moving, wishes, strict=True)
        ]

    def _renewed(self, moving: list[_Moving]) -> Frame | None:
        """The metric for this step: the one at hand, the one of a loaded state, or a new one."""
        rates = {e.name: float(e.group["lr"]) for e in moving if e.name is not None}
        top = max(rates.values(), default=0.0)
        rates = {name: rate / top if top else 1.0 for name, rate in rates.items() if rate or not top}
        if not rates:
            return None
        if self._held is not None:
            after, draw = self.generator.get_state(), self._held["draw"]
            self.generator.set_state(draw)
            self._frame = self._made(self._held["position"], self._held["rates"])
            self.generator.set_state(after)
            self._held = None
        if self._frame is not None and self._age < self.refresh and self._frame.rates.keys() == rates.keys():
            return self._frame
        buffers = {} if self._field is None else self._field.map.normalisation()
        frame = self._made(Position(self._coordinates.theta(), buffers), rates)
        velocities = [self._velocity(entry) for entry in moving]
        if self._frame is not None:
            for entry, velocity in zip(moving, self._passed(frame, moving, velocities), strict=True):
                self.state[entry.param]["momentum_buffer"] = velocity
        self._frame, self._age = frame, 0
        return frame

    def _made(self, position: Position, rates: dict[str, float]) -> Frame:
        return Frame(
            self.keep,
            self._coordinates,
            position,
            rates,
            damping=self.damping,
            max_rows=self.max_rows,
            generator=self.generator,
        )

    def _correct(self, frame: Frame) -> None:
        """The Gauss-Newton move, if the residual falls by it."""
        here = Position(self._coordinates.theta())
        residual = frame.part.residual(here)
        move = frame.correction(residual)
        there = Position(here.theta + move)
        if frame.part.loss(there) < float(residual.double().square().sum()) / frame.part.num_examples:
            for name in frame.rates:
                _add(self._coordinates.params[name], self._coordinates.part(move, name))

    def _velocity(self, entry: _Moving) -> Tensor:
        """The velocity of a parameter; zero before its first step."""
        found = self.state[entry.param].get("momentum_buffer")
        return torch.zeros_like(entry.param, dtype=self._dtype(entry.param)) if found is None else found

    def _dtype(self, param: Tensor) -> torch.dtype:
        """What is calculated in: that of the weight space, or the parameter's own where it is wide enough."""
        if self._names[param] is not None:
            return self._coordinates.space.dtype
        return torch.promote_types(param.dtype, torch.float32)

    def state_dict(self) -> dict[str, Any]:
        """Velocities and groups as every optimiser has them, and under "metric" what the metric was made from."""
        made, start = self._held, self._start
        if self._frame is not None:
            made = {"position": self._frame.position, "rates": self._frame.rates, "draw": self._frame.draw}
        metric = {
            "steps": self.steps,
            "age": self._age,
            "generator": self.generator.get_state(),
            "start": None if start is None else (start.theta, dict(start.buffers)),
            "made": made and made | {"position": (made["position"].theta, dict(made["position"].buffers))},
        }
        return super().state_dict() | {"metric": metric}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a saved state; without the entry "metric" the next step makes a new one.

        Args:
            state_dict: From `state_dict()` of an optimiser with the same parameters, `keep` and arguments.

        Raises:
            ValueError: It belongs to other parameters.
        """
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, own, strict=True):
            velocity = state_dict["state"].get(index, {}).get("momentum_buffer")
            if velocity is not None:  # torch casts it to the parameter's dtype, which can be narrower
                self.state[param]["momentum_buffer"] = velocity.to(param.device, self._dtype(param), copy=True)
        metric = state_dict.get("metric") or {"steps": 0, "age": 0, "generator": None, "start": None, "made": None}
        self.steps, self._age, self._frame, self._held = metric["steps"], metric["age"], None, None
        if metric["generator"] is not None:
            self.generator.set_state(metric["generator"].cpu())
        if metric["start"] is not None and self._field is not None:
            self._start = self._position(*metric["start"])
            self.keep = protect(self._given, self._start)
        if metric["made"] is not None:
            made = metric["made"]
            self._held = dict(made) | {"position": self._position(*made["position"]), "draw": made["draw"].cpu()}

    def _position(self, theta: Tensor, buffers: dict[str, Tensor]) -> Position:
        """A saved position on the device of the space."""
        space = self._coordinates.space
        if theta.shape != (space.dim,):
            raise ValueError(
                f"state_dict: it was saved for D = {theta.numel()} weights, but what is kept depends on {space.dim};"
                " load it into an optimiser whose keep is that of the saved one"
            )
        moved = {name: t.to(space.device, copy=True) for name, t in buffers.items()}
        return Position(theta.to(space.device, space.dtype, copy=True), moved)


def _add(param: Tensor, step: Tensor) -> None:
    """Param += step, in the wider of the two dtypes."""
    param.copy_(param.to(step.dtype) + step)
