"""Low-rank vectors and adapters against their products, written out."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from fipgeo import Composition, TaskVector, load_adapter
from fipgeo.atlas import PerBlock, choose_vectors, fit_
from fipgeo.atlas.blocks import FactoredBlock
from fipgeo.lazy import Factors, LazyTensors, entries_of

SHAPES = {"a": (4, 3), "b": (2, 5)}
seeds = st.integers(0, 2**20)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def low_rank(seed: int, rank: int, scale: float = 1.0) -> TaskVector:
    pairs = {name: (draw(seed, m, rank), draw(seed + 1, rank, p)) for name, (m, p) in SHAPES.items()}
    return TaskVector.from_factors(pairs, scale)


def dense(tau: TaskVector) -> TaskVector:
    return TaskVector(dict(tau.tensors), tau.buffers)


def flat(tau: TaskVector) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tau.tensors.values()])


@given(one=seeds, two=seeds, scale=st.floats(-3, 3), rank=st.integers(1, 3))
def test_arithmetic_of_factors_is_that_of_their_products(one: int, two: int, scale: float, rank: int) -> None:
    a, b = low_rank(one, rank, scale), low_rank(two, 2)
    x, y = flat(dense(a)), flat(dense(b))
    torch.testing.assert_close(x[:12].view(4, 3), scale * draw(one, 4, rank) @ draw(one + 1, rank, 3))
    for found, expected in ((a + b, x + y), (a - b, x - y), (-a, -x), (2.5 * a - b / 2, 2.5 * x - y / 2)):
        assert all(isinstance(entry, Factors) for entry in entries_of(found.tensors).values())
        torch.testing.assert_close(flat(found), expected, rtol=1e-10, atol=1e-10)
        assert found.dim == 22
    mixed = a + dense(b)
    torch.testing.assert_close(flat(mixed), x + y)
    for other in (b, dense(b)):
        assert a.dot(other) == pytest.approx(float(x @ y), rel=1e-9, abs=1e-9)
        assert other.dot(a) == pytest.approx(float(x @ y), rel=1e-9, abs=1e-9)
    assert a.norm() == pytest.approx(float(x.norm()), abs=1e-9)
    assert a.block_norms() == pytest.approx(dense(a).block_norms(), abs=1e-9)
    assert (a - a).norm() < 1e-6 and a.cosine(b) == pytest.approx(dense(a).cosine(dense(b)), abs=1e-7)


def test_factors_survive_files_selection_and_casts(tmp_path: Path) -> None:
    tau = low_rank(3, 2)
    mixed = TaskVector(LazyTensors({**entries_of(tau.tensors), "c": draw(5, 4)}), frozenset({"c"}))
    mixed.save(tmp_path / "tau.safetensors")
    for again in (
        TaskVector.load(tmp_path / "tau.safetensors"),
        TaskVector.load(tmp_path / "tau.safetensors", stream=True),
    ):
        assert list(again.tensors) == ["a", "b", "c"] and again.buffers == {"c"}
        assert all(torch.equal(again.tensors[name], mixed.tensors[name]) for name in mixed.tensors)
        assert isinstance(entries_of(again.tensors)["a"], Factors)
    half = tau.select("a").to(torch.bfloat16)
    entry = entries_of(half.tensors)["a"]
    assert isinstance(entry, Factors) and entry.left.dtype == torch.bfloat16 and list(half.tensors) == ["a"]
    assert half.tensors["a"].dtype == torch.float32
    turned = TaskVector.from_factors({"a": (draw(3, 4, 2), draw(4, 2, 3))}, transposed=True)
    torch.testing.assert_close(turned.tensors["a"], tau.tensors["a"].T)
    moved = tau.apply_to({name: torch.zeros(shape) for name, shape in SHAPES.items()}, 2.0)
    torch.testing.assert_close(moved["a"], 2 * tau.tensors["a"])
    with pytest.raises(ValueError, match=r"a: factors: got \[4, 2\] and \[3, 3\]"):
        TaskVector.from_factors({"a": (draw(0, 4, 2), draw(0, 3, 3))})


class Small(nn.Module):
    """A convolution, an embedding, a linear map, and one whose weight is stored transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.table = nn.Embedding(6, 4)
        self.head = nn.Linear(4, 2)


def write(folder: Path, tensors: dict[str, Tensor], **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(
        {f"base_model.model.{n}": t.contiguous() for n, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    (folder / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, **config}))
    return folder


def parts(seed: int) -> dict[str, Tensor]:
    return {
        "conv.lora_A.weight": draw(seed, 2, 2, 2, 2),
        "conv.lora_B.weight": draw(seed + 1, 3, 2, 1, 1),
        "table.lora_embedding_A": draw(seed + 2, 2, 6),
        "table.lora_embedding_B": draw(seed + 3, 4, 2),
        "head.lora_A.default.weight": draw(seed + 4, 2, 4),
        "head.lora_B.default.weight": draw(seed + 5, 2, 2),
    }


@given(seed=seeds, stable=st.booleans())
def test_an_adapter_is_what_its_layers_add(seed: int, stable: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    net, stored = Small(), parts(seed)
    folder = write(tmp_path_factory.mktemp("a"), stored, use_rslora=stable, alpha_pattern={"head": 3})
    tau = load_adapter(folder, net)
    scale = 6 / (math.sqrt(2) if stable else 2)
    image = draw(seed + 9, 5, 2, 3, 3)
    inner = nn.functional.conv2d(image, stored["conv.lora_A.weight"])
    expected = scale * nn.functional.conv2d(inner, stored["conv.lora_B.weight"])
    torch.testing.assert_close(nn.functional.conv2d(image, tau.tensors["conv.weight"]), expected)
    ids = torch.arange(6)
    looked = scale * stored["table.lora_embedding_A"].T[ids] @ stored["table.lora_embedding_B"].T
    torch.testing.assert_close(tau.tensors["table.weight"][ids], looked)
    x = draw(seed + 8, 5, 4)
    through = scale / 2 * x @ stored["head.lora_A.default.weight"].T @ stored["head.lora_B.default.weight"].T
    torch.testing.assert_close(x @ tau.tensors["head.weight"].T, through)
    assert set(tau.tensors) == {"conv.weight", "table.weight", "head.weight"}
    assert all(isinstance(entry, Factors) for entry in entries_of(tau.tensors).values())


def test_tensors_trained_in_full_transposed_weights_and_other_names(tmp_path: Path) -> None:
    net = nn.ModuleDict({"body": nn.Linear(4, 2), "head": nn.Linear(2, 3)})
    stored = {
        "x.lora_A.weight": draw(1, 2, 2),
        "x.lora_B.weight": draw(2, 4, 2),
        "head.modules_to_save.default.weight": draw(3, 3, 2),
        "head.bias": draw(4, 3),
    }
    folder = write(tmp_path / "a", stored, fan_in_fan_out=True)
    tau = load_adapter(folder / "adapter_model.safetensors", net, rename=lambda name: name.replace("x.", "body."))
    torch.testing.assert_close(tau.tensors["body.weight"], 3 * (draw(2, 4, 2) @ draw(1, 2, 2)).T)
    moved = tau.apply_to(net)
    torch.testing.assert_close(moved.get_parameter("head.weight").detach(), draw(3, 3, 2))
    torch.testing.assert_close(moved.get_parameter("head.bias").detach(), draw(4, 3))


def test_every_mismatch_is_reported_at_once(tmp_path: Path) -> None:
    stored = parts(0) | {"conv.lora_B.weight": draw(0, 4, 2, 1, 1), "none.lora_A.weight": draw(0, 2, 3)}
    del stored["table.lora_embedding_B"]
    stored |= {"none.lora_B.weight": draw(0, 2, 2), "head.bias": draw(0, 3), "head.lora_magnitude_vector": draw(0, 2)}
    with pytest.raises(ValueError) as caught:
        load_adapter(write(tmp_path / "a", stored, use_dora=True), Small())
    for part in (
        "it is a DoRA adapter",
        "table has no lora_B",
        "conv: lora_B [4, 2, 1, 1] and lora_A [2, 2, 2, 2] do not make the base's [3, 2, 2, 2]",
        "no parameter none.weight (say what it is called: rename=)",
        "head.bias is [3], the base's is [2]",
        "no parameter head.lora_magnitude_vector",
    ):
        assert part in str(caught.value)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError):
        load_adapter(tmp_path / "a", Small())


def test_compositions_keep_factors_and_learn_over_them() -> None:
    net = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    pairs = [
        {"0.weight": (draw(i, 6, 2), draw(i + 9, 2, 5)), "2.weight": (draw(i + 3, 3, 1), draw(i, 1, 6))}
        for i in range(3)
    ]
    vectors = [TaskVector.from_factors(pair, 0.3) for pair in pairs]
    model, plain = Composition(net, vectors, start=0.1), Composition(net, [dense(v) for v in vectors], start=0.1)
    assert all(isinstance(block, FactoredBlock) for block in model.blocks)
    x = draw(1, 20, 5)
    torch.testing.assert_close(model(x), plain(x))
    target = (0.5 * vectors[0] - 0.2 * vectors[1] + 0.8 * vectors[2]).apply_to(net)(x).detach()
    fits = [fit_(m, (x, target), loss="square", rtol=1e-9) for m in (model, plain)]
    assert fits[0].losses[-1] < 1e-6 * fits[0].losses[0]
    torch.testing.assert_close(model.coefficients, plain.coefficients, rtol=1e-4, atol=1e-5)
    half = Composition(net, vectors, PerBlock(), dtype=torch.bfloat16, start=0.1)
    torch.testing.assert_close(
        half(x), Composition(net, [dense(v) for v in vectors], start=0.1)(x), rtol=0.1, atol=0.05
    )
    mixed = Composition(net, [vectors[0], dense(vectors[1]), vectors[2]], start=0.1)
    plain = Composition(net, [dense(vector) for vector in vectors], start=0.1)
    torch.testing.assert_close(mixed(x), plain(x))
    torch.testing.assert_close(mixed.operator().to_dense(), plain.operator().to_dense())
    chosen = choose_vectors(net, vectors, x, 2)
    assert sum(len(vector.tensors) for vector in chosen) == 4
    assert all(isinstance(e, Factors) for vector in chosen for e in entries_of(vector.tensors).values())
    zero = TaskVector.from_factors({"0.weight": (torch.zeros(6, 2), draw(0, 2, 5))})
    assert not Composition(net, [zero]).names
