"""Outputs keep the old or the new version, whole, whatever dies, and files of others stay as they are."""

import errno
import os
import uuid
from itertools import count
from pathlib import Path

import pytest

from pipelines.errors import UserError
from pipelines.storage import publish
from pipelines.storage.location import localize, open_store
from pipelines.storage.publish import (
    MARK,
    STAGED,
    claim,
    is_published,
    publish_files,
    publish_folder,
    published,
    read_published,
)
from pipelines.storage.store import LocalStore, Store
from tests.kills import is_killed

OLD = {"config.json": b"old", "weights/a.bin": b"old a", "gone.txt": b"old"}
SHARED = {path: data for path, data in OLD.items() if path != "gone.txt"}
NEW = {"config.json": b"new", "weights/a.bin": b"new a", "weights/b.bin": b"new b"}


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "store/model"))
    store = open_store(f"s3://b{uuid.uuid4().hex[:12]}/some/model", request.getfixturevalue("s3_endpoint"))
    store.ensure_bucket()
    return store


def folder_of(files: dict[str, bytes], path: Path) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def content(store: Store, cache: Path) -> dict[str, bytes]:
    """What a reader finds."""
    try:
        folder = localize(store.url, cache, getattr(store, "endpoint", None))
    except FileNotFoundError:
        return {}
    files = (file for file in folder.rglob("*") if file.is_file() and file.name != MARK)
    return {file.relative_to(folder).as_posix(): file.read_bytes() for file in files}


def at_rest(store: Store) -> dict[str, bytes]:
    """Every file in the folder, at the name that other programs know, but for the mark."""
    assert not [path for path in store.walk() if path.startswith(STAGED)]
    return {path: store.read(path) for path in store.list() if path != MARK}


def test_a_version_replaces_another_whole(store: Store, tmp_path: Path) -> None:
    assert not is_published(store)
    for number, files in enumerate((OLD, NEW, OLD)):
        publish_folder(folder_of(files, tmp_path / str(number)), store)
        assert is_published(store)
        assert content(store, tmp_path / "cache") == files
        assert at_rest(store) == files
    if isinstance(store, LocalStore):
        assert [path.name for path in store.root.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("before", [{}, OLD], ids=["nothing", "an old version"])
def test_killed_anywhere_leaves_the_old_or_the_new_version(
    store: Store, tmp_path: Path, before: dict[str, bytes]
) -> None:
    new = folder_of(NEW, tmp_path / "new")
    seen = []
    for number in count():
        place = store.child(str(number))
        if before:
            publish_folder(folder_of(before, tmp_path / "old"), place)
        killed = is_killed(lambda place=place: publish_folder(new, place), place, number)
        found = content(place, tmp_path / "cache") if is_published(place) else {}
        assert found in (before, NEW), number
        seen.append(found == NEW)
        publish_folder(new, place)  # the same command again
        assert at_rest(place) == NEW, number
        if not killed:
            break
    assert len(seen) > 10
    assert seen == sorted(seen), "the old version came back"
    assert not seen[0]


@pytest.mark.parametrize("number_of_error", [errno.EBUSY, errno.EACCES])
def test_a_folder_that_cannot_be_exchanged_is_replaced_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number_of_error: int
) -> None:
    """Such as the root of a mounted disk, or one below a folder of somebody else."""
    store = open_store(str(tmp_path / "disk"))
    old, new = folder_of(OLD, tmp_path / "old"), folder_of(NEW, tmp_path / "new")

    def refuse(*_: object) -> None:
        raise OSError(number_of_error, os.strerror(number_of_error))

    monkeypatch.setattr(publish, "_exchange_folder", refuse)
    publish_folder(old, store)
    for number in count():
        killed = is_killed(lambda: publish_folder(new, store), store, number)
        present = published(store)
        assert {path: present.read(path) for path in NEW if present.exists(path)} in (SHARED, NEW), number
        publish_folder(old, store)
        assert at_rest(store) == OLD, number
        if not killed:
            break
    assert number > 10


def test_a_disk_that_knows_no_exchange_has_the_new_version_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "_RENAME_EXCHANGE", 1 << 20)  # EINVAL, as from an old file system
    store = open_store(str(tmp_path / "out"))
    for number, files in enumerate((OLD, NEW)):
        publish_folder(folder_of(files, tmp_path / str(number)), store)
    assert at_rest(store) == NEW


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("other", ["thesis.docx", "sub/.git/HEAD", "gone.txt.bak"])
def test_files_of_others_are_refused_by_name_and_stay(
    store: Store, tmp_path: Path, other: str, *, marked: bool
) -> None:
    old = folder_of(OLD, tmp_path / "old")
    if marked:
        publish_folder(old, store)
    store.write(other, b"mine")
    before = at_rest(store)
    with pytest.raises(UserError, match=rf"holds files that rzen did not write: {other}; name a new or empty folder"):
        publish_folder(folder_of(NEW, tmp_path / "new"), store)
    assert at_rest(store) == before


def test_folders_links_and_many_files_of_others_are_refused(tmp_path: Path) -> None:
    new = folder_of(NEW, tmp_path / "new")
    target = tmp_path / "target"
    target.mkdir()
    for name, make in (
        ("empty", lambda path: path.mkdir()),
        ("link", lambda path: path.symlink_to(target)),
        ("dangling", lambda path: path.symlink_to(tmp_path / "absent")),
    ):
        out = tmp_path / f"out-{name}"
        out.mkdir()
        make(out / name)
        with pytest.raises(UserError, match=f"did not write: {name}"):
            publish_folder(new, open_store(str(out)))
        with pytest.raises(UserError, match=f"did not write: {name}"):
            claim(open_store(str(out)), "dataset")
    many = folder_of({f"{number}.txt": b"" for number in range(9)}, tmp_path / "many")
    with pytest.raises(UserError, match=r"\d.txt, \d.txt, \d.txt and more; name a new"):
        publish_folder(new, open_store(str(many)))
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(UserError, match="File exists"):
        publish_folder(new, open_store(str(tmp_path / "file")))
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_a_claimed_folder_takes_no_output_of_another_kind(store: Store, tmp_path: Path) -> None:
    claim(store, "dataset")
    claim(store, "dataset")
    store.write("train/a.tar", b"a")
    claim(store, "dataset")
    with pytest.raises(UserError, match="holds a dataset, not a run; name another folder"):
        claim(store, "run")
    with pytest.raises(UserError, match="holds a dataset, not a model"):
        publish_folder(folder_of(NEW, tmp_path / "new"), store)
    store.write(MARK, b"{")
    with pytest.raises(UserError, match=r"rzen-output.json: is not JSON"):
        claim(store, "dataset")


def test_a_folder_may_be_claimed_around_outputs_of_ours(store: Store, tmp_path: Path) -> None:
    claim(store.child("corpus"), "corpus")
    store.write("corpus/deep/a.jpg", b"a")
    publish_folder(folder_of(NEW, tmp_path / "new"), store.child("runs/one/adapter"))
    claim(store, "ablation")
    store.write("runs/mine.txt", b"mine")
    store.delete(MARK)
    with pytest.raises(UserError, match=r"did not write: runs/mine.txt"):
        claim(store, "ablation")


def test_several_files_change_at_the_same_moment(store: Store) -> None:
    """A reader finds both manifests of one version, wherever the writer dies."""
    names = ("train/manifest.json", "held_out/manifest.json")

    def write(place: Store, version: bytes) -> None:
        publish_files(place, dict.fromkeys(names, version), "dataset")

    for number in count():
        place = store.child(str(number))
        claim(place, "dataset")
        write(place, b"old")
        killed = is_killed(lambda place=place: write(place, b"new"), place, number)
        found = [read_published(place, name) for name in names]
        assert found in ([b"old"] * 2, [b"new"] * 2), number
        write(place, b"newer")
        assert at_rest(place) == dict.fromkeys(names, b"newer"), number
        if not killed:
            break
    assert number > 10


def test_files_that_are_not_named_stay(store: Store) -> None:
    claim(store, "dataset")
    publish_files(store, {"train/manifest.json": b"train"}, "dataset")
    publish_files(store, {"held_out/manifest.json": b"held out"}, "dataset")
    assert at_rest(store) == {"train/manifest.json": b"train", "held_out/manifest.json": b"held out"}
    with pytest.raises(FileNotFoundError):
        read_published(store, "absent")


def test_of_two_writers_one_is_told(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    claim(store, "dataset")
    write = type(store).write

    def write_and_be_overtaken(self: Store, path: str, data: bytes) -> None:
        write(self, path, data)
        monkeypatch.setattr(type(store), "write", write)
        publish_files(self, {"a": b"theirs"}, "dataset")

    monkeypatch.setattr(type(store), "write", write_and_be_overtaken)
    with pytest.raises(UserError, match="is being written by another process"):
        publish_files(store, {"a": b"mine"}, "dataset")
    assert at_rest(store) == {"a": b"theirs"}


def test_outputs_in_folders_below_are_no_part_of_a_version(store: Store, tmp_path: Path) -> None:
    """A model that is exported to the folder of all runs must not replace the runs."""
    old, new = folder_of(OLD, tmp_path / "old"), folder_of(NEW, tmp_path / "new")
    publish_folder(old, store.child("runs/one/adapter"))
    runs = store.child("runs")
    before = {path: runs.read(path) for path in runs.list()}
    with pytest.raises(UserError, match=r"holds files that rzen did not write: one/adapter/"):
        publish_folder(new, runs)
    assert {path: runs.read(path) for path in runs.list()} == before


@pytest.mark.parametrize("name", ["model", "data[1]", "*"])
def test_only_what_a_killed_process_left_of_this_output_is_removed(tmp_path: Path, name: str) -> None:
    unfinished = [tmp_path / f"{STAGED}{number:032x}-{of}" for number, of in enumerate((name, f"my-{name}", "data1"))]
    for folder in unfinished:
        folder.mkdir()
    publish_folder(folder_of(NEW, tmp_path / "new"), open_store(str(tmp_path / name)))
    assert [folder.exists() for folder in unfinished] == [False, True, True]
