"""The same promises for both stores, then the faults of each."""

import errno
import fcntl
import os
import pickle
import re
import resource
import socket
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    FlexibleChecksumError,
    IncompleteReadError,
    NoCredentialsError,
    ReadTimeoutError,
)

from jobs.runtime.local_s3 import free_port
from pipelines.errors import UserError
from pipelines.storage.ahead import read_ahead
from pipelines.storage.faults import PATIENCE, Attempts, brief_patience, note_answer, remedy_of
from pipelines.storage.location import localize, open_store
from pipelines.storage.ranged import open_binary
from pipelines.storage.store import LocalStore, Store
from tests.faults.s3_proxy import Fault, StormyProxy


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "data"))
    store = open_store(f"s3://b{uuid.uuid4().hex[:12]}/some/folder", request.getfixturevalue("s3_endpoint"))
    store.ensure_bucket()
    return store


@pytest.fixture
def bucket_url(s3_endpoint: str) -> str:
    url = f"s3://b{uuid.uuid4().hex[:12]}"
    open_store(url, s3_endpoint).ensure_bucket()
    return url


@pytest.fixture
def proxy(s3_endpoint: str) -> Iterator[StormyProxy]:
    with StormyProxy(s3_endpoint) as proxy:
        yield proxy


def test_what_is_written_is_read(store: Store) -> None:
    store.write("a/b.bin", b"0123456789")
    store.write("a/b.bin", b"9876543210")
    assert store.read("a/b.bin") == b"9876543210"
    assert store.read_range("a/b.bin", 3, 4) == b"6543"
    assert store.read_range("a/b.bin", 3, 0) == b""
    assert store.child("a").read("b.bin") == b"9876543210"
    assert open_store(store.url, getattr(store, "endpoint", None)) == store


def test_list_holds_whole_folders_only_and_is_sorted(store: Store) -> None:
    for path in ("run/b", "run/a/c", "run1/x", "run", "z"):
        if path != "run" or not isinstance(store, LocalStore):  # a disk cannot have a file and a folder of one name
            store.write(path, b"")
    assert store.list("run") == store.list("run/") == ["run/a/c", "run/b"]
    assert store.child("run").list() == ["a/c", "b"]
    assert [path for path in store.list() if path != "run"] == ["run/a/c", "run/b", "run1/x", "z"]
    assert store.list("absent") == []


def test_delete_removes_one_and_delete_tree_a_folder(store: Store) -> None:
    for path in ("a/1", "a/2/3", "ab", "c"):
        store.write(path, b"x")
    store.delete("c")
    store.delete("c")
    store.delete_tree("a")
    store.delete_tree("a")
    assert store.list() == ["ab"]
    assert store.exists("ab")
    assert not store.exists("c")
    assert not store.exists("a")


def test_tags_change_with_the_content(store: Store) -> None:
    store.write("same", b"1")
    store.write("other", b"1")
    before = store.tags()
    store.write("other", b"22")
    assert store.tags()["same"] == before["same"]
    assert store.tags()["other"] != before["other"]


def test_missing_objects_are_file_not_found(store: Store, tmp_path: Path) -> None:
    for attempt in (
        lambda: store.read("absent"),
        lambda: store.read_range("absent", 0, 1),
        lambda: store.download("absent", tmp_path / "copy"),
        lambda: store.download_tree("absent", tmp_path / "copies"),
    ):
        with pytest.raises(FileNotFoundError):
            attempt()
    assert not (tmp_path / "copy").exists()


def test_an_object_is_a_file_that_can_be_read_from_any_position(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    content = bytes(range(256)) * 10
    store.write("a/file.bin", content)
    assert store.tag("a/file.bin") == store.tags()["a/file.bin"]
    if endpoint := getattr(store, "endpoint", None):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with open_binary(f"{store.url}/a/file.bin") as file:
        assert file.read(3) == content[:3]
        assert file.seek(-10, 2) == len(content) - 10
        assert file.read() == content[-10:]
        assert file.read() == b""
        assert file.seek(100) == 100
        assert file.read(50) == content[100:150]
    with pytest.raises(FileNotFoundError):
        open_binary(f"{store.url}/a/gone.bin")


def test_an_object_that_is_replaced_between_two_reads_is_an_error(bucket_url: str, s3_endpoint: str) -> None:
    store = open_store(bucket_url, s3_endpoint)
    store.write("t.bin", b"one")
    file = open_binary(f"{bucket_url}/t.bin", s3_endpoint, buffered=False)
    assert file.read(1) == b"o"
    store.write("t.bin", b"two")
    with pytest.raises(UserError, match=r"t\.bin: was replaced while it was read"):
        file.read(1)


def test_a_range_past_the_end_is_reported(store: Store) -> None:
    store.write("short", b"abc")
    with pytest.raises(UserError, match="ends early"):
        store.read_range("short", 1, 3)
    with pytest.raises(UserError, match="ends early"):
        store.read_range("short", 10, 2)


def test_paths_cannot_leave_the_store(store: Store) -> None:
    for path in ("../x", "a/../../x", "/etc/passwd"):
        with pytest.raises(UserError, match="leaves its store"):
            store.read(path)


def test_one_of_many_writers_creates(store: Store) -> None:
    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(lambda n: store.write_if("lease", str(n).encode(), None), range(12)))
    assert results.count(True) == 1
    assert store.read("lease") == str(results.index(True)).encode()
    assert store.list() == ["lease"]


def test_none_of_many_writers_overwrites_another(store: Store) -> None:
    """Eight writers add five to a number each, reading again whenever another was first."""
    store.write_if("sum", b"0 -", None)

    def add_five(writer: int) -> None:
        for turn in range(5):
            written = False
            while not written:
                data, tag = store.read_tagged("sum")
                written = store.write_if("sum", f"{int(data.split()[0]) + 1} {writer}/{turn}".encode(), tag)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add_five, range(8)))
    assert store.read("sum").split()[0] == b"40"
    _, tag = store.read_tagged("sum")
    store.delete("sum")
    assert not store.write_if("sum", b"gone by now", tag)


def test_folders_without_locks_of_their_own_have_a_file_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, where a lock needs a file that is open for writing."""
    flock = fcntl.flock

    def of_files_only(descriptor: int, operation: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_files_only)
    test_none_of_many_writers_overwrites_another(open_store(str(tmp_path)))


def test_trees_travel_whole(store: Store, tmp_path: Path) -> None:
    for name, size in (("m.bin", 9_000_001), ("sub/n.txt", 0)):  # the first takes two parts
        (tmp_path / "from" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "from" / name).write_bytes(os.urandom(size))
    store.upload_tree(tmp_path / "from", "tree")
    assert store.list() == ["tree/m.bin", "tree/sub/n.txt"]
    store.download_tree("tree", tmp_path / "to")
    assert (tmp_path / "to/m.bin").read_bytes() == (tmp_path / "from/m.bin").read_bytes()
    assert (tmp_path / "to/sub/n.txt").read_bytes() == b""


def test_pickled_stores_work_in_another_process(store: Store) -> None:
    store.write("x", b"from here")
    code = "import pickle, sys; store = pickle.load(sys.stdin.buffer); sys.stdout.buffer.write(store.read('x'))"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_ENDPOINT")}
    done = subprocess.run(
        [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True, env=environment
    )
    assert done.stdout == b"from here"


def test_arrow_reads_the_same_folder(store: Store) -> None:
    store.write("t/x.bin", b"0123456789")
    filesystem, path = store.arrow_filesystem()
    with filesystem.open_input_file(f"{path}/t/x.bin") as file:
        assert file.read_at(3, 5) == b"567"


def test_urls_are_checked() -> None:
    assert open_store("file:///a%20b/c") == LocalStore(Path("/a b/c"))
    assert open_store("some/where") == LocalStore(Path.cwd() / "some/where")
    assert open_store("s3://s3/x/").url == "s3://s3/x"
    with pytest.raises(UserError, match="unknown scheme ftp://"):
        open_store("ftp://b/c")
    with pytest.raises(UserError, match="names no bucket"):
        open_store("s3:///c")


def test_the_endpoint_is_taken_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://general")
    assert open_store("s3://b").endpoint == "http://general"  # type: ignore[attr-defined]
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://special")
    assert open_store("s3://b").endpoint == "http://special"  # type: ignore[attr-defined]
    assert open_store("s3://b", "http://given").endpoint == "http://given"  # type: ignore[attr-defined]


def short_of_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several attempts within a fraction of a second."""
    monkeypatch.setattr("pipelines.storage.faults._PAUSES_S", (0.01,))
    monkeypatch.setattr("pipelines.storage.faults._FIRST_PATIENCE_S", 0.3)
    monkeypatch.setenv(PATIENCE, "0.3")


@pytest.mark.parametrize("fault", ["slow_down", "reset_body", "short"])
def test_passing_faults_are_survived(fault: Fault, bucket_url: str, proxy: StormyProxy) -> None:
    store = open_store(bucket_url, proxy.url)
    data = os.urandom(100_003)
    store.write("x", data)
    proxy.faults = [fault] * 3
    assert store.read_range("x", 11, 90_001) == data[11:90_012]
    assert proxy.faults == []


def test_a_lasting_fault_ends_with_a_user_error(
    bucket_url: str, proxy: StormyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_patience(monkeypatch)
    store = open_store(bucket_url, proxy.url)
    store.write("x", b"0123456789")
    proxy.faults = ["short"] * 500
    with pytest.raises(UserError, match="ends early: 4 of 8 bytes"):
        store.read_range("x", 1, 8)
    proxy.faults = ["slow_down"] * 500
    with pytest.raises(UserError, match="SlowDown"):
        store.read("x")


def test_a_whole_object_of_the_wrong_content_is_asked_for_again(bucket_url: str, proxy: StormyProxy) -> None:
    store = open_store(bucket_url, proxy.url)
    store.write("x", b"0123456789")  # stored with a checksum
    proxy.faults = ["short"] * 2
    assert store.read("x") == b"0123456789"
    assert proxy.counts["short"] == 2


def test_a_silent_answer_is_asked_for_again(
    bucket_url: str, proxy: StormyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.storage.s3._READ_TIMEOUT_S", 0.2)
    store = open_store(bucket_url, proxy.url)
    store.write("x", b"0123456789")
    proxy.delay_s = 1.0
    proxy.faults = ["delay"] * 3  # the first attempt is two requests
    assert store.read_range("x", 2, 5) == b"23456"
    assert proxy.faults == []


def test_an_answer_that_drips_is_given_up(bucket_url: str, proxy: StormyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    short_of_patience(monkeypatch)
    monkeypatch.setattr("pipelines.storage.s3._READ_TIMEOUT_S", 1.0)  # longer than the pauses between the drops
    monkeypatch.setattr("pipelines.storage.s3._MIN_BYTES_PER_S", 10_000_000)
    store = open_store(bucket_url, proxy.url)
    data = os.urandom(500_000)
    store.write("x", data)
    proxy.delay_s = 2.4
    proxy.faults = ["trickle"]
    assert store.read("x") == data
    proxy.faults = ["trickle"] * 50
    with pytest.raises(UserError, match=r"no proper answer from .* \(less than 10000000 bytes per second\)"):
        store.read("x")
    assert proxy.counts["trickle"] >= 3


def test_a_listing_without_content_is_not_an_empty_folder(
    bucket_url: str, proxy: StormyProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_patience(monkeypatch)
    store = open_store(bucket_url, proxy.url)
    proxy.faults = ["empty"] * 500
    for look in (store.list, lambda: store.exists("x")):
        with pytest.raises(UserError, match="a listing without content"):
            look()
    proxy.faults = []
    assert store.list() == []


def test_an_object_that_is_replaced_while_it_is_downloaded_is_reported(
    bucket_url: str, proxy: StormyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.storage.s3._PART_BYTES", 4)
    monkeypatch.setattr("pipelines.storage.s3._NUM_PARTS_AT_ONCE", 1)
    store = open_store(bucket_url, proxy.url)
    store.write("x", b"0123456789")
    store.download("x", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    proxy.delay_s = 2.0
    proxy.faults = ["delay"] * 2
    with ThreadPoolExecutor(1) as pool:
        download = pool.submit(store.download, "x", tmp_path / "copy")
        while proxy.counts["delay"] < 2:  # then the HEAD is answered, and the first part is not
            time.sleep(0.01)
        store.write("x", b"9876543210")
        with pytest.raises(UserError, match="PreconditionFailed"):
            download.result()
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    assert len([*tmp_path.iterdir()]) == 1


def test_an_endpoint_that_is_away_for_a_moment_is_waited_for(bucket_url: str, s3_endpoint: str) -> None:
    open_store(bucket_url, s3_endpoint).write("x", b"0123456789")
    port = free_port()
    with ExitStack() as stack:
        late = threading.Timer(1.5, lambda: stack.enter_context(StormyProxy(s3_endpoint, port=port)))
        late.start()
        start_s = time.monotonic()
        assert open_store(bucket_url, f"http://127.0.0.1:{port}").read("x") == b"0123456789"
        assert time.monotonic() - start_s >= 1.4
        late.join()


@pytest.fixture
def outages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is reported of outages, much sooner than usual. An endpoint that never answers is given up sooner, too."""
    told: list[str] = []
    monkeypatch.setattr("pipelines.storage.faults._UNREACHABLE_PATIENCE_S", 0.2)
    monkeypatch.setattr("pipelines.storage.faults._report", [told.append])
    monkeypatch.setattr("pipelines.storage.faults._REPORT_AFTER_S", 0.2)
    monkeypatch.setattr("pipelines.storage.faults._REPORT_EVERY_S", 1.0)
    return told


@pytest.mark.parametrize("command", ["read", "write", "list", "upload"])
def test_an_outage_after_the_first_answer_is_waited_for_and_reported(
    bucket_url: str, proxy: StormyProxy, tmp_path: Path, outages: list[str], command: str
) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    store = open_store(bucket_url, proxy.url)
    store.write("x", b"0123456789")
    verbs: dict[str, Callable[[], object]] = {
        "read": lambda: store.read("x"),
        "write": lambda: store.write("y", b"later"),
        "list": store.list,
        "upload": lambda: store.upload(tmp_path / "x", "y"),
    }
    with ThreadPoolExecutor(1) as pool:
        with proxy.outage():
            waiting = pool.submit(verbs[command])
            time.sleep(1)  # longer than an endpoint that has never answered is waited for
            assert not waiting.done()
        waiting.result()
    assert store.read("x") == b"0123456789"
    assert 2 <= len(outages) <= 6
    assert re.match(rf"no proper answer from {proxy.url} for \d s .*; trying again for up to (600|5\d\d) s", outages[0])
    assert re.match(r".* answers again after \d+ s", outages[-1])


def test_other_processes_know_that_an_endpoint_has_answered(bucket_url: str, s3_endpoint: str) -> None:
    port = free_port()
    store = open_store(bucket_url, f"http://127.0.0.1:{port}")
    code = (
        "import pickle, sys, time; from pipelines.storage import faults\n"
        "store = pickle.load(sys.stdin.buffer); known = faults.has_answered(store.endpoint)\n"
        "faults._UNREACHABLE_PATIENCE_S = 0.0; begun_s = time.monotonic()\n"
        "try: store.read('x')\n"
        "except Exception as error: print(int(known), time.monotonic() - begun_s)"
    )

    def known_and_waited_s() -> tuple[bool, float]:
        environment = os.environ | {PATIENCE: "4"}
        done = subprocess.run(
            [sys.executable, "-c", code], input=pickle.dumps(store), capture_output=True, check=True, env=environment
        )
        known, waited_s = done.stdout.split()
        return known == b"1", float(waited_s)

    known, _ = known_and_waited_s()
    assert not known
    with StormyProxy(s3_endpoint, port=port):
        store.write("x", b"0123456789")
    known, waited_s = known_and_waited_s()
    assert known
    assert waited_s >= 4


def test_who_wants_to_stop_waits_for_no_outage(bucket_url: str, proxy: StormyProxy) -> None:
    store = open_store(bucket_url, proxy.url)
    store.write("x", b"0123456789")
    begun_s = time.monotonic()
    with proxy.outage(), brief_patience(0.5), pytest.raises(UserError, match="no proper answer"):
        store.read("x")
    assert time.monotonic() - begun_s < 60  # the endpoint has answered, and is otherwise waited for ten minutes


def client_error(code: str, status: int) -> ClientError:
    answer: Any = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    return ClientError(answer, "PutObject")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (client_error("SlowDown", 503), "wait"),
        (client_error("InternalError", 500), "wait"),
        (client_error("ServiceUnavailable", 503), "wait"),
        (client_error("TooManyRequests", 429), "wait"),
        (client_error("RequestTimeout", 400), "wait"),
        (client_error("QuotaExceeded", 507), "fix"),
        (client_error("NotImplemented", 501), "fix"),
        (client_error("AccessDenied", 403), "fix"),
        (client_error("ExpiredToken", 403), "fix"),
        (client_error("NoSuchBucket", 404), "fix"),
        (client_error("PreconditionFailed", 412), "fix"),
        (EndpointConnectionError(endpoint_url="http://x"), "wait"),
        (ConnectTimeoutError(endpoint_url="http://x"), "wait"),
        (ReadTimeoutError(endpoint_url="http://x"), "wait"),
        (ConnectionClosedError(endpoint_url="http://x"), "wait"),
        (IncompleteReadError(actual_bytes=1, expected_bytes=2), "again"),
        (FlexibleChecksumError(error_msg="x"), "again"),
        (NoCredentialsError(), "fix"),
    ],
)
def test_the_table_of_faults(error: Exception, remedy: str) -> None:
    assert remedy_of(error) == remedy


def test_what_only_the_user_can_fix_is_never_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("pipelines.storage.faults.time.sleep", pauses.append)
    note_answer("http://there")
    attempts = Attempts("http://there")
    assert not attempts.wait(client_error("AccessDenied", 403))
    assert not pauses
    assert attempts.wait(client_error("SlowDown", 503))
    assert pauses


def test_an_unreachable_endpoint_is_reported_within_seconds() -> None:
    start_s = time.monotonic()
    with pytest.raises(UserError, match=r"s3://b/x: no proper answer from http://127.0.0.1:\d+ .*check the URL"):
        open_store("s3://b", f"http://127.0.0.1:{free_port()}").read("x")
    assert time.monotonic() - start_s < 60


def test_a_silent_endpoint_is_reported_within_seconds() -> None:
    # Nobody accepts, and the queue of one is full: connecting hangs until the client's own limit.
    with socket.socket() as listener, socket.socket() as first, socket.socket() as second:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for filler in (first, second):
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        start_s = time.monotonic()
        with pytest.raises(UserError, match="no proper answer"):
            open_store("s3://b", f"http://127.0.0.1:{listener.getsockname()[1]}").list()
        assert time.monotonic() - start_s < 60


def test_a_missing_bucket_is_reported(s3_endpoint: str) -> None:
    store = open_store("s3://never-made-bucket-of-rzen/x", s3_endpoint)
    for attempt in (lambda: store.read("x"), lambda: store.write("x", b""), store.list, lambda: store.exists("x")):
        with pytest.raises(UserError, match="there is no such bucket"):
            attempt()


def test_missing_credentials_are_reported(s3_endpoint: str, tmp_path: Path) -> None:
    code = (
        "from pipelines.storage.location import open_store; from pipelines.errors import UserError\n"
        f"try: open_store('s3://b', {s3_endpoint!r}).read('x')\n"
        "except UserError as error: raise SystemExit(str(error))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    environment |= {"AWS_EC2_METADATA_DISABLED": "true", "HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stderr.startswith("s3://b/x: no credentials for the object store; set AWS_ACCESS_KEY_ID")


def test_an_impossible_endpoint_is_reported() -> None:
    with pytest.raises(UserError, match="write the endpoint as http://host:port"):
        open_store("s3://b", "not an address").read("x")


def test_a_full_disk_is_reported_and_leaves_nothing_behind(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a small tmpfs here")
    try:
        store = open_store(str(tmp_path))
        store.write("kept", b"old")
        with pytest.raises(UserError, match="No space left on device; free some space"):
            store.write("kept", bytes(200_000))
        assert store.read("kept") == b"old"
        assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_file_size_limit_is_reported(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="File too large"):
            open_store(str(tmp_path)).write("x", bytes(200_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_files_are_read_ahead_in_order_a_few_at_a_time() -> None:
    started: list[int] = []

    def read(number: int) -> int:
        started.append(number)
        return number**2

    for number, square in enumerate(read_ahead(read, range(7), 3)):
        assert square == number**2
        assert len(started) <= number // 3 * 3 + 3
    assert sorted(started) == list(range(7))


def test_localize_takes_local_paths_as_they_are(tmp_path: Path) -> None:
    assert localize(str(tmp_path), tmp_path / "cache") == tmp_path
    assert not (tmp_path / "cache").exists()


def test_localize_downloads_once_for_all_processes(
    bucket_url: str, proxy: StormyProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    open_store(f"{bucket_url}/model").write("a/w.bin", b"weights")
    code = (
        "import pathlib, sys; from pipelines.storage.location import localize\n"
        "print(localize(sys.argv[1], pathlib.Path(sys.argv[2])))"
    )
    command = [sys.executable, "-c", code, f"{bucket_url}/model", str(tmp_path / "cache")]
    before = proxy.num_requests
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    folders = {process.communicate()[0].strip() for process in processes}
    assert len(folders) == 1
    folder = Path(folders.pop())
    assert (folder / "a/w.bin").read_bytes() == b"weights"
    # Each reads the mark, lists, and looks at the mark again. One downloads: HEAD, GET.
    assert proxy.num_requests - before <= 11
    open_store(f"{bucket_url}/model").write("a/w.bin", b"newer")
    assert (localize(f"{bucket_url}/model", tmp_path / "cache") / "a/w.bin").read_bytes() == b"newer"
    with pytest.raises(FileNotFoundError):
        localize(f"{bucket_url}/absent", tmp_path / "cache")
