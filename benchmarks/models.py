"""The networks and inputs that the metric benchmark measures on: one `Case` a network and number of examples.

| name | network | weights | outputs of an example |
| --- | --- | --- | --- |
| mlp | 784-512-512-10, ReLU (other widths for the series over weights) | 0.67 M | 10 |
| resnet20 | CIFAR ResNet-20, pretrained where FIPGEO_DATA has it, else with random weights | 0.27 M | 10 |
| vit | ViT-tiny: 12 layers, width 192, patch 4 on 32 x 32, random weights | 5.4 M | 10 |
| bert | BERT: 4 layers, width 256, 64 tokens with an attention mask, random weights | 11.2 M | 4 |
| gpt2 | GPT-2 small: 12 layers, width 768, tied vocabulary of 50,257, 64 tokens, random weights | 124 M | 3.2 M |
| tiny | 6-8-3, Tanh; for tests | 83 | 3 |
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.measure import Unavailable, data_folder_exists

Inputs = Tensor | dict[str, Tensor]

EXAMPLES = {
    "mlp": [100, 256, 400, 1000],
    "resnet20": [16, 64, 100, 400],
    "vit": [16, 100],
    "bert": [16],
    "gpt2": [1],
    "tiny": [5],
}
"""The numbers of examples that a full run measures."""
SERIES = {"mlp": [100, 178, 316, 562, 1000], "resnet20": [16, 28, 50, 89, 160], "tiny": [4, 8]}
"""Numbers of examples of the series over N: a decade."""
WIDTHS = {"mlp": [128, 256, 512, 1024], "tiny": [4, 8]}
"""Hidden widths of the series over D: a decade of weights and more."""
BATCH = 256


class Scores(nn.Module):
    """A language model as a map from a dict of tensors to its logits, the form in which all methods see it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """The logits."""
        return self.model(**batch).logits


@dataclass(frozen=True)
class Case:
    """A network with its inputs.

    Attributes:
        name: Such as "resnet20-N64"; the case of the records.
        model: In evaluation mode.
        inputs: A tensor `[N, ...]`, or a dict of tensors.
        num_examples: N.
        num_outputs: Outputs of one example, all axes together.
        seed: What weights (where random) and inputs were drawn from.
        notes: What a reader of the record should know.
    """

    name: str
    model: nn.Module
    inputs: Inputs
    num_examples: int
    num_outputs: int
    seed: int = 0
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The weights by name, tied ones once."""
        return dict(self.model.named_parameters())

    @property
    def num_weights(self) -> int:
        """D."""
        return sum(p.numel() for p in self.params.values())

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.model.parameters()).device

    @property
    def batches(self) -> list[Inputs]:
        """The inputs in the batches that all methods get."""
        if isinstance(self.inputs, Tensor):
            return list(self.inputs.split(BATCH))
        columns = {key: value.split(BATCH) for key, value in self.inputs.items()}
        return [dict(zip(columns, parts, strict=True)) for parts in zip(*columns.values(), strict=True)]

    @property
    def forward_fn(self) -> Callable[[nn.Module, Any], Any] | None:
        """How a model with dict inputs is called; None for the default."""
        return None if isinstance(self.inputs, Tensor) else lambda model, batch: model(batch)

    def fresh(self) -> Case:
        """The same case with a network of its own, about which nobody has remembered anything."""
        return replace(self, model=copy.deepcopy(self.model))

    def vectors(self, count: int, seed: int = 1) -> Tensor:
        """Random vectors `[count, D]` with entries of variance 1."""
        generator = torch.Generator().manual_seed(1000 * self.seed + seed)
        return torch.randn(count, self.num_weights, generator=generator).to(self.device)


def build(name: str, examples: int, *, seed: int = 0, device: str = "cpu", width: int | None = None) -> Case:
    """The case of a network and a number of examples.

    Raises:
        KeyError: There is no such network.
        Unavailable: A package that the network needs cannot be imported.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs, notes = BUILDERS[name](examples, width)
    model = model.eval().to(device)
    for p in model.parameters():
        p.requires_grad_(True)
    moved = inputs.to(device) if isinstance(inputs, Tensor) else {k: v.to(device) for k, v in inputs.items()}
    one = moved[:1] if isinstance(moved, Tensor) else {k: v[:1] for k, v in moved.items()}
    with torch.no_grad():
        outputs = model(one).numel()
    label = name if width is None else f"{name}-W{width}"
    label += f"-N{examples}" + ("" if device == "cpu" else f"-{device}")
    return Case(label, model, moved, examples, outputs, seed, notes)


def _mlp(examples: int, width: int | None) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    w = width or 512
    model = nn.Sequential(nn.Linear(784, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10))
    return model, torch.randn(examples, 784), {}


def _tiny(examples: int, width: int | None) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    w = width or 8
    return nn.Sequential(nn.Linear(6, w), nn.Tanh(), nn.Linear(w, 3)), torch.randn(examples, 6), {}


class _Block(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.extra = stride, out - into

    def forward(self, x: Tensor) -> Tensor:
        h = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        skip = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.extra // 2, self.extra // 2))
        return F.relu(h + skip)


def _resnet20(examples: int, width: int | None) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    del width
    if data_folder_exists():
        pretrained = importlib.import_module("benchmarks.pretrained")
        model, inputs, _, _ = pretrained.load("akamaster_cifar10_resnet20", examples)
        return model, inputs, {"weights": "pretrained"}
    sizes = [(16, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 32, 1), (32, 64, 2)]
    blocks = [_Block(*size) for size in [*sizes, (64, 64, 1), (64, 64, 1)]]
    stem = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, torch.randn(examples, 3, 32, 32), {"weights": "random"}


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).reshape(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        x = x + self.out((attention @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.mlp(self.norm2(x))


class _ViT(nn.Module):
    def __init__(self, width: int = 192, depth: int = 12, heads: int = 3, patch: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (32 // patch) ** 2 + 1, width))
        self.layers = nn.Sequential(*[_Layer(width, heads) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


def _vit(examples: int, width: int | None) -> tuple[nn.Module, Tensor, dict[str, Any]]:
    del width
    return _ViT(), torch.randn(examples, 3, 32, 32), {"weights": "random"}


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except Exception as error:  # an unsuitable companion package breaks its import in many ways
        raise Unavailable(f"transformers cannot be imported: {type(error).__name__}") from error


def _bert(examples: int, width: int | None) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    hf, wide = _transformers(), width or 256
    config = hf.BertConfig(
        hidden_size=wide,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=4 * wide,
        max_position_embeddings=128,
        num_labels=4,
        attn_implementation="eager",  # forward-mode rules are missing for the fused kernels
    )
    tokens = torch.randint(0, config.vocab_size, (examples, 64))
    lengths = torch.randint(32, 65, (examples, 1))
    inputs = {"input_ids": tokens, "attention_mask": (torch.arange(64)[None] < lengths).long()}
    return Scores(hf.BertForSequenceClassification(config)), inputs, {"weights": "random", "attention": "eager"}


def _gpt2(examples: int, width: int | None) -> tuple[nn.Module, dict[str, Tensor], dict[str, Any]]:
    hf = _transformers()
    small = {} if width is None else {"n_embd": width, "n_layer": 2, "n_head": 2, "vocab_size": 101}
    config = hf.GPT2Config(attn_implementation="eager", use_cache=False, **small)
    tokens = torch.randint(0, config.vocab_size, (examples, 64 if width is None else 6))
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return Scores(hf.GPT2LMHeadModel(config)), inputs, {"weights": "random", "attention": "eager", "tied": True}


BUILDERS: dict[str, Callable[[int, int | None], tuple[nn.Module, Any, dict[str, Any]]]] = {
    "mlp": _mlp,
    "resnet20": _resnet20,
    "vit": _vit,
    "bert": _bert,
    "gpt2": _gpt2,
    "tiny": _tiny,
}
