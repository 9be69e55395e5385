"""Small networks and data on which paths take milliseconds, and plain-torch oracles for what paths report."""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fipgeo import FirstOrder, GaussNewton, Method, MetricField, PathPoint, PathResult, Sparsity, StepControl, walk
from fipgeo.paths import Corrector, Kept

FEATURES, CLASSES = 5, 3
GAUSS_NEWTON = GaussNewton(steps=1, final_steps=2)
FIRST_ORDER = FirstOrder(steps=4, final_steps=8, batch_size=16, lr=0.01)
CORRECTORS = {"gauss-newton": GAUSS_NEWTON, "first-order": FIRST_ORDER}


def draw(seed: int, *shape: int) -> Tensor:
    """Standard normal entries."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(seed: int = 1, count: int = 40) -> Tensor:
    return draw(seed, count, FEATURES)


def labels(seed: int, count: int) -> Tensor:
    return torch.randint(CLASSES, (count,), generator=torch.Generator().manual_seed(seed))


def filled(model: nn.Module, seed: int) -> nn.Module:
    """The model with weights drawn from a seed, and BatchNorm statistics that are not those of a fresh layer."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 else 0.3
            p.copy_(scale * torch.randn(p.shape, generator=source, dtype=p.dtype))
        for m in model.modules():
            if isinstance(m, nn.BatchNorm1d) and m.running_mean is not None and m.running_var is not None:
                m.weight.add_(1)
                m.running_mean.copy_(0.2 * torch.randn(m.num_features, generator=source))
                m.running_var.copy_(0.5 + torch.rand(m.num_features, generator=source))
    return model


def mlp(seed: int = 0, *, hidden: int = 6, norm: bool = False, dropout: bool = False) -> nn.Sequential:
    """Linear, tanh, linear, in eval mode; the norm and the dropout sit between."""
    layers: list[nn.Module] = [nn.Linear(FEATURES, hidden)]
    layers += [nn.BatchNorm1d(hidden)] if norm else []
    layers += [nn.Tanh()]
    layers += [nn.Dropout(0.5)] if dropout else []
    model = nn.Sequential(*layers, nn.Linear(hidden, CLASSES))
    filled(model, seed)
    return model.eval()


def weight_names(model: nn.Module) -> list[str]:
    """Names of the matrices."""
    return [name for name, p in model.named_parameters() if p.dim() > 1]


def kept_of(model: nn.Module, x: Any, geometry: str = "logits", **options: Any) -> Kept:
    """The model's function on x, as correctors see it."""
    field = MetricField(model, x, geometry, **options)
    return Kept.of(field.function, field.map.point())


def method(corrector: Corrector = GAUSS_NEWTON, **options: Any) -> Method:
    """Large steps, little work."""
    control = StepControl(initial=0.3, smallest=0.05, largest=0.5, tolerance=0.05)
    damping = 1e-2 if isinstance(corrector, GaussNewton) else None
    return Method(**({"control": control, "corrector": corrector, "damping": damping} | options))


def sparse_path(
    model: nn.Module,
    x: Any,
    target: float | tuple[float, ...] = 0.5,
    *,
    corrector: Corrector = GAUSS_NEWTON,
    exclude: str | list[str] | None = None,
    geometry: str = "logits",
    options: Mapping[str, Any] | None = None,
    **walking: Any,
) -> PathResult:
    """A sparse path with few random directions a step; `options` go to the method, the rest to `walk`."""
    field = MetricField(model, x, geometry)
    objective = Sparsity(target, exclude, samples=2)
    return walk(field, objective, method(corrector, **(options or {})), **walking)


def stored(point: PathPoint) -> Mapping[str, Tensor]:
    """The tensors of a point that has some."""
    assert point.tensors is not None
    return point.tensors


def zeros(tensors: Mapping[str, Tensor] | None, names: list[str]) -> int:
    assert tensors is not None
    return sum(int((tensors[name] == 0).sum()) for name in names)


def loaded(model: nn.Module, tensors: Mapping[str, Tensor] | None) -> nn.Module:
    """A copy of the model in eval mode that holds these weights and buffers, by torch's own means."""
    assert tensors is not None
    other = copy.deepcopy(model)
    report = other.load_state_dict(dict(tensors), strict=False)
    assert not report.unexpected_keys
    return other.eval()


def centred(outputs: Tensor) -> Tensor:
    return outputs - outputs.mean(-1, keepdim=True)


@torch.no_grad()
def verdict_by_hand(start: nn.Module, end: nn.Module, x: Tensor) -> tuple[float, float, float]:
    """Distance, drift and share of changed predictions in centred logits, with plain torch."""
    f, f0 = end.eval()(x), start.eval()(x)
    z, z0 = centred(f), centred(f0)
    distance = math.sqrt(float((z - z0).square().sum(1).mean()))
    spread = math.sqrt(float((z0 - z0.mean(0)).square().sum(1).mean()))
    return distance, distance / spread, float((f.argmax(1) != f0.argmax(1)).double().mean())


def jacobian_by_backward(model: nn.Module, x: Tensor, embedding: Any = centred) -> Tensor:
    """R `[N * M, D]` in the order of `model.parameters()`, one backward pass a row."""
    parameters = list(model.parameters())
    z = embedding(model(x)).reshape(-1)
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in z]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def same_paths(a: PathResult, b: PathResult) -> None:
    """Both paths agree bit for bit in everything but wall time."""
    assert (len(a), a.outcome, a.objective_name, a.maximise, a.budget) == (
        *(len(b), b.outcome, b.objective_name),
        *(b.maximise, b.budget),
    )
    for p, q in zip(a, b, strict=True):
        one, two = p.to_dict() | {"seconds": 0.0}, q.to_dict() | {"seconds": 0.0}
        assert repr(one) == repr(two)
        same_tensors(p.tensors, q.tensors)
    assert a.state.keys() == b.state.keys()
    for key, value in a.state.items():
        if isinstance(value, Tensor):
            assert same_bits(value, b.state[key]), key
        elif key != "seconds":
            assert value == b.state[key], key


def same_tensors(a: Mapping[str, Tensor] | None, b: Mapping[str, Tensor] | None) -> None:
    if a is None or b is None:
        assert a is b
        return
    assert a.keys() == b.keys()
    assert [n for n in a if not same_bits(a[n], b[n])] == []


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal in dtype, shape and every bit (0 and -0 differ)."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.contiguous().numpy().tobytes() == b.contiguous().numpy().tobytes()
