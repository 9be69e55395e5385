"""Input moments of linear maps: equal to those of activations that hooks collected and torch unfolded."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo.paths import Kept, Position
from fipgeo.paths.layers import LayerGram, layer_grams

from .toys import draw, filled, inputs, kept_of, mlp, same_bits

SEEDS = st.integers(0, 10**6)


def moved(kept: Kept, seed: int, size: float = 0.3) -> Position:
    """A position away from the start."""
    theta = kept.function.map.point()
    return Position(theta + size * draw(seed, len(theta)), kept.function.map.normalisation())


def check(found: LayerGram, x: Tensor, error: Tensor) -> None:
    """Against rows `[groups, L, in]` and errors `[L, groups, out / groups]`."""
    torch.testing.assert_close(found.gram, x.transpose(1, 2) @ x / x.shape[1])
    torch.testing.assert_close(found.mean, x.mean(1))
    ones = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    assert found.gap is not None and found.count == x.shape[1]
    torch.testing.assert_close(found.gap, torch.einsum("lgo,gli->goi", error, ones) / x.shape[1])


def put(model: nn.Module, kept: Kept, position: Position) -> None:
    """Write a position into the module."""
    model.load_state_dict(dict(kept.function.map.named(position.theta)), strict=False)


@given(SEEDS, st.integers(1, 9))
@settings(max_examples=4)
def test_a_linear_layer_sees_what_hooks_see(seed: int, batch_size: int) -> None:
    model, x = mlp(seed), inputs(seed + 1, 10)
    kept = kept_of(model, list(x.split(batch_size)))
    position = moved(kept, seed)
    hidden0 = model[0](x)
    out0 = model(x)
    found = layer_grams(kept, position, gaps=True)
    put(model, kept, position)
    assert list(found) == ["0.weight", "2.weight"] and found["2.weight"].bias == "2.bias"
    check(found["0.weight"], x[None], (hidden0 - model[0](x)).detach()[:, None])
    check(found["2.weight"], model[1](model[0](x)).detach()[None], (out0 - model(x)).detach()[:, None])


class Convs(nn.Module):
    """One convolution, and means over its positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).flatten(2).mean(2)


@pytest.mark.parametrize("max_bytes", [1, 2**30])
@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3},
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2, "bias": False},
        {"kernel_size": (3, 1), "stride": (1, 2), "padding": (2, 0), "dilation": (2, 1), "groups": 4},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 1},
    ],
)
def test_convolutions_are_unfolded_as_torch_does(options: dict[str, Any], max_bytes: int) -> None:
    layer = nn.Conv2d(4, 8, **options)
    model = filled(Convs(layer), 0)
    x = draw(1, 5, 4, 7, 6)
    kept = kept_of(model, x, "euclidean")
    position, out0 = moved(kept, 2), layer(x).detach()
    found = layer_grams(kept, position, gaps=True, positions=None, max_bytes=max_bytes)["layer.weight"]
    put(model, kept, position)
    padding: Any = 1 if layer.padding == "same" else layer.padding
    columns = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)  # [n, C K, P]
    g = layer.groups
    rows = columns.unflatten(1, (g, -1)).permute(1, 0, 3, 2).flatten(1, 2)
    error = (out0 - layer(x).detach()).flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (g, -1))
    check(found, rows, error)
    assert torch.equal(found.restored(found.rows(layer.weight), layer.weight.shape), layer.weight)
    predicted = torch.einsum("goi,gli->lgo", found.rows(layer.weight), rows)
    bias = 0 if layer.bias is None else layer.bias.view(g, -1)
    torch.testing.assert_close(predicted + bias, error.new_tensor(0) + out0_like(layer, x, g))


def out0_like(layer: nn.Module, x: Tensor, groups: int) -> Tensor:
    return layer(x).flatten(2).transpose(1, 2).flatten(0, 1).unflatten(1, (groups, -1))


@pytest.mark.parametrize("dims", [1, 3])
def test_other_numbers_of_spatial_axes(dims: int) -> None:
    kind = {1: nn.Conv1d, 3: nn.Conv3d}[dims]
    layer = kind(2, 3, kernel_size=2, stride=2, padding=1)
    model = filled(Convs(layer), 0)
    x = draw(1, 4, 2, *range(4, 4 + dims))
    kept = kept_of(model, x, "euclidean")
    found = layer_grams(kept, Position(kept.start), positions=None)["layer.weight"]
    # moments of inputs and outputs are tied by the map: mean |y - b|^2 = tr W G W^T
    y = (layer(x) - layer.bias.view(-1, *(1,) * dims)).detach().transpose(0, 1).flatten(1)
    rows = found.rows(layer.weight)[0].detach()
    torch.testing.assert_close(rows @ found.gram[0] @ rows.T, y @ y.T / y.shape[1])


def test_some_positions_estimate_all_of_them() -> None:
    model = filled(Convs(nn.Conv2d(2, 3, 3)), 0)
    kept = kept_of(model, draw(1, 50, 2, 8, 8), "euclidean")
    whole = layer_grams(kept, Position(kept.start), positions=None)["layer.weight"]
    part = layer_grams(kept, Position(kept.start), positions=9, generator=3)["layer.weight"]
    again = layer_grams(kept, Position(kept.start), positions=9, generator=3)["layer.weight"]
    assert part.count == 50 * 9 and whole.count == 50 * 36 and same_bits(part.gram, again.gram)
    assert float((part.gram - whole.gram).norm() / whole.gram.norm()) < 0.3


class Attention(nn.Module):
    """Self-attention over a sequence, examples first or second."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.batch_first = batch_first

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x if self.batch_first else x.transpose(0, 1)
        out = self.inner(x, x, x, key_padding_mask=~mask, need_weights=False)[0]
        return out if self.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize("batch_first", [False, True])
def test_attention_is_seen_and_padding_does_not_count(batch_first: bool) -> None:
    model = filled(Attention(batch_first), 0).eval()
    x, mask = draw(1, 6, 3, 4), torch.tensor([[1, 1, 0], [1, 1, 1]] * 3, dtype=torch.bool)
    kept = kept_of(model, {"x": x, "mask": mask}, mask="mask")
    found = layer_grams(kept, moved(kept, 0), gaps=True)
    assert set(found) == {"inner.in_proj_weight", "inner.out_proj.weight"}
    assert found["inner.in_proj_weight"].bias == "inner.in_proj_bias"
    live = x[mask]
    torch.testing.assert_close(found["inner.in_proj_weight"].gram[0], live.T @ live / len(live))
    assert found["inner.out_proj.weight"].count == len(live)


class Tied(nn.Module):
    """An embedding that is the output layer too, and a matrix that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.twice = nn.Embedding(7, 4), nn.Parameter(torch.zeros(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        h = self.table(ids) @ self.twice
        return F.linear(torch.tanh(h) @ self.twice, self.table.weight)


def test_a_table_that_is_also_an_output_layer_is_left_out_and_uses_add_up() -> None:
    model: Any = filled(Tied(), 0)
    ids = torch.randint(7, (5, 3), generator=torch.Generator().manual_seed(0))
    found = layer_grams(kept_of(model, ids), moved(kept_of(model, ids), 1), gaps=True)
    assert list(found) == ["twice"] and found["twice"].transposed and found["twice"].count == 2 * ids.numel()
    first = model.table.weight[ids.flatten()].detach()
    put(model, kept_of(model, ids), moved(kept_of(model, ids), 1))
    first = model.table.weight[ids.flatten()].detach()
    second = torch.tanh(first @ model.twice.detach())
    both = torch.cat([first, second])
    torch.testing.assert_close(found["twice"].gram[0], both.T @ both / len(both))


def test_weights_that_are_no_coordinates_have_no_moments_and_the_model_is_left_alone() -> None:
    model = mlp(0, norm=True, dropout=True).train()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    kept = kept_of(model, inputs(), params=["0.*"])
    assert list(layer_grams(kept, Position(kept.start), gaps=True)) == ["0.weight"]
    assert model.training and all(same_bits(t, before[n]) for n, t in model.state_dict().items())
