"""Masked positions and models evaluated in a chosen dtype: equal to the unpadded data and to float64 oracles."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fipgeo import OutputMap, as_batches
from fipgeo.jacobian import EmbeddedOutputs, JacobianRoot
from fipgeo.outputs import Categorical, Cosine, Euclidean, Geometry, Logits, changed_predictions, squared_distance

from .. import oracles
from ..hygiene import unchanged
from ..models import CASES, build

SEEDS = st.integers(0, 2**20)
LENGTHS = [4, 1, 3, 2, 4]


class Tagger(nn.Module):
    """Tokens to logits of every position, each from the tokens up to it; a pooled output beside them if asked."""

    def __init__(self, classes: int = 3, pooled: bool = False) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(6, 3), nn.Linear(3, 3), nn.Linear(3, classes)
        self.pooled = pooled

    def forward(self, ids: Tensor, keep: Tensor | None = None) -> Any:
        x = self.embedding(ids).cumsum(1)
        logits = self.head(torch.tanh(self.mix(x)))
        return (logits, torch.sin(x[:, 0])) if self.pooled else logits


def tagger(seed: int, **kwargs: Any) -> Tagger:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tagger(**kwargs).double()


def texts(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 6, (length,), generator=generator) for length in LENGTHS]


def padded(parts: list[Tensor], width: int | None = None) -> dict[str, Tensor]:
    """Texts filled up with token 0, and which positions are text, as a tokenizer gives both."""
    width = max(map(len, parts)) if width is None else width
    ids = torch.stack([nn.functional.pad(part, (0, width - len(part))) for part in parts])
    return {"ids": ids, "keep": (torch.arange(width) < torch.tensor([[len(part)] for part in parts])).long()}


def oracle(module: nn.Module, parts: list[Tensor], geometry: Geometry) -> Tensor:
    """Sum over examples of R^T R, every text on its own and without padding."""
    roots = [oracles.root(module, part[None], geometry.embed) for part in parts]
    return torch.stack([root.T @ root for root in roots]).sum(0)


def root_of(module: nn.Module, inputs: Any, geometry: Geometry, engine: str = "autodiff", **kwargs: Any):
    map_ = OutputMap(module)
    function = EmbeddedOutputs(map_, geometry, as_batches(inputs), **kwargs)
    return JacobianRoot(function, map_.point(), engine=engine)


def squared(root: JacobianRoot) -> Tensor:
    return root.normal(torch.eye(root.shape[1], dtype=root.dtype))


@pytest.mark.parametrize("engine", ["autodiff", "materialised"])
@pytest.mark.parametrize("geometry", [Euclidean(), Logits(), Categorical(), Cosine()], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("sizes", [(5,), (2, 2, 1)])
def test_padding_does_not_count(engine: str, geometry: Geometry, pooled: bool, sizes: tuple[int, ...]) -> None:
    module, parts, start, batches = tagger(1, pooled=pooled), texts(1), 0, []
    for size in sizes:
        batches.append(padded(parts[start : start + size], width=6 if start else None))  # ragged between batches too
        start += size
    root = root_of(module, batches, geometry, engine, mask="keep")
    assert root.survey.normaliser == root.survey.num_examples == 5
    assert oracles.relative(squared(root), oracle(module, parts, geometry)) < 1e-12


@settings(max_examples=4)
@given(seed=SEEDS, width=st.integers(4, 9), size=st.integers(1, 5))
def test_a_mean_over_positions_is_exact_whatever_the_batches(seed: int, width: int, size: int) -> None:
    module, parts = tagger(seed), texts(seed)
    inputs = as_batches(padded(parts, width), batch_size=size)
    root = root_of(module, inputs, Logits(), mask="keep", per="position")
    assert root.survey.normaliser == sum(LENGTHS) and sum(root.survey.examples) == 5
    assert oracles.relative(squared(root), oracle(module, parts, Logits())) < 1e-12


@pytest.mark.parametrize("geometry", [Euclidean(), Logits()], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_the_rank_bound_is_that_of_the_data_without_padding(geometry: Geometry, pooled: bool) -> None:
    parts = [torch.tensor([1, 2]), torch.tensor([3])]
    module = tagger(2, classes=2, pooled=pooled)
    root = root_of(module, padded(parts, 7), geometry, mask="keep")
    free = 3 * (2 - geometry.lost) + (2 * (3 - geometry.lost) if pooled else 0)
    assert root.survey.num_rows - root.survey.lost == root.rank_bound == free
    if not pooled:
        assert int(torch.linalg.matrix_rank(squared(root))) == free  # sharp


def test_kinds_of_masks_and_where_they_are_found() -> None:
    module, parts = tagger(3), texts(3)
    batch = padded(parts)
    expected = oracle(module, parts, Euclidean())
    plain = {"ids": batch["ids"]}
    ways: list[tuple[Any, Any]] = [
        ([batch], "keep"),
        ([(batch, torch.zeros(5))], "keep"),
        ([batch | {"keep": batch["keep"].bool()}], "keep"),
        ([batch | {"keep": batch["keep"].double()}], "keep"),
        ([plain], lambda b: b["ids"] != 0),
        (batch["ids"], lambda ids: ids != 0),
    ]
    for inputs, mask in ways:
        assert oracles.relative(squared(root_of(module, inputs, Euclidean(), mask=mask)), expected) < 1e-12
    map_ = OutputMap(module, forward_fn=lambda m, b: m(b.ids))
    batches = as_batches([SimpleNamespace(**batch)])
    root = JacobianRoot(EmbeddedOutputs(map_, Euclidean(), batches, "keep"), map_.point())
    assert oracles.relative(squared(root), expected) < 1e-12


def test_all_positions_count_without_a_mask() -> None:
    module, ids = tagger(4), padded(texts(4))["ids"]
    assert root_of(module, ids, Euclidean(), per="position").survey.normaliser == ids.numel()
    ones = root_of(module, ids, Euclidean(), mask=lambda ids: torch.ones_like(ids))
    assert torch.equal(squared(ones), squared(root_of(module, ids, Euclidean())))


def test_an_example_of_padding_only_counts_as_an_example() -> None:
    module, parts = tagger(5), [torch.tensor([1, 2, 3]), torch.tensor([], dtype=torch.long)]
    root = root_of(module, padded(parts), Euclidean(), mask="keep")
    assert root.survey.normaliser == 2 and root.rank_bound == 9
    assert oracles.relative(squared(root), oracle(module, parts[:1], Euclidean())) < 1e-12


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"mask": 3}, TypeError, "mask: got a int, expected the name of an entry"),
    (
        {"mask": "attention_mask"},
        ValueError,
        "mask: the batch has no entry 'attention_mask'; its entries are 'ids', 'keep'",
    ),
    ({"mask": lambda b: b["keep"][:, :-1]}, ValueError, r"mask: has shape \[5, 3\] and the outputs \[5, 4, 3\]"),
    ({"mask": lambda b: b["keep"][:, 0]}, ValueError, r"mask: has shape \[5\] and the outputs"),
    ({"mask": lambda b: 1}, TypeError, "mask: gave a int, expected a tensor"),
    ({"mask": lambda b: 0 * b["keep"]}, ValueError, "mask: no position of any batch counts"),
    ({"mask": lambda b: -1e9 * (1 - b["keep"])}, ValueError, "mask: holds other values than 0 and 1"),
    ({"per": "token"}, ValueError, "per: got 'token', expected one of 'example', 'position'"),
]


@pytest.mark.parametrize(("options", "kind", "message"), BAD, ids=[message[:30] for *_, message in BAD])
def test_errors_name_the_argument(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        root_of(tagger(0), padded(texts(0)), Euclidean(), **options)


def test_more_errors() -> None:
    with pytest.raises(ValueError, match="mask: got 'keep', but the batch is a Tensor, which has no named entries"):
        root_of(tagger(0), padded(texts(0))["ids"], Euclidean(), mask="keep")
    module, x = build("mlp")
    with pytest.raises(ValueError, match=r"per: 'position' needs outputs \[n, T, C\] .* but no output has any"):
        root_of(module, x, Euclidean(), per="position")


def test_distances_and_predictions_ignore_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    f, f0 = torch.randn(2, 3, 4, 5, generator=generator)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    g = torch.where(mask[..., None], f, torch.nan)  # what padding holds does not matter at all
    for geometry in (Logits(), Categorical(), Cosine(), Euclidean()):
        expected = (geometry.distance(f, f0).square() * mask).sum(1)
        assert torch.allclose(squared_distance(geometry, (g,), (f0,), [mask]), expected, rtol=1e-12)
    moved = changed_predictions(Logits(), (f,), (torch.where(mask[..., None], f, -f),), [mask])
    assert moved is not None and not bool(moved.any())
    assert bool(changed_predictions(Logits(), (f,), (-f,), [mask])[:2].all())  # type: ignore[index]


@pytest.mark.parametrize("engine", ["autodiff", "materialised"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["mlp", "convnet", "encoder", "text", "tied", "lstm", "frozen_part"])
def test_float64_on_request_is_float64_throughout(name: str, dtype: torch.dtype, engine: str) -> None:
    module, inputs = build(name)
    module = module.to(dtype)
    inputs = {k: _cast(v, dtype) for k, v in inputs.items()} if isinstance(inputs, dict) else _cast(inputs, dtype)
    expected = oracles.root(module, inputs)
    with unchanged(module, inputs):
        map_ = OutputMap(module, dtype=torch.float64)
        function = EmbeddedOutputs(map_, Euclidean(), as_batches(inputs))
        root = JacobianRoot(function, map_.point(), engine=engine)
        found = root.to_dense()
    assert found.dtype == root.dtype == map_.point().dtype == torch.float64
    assert oracles.relative(found, expected) < 1e-12


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


@pytest.mark.parametrize("name", CASES)
def test_every_network_of_the_table_runs_in_a_chosen_dtype(name: str) -> None:
    module, inputs = build(name)
    found, expected = OutputMap(module, dtype=torch.float32).check(inputs), OutputMap(module).check(inputs)
    for f, f0 in zip(found, expected, strict=True):
        assert f.dtype == torch.float32 and f0.dtype == torch.float64 and oracles.relative(f, f0) < 1e-5


def test_only_float32_and_float64_can_be_chosen() -> None:
    with pytest.raises(ValueError, match=r"dtype: got torch.bfloat16, expected torch.float32, torch.float64 or None"):
        OutputMap(nn.Linear(2, 2), dtype=torch.bfloat16)


@pytest.mark.parametrize("geometry", [Categorical(), Logits(), Cosine(), Euclidean()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_embedded_in_float32(geometry: Geometry, dtype: torch.dtype) -> None:
    f = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = geometry.distance(f, f.flip(0))
    assert found.dtype == torch.float32
    assert oracles.relative(found, geometry.distance(f.double(), f.flip(0).double())) < 1e-6
    assert math.isfinite(float(squared_distance(geometry, (f,), (f.flip(0),)).sum()))
