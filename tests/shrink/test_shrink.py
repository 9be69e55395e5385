"""Networks without their idle channels compute the same function and are as small as they should be."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import copy
import os
import pickle
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import fipgeo
from fipgeo.paths.objectives.patterns import Groups
from fipgeo.shrink import ChannelGroups, NarrowAttention, channel_groups, shrink

from .nets import NETS, Residual, built, size, zeroed

SEEDS = st.integers(0, 10_000)


def some(groups: ChannelGroups, seed: int, share: float = 0.5) -> Tensor:
    """Which channels are to become zero; the first of each family stays."""
    dead = torch.rand(len(groups), generator=torch.Generator().manual_seed(seed)) < share
    for family in groups.families:
        dead[family.first] = False
    return dead


@given(name=st.sampled_from(list(NETS)), seed=SEEDS)
def test_what_is_zero_goes_and_the_outputs_stay(name: str, seed: int) -> None:
    check_removal(name, seed)


@pytest.mark.parametrize("name", NETS)
def test_every_kind_of_network_shrinks(name: str) -> None:
    check_removal(name, 1)


def check_removal(name: str, seed: int) -> None:
    """Set about half of the channels to zero, take them out, and compare."""
    model, x = built(name, seed)
    groups = channel_groups(model, x)
    assert len(groups)
    dead = some(groups, seed)
    sparse = zeroed(model, groups, dead)
    before = copy.deepcopy(sparse.state_dict())
    small = shrink(sparse, x)
    fresh = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1))
    torch.testing.assert_close(small(fresh), sparse(fresh), rtol=1e-10, atol=1e-10)
    gone = ((groups.ids >= 0) & dead[groups.ids.clamp_min(0)]) | (
        (groups.columns >= 0) & dead[groups.columns.clamp_min(0)]
    )
    assert size(small) == size(model) - int(gone.sum())
    assert all(torch.equal(t, before[key]) for key, t in sparse.state_dict().items())
    assert not torch.allclose(sparse(x), model(x)) or not dead.any()


@pytest.mark.parametrize("name", NETS)
def test_a_network_without_idle_channels_stays_as_it_is(name: str) -> None:
    model, x = built(name, 3)
    small = shrink(model, x)
    assert small is not model
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", NETS)
def test_groups_are_the_channels_that_the_outputs_do_not_miss(name: str) -> None:
    """Another route: once a group is zero, its columns may hold anything."""
    model, x = built(name, 5)
    groups, space = channel_groups(model, x), fipgeo.WeightSpace.of(model)
    reads = groups.columns >= 0
    for k in range(0, len(groups), 4):
        dead = torch.zeros(len(groups), dtype=torch.bool)
        dead[k] = True
        sparse = zeroed(model, groups, dead)
        wanted, theta = sparse(x), space.point(sparse)
        theta[reads & (groups.columns == k)] = 7.0
        space.assign_(sparse, theta)
        torch.testing.assert_close(sparse(x), wanted)
    assert set(groups.ids.unique().tolist()) - {-1} == set(range(len(groups)))
    assert not ((groups.ids >= 0) & (groups.ids == groups.columns)).any()


def test_channels_of_a_stage_are_one_family_and_those_of_blocks_are_others() -> None:
    model = Residual((4, 6), "conv").eval()
    groups = channel_groups(model, torch.randn(2, 3, 8, 8))
    assert [f.name for f in groups.families] == [
        "stem + blocks.0.conv2",
        "blocks.0.conv1",
        "blocks.1.conv1",
        "blocks.1.conv2 + blocks.1.skip + blocks.2.conv2",
        "blocks.2.conv1",
    ]
    assert groups.barriers == {"head": "the outputs of the model"}
    assert groups.families[1].readers == ("blocks.0.conv2.weight",)
    assert groups.families[1].weights == 4 * 9 + 2 and groups.families[1].size == 4


def test_padding_of_channels_is_a_barrier_for_the_stages_alone() -> None:
    model = Residual((4, 6), "pad").eval()
    groups = channel_groups(model, torch.randn(2, 3, 8, 8))
    assert [f.name for f in groups.families] == [f"blocks.{i}.conv1" for i in range(3)]
    assert "pad" in groups.barriers["stem"]


def test_constants_go_into_biases_where_there_is_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Sigmoid(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = 0  # the unit is sigmoid(bias) for every input
    x = torch.randn(5, 4)
    small = shrink(model, x)
    assert small[0].out_features == 2 and size(small) == size(model) - 7
    torch.testing.assert_close(small(x), model(x), rtol=1e-12, atol=1e-12)
    bare = nn.Sequential(model[0], nn.Sigmoid(), nn.Linear(3, 2, bias=False))
    assert shrink(bare, x)[0].out_features == 3
    assert "no bias" in channel_groups(bare, x).barriers["0"]


def test_a_constant_that_meets_padding_stays() -> None:
    x = torch.randn(2, 3, 6, 6)
    for padding, left in ((1, 4), (0, 3)):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3, padding=padding), nn.Flatten())
        with torch.no_grad():
            model[0].weight[2], model[0].bias[2] = 0, 0.7
        small = shrink(model, x)
        assert small[0].out_channels == left and small[2].in_channels == left
        torch.testing.assert_close(small(x), model(x))
        with torch.no_grad():
            model[0].bias[2] = -0.7  # nothing is left of it after the ReLU
        assert shrink(model, x)[0].out_channels == 3


def test_channels_that_nobody_reads_go_with_all_that_made_them() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        model[4].weight[:, 3] = 0
        model[2].weight[[0, 1, 2, 4, 5], 1] = 0  # unit 1 is read by unit 3 alone
    x = torch.randn(3, 4)
    small = shrink(model, x)
    assert (small[0].out_features, small[2].out_features) == (4, 5)
    torch.testing.assert_close(small(x), model(x))


def test_one_channel_stays_even_if_all_are_zero() -> None:
    model = nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    with torch.no_grad():
        model[0].weight.zero_()
    small = shrink(model, torch.randn(3, 4))
    assert small[0].out_features == 1
    torch.testing.assert_close(small(torch.ones(1, 4)), model[2].bias[None])


def test_grouped_convolutions_lose_whole_groups() -> None:
    model = nn.Sequential(nn.Conv1d(3, 6, 1), nn.ReLU(), nn.Conv1d(6, 9, 3, padding=1, groups=3), nn.Flatten())
    model.append(nn.Linear(9 * 4, 2))
    x = torch.randn(2, 3, 4)
    groups = channel_groups(model, x)
    assert len(groups) == 3
    small = shrink(zeroed(model, groups, torch.tensor([False, True, False])), x)
    assert (small[0].out_channels, small[2].groups, small[2].out_channels, small[4].in_features) == (4, 2, 6, 24)


def test_a_layer_called_twice_is_cut_once() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.again, self.last = nn.Linear(3, 5), nn.Linear(5, 5), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.relu(self.again(F.relu(self.again(F.relu(self.first(x)))))))

    model, x = Twice(), torch.randn(4, 3)
    groups = channel_groups(model, x)
    assert len(groups) == 5  # rows and columns of the shared layer are one
    sparse = zeroed(model, groups, torch.arange(5) == 2)
    small = shrink(sparse, x)
    assert small.again.weight.shape == (4, 4)
    torch.testing.assert_close(small(x), sparse(x))


def test_tied_tensors_stay_tied() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False))
    model[1].weight = model[0].weight
    tokens = torch.randint(7, (2, 3))
    groups = channel_groups(model, tokens)
    assert len(groups) == 4
    small = shrink(zeroed(model, groups, torch.arange(4) == 1), tokens)
    assert small[0].weight is small[1].weight and small[0].weight.shape == (7, 3)
    assert (small[0].embedding_dim, small[1].in_features) == (3, 3)


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("shape", [(5, 8), (3, 5, 8)])
def test_narrow_attention_is_attention_with_dead_heads(shape: tuple[int, ...], averaged: bool) -> None:
    torch.manual_seed(1)
    model = nn.MultiheadAttention(8, 4, batch_first=True).eval()
    with torch.no_grad():
        model.out_proj.weight[:, 2:4] = 0
        model.in_proj_weight[16 + 6 :] = 0  # the value of the last head is its bias
    x = torch.randn(3, 5, 8)
    small = shrink(model, {"query": x, "key": x, "value": x, "need_weights": False}, output_fn=lambda out: out[0])
    assert isinstance(small, NarrowAttention) and small.num_heads == 2 and small.out_proj.in_features == 4
    y = torch.randn(shape)
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    padding = torch.tensor([False] * 4 + [True]) if len(shape) == 2 else torch.rand(3, 5) > 0.6
    padding[..., 0] = False
    heads = torch.randn(4 if len(shape) == 2 else 12, 5, 5)
    for mask in (None, causal, heads):
        for pads in (None, padding):
            given = {"attn_mask": mask, "key_padding_mask": pads, "need_weights": averaged}
            if mask is heads and pads is not None:
                given["key_padding_mask"] = torch.zeros_like(pads, dtype=torch.float64).masked_fill(pads, -torch.inf)
            torch.testing.assert_close(small(y, y, y, **given)[0], model(y, y, y, **given)[0])
    weights = model(y, y, y, average_attn_weights=False)[1]
    assert weights is not None
    kept = weights.index_select(-3, torch.tensor([0, 2]))
    torch.testing.assert_close(small(y, y, y, average_attn_weights=False)[1], kept)
    torch.testing.assert_close(small(y, y, y)[1], kept.mean(-3))
    again = pickle.loads(pickle.dumps(small))
    torch.testing.assert_close(again(y, y, y)[0], model(y, y, y)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoders_without_heads_run_with_padding_masks() -> None:
    model, x = built("encoders", 0)
    groups = channel_groups(model, x)
    assert sum(f.name.endswith("heads") for f in groups.families) == 2
    sparse = zeroed(model, groups, torch.tensor([n.endswith("[1]") for n in groups.names]))
    small = shrink(sparse, x)
    assert all(layer.self_attn.num_heads == 1 for layer in small.get_submodule("layers").children())
    padding = torch.zeros(4, 6, dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        ours, theirs = (m(x, src_key_padding_mask=padding)[:, :4] for m in (small, sparse.train(False)))
    torch.testing.assert_close(ours, theirs)


def test_attention_weights_that_the_model_returns_keep_the_heads() -> None:
    class Shown(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            out, weights = self.attention(x, x, x)
            return out, weights

    groups = channel_groups(Shown(), torch.randn(2, 3, 8))
    assert len(groups) == 0 and "outputs move" in groups.barriers["attention heads"]


class Views(nn.Module):
    """A forward with sizes of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.a, self.b = kind, nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        match self.kind:
            case "view":
                h = h.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6)
            case "slice":
                h = torch.cat([h[:, 3:], h[:, :3]], 1)
            case "set":
                h[:, 0] = 1.0
            case "norm":
                h = F.layer_norm(h, h.shape[1:])
            case "softmax":
                h = h.softmax(-1)
            case "max":
                h = h * h.max()
            case "position":
                h = h + torch.arange(6.0)
        return self.b(h)


@pytest.mark.parametrize("kind", ["view", "slice", "set", "norm", "softmax", "max", "position"])
def test_what_is_not_understood_is_a_barrier(kind: str) -> None:
    torch.manual_seed(0)
    model, x = Views(kind), torch.randn(3, 4)
    groups = channel_groups(model, x)
    assert len(groups) == 0 and set(groups.barriers) == {"a", "b"} and "stays: a (" in str(groups)
    with torch.no_grad():
        model.a.weight[2], model.a.bias[2] = 0, 0
    torch.testing.assert_close(shrink(model, x)(x), model(x))


def test_weights_that_are_computed_are_barriers() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 2))
    assert len(channel_groups(model, torch.randn(2, 4))) == 0


def test_groups_follow_the_chosen_parameters() -> None:
    model, x = built("mlp", 0)
    groups = channel_groups(model, x, params="*.weight")
    assert len(groups.ids) == fipgeo.WeightSpace.of(model, "*.weight").dim
    assert len(groups) == len(channel_groups(model, x))


def test_modes_buffers_gradients_and_random_streams_stay() -> None:
    model, x = built("conv", 1)
    model.train()
    model(x).sum().backward()
    before = {key: t.clone() for key, t in model.state_dict().items()}
    grads, state, inputs = (
        [p.grad.clone() for p in model.parameters() if p.grad is not None],
        torch.get_rng_state(),
        x.clone(),
    )
    channel_groups(model, x)
    shrink(model, x)
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())
    assert all(torch.equal(a, b.grad) for a, b in zip(grads, model.parameters(), strict=True) if b.grad is not None)
    assert all(m.training for m in model.modules()) and torch.equal(x, inputs)
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_path_ends_in_a_smaller_network() -> None:
    model, x = built("mlp", 2)
    data = torch.randn(64, 5)
    groups = channel_groups(model, x)
    objective = fipgeo.Sparsity(0.4, pattern=Groups(groups.ids))
    method = fipgeo.Method(control=fipgeo.StepControl(0.2, 0.1, 0.4, 0.1), corrector=fipgeo.GaussNewton())
    path = fipgeo.walk(fipgeo.MetricField(model, data, "logits"), objective, method, held_out=0.25)
    sparse = path[-1].apply_(copy.deepcopy(model))
    small = shrink(sparse, x)
    assert size(small) < size(model)
    torch.testing.assert_close(small(data), sparse(data))


DATA = Path(os.environ.get("FIPGEO_DATA", "missing"))


@pytest.mark.skipif(not (DATA / "zoo.py").exists(), reason="FIPGEO_DATA names no folder with pretrained networks")
@pytest.mark.parametrize(
    ("name", "shape", "families"),
    [
        ("akamaster_cifar10_resnet20", (3, 32, 32), 9),
        ("kd_cifar10_resnet8", (3, 32, 32), 7),
        ("kd_cifar10_wrn16_1", (3, 32, 32), 9),
        ("intel_cifar10_resnet20_dense", (3, 32, 32), 12),
        ("sfd_mnist_lenet5", (1, 32, 32), 4),
        ("gaurav_mnist_vit", (28, 28), 7),
        ("smmk47_cifar10_vit", (3, 32, 32), 12),
    ],
)
def test_pretrained_networks(name: str, shape: tuple[int, ...], families: int) -> None:
    spec = spec_from_file_location("zoo", DATA / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo = module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model = zoo.load(name)[0].double()
    x = torch.randn(2, *shape)
    groups = channel_groups(model, x)
    assert len(groups.families) == families
    sparse = zeroed(model, groups, some(groups, 0))
    small = shrink(sparse, x)
    assert size(small) < size(model)
    torch.testing.assert_close(small(x), sparse(x), rtol=1e-10, atol=1e-10)
