"""Open a local folder, a file:// or an s3:// URL as a `Store`, and other object stores to read from."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from pathlib import Path

from pipelines.errors import BadMedia, UserError
from pipelines.storage.publish import LEASE, MARK, present_version, published, read_mark, read_published
from pipelines.storage.store import PARTIAL, LocalStore, Store, disk_errors
from pipelines.storage.urls import READ_ONLY_SCHEMES, STORE_SCHEMES, is_local, local_path, scheme_of


def open_store(url: str, endpoint: str | None = None) -> Store:
    """Open a local path, a file:// or s3:// URL, or one of `READ_ONLY_SCHEMES`. Nothing is contacted or created.

    `endpoint` names an object store that is not AWS. `resolve_endpoint` is applied to it, and the result is pickled
    with the store. Credentials are not: each machine uses its own.
    """
    if is_local(url):
        return LocalStore(local_path(url).absolute())
    scheme = scheme_of(url)
    if scheme in READ_ONLY_SCHEMES:
        from pipelines.storage.read_only import open_read_only  # pyarrow is loaded only where it is used

        return open_read_only(url)
    if scheme != "s3":
        known = ", ".join(f"{name}://" for name in ("file", *STORE_SCHEMES))
        raise UserError(url, f"unknown scheme {scheme}://", f"use a local path, {known}")
    from pipelines.storage.s3 import open_s3  # boto3 is loaded only where it is used

    return open_s3(url, resolve_endpoint(endpoint))


def open_object(url: str, endpoint: str | None = None) -> tuple[Store, str]:
    """Return the store that holds one object, and its path there. Keys of S3 are taken as they are."""
    if scheme_of(url) == "s3":
        from pipelines.storage.s3 import S3Bucket

        bucket, _, key = url.removeprefix("s3://").partition("/")
        return S3Bucket(bucket, "", resolve_endpoint(endpoint)), key
    if is_local(url):
        path = local_path(url).absolute()
        return LocalStore(path.parent), path.name
    folder, _, name = url.rpartition("/")
    return open_store(folder, endpoint), name


def read_object(url: str, max_bytes: int, endpoint: str | None = None) -> bytes:
    """Return an object of a store. Raises `BadMedia`: missing_file, too_many_bytes."""
    store, path = open_object(url, endpoint)
    try:
        num_bytes = store.size(path)
        if num_bytes > max_bytes:
            raise BadMedia("too_many_bytes", f"{num_bytes} bytes, at most {max_bytes}")
        return store.read_range(path, 0, num_bytes)
    except FileNotFoundError as error:
        raise BadMedia("missing_file") from error


def read_present(url: str, path: str, endpoint: str | None = None) -> bytes:
    """Return the bytes of a file below a path or URL, in the present version of that output.

    Raises `FileNotFoundError`.
    """
    return read_published(open_store(url, endpoint), path)


def exists(url: str, endpoint: str | None = None) -> bool:
    """Return whether a file, or a folder with files, is at a path or URL."""
    parent, _, name = url.rpartition("/")
    return bool(open_store(url, endpoint).list()) or open_store(parent or ".", endpoint).exists(name)


def resolve_endpoint(endpoint: str | None) -> str | None:
    """Return the argument, or AWS_ENDPOINT_URL_S3, or AWS_ENDPOINT_URL.

    Drivers call this, because workers may not have the variables.
    """
    return endpoint or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def localize(url: str, cache_dir: Path, endpoint: str | None = None) -> Path:
    """Return a local folder with the content of `url`: a local path itself, or an s3:// tree that is downloaded once.

    Of an output that is being replaced it is the present version, whole. Downloads are named by the content listed at
    the URL and appear in `cache_dir` only when complete. The processes of a machine share them: one downloads, the
    others wait. Raises `FileNotFoundError` if there is nothing.
    """
    store = open_store(url, endpoint)
    if isinstance(store, LocalStore):
        return Path(published(store).url)
    while True:
        mark, version = read_mark(store)
        try:
            folder = _downloaded(present_version(store, mark), cache_dir)
        except FileNotFoundError:
            if read_mark(store)[1] == version:
                raise
        else:
            if read_mark(store)[1] == version:  # else it may be a mixture of two versions
                return folder


def _downloaded(store: Store, cache_dir: Path) -> Path:
    tags = {path: tag for path, tag in store.tags().items() if path not in (MARK, LEASE)}
    target = cache_dir / hashlib.sha256(repr((store, tags)).encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    with disk_errors(cache_dir):
        cache_dir.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_dir():
                with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=cache_dir) as partial:
                    if not tags:
                        raise FileNotFoundError(store.url)
                    for path in tags:
                        store.download(path, Path(partial, "tree", path))
                    Path(partial, "tree").rename(target)
    return target
