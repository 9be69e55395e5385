"""Vectors that stay in their files, against the same vectors in memory."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fipgeo import Composition, TaskVector
from fipgeo.atlas import Isotropic, fit_, ties, whiten
from fipgeo.atlas.blocks import StreamedBlock
from fipgeo.lazy import Deferred, entries_of

from ..test_task_vectors import shaken
from .test_composition import KINDS, bank


def filed(vectors: list[TaskVector], folder: Path) -> list[TaskVector]:
    for i, vector in enumerate(vectors):
        vector.save(folder / f"{i}.safetensors", overwrite=True)
    return [TaskVector.load(folder / f"{i}.safetensors", stream=True) for i in range(len(vectors))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float64, torch.float16])
def test_streaming_is_bit_for_bit_what_memory_gives(kind: str, stored: torch.dtype, tmp_path: Path) -> None:
    base, vectors, x = bank("mixed", 3)
    vectors = [vector.to(stored) for vector in vectors]
    models = [Composition(base, bank_, KINDS[kind], start=0.3) for bank_ in (vectors, filed(vectors, tmp_path))]
    for model in models:
        for _ in range(2):
            model(x).square().sum().backward()
    held, streamed = models
    assert all(isinstance(block, StreamedBlock) for block in streamed.blocks)
    assert held.coefficients.grad is not None and streamed.coefficients.grad is not None
    assert torch.equal(held(x), streamed(x)) and torch.equal(held.coefficients.grad, streamed.coefficients.grad)
    assert torch.equal(held.merge()(x), streamed.merge()(x)) and torch.equal(copy.deepcopy(streamed)(x), streamed(x))
    assert not any(t.is_floating_point() and t.numel() for t in streamed.blocks.buffers())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_vectors_in_memory_are_streamed_without_a_copy_if_asked(
    dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fipgeo.atlas.sums.SMALL", 0)  # tensors that are summed together are copies
    base, vectors, x = bank("mixed", 6)
    models = [Composition(base, vectors, dtype=dtype, start=0.3, stream=stream) for stream in (False, True)]
    for model in models:
        model(x).square().sum().backward()
    held, streamed = models
    assert held.coefficients.grad is not None and streamed.coefficients.grad is not None
    assert torch.equal(held(x), streamed(x)) and torch.equal(held.coefficients.grad, streamed.coefficients.grad)
    assert all(isinstance(block, StreamedBlock) for block in streamed.blocks)
    with torch.no_grad():
        vectors[0].tensors["mix"].add_(1.0)
    assert not torch.equal(held(x), streamed(x))  # they are the caller's own


def test_one_block_at_a_time_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a block is made, the one before it is gone; the biases are read once, before."""
    base = nn.Sequential(*(nn.Linear(40, 40) for _ in range(4)))
    vectors = filed([TaskVector.between(base, shaken(base, i)) for i in range(3)], tmp_path)
    model = Composition(base, vectors, start=0.1)
    made: list[weakref.ref[Tensor]] = []
    left: list[int] = []
    plain = StreamedBlock.data.fget
    assert plain is not None

    def watched(self: StreamedBlock) -> Tensor:
        left.append(sum(ref() is not None for ref in made))
        out = plain(self)
        made.append(weakref.ref(out))
        return out

    monkeypatch.setattr(StreamedBlock, "data", property(watched))
    model(torch.ones(2, 40)).sum().backward()
    assert left == [0] * 8


def test_what_is_computed_from_files_is_computed_when_used(tmp_path: Path) -> None:
    base, vectors, _ = bank("mixed", 4)
    lazy = filed(vectors, tmp_path)
    for found, expected in (
        (lazy[0] + lazy[1], vectors[0] + vectors[1]),
        (lazy[0] - vectors[1], vectors[0] - vectors[1]),
        (-lazy[0] * 0.5, -vectors[0] * 0.5),
        (lazy[0].to(torch.float32), vectors[0].to(torch.float32)),
        (lazy[0].select("conv.*"), vectors[0].select("conv.*")),
        (ties(lazy, 0.5), ties(vectors, 0.5)),
    ):
        assert all(isinstance(entry, Deferred) for entry in entries_of(found.tensors).values())
        assert found.shapes == expected.shapes and found.dim == expected.dim
        assert all(torch.equal(found.tensors[name], expected.tensors[name]) for name in expected.tensors)
    assert lazy[0].dot(lazy[1]) == vectors[0].dot(vectors[1]) and lazy[0].norm() == vectors[0].norm()
    assert whiten(lazy)[0].norm() == pytest.approx(whiten(vectors)[0].norm())
    moved, expected = lazy[0].apply_to(base), vectors[0].apply_to(base)
    assert all(torch.equal(a, b) for a, b in zip(moved.parameters(), expected.parameters(), strict=True))
    (tmp_path / "0.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="there is no file"):
        lazy[0].norm()


def test_coefficients_are_solved_for_over_files(tmp_path: Path) -> None:
    base, vectors, x = bank("tied", 5)
    target = (0.4 * vectors[0] - 0.3 * vectors[2]).apply_to(base)(x).detach()
    found = [Composition(base, bank_, Isotropic()) for bank_ in (vectors, filed(vectors, tmp_path))]
    losses = [fit_(model, (x, target), loss="square", steps=3).losses for model in found]
    torch.testing.assert_close(found[0].coefficients, found[1].coefficients)
    assert losses[1] == pytest.approx(losses[0])
