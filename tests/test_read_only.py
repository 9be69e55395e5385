"""Every public function that only reads, on a network in train mode: no trace, in any context, also when it fails."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fipgeo import (
    Metric,
    MetricField,
    OutputMap,
    WeightSpace,
    as_batches,
    basis,
    channel_groups,
    geodesic,
    grow_head,
    metric,
)
from fipgeo.attacks import fgsm, pgd, withstands
from fipgeo.between import Plane, project
from fipgeo.memory import LayerSketch, Sketch, select

from . import oracles
from .hygiene import unchanged
from .models import CASES, build


def ready(module: nn.Module, data: Any, engine: str = "auto") -> tuple[Metric, Tensor]:
    """A metric and a vector."""
    g = metric(module, data, engine=engine)
    return g, torch.linspace(-1, 1, g.dim)


def on_metric(use: Callable[[Metric, Tensor], Any], engine: str = "auto") -> Callable[[nn.Module, Any], Any]:
    return lambda module, data: use(*ready(module, data, engine))


def pulled(make: Callable[[WeightSpace], Any]) -> Callable[[nn.Module, Any], Any]:
    return lambda module, data: metric(module, data).pullback(make(WeightSpace.of(module))).spectrum(2)


def in_one(data: Any) -> Tensor:
    """The inputs as one tensor."""
    return data if isinstance(data, Tensor) else data.dataset.tensors[0]


def shot(module: nn.Module, data: Any) -> Any:
    """A short geodesic."""
    field = MetricField(module, data)
    return geodesic(field, None, torch.ones(field.space.dim), 0.01, steps=1, method="rk4", damping=1.0)


def plane(module: nn.Module) -> Plane:
    """A plane through the network's weights."""
    here = WeightSpace.of(module, "*").point(module)
    one, two = torch.zeros(2, len(here))
    one[0], two[1] = 1, 1
    return Plane.through(torch.stack([here, here + one, here + two]))


CORNERS = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

READERS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "space": lambda module, data: WeightSpace.of(module, "*").point(module),
    "displacement": lambda module, data: WeightSpace.of(module).displacement(module.state_dict(), module.state_dict()),
    "mask": lambda module, data: WeightSpace.of(module).mask("*.weight"),
    "batches": lambda module, data: [list(as_batches(data)), list(as_batches(data).shuffled(3))],
    "split": lambda module, data: as_batches(data).split(0.5),
    "sample": lambda module, data: as_batches(data).sample(2, torch.Generator()),
    "outputs": lambda module, data: (m := OutputMap(module))(m.point(), as_batches(data).first()),
    "check": lambda module, data: OutputMap(module).check(as_batches(data).first()),
    "statistics": lambda module, data: (m := OutputMap(module)).statistics(m.point(), as_batches(data)),
    "normalisation": lambda module, data: OutputMap(module).with_buffers({}).normalisation(),
    "field": lambda module, data: MetricField(module, data).at().on(data),
    "metric, autodiff": lambda module, data: metric(module, data, engine="autodiff"),
    "metric, materialised": lambda module, data: metric(module, data, engine="materialised"),
    "metric, categorical": lambda module, data: metric(module, data, geometry="categorical"),
    "matvec": on_metric(lambda g, v: g.matvec(torch.stack([v, v]))),
    "matvec, rows": on_metric(lambda g, v: g.matvec(v), "materialised"),
    "inner": on_metric(lambda g, v: g.inner(v, v)),
    "norm": on_metric(lambda g, v: g.norm(v)),
    "root": on_metric(lambda g, v: g.root.adjoint(g.root(v))),
    "solve, dual": on_metric(lambda g, v: g.solve(v, 1.0, method="dual")),
    "solve, dense": on_metric(lambda g, v: g.solve(v, 1.0, method="dense"), "autodiff"),
    "solve, cg": on_metric(lambda g, v: g.solve(v, 1.0, method="cg"), "autodiff"),
    "riemannian gradient": on_metric(lambda g, v: g.riemannian_gradient(v, 1.0)),
    "spectrum, dual": on_metric(lambda g, v: g.spectrum(2, method="dual")),
    "spectrum, dense": on_metric(lambda g, v: g.spectrum(2, method="dense")),
    "spectrum, lanczos": on_metric(lambda g, v: g.spectrum(2, method="lanczos"), "autodiff"),
    "spectrum, held out": lambda module, data: metric(module, data).spectrum(2, held_out=data),
    "trace": on_metric(lambda g, v: g.trace(num_products=2), "autodiff"),
    "rank": on_metric(lambda g, v: g.rank()),
    "explain": on_metric(lambda g, v: (g.explain(), repr(g))),
    "inclusion": pulled(lambda space: basis.inclusion(space, "*.weight")),
    "columns": pulled(lambda space: basis.columns(torch.ones(2, space.dim))),
    "blockwise": pulled(lambda space: basis.blockwise(space, torch.ones(1, space.dim))),
    "random": pulled(lambda space: basis.random(space, 3)),
    "sketch": lambda module, data: Sketch.of(MetricField(module, data), 3),
    "sketch of layers": lambda module, data: LayerSketch.of(MetricField(module, data)),
    "select": lambda module, data: select(MetricField(module, data), data, 2, by="leverage"),
    "geodesic": shot,
    "grow head": lambda module, data: grow_head(module, 5, name="net.4"),
    "layer groups": lambda module, data: channel_groups(module, in_one(data)),
    "fgsm": lambda module, data: fgsm(0.1)(module, in_one(data)),
    "pgd": lambda module, data: pgd(0.1, 2, restarts=2)(module, in_one(data)),
    "withstands": lambda module, data: withstands(module, in_one(data), torch.zeros(6).long(), pgd(0.1, 2)),
    "plane": lambda module, data: plane(module).scan(
        module, lambda net: net(in_one(data).clone()).sum(), CORNERS, num=2
    ),
    "project": lambda module, data: project(module, {"there": plane(module).weights(CORNERS)}),
    "spectral": lambda module, data: (g := metric(module, data)).pullback(basis.spectral(g.spectrum(2))),
}


class Failing(nn.Module):
    """A network in train mode, with gradients and hooks of its owner, whose forward fails at a given call."""

    def __init__(self, fails_at: int = 0) -> None:
        super().__init__()
        self.net, _ = build("training")
        self.attention, _ = build("attention")
        self.recurrent = nn.LSTM(2, 2)
        self.calls, self.fails_at = SimpleNamespace(count=0), fails_at
        for p in self.net.parameters():
            p.grad = torch.ones_like(p)
        self.attention.eval()
        self.recurrent.requires_grad_(False)
        self.net.register_forward_hook(lambda module, args, out: None)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2.0)
        self.calls.count += 1
        if self.calls.count == self.fails_at:
            raise ZeroDivisionError("as told")
        self.seen: Tensor = self.seen + 1
        return self.net(x)


def data_of(kind: str) -> Any:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    if kind == "tensor":
        return x
    return DataLoader(TensorDataset(x), batch_size=3, shuffle=True, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ["tensor", "loader"])
@pytest.mark.parametrize("name", READERS)
def test_nothing_is_changed_and_nothing_when_the_forward_fails(name: str, kind: str) -> None:
    counter, data = Failing(), data_of(kind)
    with unchanged(counter, data):
        READERS[name](counter, data)
    total = counter.calls.count
    for fails_at in sorted({min(3, total) if kind == "tensor" else total, total} - {0}):
        module, data = Failing(fails_at), data_of(kind)
        kept = None  # the traceback keeps frames, generators and contexts alive, as it does in a notebook
        with unchanged(module, data):
            try:
                READERS[name](module, data)
            except (ZeroDivisionError, ValueError, NotImplementedError) as error:
                kept = error
        if kept is not None:  # a probe may have failed instead, where another way is open
            assert "as told" in str(kept)
        assert module.calls.count >= fails_at


@pytest.mark.parametrize("context", [nullcontext, torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("engine", ["autodiff", "materialised"])
@pytest.mark.parametrize("name", ["convnet", "lstm", "text", "in_place", "weight_norm"])
def test_the_context_of_the_caller_does_not_matter(name: str, engine: str, context: Any) -> None:
    module, _ = build(name)
    with context():
        _, inputs = build(name)
        v = torch.linspace(-1, 1, WeightSpace.of(module).dim)
        with unchanged(module, inputs):
            g = metric(module, inputs, engine=engine)
            product, solved, found = g.matvec(torch.stack([v, v])), g.solve(v, 1.0).value, g.spectrum(2)
            pull = g.pullback(basis.random(WeightSpace.of(module), 2)).norm(torch.ones(2))
    rows = oracles.root(module, build(name)[1], lambda f: f - f.mean(-1, keepdim=True))
    expected = rows.T @ rows / 5
    assert oracles.relative(product[1], expected @ v) < 1e-10
    assert oracles.relative(solved, torch.linalg.solve(expected + torch.eye(len(v)), v)) < 1e-10
    assert oracles.relative(found.values, torch.linalg.eigvalsh(expected).flip(0)[:2]) < 1e-10
    assert not product.requires_grad and bool(torch.isfinite(pull))


@pytest.mark.parametrize("name", CASES)
def test_every_network_of_the_table_is_left_alone(name: str) -> None:
    module, inputs = build(name)
    with unchanged(module, inputs):
        g, v = ready(module, inputs)
        assert float(g.norm(v)) > 0 and g.solve(v, 1.0).ok and g.spectrum(2, method="lanczos").ok


def test_autocast_around_the_call_does_not_matter() -> None:
    module, x = build("mlp")
    module, x = module.float(), x.float()
    v = torch.linspace(-1, 1, 31).float()
    expected = metric(module, x).matvec(v)
    with torch.autocast("cpu", torch.bfloat16), unchanged(module, x):
        found = metric(module, x).matvec(v)
    assert torch.equal(found, expected)


def test_the_snapshot_sees_what_it_should() -> None:
    """The fixture itself: each of these must be noticed."""
    module, x = Failing(), data_of("tensor")
    changes: dict[str, Callable[[], Any]] = {
        "attribute training of net.1": lambda: module.net[1].eval(),  # type: ignore[index, operator]
        "parameter net.0.weight": lambda: module.net[0].weight.data.add_(1),  # type: ignore[index, union-attr]
        "parameter net.0.bias": lambda: module.net[0].bias.grad.zero_(),  # type: ignore[index, union-attr]
        "buffer net.1.running_mean": lambda: module.net[1].running_mean.add_(1),  # type: ignore[index, operator]
        "attribute _forward_hooks of net": lambda: module.net.register_forward_hook(print),
        "torch stream": lambda: torch.rand(1),
        "data[0]": lambda: x.mul_(2),
    }
    for key, change in changes.items():
        with pytest.raises(AssertionError, match=f"changed: .*{key.replace('[', '.').replace(']', '.')}"):
            with unchanged(module, x):
                change()
