"""Weights learned from a few numbers of each shard: against dense least squares, and without a trace of what went."""

from functools import cache
from pathlib import Path

import oracles
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from torch import Tensor, nn

from fipgeo import Component, TangentModel, compose, rescaled_square_loss
from fipgeo.io import save_record
from fipgeo.tangent import Ensemble, Evidence, Pool, learned_weights

seeds = st.integers(0, 2**31)
NAMES = ["a", "b", "c", "d"]
KAPPA = 3.0


@cache
def network() -> nn.Module:
    return build("mlp", 3)[0]


def component(name: str, trainable: str | None = None) -> Component:
    """A component whose tau is drawn with a seed made of its name."""
    model = TangentModel(network(), trainable)
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    tau = torch.randn(model.space.dim, generator=generator, dtype=torch.float64)
    return Component.of(model.assign_(model.space.unravel(tau)), name)


def shard(name: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7 + sum(map(ord, name)))
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return x, torch.randint(len(network()(x)[0]), (6,), generator=generator)


@cache
def measured(names: tuple[str, ...], name: str, by: str = "component") -> Evidence:
    return Evidence.of(network(), [component(n) for n in names], shard(name), name, by=by, kappa=KAPPA, batch_size=4)


def test_the_numbers_are_those_of_the_dense_jacobian() -> None:
    parts = [component("a"), component("b", "2.*")]
    x, y = shard("a")
    found = Evidence.of(network(), parts, (x, y), "a", kappa=KAPPA, batch_size=4)
    jacobian = oracles.root(network(), x)
    whole = TangentModel(network())
    taus = torch.stack([whole.space.ravel(whole.assign_(p.tangents).tangents()).detach() for p in parts])
    changes = taus @ jacobian.T
    lack = (KAPPA * nn.functional.one_hot(y, len(jacobian) // len(x)) - network()(x).detach()).flatten()
    assert torch.allclose(found.gram, changes @ changes.T, rtol=1e-12)
    assert torch.allclose(found.cross, changes @ lack, rtol=1e-12)
    assert found.count == len(lack) and found.names == ["a", "b"]
    assert abs(found.energy - float(lack @ lack)) < 1e-9


@given(seed=seeds)
def test_the_loss_of_a_composition_is_known_from_the_numbers(seed: int) -> None:
    weights = torch.randn(3, generator=torch.Generator().manual_seed(seed))
    parts = [component(n) for n in "abc"]
    x, y = shard("b")
    loss = rescaled_square_loss(compose(network(), parts, weights)(x), y, KAPPA).item()
    assert abs(measured(("a", "b", "c"), "b").loss(weights) - loss) < 1e-9 * loss


@given(ridge=st.floats(1e-6, 10), shards=st.lists(st.sampled_from(NAMES), min_size=1, unique=True))
def test_learned_weights_are_the_dense_solution(ridge: float, shards: list[str]) -> None:
    evidence = [measured(("a", "b", "c"), name) for name in shards]
    found = torch.tensor(list(learned_weights("abc", evidence, ridge=ridge).values()))
    x, y = (torch.cat(parts) for parts in zip(*(shard(name) for name in shards), strict=True))
    whole = TangentModel(network())
    changes = torch.stack([
        oracles.root(network(), x) @ whole.space.ravel(whole.assign_(component(n).tangents).tangents()).detach()
        for n in "abc"
    ])  # fmt: skip
    lack = (KAPPA * nn.functional.one_hot(y, changes.shape[1] // len(x)) - network()(x).detach()).flatten()
    pull = ridge**0.5 * changes.norm(dim=1)
    best = torch.linalg.lstsq(torch.cat([changes.T, pull.diag()]), torch.cat([lack, pull / 3])).solution
    assert torch.allclose(found, best, rtol=1e-6, atol=1e-9)
    far = learned_weights("abc", evidence, ridge=1e9)
    assert far == pytest.approx(dict.fromkeys("abc", 1 / 3), abs=1e-6)


@pytest.mark.parametrize(("by", "ridge"), [("component", 1.0), ("tensor", 0.01)])
def test_the_pull_depends_on_what_has_a_weight(by: str, ridge: float) -> None:
    evidence = [measured(("a", "b"), "a", by)]
    assert learned_weights("ab", evidence) == learned_weights("ab", evidence, ridge=ridge)


@given(ridge=st.floats(1e-6, 10), unit=st.floats(0.1, 10))
def test_weights_of_tensors_are_the_dense_solution(ridge: float, unit: float) -> None:
    """Of two components, one of them in other units and without some of the tensors."""
    net, (x, y) = network(), shard("s")
    few = component("b", "2.*")
    parts = [component("a"), Component("b", {n: unit * t for n, t in few.tangents.items()}, few.base)]
    found = learned_weights("ab", [Evidence.of(net, parts, (x, y), "s", by="tensor", kappa=KAPPA)], ridge=ridge)
    jacobian, whole, changes = oracles.root(net, x), TangentModel(net), []
    keys = [(part, name) for part in parts for name in sorted(part.tangents)]
    for part, name in keys:
        changes.append(jacobian @ whole.space.ravel(whole.assign_({name: part.tangents[name]}).tangents()).detach())
    rows = torch.stack(changes)
    lack = (KAPPA * nn.functional.one_hot(y, rows.shape[1] // len(x)) - net(x).detach()).flatten()
    pull = ridge**0.5 * rows.norm(dim=1)
    best = torch.linalg.lstsq(torch.cat([rows.T, pull.diag()]), torch.cat([lack, pull / 2])).solution
    assert torch.allclose(torch.tensor([found[p.name][n] for p, n in keys]), best, rtol=1e-6, atol=1e-9)  # type: ignore[index]
    loss = rescaled_square_loss(compose(net, parts, found)(x), y, KAPPA).item()
    assert abs(Evidence.of(net, parts, (x, y), "s", by="tensor", kappa=KAPPA).loss(best) - loss) < 1e-6 * loss
    ensemble = Ensemble(net, parts, found)
    assert torch.allclose(ensemble(x), compose(net, parts, found)(x), rtol=1e-9, atol=1e-9)


def test_what_does_not_change_the_outputs_has_the_weight_of_the_mean() -> None:
    net, (x, y) = network(), shard("s")
    parts = [Component(n, {k: 0 * t for k, t in component(n).tangents.items()}, component(n).base) for n in "ab"]
    for by in ("component", "tensor"):
        found = learned_weights("ab", [Evidence.of(net, parts, (x, y), "s", by=by)])
        numbers = [w for one in found.values() for w in (one.values() if isinstance(one, dict) else [one])]
        assert numbers == [0.5] * len(numbers)


@settings(max_examples=6)
@given(
    moves=st.lists(st.sampled_from(NAMES), max_size=12),
    order=st.permutations(NAMES),
    by=st.sampled_from(["component", "tensor"]),
)
def test_learned_weights_have_no_history(moves: list[str], order: list[str], by: str) -> None:
    """Shards come and go with their components, and all that are there measure whenever one came."""
    net, (x, _) = network(), shard("x")
    pool, there = Pool(net), []
    for name in moves:
        if name in there:
            pool.forget(name)
            there.remove(name)
        else:
            pool.add(component(name))
            there.append(name)
            for other in there:
                pool.hear(measured(tuple(sorted(there)), other, by))
    never = Pool(net, [component(name) for name in order if name in there])
    for name in order:
        if name in there:
            never.measure(shard(name), name, by=by, kappa=KAPPA, batch_size=4)
    assert {s: e.digest() for s, e in pool.evidence.items()} == {s: e.digest() for s, e in never.evidence.items()}
    assert [e.name for e in pool.record if e.action in ("add", "forget")] == moves
    if not there:
        assert not pool.evidence and not pool.components
        return
    one, two = pool.weights(), never.weights()
    assert one == two
    assert torch.equal(pool.model(one)(x), never.model(two)(x))


@pytest.mark.parametrize("by", ["component", "tensor"])
def test_rows_that_stay_have_the_bits_of_a_smaller_measurement(by: str) -> None:
    small = measured(("b", "d"), "a", by)
    large = measured(tuple(NAMES), "a", by).restricted(["d", "b"])
    assert small.digest() == large.digest() and (small.digests, small.rows) == (large.digests, large.rows)


@given(weights=st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_an_ensemble_is_the_same_function_by_more_forwards(weights: list[float]) -> None:
    net, (x, _) = network(), shard("x")
    parts = [component("c"), component("a"), component("b", "2.*")]
    for given_ in (weights, "mean"):
        ensemble = Ensemble(net, parts, given_)  # type: ignore[arg-type]
        assert torch.allclose(ensemble(x), compose(net, parts, given_)(x), rtol=1e-9, atol=1e-9)  # type: ignore[arg-type]
    assert len(ensemble.members) == 3
    pool = Pool(net, parts)
    assert torch.allclose(pool.as_ensemble("sum")(x), pool.model("sum")(x), rtol=1e-9, atol=1e-9)


def test_an_ensemble_keeps_the_structure_of_outputs() -> None:
    module, x = build("tuple_output", 1)
    model = TangentModel(module)
    tau = torch.randn(model.space.dim, generator=torch.Generator().manual_seed(1))
    parts = [Component.of(model.assign_(model.space.unravel(tau)), name) for name in "ab"]
    found, expected = Ensemble(module, parts, 0.4)(x), compose(module, parts, 0.4)(x)
    assert type(found) is type(expected)
    for a, b in zip(oracles.leaves(found), oracles.leaves(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-9)


def test_evidence_by_tensor_says_what_components_do() -> None:
    found, expected = measured(("a", "b"), "c", "tensor").by_component(), measured(("a", "b"), "c")
    assert (found.rows, found.by, found.digests) == (expected.rows, "component", expected.digests)
    assert torch.allclose(found.gram, expected.gram, rtol=1e-10)
    assert torch.allclose(found.cross, expected.cross, rtol=1e-10)


@pytest.mark.parametrize("by", ["component", "tensor"])
def test_a_file_holds_all_of_the_evidence(tmp_path: Path, by: str) -> None:
    found = measured(("a", "b"), "a", by)
    found.save(tmp_path / "a.safetensors")
    again = Evidence.load(tmp_path / "a.safetensors")
    assert again.digest() == found.digest() and again.digests == found.digests
    assert again.rows == found.rows and again.by == by
    assert (again.shard, again.base, again.names) == (found.shard, found.base, ["a", "b"])
    assert learned_weights("ab", [again]) == learned_weights("ab", [found])
    save_record(tmp_path / "other.safetensors", {}, {})
    with pytest.raises(ValueError, match="holds no evidence"):
        Evidence.load(tmp_path / "other.safetensors")


def test_what_does_not_fit_is_named() -> None:
    net, a, b = network(), component("a"), component("b")
    other = Component("a", {name: 2 * t for name, t in a.tangents.items()}, a.base)
    pool = Pool(net, [a, b])
    with pytest.raises(ValueError, match="measure at least one shard"):
        pool.weights()
    pool.hear(measured(("a",), "a"))
    with pytest.raises(ValueError, match="shard 'a' has not measured 'b'"):
        pool.weights()
    pool.hear(measured(("a", "b", "c"), "a"))
    assert pool.evidence["a"].names == ["a", "b"] and set(pool.weights()) == {"a", "b"}
    with pytest.raises(ValueError, match="other values of component 'a'"):
        Pool(net, [other]).hear(measured(("a",), "a"))
    with pytest.raises(ValueError, match="measure again on the pool's base"):
        Pool(nn.Linear(3, 2)).hear(measured(("a",), "a"))
    wrong = Evidence.of(net, [other], shard("b"), "b")
    for evidence, words in (
        ([measured(("a",), "a"), measured(("a",), "a")], "two pieces come from shard 'a'"),
        ([measured(("a",), "a"), wrong], "measured different components"),
        ([measured(("a",), "a"), measured(("a",), "b", "tensor")], "with the same by="),
    ):
        with pytest.raises(ValueError, match=words):
            learned_weights("a", evidence)
    with pytest.raises(ValueError, match="expected a positive"):
        learned_weights("a", [measured(("a",), "a")], ridge=0.0)
    with pytest.raises(ValueError, match="'component' or 'tensor'"):
        measured(("a",), "a", "layer")
    for weights in ({"a": {"0.weight": 1.0}}, {"a": dict.fromkeys([*a.tangents, "z"], 1.0)}):
        with pytest.raises(ValueError, match="for each of its tensors"):
            compose(net, [a], weights)
    with pytest.raises(ValueError, match="expected finite"):
        compose(net, [a], {"a": dict.fromkeys(a.tangents, float("nan"))})
    with pytest.raises(ValueError, match="give each its own"):
        Evidence.of(net, [a, a], shard("a"), "a")
    with pytest.raises(ValueError, match="at least one to measure"):
        Evidence.of(net, [], shard("a"), "a")
    with pytest.raises(ValueError, match="with labels y"):
        Evidence.of(net, [a], shard("a")[0], "a")
    with pytest.raises(ValueError, match="at least one"):
        Ensemble(net, [])
    with pytest.raises(KeyError, match="is not in the pool"):
        pool.forget("z")
