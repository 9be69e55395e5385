"""Files of paths: small, bit for bit, and alive after a kill at any moment."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy

from fipgeo import PathResult, adapt
from fipgeo.io import remove_leftovers
from fipgeo.paths.packing import Packer, unpacked

from .toys import CORRECTORS, draw, inputs, labels, mlp, same_bits, same_paths, sparse_path

TESTS = Path(__file__).parent.parent


def random_tensor(source: random.Random) -> Tensor:
    """Any dtype and shape, often with zeros, NaN or minus zero."""
    shape = [source.randint(0, 5) for _ in range(source.randint(0, 3))]
    dtype = source.choice([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16])
    generator = torch.Generator().manual_seed(source.randint(0, 10**6))
    t = torch.randn(shape, generator=generator, dtype=torch.float64)
    t = torch.where(torch.rand(shape, generator=generator) < source.choice([0, 0.3, 0.9, 1]), 0.0, t)
    if t.numel() and source.random() < 0.3:
        t.view(-1)[0] = source.choice([-0.0, float("nan"), float("inf")]) if dtype.is_floating_point else 1.0
    return t.to(dtype)


@given(st.integers(0, 10**6))
@example(4164)  # NaN in bfloat16, of other bits than torch's own
def test_packed_tensors_come_back_bit_for_bit(seed: int) -> None:
    source = random.Random(seed)
    reference = {f"t{i}": random_tensor(source) for i in range(5)}
    group = {}
    for name, t in reference.items():
        kind = source.random()
        group[name] = t.clone() if kind < 0.4 else random_tensor(source)
        if kind < 0.2 and t.numel():
            group[name].view(-1)[-1] = 1
    packer = Packer()
    entries = [packer.add("a", reference, {}), packer.add("b", group, reference)]
    first = unpacked("a", entries[0], packer.tensors, packer.tables, {})
    second = unpacked("b", entries[1], packer.tensors, packer.tables, first)
    for found, expected in ((first, reference), (second, group)):
        assert list(found) == list(expected)
        for name, t in expected.items():
            assert (found[name].dtype, found[name].shape) == (t.dtype, t.shape)
            assert torch.equal(found[name].reshape(-1).view(torch.uint8), t.reshape(-1).view(torch.uint8))


def test_what_is_as_it_was_takes_no_room_and_zeros_take_a_bit() -> None:
    dense = {"w": draw(0, 100, 80), "b": torch.zeros(64, dtype=torch.bool)}
    sparse = {"w": torch.where(draw(1, 100, 80) < 1.3, 0.0, draw(2, 100, 80)), "b": dense["b"]}
    packer = Packer()
    assert packer.add("start", dense, {})["modes"] == "wb"
    assert packer.add("again", dense, dense)["modes"] == "==" and "again.float64" not in packer.tensors
    assert packer.add("sparse", sparse, dense)["modes"] == "z="
    nonzero = int((sparse["w"] != 0).sum())
    assert packer.tensors["sparse.bits"].nbytes == 1000 and packer.tensors["sparse.float64"].nbytes == 8 * nonzero
    one = {"w": dense["w"].clone(), "b": dense["b"]}
    one["w"][3, 4] = 7.0
    assert packer.add("one", one, dense)["modes"] == "c=" and packer.tensors["one.float64"].tolist() == [7.0]


def test_a_path_to_ninety_per_cent_takes_less_than_half_of_its_points(tmp_path: Path) -> None:
    path = sparse_path(mlp(0, hidden=150).float(), inputs(1, 60).float(), 0.9, options={"max_steps": 60})
    assert path.outcome == "reached" and len(path) >= 5
    path.save(tmp_path / "path.safetensors")
    whole = sum(t.nbytes for p in path for t in (p.tensors or {}).values())
    assert (tmp_path / "path.safetensors").stat().st_size < 0.5 * whole + 20_000  # names, numbers and settings
    same_paths(PathResult.load(tmp_path / "path.safetensors"), path)


def adapted(seed: int, **options: Any) -> PathResult:
    new = (draw(seed, 60, 5), labels(seed, 60))
    settings: dict[str, Any] = {"keep": inputs(1, 30), "epochs": 6, "batch_size": 10, "lr": 0.2, "store": "all"}
    return adapt(mlp(seed), new, cross_entropy, **(settings | options))


@pytest.mark.parametrize(("kind", "store"), [("gauss-newton", "all"), ("first-order", "last")])
def test_a_checkpoint_at_every_step_is_where_the_path_was(kind: str, store: str, tmp_path: Path) -> None:
    file = tmp_path / "path.safetensors"
    options: dict[str, Any] = {"corrector": CORRECTORS[kind], "options": {"store": store, "max_steps": 4}}
    whole = sparse_path(mlp(0, norm=True), inputs(1, 30), 0.5, **options)
    seen = []

    def look(numbers: Any) -> None:
        seen.append(PathResult.load(file))

    watched = sparse_path(mlp(0, norm=True), inputs(1, 30), 0.5, checkpoint=file, callback=look, **options)
    same_paths(watched, whole)
    same_paths(PathResult.load(file), whole)
    assert [len(p) for p in seen] == list(range(2, len(whole) + 1))
    for part in (seen[0], seen[len(seen) // 2]):  # as if killed there
        part.save(file, overwrite=True)
        same_paths(sparse_path(mlp(0, norm=True), inputs(1, 30), 0.5, checkpoint=file, **options), whole)
    assert os.listdir(tmp_path) == ["path.safetensors"]


def test_a_raise_in_the_callback_loses_no_accepted_step(tmp_path: Path) -> None:
    file = tmp_path / "path.safetensors"

    def stop(numbers: Any) -> None:
        if numbers["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sparse_path(mlp(0), inputs(1, 20), 0.6, checkpoint=file, callback=stop)
    assert len(PathResult.load(file)) == 3
    same_paths(sparse_path(mlp(0), inputs(1, 20), 0.6, checkpoint=file), sparse_path(mlp(0), inputs(1, 20), 0.6))


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
sys.path.insert(0, sys.argv[1])
from paths.toys import CORRECTORS, inputs, mlp, sparse_path
print("ready", flush=True)
for _ in range(int(sys.argv[3])):
    sparse_path(mlp(0, hidden=12), inputs(1, 100), 0.9, corrector=CORRECTORS["first-order"], checkpoint=sys.argv[2])
"""


def test_a_killed_walk_goes_on_bit_for_bit(tmp_path: Path) -> None:
    file, source = tmp_path / "path.safetensors", random.Random(os.getpid())
    command = [sys.executable, "-c", SCRIPT, str(TESTS), str(file)]
    with subprocess.Popen([*command, "100000"], stdout=subprocess.PIPE, cwd=TESTS.parent) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        end = time.monotonic() + 60
        while not file.exists() and time.monotonic() < end:
            time.sleep(0.002)
        time.sleep(source.uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert len(PathResult.load(file)) >= 1  # whole, whenever the kill came
    walked = sparse_path(mlp(0, hidden=12), inputs(1, 100), 0.9, corrector=CORRECTORS["first-order"], checkpoint=file)
    same_paths(walked, sparse_path(mlp(0, hidden=12), inputs(1, 100), 0.9, corrector=CORRECTORS["first-order"]))
    assert os.listdir(tmp_path) == ["path.safetensors"]  # what killed writers left is gone


def test_leftovers_of_other_files_stay(tmp_path: Path) -> None:
    names = [".a.safetensors.0123456789ab.tmp", ".b.safetensors.0123456789ab.tmp", ".a.safetensors.notes.tmp", "a.tmp"]
    for name in names:
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path / "a.safetensors") == 1
    assert sorted(os.listdir(tmp_path)) == sorted(names[1:])


OTHERS: dict[str, dict[str, Any]] = {
    "weights of the start": {"model": mlp(5)},
    "generator": {"generator": 3},
    "objective": {"target": 0.8},
    "geometry": {"geometry": "euclidean"},
    "method": {"corrector": CORRECTORS["first-order"]},
}


@pytest.mark.parametrize("what", OTHERS)
def test_the_checkpoint_of_another_path_is_refused(what: str, tmp_path: Path) -> None:
    file = tmp_path / "path.safetensors"
    given: dict[str, Any] = {"model": mlp(0), "x": inputs(1, 40), "target": 0.3, "checkpoint": file}

    def walked(other: dict[str, Any]) -> PathResult:
        every: dict[str, Any] = given | other
        return sparse_path(**every)

    walked({})
    before = file.read_bytes()
    with pytest.raises(ValueError, match=rf"checkpoint: .* holds another path \(other .*{what}.*; name another file"):
        walked(OTHERS[what])
    with pytest.raises(ValueError, match="resume: the path's last point measured"):
        walked({"x": inputs(9, 40)})
    with pytest.raises(ValueError, match="tensors that differ|holds another path"):
        walked({"model": mlp(0, hidden=9)})
    assert file.read_bytes() == before


def test_more_steps_and_a_larger_budget_go_on_from_a_checkpoint(tmp_path: Path) -> None:
    file = tmp_path / "path.safetensors"
    given: dict[str, Any] = {"model": mlp(2), "x": inputs(2, 16), "target": 0.9, "checkpoint": file}
    first = sparse_path(**given, options={"budget": 0.25})
    more = sparse_path(**given, options={"budget": 5.0, "max_steps": 300})
    assert first.outcome == "budget" and more.outcome == "reached" and list(more)[: len(first)] == list(first)
    given |= {"target": 0.95, "options": {"budget": 5.0}, "resume": more}  # said, so allowed
    further = sparse_path(**given)
    assert further[-1].sparsity > more[-1].sparsity and len(PathResult.load(file)) == len(further)


def test_learning_is_checkpointed_too(tmp_path: Path) -> None:
    part = adapted(3, max_steps=2)
    part.save(tmp_path / "part.safetensors")
    same_paths(adapted(3, resume=PathResult.load(tmp_path / "part.safetensors")), adapted(3))


def test_a_checkpoint_needs_its_folder_before_the_first_step(tmp_path: Path) -> None:
    steps: list[Any] = []
    with pytest.raises(FileNotFoundError, match="folder"):
        sparse_path(mlp(0), inputs(1, 40), 0.5, checkpoint=tmp_path / "no" / "a.safetensors", callback=steps.append)
    with pytest.raises(ValueError, match="safetensors"):
        sparse_path(mlp(0), inputs(1, 40), 0.5, checkpoint=tmp_path / "a.pt", callback=steps.append)
    assert not steps


def test_bits_of_special_numbers_survive(tmp_path: Path) -> None:
    path = sparse_path(mlp(3), inputs(4, 30), 0.4)
    tensors = path[-1].tensors
    assert tensors is not None
    tensors["0.bias"][:3] = torch.tensor([-0.0, float("nan"), float("inf")])
    path.save(tmp_path / "path.safetensors")
    back = PathResult.load(tmp_path / "path.safetensors")[-1].tensors
    assert same_bits(back["0.bias"], tensors["0.bias"])
