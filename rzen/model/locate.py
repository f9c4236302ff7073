"""Finding the files of a model on whatever machine asks: a directory, a file:// or s3:// URL, or a hub name."""

from __future__ import annotations

import os
from pathlib import Path

from pipelines.errors import UserError
from pipelines.storage.location import localize
from pipelines.storage.urls import scheme_of
from rzen.model.checkpoints import checkpoint_dir


def cache_dir() -> Path:
    """Where copies of models in object storage are kept: RZEN_CACHE, or the user's cache folder."""
    return Path(os.environ.get("RZEN_CACHE") or Path.home() / ".cache" / "rzen")


def local_folder(url: str, endpoint: str | None = None) -> str:
    """A local directory with the files of `url`; a hub name is left as it is. Raises `UserError` if there are none."""
    if not scheme_of(url):
        path = Path(url).expanduser()
        return str(localize(str(path), cache_dir())) if path.is_dir() else url
    try:
        return str(localize(url, cache_dir(), endpoint))
    except FileNotFoundError as error:
        raise UserError(url, "there is nothing", "check the URL, or run the job that writes it first") from error


def checkpoint_folder(url: str, endpoint: str | None = None) -> str:
    """As `local_folder`; a hub name is downloaded or found in its cache. Raises `UserError` if it is no checkpoint."""
    return str(checkpoint_dir(local_folder(url, endpoint)))
