"""Losses that are convex in tau, as they are used to train tangent models."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import mse_loss, one_hot

from fipgeo.tangent.model import TangentModel


def rescaled_square_loss(outputs: Tensor, labels: Tensor, kappa: float = 15.0, *, reduction: str = "mean") -> Tensor:
    r"""Square loss against one-hot labels times kappa: 1/(n C) sum_i |f_i - kappa e_{y_i}|^2.

    A linear model trained by it needs no softmax, and its best tau is the solution of a linear system; kappa sets the
    size of the score of the right class. Published settings: 15 where components see different classes, 5 where they
    see different examples of the same ones.

    Args:
        outputs: f `[n, ..., C]`.
        labels: Classes `[n, ...]` as integers, or shares of classes `[n, ..., C]` as floats.
        kappa: Score of the right class.
        reduction: "mean" over examples and classes, "sum", or "none" `[n, ..., C]`.

    Raises:
        ValueError: Labels do not have the shape of the outputs, with or without the last axis.

    Source: Achille et al., LQF: Linear Quadratic Fine-Tuning, CVPR 2021; Liu & Soatto, ICCV 2023.

    Examples:
        >>> rescaled_square_loss(torch.zeros(1, 3), torch.tensor([1]), kappa=3.0)
        tensor(3.)
    """
    return mse_loss(outputs, scaled_targets(labels, outputs, kappa), reduction=reduction)


def scaled_targets(labels: Tensor, outputs: Tensor, kappa: float) -> Tensor:
    """One-hot labels times kappa, of the shape of the outputs.

    Raises:
        ValueError: Labels fit neither as classes nor as shares, or a class is out of range.
    """
    if labels.is_floating_point():
        if labels.shape != outputs.shape:
            raise ValueError(
                f"labels: floats of shape {list(labels.shape)}, expected shares of classes {list(outputs.shape)}, or"
                f" integer classes {list(outputs.shape[:-1])}"
            )
        return kappa * labels.to(outputs.dtype)
    if labels.shape != outputs.shape[:-1]:
        raise ValueError(
            f"labels: shape {list(labels.shape)}, expected classes {list(outputs.shape[:-1])} for outputs"
            f" {list(outputs.shape)}"
        )
    return kappa * one_hot(labels.long(), outputs.shape[-1]).to(outputs.dtype)


def tangent_norm(model: TangentModel, *, squared: bool = False, eps: float = 1e-6) -> Tensor:
    """The published regulariser sqrt(eps + |tau|^2), or |tau|^2 itself, both convex; add it with a weight to a loss.

    Published weight of the norm: 1e-5. With the norm, unlike its square, the pull towards zero does not fade near it.

    Args:
        model: The tangent model.
        squared: |tau|^2 instead.
        eps: Under the root, so that it has a derivative at zero.

    Examples:
        >>> model = TangentModel(torch.nn.Linear(3, 2))
        >>> round(tangent_norm(model).item(), 6), tangent_norm(model, squared=True).item()
        (0.001, 0.0)
    """
    size = torch.stack([t.square().sum() for t in model.tangents().values()]).sum()
    return size if squared else (eps + size).sqrt()
