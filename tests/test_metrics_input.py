"""What the metric says to arguments and data that it cannot take."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fipgeo import Metric, basis, metric
from fipgeo.linalg import Dense

from . import oracles
from .models import build


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_a_pullback_must_fit() -> None:
    module, x = build("mlp")
    with pytest.raises(ValueError, match=r"basis: got shape \[30, 2\], expected \[31, r\]"):
        metric(module, x).pullback(basis.columns(torch.zeros(2, 30)))


def test_held_out_metrics_must_fit() -> None:
    module, x = build("mlp")
    g = metric(module, x)
    with pytest.raises(ValueError, match="held_out: a metric in 4 dimensions, expected 31"):
        g.spectrum(2, held_out=Metric(Dense(torch.eye(4)), 1))
    with pytest.raises(ValueError, match="on: this metric was made from a root, not from a model"):
        Metric(Dense(torch.eye(4)), 1).spectrum(2, held_out=x)


BAD_ARGUMENTS: list[tuple[Any, str]] = [
    (lambda g, v: g.solve(v, 0.0), "damping: got 0.0, expected a positive number: g has rank at most 10 in 31"),
    (lambda g, v: g.solve(v, -1.0), "damping: got -1.0, expected a positive number"),
    (lambda g, v: g.solve(v, math.nan), "damping: got nan, expected a positive number"),
    (lambda g, v: g.riemannian_gradient(v, 0), "damping: got 0, expected a positive number"),
    (lambda g, v: g.solve(v, 1.0, method="qr"), "method: got 'qr', expected one of 'auto', 'dual', 'dense', 'cg'"),
    (lambda g, v: g.spectrum(3, method="svd"), "method: got 'svd', expected 'auto', 'dual', 'dense' or 'lanczos'"),
    (lambda g, v: g.spectrum(0), "k: got 0, expected between 1 and 10, the most"),
    (lambda g, v: g.spectrum(11), "k: got 11, expected between 1 and 10"),
    (lambda g, v: g.spectrum(method="lanczos"), "k: all of up to 10 eigenvalues would need .* pass k"),
    (lambda g, v: g.matvec(v[:3]), r"got shape \(3,\), expected \[..., 31\]"),
    (lambda g, v: g.solve(v[:3], 1.0), "31"),
]


@pytest.mark.parametrize(("call", "message"), BAD_ARGUMENTS)
def test_bad_arguments(call: Any, message: str) -> None:
    module, x = build("mlp")
    with pytest.raises(ValueError, match=message):
        call(metric(module, x), draw(0, 31))


class Loader:
    """A loader of its own making, with private noise on every pass."""

    def __init__(self, batches: list[Tensor], noise: float = 0.0) -> None:
        self.batches, self.noise, self.private = batches, noise, np.random.default_rng(0)

    def __iter__(self) -> Any:
        return (batch + self.noise * self.private.normal() for batch in self.batches)


class Once(Loader):
    """A loader that is used up by one pass, though it is no iterator."""

    def __iter__(self) -> Any:
        batches, self.batches = self.batches, []
        return iter(batches)


def test_bad_data() -> None:
    module, x = build("mlp")
    fine = oracles.relative(metric(module, Loader([x])).operator.to_dense(), metric(module, x).operator.to_dense())
    assert fine < 1e-12
    holes = x.clone()
    holes[4] = torch.nan
    for inputs, message in [
        ([x[:2], x[:0], x[2:]], "inputs: batch 1 holds 0 examples; expected at least one in every batch"),
        ([x[:0]], "inputs: the first batch holds 0 examples"),
        ([x[:2], holes], "outputs: NaN or infinite values in batch 1; check the weights"),
        (holes, "outputs: NaN or infinite values in batch 0; check the weights"),
        (Loader([]), "inputs: no batch came; expected at least one example"),
        (Once([x]), r"inputs: a second pass over the data gave no batch; pass list\(inputs\)"),
        (Loader([x], noise=1.0), "inputs: two passes over the data gave different first batches; .* pass list"),
    ]:
        with pytest.raises(ValueError, match=message):
            metric(module, inputs)
    with pytest.raises(
        ValueError, match=r"geometry: Cosine\(\) is NaN or infinite at finite outputs of batch 0 .*euclidean"
    ):
        metric(module, x, geometry="cosine", output_fn=lambda f: f * 0)


def test_single_logits() -> None:
    module, x = nn.Linear(3, 1), draw(0, 5, 3)
    for geometry in ("logits", "categorical"):
        with pytest.raises(
            ValueError, match=f"geometry: '{geometry}' needs at least two classes .* use geometry='bernoulli'"
        ):
            metric(module, x, geometry=geometry)
        with pytest.raises(ValueError, match="needs at least two classes"):  # `[N]` is one logit each, not N classes
            metric(nn.Sequential(module, nn.Flatten(0)), x, geometry=geometry)
    p = torch.sigmoid(module(x).detach())
    design = torch.cat([x, torch.ones(5, 1)], 1)
    expected = design.T @ (p * (1 - p) * design) / 5
    for net in (module, nn.Sequential(module, nn.Flatten(0))):
        assert oracles.relative(metric(net, x, geometry="bernoulli").operator.to_dense(), expected) < 1e-10
