"""A bad object store: every verb and every write survives every fault, and large files arrive whole."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from tests.faults.s3_proxy import BODYLESS, FAULTS, Fault, StormyProxy


@pytest.fixture
def stormy(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, StormyProxy]]:
    """A store that is reached through a proxy, without faults so far, and without patience between attempts."""
    url = f"s3://b{uuid.uuid4().hex[:12]}"
    open_store(url, s3_endpoint).ensure_bucket()
    monkeypatch.setattr("pipelines.storage.faults._PAUSES_S", (0.01,))
    with StormyProxy(s3_endpoint, delay_s=0.1) as proxy:
        yield open_store(url, proxy.url), proxy


@pytest.mark.parametrize("fault", FAULTS)
def test_every_verb_survives_every_fault(fault: Fault, stormy: tuple[Store, StormyProxy], tmp_path: Path) -> None:
    store, proxy = stormy
    data = os.urandom(100_003)
    store.write("a/x", data)
    store.write("a/y", b"")

    def downloaded() -> bytes:
        store.download("a/x", tmp_path / "copy")
        return (tmp_path / "copy").read_bytes()

    verbs: list[tuple[Callable[[], object], object]] = [
        (lambda: store.read("a/x"), data),
        (lambda: store.read_range("a/x", 11, 90_001), data[11:90_012]),
        (downloaded, data),
        (lambda: store.list("a"), ["a/x", "a/y"]),
        (lambda: len(store.tags()), 2),
        (lambda: store.exists("a/x"), True),
    ]
    for verb, wanted in verbs:
        # Every other kind is bad enough for another attempt, and one attempt sends a request twice.
        num_faults = 1 if fault in ("delay", "trickle") else 3
        proxy.faults = [fault] * num_faults
        assert verb() == wanted
        assert proxy.faults == []


@pytest.mark.parametrize("fault", BODYLESS)
def test_every_write_survives_every_fault(fault: Fault, stormy: tuple[Store, StormyProxy], tmp_path: Path) -> None:
    """Also where the store has done what was asked, and only its answer was lost."""
    store, proxy = stormy
    proxy.commands = ("PUT", "POST", "DELETE")
    large, small = os.urandom(20_000_003), os.urandom(1003)  # the large one goes in parts
    (tmp_path / "large").write_bytes(large)
    verbs: list[tuple[Callable[[], object], dict[str, bytes]]] = [
        (lambda: store.write("a/x", small), {"a/x": small}),
        (lambda: store.write_if("a/y", b"mine", None), {"a/x": small, "a/y": b"mine"}),
        (lambda: store.write_if("a/y", b"yours", None), {"a/x": small, "a/y": b"mine"}),
        (lambda: store.upload(tmp_path / "large", "b/large"), {"a/x": small, "a/y": b"mine", "b/large": large}),
        (lambda: store.delete("a/x"), {"a/y": b"mine", "b/large": large}),
        (lambda: store.delete_tree(""), {}),
    ]
    answers = []
    for verb, wanted in verbs:
        proxy.faults = [fault] * (1 if fault == "delay" else 3)
        answers.append(verb())
        assert proxy.faults == []
        assert {path: store.read(path) for path in store.list()} == wanted
    assert answers[1:3] == [True, False]


def test_a_large_upload_in_a_storm_is_whole(stormy: tuple[Store, StormyProxy], tmp_path: Path) -> None:
    store, proxy = stormy
    proxy.commands = ("PUT", "POST")
    data = os.urandom(17_000_003)  # three parts
    (tmp_path / "large").write_bytes(data)
    for number in range(6):  # of the requests of an upload: first, part or last
        proxy.faults = [*[None] * number, "lost", "lost"]
        store.upload(tmp_path / "large", f"large{number}")
        assert store.read(f"large{number}") == data


def test_a_large_download_in_a_storm_is_whole(stormy: tuple[Store, StormyProxy], tmp_path: Path) -> None:
    store, proxy = stormy
    data = os.urandom(41_000_003)  # six parts
    store.write("large", data)
    proxy.faults = [*FAULTS, *FAULTS]  # the HEAD takes some of the first round
    store.download("large", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    assert proxy.faults == []
    assert all(proxy.counts[kind] for kind in FAULTS), proxy.counts
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]
