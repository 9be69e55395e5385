"""The backbones of the benchmark of merging: what is tuned, what is forgotten, and by which vectors."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks import backbones, banks, merges, merging, records
from benchmarks.backbones import BACKBONES, MINILM
from benchmarks.banks import Backbone, Control, Examples, Labelled, cosine
from benchmarks.texts import Pooled


def trunk() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).eval()
    net[0].requires_grad_(False)
    return net


def examples(name: str, spare: bool = False) -> Examples:
    del spare
    draws = torch.Generator().manual_seed(len(name))
    y = torch.arange(30) % 3
    centres = torch.randn(3, 6, generator=draws)
    parts = [(centres[y] + 0.5 * torch.randn(30, 6, generator=draws), y) for _ in range(3)]
    return Examples(name, *parts)


def toy() -> Backbone:
    def control(spare: bool = False) -> Control:
        del spare
        found = examples("kept")
        return Control("kept", cosine(banks.head(trunk(), *found.train)), found.validation, found.test)

    def share(name: str, percent: int, seed: int) -> Labelled:
        raise NotImplementedError(f"{name}, {percent} %, seed {seed}")

    names = ("a", "bb", "kept")
    return Backbone("toy", "toy", trunk, names, names[:2], examples, control, share, 2, 1e-2, 10, others=())


def test_what_wants_no_gradient_is_not_tuned_and_vectors_are_made_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(banks, "CACHE", tmp_path)
    at = merges.setting(toy())
    assert [set(vector.tensors) for vector in at.vectors] == [{"2.weight", "2.bias"}] * 3
    assert {path.name for path in tmp_path.iterdir()} == {
        f"bank-toy-{n}-epochs2-rate0.01.safetensors" for n in toy().tasks
    }
    again = merges.setting(replace(toy(), trunk=trunk))
    for one, other in zip(at.vectors, again.vectors, strict=True):
        assert one.norm() > 0 and (one - other).norm() == 0


@pytest.mark.parametrize(("count", "train", "validation"), [(500, 200, 40), (100, 90, 20)])
def test_a_share_holds_nothing_that_is_for_validation(count: int, train: int, validation: int) -> None:
    first = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    end = min(count - validation, train)
    kept = set(first[end : end + validation].tolist())
    for seed in range(5):
        found = backbones._free(count, train, validation, 20, seed).tolist()
        assert len(set(found)) == len(found) == count // 5 and not kept & set(found)
    every = {i for seed in range(60) for i in backbones._free(count, train, validation, 20, seed).tolist()}
    assert every == set(range(count)) - kept


def test_a_backbone_has_cases_of_its_own_and_the_control_gives_no_vector(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def rule(at: merges.Setting, place: int, kept: merges.Task, seed: int) -> tuple[nn.Module, str]:
        seen.append(([task.name for task in at.tasks], len(at.vectors), at.tasks[place].name, kept.name, seed))
        return at.base, "none"

    monkeypatch.setattr(banks, "CACHE", tmp_path)
    monkeypatch.setitem(BACKBONES, "minilm", toy())
    monkeypatch.setattr(merging, "TASKS", ["a", "bb"])
    monkeypatch.setattr(merging, "NEGATED", {"rule": rule})
    given = ["--folder", str(tmp_path), "--backbones", "minilm", "--seeds", "4"]
    merging.main([*given, "--cells", "negate"])
    assert seen == [(["a", "bb"], 2, name, "kept", 4) for name in ("a", "bb")]
    merging.main([*given, "--cells", "add", "bank", "--methods", "isotropic"])
    found = records.read("merging", tmp_path)
    assert {r["case"] for r in found} == {"toy/negate/a", "toy/negate/bb", "toy/add", "toy/bank/2 epochs at 0.01"}
    (rows,) = (r["rows"] for r in found if "rows" in r)
    assert set(rows) == {"a", "bb", "kept"}


def test_layers_are_numbered_from_the_first() -> None:
    assert [backbones.block(n) for n in ("conv1.weight", "layer1.0.bn1.bias", "layer3.2.conv1.weight")] == [None, 0, 8]
    names = ("pos_embed", "transformer.layers.4.norm1.bias", "mlp_head.0.bias")
    assert [backbones.layer(n) for n in names] == [None, 4, None]


def test_ag_news_is_kept_and_its_vector_forgets_nothing() -> None:
    assert set(MINILM.tasks) - set(MINILM.forgotten) == {backbones.KEPT}
    assert all(one.forgotten == one.tasks for one in BACKBONES.values() if one is not MINILM)


def test_features_of_texts_are_means_over_their_tokens() -> None:
    class Table(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return type("Out", (), {"last_hidden_state": torch.stack([input_ids, input_ids**2], -1).float()})

    found = Pooled(Table())(torch.tensor([[7, 1, 3, 0, 0], [7, 2, 2, 2, 2]]))
    assert found.tolist() == [[2.0, 5.0], [2.0, 4.0]]


def test_spare_examples_are_in_no_other_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, ids = nn.Sequential(nn.Flatten(), nn.Linear(3072, 4)), np.arange(200, dtype=np.uint8)
    pictures = np.broadcast_to(ids[:, None, None, None], (200, 32, 32, 3)).transpose(0, 3, 1, 2)
    files = {"train": (pictures, ids % 5), "test": (pictures + 50, ids % 5)}
    monkeypatch.setattr(backbones, "_read", lambda file, split: files[split])
    monkeypatch.setattr(backbones, "_network", lambda name: (net, "own", ((0.0,) * 3, (1 / 255,) * 3)))
    monkeypatch.setattr(backbones, "folder", lambda: tmp_path)
    (tmp_path / "images").mkdir()
    np.savez(tmp_path / "images" / "cifar10_test.npz", images=pictures, labels=ids % 5)
    sizes = {"TRAIN": 60, "VALIDATION": 40, "TEST": 50, "SPARE": 30, "SPARE_CONTROL": 70}
    for key, value in sizes.items():
        monkeypatch.setattr(backbones, key, value)

    def numbers(part: Labelled) -> list[int]:
        return part[0][:, 0, 0, 0].round().int().tolist()

    usual, spare = (backbones.images("net", "mnist", which) for which in (False, True))
    train, validation, judge = map(numbers, (spare.train, spare.validation, spare.test))
    assert (train, validation) == (numbers(usual.train), numbers(usual.validation))
    assert len(set(train + validation + judge)) == 60 + 40 + 30
    assert len(usual.test[1]) == 50 and min(numbers(usual.test)) >= 50  # of the other file
    controls = [backbones.own("net", "1", which) for which in (False, True)]
    parts = [numbers(part) for part in (controls[0].validation, controls[0].test, controls[1].test)]
    assert numbers(controls[1].validation) == parts[0] and list(map(len, parts)) == [40, 50, 70]
    assert len(set().union(*parts)) == 160


def test_a_benchmark_can_take_them_in_place_of_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []
    backbone = replace(toy(), examples=lambda name, spare=False: asked.append(spare) or examples(name))
    backbone = replace(backbone, control=lambda spare=False: asked.append(spare) or toy().control())
    monkeypatch.setattr(merges, "bank", lambda *args: {})
    for spare in (False, True):
        asked.clear()
        merging.given(backbone, spare)
        assert asked == [spare] * 4
