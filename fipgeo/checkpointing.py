"""Activation checkpoints of the kind that hides the weights inside them from a derivative, seen in a forward pass."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction


class CheckpointError(NotImplementedError):
    """A forward pass has checkpoints whose weights no derivative sees."""


class CheckpointWatch(TorchFunctionMode):
    """A context in which no operation may run inside `torch.utils.checkpoint.checkpoint(..., use_reentrant=True)`.

    Such a part runs without gradients, and its backward pass is one that only `backward()` may ask for: where its
    inputs need no gradient, its weights are constants, of which torch warns and no more.

    Raises:
        CheckpointError: On leaving, if some operation did.

    Examples:
        >>> with torch.enable_grad(), CheckpointWatch():
        ...     torch.utils.checkpoint.checkpoint(torch.tanh, torch.zeros(2), use_reentrant=False)
        tensor([0., 0.])
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function itself."""
        del types
        self.seen = self.seen or (not torch.is_grad_enabled() and _inside(sys._getframe()))
        return func(*args, **(kwargs or {}))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Judge, unless the pass failed by itself."""
        super().__exit__(kind, error, trace)
        if self.seen and error is None:
            raise CheckpointError(
                "model: its forward uses reentrant checkpoints, inside which no derivative sees the weights; switch"
                " activation checkpointing off, such as by model.gradient_checkpointing_disable()"
            )


def _inside(frame: FrameType | None) -> bool:
    """Whether a frame was called, by whatever number of steps, from torch's reentrant checkpoint."""
    code = CheckpointFunction.forward.__code__
    while frame is not None:
        if frame.f_code is code:
            return True
        frame = frame.f_back
    return False
