"""Checkpoint directories: where they are, what family and weights they hold, how they are to be read.

Imports neither torch nor transformers, because the workers that encode media need the tokenizer's files only.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import snapshot_download

from pipelines.errors import UserError
from rzen.config import ModelIdentity
from rzen.families import read_family

IDENTITY = "rzen.json"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
CHECKPOINT_FILES = ["*.json", "*.safetensors", "*.txt", "*.jinja"]


def checkpoint_dir(path_or_hub: str) -> Path:
    """Return the directory of a checkpoint. A hub name (`Qwen/Qwen2-VL-2B-Instruct`) is downloaded, if not cached.

    Raises `UserError` for anything that is not a checkpoint of a supported type.
    """
    folder = Path(path_or_hub)
    if not folder.is_dir():
        folder = _download(path_or_hub)
    read_family(folder)
    return folder


def read_identity(folder: Path, default: ModelIdentity) -> ModelIdentity:
    """Return how a model or adapter is to be read, as it says itself; `default` where it says nothing.

    One that names a prompt and no readout is read by the defaults of `ReadoutConfig`.
    """
    path = folder / IDENTITY
    saved = json.loads(path.read_text()) if path.is_file() else {}
    if not saved.get("prompt"):
        return default
    return ModelIdentity.model_validate({name: saved[name] for name in ModelIdentity.model_fields if name in saved})


def checkpoint_sha256(folder: Path) -> str:
    """Return the identity of the weights: the hash of all safetensors files, in order. Reads them all."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(bytes.fromhex(file_sha256(path)))
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def atomic_directory(folder: Path) -> Iterator[Path]:
    """Give a folder to fill. It becomes `folder` when the block ends, and is deleted if the block raises."""
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(name: str) -> Path:
    if not HUB_NAME.fullmatch(name):
        raise UserError(name, "is neither a directory nor a hub name", "name an existing checkpoint directory")
    try:
        return Path(snapshot_download(name, allow_patterns=CHECKPOINT_FILES))
    except (OSError, ValueError) as error:
        raise UserError(name, f"is no directory and cannot be downloaded ({error})", "check the name") from error
