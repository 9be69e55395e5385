"""Real pretrained networks and data sets, read from the folder that FIPGEO_DATA names."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

IMAGES = {"cifar10": ("cifar10_train10k", "cifar10_test"), "mnist": ("mnist", "mnist")}


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
    spec = importlib.util.spec_from_file_location("zoo", folder() / "zoo.py")
    assert spec is not None and spec.loader is not None
    zoo: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(zoo)
    model, data, (mean, std) = zoo.load(name)
    train_name, test_name = IMAGES[data]
    train = np.load(folder() / "images" / f"{train_name}.npz")
    test = np.load(folder() / "images" / f"{test_name}.npz")
    x = _prepared(_pick(train, "images", "train")[:count], mean, std, name)
    x_test = _prepared(_pick(test, "images", "test"), mean, std, name)
    if x.shape[1] == 3:  # channels last
        model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
    return model, x, x_test, torch.from_numpy(_pick(test, "labels", "test").astype("int64"))


def _pick(archive: Any, key: str, split: str) -> np.ndarray:
    return archive[key] if key in archive else archive[f"{split}_{key}"]


def _prepared(images: np.ndarray, mean: tuple[float, ...], std: tuple[float, ...], name: str) -> Tensor:
    x = torch.from_numpy(images).float() / 255
    x = x[:, None] if x.dim() == 3 else x
    x = (x - torch.tensor(mean).view(1, -1, 1, 1)) / torch.tensor(std).view(1, -1, 1, 1)
    wide = "lenet5" in name
    return interpolate(x, size=(32, 32), mode="bilinear", align_corners=False) if wide else x
