"""Layers and operations with second derivatives, and oracles for these by other routes."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian.embedded import EmbeddedOutputs
from fipgeo.outputs import Geometry, as_geometry

from .. import oracles

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
