"""The boundary to user modules: outputs as a pure function of named weights.

The only file that touches `nn.Module`, its modes and torch's backends. Outside it a model is `OutputMap`: a function of
weights and a batch whose value is a tuple of float tensors, examples first.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import batch_norm

from fipgeo.checkpointing import CheckpointError, CheckpointWatch
from fipgeo.data import preserved_rng, stir
from fipgeo.space import ALGEBRA_DTYPES, WeightSpace, Where
from fipgeo.trees import OutputError, copied, floats, in_dtype, input_tensors, output_tensors

ForwardFn = Callable[[nn.Module, Any], Any]
OutputFn = Callable[[Any], Any]


def default_forward(module: nn.Module, batch: Any) -> Any:
    """Call the module on a batch: a mapping as keywords, x of `(x, y)` or `(x,)`, anything else as it is.

    Raises:
        ValueError: A list or tuple of more than two entries, of which it is not clear what the model takes.
    """
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, list | tuple):
        entries = len(batch)
        if entries > 2:
            raise ValueError(
                f"inputs: a batch has {entries} entries, expected x or (x, y); say what the model takes, with"
                " forward_fn=lambda model, batch: model(batch[0], batch[1])"
            )
        return default_forward(module, batch[0])
    return module(batch)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside data-parallel and compile wrappers.

    Raises:
        NotImplementedError: The module is sharded (FSDP).
    """
    kind = type(module).__name__
    if kind == "FullyShardedDataParallel":
        raise NotImplementedError(
            "model: FSDP modules are not supported; gather the full parameters into a plain module"
        )
    if kind in ("DistributedDataParallel", "DataParallel"):
        return unwrapped(module.module)  # type: ignore[arg-type]
    inner = getattr(module, "_orig_mod", None)
    return unwrapped(inner) if isinstance(inner, nn.Module) else module


class _Caller(nn.Module):
    """Holds the user's module so that `functional_call` swaps its tensors whatever its signature is."""

    def __init__(self, module: nn.Module, forward_fn: ForwardFn, output_fn: OutputFn | None) -> None:
        super().__init__()
        self.module, self.forward_fn, self.output_fn = module, forward_fn, output_fn

    def forward(self, batch: Any) -> Any:
        raw = self.forward_fn(self.module, batch)
        return raw if self.output_fn is None else self.output_fn(raw)


class OutputMap:
    """F: weights and a batch to outputs, for any module.

    Evaluation is always in eval mode (BatchNorm uses its running statistics, dropout is off), without autocast, and
    with torch's plain attention and recurrent kernels, which have derivatives of every kind. Modes, attributes, random
    streams, buffers, backends and the batch are as before afterwards, also on exceptions.

    Args:
        module: Any module; wrappers of `DistributedDataParallel` and `torch.compile` are looked through.
        params: Which parameters are coordinates (see `WeightSpace.of`).
        forward_fn: (module, batch) -> raw outputs; `default_forward` when None. Moves to a device belong here.
        output_fn: raw outputs -> a float tensor, or a tuple or mapping of them, each with examples first. When None,
            `.logits` (or the entry "logits") is taken if there is one, else every tensor of the structure.
        dtype: torch.float32 or torch.float64 to evaluate the whole model in it: its weights, its buffers and the
            floating tensors of the inputs are cast, in copies. None for the module's own dtypes.

    Examples:
        >>> net = nn.Linear(3, 2)
        >>> F = OutputMap(net)
        >>> F(F.space.point(net), torch.zeros(5, 3))[0].shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        module: nn.Module,
        params: Where = None,
        *,
        forward_fn: ForwardFn | None = None,
        output_fn: OutputFn | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(module, nn.Module):
            raise TypeError(f"model: got {type(module).__name__}, expected a torch.nn.Module")
        if dtype is not None and dtype not in ALGEBRA_DTYPES:
            raise ValueError(f"dtype: got {dtype}, expected torch.float32, torch.float64 or None (the model's own)")
        self.module = unwrapped(module)
        space = WeightSpace.of(self.module, params)
        self.space, self.dtype = (space if dtype is None else replace(space, dtype=dtype)), dtype
        self.caller = _Caller(self.module, forward_fn or default_forward, output_fn)
        self.buffers: Mapping[str, Tensor] = {}
        self._recurrent = any(isinstance(m, nn.RNNBase) for m in self.module.modules())
        self._dtypes = {n: dtype or p.dtype for n, p in self.module.named_parameters() if n in space.shapes}
        _check_normalisation(self.module)

    def with_module(self, module: nn.Module) -> OutputMap:
        """The same map of another module of this kind, with all its parameters as coordinates."""
        calls = {"forward_fn": self.caller.forward_fn, "output_fn": self.caller.output_fn}
        return OutputMap(module, "*", **calls, dtype=self.dtype)

    def point(self) -> Tensor:
        """The module's present weights, a flat copy `[D]`."""
        return self.space.point(self.module)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A flat point or tangent `[..., D]` as tensors in the module's own dtypes, or in the one asked for."""
        with torch.inference_mode(False):  # so that what is made in that mode can be differentiated later
            return {name: t.to(self._dtypes[name]) for name, t in self.space.unravel(vector).items()}

    def __call__(self, theta: Tensor, batch: Any) -> tuple[Tensor, ...]:
        """Outputs at the flat point theta `[D]`: tensors `[n, ...]`, no gradient."""
        with self.frozen():
            return self.call(self.named(theta), batch)

    def with_buffers(self, buffers: Mapping[str, Tensor]) -> OutputMap:
        """The same map with some buffers (normalisation statistics) replaced; the module keeps its own."""
        other = copy.copy(self)
        other.buffers = dict(self.buffers) | dict(buffers)
        return other

    def call(self, weights: Mapping[str, Tensor], batch: Any) -> tuple[Tensor, ...]:
        """Outputs as a pure, differentiable function of named weights; call it inside `frozen()`."""
        return output_tensors(self.raw(weights, batch))

    def raw(self, weights: Mapping[str, Tensor], batch: Any) -> Any:
        """What the module returns, in its own structure, as `call` evaluates it; call it inside `frozen()`."""
        buffers = {n: self.buffers.get(n, b).clone() for n, b in self.module.named_buffers()}
        return torch.func.functional_call(self.caller, self._swap(weights, buffers), (copied(batch, self.dtype),))

    def tapped(
        self, weights: Mapping[str, Tensor], batch: Any, taps: list[str]
    ) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        """Outputs as `call` gives them, and the first tensor that each named module put out; inside `frozen()`."""
        found: dict[str, Tensor] = {}
        modules = dict(self.module.named_modules())
        unknown = [name for name in taps if name not in modules]
        if unknown:
            known = ", ".join(name for name in modules if name)
            raise ValueError(f"taps: the model has no module {unknown[0]!r}; its modules are {known}")

        def note(module: nn.Module, args: Any, out: Any, *, name: str) -> None:
            del module, args
            hidden = next(floats(out), None)
            if hidden is not None:
                found[name] = hidden

        hooks = [modules[name].register_forward_hook(partial(note, name=name)) for name in taps]
        try:
            outputs = self.call(weights, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs, [found[name] for name in taps if name in found]

    def blocks(self) -> list[str]:
        """Smallest modules with two or more weight matrices (residual blocks, attention, MLPs), the model left out."""
        count = {n: sum(p.dim() > 1 for p in m.parameters()) for n, m in self.module.named_modules() if n}
        large = [n for n, weights in count.items() if weights > 1]
        return [n for n in large if not any(other.startswith(n + ".") for other in large)]

    def _swap(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What `functional_call` is to put in place of the module's tensors."""
        rest = {n: p.detach() for n, p in self.module.named_parameters() if n not in weights}
        fixed = {n: in_dtype(t, self.dtype) for n, t in (rest | dict(buffers)).items()}
        return {f"module.{n}": t for n, t in (fixed | dict(weights)).items()}

    @property
    def normalisers(self) -> dict[str, nn.modules.batchnorm._BatchNorm]:
        """The BatchNorm modules by name."""
        kinds = nn.modules.batchnorm._BatchNorm
        return {name: m for name, m in self.module.named_modules() if isinstance(m, kinds)}

    def normalisation(self) -> dict[str, Tensor]:
        """Copies of the running means and variances of BatchNorm, by name."""
        buffers = dict(self.module.named_buffers()) | dict(self.buffers)
        names = [f"{n}.{key}".lstrip(".") for n in self.normalisers for key in ("running_mean", "running_var")]
        return {name: buffers[name].clone() for name in names}

    def statistics(self, theta: Tensor, batches: Iterable[Any]) -> dict[str, Tensor]:
        """BatchNorm means and variances re-estimated at theta: the averages over the batches, each counted once.

        Every layer sees inputs that the layers before it normalised by the batch at hand. Nothing is written.
        """
        found: dict[str, Tensor] = {}
        calls: Counter[str] = Counter()

        def note(module: nn.Module, args: tuple[Any, ...], *, name: str) -> None:
            del module
            x = args[0].detach()
            calls[name] += 1
            if x.numel() // x.shape[1] < 2:
                raise ValueError(
                    f"inputs: {name or 'the model'} got a batch with one value per channel, which has no variance;"
                    " BatchNorm statistics need larger batches"
                )
            mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
            batch_norm(x, mean, var, training=True, momentum=1.0)  # one call that takes less time than x.mean and x.var
            for key, value in {"running_mean": mean, "running_var": var}.items():
                full = f"{name}.{key}".lstrip(".")
                old = found.get(full, torch.zeros_like(value))
                found[full] = old + (value - old) / calls[name]

        hooks = [m.register_forward_pre_hook(partial(note, name=n)) for n, m in self.normalisers.items()]
        try:
            with self.frozen(batch_statistics=True):
                for batch in batches:
                    self.call(self.named(theta), batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @contextmanager
    def frozen(self, *, batch_statistics: bool = False) -> Iterator[None]:
        """Eval mode, plain kernels, no autograd graph, private random streams; everything restored on leaving.

        Restored are also the attributes of every module, so that activations or counters which a forward keeps on
        `self` stay the caller's, not tensors of ours.

        Args:
            batch_statistics: Let BatchNorm normalise by the batch at hand (its running statistics stay as they are).
        """
        before = [(m, dict(vars(m))) for m in self.module.modules()]
        live = set(map(id, self.normalisers.values())) if batch_statistics else set()
        with ExitStack() as stack:
            stack.enter_context(preserved_rng())
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            stack.enter_context(torch.autocast(self.space.device.type, enabled=False))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(_plain_kernels(self._recurrent))
            try:
                for m, _ in before:
                    m.training = id(m) in live
                    if isinstance(m, nn.Embedding):  # outputs do depend on that row; only torch's reverse mode says no
                        m.padding_idx = None
                yield
            finally:
                for m, attributes in before:
                    vars(m).clear()
                    vars(m).update(attributes)

    def check(self, batch: Any, theta: Tensor | None = None, *, twice: bool = True) -> tuple[Tensor, ...]:
        """Look at the model's behaviour on one batch, at theta or at its present weights; returns its outputs there.

        Args:
            batch: What the model gets.
            theta: The point.
            twice: Whether to evaluate again and compare; without it, on other random numbers than the next evaluation.

        Raises:
            ValueError: The forward fails, its outputs are not finite float tensors with examples first, it is random,
                it switches to train mode, or the batch lies on another device than the weights.
            CheckpointError: The forward uses reentrant checkpoints.
        """
        where = {str(t.device) for t in input_tensors(batch)} - {str(self.space.device)}
        if where and self.caller.forward_fn is default_forward:
            raise ValueError(
                f"inputs: the batch is on {sorted(where)[0]}, the weights on {self.space.device}; move the data, or"
                " pass forward_fn=lambda model, batch: model(batch.to(device))"
            )
        weights = self.named(self.point() if theta is None else theta)
        with self.frozen():
            stir(self.space.device)
            try:
                with torch.enable_grad(), CheckpointWatch():
                    raw = self.call(weights, batch)
            except (OutputError, CheckpointError):
                raise
            except Exception as error:
                raise ValueError(
                    f"model: the forward failed on the first batch{_describe(batch, self)}: {error}"
                ) from error
            outputs = self.checked(raw)
            gap = output_gap(outputs, self.call(weights, batch)) if twice else None
        if gap is not None:
            raise ValueError(
                f"model: its forward is random: two evaluations of one batch in eval mode differ by"
                f" {gap:.3g}; take the noise out (functional dropout needs training=self.training) or pass a"
                " forward_fn without it"
            )
        return outputs

    def checked(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The outputs of an evaluation, after a look at them and at the modes it left; inside the same `frozen()`.

        Raises:
            ValueError: They are not finite float tensors with examples first, or a module went to train mode.
        """
        found = _checked(outputs)
        live = [n or type(m).__name__ for n, m in self.module.named_modules() if m.training]
        if live:
            raise ValueError(
                f"model: its forward switches {live[0]!r} to train mode; the metric needs fixed batch statistics"
                " and no dropout, so take that switch out of the forward"
            )
        return found


def output_gap(outputs: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> float | None:
    """The largest difference of two evaluations, or None where it is no more than rounding."""
    for a, b in zip(outputs, again, strict=True):
        gap = (a - b).abs().max() if a.shape == b.shape else torch.tensor(float("inf"))
        if gap > 1e-4 * a.abs().max():
            return float(gap)
    return None


@contextmanager
def _plain_kernels(recurrent: bool) -> Iterator[None]:
    """Kernels with derivatives of every kind: no fused attention in eval mode, no oneDNN or cuDNN recurrent layers."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    libraries: tuple[Any, ...] = (torch.backends.mkldnn, torch.backends.cudnn)
    enabled = [library.enabled for library in libraries]
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for library in libraries if recurrent else ():
            library.enabled = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
        for library, state in zip(libraries, enabled, strict=True):
            library.enabled = state


class NotFiniteError(OutputError):
    """The model's outputs are NaN or infinite."""


def _checked(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    counts = [len(f) for f in outputs]
    if not outputs or len(set(counts)) != 1:
        raise OutputError(
            f"outputs: the tensors have {counts} examples on their first axis; expected one common number, examples"
            " first. Pass output_fn=lambda out: ... that picks or transposes them"
        )
    if counts[0] == 0:
        raise OutputError("inputs: the first batch holds 0 examples; expected at least one")
    for f in outputs:
        if not f.numel():
            raise OutputError(f"outputs: the model returned a tensor of shape {list(f.shape)}, which holds no value")
        bad = ~torch.isfinite(f)
        if bad.any():
            rows = bad.reshape(len(f), -1).any(-1).nonzero()
            raise OutputError(
                f"outputs: {int(bad.sum())} of {f.numel()} values are NaN or infinite (first at example"
                f" {int(rows[0])} of the batch); check the weights and the scale of the inputs"
            )
    return outputs


def _check_normalisation(module: nn.Module) -> None:
    for name, m in module.named_modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is None:
            raise ValueError(
                f"model: {name or type(m).__name__} is a BatchNorm that keeps no running statistics, so an output"
                " depends on the other examples of its batch even in eval mode; use track_running_stats=True and train"
            )


def _describe(batch: Any, output_map: OutputMap) -> str:
    """What the first batch holds, and the likely cure when its dtype does not fit the weights."""
    tensors = list(input_tensors(batch))
    if not tensors:
        return f" ({type(batch).__name__})"
    weights = next(iter(output_map._dtypes.values()))
    text = f" ({tensors[0].dtype} of shape {list(tensors[0].shape)}, weights {weights})"
    if tensors[0].is_floating_point() and tensors[0].dtype != weights:
        text += f"; convert the inputs with .to({weights})"
    elif not tensors[0].is_floating_point():
        text += f"; integer inputs suit embeddings only, images need .to({weights})"
    return text
