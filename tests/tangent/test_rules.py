"""Rules for tangents of layers: the numbers of torch's own forward mode and its gradients, and that they are in use."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from fipgeo import TangentModel
from fipgeo.tangent import rules
from fipgeo.tangent.rules import RULES, Rules, usable

seeds = st.integers(0, 2**31)


class Attention(nn.Module):
    """Self-attention by torch's function on projections, with or without a mask."""

    def __init__(self, mask: bool = False) -> None:
        super().__init__()
        self.mixed, self.mask = nn.Linear(6, 18), mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mixed(x).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4).unbind()
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril() if self.mask else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.3 if self.mask else None)


class Heads(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.heads = nn.Linear(6, 6), nn.MultiheadAttention(6, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.heads(x, x, x, need_weights=False)[0]


def images(*layers: nn.Module) -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), *layers)
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            part.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    return net


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2, bias=False)), (3, 4)),
    "linear on one vector and on sequences": (lambda: nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 2)), (2, 3, 4)),
    "convolutions": (lambda: images(nn.ReLU(), nn.Conv2d(4, 2, 3, 2, 1, groups=2, bias=False)), (2, 3, 7, 7)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 4, 3, padding="same"), nn.Conv1d(4, 2, 3)), (2, 3, 6)),
    "activations": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.GELU(), nn.Linear(5, 5), nn.GELU("tanh")),
        (3, 4),
    ),
    "convolutions of all options": (
        lambda: images(nn.Conv2d(4, 4, 3, (1, 2), (2, 1), 2), nn.ReLU(), nn.Conv2d(4, 6, (3, 1), padding="same")),
        (2, 3, 7, 8),
    ),
    "batch norm": (lambda: images(nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4, affine=False)), (2, 3, 4, 4)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.LayerNorm(6, bias=False)), (2, 3, 4)),
    "layer norm without weights": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, elementwise_affine=False)),
        (3, 4),
    ),
    "attention": (Attention, (2, 5, 6)),
    "masked attention": (lambda: Attention(mask=True), (2, 5, 6)),
    "heads": (Heads, (2, 5, 6)),
    "heads without biases": (lambda: Heads(bias=False), (2, 5, 6)),
    "encoder": (lambda: nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), (2, 5, 6)),
}


def made(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    build, shape = CASES[name]
    torch.manual_seed(seed)
    net = build().eval()
    for p in net.parameters():
        p.data = torch.randn(p.shape)
    return net, torch.randn(shape)


def ran(model: TangentModel, x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs with and without gradients on, and gradients of a random projection."""
    with torch.no_grad():
        quiet = model(x)
    out = model(x)
    model.zero_grad()
    u = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    (out * u).sum().backward()
    return quiet, out.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in model.tangents().values()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", ["all", "some"])
@settings(max_examples=4)
@given(seed=seeds)
def test_they_are_torchs_own(name: str, part: str, seed: int) -> None:
    net, x = made(name, seed)
    names = [n for n, _ in net.named_parameters()]
    model = TangentModel(net, "*" if part == "all" else names[: max(len(names) // 2, 1)])
    for t in model.tangents().values():
        t.data.normal_()
    found = ran(model, x)
    before = dict(RULES)
    try:
        RULES.clear()
        expected = ran(model, x)
    finally:
        RULES.update(before)
    for a, b in zip([*found[:2], *found[2]], [*expected[:2], *expected[2]], strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["linear", "convolutions", "attention", "layer norm", "batch norm", "encoder"])
def test_gradients_of_inputs_and_of_gradients(name: str) -> None:
    net, x = made(name, 1)
    model = TangentModel(net)
    for t in model.tangents().values():
        t.data.normal_()

    def function(x: Tensor) -> Tensor:
        return model(x.view(x_shape)).square().sum()

    x_shape = x.shape
    found: Any = torch.autograd.functional.hessian(function, x.flatten())
    assert torch.allclose(found, found.T, rtol=1e-8, atol=1e-8) and bool(found.any())
    assert torch.autograd.gradcheck(function, x.flatten().requires_grad_(), rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "func"),
    [
        ("linear", F.linear),
        ("convolutions", torch.conv2d),
        ("conv1d", torch.conv1d),
        ("batch norm", F.batch_norm),
        ("convolutions", F.relu),
        ("activations", F.gelu),
        ("layer norm", F.layer_norm),
        ("attention", F.scaled_dot_product_attention),
        ("heads", F.multi_head_attention_forward),
        ("encoder", F.multi_head_attention_forward),
    ],
)
def test_they_are_in_use(name: str, func: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = made(name, 0)
    rule, results = RULES[func], []

    def watched(*args: Any, **kwargs: Any) -> Any:
        results.append(rule(*args, **kwargs))
        return results[-1]

    monkeypatch.setitem(rules.RULES, func, watched)
    TangentModel(net)(x)
    assert results[-1] is not None


def test_where_they_do_not_apply() -> None:
    weight = torch.randn(2, 2)
    with forward_ad.dual_level(), Rules():
        assert forward_ad.unpack_dual(F.linear(weight, weight)).tangent is None
    assert usable([weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not usable([weight])
    inside: list[bool] = []
    torch.func.vmap(lambda x: inside.append(usable([weight])) or x)(weight)
    assert inside == [False]
