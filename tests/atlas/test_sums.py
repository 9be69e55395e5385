"""Tensors that are summed together, against weighted sums that are written out."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import jvp, vmap

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Isotropic, Kind, Partitions, PerBlock, PerChannel, PerLayer
from fipgeo.atlas.blocks import FactoredBlock, JoinedBlock
from fipgeo.lazy import LazyTensors, entries_of

from .test_composition import draw, seeds

SHAPES = {
    "a": (6,),
    "b": (2, 3),
    "c": (6,),
    "d": (),
    "e": (4,),
    "f": (4,),
    "g": (40, 30),
    "h": (4,),
    "i": (),
    "j": (6,),
}
LACKED = {0: {"h"}, 1: {"h", "j"}, 2: {"c"}}
"""Tensors that some of the vectors lack: h has one vector, c and j have two of them each, but not the same."""
KINDS: dict[str, Kind] = {
    "isotropic": Isotropic(),
    "per layer": PerLayer(lambda name: str("abcd".find(name) < 0)),
    "per block": PerBlock(),
    "per channel": PerChannel({"b": 2, "e": 2, "f": 2, "g": 40}),
    "partitions": Partitions(4, seed=3),
    "every weight": Partitions(10_000),
}
TABLE = sorted(KINDS)
kinds, numbers = st.sampled_from(TABLE), st.integers(0, 1)


class Bag(nn.Module):
    """Parameters of many shapes."""

    def __init__(self, seed: int, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        for i, (name, shape) in enumerate(SHAPES.items()):
            self.register_parameter(name, nn.Parameter(draw(seed + i, *shape).to(dtype)))


def vectors(seed: int, dtype: torch.dtype = torch.float64, count: int = 3) -> list[TaskVector]:
    return [
        TaskVector(
            {
                name: draw(seed + 50 * i + place, *shape).to(dtype)
                for place, (name, shape) in enumerate(SHAPES.items())
                if name not in LACKED.get(i, ())
            }
        )
        for i in range(count)
    ]


def made(seed: int, kind: str, found: list[TaskVector] | None = None, **options: object) -> Composition:
    return Composition(Bag(seed), vectors(seed) if found is None else found, KINDS[kind], **options)  # type: ignore[arg-type]


def oracle(model: Composition, seed: int, found: list[TaskVector]) -> Callable[[Tensor], dict[str, Tensor]]:
    """Base plus an einsum of the coefficient of every weight with the vectors, tensor by tensor."""
    base = dict(Bag(seed).named_parameters())
    sizes = {name: p.numel() for name, p in base.items()}
    columns = model.kind.columns(sizes)
    places = {}
    for name, size in sizes.items():
        order, parts = model.kind.order(name, size), len(columns[name])
        part = torch.zeros(size, dtype=torch.long) if order is None else order.long() // -(-size // parts)
        places[name] = columns[name][part]

    def composed(c: Tensor) -> dict[str, Tensor]:
        table = c.view(model.coefficients.shape)
        out = {}
        for name, p in base.items():
            tau = torch.stack([v.tensors.get(name, torch.zeros_like(p)).detach().to(p).flatten() for v in found])
            out[name] = p.detach() + torch.einsum("np,np->p", table[:, places[name]], tau).view(p.shape)
        return out

    return composed


def same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-12) -> None:
    assert list(found) == list(expected)
    for name in expected:
        assert found[name].dtype == expected[name].dtype
        torch.testing.assert_close(found[name], expected[name], rtol=tolerance, atol=tolerance)


def test_small_tensors_of_equal_size_and_vectors_are_joined() -> None:
    for kind, expected in (("per block", [2, 2, 2]), ("per channel", [2, 2])):
        assert [len(group) for group in made(1, kind)._groups if len(group) > 1] == expected
    model = made(1, "per block")
    assert sorted(i for group in model._groups for i in group) == list(range(10)) and len(model._groups) == 7
    assert len(model.joined) == 3 and all(isinstance(block, JoinedBlock) for block in model.joined)


@pytest.mark.parametrize("train", [False, True])
@given(seed=seeds, kind=kinds)
@settings(max_examples=12, deadline=None)
def test_sums_are_those_of_every_weight(train: bool, seed: int, kind: str) -> None:
    model = made(seed, kind)
    c = draw(seed + 7, *model.coefficients.shape)
    with torch.set_grad_enabled(train):
        found, moved = model.weights(c), model.displacements(c)
    expected = oracle(model, seed, vectors(seed))(c)
    same(found, expected)
    base = dict(Bag(seed).named_parameters())
    same(moved, {name: t - base[name].detach() for name, t in expected.items()})
    assert not any(t.requires_grad for t in found.values())


@given(seed=seeds, kind=kinds)
@settings(max_examples=12, deadline=None)
def test_gradients_are_the_adjoint(seed: int, kind: str) -> None:
    """<B c, g> = <c, B^T g>, where some tensors have no gradient; thawed tensors of the network get none."""
    model = made(seed, kind)
    model.module.requires_grad_(True)
    g = {name: draw(seed + 90 + i, *shape) for i, (name, shape) in enumerate(SHAPES.items()) if name not in "bei"}
    c = draw(seed + 7, *model.coefficients.shape).requires_grad_()
    found = model.weights(c)
    (gradient,) = torch.autograd.grad([found[name] for name in g], c, [g[name] for name in g])
    expected = oracle(model, seed, vectors(seed))(c)
    (plain,) = torch.autograd.grad([expected[name] for name in g], c, [g[name] for name in g])
    torch.testing.assert_close(gradient, plain, rtol=1e-11, atol=1e-11)
    other = draw(seed + 8, *c.shape)
    moved = model.displacements(other)
    inner = sum(float((moved[name] * g[name]).sum()) for name in g)
    assert inner == pytest.approx(float((gradient * other).sum()), rel=1e-9, abs=1e-9)
    torch.stack([t.sum() for t in model.weights(c).values()]).sum().backward()
    assert all(p.grad is None for p in model.module.parameters())


@given(seed=seeds, kind=kinds, which=st.sampled_from(sorted(SHAPES)), value=st.sampled_from([torch.inf, torch.nan]))
@settings(max_examples=20, deadline=None)
def test_what_is_not_finite_stays_with_its_tensor(seed: int, kind: str, which: str, value: float) -> None:
    model = made(seed, kind)
    found = model.weights()
    grads = [torch.full(t.shape, value if name == which else 1.0) for name, t in found.items()]
    (gradient,) = torch.autograd.grad(list(found.values()), model.coefficients, grads)
    sizes = {name: t.numel() for name, t in found.items()}
    spoilt = torch.zeros(gradient.shape, dtype=torch.bool)
    for i, vector in enumerate(vectors(seed)):
        spoilt[i, model.kind.columns(sizes)[which]] = which in vector.tensors
    assert not gradient[~spoilt].isnan().any() and not gradient[~spoilt].isinf().any()
    assert not gradient[spoilt].isfinite().any()


@pytest.mark.parametrize("train", [False, True])
@given(seed=seeds, kind=kinds, axis=numbers)
@settings(max_examples=12, deadline=None)
def test_transforms_are_those_of_the_sums(train: bool, seed: int, kind: str, axis: int) -> None:
    """jvp, vmap along either axis, and one inside the other, with gradients on or off."""
    model = made(seed, kind)
    plain = oracle(model, seed, vectors(seed))
    size = model.coefficients.numel()
    c, t = draw(seed + 7, size), draw(seed + 8, size)
    stack = torch.stack([c, t, c - t], axis)
    with torch.set_grad_enabled(train):
        for found, expected in zip(jvp(model.weights, (c,), (t,)), jvp(plain, (c,), (t,)), strict=True):
            same(found, expected, 1e-11)
        same(vmap(model.weights, axis)(stack), vmap(plain, axis)(stack), 1e-11)
        found = vmap(lambda z: jvp(model.weights, (c,), (z,))[1], axis)(stack)
        same(found, vmap(lambda z: jvp(plain, (c,), (z,))[1], axis)(stack), 1e-11)
        found = jvp(lambda z: vmap(model.weights, axis)(z), (stack,), (stack,))[1]
        same(found, jvp(lambda z: vmap(plain, axis)(z), (stack,), (stack,))[1], 1e-11)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["per block", "partitions"])
@given(seed=seeds)
@settings(max_examples=4, deadline=None)
def test_transforms_over_half_storage(train: bool, kind: str, seed: int) -> None:
    model = made(seed, kind, dtype=torch.bfloat16)
    plain = oracle(model, seed, [vector.to(torch.bfloat16) for vector in vectors(seed)])
    c, t = draw(seed + 7, model.coefficients.numel()), draw(seed + 8, model.coefficients.numel())
    with torch.set_grad_enabled(train):
        for found, expected in zip(jvp(model.weights, (c,), (t,)), jvp(plain, (c,), (t,)), strict=True):
            same(found, expected, 1e-11)
        stack = torch.stack([c, t])
        same(vmap(model.weights)(stack), vmap(plain)(stack), 1e-11)


@pytest.mark.parametrize("kind", ["per block", "partitions"])
@given(seed=seeds)
@settings(max_examples=2, deadline=None)
def test_derivatives_by_differences(kind: str, seed: int) -> None:
    model = made(seed, kind)
    c = draw(seed + 7, model.coefficients.numel()).requires_grad_()

    def some(z: Tensor) -> Tensor:
        found = model.weights(z)
        return torch.cat([found[name].tanh().flatten() for name in "abcdefhij"])

    assert torch.autograd.gradcheck(some, (c,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda z: some(z).sum(), (c,))


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("stored", [torch.float64, torch.float32, torch.bfloat16])
@given(seed=seeds)
@settings(max_examples=2, deadline=None)
def test_streamed_sums_are_the_same_numbers(
    kind: str, stored: torch.dtype, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, found = tmp_path_factory.mktemp("taus"), vectors(seed, stored)
    for i, vector in enumerate(found):
        vector.save(folder / f"{i}.safetensors")
    filed = [TaskVector.load(folder / f"{i}.safetensors", stream=True) for i in range(len(found))]
    held = made(seed, kind, found)
    same(
        held.weights(held.coefficients.detach() + 0.5),
        oracle(held, seed, found)(torch.full_like(held.coefficients, 0.5)),
    )
    for other in (made(seed, kind, filed), made(seed, kind, found, stream=True), copy.deepcopy(held)):
        results = []
        for model in (held, other):
            c = draw(seed + 7, *model.coefficients.shape).requires_grad_()
            weights = model.weights(c)
            (gradient,) = torch.autograd.grad([t.square().sum() for t in weights.values()], c)
            results.append((weights, gradient))
        assert all(torch.equal(results[0][0][name], results[1][0][name]) for name in SHAPES)
        assert torch.equal(results[0][1], results[1][1])


@given(seed=seeds, kind=kinds, stored=st.sampled_from([torch.float16, torch.bfloat16]), network=st.booleans())
@settings(max_examples=12, deadline=None)
def test_storage_and_network_in_half_precision(seed: int, kind: str, stored: torch.dtype, network: bool) -> None:
    found = [vector.to(stored) for vector in vectors(seed)]
    base = Bag(seed, torch.bfloat16 if network else torch.float64)
    model = Composition(base, vectors(seed), KINDS[kind], dtype=stored, start=0.5)
    assert {block.data.dtype for block in model._blocks()} == {stored}
    wide = Composition(Bag(seed).to(torch.bfloat16).double(), found, KINDS[kind], start=0.5) if network else None
    expected = (wide or Composition(Bag(seed), found, KINDS[kind], start=0.5)).weights()
    for name, t in model.weights().items():
        assert t.dtype == base.get_parameter(name).dtype
        torch.testing.assert_close(t.double(), expected[name], rtol=2**-8 if network else 1e-12, atol=1e-6)


def test_casts_and_factors() -> None:
    model = made(3, "per block", start=0.5)
    expected = {name: t.float() for name, t in model.weights().items()}
    model.float()
    assert {block.data.dtype for block in model.joined if isinstance(block, JoinedBlock)} == {torch.float32}
    same(model.weights(), expected, 1e-5)
    pair = {name: (draw(1, 2, 1), draw(2, 1, 3)) for name in "bk"}
    low = TaskVector.from_factors(pair)
    base = Bag(3)
    base.k = nn.Parameter(draw(9, 2, 3))
    mixed = [TaskVector(LazyTensors({**entries_of(v.tensors), **entries_of(low.tensors)})) for v in vectors(3)]
    kept = Composition(base, mixed, start=0.5)
    factored = [n for n, block in zip(kept.names, kept._blocks(), strict=True) if isinstance(block, FactoredBlock)]
    assert factored == ["b", "k"] and all([i] in kept._groups for i in map(kept.names.index, factored))
    same(
        kept.weights(),
        {n: p.detach() + 0.5 * sum(v.tensors[n] for v in mixed if n in v.tensors) for n, p in base.named_parameters()},
    )


def test_tensors_of_several_dtypes_keep_theirs() -> None:
    base = Bag(3)
    base.a = nn.Parameter(base.get_parameter("a").detach().float())
    model, other = Composition(base, vectors(3), start=0.5), made(3, "per block", start=0.5)
    assert [t.dtype for t in model.weights().values()] == [torch.float32] + 9 * [torch.float64]
    for name, t in other.weights().items():
        torch.testing.assert_close(model.weights()[name].double(), t, rtol=1e-6, atol=1e-6)


def test_small_tensors_are_read_once(tmp_path: Path) -> None:
    found = vectors(5)
    for i, vector in enumerate(found):
        vector.save(tmp_path / f"{i}.safetensors")
    filed = [TaskVector.load(tmp_path / f"{i}.safetensors", stream=True) for i in range(3)]
    model = Composition(Bag(5), [vector.select(["a", "b", "e", "f"]) for vector in filed], start=0.5)
    expected = model.weights()
    for file in tmp_path.iterdir():
        file.unlink()
    assert all(torch.equal(t, expected[name]) for name, t in model.weights().items())


def test_operators_of_a_half_network_are_not_rounded() -> None:
    found = vectors(4, torch.float32)
    half = Composition(Bag(4, torch.bfloat16), found, KINDS["isotropic"]).operator().to_dense()
    wide = Composition(Bag(4), found, KINDS["isotropic"]).operator().to_dense()
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), wide, rtol=1e-6, atol=1e-6)
