"""Zeros as masks and in torch's form of pruning, and what reads models in that form."""

# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportArgumentType=false, reportCallIssue=false

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune

import fipgeo
from fipgeo.shrink import as_masks, channel_groups, shrink, to_dense_, to_prune_

from .nets import NETS, built, size


def sparse(name: str, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A network in which half of the entries of all matrices are zero."""
    model, x = built(name, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand(p.shape, generator=generator) < 0.5)
    return model, x


@pytest.mark.parametrize("name", NETS)
def test_prune_form_and_back_is_the_same_network(name: str) -> None:
    model, x = sparse(name, 4)
    before, wanted = copy.deepcopy(model.state_dict()), model(x)
    order = [key for key, _ in model.named_parameters()]
    assert to_prune_(model) is model
    assert prune.is_pruned(model)
    torch.testing.assert_close(model(x), wanted)
    held = as_masks(model)
    assert all(torch.equal(mask, before[key] != 0) for key, mask in held.items())
    assert [key.removesuffix("_orig") for key, _ in model.named_parameters()] == order
    assert to_dense_(model) is model and not prune.is_pruned(model)
    assert [key for key, _ in model.named_parameters()] == order
    assert all(torch.equal(before[key], t) for key, t in model.state_dict().items())


def test_zeros_stay_under_an_optimiser() -> None:
    model, x = sparse("mlp", 0)
    to_prune_(model)
    masks = as_masks(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model.eval()(x).square().sum().backward()
        optimizer.step()
    to_dense_(model)
    for key, p in model.named_parameters():
        if key in masks:
            assert not p[~masks[key]].any() and p.requires_grad


def test_masks_of_points_modules_and_mappings_agree() -> None:
    model, x = built("mlp", 1)
    path = fipgeo.sparsify(model, torch.randn(32, 5), 0.5, corrector="gauss-newton")
    end = path[-1].apply_(copy.deepcopy(model))
    ours, of_point = as_masks(end), as_masks(path[-1])
    assert ours.keys() == of_point.keys() == {"0.weight", "3.weight", "5.weight"}
    assert all(torch.equal(ours[key], of_point[key]) for key in ours)
    assert sum(int((~mask).sum()) for mask in ours.values()) == sum(mask.numel() for mask in ours.values()) // 2
    assert as_masks(end.state_dict(), "*.bias").keys() == {"0.bias", "2.bias", "3.bias", "5.bias"}


@given(seed=st.integers(0, 1000))
def test_the_metric_of_a_model_in_prune_form_is_that_of_the_weights_that_are_left(seed: int) -> None:
    model, x = sparse("mlp", seed)
    theta = fipgeo.WeightSpace.of(model).point(model)
    masks = as_masks(model, "*")
    left = torch.cat([(m if t.dim() > 1 else torch.ones_like(m)).flatten() for m, t in _pairs(masks, model)])
    v = torch.randn(len(theta), generator=torch.Generator().manual_seed(seed))
    wanted = fipgeo.metric(model, x, geometry="logits").matvec(v * left) * left
    found = fipgeo.metric(to_prune_(model), x, geometry="logits").matvec(v)
    torch.testing.assert_close(found, wanted)


def _pairs(masks, model):
    return [(masks[key], p) for key, p in model.named_parameters()]


def test_a_path_from_a_model_in_prune_form_keeps_its_zeros() -> None:
    model, x = sparse("mlp", 7)
    to_prune_(model)
    path = fipgeo.sparsify(model, torch.randn(48, 5), 0.7, corrector="gauss-newton")
    end = to_dense_(path[-1].apply_(model))
    zeros = [float((~mask).double().mean()) for mask in as_masks(end).values()]
    assert path.outcome == "reached" and max(zeros) >= 0.7 and size(end) == size(model)


@pytest.mark.parametrize("name", ["conv", "encoder", "gated"])
def test_shrinking_reads_prune_form_and_leaves_it_alone(name: str) -> None:
    model, x = built(name, 0)
    groups = channel_groups(model, x)
    space = fipgeo.WeightSpace.of(model)
    theta = space.point(model)
    theta[groups.ids == 1] = 0
    space.assign_(model, theta)
    wanted = shrink(model, x)
    to_prune_(model)
    model(x)  # leaves computed weights behind, which deep copies stumble over
    small = shrink(model, x)
    assert prune.is_pruned(model) and not prune.is_pruned(small) and size(small) == size(wanted) < size(model)
    again = channel_groups(model, x)
    assert torch.equal(again.ids, groups.ids) and torch.equal(again.columns, groups.columns)
    torch.testing.assert_close(small(x), model(x))


def test_errors_name_the_cure() -> None:
    model, _ = sparse("mlp", 0)
    to_prune_(model)
    with pytest.raises(ValueError, match="to_dense_"):
        to_prune_(model)
    with pytest.raises(TypeError, match="expected a module"):
        as_masks(3)
    with pytest.raises(ValueError, match="nearest"):
        as_masks(to_dense_(model), "nothing*")
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4, bias=False))
    tied[1].weight = tied[0].weight
    with torch.no_grad():
        tied[0].weight[0] = 0
    with pytest.raises(ValueError, match=r"1\.weight is the same tensor as 0\.weight|0\.weight is the same tensor"):
        to_prune_(tied)
    assert to_dense_(model) is model
