"""Low-rank adapters (LoRA) as task vectors: factors under the names of the network that they were trained for.

Axis letters: r the rank of an adapter.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fipgeo.io import TensorFile
from fipgeo.lazy import Entry, Factors, gathered
from fipgeo.sources import Named, Source
from fipgeo.task_vectors import TaskVector

_PREFIX = "base_model.model."
_PART = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.[^.]+)?(\.weight)?$")


def load_adapter(
    path: str | os.PathLike[str], base: Source, *, rename: Callable[[str], str] | None = None
) -> TaskVector:
    """A LoRA adapter in the files of PEFT as a task vector of factors: scale * B A, which is not multiplied.

    The scale is alpha / r, or alpha / sqrt(r) with `use_rslora`, and alpha may differ by module (`alpha_pattern`).
    Linear maps, convolutions without groups, embeddings and weights stored transposed (`fan_in_fan_out`) are known;
    tensors that were trained in full (`modules_to_save`, biases) become differences from the base.

    Args:
        path: The folder with `adapter_config.json` and `adapter_model.safetensors`, or the latter.
        base: The network, a state dict or a safetensors file; it says names and shapes.
        rename: Name of a tensor as the adapter has it, such as "encoder.0.weight" -> its name in the base.

    Returns:
        The vector, over the tensors that the adapter changes.

    Raises:
        FileNotFoundError: One of the two files is missing.
        ValueError: Something does not fit the base, or is no part of LoRA; every mismatch is listed.

    Source: Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022; Kalajdzievski, A Rank
    Stabilization Scaling Factor for Fine-Tuning with LoRA, 2023, for `use_rslora`.

    Examples:
        >>> import tempfile
        >>> from safetensors.torch import save_file
        >>> folder = Path((held := tempfile.TemporaryDirectory()).name)
        >>> parts = {"lora_A": torch.ones(1, 3), "lora_B": torch.ones(2, 1)}
        >>> parts = {f"base_model.model.0.{part}.weight": tensor for part, tensor in parts.items()}
        >>> save_file(parts, folder / "adapter_model.safetensors")
        >>> _ = (folder / "adapter_config.json").write_text('{"lora_alpha": 2}')
        >>> load_adapter(folder, torch.nn.Sequential(torch.nn.Linear(3, 2))).tensors["0.weight"].tolist()
        [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
        >>> held.cleanup()
    """
    file = Path(path) / "adapter_model.safetensors" if Path(path).is_dir() else Path(path)
    tensors, named = TensorFile(file), Named.of(base, argument="base")
    config: dict[str, Any] = json.loads((file.parent / "adapter_config.json").read_text())
    problems: list[str] = []
    if config.get("use_dora"):
        problems.append("it is a DoRA adapter, which rescales the base's weights and is no difference of low rank")
    if "lora_alpha" not in config:
        problems.append("adapter_config.json has no lora_alpha; is it a LoRA adapter?")
    pairs, whole = _sorted(tensors)
    entries: dict[str, Entry] = {}
    for module, sides in pairs.items():
        found = _found(named, f"{module}.weight", rename, problems)
        lacks = [side for side in "AB" if side not in sides]
        if lacks:
            problems.append(f"{module} has no lora_{lacks[0]}")
        elif found is not None:
            left, right = tensors[sides["B"]], tensors[sides["A"]]
            turned = bool(config.get("fan_in_fan_out")) != ("embedding" in sides["A"].rpartition(".lora_")[2])
            try:
                factors = _factors(left, right, turned, named.shapes[found])
                entries[found] = factors.scaled(_scale(config, module, factors.rank))
            except ValueError as error:
                problems.append(f"{module}: {error}")
    for name, stored in whole.items():
        found = _found(named, name, rename, problems)
        if found is not None and named.shapes[found] != tensors.shapes[stored]:
            problems.append(f"{name} is {list(tensors.shapes[stored])}, the base's is {list(named.shapes[found])}")
        elif found is not None:
            start = named.values[found]
            wide = torch.promote_types(start.dtype, torch.float32)
            entries[found] = tensors[stored].to(start.device, wide) - start.to(wide)
    if problems:
        raise ValueError(f"{str(file)!r} does not fit the base: " + "; ".join(problems))
    return TaskVector(gathered(entries))


def _sorted(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, str]], dict[str, str]]:
    """Stored names of the factors by module and side, and of the tensors that are whole, by name."""
    pairs: dict[str, dict[str, str]] = {}
    whole: dict[str, str] = {}
    for stored in tensors:
        name = stored.removeprefix(_PREFIX)
        part = _PART.match(name)
        if part is None:
            whole[re.sub(r"\.(modules_to_save(\.[^.]+)?|base_layer)(?=\.)", "", name)] = stored
        else:
            pairs.setdefault(part["path"], {})[part["side"]] = stored
    return pairs, whole


def _found(named: Named, name: str, rename: Callable[[str], str] | None, problems: list[str]) -> str | None:
    """The base's name of a parameter; None, with a problem noted, if there is none."""
    wanted = name if rename is None else rename(name)
    found = named.find(wanted)
    if found is None or found in named.buffers or found in named.integers:
        problems.append(f"the base has no parameter {wanted}" + ("" if rename else " (say what it is called: rename=)"))
        return None
    return found


def _factors(left: Tensor, right: Tensor, turned: bool, shape: torch.Size) -> Factors:
    """B `[m, r]` and A `[r, ...]` as factors of a tensor of the base's shape."""
    one, two = left.flatten(1), right.flatten(1)
    if turned:
        one, two = two.mT, one.mT
    flat = torch.Size([shape[0], shape[1:].numel()]) if shape else shape
    if list(flat) != [one.shape[0], two.shape[1]] or one.shape[1] != two.shape[0]:
        raise ValueError(
            f"lora_B {list(left.shape)} and lora_A {list(right.shape)} do not make the base's {list(shape)}"
        )
    return Factors(one.contiguous(), two.contiguous(), shape)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Alpha / r, with the alpha of the first pattern that ends the module's name."""
    alpha = config.get("lora_alpha", rank)
    for pattern, other in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
