"""Task vectors against plain differences of state dicts, and the laws of their arithmetic."""

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fipgeo import TaskVector, WeightSpace
from fipgeo.io import TensorFile, save_record
from fipgeo.sources import Named

from .models import Tied


def network(seed: int, norm: bool = True) -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Tanh(), nn.Linear(4, 2))
    return shaken(net, seed)


def shaken(net: nn.Module, seed: int) -> nn.Module:
    """A copy with other parameters and floating buffers."""
    out, draws = copy.deepcopy(net), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in [*out.parameters(), *out.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=draws, dtype=torch.float64))
    return out


def vector(seed: int, dtype: torch.dtype = torch.float64) -> TaskVector:
    draws = torch.Generator().manual_seed(seed)
    return TaskVector(
        {n: torch.randn(s, generator=draws).to(dtype) for n, s in {"a": (2, 3), "b": (), "c": (4,)}.items()}
    )


def flat(tau: TaskVector) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tau.tensors.values()])


seeds = st.integers(0, 2**20)


@given(one=seeds, two=seeds, three=seeds, scale=st.floats(-3, 3))
def test_arithmetic_is_that_of_vectors(one: int, two: int, three: int, scale: float) -> None:
    a, b, c = vector(one), vector(two), vector(three)
    x, y, z = flat(a), flat(b), flat(c)
    for found, expected in (
        (a + b, x + y),
        (a - b, x - y),
        (-a, -x),
        (a * scale, x * scale),
        (scale * (a + b) - c / 2, scale * (x + y) - z / 2),
        (sum([a, b, c]), x + y + z),
    ):
        assert isinstance(found, TaskVector)
        torch.testing.assert_close(flat(found), expected, rtol=1e-12, atol=1e-12)
    assert a.dot(b) == pytest.approx(float(x @ y), rel=1e-10, abs=1e-12)
    assert a.norm() == pytest.approx(float(x.norm()))
    assert a.cosine(b) == pytest.approx(float(torch.cosine_similarity(x, y, 0)))
    assert a.norm() ** 2 == pytest.approx(sum(v**2 for v in a.block_norms().values()))


@given(one=seeds, two=seeds)
def test_going_from_a_to_b_and_back(one: int, two: int) -> None:
    a, b = network(one), network(two + 1)
    for policy in ("keep", "move"):
        tau = TaskVector.between(a, b, buffers=policy)
        there, back = tau.apply_to(a), tau.apply_to(b, -1.0)
        for name, value in there.state_dict().items():
            still = policy == "keep" and "running" in name
            torch.testing.assert_close(value, (a if still else b).state_dict()[name])
        for name, value in back.state_dict().items():
            still = policy == "keep" and "running" in name
            torch.testing.assert_close(value, (b if still else a).state_dict()[name])
    assert float(TaskVector.between(a, a).norm()) == 0.0


def test_modules_state_dicts_and_files_give_the_same_vector(tmp_path: Path) -> None:
    a, b = network(1), network(2)
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    save_file(b.state_dict(), tmp_path / "b.safetensors")
    forms_a = (a, a.state_dict(), tmp_path / "a.safetensors", str(tmp_path / "a.safetensors"))
    forms_b = (b, b.state_dict(), TensorFile(tmp_path / "b.safetensors"), tmp_path / "b.safetensors")
    for policy in ("keep", "move"):
        expected = TaskVector.between(a, b, buffers=policy)
        for one in forms_a:
            for two in forms_b:
                found = TaskVector.between(one, two, buffers=policy)
                assert (found - expected).norm() == 0 and found.tensors.keys() == expected.tensors.keys()
                assert found.buffers == expected.buffers and found.skipped == expected.skipped


def test_what_is_skipped_is_said() -> None:
    tau = TaskVector.between(network(1), network(2))
    assert list(tau.tensors) == ["0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"]
    assert set(tau.skipped) == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    moved = TaskVector.between(network(1), network(2), buffers="move")
    assert moved.buffers == {"1.running_mean", "1.running_var"}
    assert moved.skipped == {"1.num_batches_tracked": "integers, which have no difference to scale"}
    assert moved.norm() == tau.norm() and "2 buffers" in repr(moved)
    part = TaskVector.between(network(1), network(2), "3.*")
    assert list(part.tensors) == ["3.weight", "3.bias"] and part.skipped["0.weight"] == "not chosen"
    assert list(tau.select("3.*").tensors) == ["3.weight", "3.bias"]


def test_tied_weights_count_once(tmp_path: Path) -> None:
    a = Tied()
    b = shaken(a, 3)
    tau = TaskVector.between(a, b)
    assert list(tau.tensors) == ["inner.weight", "inner.bias", "outer.bias"]
    moved = tau.apply_to(a)
    weight = moved.get_parameter("outer.weight")
    assert weight is moved.get_parameter("inner.weight")
    torch.testing.assert_close(weight, b.get_parameter("outer.weight"))
    dictionary = tau.apply_to(a.state_dict())
    assert dictionary["inner.weight"] is dictionary["outer.weight"]
    # a file holds one of the two names, whichever
    for left in ("inner.weight", "outer.weight"):
        values = {name: t for name, t in b.state_dict().items() if name != left}
        save_file(values, tmp_path / f"{left}.safetensors")
        assert (TaskVector.between(a, tmp_path / f"{left}.safetensors") - tau).norm() == 0
    apart = {name: t.clone() for name, t in b.state_dict().items()}
    assert (TaskVector.between(a, apart) - tau).norm() == 0
    apart["outer.weight"] += 1
    with pytest.raises(ValueError, match=r"inner.weight is tied in base and has 2 values in tuned"):
        TaskVector.between(a, apart)
    assert len(TaskVector.between(apart, a).tensors) == 4  # an untied base has two vectors


def test_every_mismatch_is_reported_at_once() -> None:
    a = network(1).state_dict()
    b = {**a, "3.bias": torch.zeros(5), "extra": torch.zeros(1), "0.bias": torch.zeros(4, dtype=torch.long)}
    del b["0.weight"]
    with pytest.raises(ValueError) as caught:
        TaskVector.between(a, b)
    for part in (
        "0.weight is missing",
        "3.bias has shape [2] in base and [5]",
        "extra is in tuned alone",
        "0.bias holds",
    ):
        assert part in str(caught.value)
    TaskVector.between(a, b, ["1.weight"])  # what is not asked for may differ
    with pytest.raises(ValueError) as caught:
        _ = vector(1) + TaskVector({"a": torch.zeros(2), "d": torch.zeros(1)})
    for part in ("b is in the first alone", "d is in the second alone", "a has shape [2, 3] and [2]", ".select"):
        assert part in str(caught.value)
    with pytest.raises(ValueError, match=r"a is missing; b is missing; c is missing"):
        vector(1).apply_to(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="a is not in the space; b is"):
        vector(1).ravel(WeightSpace.of(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="buffers: got 'none'"):
        TaskVector.between(a, a, buffers="none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype: got torch.int64"):
        TaskVector.between(a, a, dtype=torch.long)
    with pytest.raises(TypeError, match="base: got a int"):
        TaskVector.between(3, a)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"tuned: these entries are no tensors: x \(str\)"):
        TaskVector.between(a, {"x": "y"})  # type: ignore[dict-item]


@given(seed=seeds, dtype=st.sampled_from([torch.float16, torch.bfloat16]))
def test_half_storage_is_rounded_once(seed: int, dtype: torch.dtype) -> None:
    a, b = vector(seed, dtype), vector(seed + 1, dtype)
    for name, tensor in (a - 0.3 * b).tensors.items():
        step = (0.3 * b.tensors[name].float()).to(dtype)
        assert tensor.dtype == dtype and torch.equal(tensor, (a.tensors[name].float() - step.float()).to(dtype))
    one, two = network(seed, False).to(dtype), network(seed + 1, False).to(dtype)
    exact = TaskVector.between(one, two)
    assert {t.dtype for t in exact.tensors.values()} == {torch.float32}
    for name, value in exact.apply_to(one).state_dict().items():
        assert value.dtype == dtype and torch.equal(value, two.state_dict()[name])
    short = TaskVector.between(one, two, dtype=dtype)
    assert torch.equal(short.tensors["0.bias"], exact.tensors["0.bias"].to(dtype))


@given(seed=seeds)
def test_saved_vectors_come_back_bit_for_bit(seed: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("vectors") / "tau.safetensors"
    tau = TaskVector.between(network(seed), network(seed + 1), buffers="move", dtype=torch.bfloat16)
    tau.save(path)
    found = TaskVector.load(path)
    assert found.buffers == tau.buffers and found.skipped == tau.skipped
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tau.tensors.items())
    with pytest.raises(FileExistsError):
        tau.save(path)
    save_record(path, {}, {"kind": "other"}, overwrite=True)
    with pytest.raises(ValueError, match="holds a 'other', expected a 'task vector'"):
        TaskVector.load(path)


@given(seed=seeds)
def test_flat_displacements_round_trip(seed: int) -> None:
    space = WeightSpace.of(network(seed))
    v = torch.randn(space.dim, generator=torch.Generator().manual_seed(seed))
    tau = TaskVector.from_flat(space, v)
    assert torch.equal(tau.ravel(space), v) and tau.dim == space.dim
    only = tau.select("3.*").ravel(space)
    assert torch.equal(only, v * space.mask("3.*"))
    with pytest.raises(ValueError, match="vector: got shape"):
        TaskVector.from_flat(space, v[:-1])


def test_nothing_of_the_networks_is_changed() -> None:
    a, b = network(1).eval(), network(2)
    before = {name: t.clone() for name, t in a.state_dict().items()}
    TaskVector.between(a, b).apply_to(a, 2.0)
    assert all(torch.equal(t, before[name]) for name, t in a.state_dict().items()) and not a.training
    assert all(p.requires_grad and p.grad is None for p in a.parameters())


def test_sources_are_not_read_before_they_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.zeros(2), "n": torch.zeros(1, dtype=torch.long)}, path)
    named = Named.of(path)
    assert dict(named.shapes) == {"w": torch.Size([2]), "n": torch.Size([1])} or set(named) == {"w", "n"}
    assert named.integers == {"n"} and len(TensorFile(path)) == 2
    with pytest.raises(KeyError):
        named.values["other"]
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        named.values["w"]
    with pytest.raises(FileNotFoundError):
        Named.of(tmp_path / "none.safetensors")
