"""Heads that grow: old rows stay to the bit, new ones begin as asked, and what cannot grow is said."""

import copy

import pytest
import torch
from hygiene import unchanged
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import fipgeo
from fipgeo import grow_head


class Net(nn.Module):
    """Its head is neither the last module nor the only linear one; it may be tied, bias-free or shared."""

    def __init__(self, bias: bool = True, tied: bool = False) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4, bias=bias)
        self.embed = nn.Embedding(4, 6)
        self.body = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(6)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.head(self.norm(self.body(x).tanh()))}


def states(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


@given(st.integers(0, 10**6), st.sampled_from(["zeros", "normal", "mean"]), st.booleans(), st.integers(1, 5))
def test_old_rows_stay_and_new_ones_begin_as_asked(seed: int, init, bias: bool, more: int) -> None:
    random = torch.Generator().manual_seed(seed)
    model, x = Net(bias), torch.randn(7, 5, generator=random)
    before = states(model)
    with unchanged(model, x):
        grown = grow_head(model, 4 + more, name="head", init=init, std=0.3, generator=seed)
    after = states(grown)
    for name, t in before.items():
        assert torch.equal(after[name][: len(t)] if t.dim() else after[name], t)
    assert ("head.bias" in after) == bias and grown.training and grown.head.out_features == 4 + more  # type: ignore
    old, new = model.eval()(x)["logits"], grown.eval()(x)["logits"]
    assert torch.allclose(new[:, :4], old, atol=1e-12)
    if init == "zeros":
        assert not new[:, 4:].any()
    elif init == "mean":
        assert torch.allclose(new[:, 4:], old.mean(1, keepdim=True).expand(-1, more))
    else:
        rows = torch.randn(more, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        assert torch.allclose(after["head.weight"][4:], 0.3 * rows.double(), atol=1e-6)
        assert not bias or not after["head.bias"][4:].any()


def test_the_layer_of_the_outputs_is_found() -> None:
    model, x = Net(), torch.randn(9, 5)
    with unchanged(model, x):
        grown = grow_head(model, 6, inputs=x)
    assert grown.eval()(x)["logits"].shape == (9, 6)
    only = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 3))
    assert grow_head(only, 5)(torch.randn(2, 1, 5)).shape == (2, 5)
    with pytest.raises(ValueError, match=r"2 nn.Linear \('head', 'body'\).*inputs="):
        grow_head(model, 6)
    with pytest.raises(ValueError, match="no nn.Linear puts out what the model puts out"):
        grow_head(nn.Sequential(nn.Linear(3, 2), nn.Softmax(1)), 3, inputs=torch.randn(2, 3))
    for name, what in [("norm", "a BatchNorm1d"), ("tail", "no module of this model")]:
        with pytest.raises(ValueError, match=f"name: '{name}' is {what}.*'head', 'body'"):
            grow_head(model, 6, name=name)


def test_wrapped_shared_frozen_and_half_precision_heads_grow() -> None:
    model, x = Net(), torch.randn(3, 5)
    assert type(grow_head(nn.DataParallel(copy.deepcopy(model)), 5, inputs=x)) is Net
    shared = nn.Linear(4, 4, bias=False)
    twice = nn.Sequential(shared, nn.Tanh(), shared)  # one module under two names grows, though its inputs do not
    assert grow_head(twice, 6, name="2")[0].weight.shape == (6, 4)  # type: ignore[index]
    model.head.weight.requires_grad_(False)
    half = grow_head(model.to(torch.bfloat16), 5, name="head", init="normal").head
    assert isinstance(half, nn.Linear)
    assert half.weight.dtype == torch.bfloat16 and not half.weight.requires_grad and half.bias.requires_grad


def test_what_cannot_grow_is_said_and_nothing_is_changed() -> None:
    tied = Net(tied=True)
    with unchanged(tied), pytest.raises(ValueError, match=r"the weight of 'head' is tied to 'weight' of 'embed'"):
        grow_head(tied, 6, name="head")
    computed = parametrizations.weight_norm(nn.Linear(3, 2))
    with pytest.raises(ValueError, match="computed by a parametrisation"):
        grow_head(computed, 4)
    with pytest.raises(ValueError, match="no weights yet"):
        grow_head(nn.Sequential(nn.LazyLinear(2)), 4)
    with pytest.raises(ValueError, match="got 4, expected more than the 4"):
        grow_head(Net(), 4, name="head")
    with pytest.raises(ValueError, match="init: got 'ones'"):
        grow_head(Net(), 5, name="head", init="ones")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="std: got 0"):
        grow_head(Net(), 5, name="head", std=0)
    with pytest.raises(TypeError, match="model: got str"):
        grow_head("net", 5)  # type: ignore[arg-type]


def test_a_grown_network_learns_new_classes_along_a_path() -> None:
    random = torch.Generator().manual_seed(3)
    old, new = torch.randn(30, 5, generator=random), torch.randn(30, 5, generator=random) + 3
    model = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
    grown = grow_head(model, 3, inputs=old)
    y = torch.full((30,), 2)
    path = fipgeo.adapt(grown, (new, y), nn.functional.cross_entropy, keep=old, epochs=3, batch_size=10)
    loss = [nn.functional.cross_entropy(p.apply_(copy.deepcopy(grown))(new), y).item() for p in (path[0], path[-1])]
    assert loss[1] < loss[0]
