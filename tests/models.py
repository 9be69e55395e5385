"""A table of small networks, one for every way in which real ones are awkward, each with inputs for five examples."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize

EXAMPLES = 5


class Residual(nn.Module):
    """In-place everywhere: the input, two activations and the sum with the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        out = self.relu(self.first(x))
        out = self.second(out)
        out += x
        return self.head(self.relu(out))


class Encoder(nn.Module):
    """A transformer encoder layer with LayerNorm, left in train mode with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.3, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Attention(nn.Module):
    """`nn.MultiheadAttention` as it is called in eval mode, where torch has a fast path without derivatives."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0][:, 0])


class ScaledDotProduct(nn.Module):
    """The attention function itself, whose default kernels lack forward mode; one output per position."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(3, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(out.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """An LSTM or a GRU, read off at the last step."""

    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.cell, self.head = kind(2, 3, batch_first=True), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Tied(nn.Module):
    """Two layers that share a weight, as the input and the output of a language model do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)
        self.outer.weight = self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(x)))


class Symmetric(nn.Module):
    """A parametrisation: the upper triangle decides."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).T


class Structured(nn.Module):
    """Keywords in, and the output in one of the shapes that models return."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.wrap = nn.Linear(3, 4), nn.Linear(4, 2), wrap

    def forward(self, x: Tensor, shift: Tensor | None = None) -> Any:
        hidden = torch.sin(self.a(x))
        return self.wrap(self.b(hidden if shift is None else hidden + shift), hidden)


class Text(nn.Module):
    """Embedded tokens under a mask that Python looks at, so examples cannot be vectorised."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm, self.head = nn.Embedding(7, 3, padding_idx=0), nn.LayerNorm(3), nn.Linear(3, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.embedding(ids))
        if bool((mask == 0).any()):
            x = x * mask.unsqueeze(-1)
        return self.head(x.sum(1) / mask.sum(1, keepdim=True))


class Remembering(nn.Module):
    """Keeps its last activation and counts its calls, as modules that are made for inspection do."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.calls, self.last = nn.Linear(3, 4), nn.Linear(4, 3), 0, torch.zeros(1)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.steps: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.steps += 1
        self.last = torch.tanh(self.a(x))
        return self.b(self.last)


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))


def _convnet() -> nn.Module:
    convolution = nn.Conv2d(1, 2, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(2), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3))


def _weight_norm() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def _spectral_norm() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def _parametrized() -> nn.Module:
    layer = nn.Linear(3, 3)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return nn.Sequential(layer, nn.Tanh(), nn.Linear(3, 2))


def _frozen_part() -> nn.Module:
    module = _mlp()
    module[0].requires_grad_(False)  # type: ignore[index]
    return module


def _training() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.ReLU(), nn.Linear(4, 3)).train()


@dataclass(frozen=True)
class Case:
    """A network and what is special about it.

    Attributes:
        build: The network with torch's own initial weights.
        shape: Of one example; or None for the inputs of `text` and `keywords`.
        forward_mode: Whether jvp works on it.
        vectorised: Whether vmap over tangents and cotangents works.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    forward_mode: bool = True
    vectorised: bool = True
    inputs: Callable[[torch.Generator], Any] | None = None


def _keywords(generator: torch.Generator) -> dict[str, Tensor]:
    draw = torch.randn(EXAMPLES, 7, generator=generator, dtype=torch.float64)
    return {"x": draw[:, :3], "shift": draw[:, 3:]}


def _text(generator: torch.Generator) -> dict[str, Tensor]:
    ids = torch.randint(1, 7, (EXAMPLES, 4), generator=generator)
    mask = torch.arange(4) < torch.randint(1, 4, (EXAMPLES, 1), generator=generator)
    return {"ids": ids * mask, "mask": mask.to(torch.get_default_dtype())}


CASES: dict[str, Case] = {
    "mlp": Case(_mlp, (3,)),
    "convnet": Case(_convnet, (1, 4, 4)),
    "in_place": Case(Residual, (4,)),
    "encoder": Case(Encoder, (3, 4)),
    "attention": Case(Attention, (3, 4)),
    "scaled_dot_product": Case(ScaledDotProduct, (3, 3)),
    "lstm": Case(lambda: Recurrent(nn.LSTM), (3, 2)),
    "gru": Case(lambda: Recurrent(nn.GRU), (3, 2)),
    "tied": Case(Tied, (4,)),
    "weight_norm": Case(_weight_norm, (3,), forward_mode=False),
    "spectral_norm": Case(_spectral_norm, (3,)),
    "parametrized": Case(_parametrized, (3,)),
    "frozen_part": Case(_frozen_part, (3,)),
    "training": Case(_training, (3,)),
    "remembering": Case(Remembering, (3,)),
    "keywords": Case(lambda: Structured(lambda f, h: f), (), inputs=_keywords),
    "tuple_output": Case(lambda: Structured(lambda f, h: (f, h)), (3,)),
    "dict_output": Case(lambda: Structured(lambda f, h: {"f": f, "h": h}), (3,)),
    "logits_output": Case(lambda: Structured(lambda f, h: SimpleNamespace(logits=f, hidden=h)), (3,)),
    "text": Case(Text, (), inputs=_text),
}


def build(name: str, seed: int = 0) -> tuple[nn.Module, Any]:
    """A network of the table with random weights and statistics, and inputs (a tensor or a dict) for five examples."""
    case, generator = CASES[name], torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        module = case.build()
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(0.6 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
        for key, tensor in module.named_buffers():
            if key.endswith("running_var"):
                tensor.abs_().add_(0.5)
    if case.inputs is not None:
        return module, case.inputs(generator)
    shape = (EXAMPLES, *case.shape)
    return module, torch.randn(shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


def cut(inputs: Any, *sizes: int) -> list[Any]:
    """Inputs of a network of the table as a list of batches of these sizes."""
    if isinstance(inputs, Mapping):
        parts = {key: tensor.split(sizes) for key, tensor in inputs.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(len(sizes))]
    return list(inputs.split(sizes))
