"""Patterns of zeros: what becomes zero together, how it is valued, and how it is shared out."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import MetricField, PathResult, Sparsity, walk
from fipgeo.model import OutputMap
from fipgeo.paths.objectives import (
    Blocks,
    Columns,
    Groups,
    NofM,
    Pattern,
    Rows,
    Unstructured,
    weight_mask,
)
from fipgeo.paths.objectives.allocation import Units, choose, limits

from .toys import FIRST_ORDER, draw, filled, inputs, method, mlp, stored

SEEDS = st.integers(0, 10**6)


def conv_net(seed: int, channels: int = 5, groups: int = 1) -> nn.Sequential:
    """Two convolutions and a linear layer on images [2 * groups, 4, 4]."""
    model = nn.Sequential(
        nn.Conv2d(2 * groups, channels * groups, (3, 2), groups=groups),
        nn.Tanh(),
        nn.Conv2d(channels * groups, 6, 2),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    filled(model, seed)
    return model.double().eval()


def images(seed: int, count: int = 12, channels: int = 2) -> Tensor:
    return draw(seed, count, channels, 4, 4)


def sparse(model: nn.Module, x: Tensor, target: Any, pattern: Pattern, **options: Any) -> PathResult:
    """A path of few steps without a predictor."""
    chosen: dict[str, Any] = {"score": "magnitude"} | options
    objective = Sparsity(target, pattern=pattern, **chosen)
    return walk(MetricField(model, x), objective, method(FIRST_ORDER))


def groups_by_loops(model: nn.Module, pattern: Pattern) -> list[set[tuple[str, int]]]:
    """Every group as the set of its members, each a tensor's name and a position in it."""
    found = []
    for name, p in model.named_parameters():
        if p.dim() < 2:
            continue
        index = torch.arange(p.numel()).reshape(p.shape)
        if isinstance(pattern, Rows):
            bias = name.replace("weight", "bias")
            found += [{(name, int(i)) for i in row.reshape(-1)} | {(bias, o)} for o, row in enumerate(index)]
        elif isinstance(pattern, Columns):
            found += [{(name, int(i)) for i in index[:, c].reshape(-1)} for c in range(p.shape[1])]
        elif isinstance(pattern, Blocks):
            flat = index.reshape(len(index), -1)
            for i in range(0, flat.shape[0], pattern.rows):
                for j in range(0, flat.shape[1], pattern.cols):
                    block = flat[i : i + pattern.rows, j : j + pattern.cols]
                    found.append({(name, int(k)) for k in block.reshape(-1)})
    return found


def as_sets(model: OutputMap, groups: Tensor) -> list[set[tuple[str, int]]]:
    """The same from group numbers."""
    sets: dict[int, set[tuple[str, int]]] = {}
    for name, ids in model.space.unravel(groups).items():
        for place, number in enumerate(ids.reshape(-1).tolist()):
            if number >= 0:
                sets.setdefault(number, set()).add((name, place))
    return list(sets.values())


PATTERNS = [Rows(), Columns(), Blocks(2, 3), Blocks(1, 4), Blocks(7, 100)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("net", [mlp, conv_net], ids=["mlp", "conv"])
def test_groups_are_those_of_plain_loops(pattern: Pattern, net: Any) -> None:
    module = net(0)
    model = MetricField(module, inputs() if net is mlp else images(0)).map
    groups = pattern.groups(model, weight_mask(model), None)
    found, expected = as_sets(model, groups), groups_by_loops(module, pattern)
    assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def whole(model: nn.Module, pattern: Pattern, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    """Groups that are zero as a whole, and groups that are so in part."""
    zero = {name: (t == 0).reshape(-1).tolist() for name, t in tensors.items()}
    shares = [sum(zero[name][i] for name, i in g) / len(g) for g in groups_by_loops(model, pattern)]
    return sum(s == 1 for s in shares), sum(0 < s < 1 for s in shares)


@pytest.mark.parametrize("pattern", PATTERNS[:4], ids=str)
@given(seed=SEEDS, target=st.floats(0.1, 0.6))
@settings(max_examples=3)
def test_groups_become_zero_as_a_whole_and_stay_so(pattern: Pattern, seed: int, target: float) -> None:
    module = conv_net(seed)
    path = sparse(module, images(seed), target, pattern)
    counts = []
    for point in path:
        full, part = whole(module, pattern, stored(point))
        assert part == 0
        counts.append(full)
    assert counts == sorted(counts) and counts[0] == 0
    total = sum(p.numel() for p in module.parameters() if p.dim() > 1)
    largest = max(len(g) for g in groups_by_loops(module, pattern))
    have = round(path[-1].sparsity * total)
    assert path.outcome == "reached" and round(target * total) <= have < round(target * total) + largest


def runs(name: str, weight: Tensor, m: int) -> list[Tensor]:
    """The runs along the input axis of tensors that have one."""
    flat = weight.flatten(2).transpose(1, 2).reshape(-1, weight.shape[1]) if weight.dim() > 2 else weight
    return [part for row in flat for part in row.split(m)] if flat.shape[1] >= m else []


@pytest.mark.parametrize("net", [mlp, conv_net], ids=["mlp", "conv"])
@given(seed=SEEDS, n=st.integers(1, 3), more=st.integers(1, 3))
@settings(max_examples=4)
def test_every_run_keeps_at_most_n(net: Any, seed: int, n: int, more: int) -> None:
    module, m = net(seed), n + more
    x = inputs(seed, 12) if net is mlp else images(seed)
    path = sparse(module, x, None, NofM(n, m))
    found = [r for name, w in stored(path[-1]).items() if w.dim() > 1 for r in runs(name, w, m)]
    assert path.outcome == "reached" and found
    assert all(int((r != 0).sum()) == min(n, len(r)) for r in found)
    for point in path:  # a run is dense or done, never between
        parts = [r for name, w in stored(point).items() if w.dim() > 1 for r in runs(name, w, m)]
        assert {int((r == 0).sum()) for r in parts} <= {0} | {max(len(r) - n, 0) for r in parts}


def test_a_run_loses_what_is_worth_least_and_the_cheapest_runs_go_first() -> None:
    model = nn.Linear(8, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[40.0, 10, 30, 20, 4, 1, 3, 2], [400, 500, 600, 700, 100, 200, 300, 90]]))
    path = sparse(model, draw(0, 12, 8), (0.125, 0.5), NofM(2, 4))
    masks = [(stored(p)["weight"][0] == 0).tolist() for p in path]
    assert [False] * 4 + [False, True, False, True] in masks
    assert masks[-1] == [False, True, False, True] * 2


def test_zeros_that_are_there_count_towards_a_run() -> None:
    model = nn.Linear(4, 2, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.0, 9, 1, 5], [0, 0, 0, 1]]))
    path = sparse(model, draw(0, 12, 4), None, NofM(2, 4))
    assert (stored(path[-1])["weight"] == 0).tolist() == [[True, False, True, False], [True, True, True, False]]


def test_runs_follow_what_a_layer_multiplies() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.up, self.thin = nn.Embedding(8, 4), nn.ConvTranspose1d(4, 8, 3), nn.Linear(3, 8)

    model = MetricField(Net(), inputs()).map
    parts = model.space.unravel(NofM(2, 4).groups(model, weight_mask(model), None))
    assert all(bool((parts[n] == -1).all()) for n in ("table.weight", "thin.weight", "thin.bias", "up.bias"))
    up = parts["up.weight"]  # [in 4, out 8, 3]: one run for each output and kernel position
    assert bool((up == up[0]).all()) and len(up.unique()) == 24


def test_given_groups_span_tensors_and_hold_biases() -> None:
    module = mlp(3)
    model = MetricField(module, inputs()).map
    parts = {name: torch.full(shape, -1) for name, shape in model.space.shapes.items()}
    for c in range(6):
        parts["0.weight"][c], parts["0.bias"][c], parts["2.weight"][:, c] = c, c, c
    ids = torch.cat([p.reshape(-1) for p in parts.values()])
    asked = []

    def make(given_map: OutputMap, batch: Any) -> Tensor:
        asked.append((given_map.space.dim, batch.shape[1:]))
        return 10**12 * ids + ids.clamp_max(0)  # numbers may be of any size

    for pattern in (Groups(ids), Groups(make)):
        path = sparse(module, inputs(), 0.5, pattern)
        end = stored(path[-1])
        gone = (end["0.bias"] == 0).nonzero()[:, 0]
        assert len(gone) == 3 and path[-1].sparsity == 0.5
        assert not end["0.weight"][gone].any() and not end["2.weight"][:, gone].any()
        assert int((end["0.weight"] == 0).sum()) == 15 and bool(end["2.bias"].all())
    assert set(asked) == {(57, (5,))}


def test_a_group_with_a_member_in_an_excluded_tensor_stays() -> None:
    module = mlp(3)
    path = sparse(module, inputs(), 0.5, Rows(), exclude="0.*")
    assert all(bool(stored(path[-1])[n].all()) for n in ("0.weight", "0.bias"))
    with pytest.raises(ValueError, match="0 can become zero"):
        sparse(module, inputs(), 0.5, Rows(), exclude=["0.bias", "2.bias"])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: NofM(4, 4), "1 <= n < m"),
        (lambda: NofM(0, 4), "1 <= n < m"),
        (lambda: Blocks(0, 4), "sides of 1"),
        (lambda: Sparsity(None), "no share of zeros of its own"),
        (lambda: Sparsity(0.5, score="best"), "'metric', 'magnitude'"),
        (lambda: Sparsity(0.5, allocation="fair"), "'uniform'"),
        (lambda: Sparsity(0.5, allocation={"*": 1.5}), r"\[0, 1\]"),
        (lambda: Sparsity(0.5, min_keep=2.0), "min_keep"),
        (lambda: sparse(mlp(), inputs(), 0.5, Unstructured(), allocation={"0.wight": 0.5}), "allocation: .*0.wight"),
        (lambda: sparse(mlp(), inputs(), 0.9, Unstructured(), allocation={"*": 0.8}), "at most 0.7"),
        (lambda: sparse(mlp(), inputs(), 0.5, Groups(torch.zeros(3, dtype=torch.long))), "each of the 57"),
        (lambda: sparse(mlp(), inputs(), 0.5, Groups(torch.zeros(57))), "whole number for each"),
    ],
)
def test_what_cannot_be_is_said(make: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        make()


@given(seed=SEEDS, target=st.floats(0.1, 0.9))
@settings(max_examples=3)
def test_uniform_gives_every_tensor_the_same_share(seed: int, target: float) -> None:
    path = sparse(conv_net(seed), images(seed), target, Unstructured(), allocation="uniform", min_keep=0)
    weights = [w for w in stored(path[-1]).values() if w.dim() > 1]
    total, have = sum(w.numel() for w in weights), sum(int((w == 0).sum()) for w in weights)
    assert have == round(target * total)
    assert all(abs(int((w == 0).sum()) - have / total * w.numel()) <= 1 for w in weights)


@given(seed=SEEDS, cap=st.floats(0, 0.6))
@settings(max_examples=3)
def test_limits_are_kept_and_the_rest_makes_up_for_them(seed: int, cap: float) -> None:
    model = conv_net(seed)
    path = sparse(model, images(seed), 0.5, Unstructured(), allocation={"0.*": cap, "4.*": 0.9})
    end = stored(path[-1])
    assert int((end["0.weight"] == 0).sum()) <= cap * end["0.weight"].numel()
    weights = [w for w in end.values() if w.dim() > 1]
    assert sum(int((w == 0).sum()) for w in weights) == round(0.5 * sum(w.numel() for w in weights))


@pytest.mark.parametrize("min_keep", [0.005, 0.2, 0.0])
def test_no_tensor_is_emptied_unless_allowed(min_keep: float) -> None:
    model = mlp(0)
    with torch.no_grad():
        model[2].weight.mul_(1e-3)  # type: ignore[operator]
    path = sparse(model, inputs(), 0.5, Unstructured(), min_keep=min_keep)
    left = int((stored(path[-1])["2.weight"] != 0).sum())
    assert left == {0.005: 1, 0.2: 4, 0.0: 0}[min_keep] and path[-1].sparsity == 0.5


def test_of_equals_the_first_go() -> None:
    model = nn.Linear(4, 3, bias=False).double()
    nn.init.ones_(model.weight)
    path = sparse(model, draw(0, 12, 4), 0.9, Unstructured())
    zero = (stored(path[1])["weight"] == 0).reshape(-1).tolist()  # later the weights are no longer equal
    assert 0 < sum(zero) < 12 and zero == sorted(zero, reverse=True)


@given(SEEDS)
@settings(max_examples=6)
def test_choice_is_that_of_a_plain_loop(seed: int) -> None:
    model = MetricField(conv_net(0), images(0)).map
    space, counted = model.space, weight_mask(model)
    source = torch.Generator().manual_seed(seed)
    groups = torch.randint(-1, 60, (space.dim,), generator=source)  # groups that span tensors
    held = counted & (torch.rand(space.dim, generator=source) < 0.1)
    units = Units.among(groups, groups >= 0, held, counted)
    values = torch.rand(units.count, generator=source)
    most = limits(space, counted, {"2.*": 0.3}, 0.005)
    options = {"space": space, "held": held, "counted": counted}
    free = {name: space.dim for name in most}
    wanted = int(torch.randint(1, 100, (), generator=source))
    chosen, won = [], 0
    for u in (values / units.gain).argsort().tolist():
        if won < wanted:
            chosen.append(u)
            won += int(units.gain[u])
    found = choose(units, values, wanted, most=free, **options)
    assert set(units.of[found].tolist()) == set(chosen)
    assert bool((found == torch.isin(units.of, torch.tensor(chosen))).all())
    limited = choose(units, values, wanted, most=most, **options)
    zeros = space.unravel(counted & (held | limited))
    assert int(zeros["2.weight"].sum()) <= max(most["2.weight"], int(space.unravel(held)["2.weight"].sum()))
    assert not choose(units, values, 0, most=free, **options).any()


def test_a_path_ends_where_limits_leave_no_group() -> None:
    # three rows of 4, two of which may go; groups of unlike size, so that the start cannot know
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    model = nn.Linear(4, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([9.0, 9, 9, 1, 1, 2, 2, 2, 2, 8, 8, 8]).reshape(3, 4))
    path = sparse(model, draw(0, 12, 4), 0.65, Groups(ids), allocation={"weight": 0.7})
    assert path.outcome == "reached" and path[-1].sparsity == 0.5
