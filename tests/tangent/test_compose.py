"""Components, what they belong to, their sums, and forgetting that leaves no bit behind."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import build
from torch import Tensor, nn

from fipgeo import Component, TangentModel, compose
from fipgeo.io import save_record
from fipgeo.tangent import Pool, digest, fingerprint

seeds = st.integers(0, 2**31)
NAMES = ["a", "b", "c", "d", "e"]


def network(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor]:
    net, x = build("convnet", 3)
    return net.to(dtype), x.to(dtype)


def component(net: nn.Module, name: str, seed: int = 0, trainable: str | None = None) -> Component:
    """A component with random tau that depends on its name and a seed."""
    model = TangentModel(net, trainable)
    generator = torch.Generator().manual_seed(1000 * seed + sum(map(ord, name)))
    for t in model.tangents().values():
        t.data.copy_(torch.randn(t.shape, generator=generator, dtype=torch.float64))
    return Component.of(model, name)


def same(one: TangentModel, two: TangentModel) -> bool:
    """Whether two models have the same trainable tensors with the same bits."""
    a, b = one.tangents(), two.tangents()
    return list(a) == list(b) and all(digest({"t": a[n]}) == digest({"t": b[n]}) and torch.equal(a[n], b[n]) for n in a)


@given(seed=seeds, weights=st.lists(st.floats(-3, 3), min_size=3, max_size=3))
def test_outputs_are_linear_in_the_weights(seed: int, weights: list[float]) -> None:
    net, x = network()
    parts = [component(net, name, seed % 997) for name in "abc"]
    start = TangentModel(net)(x)
    single = [compose(net, [part], "sum")(x) - start for part in parts]
    expected = start + sum(w * out for w, out in zip(weights, single, strict=True))
    assert torch.allclose(compose(net, parts, weights)(x), expected, rtol=1e-9, atol=1e-9)
    named = {part.name: w for part, w in zip(parts, weights, strict=True)}
    assert same(compose(net, parts, named), compose(net, parts[::-1], weights[::-1]))
    mean = torch.stack([start + out for out in single]).mean(0)
    assert torch.allclose(compose(net, parts)(x), mean, rtol=1e-9, atol=1e-9)
    assert torch.allclose(compose(net, parts, -0.5)(x), start - 0.5 * sum(single), rtol=1e-9, atol=1e-9)
    assert same(compose(net, parts, torch.tensor(weights)), compose(net, parts, weights))
    assert same(compose(net, parts, torch.tensor(-0.5)), compose(net, parts, -0.5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@settings(max_examples=4)
@given(order=st.permutations(NAMES), dropped=st.sampled_from(NAMES))
def test_a_sum_depends_on_its_components_alone(dtype: torch.dtype, order: list[str], dropped: str) -> None:
    net, x = network(dtype)
    rest = [name for name in order if name != dropped]
    for weights in ("mean", "sum", -0.3):
        one = compose(net, [component(net, name) for name in rest], weights)
        two = compose(net, [component(net, name) for name in sorted(rest)], weights)
        assert same(one, two) and torch.equal(one(x), two(x))


@given(moves=st.lists(st.sampled_from(NAMES), max_size=25))
def test_a_pool_has_no_history(moves: list[str]) -> None:
    """A move takes a component out where it is in, and in where it is out."""
    net, x = network(torch.float32)
    pool, there = Pool(net), []
    for name in moves:
        if name in there:
            pool.forget(name)
            there.remove(name)
        else:
            pool.add(component(net, name))
            there.append(name)
    never = Pool(net, [component(net, name) for name in sorted(there)])
    for weights in ("mean", "sum", {name: 0.1 * ord(name) - 9.8 for name in there}):
        one, two = pool.model(weights), never.model(weights)
        assert same(one, two) and torch.equal(one(x), two(x))
    assert [entry.name for entry in pool.record] == moves and len(pool) == len(there)
    kept = [entry.name for entry in pool.record if entry.action == "add"]
    for entry in pool.record:
        if entry.action == "forget":
            kept.remove(entry.name)
        assert entry.digest == component(net, entry.name).digest()
    assert sorted(kept) == sorted(there)


def test_nothing_of_a_forgotten_component_is_held() -> None:
    net, x = network()
    pool = Pool(net, [component(net, "a"), component(net, "b")])
    secret = list(pool.components["a"].tangents.values())
    pool.forget("a")
    held = [t.data_ptr() for part in pool.components.values() for t in part.tangents.values()]
    held += [t.data_ptr() for t in pool.base.state_dict().values()]
    assert not set(held) & {t.data_ptr() for t in secret}
    pool.forget("b")
    assert torch.equal(pool.model()(x), copy.deepcopy(net).eval()(x))


def test_components_of_different_tensors() -> None:
    net, x = network()
    head, norm = component(net, "head", 0, "5.*"), component(net, "norm", 0, "1.*")
    both = compose(net, [head, norm], "sum")
    assert both.names == ["1.weight", "1.bias", "5.weight", "5.bias"]
    start = TangentModel(net)(x)
    apart = compose(net, [head], 1)(x) + compose(net, [norm], 1)(x) - start
    assert torch.allclose(both(x), apart, rtol=1e-10, atol=1e-10)


def test_a_file_holds_all_of_a_component(tmp_path: Path) -> None:
    net, _ = network(torch.bfloat16)
    part = component(net, "a")
    part = Component("a", part.tangents, part.base, {"examples": 100, "classes": [0, 3]})
    part.save(tmp_path / "a.safetensors")
    again = Component.load(tmp_path / "a.safetensors", net)
    assert (again.name, again.base, again.notes) == (part.name, part.base, part.notes)
    assert same(compose(net, [again]), compose(net, [part])) and again.digest() == part.digest()
    with pytest.raises(FileExistsError):
        part.save(tmp_path / "a.safetensors")
    save_record(tmp_path / "other.safetensors", {}, {})
    with pytest.raises(ValueError, match="holds no component"):
        Component.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("what", ["0.weight", "1.running_mean", "5.bias"])
def test_another_base_is_refused(what: str, tmp_path: Path) -> None:
    net, x = network()
    part = component(net, "a", 0, "5.*")
    part.save(tmp_path / "a.safetensors")
    part.check(TangentModel(net))
    other = copy.deepcopy(net)
    with torch.no_grad():
        tensor = other.state_dict()[what].view(-1)
        tensor[0] = torch.nextafter(tensor[0], tensor[0] + 1)
    for refused in (
        lambda: compose(other, [part]),
        lambda: Pool(other, [part]),
        lambda: Component.load(tmp_path / "a.safetensors", other),
        lambda: compose(nn.Linear(3, 2), [part]),
    ):
        with pytest.raises(ValueError, match="component 'a' belongs to weights with the fingerprint"):
            refused()
    compose(copy.deepcopy(net).eval(), [part])(x)


def test_fingerprints_see_values_and_not_how_they_are_held() -> None:
    net, _ = network(torch.float32)
    code = fingerprint(net)
    wide = copy.deepcopy(net).double()
    strided = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert code == fingerprint(wide) == fingerprint(strided) == fingerprint(TangentModel(net))
    assert code == fingerprint(torch.compile(net, backend="eager"))  # type: ignore[arg-type]
    named = {"a": torch.ones(2), "b": torch.zeros(2)}
    assert digest(named) == digest(dict(reversed(named.items())))
    others = [{"a": named["b"], "b": named["a"]}, named | {"a": torch.ones(2, 1)}, {"a": torch.ones(2)}]
    assert len({digest(t) for t in [named, *others]}) == 4


def test_what_does_not_fit_is_named() -> None:
    net, _ = network()
    a, b = component(net, "a"), component(net, "b")
    for weights, words in (
        ("median", "expected 'mean', 'sum'"),
        ({"a": 1.0}, "'b' is a component alone"),
        ({"a": 1.0, "b": 1.0, "c": 1.0}, "'c' is a weight alone"),
        ([1.0], "got 1 numbers for 2 components"),
        (float("nan"), "expected finite numbers"),
        (torch.ones(3), "got 3 numbers for 2 components"),
        (torch.tensor([1.0, torch.inf]), "'b' has inf"),
    ):
        with pytest.raises(ValueError, match=words):
            compose(net, [a, b], weights)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="two are called 'a'"):
        compose(net, [a, b, a])
    odd = Component("odd", {"5.bias": torch.ones(4)}, a.base)
    with pytest.raises(ValueError, match="5.bias"):
        compose(net, [a, odd])
    with pytest.raises(ValueError, match="in the pool already"):
        Pool(net, [a, a])
    with pytest.raises(KeyError, match="is not in the pool"):
        Pool(net, [a]).forget("b")
