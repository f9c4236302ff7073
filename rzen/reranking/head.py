"""The direction of a language model's head from no to yes. The bare backbone does not have it."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from pipelines.errors import UserError
from rzen.families import part_of
from rzen.model.checkpoints import weight_files

HEAD = "lm_head.weight"


def answer_direction(folder: Path, backbone: nn.Module, answers: tuple[int, int]) -> Tensor:
    """Return fp32 `[D]`: the row of the head for the first answer, minus that for the second.

    A hidden state's product with it is the difference of the two logits. `folder` holds the checkpoint of `backbone`.
    Tied heads are the token embeddings (2B models). Others are read from the checkpoint (7B models), two rows of it.
    Raises `UserError` for a checkpoint that has neither.
    """
    rows = (_tied(backbone, answers) if is_tied(folder) else _stored(folder, answers)).float()
    return rows[0] - rows[1]


def untied_head(folder: Path) -> Tensor | None:
    """Return the whole head `[vocabulary, D]` of a checkpoint, as it is stored. None where it is tied."""
    return None if is_tied(folder) else _stored(folder, None)


def is_tied(folder: Path) -> bool:
    """Return whether head and embeddings are one. Older checkpoints say so in their `text_config`."""
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("text_config")
    return bool(config.get("tie_word_embeddings") or (isinstance(inner, dict) and inner.get("tie_word_embeddings")))


def _tied(backbone: nn.Module, answers: tuple[int, int]) -> Tensor:
    weight: Tensor = part_of(backbone, "language_model.embed_tokens").weight
    return weight.detach()[list(answers)].cpu()


def _stored(folder: Path, answers: tuple[int, int] | None) -> Tensor:
    """Return the rows of the head for two answers, or all of it."""
    for path in weight_files(folder):
        if path.suffix != ".safetensors":
            raise UserError(str(path), "is not in safetensors", "save the checkpoint again with safe_serialization")
        with safe_open(path, framework="pt") as file:
            if HEAD in file.keys():  # noqa: SIM118  # it is no mapping
                if answers is None:
                    head: Tensor = file.get_tensor(HEAD)
                    return head
                rows = file.get_slice(HEAD)
                return torch.cat([rows[answer : answer + 1] for answer in answers])
    problem = f"has no {HEAD}, and its head is not tied to the embeddings"
    raise UserError(str(folder), problem, "name the checkpoint of the whole model, with its language-model head")
