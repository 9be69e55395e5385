"""Networks that move along factors: their weights, their metric, and what is merged back."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jacrev
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import fipgeo
from fipgeo import LowRank, MetricField, TaskVector
from fipgeo.lazy import Factors, entries_of

from .models import Tied

seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def filled(module: nn.Module, seed: int, scale: float = 0.4) -> nn.Module:
    for place, p in enumerate(module.parameters()):
        p.copy_(scale * draw(seed + place, *p.shape))
    return module


def net(seed: int = 0) -> nn.Sequential:
    layers = (
        nn.Conv2d(2, 3, 2),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(27, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    )
    return filled(nn.Sequential(*layers).double().eval(), seed)  # type: ignore[return-value]


@settings(max_examples=8, deadline=None)
@given(seed=seeds, rank=st.integers(1, 4))
def test_it_begins_at_the_network_and_merges_into_what_it_computes(seed: int, rank: int) -> None:
    model, x = net(seed), draw(seed + 1, 5, 2, 4, 4)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    slim = LowRank(model, rank, scale=0.5, generator=seed)
    assert slim.names == ["0.weight", "4.weight", "6.weight"] and torch.equal(slim(x), model(x))
    filled(slim.left, seed + 2)
    merged = slim.merge()
    torch.testing.assert_close(merged(x), slim(x))
    assert (merged(x) - model(x)).abs().max() > 1e-3
    products = [0.5 * b.flatten(1) @ a.flatten(1) for b, a in zip(slim.left, slim.right, strict=True)]
    for name, product in zip(slim.names, products, strict=True):
        moved = merged.get_parameter(name) - model.get_parameter(name)
        torch.testing.assert_close(moved.flatten(1), product)
        assert torch.linalg.matrix_rank(moved.flatten(1)) == min(rank, *product.shape)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert [p.requires_grad for p in merged.parameters()] == [p.requires_grad for p in model.parameters()]


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_its_metric_is_that_of_the_weights_pulled_back(seed: int) -> None:
    """J^T g J with J the Jacobian of the product, g of the merged network, both in full."""
    slim, x = LowRank(net(seed), 2, whole="6.bias"), draw(seed + 1, 4, 2, 4, 4)
    filled(slim.left, seed + 2)
    field = MetricField(slim, x, "euclidean")
    inner = MetricField(slim.merge(), x, "euclidean", ["0.weight", "4.weight", "6.weight", "6.bias"])
    factors = {name: p.detach() for name, p in slim.named_parameters() if p.requires_grad}
    assert field.space.names == list(factors) and "module.6.bias" in factors

    def weights(point: Tensor) -> Tensor:
        parts = field.space.unravel(point)
        products = [(parts[f"left.{i}"].flatten(1) @ parts[f"right.{i}"].flatten(1)).flatten() for i in range(3)]
        return torch.cat([*products, parts["module.6.bias"]])

    slope = torch.as_tensor(jacrev(weights)(field.space.ravel(factors)))
    root = inner.at().root.to_dense() @ slope
    torch.testing.assert_close(field.at().root.to_dense(), root)
    v = draw(seed + 3, field.space.dim)
    torch.testing.assert_close(field.at().matvec(v), root.T @ (root @ v) / len(x))


class Attending(nn.Module):
    """Weights in torch's own attention, in a grouped convolution, in a product and in an embedding that is tied."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.attend = nn.Embedding(5, 4), nn.MultiheadAttention(4, 2, batch_first=True)
        self.groups, self.out = nn.Conv1d(4, 4, 3, padding=1, groups=2), nn.Linear(4, 5)
        self.out.weight = self.embed.weight
        self.extra = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = h + self.attend(h, h, h, need_weights=False)[0] @ self.extra.T
        assert self.extra.shape == (4, 4) and self.extra.dim() == 2
        return self.out(self.groups(h.mT).mT).mean(1)


@settings(max_examples=5, deadline=None)
@given(seed=seeds)
def test_weights_are_moved_whatever_they_are_used_for(seed: int) -> None:
    model, x = filled(Attending().double().eval(), seed), torch.randint(5, (3, 6), generator=torch.manual_seed(seed))
    slim = LowRank(model, 2, lambda name, p: p.dim() > 1)
    assert slim.names == ["extra", "embed.weight", "attend.in_proj_weight", "attend.out_proj.weight", "groups.weight"]
    filled(slim.left, seed + 1)
    merged = slim.merge()
    torch.testing.assert_close(slim(x), merged(x))
    with torch.no_grad():
        torch.testing.assert_close(slim(x), merged(x))


class Odd(nn.Module):
    """One weight by keyword, turned round, looked up in and through an LSTM's list."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.memory = nn.Linear(4, 4), nn.LSTM(4, 4, batch_first=True)

    def forward(self, *, a: Tensor) -> Tensor:
        w = self.fc.weight
        h = nn.functional.linear(input=a, weight=w, bias=self.fc.bias) + a @ w.mT + w[torch.tensor([2, 0, 1])]
        return h + self.memory(h[:, None])[0][:, 0]


def test_other_ways_to_use_a_weight_and_copies_agree_with_what_is_merged() -> None:
    slim, a = LowRank(filled(Odd().double().eval(), 0), 2, "*weight*"), draw(1, 3, 4)
    filled(slim.left, 2)
    wanted = slim.merge()(a=a)
    torch.testing.assert_close(slim(a=a), wanted)
    for twin in (copy.deepcopy(slim), pickle.loads(pickle.dumps(slim))):
        assert torch.equal(twin(a=a), slim(a=a))
    other = LowRank(filled(Odd().double().eval(), 5), 2, "*weight*", generator=9)
    other.load_state_dict(slim.state_dict())
    assert torch.equal(other(a=a), slim(a=a))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(slim.float()(a=a.float()), wanted.float(), rtol=0.05, atol=0.05)


class Sizes(TorchDispatchMode):
    """Notes the most numbers that any operator makes, views of what is stored left out."""

    def __init__(self, stored: nn.Module) -> None:
        super().__init__()
        self.stored, self.largest = {p.untyped_storage().data_ptr() for p in stored.parameters()}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        sizes = [t.numel() for t in made if t.untyped_storage().data_ptr() not in self.stored]
        self.largest = max([self.largest, *sizes])
        return out


class Asking(nn.Module):
    """Torch's own attention, and a weight that is asked for its form where gradients are off."""

    def __init__(self) -> None:
        super().__init__()
        self.attend, self.out = nn.MultiheadAttention(30, 2, batch_first=True), nn.Linear(30, 30)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.new_ones(()) * self.out.weight.shape[1] ** -0.5
        return self.out(self.attend(x, x, x, need_weights=False)[0]) * scale


@pytest.mark.parametrize("kind", ["layers", "attention"])
def test_gradients_have_the_size_of_factors(kind: str) -> None:
    layers = nn.Conv2d(2, 30, 3), nn.Flatten(), nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 3)
    model, x = nn.Sequential(*layers).double(), draw(0, 3, 2, 3, 3)
    if kind == "attention":
        model, x = Asking().double(), draw(0, 2, 2, 30)
    slim = LowRank(model, 1, scale=2.0)
    with Sizes(slim) as seen:
        slim(x).sum().backward()
    sizes = sorted(slim.module.get_parameter(name).numel() for name in slim.names)
    assert seen.largest < sizes[-2]  # the last layer of three outputs is smaller than some activations


def test_tied_weights_stay_tied() -> None:
    slim, x = LowRank(filled(Tied().double(), 0), 1), draw(1, 3, 4)
    assert slim.names == ["inner.weight"]
    filled(slim.left, 2)
    merged = slim.merge()
    assert merged.get_submodule("outer").weight is merged.get_submodule("inner").weight
    torch.testing.assert_close(merged(x), slim(x))


def test_the_product_is_a_task_vector_of_factors() -> None:
    model = net()
    slim = LowRank(model, 2, scale=3.0)
    filled(slim.left, 1)
    vector, dense = slim.vector(), TaskVector.between(model, slim.merge())
    filled(slim.right, 2)  # it is a copy
    for name, found in entries_of(vector.tensors).items():
        assert isinstance(found, Factors) and found.rank == 2
        torch.testing.assert_close(found.dense(), dense.tensors[name])


def test_a_path_learns_in_the_factors_and_the_head_and_keeps_what_was() -> None:
    model, old, new = net(3), draw(0, 5, 2, 4, 4), 1 + draw(1, 60, 2, 4, 4)
    y = (new.flatten(1).sum(1) > 32).long()
    slim = LowRank(model, 2, whole="6.*")
    about = {"epochs": 10, "lr": 0.2, "batch_size": 20, "refresh": 3}
    path = fipgeo.adapt(slim, (new, y), nn.functional.cross_entropy, keep=old, **about)
    plain = path[-1].apply_(slim).merge()
    changed = {n for n, p in plain.named_parameters() if not torch.equal(p, model.get_parameter(n))}
    assert changed == {"0.weight", "4.weight", "6.weight", "6.bias"}
    with torch.no_grad():
        loss = [float(nn.functional.cross_entropy(m(new), y)) for m in (model, plain)]
    assert loss[1] < 0.85 * loss[0]
    free = LowRank(model, 2, whole="6.*")
    descent = torch.optim.SGD([p for p in free.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    for _ in range(30):
        descent.zero_grad()
        nn.functional.cross_entropy(free(new), y).backward()
        descent.step()
    with torch.no_grad():
        drifts = [float((m(old) - model(old)).square().mean()) for m in (plain, free)]
    assert drifts[0] < 0.05 * drifts[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_networks_have_narrow_factors_drawn_by_the_generator(dtype: torch.dtype) -> None:
    model = net().to(dtype)
    first = model.get_parameter("0.weight")
    first.grad = torch.ones_like(first)
    slim, same, other = (LowRank(model, 2, generator=seed) for seed in (1, 1, 2))
    assert all(p.dtype == dtype and p.grad is None for p in slim.parameters())
    assert torch.equal(slim.right[0], same.right[0]) and not torch.equal(slim.right[0], other.right[0])
    filled(slim.left, 3)
    x = draw(1, 5, 2, 4, 4).to(dtype)
    torch.testing.assert_close(slim(x), slim.merge()(x), rtol=0.05, atol=0.05)


def test_modes_of_parts_stay_when_it_is_merged() -> None:
    model = net().train()
    model[1].eval()
    merged = LowRank(model, 1).merge()
    assert merged.training and merged.get_submodule("4").training and not merged.get_submodule("1").training


class Checkpointed(nn.Module):
    """Its first half is computed again in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(checkpoint(self.one, x, use_reentrant=True))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_where_factors_would_get_no_gradient_is_refused() -> None:
    model, x = Checkpointed().double(), draw(0, 3, 4).requires_grad_()
    with pytest.raises(NotImplementedError, match="gradients are off inside the network"):
        LowRank(model, 1)(x)
    with torch.no_grad():
        LowRank(model, 1)(x)
    LowRank(model, 1, "two.weight")(x).sum().backward()
    parts: list[Any] = [torch.compile(nn.Linear(4, 4)), torch.jit.script(nn.Linear(4, 4).requires_grad_(False))]
    for part in parts:
        with pytest.raises(ValueError, match="module: '0' is compiled or scripted"):
            LowRank(nn.Sequential(part, nn.Linear(4, 2)), 1, "1.weight")


def test_a_head_that_grew_is_said() -> None:
    slim = LowRank(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), 1)
    grown = fipgeo.grow_head(slim, 3, name="module.1")
    with pytest.raises(ValueError, match=r"'1\.weight' has 3 rows and its factors 1"):
        grown(torch.ones(2, 4))
    whole = fipgeo.grow_head(
        LowRank(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1)), 1, whole="1.*"), 3, name="module.1"
    )
    assert whole(torch.ones(2, 4)).shape == (2, 3)


def test_what_gets_factors_is_said_or_refused() -> None:
    model = net()
    model[6].requires_grad_(False)
    slim = LowRank(model, 1, whole="0.*")
    assert slim.names == ["4.weight"] and not slim.training
    assert not slim.merge().get_parameter("6.weight").requires_grad
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"rank": 0}, "rank, scale: got 0"),
        ({"rank": 2.0}, "rank, scale: got 2.0"),
        ({"scale": 0.0}, "and 0.0, expected"),
        ({"whole": "*"}, "trained whole; choose fewer"),
        ({"where": "0.bias"}, r"where: '0\.bias' has shape \[3\]"),
        ({"where": "4.*weight", "whole": "4.*"}, r"where: '4\.weight' is both"),
        ({"where": "5.*"}, "matches none"),
    ]
    for options, says in wrong:
        with pytest.raises(ValueError, match=says):
            LowRank(model, **options)
    with pytest.raises(ValueError, match="no linear map"):
        LowRank(nn.Sequential(nn.Embedding(3, 4)))
