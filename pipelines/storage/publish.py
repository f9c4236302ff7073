"""Outputs: folders that are marked as rzen's, hold nothing of others, and are replaced as a whole.

`rzen-output.json` marks a folder. It says what the folder holds and which files make its present version.

A new version is written next to the old one. Then one write makes it visible, and the old version is removed last:

* A folder on a disk changes places with the new one, in one call of the operating system.
* In an object store, and for single files, the new version is in a folder `.rzen-partial-version-*`. A conditional
  write of the mark makes readers use it. Its files are then copied to their names, and the mark points to these.

A process that is killed leaves the old or the new version, whole. The next one finishes or removes what it left.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import Field

from pipelines.errors import UserError
from pipelines.storage.store import PARTIAL, LocalStore, Store, disk_errors, is_partial, sync
from pipelines.stored_json import parse_json

MARK, LEASE = "rzen-output.json", "lease.json"
MODEL = "model"
STAGED = f"{PARTIAL}version-"
_SHOWN = 3  # files of others, in an error
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (  # a mount point, its parent, or a disk that cannot
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EBUSY,
    errno.EXDEV,
    errno.EINVAL,
    errno.ENOSYS,
)


@dataclass(frozen=True, slots=True)
class Mark:
    """The content of `rzen-output.json`."""

    kind: str
    """What the folder holds, such as `model` or `dataset`."""
    files: tuple[str, ...] = ()
    """Files that are replaced as a whole, at their names. Empty before the first version is complete."""
    staged: Annotated[str, Field(pattern=rf"^{re.escape(STAGED)}[0-9a-f]+$")] | None = None
    """Folder of a version that is not at its names yet."""
    staged_files: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    """Files of the old version that the staged one does not have."""
    visible: bool = False
    """Whether readers use the staged version."""

    @property
    def ours(self) -> tuple[str, ...]:
        """Files at their names that may be replaced: a visible version may be half-way there."""
        return (*self.files, *(self.staged_files if self.visible else ()))


def read_mark(store: Store) -> tuple[Mark | None, str | None]:
    """Return the mark of a folder and its tag; None for a folder without one. Raises `UserError` if it is damaged."""
    try:
        data, tag = store.read_tagged(MARK)
    except FileNotFoundError:
        return None, None
    fix = "restore the file, or name a new folder"
    return parse_json(data, f"{store.url}/{MARK}", Mark, fix), tag


def claim(store: Store, kind: str) -> None:
    """Mark a folder as an output of this kind, before the first file is written there.

    Raises `UserError` for a folder that is an output of another kind, or that holds files of others.
    """
    store.ensure_bucket()
    mark, _ = read_mark(store)
    if mark is None:
        _refuse(store, _outside_outputs(store, _others(store, ())))
        if not _write_mark(store, Mark(kind), None):
            mark, _ = read_mark(store)  # another process was faster
    _check_kind(store, mark, kind)


def _check_kind(store: Store, mark: Mark | None, kind: str) -> None:
    if mark is not None and mark.kind != kind:
        raise UserError(store.url, f"holds a {mark.kind}, not a {kind}", "name another folder")


def is_published(store: Store) -> bool:
    """Return whether a whole version is there."""
    mark, _ = read_mark(store)
    return mark is not None and (mark.visible or bool(mark.files))


def published(store: Store) -> Store:
    """Return the folder with the files of the present version: mostly `store` itself."""
    return present_version(store, read_mark(store)[0])


def present_version(store: Store, mark: Mark | None) -> Store:
    """Return the folder with the files of the present version, by the mark of `store`."""
    return store.child(mark.staged) if mark and mark.visible and mark.staged else store


def read_published(store: Store, path: str) -> bytes:
    """Return the bytes of a file in its present version. Raises `FileNotFoundError`."""
    while True:
        mark, tag = read_mark(store)
        staged = mark is not None and mark.visible and path in mark.staged_files
        try:
            return store.read(f"{mark.staged}/{path}" if mark and staged else path)
        except FileNotFoundError:
            if read_mark(store)[1] == tag:
                raise


def check_replaceable(store: Store, kind: str = MODEL) -> tuple[Mark | None, str | None]:
    """Return the mark of a folder that `publish_folder` may write to, and its tag.

    Raises `UserError` for a folder that is an output of another kind, or that holds files of others.
    """
    store.ensure_bucket()
    mark, tag = read_mark(store)
    _check_kind(store, mark, kind)
    _refuse(store, _others(store, mark.ours if mark else ()))
    return mark, tag


def publish_folder(local: Path, store: Store, kind: str = MODEL) -> None:
    """Make a folder the copy of a local one, whole. Raises `UserError` as `check_replaceable` does."""
    mark, tag = check_replaceable(store, kind)
    paths = {file.relative_to(local).as_posix(): file for file in sorted(local.rglob("*")) if file.is_file()}
    files = {path: file for path, file in paths.items() if path not in (MARK, LEASE)}
    if isinstance(store, LocalStore):
        try:
            with disk_errors(store.root):
                return _exchange_folder(files, store.root, Mark(kind, tuple(files)))
        except UserError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in _NO_EXCHANGE):
                raise
    _replace(store, mark or Mark(kind), tag, files, lambda path: path not in files)


def publish_files(store: Store, files: Mapping[str, bytes], kind: str) -> None:
    """Replace several files of a folder at the same moment, for whoever reads with `read_published`.

    A job claims the folder before. Without a mark, the folder gets one and what is there stays.
    """
    mark, tag = read_mark(store)
    _check_kind(store, mark, kind)
    _replace(store, mark or Mark(kind), tag, files, lambda path: False)


def _replace(
    store: Store, mark: Mark, tag: str | None, files: Mapping[str, bytes | Path], is_dropped: Callable[[str], bool]
) -> None:
    mark, tag = _settle(store, mark, tag)
    staged = f"{STAGED}{uuid.uuid4().hex}"
    dropped = tuple(path for path in mark.files if is_dropped(path))
    mark = replace(mark, staged=staged, staged_files=tuple(files), dropped=dropped)
    tag = _swap(store, mark, tag)
    for path, content in files.items():
        if isinstance(content, Path):
            store.upload(content, f"{staged}/{path}")
        else:
            store.write(f"{staged}/{path}", content)
    mark = replace(mark, visible=True)
    _settle(store, mark, _swap(store, mark, tag))


def _settle(store: Store, mark: Mark, tag: str | None) -> tuple[Mark, str | None]:
    """Finish a version that is visible, and remove what killed processes left."""
    if mark.visible:
        for path in mark.staged_files:
            store.copy(f"{mark.staged}/{path}", path)
        for path in mark.dropped:
            store.delete(path)
        kept = [path for path in mark.files if path not in {*mark.dropped, *mark.staged_files}]
        mark = Mark(mark.kind, (*kept, *mark.staged_files))
        tag = _swap(store, mark, tag)
    elif mark.staged:
        mark = Mark(mark.kind, mark.files)
        tag = _swap(store, mark, tag)
    for folder in {path.split("/")[0] for path in store.walk() if path.startswith(STAGED)}:
        store.delete_tree(folder)
    return mark, tag


def _swap(store: Store, mark: Mark, tag: str | None) -> str:
    """Replace the mark, and return its new tag. Raises `UserError` if another process was faster."""
    if not _write_mark(store, mark, tag):
        raise UserError(store.url, "is being written by another process", "wait until it has finished")
    return store.read_tagged(MARK)[1]


def _write_mark(store: Store, mark: Mark, tag: str | None) -> bool:
    content = {"format": "rzen-output", **asdict(mark)}
    return store.write_if(MARK, (json.dumps(content, indent=1) + "\n").encode(), tag)


def _others(store: Store, ours: tuple[str, ...]) -> Iterator[str]:
    """Yield the files that are not ours. Those of outputs in folders below are among them."""
    known = {MARK, LEASE, *ours}
    return (path for path in store.walk() if path not in known and not is_partial(PurePosixPath(path)))


def _outside_outputs(store: Store, paths: Iterator[str]) -> Iterator[str]:
    """Yield the paths that are not in a folder that is marked: a job may write around other outputs."""
    marked: dict[str, bool] = {}

    def is_marked(folder: str) -> bool:
        if folder not in marked:
            above = folder.rpartition("/")[0]
            marked[folder] = (bool(above) and is_marked(above)) or store.exists(f"{folder}/{MARK}")
        return marked[folder]

    for path in paths:
        folder = path.rstrip("/").rpartition("/")[0]
        if not (folder and is_marked(folder)):
            yield path


def _refuse(store: Store, others: Iterator[str]) -> None:
    shown = list(islice(others, _SHOWN + 1))
    if shown:
        more = " and more" if len(shown) > _SHOWN else ""
        problem = f"holds files that rzen did not write: {', '.join(shown[:_SHOWN])}{more}"
        raise UserError(store.url, problem, "name a new or empty folder, or move them away")


def _exchange_folder(files: Mapping[str, Path], target: Path, mark: Mark) -> None:
    """Build the new folder next to `target`, let the two change places, and remove the old one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = re.compile(rf"{re.escape(STAGED)}[0-9a-f]{{32}}-{re.escape(target.name)}")
    for left in target.parent.iterdir():
        if ours.fullmatch(left.name):  # and not one of `my-model`, where this is `model`
            shutil.rmtree(left)
    staged = target.with_name(f"{STAGED}{uuid.uuid4().hex}-{target.name}")
    try:
        staged.mkdir()
        _write_mark(LocalStore(staged), mark, None)
        for path, file in files.items():
            (staged / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, staged / path)
            sync(staged / path)
        sync(staged)
        if target.exists():
            _exchange(staged, target)
        else:
            staged.rename(target)
        sync(target.parent)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _exchange(one: Path, other: Path) -> None:
    """Let two folders change places, atomically. Raises `OSError` where the system or the disk cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    arguments = _AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE
    if not hasattr(libc, "renameat2"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(other))
    if libc.renameat2(*arguments):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(other))
