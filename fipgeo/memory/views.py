"""More inputs from few: kept ones as they are, and beside them as they might have been."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from fipgeo.data import Generator, as_generator

Transform = Callable[[Tensor, torch.Generator], Tensor]
"""Inputs `[n, ...]` and a source of randomness -> changed inputs `[n, ...]` of the same kind."""


def views(inputs: Tensor, transform: Transform, count: int, generator: Generator = None) -> Tensor:
    """Inputs followed by transformed copies of them, `count` views of each in all.

    An old network says what it thinks of any input, so that what protects its function need not be data that it was
    given: many views of few inputs go further than these inputs alone, in the same memory.

    Args:
        inputs: `[n, ...]`, those that are kept.
        transform: What changes them, in the way in which inputs of this kind differ, such as `Affine()` for images.
        count: V, views of each input, itself included.
        generator: Source of randomness.

    Returns:
        Views `[V * n, ...]`, the inputs themselves first; the kept inputs are all that need be stored.

    Raises:
        ValueError: count is not positive, or the transform changes the shape.

    Examples:
        >>> images = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> seen = views(images, Affine(), 4)
        >>> seen.shape, torch.equal(seen[:5], images)
        (torch.Size([20, 1, 8, 8]), True)
    """
    if count < 1:
        raise ValueError(f"count: got {count} views of an input, expected at least 1")
    random = as_generator(generator)
    parts = [inputs]
    for _ in range(count - 1):
        changed = transform(inputs, random)
        if changed.shape != inputs.shape:
            found = f"of shape {list(changed.shape)} from {list(inputs.shape)}"
            raise ValueError(f"transform: gave inputs {found}; views of an input must have its shape")
        parts.append(changed)
    return torch.cat(parts)


@dataclass(frozen=True)
class Affine:
    """Images turned, moved, scaled and slanted a little at random, each by itself; what comes in repeats the border.

    Attributes:
        degrees: Largest angle of a turn.
        shift: Largest move, as a share of height and width.
        scale: Largest change of size, as a share.
        shear: Largest slant, horizontal shift per height.
        flip: Whether every other image is mirrored.

    Examples:
        >>> x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> same = Affine(0, 0, 0, 0)(x, torch.Generator().manual_seed(0))
        >>> torch.allclose(same, x, atol=1e-5)
        True
    """

    degrees: float = 12.0
    shift: float = 0.07
    scale: float = 0.12
    shear: float = 0.12
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Changed images `[n, C, H, W]`.

        Raises:
            ValueError: The inputs are no floating-point images of four axes.
        """
        if images.dim() != 4 or not images.is_floating_point():
            what = f"{images.dtype} of shape {list(images.shape)}"
            raise ValueError(f"images: got {what}, expected floating-point images [n, C, H, W]")
        draws = 2 * torch.rand(6, len(images), generator=generator, dtype=torch.float64) - 1
        angle, size = draws[0] * math.radians(self.degrees), 1 + self.scale * draws[1]
        mirror = torch.where(draws[5] < 0, -1.0, 1.0) if self.flip else torch.ones(len(images), dtype=torch.float64)
        maps = torch.empty(len(images), 2, 3, dtype=torch.float64)
        maps[:, 0, 0], maps[:, 0, 1] = mirror * size * angle.cos(), self.shear * draws[2] - angle.sin()
        maps[:, 1, 0], maps[:, 1, 1] = mirror * angle.sin(), size * angle.cos()
        maps[:, :, 2] = 2 * self.shift * draws[3:5].T
        grid = affine_grid(maps.to(images), list(images.shape), align_corners=False)
        return grid_sample(images, grid, padding_mode="border", align_corners=False)
