"""The kept function: residuals, random parts of it, and normalisation statistics against BatchNorm's own."""

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fipgeo.paths import Position

from .toys import centred, draw, inputs, kept_of, loaded, mlp

SEEDS = st.integers(0, 10**6)


@given(SEEDS, st.integers(1, 20))
def test_the_residual_is_zero_at_the_start_and_plain_elsewhere(seed: int, batch_size: int) -> None:
    model, x = mlp(seed), inputs(seed + 1, 17)
    kept = kept_of(model, x, batch_size=batch_size)
    theta = kept.function.map.point()
    assert not kept.residual(Position(theta)).any() and kept.loss(Position(theta)) == 0.0
    moved = theta + 0.3 * draw(seed + 2, len(theta))
    with torch.no_grad():
        gap = centred(loaded(model, kept.function.map.named(moved))(x)) - centred(model(x))
    torch.testing.assert_close(kept.residual(Position(moved)), gap.reshape(-1))
    assert kept.loss(Position(moved)) == pytest.approx(float(gap.square().sum(1).mean()), rel=1e-12)


def containers(x: Tensor) -> dict[str, Any]:
    return {
        "tensor": x,
        "list": list(x.split(4)),
        "loader": DataLoader(TensorDataset(x, torch.zeros(len(x))), batch_size=4, shuffle=True),
    }


@pytest.mark.parametrize("kind", ["tensor", "list", "loader"])
@given(seed=SEEDS, rows=st.integers(1, 90))
@settings(max_examples=6)
def test_parts_carry_their_own_reference(kind: str, seed: int, rows: int) -> None:
    model = mlp(seed)
    kept = kept_of(model, containers(inputs(seed, 20))[kind])
    source = torch.Generator().manual_seed(seed)
    part = kept.subset(rows, source)
    assert part.survey.num_rows <= rows or len(part.reference) == 1
    assert part.num_examples == sum(part.survey.examples)
    assert part.loss(Position(kept.function.map.point())) <= 1e-28  # every input is compared with its own outputs
    batch, z0, _ = kept.draw(6, source)
    x = batch[0] if isinstance(batch, list | tuple) else batch
    with torch.no_grad():
        torch.testing.assert_close(centred(model(x)), z0)


@pytest.mark.parametrize("most, batches", [(float("inf"), 4), (1, 1), (20, 2), (21, 3), (40, 4), (1000, 4)])
@pytest.mark.parametrize("batch_size", [40, 10])
def test_re_estimated_statistics_are_batchnorms_own(batch_size: int, most: float, batches: int) -> None:
    model, x = mlp(2, norm=True), inputs(3, 40)
    kept = kept_of(model, x, batch_size=batch_size)
    theta = kept.function.map.point() + 0.1
    found = kept.renormalised(Position(theta), most).buffers
    oracle = loaded(model, kept.function.map.named(theta)).train()
    norm = copy.deepcopy(oracle[1])  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm1d)
    norm.momentum = None  # a plain average over the batches
    norm.reset_running_stats()
    with torch.no_grad():
        for batch in islice(kept.batches.shuffled(1), batches):
            norm(oracle[0](batch))  # type: ignore[index]
    assert norm.running_mean is not None and norm.running_var is not None
    torch.testing.assert_close(found["1.running_mean"], norm.running_mean)
    torch.testing.assert_close(found["1.running_var"], norm.running_var)


def test_a_network_without_batchnorm_has_nothing_to_re_estimate() -> None:
    kept = kept_of(mlp(0), inputs(0, 8))
    position = Position(kept.function.map.point())
    assert kept.renormalised(position) is position
