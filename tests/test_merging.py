"""Checkpoints merged file by file against the sum in memory."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from fipgeo import merge_checkpoints, merging
from fipgeo.__main__ import main
from fipgeo.merging import Checkpoint

SHAPES = {"0.weight": (3, 4), "0.bias": (3,), "scale": (), "empty": (0, 2)}


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    out = {name: torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype) for name, shape in SHAPES.items()}
    return out | {"steps": torch.tensor([seed]), "flags": torch.tensor([True, False])}


@given(
    seed=st.integers(0, 2**20),
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
@settings(max_examples=6)
def test_the_file_holds_the_sum(
    seed: int, weights: list[float], dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("merge")
    base, tuned = tensors(seed, dtype), [tensors(seed + i + 1) for i in range(len(weights))]
    save_file(base, folder / "base.safetensors")
    for i, state in enumerate(tuned):
        save_file(state, folder / f"{i}.safetensors")
    named = {folder / f"{i}.safetensors": weight for i, weight in enumerate(weights)}
    found = load_file(merge_checkpoints(folder / "base.safetensors", named, folder / "out.safetensors"))
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {n: (t.shape, t.dtype) for n, t in base.items()}
    for name, start in base.items():
        moved = start.double() + sum(
            w * (t[name].double() - start.double()) for w, t in zip(weights, tuned, strict=True)
        )
        expected = moved.to(dtype) if name in SHAPES else start
        torch.testing.assert_close(found[name], expected)
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["base.safetensors", "out.safetensors", *(path.name for path in named)]
    )


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    whole, tuned = tensors(1), tensors(2)
    save_file(tuned, tmp_path / "tuned.safetensors")
    shards = tmp_path / "shards"
    shards.mkdir()
    parts = {"a.safetensors": ["0.weight", "scale", "steps"], "b.safetensors": ["0.bias", "empty", "flags"]}
    for file, names in parts.items():
        save_file({name: whole[name] for name in names}, shards / file)
    listed = {name: file for file, names in parts.items() for name in names}
    with pytest.raises(FileNotFoundError, match="holds 2 safetensors files and no index"):
        Checkpoint(shards)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": listed}))
    assert len(Checkpoint(shards)) == len(whole) == len(Checkpoint(index))
    merge_checkpoints(shards, {tmp_path / "tuned.safetensors": 1.0}, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], tuned[name]) for name in SHAPES)
    index.write_text(json.dumps({"weight_map": listed | {"more": "a.safetensors"}}))
    with pytest.raises(ValueError, match="the shards lack more, which the index promises"):
        Checkpoint(shards)


def sharded(folder: Path, whole: dict[str, Tensor]) -> Path:
    folder.mkdir()
    parts = {"a.safetensors": ["0.weight", "steps"], "b.safetensors": ["0.bias", "flags"]}
    parts["c.safetensors"] = ["scale", "empty"]
    for file, names in parts.items():
        save_file({name: whole[name] for name in names}, folder / file)
    listed = {name: file for file, names in parts.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def test_an_interrupted_merge_of_shards_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, out = sharded(tmp_path / "base", tensors(1)), tmp_path / "tuned.safetensors", tmp_path / "out"
    save_file(tensors(2), tuned)
    expected = load_file(merge_checkpoints(base, {tuned: 0.5}, tmp_path / "whole.safetensors"))
    plain, written = merging._merged, []

    def counted(name: str, *rest: Any) -> Tensor:
        written.append(name)
        if name == stop:
            raise KeyboardInterrupt
        return plain(name, *rest)

    monkeypatch.setattr(merging, "_merged", counted)
    for stop, names in (("0.bias", ["0.weight", "0.bias"]), ("scale", ["0.bias", "scale"]), ("", ["scale", "empty"])):
        written.clear()
        if stop:
            with pytest.raises(KeyboardInterrupt):
                merge_checkpoints(base, {tuned: 0.5}, out)
            assert not out.exists() and not list((tmp_path / ".out.part").glob(".*"))
        else:
            assert merge_checkpoints(base, {tuned: 0.5}, out) == out
        assert written == names
    found = Checkpoint(out)
    assert set(found) == set(expected) and all(torch.equal(found[name], expected[name]) for name in expected)
    assert found.shards() == Checkpoint(base).shards()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "tuned.safetensors", "whole.safetensors"]
    assert len(list(out.iterdir())) == 4


def test_shards_of_other_weights_or_files_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned, out = sharded(tmp_path / "base", tensors(1)), tmp_path / "tuned.safetensors", tmp_path / "out"
    save_file(tensors(2), tuned)
    plain = merging._finish

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    for weight, seed in ((0.5, 2), (0.25, 2), (0.25, 3)):
        monkeypatch.setattr(merging, "_finish", stopped)
        if seed == 3:
            save_file(tensors(3) | {"more": torch.zeros(0)}, tuned)
            save_file(tensors(3), tuned)
        with pytest.raises(KeyboardInterrupt):
            merge_checkpoints(base, {tuned: weight}, out)
    monkeypatch.setattr(merging, "_finish", plain)
    found = Checkpoint(merge_checkpoints(base, {tuned: 0.25}, out))
    one, two = tensors(1)["0.weight"], tensors(3)["0.weight"]
    torch.testing.assert_close(found["0.weight"], 0.75 * one + 0.25 * two)
    with pytest.raises(FileExistsError, match="is there already"):
        merge_checkpoints(base, {tuned: 0.5}, out)
    merge_checkpoints(base, {tuned: 1.0}, out, overwrite=True)
    torch.testing.assert_close(Checkpoint(out)["0.weight"], two)
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds 'notes.txt', which is no part of a checkpoint"):
        merge_checkpoints(base, {tuned: 0.5}, out, overwrite=True)
    assert (out / "notes.txt").exists() and not list(tmp_path.glob(".out*"))


def test_all_mismatches_are_reported_and_nothing_is_written(tmp_path: Path) -> None:
    save_file(tensors(1), tmp_path / "base.safetensors")
    wrong = tensors(2) | {"0.bias": torch.zeros(4), "more": torch.zeros(1), "steps": torch.zeros(1)}
    del wrong["scale"]
    save_file(wrong, tmp_path / "a.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    names = {tmp_path / "a.safetensors": 1.0, tmp_path / "b.safetensors": 1.0}
    with pytest.raises(ValueError) as caught:
        merge_checkpoints(tmp_path / "base.safetensors", names, tmp_path / "out.safetensors")
    for part in (
        "a.safetensors: lacks scale",
        "has more",
        "0.bias has shape [4], in the base [3]",
        "steps holds integers",
    ):
        assert part in str(caught.value)
    assert "b.safetensors: lacks 0.weight" in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_a_broken_file_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i, name in enumerate(("base", "a")):
        save_file(tensors(i), tmp_path / f"{name}.safetensors")

    def broken(*_: object) -> Tensor:
        raise ValueError("cut short")

    monkeypatch.setattr("fipgeo.merging._merged", broken)
    with pytest.raises(ValueError, match="cut short"):
        merge_checkpoints(tmp_path / "base.safetensors", {tmp_path / "a.safetensors": 1.0}, tmp_path / "o.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "base.safetensors"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    states = {name: tensors(i) for i, name in enumerate(("base", "a", "b"))}
    for name, state in states.items():
        save_file(state, f"{name}.safetensors")
    call = ["merge", "base.safetensors", "a.safetensors:0.4", "b.safetensors:-0.2", "-o", "out.safetensors"]
    assert main(call) == 0
    base, a, b = (states[name]["0.weight"] for name in ("base", "a", "b"))
    torch.testing.assert_close(load_file("out.safetensors")["0.weight"], base + 0.4 * (a - base) - 0.2 * (b - base))
    assert main(call) == 1 and "out.safetensors' is there already" in capsys.readouterr().err
    assert main([*call, "--overwrite"]) == 0
    assert main(["merge", "none.safetensors", "a.safetensors:1", "-o", "x.safetensors"]) == 1
    assert "there is no file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["merge", "base.safetensors", "a.safetensors", "-o", "x.safetensors"])
    assert "expected a path and a weight" in capsys.readouterr().err
    with pytest.raises(ValueError, match="expected a path that ends in .safetensors"):
        merge_checkpoints("base.safetensors", {}, "out.bin")
