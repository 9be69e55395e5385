"""What a read-only call must leave as it was: one snapshot of everything, taken before and compared after."""

import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import sympy  # noqa: F401  (torch imports it late, and it then adds a filter of its own)
import torch
from torch import Tensor, nn
from torch._C._functorch import peek_interpreter_stack
from torch.nn.modules import module as module_internals
from torch.utils.data import DataLoader


def raw(tensor: Tensor | None) -> Any:
    """The bytes of a tensor with dtype and shape."""
    if tensor is None:
        return None
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return tensor.dtype, tuple(tensor.shape), flat.numpy().tobytes()


def _identity(value: Any) -> Any:
    """Which object an attribute is; containers with what is in them."""
    if isinstance(value, dict):
        return id(value), tuple((key, id(entry)) for key, entry in value.items())
    if isinstance(value, list):
        return id(value), tuple(map(id, value))
    return value if isinstance(value, bool | int | float | str) else id(value)


def _module(module: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        for key, value in vars(part).items():  # mode, hooks, parameters, buffers and whatever a forward may set
            yield f"attribute {key} of {name or 'the model'}", _identity(value)
    for name, p in module.named_parameters(remove_duplicate=False):
        yield f"parameter {name}", (raw(p), p._version, p.requires_grad, id(p.grad), raw(p.grad), p._backward_hooks)
    for name, b in module.named_buffers(remove_duplicate=False):
        yield f"buffer {name}", (raw(b), b._version)


def _globals() -> Iterator[tuple[str, Any]]:
    cuda = torch.backends.cuda
    yield "attention kernels", (cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled())
    yield "cudnn attention", cuda.cudnn_sdp_enabled()
    yield "attention fast path", torch.backends.mha.get_fastpath_enabled()
    mkldnn, cudnn = torch.backends.mkldnn, torch.backends.cudnn
    yield "mkldnn", (mkldnn.enabled, mkldnn.deterministic)
    yield "cudnn", (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32)
    yield "matmul precision", torch.get_float32_matmul_precision()
    yield "torch stream", raw(torch.get_rng_state())
    kind, keys, *rest = np.random.get_state()
    yield "numpy stream", (kind, np.asarray(keys).tobytes(), *rest)
    yield "Python stream", random.getstate()
    yield "default dtype and device", (torch.get_default_dtype(), torch.get_default_device())
    yield "grad mode", (torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    yield "autocast", (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    yield "deterministic mode", torch.are_deterministic_algorithms_enabled()
    yield "threads", torch.get_num_threads()
    yield "transforms under way", peek_interpreter_stack() is None
    yield "warning filters", list(warnings.filters)
    for name, value in vars(module_internals).items():
        if name.startswith("_global") and isinstance(value, dict):
            yield f"module hooks {name}", _identity(value)


def _data(data: Any, path: str = "data") -> Iterator[tuple[str, Any]]:
    if isinstance(data, Tensor):
        yield path, (raw(data), data._version if not data.is_inference() else None)
    elif isinstance(data, Mapping):
        for key, value in data.items():
            yield from _data(value, f"{path}[{key!r}]")
    elif isinstance(data, list | tuple):
        for key, value in enumerate(data):
            yield from _data(value, f"{path}[{key}]")
    elif isinstance(data, torch.Generator):
        yield path, raw(data.get_state())
    elif isinstance(data, DataLoader):
        parts = [getattr(data.sampler, "generator", None), getattr(data.dataset, "tensors", None)]
        yield from _data([data.generator, *parts], path)


def snapshot(module: nn.Module, *data: Any) -> dict[str, Any]:
    """Everything that a caller may find changed: module, process, and data (tensors, generators, loaders)."""
    return dict(_module(module)) | dict(_globals()) | dict(_data(data))


@contextmanager
def unchanged(module: nn.Module, *data: Any) -> Iterator[None]:
    """Fail, naming every difference, if the body (also one that raises) leaves a trace."""
    before = snapshot(module, *data)
    try:
        yield
    finally:
        after = snapshot(module, *data)
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        assert not changed, f"changed: {', '.join(sorted(changed))}"
