"""Second derivatives against two other routes: differences of reverse-mode slopes, and Hessians of single outputs."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import second
from fipgeo.jacobian.decomposed import RULES, Decomposed
from fipgeo.jacobian.embedded import EmbeddedOutputs
from fipgeo.jacobian.second import SecondOrder, Taylor, line_forward, second_derivative, taylor
from fipgeo.jacobian.second_check import second_derivative_gap
from fipgeo.model import NotFiniteError
from fipgeo.outputs import GEOMETRIES, Categorical, Geometry, as_geometry

from .. import oracles
from ..hygiene import unchanged
from ..models import CASES, build, cut

linalg = torch.linalg


class Between(nn.Module):
    """Weights, the operation under test, and more weights."""

    def __init__(self, first: nn.Module, middle: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.middle, self.last = first, middle, nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.middle(self.first(x))
        return self.last((out[0] if isinstance(out, tuple) else out).reshape(len(x), -1))


class SelfAttention(nn.Module):
    def __init__(self, *, cross: bool = False, weights: bool = False) -> None:
        super().__init__()
        self.attention, self.cross, self.weights = nn.MultiheadAttention(6, 2, batch_first=True), cross, weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x.flip(1) * 2 if self.cross else x, x, need_weights=self.weights)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(6, 2, 7, 0.0, batch_first=True, activation="gelu")

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.flip(1))


class Cells(nn.Module):
    def __init__(self, kind: type[nn.RNNCell | nn.GRUCell | nn.LSTMCell]) -> None:
        super().__init__()
        self.cell = kind(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state[0] if isinstance(state, tuple) else state  # type: ignore[return-value]


def dense(f: Callable[[Tensor], Any]) -> Callable[[], nn.Module]:
    return lambda: Between(nn.Linear(6, 6), f)


def layer(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Between(nn.Linear(6, 6), make())


def image(make: Callable[[], Callable[[Tensor], Tensor]]) -> Callable[[], nn.Module]:
    return lambda: Between(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh()), make())


def signal(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Between(nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Tanh()), make())


def bag(mode: str) -> Callable[[], nn.Module]:
    return lambda: Between(nn.EmbeddingBag(9, 4, mode=mode, padding_idx=2), torch.tanh)


def square(x: Tensor) -> Tensor:
    """Well conditioned matrices `[n, 3, 3]` out of features `[n, 6]`."""
    return torch.einsum("ni,nj->nij", x[:, :3].tanh(), x[:, 3:].sin()) + 2 * torch.eye(3, dtype=x.dtype)


def positive(x: Tensor) -> Tensor:
    return square(x) @ square(x).mT


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(6, 4))


ACTIVATIONS = """ReLU ReLU6 LeakyReLU ELU CELU SELU GELU SiLU Mish Softplus Softsign Tanh Tanhshrink Sigmoid LogSigmoid
Hardswish Hardsigmoid Hardtanh Softshrink PReLU GLU""".split()
PARAMETRISATIONS: dict[str, Callable[[], nn.Module]] = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 4)),
    "weight_norm over all": lambda: parametrizations.weight_norm(nn.Linear(6, 4), dim=None),  # type: ignore[arg-type]
    "weight_norm with hooks": old_weight_norm,
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 4)),
    "spectral_norm with hooks": lambda: nn.utils.spectral_norm(nn.Linear(6, 4)),
    "orthogonal by matrix_exp": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "orthogonal by cayley": lambda: parametrizations.orthogonal(nn.Linear(6, 6), orthogonal_map="cayley"),
    "orthogonal by householder": lambda: parametrizations.orthogonal(nn.Linear(6, 4), orthogonal_map="householder"),
}
FEATURES: dict[str, Callable[[], nn.Module]] = {
    **{name: layer(getattr(nn, name)) for name in ACTIVATIONS},
    **{name: layer(lambda make=make: nn.Sequential(make(), nn.Tanh())) for name, make in PARAMETRISATIONS.items()},
    **{kind.__name__: layer(lambda kind=kind: kind(-1)) for kind in (nn.Softmax, nn.LogSoftmax, nn.Softmin)},
    "GELU tanh": layer(lambda: nn.GELU("tanh")),
    "LayerNorm": layer(lambda: nn.LayerNorm(6)),
    "LayerNorm without weights": layer(lambda: nn.LayerNorm(6, elementwise_affine=False)),
    "layer_norm function": dense(lambda x: torch.layer_norm(x, (6,), eps=0.1)),
    "native_layer_norm": dense(lambda x: torch.native_layer_norm(x, (6,), None, None, 1e-5)[0]),
    "RMSNorm": layer(lambda: nn.RMSNorm(6)),
    "BatchNorm1d": layer(lambda: nn.BatchNorm1d(6)),
    "batch statistics": dense(lambda x: F.batch_norm(x, None, None, training=True)),
    "batch statistics by torch": dense(
        lambda x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False)  # type: ignore[arg-type]
    ),
    "native_batch_norm": dense(
        lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0]  # type: ignore[arg-type]
    ),
    "normalize": dense(lambda x: F.normalize(x, dim=-1)),
    "normalize 3": dense(lambda x: F.normalize(x, p=3.0, dim=-1)),
    "cosine_similarity": dense(lambda x: F.cosine_similarity(x, x.roll(1, -1) ** 2 + 0.1, dim=-1)),
    "pairwise_distance": dense(lambda x: F.pairwise_distance(x, 2 * x.flip(-1) ** 2)),
    "norm": dense(lambda x: x.norm(dim=-1)),
    "std": dense(lambda x: x.std(-1)),
    "logsumexp": dense(lambda x: x.logsumexp(-1)),
    "cumprod": dense(lambda x: x.cumprod(-1)),
    "sort": dense(lambda x: x.sort(-1)[0] ** 2),
    "bilinear": dense(lambda x: torch.einsum("ni,nj->nij", x, x)),
    "checkpoint": dense(lambda x: checkpoint(torch.tanh, x, use_reentrant=False)),
    "huber": dense(lambda x: F.huber_loss(x, x.flip(-1) ** 2, reduction="none")),
    "inv": dense(lambda x: linalg.inv(square(x))),
    "solve": dense(lambda x: linalg.solve(square(x), x[:, :3, None])),
    "solve a vector": dense(lambda x: linalg.solve(square(x), x[:, :3])),
    "solve from the right": dense(lambda x: linalg.solve(square(x), square(x).sin(), left=False)),
    "solve_ex": dense(lambda x: linalg.solve_ex(square(x), x[:, :3, None])[0]),
    "det": dense(lambda x: linalg.det(square(x))),
    "slogdet": dense(lambda x: linalg.slogdet(square(x))[1]),
    "logdet": dense(lambda x: positive(x).logdet()),
    "cholesky": dense(lambda x: linalg.cholesky(positive(x))),
    "cholesky_inverse": dense(lambda x: torch.cholesky_inverse(linalg.cholesky(positive(x)))),
    "cholesky_inverse upper": dense(
        lambda x: torch.cholesky_inverse(linalg.cholesky(positive(x), upper=True), upper=True)
    ),
    "householder_product": dense(lambda x: linalg.householder_product(square(x)[..., :2], x[:, :2])),
    "eigvalsh": dense(lambda x: linalg.eigvalsh(positive(x))),
    "svdvals": dense(lambda x: linalg.svdvals(square(x))),
}
SEQUENCES: dict[str, Callable[[], nn.Module]] = {
    **{kind.__name__: layer(lambda kind=kind: kind(6, 4, batch_first=True)) for kind in (nn.RNN, nn.GRU, nn.LSTM)},
    "LSTM two ways": layer(lambda: nn.LSTM(6, 3, num_layers=2, bidirectional=True, batch_first=True)),
    **{kind.__name__: layer(lambda kind=kind: Cells(kind)) for kind in (nn.RNNCell, nn.GRUCell, nn.LSTMCell)},
    "attention": layer(SelfAttention),
    "attention with weights": layer(lambda: SelfAttention(weights=True)),
    "cross attention": layer(lambda: SelfAttention(cross=True)),
    "scaled_dot_product": dense(lambda x: F.scaled_dot_product_attention(x, x.sin(), x.flip(1), is_causal=True)),
    "encoder": layer(lambda: nn.TransformerEncoderLayer(6, 2, 5, 0.0, activation="gelu", batch_first=True)),
    "encoder, norm first": layer(
        lambda: nn.TransformerEncoderLayer(6, 2, 5, 0.0, activation="gelu", batch_first=True, norm_first=True)
    ),
    "decoder": layer(Decoder),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "GroupNorm": image(lambda: nn.GroupNorm(2, 4)),
    "InstanceNorm2d": image(lambda: nn.InstanceNorm2d(4, affine=True)),
    "InstanceNorm2d with statistics": image(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
    "instance_norm function": image(
        lambda: lambda x: torch.instance_norm(x, None, None, None, None, True, 0.1, 1e-5, False)  # type: ignore[arg-type]
    ),
    "LayerNorm over pixels": image(lambda: nn.LayerNorm([4, 4, 4])),
    "BatchNorm2d": image(lambda: nn.BatchNorm2d(4)),
    "LocalResponseNorm": image(lambda: nn.LocalResponseNorm(2)),
    "Softmax2d": image(nn.Softmax2d),
    "Conv2d": image(lambda: nn.Conv2d(4, 4, 3, stride=2, groups=2)),
    "ConvTranspose2d": image(lambda: nn.ConvTranspose2d(4, 3, 2, stride=2)),
    "MaxPool2d": image(lambda: nn.MaxPool2d(2)),
    "AvgPool2d": image(lambda: nn.AvgPool2d(2)),
    "LPPool2d": image(lambda: nn.LPPool2d(2, 2)),
    "AdaptiveAvgPool2d": image(lambda: nn.AdaptiveAvgPool2d(2)),
    "AdaptiveMaxPool2d": image(lambda: nn.AdaptiveMaxPool2d(2)),
    "nearest": image(lambda: nn.Upsample(scale_factor=2)),
    "bilinear image": image(lambda: nn.Upsample(scale_factor=2, mode="bilinear")),
    "bicubic": image(lambda: nn.Upsample(scale_factor=2, mode="bicubic")),
    "grid_sample": image(lambda: lambda x: F.grid_sample(x, 0.5 * x[:, :2].permute(0, 2, 3, 1), align_corners=False)),
    "PixelShuffle": image(lambda: nn.PixelShuffle(2)),
    "ReflectionPad2d": image(lambda: nn.ReflectionPad2d(1)),
}
SIGNALS: dict[str, Callable[[], nn.Module]] = {
    "Conv1d": signal(lambda: nn.Conv1d(4, 3, 3)),
    "ConvTranspose1d": signal(lambda: nn.ConvTranspose1d(4, 3, 3, stride=2)),
    "InstanceNorm1d": signal(lambda: nn.InstanceNorm1d(4)),
    "Unfold": image(lambda: nn.Unfold(2)),
}
TOKENS: dict[str, Callable[[], nn.Module]] = {
    "Embedding": lambda: Between(nn.Embedding(9, 4), torch.tanh),
    **{f"EmbeddingBag {mode}": bag(mode) for mode in ("sum", "mean", "max")},
}
SHAPES = [(FEATURES, (6,)), (SEQUENCES, (3, 6)), (IMAGES, (1, 4, 4)), (SIGNALS, (4, 6)), (TOKENS, None)]
KINDS = {name: (make, shape) for table, shape in SHAPES for name, make in table.items()}
KINDS["Unfold"] = (SIGNALS["Unfold"], (1, 4, 4))
NO_FORWARD = {"huber", "grid_sample", "solve_ex"}  # the last has it, but wrong
NO_HESSIAN = {"Hardsigmoid", "weight_norm", "weight_norm over all", "weight_norm with hooks"}
NO_SLOPE_TWICE = {"Hardsigmoid", *(name for name in TOKENS if "Bag" in name)}
WRONG_IN_TORCH = {
    "LayerNorm", "LayerNorm without weights", "LayerNorm over pixels", "layer_norm function", "native_layer_norm",
    "batch statistics", "batch statistics by torch", "native_batch_norm", "InstanceNorm1d", "InstanceNorm2d",
    "instance_norm function", "encoder", "encoder, norm first", "decoder", "solve", "solve a vector",
    "solve from the right", "solve_ex", "det", "slogdet", "logdet", "cholesky_inverse", "cholesky_inverse upper",
    "householder_product", "orthogonal by cayley", "orthogonal by householder",
}  # fmt: skip


def make(kind: str) -> tuple[nn.Module, Tensor]:
    """The network around an operation with random weights, and inputs for three examples."""
    build_kind, shape = KINDS[kind]
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(3, *shape, generator=generator) if shape else torch.arange(12).reshape(3, 4) % 7
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = build_kind().eval()
        with torch.no_grad():
            module(inputs)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.2 * torch.randn(p.shape, generator=generator))
    return module, inputs


def function_of(module: nn.Module, batches: Any, geometry: str | Geometry = "euclidean") -> EmbeddedOutputs:
    return EmbeddedOutputs(OutputMap(module), as_geometry(geometry), as_batches(batches))


def direction(function: EmbeddedOutputs, seed: int = 5, *stack: int) -> Tensor:
    dim = function.map.space.dim
    return 0.3 * torch.randn(*stack, dim, generator=torch.Generator().manual_seed(seed)).to(function.map.space.dtype)


def line(function: EmbeddedOutputs, theta: Tensor, v: Tensor) -> Callable[[Tensor], Tensor]:
    """z(theta + t v) as a plain function of t, to be called inside `frozen`."""

    def z(t: Tensor) -> Tensor:
        return torch.cat([function.on(b)(function.map.named(theta + t * v)) for b in function.batches])

    return z


def by_differences(function: EmbeddedOutputs, theta: Tensor, v: Tensor, step: float = 1e-4) -> Tensor:
    """z'' by Richardson's extrapolation of differences of slopes, which are transposed reverse-mode gradients."""

    def slope(at: float) -> Tensor:
        with torch.enable_grad():
            t = torch.tensor(at, requires_grad=True)
            z = line(function, theta, v)(t)
            u = torch.zeros_like(z, requires_grad=True)
            gradient = torch.autograd.grad(z, t, u, create_graph=True)[0]
            return torch.autograd.grad(gradient, u)[0]

    def central(h: float) -> Tensor:
        return (slope(h) - slope(-h)) / (2 * h)

    with function.map.frozen():
        return (4 * central(step / 2) - central(step)) / 3


def by_differences_of_outputs(function: EmbeddedOutputs, theta: Tensor, v: Tensor, step: float = 2e-3) -> Tensor:
    """z'' from outputs alone, to about 1e-8."""
    z = line(function, theta, v)

    def stencil(h: float) -> Tensor:
        a, b, c, d, e = (z(torch.tensor(k * h)) for k in (-2.0, -1.0, 0.0, 1.0, 2.0))
        return (-a + 16 * b - 30 * c + 16 * d - e) / (12 * h * h)

    with function.map.frozen():
        return (16 * stencil(step / 2) - stencil(step)) / 15


def by_hessians(module: nn.Module, inputs: Any, v: Tensor, others: list[Tensor], geometry: Geometry) -> Tensor:
    """v^T H_i w for every w of the others and every output i, by plain reverse passes over the scalar z_i."""
    module = copy.deepcopy(module).eval()
    weights = oracles.coordinates(module)

    def flat(parts: Any) -> Tensor:
        filled = [torch.zeros_like(p) if g is None else g for g, p in zip(parts, weights, strict=True)]
        return torch.cat([g.reshape(-1) for g in filled])

    out = []
    with OutputMap(module).frozen(), torch.enable_grad():
        for entry in oracles.embedded(module, inputs, geometry.embed).flatten():
            slope = flat(torch.autograd.grad(entry, weights, create_graph=True, allow_unused=True)) @ v
            if not slope.requires_grad:  # linear in the weights
                out.append(torch.zeros(len(others)))
                continue
            row = flat(torch.autograd.grad(slope, weights, retain_graph=True, allow_unused=True))
            out.append(torch.stack(others) @ row)
    return torch.stack(out, 1).detach()


def by_torch(module: nn.Module, function: EmbeddedOutputs, theta: Tensor, v: Tensor) -> Tensor:
    """torch's own forward mode of forward mode."""
    weights, tangent = function.map.named(theta), function.map.named(v)
    f = function.on(function.batches.first())
    with function.map.frozen():
        return jvp(lambda p: jvp(f, (p,), (tangent,))[1], (weights,), (tangent,))[1]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer(kind: str, record_property: Callable[[str, object], None]) -> None:
    module, inputs = make(kind)
    function = function_of(module, inputs)
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    found = SecondOrder(function, theta)
    assert found.route == ("reverse" if kind in NO_FORWARD else "forward")
    z, first, second = found.taylor(theta, v)
    assert second.norm() > 1e-3 * z.norm()
    outputs_only = by_differences_of_outputs(function, theta, v)
    assert oracles.relative(second, outputs_only) < 1e-6
    assert oracles.relative(z, line(function, theta, v)(torch.tensor(0.0)).detach()) < 1e-12
    if kind not in NO_SLOPE_TWICE:
        assert oracles.relative(second, by_differences(function, theta, v)) < 1e-8
        assert oracles.relative(first, oracles.root(module, inputs) @ v) < 1e-10
    if kind not in NO_SLOPE_TWICE | NO_HESSIAN and kind != "checkpoint":
        expected = by_hessians(module, inputs, v, [v, w], as_geometry("euclidean"))
        assert oracles.relative(second, expected[0]) < 1e-9
        assert oracles.relative(found.second(theta, v, w), expected[1]) < 1e-9
    try:
        gap = oracles.relative(by_torch(module, function, theta, v), second)
    except RuntimeError:  # no such derivative in torch
        return
    record_property("gap of torch's nested jvp", gap)
    assert kind in WRONG_IN_TORCH or gap < 1e-8, "silently wrong in torch, and missing in the list"


@pytest.mark.parametrize("name", CASES)
def test_every_network_of_the_table(name: str) -> None:
    module, inputs = build(name)
    function = function_of(module, cut(inputs, 2, 3))
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    found = SecondOrder(function, theta)
    z, first, second = found.taylor(theta, v)
    assert found.route == "forward" and found.error < 1e-9
    assert oracles.relative(second, by_differences(function, theta, v)) < 1e-7
    with function.map.frozen():
        assert oracles.relative(z, line(function, theta, v)(torch.tensor(0.0))) < 1e-12
    assert oracles.relative(first, oracles.root(module, inputs) @ v) < 1e-10
    if name != "weight_norm":  # torch's own Hessians are wrong there
        expected = by_hessians(module, inputs, v, [v, w], as_geometry("euclidean"))
        assert oracles.relative(second, expected[0]) < 1e-9
        assert oracles.relative(found.second(theta, v, w), expected[1]) < 1e-9


EVERY_GEOMETRY = [(name, g) for name in ("mlp", "text") for g in (*GEOMETRIES, Categorical(4.0))]


@pytest.mark.parametrize(("name", "geometry"), [*EVERY_GEOMETRY, ("encoder", "categorical")], ids=str)
def test_every_geometry(name: str, geometry: str | Geometry) -> None:
    module, inputs = build(name)
    function = function_of(module, inputs, geometry)
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    expected = by_hessians(module, inputs, v, [v, w], function.geometry)
    assert oracles.relative(second_derivative(function, theta, v), expected[0]) < 1e-9
    assert oracles.relative(second_derivative(function, theta, v, w), expected[1]) < 1e-9


@pytest.mark.parametrize("name", ["mlp", "encoder", "weight_norm", "lstm"])
def test_routes_agree(name: str) -> None:
    module, inputs = build(name)
    function = function_of(module, cut(inputs, 2, 3))
    theta, v, w = function.map.point(), direction(function, 5, 2), direction(function, 6, 2)
    made = SecondOrder(function, theta)
    for other in (None, w, w[0]):
        expected = made.taylor(theta, v, other)
        for route, tolerance in {"forward": 1e-11, "reverse": 1e-11, "difference": 1e-8}.items():
            found = SecondOrder(function, theta, survey=made.survey, route=route)
            assert found.route == route
            for a, b in zip(found.taylor(theta, v, other), expected, strict=True):
                assert a.shape == b.shape and a.dtype == torch.float64 and not a.requires_grad
                assert oracles.relative(a, b) < tolerance


def test_stacks_are_single_directions_side_by_side() -> None:
    for name in ("mlp", "encoder", "in_place", "text"):
        module, inputs = build(name)
        function = function_of(module, cut(inputs, 2, 3))
        theta, v, w = function.map.point(), direction(function, 5, 5), direction(function, 6, 5)
        made = SecondOrder(function, theta, chunk=2)
        found, mixed = made.taylor(theta, v), made.second(theta, v, w)
        assert found.first.shape == found.second.shape == mixed.shape == (5, len(found.value)) and made.vectorised
        for i in range(5):
            single = made.taylor(theta, v[i])
            assert oracles.relative(found.first[i], single.first) < 1e-12
            assert oracles.relative(found.second[i], single.second) < 1e-12
            assert oracles.relative(mixed[i], made.second(theta, v[i], w[i])) < 1e-12


@settings(max_examples=5)
@given(
    name=st.sampled_from(["mlp", "encoder", "scaled_dot_product", "gru", "text", "weight_norm"]),
    seed=st.integers(0, 2**20),
    factor=st.floats(-30, 30),
)
def test_it_is_a_symmetric_bilinear_form(name: str, seed: int, factor: float) -> None:
    module, inputs = build(name, seed)
    function = function_of(module, inputs, "logits")
    theta, v, w = function.map.point(), direction(function, seed), direction(function, seed + 1)
    made = SecondOrder(function, theta)
    vv, ww, vw = made.second(theta, v), made.second(theta, w), made.second(theta, v, w)
    size = vv.norm() + ww.norm()
    assert (made.second(theta, factor * v) - factor**2 * vv).norm() <= 1e-11 * factor**2 * size
    assert (made.second(theta, w, v) - vw).norm() < 1e-11 * size
    assert (made.second(theta, v, v) - vv).norm() < 1e-11 * size
    both = made.second(theta, torch.stack([v + w, v - w]))
    assert (both.sum(0) - 2 * vv - 2 * ww).norm() < 1e-11 * size
    assert (both[0] - both[1] - 4 * vw).norm() < 1e-11 * size


@settings(max_examples=5)
@given(
    name=st.sampled_from(["mlp", "encoder", "text", "convnet"]),
    seed=st.integers(0, 2**20),
    sizes=st.sampled_from([(1, 4), (4, 1), (2, 3), (1, 1, 1, 1, 1)]),
)
def test_batches_do_not_matter(name: str, seed: int, sizes: tuple[int, ...]) -> None:
    module, inputs = build(name, seed)
    whole, parts = function_of(module, inputs), function_of(module, cut(inputs, *sizes))
    theta, v = whole.map.point(), direction(whole, seed, 2)
    for a, b in zip(taylor(whole, theta, v), taylor(parts, theta, v), strict=True):
        assert oracles.relative(a, b) < 1e-12


@pytest.mark.parametrize("name", CASES)
def test_the_gap_is_small_and_the_caller_finds_everything_as_it_was(name: str) -> None:
    module, inputs = build(name)
    batches = cut(inputs, 2, 3)
    with unchanged(module, batches):
        function = function_of(module, batches)
        made = SecondOrder(function, function.map.point())
        made.taylor(function.map.point(), direction(function, 5, 2))
        SecondOrder(function, function.map.point(), route="reverse").taylor(function.map.point(), direction(function))
        found = second_derivative_gap(function, function.map.point(), direction(function))
    assert found.gap < 1e-6 and found.kinked == 0 and found.dtype == torch.float64 and found.rounding < 1e-12
    assert f"z'' by {found.route} mode is" in found.explain() and "no kink" in found.explain()


class NoSecond(nn.Module):
    """Has first derivatives in both modes, and in none a second (called so that it is not written out)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.aten.hardsigmoid(x)


def test_a_module_without_second_derivative_is_named() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), NoSecond(), nn.Linear(4, 2), nn.Tanh())
    function = function_of(module, torch.randn(5, 3))
    theta, v, w = function.map.point(), direction(function), direction(function, 6)
    with unchanged(module), pytest.raises(NotImplementedError, match=r"model: 3 \(NoSecond\) has no second derivative"):
        second_derivative(function, theta, v)
    found = SecondOrder(function, theta, allow_finite_difference=True)
    assert found.route == "difference" and 0 < found.error < 1e-4
    expected = by_differences_of_outputs(function, theta, v)
    assert oracles.relative(second_derivative(function, theta, v, allow_finite_difference=True), expected) < 1e-6
    symmetry = oracles.relative(found.second(theta, v, w), found.second(theta, w, v))
    assert symmetry < 1e-7


def test_forward_mode_is_not_believed_where_it_is_wrong(caplog: pytest.LogCaptureFixture) -> None:
    module, inputs = make("solve_ex")
    function = function_of(module, inputs)
    found = SecondOrder(function, function.map.point())
    assert found.route == "reverse" and found.error < 1e-6
    assert "so reverse mode is used" in caplog.text


def test_reverse_mode_is_not_believed_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(second.LINES, "reverse", lambda *args: Taylor(*(2 * t for t in line_forward(*args))))
    module, inputs = make("LayerNorm")
    function = function_of(module, inputs)
    found = SecondOrder(function, function.map.point())
    assert found.route == "forward" and found.error < 1e-6


def test_code_that_cannot_be_seen_is_caught_by_the_comparison() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)))
    function = function_of(scripted, torch.randn(5, 3))  # type: ignore[arg-type]
    theta, v = function.map.point(), direction(function)
    expected = by_differences_of_outputs(function, theta, v)
    assert oracles.relative(second_derivative(function, theta, v), expected) < 1e-6


def test_an_infinite_second_derivative_is_reported() -> None:
    class Root(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.abs() ** 1.5

    module = nn.Sequential(nn.Linear(3, 4, bias=False), Root())
    function = function_of(module, torch.zeros(5, 3))
    with pytest.raises(NotFiniteError, match="their second derivative is not"):
        second_derivative(function, function.map.point(), direction(function))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 8e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", ["mlp", "encoder", "lstm"])
def test_low_precision(name: str, dtype: torch.dtype, tolerance: float) -> None:
    module, inputs = build(name)
    module, inputs = module.to(dtype), inputs.to(dtype)
    function = function_of(module, inputs)
    theta = function.map.point()
    v = torch.cat([t.reshape(-1) for t in function.map.named(direction(function)).values()]).float()
    found = taylor(function, theta, v)
    reference = copy.deepcopy(module).double()
    wide = function_of(reference, inputs.double())
    expected = SecondOrder(wide, theta.double()).taylor(theta.double(), v.double())
    assert all(t.dtype == torch.float32 for t in found)
    for a, b in zip(found, expected, strict=True):
        assert oracles.relative(a, b) < tolerance


def test_bad_arguments() -> None:
    module, inputs = build("mlp")
    function = function_of(module, inputs)
    theta, v = function.map.point(), direction(function)
    with pytest.raises(ValueError, match="route: got 'jvp', expected one of 'auto', 'forward'"):
        SecondOrder(function, theta, route="jvp")
    with pytest.raises(ValueError, match=r"theta: got shape \[3\], expected \[31\]"):
        SecondOrder(function, torch.zeros(3))
    made = SecondOrder(function, theta)
    with pytest.raises(ValueError, match=r"v: got shape \[30\], expected \[31\] or \[k, 31\]"):
        made.taylor(theta, v[1:])
    with pytest.raises(ValueError, match=r"w: got shape \[4, 31\], expected \[31\] or \[3, 31\]"):
        made.taylor(theta, v.expand(3, -1), v.expand(4, -1))
    with pytest.raises(ValueError, match="steps: got"):
        second_derivative_gap(function, theta, v, steps=(1e-5, 1e-5))
    with pytest.raises(ValueError, match="one direction .* that is not zero"):
        second_derivative_gap(function, theta, 0 * v)


def test_the_gap_is_measured_in_float64_whatever_the_model() -> None:
    module, inputs = build("encoder")
    module, inputs = module.float(), inputs.float()
    function = function_of(module, {"x": inputs})
    with unchanged(module, inputs):
        found = second_derivative_gap(function, function.map.point(), direction(function))
    assert found.gap < 1e-6 and found.dtype == torch.float64 and 1e-9 < found.rounding < 1e-4


def test_the_gap_finds_wrong_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(RULES, F.layer_norm)

    def fails(*args: object) -> Taylor:
        raise RuntimeError(args)

    monkeypatch.setitem(second.LINES, "reverse", fails)
    module, inputs = make("LayerNorm")
    function = function_of(module, inputs)
    assert second_derivative_gap(function, function.map.point(), direction(function)).gap > 1e-2


def test_kinks_are_counted_and_left_out() -> None:
    module = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2), nn.Tanh())
    inputs = torch.randn(8, 3)
    with torch.no_grad():
        module[0].bias[0] = -module[0].weight[0] @ inputs[3]  # type: ignore[index, operator]
    function = function_of(module, inputs)
    found = second_derivative_gap(function, function.map.point(), direction(function))
    assert found.kinked == 1 / 8 and found.gap < 1e-6 and min(found.gaps) > 0.9
    assert "12.5% of the outputs have a kink" in found.explain()


def bags() -> dict[str, Callable[[], Tensor]]:
    """Ways to call the function: bags as rows or by offsets, with empty ones, padding and weights."""
    table, ids = torch.randn(9, 4), torch.tensor([1, 2, 3, 2, 5, 5, 0])
    offsets = torch.tensor([0, 3, 3, 4])
    weights = torch.rand(7)
    calls: dict[str, Callable[[], Tensor]] = {}
    for mode in ("sum", "mean", "max"):
        calls[f"{mode} rows"] = lambda mode=mode: F.embedding_bag(ids[:6].view(2, 3), table, mode=mode)
        calls[f"{mode} offsets"] = lambda mode=mode: F.embedding_bag(ids, table, offsets, mode=mode)
        calls[f"{mode} padding"] = lambda mode=mode: F.embedding_bag(ids, table, offsets, mode=mode, padding_idx=2)
        ends = torch.tensor([0, 3, 3, 4, 7])
        calls[f"{mode} last"] = lambda mode=mode, ends=ends: F.embedding_bag(
            ids, table, ends, mode=mode, include_last_offset=True, padding_idx=-7
        )
    calls["weights"] = lambda: F.embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=weights)
    calls["weights, rows"] = lambda: F.embedding_bag(
        ids[:6].view(2, 3), table, mode="sum", per_sample_weights=weights[:6].view(2, 3)
    )
    return calls


@pytest.mark.parametrize("call", bags())
def test_bags_have_the_values_of_torch(call: str) -> None:
    function = bags()[call]
    torch.manual_seed(0)
    expected = function()
    with Decomposed():
        assert torch.allclose(function(), expected, rtol=1e-13)


def test_values_are_those_of_torch() -> None:
    x, a, images = torch.randn(4, 6), torch.randn(2, 3, 3), torch.randn(2, 3, 4, 4)
    mean, var, weight = torch.randn(3), torch.rand(3) + 0.5, torch.rand(3) + 0.5
    lower = linalg.cholesky(a @ a.mT + torch.eye(3))
    calls: list[Callable[[], Any]] = [
        lambda: F.layer_norm(x, (6,), x[0], x[1], 0.3),
        lambda: F.layer_norm(x.half(), (6,)),
        lambda: torch.native_layer_norm(x, (6,), x[0], None, 0.3),
        lambda: F.batch_norm(images, mean, var, weight, mean),
        lambda: F.batch_norm(images, None, None, weight, mean, training=True),
        lambda: torch.native_batch_norm(images, weight, mean, None, None, True, 0.1, 0.2),  # type: ignore[arg-type]
        lambda: F.instance_norm(images, weight=weight, bias=mean, eps=0.2),
        lambda: F.instance_norm(images, mean, var, use_input_stats=False),
        lambda: torch.instance_norm(images, weight, mean, None, None, True, 0.1, 0.2, False),
        lambda: torch.instance_norm(images, weight, mean, mean, var, False, 0.1, 0.2, False),
        lambda: torch._weight_norm(a, weight.view(1, 3, 1), 1),  # type: ignore[reportPrivateImportUsage]
        lambda: F.glu(x, 0),
        lambda: F.hardsigmoid(10 * x, inplace=True),
        lambda: [linalg.solve(a, a.sin()), linalg.solve(a, a[:, 0]), linalg.solve(a[0], a[1, 0])],
        lambda: [linalg.solve(a, a.sin(), left=False), a.det(), torch.det(a[0]), linalg.det(a - a)],
        lambda: [*a.slogdet(), *torch.slogdet(-a), torch.logdet(a), (-a).logdet()],
        lambda: [torch.cholesky_inverse(lower), lower.mT.cholesky_inverse(upper=True)],
        lambda: [torch.orgqr(a, weight.expand(2, 3)), linalg.householder_product(images, images[:, :, 0, :2])],
        lambda: linalg.slogdet(a).logabsdet,
    ]
    for number, call in enumerate(calls):
        expected, found = call(), None
        with Decomposed():
            found = call()
        pairs = [(expected, found)] if isinstance(expected, Tensor) else zip(expected, found, strict=True)
        for b, c in pairs:
            tolerance = 2e-3 if b.dtype == torch.half else 1e-10
            assert b.dtype == c.dtype and b.shape == c.shape or number == 5, number
            assert torch.allclose(b.reshape(-1), c.reshape(-1), rtol=tolerance, atol=tolerance, equal_nan=True), number
