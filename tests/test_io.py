"""Records: exact round trips, nothing half-written, and errors that name what to change."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import fipgeo.io
from fipgeo.io import load_record, save_record

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
plain_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def random_tensor(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 50).abs().to(dtype)


def bits(tensor: torch.Tensor) -> list[int]:
    """The bytes of a tensor; equality of these tells -0.0 from 0.0 and sees every NaN."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


@given(
    shape=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
    meta=st.dictionaries(st.text(), plain_values, max_size=4),
)
def test_round_trip_is_exact(tmp_path_factory, shape, dtype, seed, meta):
    path = tmp_path_factory.mktemp("records") / "a.safetensors"
    tensor = random_tensor(shape, dtype, seed)
    save_record(path, {"x": tensor, "": tensor}, meta)
    tensors, back = load_record(path)
    assert list(sorted(tensors)) == ["", "x"]
    assert tensors["x"].dtype == dtype and tensors["x"].shape == shape
    assert bits(tensors["x"]) == bits(tensor) == bits(tensors[""])
    assert json.dumps(back, sort_keys=True) == json.dumps(meta, sort_keys=True)


def test_views_shared_memory_and_gradients_are_stored_as_plain_values(tmp_path):
    base = random_tensor((4, 6), torch.float64, 1).requires_grad_()
    tensors = {"all": base, "same": base, "transposed": base.T, "row": base[1], "column": base[:, 2]}
    tensors["tail"] = torch.arange(10)[7:]  # one view of a larger storage, alone
    save_record(tmp_path / "a.safetensors", tensors, {})
    loaded, _ = load_record(tmp_path / "a.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(loaded[name], tensor.detach())
        assert not loaded[name].requires_grad
    assert base.requires_grad and base.grad is None


def test_a_loaded_record_is_independent_of_its_file_and_can_be_saved_again(tmp_path):
    path = tmp_path / "a.safetensors"
    save_record(path, {"x": torch.ones(1000), "y": torch.zeros(3)}, {"k": 1})
    tensors, meta = load_record(path)
    save_record(path, tensors, {"k": 2}, overwrite=True)
    tensors["x"].zero_()
    path.write_bytes(path.read_bytes()[:10])
    assert meta == {"k": 1} and tensors["x"].sum() == 0 and tensors["y"].shape == (3,)


def test_it_overwrites_only_when_told(tmp_path):
    path = tmp_path / "a.safetensors"
    save_record(path, {"x": torch.ones(2)}, {"k": 1})
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_record(path, {"x": torch.zeros(2)}, {"k": 2})
    assert load_record(path)[1] == {"k": 1}
    save_record(path, {"x": torch.zeros(2)}, {"k": 2}, overwrite=True)
    assert load_record(path)[1] == {"k": 2} and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize("failing", ["save_file", "_flush"])
def test_a_failure_midway_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, failing):
    path = tmp_path / "a.safetensors"
    save_record(path, {"x": torch.ones(2)}, {"k": 1})
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        temporary = next((Path(a) for a in arguments if isinstance(a, Path)), None)
        if temporary is not None:
            temporary.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(fipgeo.io, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        save_record(path, {"x": torch.zeros(2)}, {"k": 2}, overwrite=True)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


def test_the_file_is_flushed_before_it_takes_its_place(tmp_path, monkeypatch):
    events: list[str] = []
    flush, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("flush"), flush(descriptor))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    save_record(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    assert events[:2] == ["flush", "replace"]


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o022)
    try:
        save_record(tmp_path / "a.safetensors", {"x": torch.ones(2)}, {})
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == 0o644


@pytest.mark.parametrize(
    ("meta", "error", "message"),
    [
        ({"a": {"b": [1.0, float("nan")]}}, ValueError, r"meta\['a'\]\['b'\]\[1\] is nan"),
        ({"a": float("inf")}, ValueError, r"meta\['a'\] is inf"),
        ({"a": {3: "x"}}, TypeError, r"meta\['a'\] has the key 3 of type int; use str\(3\)"),
        ({"a": (1, 2)}, TypeError, r"meta\['a'\] is a tuple.*list"),
        ({"a": torch.ones(2)}, TypeError, r"meta\['a'\] is a Tensor.*tensors argument"),
        ([1, 2], TypeError, "meta is a list; expected a dictionary"),
        ({"a": "x" * (17 * 2**20)}, ValueError, "meta takes .* bytes as json, at most"),
    ],
)
def test_meta_that_json_would_change_is_refused(tmp_path, meta, error, message):
    with pytest.raises(error, match=message):
        save_record(tmp_path / "a.safetensors", {}, meta)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"x": [1.0, 2.0]}, r"tensors\['x'\] is a list; wrap it: torch.as_tensor"),
        ({1: torch.ones(2)}, r"tensors has the key 1 of type int; use str\(1\)"),
        ({"x": torch.ones(2, dtype=torch.complex128)}, r"tensors\['x'\] has dtype torch.complex128"),
        ({"x": torch.ones(2, device="meta")}, r"tensors\['x'\] is a meta tensor"),
        ({"x": torch.eye(2).to_sparse()}, r"tensors\['x'\] is a torch.sparse_coo tensor"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused_by_name(tmp_path, tensors, message):
    with pytest.raises(TypeError, match=message):
        save_record(tmp_path / "a.safetensors", tensors, {})
    assert os.listdir(tmp_path) == []


def test_bad_paths(tmp_path):
    with pytest.raises(ValueError, match="ends in '.safetensors'"):
        save_record(tmp_path / "a.pt", {}, {})
    with pytest.raises(FileNotFoundError, match="create it first"):
        save_record(tmp_path / "missing" / "a.safetensors", {}, {})
    with pytest.raises(FileNotFoundError, match="there is no file"):
        load_record(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({}, "was not written by save_record"),
        ({"other": "{}"}, "was not written by save_record"),
        ({"fipgeo": "{"}, "is damaged"),
        ({"fipgeo": "[]"}, "is damaged"),
        ({"fipgeo": '{"schema": 1, "meta": {"a": NaN}}'}, "is damaged"),
        ({"fipgeo": '{"schema": 99, "meta": {}}'}, "schema 99.*update fipgeo"),
        ({"fipgeo": '{"schema": 1, "meta": []}'}, "holds a list"),
    ],
)
def test_foreign_files_are_refused(tmp_path, header, message):
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.ones(2)}, path, metadata=header)
    with pytest.raises(ValueError, match=message):
        load_record(path)


@pytest.mark.parametrize("kept", [0, 4, 20, -5])
def test_a_cut_file_is_refused(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    save_record(path, {"x": torch.ones(20)}, {"k": 1})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_record(path)
