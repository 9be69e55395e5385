"""Small networks of many shapes with random weights and statistics, and tools to set channels to zero."""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fipgeo.shrink import ChannelGroups
from fipgeo.space import WeightSpace


class Block(nn.Module):
    """Two convolutions and a skip, by padding ("pad"), by a convolution ("conv"), or before the activation ("pre")."""

    def __init__(self, into: int, out: int, kind: str) -> None:
        super().__init__()
        self.kind, self.extra = kind, out - into
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.bn0 = nn.BatchNorm2d(into) if kind == "pre" else None
        self.skip = nn.Conv2d(into, out, 1, bias=False) if kind != "pad" and into != out else None

    def forward(self, x: Tensor) -> Tensor:
        a = x if self.bn0 is None else F.relu(self.bn0(x))
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(a)))))
        if self.kind == "pad":
            h = h + F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        else:
            h += x if self.skip is None else self.skip(a)
        return h if self.kind == "pre" else F.relu(h)


class Residual(nn.Module):
    """Two stages of blocks with a linear head."""

    def __init__(self, widths: tuple[int, int], kind: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        pairs = [(widths[0], widths[0]), widths, (widths[1], widths[1])]
        self.blocks = nn.ModuleList(Block(i, o, kind) for i, o in pairs)
        self.head = nn.Linear(widths[1], 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Gated(nn.Module):
    """A gated feed-forward layer, a scale of its own, a concatenation and a depthwise convolution over positions."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, hidden), nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.ones(hidden))
        self.depth = nn.Conv1d(hidden, hidden, 3, padding=1, groups=hidden)
        self.side = nn.Linear(width, 2)
        self.out = nn.Linear(width + 2, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x) * self.scale
        h = self.depth(h.transpose(1, 2)).transpose(1, 2)
        return self.out(torch.cat([self.down(h), torch.tanh(self.side(x))], -1)).mean(1)


class Squeezed(nn.Module):
    """Channels weighed by a function of their means, and a sum over positions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(3, width, 3), nn.Linear(width, 2), nn.Linear(2, width)
        self.prelu, self.head = nn.PReLU(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.conv(x))
        gates = torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3))))))
        return self.head((x * gates[:, :, None, None]).sum((2, 3)))


class Attending(nn.Module):
    """`nn.MultiheadAttention` over a sequence, with or without a width of its own for keys and values."""

    def __init__(self, width: int, heads: int, bias: bool, kdim: int | None, first: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, 0.1, bias=bias, kdim=kdim, vdim=kdim, batch_first=first)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        kv = x if self.attention.kdim == x.shape[-1] else x[..., : self.attention.kdim]
        return self.attention(x, kv, kv)[0].mean(1 if self.first else 0)


def conv_net(widths: tuple[int, int], pool: str, act: type[nn.Module], bias: bool) -> nn.Module:
    """Convolutions, pooling, a run of columns for each channel, and two linear layers."""
    pooling = nn.MaxPool2d(2) if pool == "max" else nn.AvgPool2d(2)
    a, b = widths
    return nn.Sequential(
        *(nn.Conv2d(3, a, 3, padding=1, bias=bias), nn.BatchNorm2d(a), act(), pooling, nn.Dropout2d(0.2)),
        *(nn.Conv2d(a, b, 3, bias=bias), act(), nn.Flatten(), nn.Linear(4 * b, a), act(), nn.Linear(a, 3)),
    )


def mlp(widths: tuple[int, int], act: type[nn.Module]) -> nn.Module:
    """A multilayer perceptron with normalisation."""
    a, b = widths
    return nn.Sequential(nn.Linear(5, a), act(), nn.BatchNorm1d(a), nn.Linear(a, b), act(), nn.Linear(b, 3))


IMAGES, ROWS, TEXTS = (4, 3, 8, 8), (4, 5), (4, 6, 8)
ACTS = [nn.ReLU, nn.GELU, nn.SiLU, nn.Tanh]

NETS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "conv": (lambda s: conv_net((4 + s % 3, 3 + s % 4), ["max", "avg"][s % 2], ACTS[s % 4], s % 3 > 0), IMAGES),
    "pad": (lambda s: Residual((3 + s % 3, 6 + s % 4), "pad"), IMAGES),
    "skip": (lambda s: Residual((3 + s % 3, 5 + s % 4), "conv"), IMAGES),
    "pre": (lambda s: Residual((3 + s % 3, 5 + s % 4), "pre"), IMAGES),
    "mlp": (lambda s: mlp((4 + s % 5, 3 + s % 3), ACTS[s % 4]), ROWS),
    "gated": (lambda s: Gated(8, 4 + s % 5), TEXTS),
    "squeezed": (lambda s: Squeezed(4 + s % 3), IMAGES),
    "attention": (lambda s: Attending(8, 2 + 2 * (s % 2), s % 3 > 0, (None, 6)[s % 2], s % 5 > 1), TEXTS),
    "encoder": (
        lambda s: nn.TransformerEncoderLayer(8, 4, 5 + s % 4, batch_first=True, norm_first=s % 2 > 0),
        TEXTS,
    ),
    "encoders": (
        lambda s: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 7, 0.1, "gelu", batch_first=True), 2),
        TEXTS,
    ),
}


def built(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, biases, scales and statistics, and inputs for it."""
    torch.manual_seed(seed)
    make, shape = NETS[name]
    model = make(seed).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator) + 0.1)
        for key, b in model.named_buffers():
            if b.is_floating_point():
                b.copy_(0.5 + torch.rand(b.shape, generator=generator) if "var" in key else torch.randn(b.shape) / 3)
    return model, torch.randn(shape, generator=generator)


def zeroed(model: nn.Module, groups: ChannelGroups, dead: Tensor) -> nn.Module:
    """A copy in which the groups that `dead` marks are zero."""
    out, space = copy.deepcopy(model), WeightSpace.of(model)
    theta = space.point(model)
    theta[(groups.ids >= 0) & dead[groups.ids.clamp_min(0)]] = 0
    space.assign_(out, theta)
    return out


def size(model: nn.Module) -> int:
    """Number of weights."""
    return sum(p.numel() for p in model.parameters())
