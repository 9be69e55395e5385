"""Tangent models of pretrained networks against their dense Jacobian in float64."""

import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fipgeo import Component, TangentModel, compose

DATA = Path(os.environ.get("FIPGEO_DATA", "missing"))
NETWORKS = {"akamaster_cifar10_resnet20": (3, 32, 32), "smmk47_cifar10_vit": (3, 32, 32), "gaurav_mnist_vit": (28, 28)}


def load(name: str) -> nn.Module:
    spec = importlib.util.spec_from_file_location("zoo", DATA / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return zoo.load(name)[0].double().eval()


@pytest.mark.skipif(not (DATA / "zoo.py").exists(), reason="FIPGEO_DATA names no folder with pretrained networks")
@pytest.mark.parametrize("name", NETWORKS)
def test_a_composed_model_is_the_dense_linearisation(name: str, generator: torch.Generator) -> None:
    net = load(name)
    x = torch.randn(1, *NETWORKS[name], generator=generator)
    model = TangentModel(net)
    parts = []
    for part in ("a", "b"):
        tau = {n: 0.01 * torch.randn(t.shape, generator=generator) for n, t in model.tangents().items()}
        parts.append(Component.of(model.assign_(tau), part))
    composed = compose(net, parts, {"a": 0.7, "b": -1.2})
    out = net(x)
    params = list(net.parameters())
    rows = [torch.autograd.grad(f, params, retain_graph=True) for f in out[0]]
    whole = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    taus = torch.stack([torch.cat([part.tangents[n].flatten() for n in model.names]) for part in parts])
    changes = taus @ whole.T
    expected = out[0].detach() + torch.tensor([0.7, -1.2]) @ changes
    assert torch.allclose(composed(x)[0], expected, rtol=1e-9, atol=1e-9)
    assert float(changes.abs().max()) > 1e-3
