"""Finding the files of a model on whatever machine asks: a directory, a file:// or s3:// URL, or a hub name."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

from pipelines.errors import UserError
from pipelines.storage.location import localize, read_present
from pipelines.storage.urls import is_local, local_path, scheme_of
from rzen.config import ModelIdentity
from rzen.families import read_family
from rzen.model.checkpoints import (
    ADAPTER_CONFIG,
    HUB_NAME,
    IDENTITY,
    MODEL_CONFIG,
    checkpoint_dir,
    read_identity,
    weight_files,
)

_HUB_TIMEOUT_S = 5.0


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


@contextmanager
def config_folder(url: str, endpoint: str | None = None) -> Iterator[Path]:
    """Yield a folder with the `config.json` of a checkpoint, and its `rzen.json` where it has one.

    It is the folder itself if it is local. No weights are read. Raises `UserError` for what is no checkpoint of a
    supported family, within seconds: a folder without weights, a file, a name that the hub does not know.
    """
    if is_local(url) and (path := local_path(url)).exists():
        yield _local_checkpoint(path)
        return
    with tempfile.TemporaryDirectory(prefix="rzen-config-") as scratch:
        if scheme_of(url):
            _fetch_configs(url, endpoint, Path(scratch))
        elif HUB_NAME.fullmatch(url):
            _download_configs(url, Path(scratch))
        else:
            raise UserError(url, "is neither a directory nor a hub name", "name an existing checkpoint directory")
        try:
            read_family(Path(scratch))
            yield Path(scratch)
        except UserError as error:
            raise UserError(error.place.replace(scratch, url.rstrip("/")), error.problem, error.fix) from error


def check_checkpoint(url: str, endpoint: str | None = None, *, makes_vectors: bool = False) -> None:
    """Raise `UserError` unless there is a checkpoint of a supported family. No weights are read.

    With `makes_vectors`, a re-ranker is refused, too.
    """
    with config_folder(url, endpoint) as folder:
        if makes_vectors:
            read_identity(folder, ModelIdentity())


def check_adapter(url: str, endpoint: str | None = None) -> None:
    """Raise `UserError` unless there is a LoRA adapter. Of one in a bucket, only its configuration is read."""
    if is_local(url):
        path = local_path(url).absolute()
        _refuse_missing(path, "name the directory of an adapter, or run the job that writes it first")
        folder = localize(str(path), cache_dir())
        if not (folder / ADAPTER_CONFIG).is_file():
            raise UserError(url, f"has no {ADAPTER_CONFIG}", "name the directory of an adapter")
        weight_files(folder)
        return
    try:
        read_present(url, ADAPTER_CONFIG, endpoint)
    except FileNotFoundError as error:
        raise UserError(
            url, f"has no {ADAPTER_CONFIG}", "check the URL, or run the job that writes it first"
        ) from error


def _local_checkpoint(path: Path) -> Path:
    _refuse_missing(path, "name the directory of a checkpoint")
    folder = localize(str(path.absolute()), cache_dir())
    if (folder / ADAPTER_CONFIG).is_file() and not (folder / MODEL_CONFIG).is_file():
        raise UserError(str(path), "is an adapter", "name it as the adapter, and its base as the model")
    weight_files(checkpoint_dir(str(folder)))
    return folder


def _refuse_missing(path: Path, fix: str) -> None:
    if not path.is_dir():
        raise UserError(str(path), "is a file" if path.exists() else "does not exist", fix)


def _fetch_configs(url: str, endpoint: str | None, folder: Path) -> None:
    for name in (MODEL_CONFIG, IDENTITY):
        try:
            (folder / name).write_bytes(read_present(url, name, endpoint))
        except FileNotFoundError as error:
            if name == MODEL_CONFIG:
                fix = "check the URL, or run the job that writes it first"
                raise UserError(url, f"has no {MODEL_CONFIG}", fix) from error


def _download_configs(name: str, folder: Path) -> None:
    """Put the small files of a checkpoint on the hub, or in its cache, into a folder."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging

    if not isinstance(cached := try_to_load_from_cache(name, MODEL_CONFIG), str):
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of every attempt
        try:
            # Downloads of a hub that cannot be reached are tried for 20 s. This asks once.
            HfApi().model_info(name, timeout=_HUB_TIMEOUT_S)
            cached = hf_hub_download(name, MODEL_CONFIG)
        except _hub_errors() as error:
            fix = "check the name and the connection, or name a directory"
            raise UserError(name, "is no directory, and the hub does not give it", fix) from error
    (folder / MODEL_CONFIG).write_bytes(Path(cached).read_bytes())
    if (said := Path(cached).with_name(IDENTITY)).is_file():
        (folder / IDENTITY).write_bytes(said.read_bytes())


def _hub_errors() -> tuple[type[Exception], ...]:
    """Return what huggingface_hub raises: errors of its HTTP library, `OSError` and `ValueError`."""
    from huggingface_hub.errors import HfHubHTTPError

    return (*cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__), ValueError)
