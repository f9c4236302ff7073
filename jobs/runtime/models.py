"""Finding the files of a model on whatever machine asks: a directory, an s3:// URL or a hub name."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jobs.spec.model import ModelRef
from pipelines.errors import UserError
from pipelines.storage.location import localize
from rzen.config import ModelIdentity

if TYPE_CHECKING:
    from rzen.model.embedder import Embedder

Dtype = Literal["float32", "bfloat16"]


def cache_dir() -> Path:
    """Where copies of models in object storage are kept: RZEN_CACHE, or the user's cache folder."""
    return Path(os.environ.get("RZEN_CACHE") or Path.home() / ".cache" / "rzen")


def local_folder(url: str, endpoint: str | None) -> str:
    """A local directory with the files of `url`; a hub name is left as it is. Raises `UserError` if there are none."""
    if "://" not in url:
        return str(localize(url, cache_dir())) if Path(url).is_dir() else url
    try:
        return str(localize(url, cache_dir(), endpoint))
    except FileNotFoundError as error:
        raise UserError(url, "there is nothing", "check the URL, or run the job that writes it first") from error


def checkpoint_folder(url: str, endpoint: str | None) -> str:
    """As `local_folder`; a hub name is downloaded or found in its cache. Raises `UserError` if it is no checkpoint."""
    from rzen.model.checkpoints import checkpoint_dir

    return str(checkpoint_dir(local_folder(url, endpoint)))


def load_embedder(
    ref: ModelRef, endpoint: str | None, default: ModelIdentity, dtype: Dtype | None, chunk_tokens: int | None = None
) -> Embedder:
    """The embedder of a checkpoint with or without adapter, on the GPU where there is one.

    `default` holds for models that do not say how they are read; `dtype` is that of an export where it is `None`.
    """
    from rzen.model.embedder import CHUNK_TOKENS, load

    base = checkpoint_folder(ref.base, endpoint)
    adapter = local_folder(ref.adapter, endpoint) if ref.adapter else None
    return load(base, adapter, dtype=dtype, identity=default, chunk_tokens=chunk_tokens or CHUNK_TOKENS)
