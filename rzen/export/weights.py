"""Weights of an export, under the names of the hub, with the tokenizer and preprocessor of the base."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel

from pipelines.imports import NOT_FOR_SAVING, without_modules
from rzen.config import Dtype
from rzen.model.loading import LOADING

COMPANIONS = (
    "*.txt",
    "*.jinja",
    "tokenizer*.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "*preprocessor_config.json",
)


def write_backbone(model: PreTrainedModel, base: Path, folder: Path, dtype: Dtype, head: Tensor | None = None) -> None:
    """Write the weights under the names and the architecture that checkpoints of the family have on the hub.

    AutoModel finds its own names in them. vLLM and transformers 4 know no others. Without a `head`, it is tied to the
    embeddings, so that a library that makes one misses nothing.
    """
    config = type(model.config).from_dict(model.config.to_dict() | {"tie_word_embeddings": head is None})
    with LOADING:
        with torch.device("meta"):
            whole = AutoModelForImageTextToText.from_config(config)
        whole.model = model.to(getattr(torch, dtype))
        if head is not None:
            whole.lm_head.weight = torch.nn.Parameter(head.to(getattr(torch, dtype)), requires_grad=False)
        whole.tie_weights()
    with without_modules(*NOT_FOR_SAVING):
        whole.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)  # it generates nothing
    for pattern in COMPANIONS:
        for path in base.glob(pattern):
            shutil.copyfile(path, folder / path.name)
