"""Checkpoint directories: where they are, whether they are ours, which weights they hold.

Imports neither torch nor transformers, because the workers that encode media need the tokenizer's files alone.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from huggingface_hub import snapshot_download

from pipelines.errors import UserError

# `model_type` of the checkpoints whose prompts, patches and positions are tested, and what people call them.
MODEL_TYPES = {"qwen2_vl": "Qwen2-VL"}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def checkpoint_dir(path_or_hub: str) -> Path:
    """The directory of a checkpoint; a hub name (`Qwen/Qwen2-VL-2B-Instruct`) is downloaded or found in the cache.

    Raises `UserError` for anything that is not a checkpoint of a supported type.
    """
    folder = Path(path_or_hub)
    if not folder.is_dir():
        folder = _download(path_or_hub)
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(path_or_hub, "has no config.json", "name the directory of a transformers checkpoint")
    model_type = json.loads(config.read_text()).get("model_type")
    if model_type not in MODEL_TYPES:
        raise UserError(path_or_hub, f"model_type {model_type!r} is not supported", f"use one of {sorted(MODEL_TYPES)}")
    return folder


def checkpoint_sha256(folder: Path) -> str:
    """Identity of the weights: the hash of all safetensors files in the order of their names. Reads them all."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise UserError(name, "is neither a directory nor a hub name", "name an existing checkpoint directory")
    try:
        return Path(snapshot_download(name, allow_patterns=CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        raise UserError(name, f"is no directory and cannot be downloaded ({error})", "check the name") from error
