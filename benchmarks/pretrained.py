"""Real pretrained networks and data sets, read from the folder that FIPGEO_DATA names.

`mlp_mnist`, an MLP 784-40-20-10 without biases, is no file there: it is trained on MNIST with labels when first asked
for (seconds on one core) and kept in the temporary folder.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

IMAGES = {
    "cifar10": ("cifar10_train10k", "cifar10_test"),
    "mnist": ("mnist", "mnist"),
    "fashion_mnist": ("fashion_mnist", "fashion_mnist"),
}
MLP = "mlp_mnist"
MLP_NORM = (0.1307,), (0.3081,)


def folder() -> Path:
    """The data folder: FIPGEO_DATA, or ../shared/data beside the checkout.

    Raises:
        SystemExit: There is none; the message says how to name one.
    """
    path = Path(os.environ.get("FIPGEO_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (path / "zoo.py").exists():
        sys.exit(f"no pretrained networks in {path}; set FIPGEO_DATA to the folder that holds zoo.py, models/, images/")
    return path


def load(name: str, count: int) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A pretrained network, `count` unlabelled training inputs, and the whole test set with its labels."""
    model, data, norm = _network(name)
    x = _images(data, "train", norm, name, slice(count))
    x_test = _images(data, "test", norm, name)
    if x.shape[1] == 3:  # channels last
        x = x.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x, x_test, _labels(data, "test")


def held_out(name: str, first: int = 5000, last: int = 10000) -> Tensor:
    """Training inputs `first` to `last` - 1 of a network, on which choices may be made; no labels come with them."""
    _, data, norm = _network(name)
    return _images(data, "train", norm, name, slice(first, last))


def _network(name: str) -> tuple[nn.Module, str, tuple[Any, Any]]:
    """The network in eval mode, its data set, and mean and standard deviation of its inputs."""
    spec = importlib.util.spec_from_file_location("zoo", folder() / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    return (_mlp(zoo.MLP()), "mnist", MLP_NORM) if name == MLP else zoo.load(name)


def _mlp(model: nn.Module, epochs: int = 1, batch_size: int = 64, lr: float = 1e-3) -> nn.Module:
    """The MLP as trained by Adam on all training images and labels of MNIST; read again where that was done before."""
    cache = Path(tempfile.gettempdir()) / f"fipgeo-{MLP}-{epochs}-{batch_size}-{lr}.safetensors"
    if cache.exists():
        model.load_state_dict(load_file(cache))
        return model.eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * p.shape[1] ** -0.5)
    x, y = _images("mnist", "train", MLP_NORM, MLP), _labels("mnist", "train")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    for _ in range(epochs):
        for part in torch.randperm(len(x), generator=generator).split(batch_size):
            optimizer.zero_grad()
            cross_entropy(model(x[part]), y[part]).backward()
            optimizer.step()
    fresh = cache.with_suffix(f".{os.getpid()}")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, fresh)
    os.replace(fresh, cache)
    return model.eval()


def _images(data: str, split: str, norm: tuple[Any, Any], name: str, which: slice = slice(None)) -> Tensor:
    archive = np.load(folder() / "images" / f"{IMAGES[data][split == 'test']}.npz")
    return _prepared(_pick(archive, "images", split)[which], *norm, name)


def _labels(data: str, split: str) -> Tensor:
    archive = np.load(folder() / "images" / f"{IMAGES[data][split == 'test']}.npz")
    return torch.from_numpy(_pick(archive, "labels", split).astype("int64"))


def _pick(archive: Any, key: str, split: str) -> np.ndarray:
    return archive[key] if key in archive else archive[f"{split}_{key}"]


def _prepared(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], name: str) -> Tensor:
    x = torch.from_numpy(images).float() / 255
    x = x[:, None] if x.dim() == 3 else x
    x = (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    wide = "lenet5" in name
    return interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) if wide else x
