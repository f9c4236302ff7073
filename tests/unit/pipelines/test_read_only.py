"""Datasets of the hub, Google Cloud Storage and Azure: read by the project's store, and never written to."""

import hashlib
import json
import pickle
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.sources.table import open_table
from pipelines.sources.table_config import TableSource
from pipelines.storage import read_only
from pipelines.storage.location import localize, open_object, open_store
from pipelines.storage.urls import is_local, local_path, scheme_of

ROOT = "hf://datasets/user/name"
TABLE = b'{"anchor": "How tall is it?", "positive": "330 m"}\n{"anchor": "", "positive": "nothing asked"}\n'
API, FILE = "/api/datasets/user/name", "/datasets/user/name/resolve/"


class Hub(BaseHTTPRequestHandler):
    """What the hub answers to questions about one dataset. `busy` requests are answered with 503 first."""

    files: ClassVar[dict[str, bytes]] = {}
    ranges: ClassVar[list[str]] = []
    busy: ClassVar[int] = 0

    def log_message(self, *args: Any) -> None:
        pass

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data)), "Content-Type": "application/json"} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def entries(self, path: str) -> list[dict[str, Any]]:
        """The file or folder at a path, in the hub's form."""
        if path in self.files:
            data = self.files[path]
            return [{"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}]
        is_folder = any(name.startswith(f"{path}/") for name in self.files)
        return [{"type": "directory", "path": path, "oid": "0" * 40}] if is_folder else []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self.answer([entry for path in paths for entry in self.entries(path)])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if Hub.busy:
            Hub.busy -= 1
            self.answer({"error": "busy"}, 503)
        elif path.startswith(f"{API}/tree/main"):
            folder = path.removeprefix(f"{API}/tree/main").strip("/")
            found = [name for name in self.files if not folder or name.startswith(f"{folder}/")]
            inside = {
                name[: len(folder) + 1] + name[len(folder) + 1 :].split("/")[0] if folder else name.split("/")[0]
                for name in found
            }
            names = sorted({*found, *inside})
            if found:
                self.answer([entry for name in names for entry in self.entries(name)])
            else:
                self.answer({"error": "not found"}, 404, X_Error_Code="EntryNotFound")
        elif path.startswith(API):
            self.answer({"_id": "1", "id": "user/name", "sha": "f" * 40, "siblings": [], "tags": [], "private": False})
        elif path.startswith(FILE) and (name := path.removeprefix(FILE).partition("/")[2]) in self.files:
            data = self.files[name]
            first, _, last = (self.headers.get("Range") or f"bytes=0-{len(data)}").removeprefix("bytes=").partition("-")
            self.ranges.append(f"{name} {first}-{last}")
            part = data[int(first) : int(last) + 1]
            self.answer(part, 206, Content_Range=f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        else:
            self.answer({"error": "not found"}, 404, X_Error_Code="RepoNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    from huggingface_hub import HfFileSystem, constants

    Hub.files = {"pairs.jsonl": TABLE, "a/b.txt": b"0123456789" * 100, "a/c/d.bin": bytes(range(256)), "a/e f.txt": b""}
    Hub.ranges, Hub.busy = [], 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        address = f"http://127.0.0.1:{server.server_address[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setenv("HF_ENDPOINT", address)
        HfFileSystem.clear_instance_cache()
        read_only._file_system.cache_clear()
        yield Hub
        server.shutdown()
    HfFileSystem.clear_instance_cache()
    read_only._file_system.cache_clear()


def test_a_dataset_of_the_hub_is_a_store(hub: type[Hub], tmp_path: Path) -> None:
    store = open_store(ROOT)
    assert store.url == ROOT
    assert store.list() == ["a/b.txt", "a/c/d.bin", "a/e f.txt", "pairs.jsonl"]
    folder = pickle.loads(pickle.dumps(store.child("a")))
    assert folder.tags() == {path.removeprefix("a/"): tag for path, tag in store.tags().items() if path[:2] == "a/"}
    assert folder.list("c") == ["c/d.bin"]
    assert [folder.exists(name) for name in ("b.txt", "c", "no")] == [True, False, False]
    assert (folder.size("b.txt"), folder.read("c/d.bin"), folder.read("e f.txt")) == (1000, bytes(range(256)), b"")
    assert open_store(f"{ROOT}/nowhere").list() == []
    store.download("a/c/d.bin", tmp_path / "d.bin")
    assert (tmp_path / "d.bin").read_bytes() == bytes(range(256))
    for path in ("no", "c"):
        with pytest.raises(FileNotFoundError):
            folder.read(path)
        with pytest.raises(FileNotFoundError):
            folder.tag(path)


def test_only_the_wanted_range_is_read_and_only_of_the_known_content(hub: type[Hub]) -> None:
    store, path = open_object(f"{ROOT}/a/b.txt")
    tag = store.tag(path)
    assert store.read_range(path, 13, 5) == b"34567"
    assert hub.ranges == ["a/b.txt 13-17"]
    assert store.read_range_if(path, 0, 3, tag) == b"012"
    assert store.read_range_if(path, 0, 3, "another") is None
    hub.files["a/b.txt"] = b"short"
    assert store.read_range_if(path, 998, 2, tag) is None
    hub.files["a/b.txt"] = b"0123456789" * 100
    with pytest.raises(UserError, match="ends early: 2 of the 10 bytes from offset 998"):
        store.read_range(path, 998, 10)


def test_a_busy_hub_is_asked_again(hub: type[Hub]) -> None:
    store = open_store(ROOT)
    assert store.exists("pairs.jsonl")
    Hub.busy = 2
    assert store.read("a/c/d.bin") == bytes(range(256))
    assert Hub.busy == 0


def test_nothing_is_written(hub: type[Hub], tmp_path: Path) -> None:
    store = open_store(ROOT)
    for write in (
        lambda: store.write("x", b""),
        lambda: store.write_if("x", b"", None),
        lambda: store.upload(tmp_path / "x", "x"),
        lambda: store.delete("pairs.jsonl"),
        lambda: store.delete_tree("a"),
        lambda: store.copy("a/b.txt", "x"),
        store.ensure_bucket,
    ):
        with pytest.raises(UserError, match="hf:// is only read; write to a folder or to an s3:// URL"):
            write()


def test_a_table_of_the_hub_is_read(hub: type[Hub]) -> None:
    reader = open_table("faq", TableSource(table=f"{ROOT}/pairs.jsonl"))
    good, bad = (item for unit in reader.units() for item in reader.read(unit))
    assert (good.sample.query.text, good.sample.positive.text) == ("How tall is it?", "330 m")  # type: ignore[union-attr]
    assert (bad.origin, bad.reason) == ("pairs.jsonl:2", "empty_text")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("error", "place", "problem"),
    [
        (OSError("got 403 Forbidden"), "gs://b/x", "gcloud auth application-default login"),
        (PermissionError("no"), "abfs://c@a/x", "az login"),
        (OSError("GatedRepoError: accept"), "hf://datasets/u/n", "set HF_TOKEN"),
        (OSError("a strange answer"), "gs://b/x", "check the URL and the network"),
    ],
)
def test_faults_say_what_to_do(error: Exception, place: str, problem: str) -> None:
    found = read_only._explained(place, error)
    assert isinstance(found, UserError)
    assert (found.place, problem in found.fix) == (place, True)
    assert isinstance(read_only._explained(place, OSError("HTTP status code: 404")), FileNotFoundError)


def test_only_faults_that_may_pass_are_tried_again() -> None:
    assert read_only._is_transient(OSError("Received HTTP status code: 503"))
    assert read_only._is_transient(OSError("429 Client Error: Too Many Requests"))
    assert not read_only._is_transient(OSError("403 Forbidden, request id 5030"))
    assert not read_only._is_transient(OSError("Path is a directory"))


def test_the_key_of_an_azure_account_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    root = "abfs://container@account.dfs.core.windows.net"
    assert read_only._with_key(root) == root
    monkeypatch.setenv("AZURE_STORAGE_KEY", "a/b+c==")
    assert read_only._with_key(root) == "abfs://container:a%2Fb%2Bc%3D%3D@account.dfs.core.windows.net"
    assert read_only._with_key("gs://bucket") == "gs://bucket"


def test_urls_of_each_store() -> None:
    assert [open_store(url).url for url in ("gs://b", "gcs://b/f/", "abfss://c@a.dfs.core.windows.net/x")] == [
        "gs://b",
        "gcs://b/f",
        "abfss://c@a.dfs.core.windows.net/x",
    ]
    with pytest.raises(UserError, match="names no bucket"):
        open_store("gs:///folder")
    with pytest.raises(UserError, match="use a local path, file://, s3://, gs://, gcs://, abfs://, abfss://, hf://"):
        open_store("ftp://host/x")


@pytest.mark.parametrize(
    ("url", "scheme", "local"),
    [
        ("a/b", "", True),
        ("/a/b://c", "", True),
        ("what is s3:// for?", "", True),
        ("file:///a%20b", "file", True),
        ("S3://b", "s3", False),
        ("hf://datasets/a/b", "hf", False),
        ("https://a.b/c", "https", False),
    ],
)
def test_the_start_of_a_place_says_where_it_is(url: str, scheme: str, local: bool) -> None:
    assert (scheme_of(url), is_local(url)) == (scheme, local)


def test_paths_of_file_urls_are_unquoted() -> None:
    assert str(local_path("file:///a%20b/c#d?e")) == "/a b/c#d?e"
    assert local_path("~/a") == Path.home() / "a"
    store, name = open_object("file:///a%20b/c%20d.csv")
    assert (store.url, name) == ("/a b", "c d.csv")


def test_the_embedder_reads_media_of_the_hub(hub: type[Hub]) -> None:
    from rzen.embedding.inputs import InputReader
    from tests.tables import picture

    hub.files["a/p.png"] = picture(3)
    reader = InputReader(MediaConfig())
    (given,) = reader.ahead([f"{ROOT}/a/p.png"])
    (visual,) = reader.read(given).visuals
    assert visual.frames.shape == (1, 8, 12, 3)
    with pytest.raises(BadMedia, match="missing_file"):
        reader.read(f"{ROOT}/a/gone.png")


def test_a_folder_of_the_hub_is_downloaded_once(hub: type[Hub], tmp_path: Path) -> None:
    folder = localize(f"{ROOT}/a", tmp_path)
    assert {path.name for path in folder.rglob("*") if path.is_file()} == {"b.txt", "d.bin", "e f.txt"}
    assert (folder / "c/d.bin").read_bytes() == bytes(range(256))
    hub.ranges.clear()
    assert localize(f"{ROOT}/a", tmp_path) == folder
    assert hub.ranges == []
