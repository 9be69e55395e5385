"""A table of layer kinds in small networks, one for every way in which parameters meet activations."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

from .. import models

EXAMPLES = models.EXAMPLES

Run = Callable[[Any, Tensor], Any]


class Net(nn.Module):
    """Named layers and parameters, and how they are run."""

    def __init__(self, run: Run, **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


@dataclass(frozen=True)
class Kind:
    """A kind of layer in a small network.

    Attributes:
        build: The network.
        shape: Of one example's inputs.
        tokens: Size of the vocabulary, if the inputs are ids.
        rows: Parameters that no rule describes, or that are used beside their layer: rows by plain differentiation.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    tokens: int = 0
    rows: tuple[str, ...] = ()


def empty(*shape: int) -> nn.Parameter:
    """A parameter whose values `prepared` draws."""
    return nn.Parameter(torch.zeros(shape))


def prepared(kind: Kind, seed: int = 0, examples: int = EXAMPLES) -> tuple[nn.Module, Tensor]:
    """The network with random weights and statistics, and inputs."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        module = kind.build()
    with torch.no_grad():
        for name, t in [*module.named_parameters(), *module.named_buffers()]:
            if t.is_floating_point():
                t.copy_(0.6 * torch.randn(t.shape, generator=generator))
            if name.endswith("running_var"):
                t.abs_().add_(0.5)
    shape = (examples, *kind.shape)
    if kind.tokens:
        return module, torch.randint(kind.tokens, shape, generator=generator)
    return module, torch.randn(shape, generator=generator)


def _tokens_in_rows(self: Any, x: Tensor) -> Tensor:
    return self.head(torch.tanh(self.a(x.flatten(0, 1))).view(len(x), -1))


def _time_first(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.a(x.transpose(0, 1)))  # [T, n, d]
    return self.head((h * self.gamma + self.beta).sin().sum(0))


def _folded(self: Any, x: Tensor) -> Tensor:
    h = torch.tanh(self.conv(x.flatten(0, 1)))  # two images an example
    return h.flatten(1).view(len(x), 2, -1).sum((1,)).view(len(x), -1)[:, :3]


def _positions(self: Any, x: Tensor) -> Tensor:
    place = torch.arange(x.shape[1])[None]
    return self.head((self.token(x) + self.place(place)).tanh().sum(1))


def _shared_ids(self: Any, x: Tensor) -> Tensor:
    return self.head((self.token(x) + self.place(torch.arange(x.shape[1]))).tanh().sum(1))


def _vision(self: Any, x: Tensor) -> Tensor:
    h = self.embed(x)
    h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.place
    h = h + self.gamma * torch.tanh(self.mix(h))
    return self.head(self.norm(h)[:, 0])


def _addmm(self: Any, x: Tensor) -> Tensor:
    h = torch.addmm(self.bias, x.reshape(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)
    return torch.tanh(h) @ self.second + self.shift


def _attend(self: Any, x: Tensor) -> Tensor:
    return self.head(self.attention(x, x, x)[0].sum(1))


def _cross(self: Any, x: Tensor) -> Tensor:
    return self.head(self.attention(x[:, :2], x[:, 1:], x[:, 1:], need_weights=False)[0].sum(1))


def _attend_time_first(self: Any, x: Tensor) -> Tensor:
    h = x.transpose(0, 1)
    out, weights = self.attention(h, h, h, need_weights=True, average_attn_weights=False)
    return torch.cat([self.head(out.sum(0)), weights.flatten(1)[:, :3]], -1)


def _language(self: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(self.mix(self.token(x))), self.token.weight)


def _language_transposed(self: Any, x: Tensor) -> Tensor:
    return torch.tanh(self.mix(self.token(x)))[:, -1] @ self.token.weight.T


def _recurrent(self: Any, x: Tensor) -> Tensor:
    h = torch.zeros(len(x), 4, dtype=x.dtype)
    for t in range(x.shape[1]):
        h = torch.tanh(self.cell(torch.cat([x[:, t], h], -1)))
    return self.head(h)


def _decayed(self: Any, x: Tensor) -> Tensor:
    return self.b(torch.tanh(self.a(x))) + 0.1 * (self.a.weight**2).sum() + 1e-7 * self.b.weight.sum()


def _doubled(self: Any, x: Tensor) -> Tensor:
    return F.linear(torch.tanh(F.linear(x, self.a.weight * 2, self.a.bias)), self.b.weight, self.b.bias * 3)


def _in_place(self: Any, x: Tensor) -> Tensor:
    x.mul_(0.5)
    h = self.a(x).tanh_()
    out = self.b(h)
    out += h
    out.view(len(out), 2, 2)[:, 0].mul_(0.5)
    out += self.shift
    out[:, 1:] = out[:, 1:] * 2
    h = self.c(out.sin())
    h.add_(self.norm(out) * self.gamma)
    return self.d(h.sigmoid_())


def _parallel(self: Any, x: Tensor) -> Tensor:
    return (self.q(x) * self.k(x)).sin() + self.v(x)


def _scalars(self: Any, x: Tensor) -> Tensor:
    return self.b(torch.tanh(self.a(x) * self.scale + self.shift)) * torch.exp(self.log)


def _one_dimensional(self: Any, x: Tensor) -> Tensor:
    return torch.stack([F.linear(torch.tanh(self.a(x)), self.w), self.a(x) @ self.w], -1)


def _normed_token(self: Any, x: Tensor) -> Tensor:
    token = F.layer_norm(self.token, (4,))  # a normalisation without scale or shift, of a parameter
    return self.head(torch.cat([token.expand(len(x), -1, -1), self.a(x)], 1).tanh().sum(1))


def _two_tables(self: Any, x: Tensor) -> Tensor:
    return self.head((self.a(x) + self.b(x)).flatten(1).tanh())


def _lora(self: Any, x: Tensor) -> Tensor:
    return self.base(x).tanh() + (x @ self.down @ self.up) * 0.5


def _sliced(self: Any, x: Tensor) -> Tensor:
    return self.a(x[:, :2]) + self.a(x[:, 2:]).tanh() + F.linear(x[:, 1:3], self.a.weight[:, :], self.a.bias).sin()


def _images(self: Any, x: Tensor) -> Tensor:
    return self.layer(x).sin().flatten(1)[:, ::7]


def _features(self: Any, x: Tensor) -> Tensor:
    return self.layer(self.pre(x)).sin().flatten(1)[:, ::3]


def _conv(layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(_images, layer=layer())


def _norm(pre: Callable[[], nn.Module], layer: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: Net(_features, pre=pre(), layer=layer())


def _tied_layers() -> nn.Module:
    a, b = nn.Linear(4, 4), nn.Linear(4, 4)
    b.weight = a.weight
    return nn.Sequential(a, nn.Tanh(), b, nn.Tanh(), nn.Linear(4, 2))


def _unused() -> nn.Module:
    run: Run = lambda self, x: self.b(torch.tanh(self.a(x)))  # noqa: E731
    return Net(run, a=nn.Linear(3, 4), b=nn.Linear(4, 2), spare=nn.Linear(2, 2), also=empty(), none=empty(0))


def _frozen() -> nn.Module:
    module = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    module[2].requires_grad_(False)
    return module


def _parametrised() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", models.Symmetric())
    norms = parametrizations.weight_norm(nn.Linear(4, 4)), nn.utils.spectral_norm(nn.Linear(4, 3))
    return nn.Sequential(layer, nn.Tanh(), norms[0], nn.Tanh(), norms[1])


def _encoder(norm_first: bool, batch_first: bool = True) -> Callable[[], nn.Module]:
    run: Run = lambda self, x: self.head(self.layer(x if batch_first else x.transpose(0, 1)).sum(int(batch_first)))  # noqa: E731
    return lambda: Net(
        run,
        layer=nn.TransformerEncoderLayer(4, 2, 5, batch_first=batch_first, norm_first=norm_first, activation="gelu"),
        head=nn.Linear(4, 2),
    )


KINDS: dict[str, Kind] = {
    "tokens": Kind(lambda: nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), (3, 3)),
    "tokens flattened": Kind(lambda: Net(_tokens_in_rows, a=nn.Linear(3, 4), head=nn.Linear(12, 2)), (3, 3)),
    "time first": Kind(
        lambda: Net(_time_first, a=nn.Linear(3, 4), gamma=empty(4), beta=empty(4), head=nn.Linear(4, 2)), (4, 3)
    ),
    "conv1d": Kind(_conv(lambda: nn.Conv1d(2, 3, 3)), (2, 9)),
    "conv2d circular": Kind(_conv(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")), (2, 4, 5)),
    "conv2d same": Kind(_conv(lambda: nn.Conv2d(2, 3, 3, padding="same", dilation=2)), (2, 4, 5)),
    "conv2d same even": Kind(
        _conv(lambda: nn.Conv2d(2, 3, 2, padding="same")), (2, 4, 5), rows=("layer.weight", "layer.bias")
    ),
    "conv2d valid": Kind(_conv(lambda: nn.Conv2d(2, 3, (3, 4), padding="valid")), (2, 5, 6)),
    "conv2d strided": Kind(_conv(lambda: nn.Conv2d(2, 3, 3, stride=(2, 3), padding=(1, 2), dilation=2)), (2, 8, 9)),
    "conv2d kernel 1": Kind(_conv(lambda: nn.Conv2d(2, 3, 1, stride=2)), (2, 5, 5)),
    "conv2d grouped": Kind(_conv(lambda: nn.Conv2d(4, 6, 3, groups=2, padding=1)), (4, 4, 4)),
    "conv2d depthwise": Kind(_conv(lambda: nn.Conv2d(3, 6, 3, groups=3)), (3, 5, 5)),
    "conv3d": Kind(_conv(lambda: nn.Conv3d(1, 2, 2, stride=(1, 2, 1), padding=1)), (1, 3, 4, 3)),
    "conv two images": Kind(lambda: Net(_folded, conv=nn.Conv2d(2, 3, 3, stride=2)), (2, 2, 5, 5)),
    "conv transposed": Kind(
        _conv(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2)), (2, 3, 3), rows=("layer.weight", "layer.bias")
    ),
    "bilinear": Kind(
        lambda: Net(lambda self, x: self.layer(x, x.sin()), layer=nn.Bilinear(3, 3, 2)),
        (3,),
        rows=("layer.weight", "layer.bias"),
    ),
    "prelu": Kind(
        lambda: nn.Sequential(nn.Linear(3, 4), nn.PReLU(4), nn.Linear(4, 2), nn.PReLU()),
        (3,),
        rows=("1.weight", "3.weight"),
    ),
    "embedding": Kind(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Tanh(), nn.Linear(3, 2)), (4,), 7),
    "embedding padded": Kind(
        lambda: nn.Sequential(nn.Embedding(4, 3, padding_idx=-2), nn.Tanh(), nn.Linear(3, 2)), (4,), 4
    ),
    "position embedding": Kind(
        lambda: Net(_positions, token=nn.Embedding(6, 3), place=nn.Embedding(5, 3), head=nn.Linear(3, 2)), (4,), 6
    ),
    "position embedding, no batch axis": Kind(
        lambda: Net(_shared_ids, token=nn.Embedding(6, 3), place=nn.Embedding(5, 3), head=nn.Linear(3, 2)),
        (4,),
        6,
        rows=("place.weight",),
    ),
    "position embedding, as many positions as examples": Kind(
        lambda: Net(_shared_ids, token=nn.Embedding(6, 3), place=nn.Embedding(5, 3), head=nn.Linear(3, 2)), (5,), 6
    ),
    "two tables": Kind(
        lambda: Net(_two_tables, a=nn.Embedding(6, 3), b=nn.Embedding(6, 3, padding_idx=0), head=nn.Linear(9, 2)),
        (3,),
        6,
    ),
    "embedding bag": Kind(
        lambda: Net(lambda self, x: self.head(self.bag(x).tanh()), bag=nn.EmbeddingBag(6, 3), head=nn.Linear(3, 2)),
        (4,),
        6,
        rows=("bag.weight",),
    ),
    "layer norm": Kind(_norm(lambda: nn.Linear(4, 4), lambda: nn.LayerNorm([3, 4])), (3, 4)),
    "rms norm": Kind(_norm(lambda: nn.Linear(4, 4), lambda: nn.RMSNorm(4)), (3, 4)),
    "group norm": Kind(_norm(lambda: nn.Conv1d(2, 4, 2), lambda: nn.GroupNorm(2, 4)), (2, 5)),
    "batch norm": Kind(_norm(lambda: nn.Conv2d(2, 3, 2), lambda: nn.BatchNorm2d(3)), (2, 3, 4)),
    "batch norm of vectors": Kind(_norm(lambda: nn.Linear(3, 6), lambda: nn.BatchNorm1d(6)), (3,)),
    "instance norm": Kind(_norm(lambda: nn.Conv1d(2, 3, 2), lambda: nn.InstanceNorm1d(3, affine=True)), (2, 5)),
    "vision": Kind(
        lambda: Net(
            _vision,
            embed=nn.Linear(3, 4),
            token=empty(1, 1, 4),
            place=empty(1, 4, 4),
            gamma=empty(4),
            mix=nn.Linear(4, 4),
            norm=nn.LayerNorm(4),
            head=nn.Linear(4, 2),
        ),
        (3, 3),
    ),
    "matrix products": Kind(
        lambda: Net(_addmm, bias=empty(4), weight=empty(3, 4), second=empty(4, 2), shift=empty(3, 2)), (3, 3)
    ),
    "self-attention": Kind(
        lambda: Net(_attend, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 2)), (3, 4)
    ),
    "cross-attention": Kind(
        lambda: Net(_cross, attention=nn.MultiheadAttention(4, 2, batch_first=True), head=nn.Linear(4, 2)),
        (3, 4),
        rows=("attention.in_proj_weight", "attention.in_proj_bias"),
    ),
    "attention, time first": Kind(
        lambda: Net(_attend_time_first, attention=nn.MultiheadAttention(4, 2, add_bias_kv=True), head=nn.Linear(4, 2)),
        (3, 4),
    ),
    "encoder, norm last": Kind(_encoder(False), (3, 4)),
    "encoder, norm first": Kind(_encoder(True), (3, 4)),
    "encoder, time first": Kind(_encoder(True, False), (3, 4)),
    "language model": Kind(lambda: Net(_language, token=nn.Embedding(6, 3), mix=nn.Linear(3, 3)), (4,), 6),
    "language model, transposed": Kind(
        lambda: Net(_language_transposed, token=nn.Embedding(6, 3), mix=nn.Linear(3, 3)),
        (4,),
        6,
        rows=("token.weight",),
    ),
    "tied layers": Kind(_tied_layers, (4,)),
    "recurrent": Kind(lambda: Net(_recurrent, cell=nn.Linear(6, 4), head=nn.Linear(4, 2)), (3, 2)),
    "decayed": Kind(lambda: Net(_decayed, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), (3,), rows=("a.weight", "b.weight")),
    "doubled": Kind(lambda: Net(_doubled, a=nn.Linear(3, 4), b=nn.Linear(4, 2)), (3,), rows=("a.weight", "b.bias")),
    "parametrised": Kind(_parametrised, (4,)),
    "low rank": Kind(lambda: Net(_lora, base=nn.Linear(5, 4), down=empty(5, 2), up=empty(2, 4)), (3, 5)),
    "in place": Kind(
        lambda: Net(
            _in_place,
            a=nn.Linear(3, 4),
            b=nn.Linear(4, 4),
            c=nn.Linear(4, 4),
            d=nn.Linear(4, 2),
            norm=nn.LayerNorm(4),
            gamma=empty(4),
            shift=empty(4),
        ),
        (3,),
        rows=("shift",),
    ),
    "parallel": Kind(lambda: Net(_parallel, q=nn.Linear(4, 3), k=nn.Linear(4, 3), v=nn.Linear(4, 3)), (3, 4)),
    "scalars": Kind(
        lambda: Net(_scalars, a=nn.Linear(3, 4), b=nn.Linear(4, 2), scale=empty(), shift=empty(), log=empty()), (3,)
    ),
    "vector as weight": Kind(lambda: Net(_one_dimensional, a=nn.Linear(3, 4), w=empty(4)), (5, 3), rows=("w",)),
    "normed token": Kind(
        lambda: Net(_normed_token, token=empty(1, 1, 4), a=nn.Linear(3, 4), head=nn.Linear(4, 2)),
        (3, 3),
        rows=("token",),
    ),
    "slices": Kind(lambda: Net(_sliced, a=nn.Linear(2, 3)), (4,), rows=("a.weight",)),
    "unused": Kind(_unused, (3,), rows=("spare.weight", "also")),
    "frozen": Kind(_frozen, (3,)),
}
