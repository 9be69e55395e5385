"""Padding: a path of a token-level model is that of the tokens which count, however many others come along."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fipgeo import FirstOrder, GaussNewton, MetricField, PathResult, Sketched, adapt, sparsify
from fipgeo.paths import Kept, Verdict

from .toys import draw, filled, labels, loaded

TOKENS, LONGEST = 8, 4
CORRECTORS = {
    "gauss-newton": GaussNewton(steps=1, final_steps=2),
    "first-order": FirstOrder(steps=3, final_steps=4, batch_size=8),
}


class Tagger(nn.Module):
    """A class for every token; the block in the middle is one that the first-order corrector taps."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(TOKENS, 4), nn.Linear(4, 3)
        self.block = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        del mask
        return self.head(self.block(self.embedding(ids)))


def model() -> nn.Module:
    return filled(Tagger(), 0)


def padded(ids: Tensor, lengths: Tensor, more: int) -> dict[str, Tensor]:
    """Sequences with `more` further positions, and tokens that change with it where nothing counts."""
    wide = torch.nn.functional.pad(ids, (0, more))
    mask = torch.arange(wide.shape[1]) < lengths[:, None]
    return {"ids": torch.where(mask, wide, (3 + more) % TOKENS), "mask": mask.long()}


def sequences(seed: int, count: int, length: int = LONGEST) -> Tensor:
    return torch.randint(TOKENS, (count, length), generator=torch.Generator().manual_seed(seed))


def ragged(more: int, seed: int = 1, count: int = 20) -> dict[str, Tensor]:
    """Lengths between 1 and the longest, in one tensor."""
    lengths = 1 + torch.arange(count) % LONGEST
    return padded(sequences(seed, count), lengths, more)


def listed(more: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Batches of one length each; without padding where `more` is 0."""
    sizes = [2, 4, 3, 1, 2]
    return [padded(sequences(seed + i, 4, t), torch.full((4,), t), more) for i, t in enumerate(sizes)]


def same_path(a: PathResult, b: PathResult) -> None:
    assert len(a) == len(b) > 1 and a.outcome == b.outcome == "reached"
    for p, q in zip(a, b, strict=True):
        assert (p.changed, p.changed_upper, p.num_held_out) == (q.changed, q.changed_upper, q.num_held_out)
        assert p.drift == pytest.approx(q.drift, abs=1e-10) and p.distance == pytest.approx(q.distance, abs=1e-10)
        assert p.sparsity == q.sparsity
        for name, t in (p.tensors or {}).items():
            torch.testing.assert_close(t, (q.tensors or {})[name], rtol=0, atol=1e-10)
    assert a[-1].drift > 1e-6


@pytest.mark.parametrize("corrector", CORRECTORS)
@pytest.mark.parametrize("score", ["metric", "lamp"])
@pytest.mark.parametrize("data", [ragged, listed])
def test_a_sparse_path_does_not_depend_on_padding(corrector: str, score: str, data: Any) -> None:
    options: dict[str, Any] = {"corrector": CORRECTORS[corrector], "score": score, "max_steps": 8}
    paths = [sparsify(model(), data(more), 0.4, mask="mask", **options) for more in (0, 3)]
    same_path(*paths)


@pytest.mark.parametrize("data", [ragged, listed])
def test_learning_new_data_does_not_depend_on_padding_of_the_old(data: Any) -> None:
    new = [{"ids": sequences(9, 6), "mask": torch.ones(6, LONGEST), "y": labels(3, 6 * LONGEST)}] * 2

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), batch["y"])

    def forward(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["ids"], batch["mask"])

    paths = [
        adapt(model(), new, loss, keep=data(more), mask=lambda b: b["mask"] > 0, forward_fn=forward, store="all")
        for more in (0, 3)
    ]
    same_path(*paths)


def test_new_data_need_no_mask_and_one_that_fails_on_them_fails_at_once() -> None:
    ids, y, called = sequences(9, 6), labels(3, 6 * LONGEST), []

    def loss(outputs: Tensor, batch: Any) -> Tensor:
        return cross_entropy(outputs.flatten(0, 1), batch["y"])

    def forward(net: nn.Module, batch: Any) -> Tensor:
        return net(batch["ids"], batch.get("mask", torch.ones(len(batch["ids"]), LONGEST)))

    def learned(mask: Any) -> Any:
        new = [{"ids": ids, "y": y}] * 3
        told: dict[str, Any] = {"forward_fn": forward, "callback": called.append, "refresh": 1}
        return adapt(model(), new, loss, keep=ragged(0), mask=mask, **told)

    assert learned("mask").outcome == "reached" and len(called) == 3
    with pytest.raises(KeyError, match="mask"):
        learned(lambda batch: batch["mask"] > 0)
    assert len(called) == 3


@pytest.mark.parametrize("score", ["metric", "lamp"])
def test_a_mask_of_ones_is_no_mask(score: str) -> None:
    full = padded(sequences(1, 20), torch.full((20,), LONGEST), 0)
    options: dict[str, Any] = {"corrector": CORRECTORS["gauss-newton"], "score": score}
    same_path(*(sparsify(model(), full, 0.5, mask=mask, **options) for mask in (None, "mask")))


def test_without_the_mask_padding_is_felt() -> None:
    drifts = [sparsify(model(), ragged(more), 0.5, corrector="gauss-newton")[-1].drift for more in (0, 3)]
    assert abs(drifts[0] - drifts[1]) > 1e-6


@pytest.mark.parametrize("per", ["example", "position"])
def test_the_verdict_counts_positions_of_the_mask_only(per: str) -> None:
    net, data = model(), ragged(2)
    data["mask"][7] = 0  # says nothing about predictions
    field = MetricField(net, data, mask="mask", per=per, batch_size=6)
    verdict = Verdict(field.function, field.map.point())
    theta = field.map.point() + 0.4 * draw(2, field.space.dim)
    with torch.no_grad():
        f, f0 = loaded(net, field.map.named(theta))(**data), net(**data)
    chosen = data["mask"] > 0
    moved = [bool((f[i, m].argmax(-1) != f0[i, m].argmax(-1)).any()) for i, m in enumerate(chosen) if m.any()]
    z, z0 = (t[chosen] - t[chosen].mean(-1, keepdim=True) for t in (f, f0))
    found = verdict.measure(theta)
    assert verdict.num_compared == len(moved) == 19 and 0 < sum(moved) < 19
    assert found.changed == sum(moved) / 19
    assert found.distance == pytest.approx(math.sqrt(float((z - z0).square().sum()) / 20), rel=1e-12)
    assert verdict.spread == pytest.approx(math.sqrt(float((z0 - z0.mean(0)).square().sum()) / 20), rel=1e-12)


def test_parts_carry_their_own_mask() -> None:
    field = MetricField(model(), ragged(2), mask="mask", batch_size=6)
    kept = Kept.of(field.function, field.map.point())
    part = kept.subset(60, torch.Generator().manual_seed(0))
    assert part.num_examples < kept.num_examples and part.live is not None
    for batch, live in zip(part.batches, part.live, strict=True):
        assert torch.equal(live, batch["mask"].bool().repeat_interleave(3, 1))
    assert part.survey.lost == sum(int((~live).sum()) for live in part.live)


def fronts(data: Any, **options: Any) -> list[Any]:
    new = [(sequences(9, 6), labels(3, 6))]
    return [
        lambda: sparsify(model(), data, 0.5, **options),
        lambda: adapt(model(), new, cross_entropy, keep=data, **options),
    ]


def test_masks_that_do_not_fit_are_refused() -> None:
    additive = ragged(1) | {"mask": torch.where(ragged(1)["mask"] > 0, 0.0, -1e9)}
    nothing = ragged(1) | {"mask": torch.zeros(20, LONGEST + 1)}
    cases: list[tuple[Any, Any, str]] = [
        (ragged(1), "attention_mask", "mask: the batch has no entry 'attention_mask'; its entries are 'ids', 'mask'"),
        (ragged(1), lambda b: b["mask"][:, 1:], r"mask: has shape \[20, 4\]"),
        (additive, "mask", "mask: holds other values than 0 and 1"),
        (nothing, "mask", "mask: no position of any batch counts"),
    ]
    for data, mask, message in cases:
        for call in fronts(data, mask=mask):
            with pytest.raises(ValueError, match=message):
                call()


def test_a_sketch_is_no_geometry_of_a_path() -> None:
    for mask in (None, "mask"):
        for call in fronts(ragged(1), mask=mask, geometry=Sketched("logits")):
            with pytest.raises(ValueError, match=r"geometry: Sketched.*one point.*; pass geometry=Logits\(\)"):
                call()
