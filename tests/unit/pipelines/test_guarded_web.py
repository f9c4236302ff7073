"""Downloads that a client names: allowed hosts, private addresses, redirects, sizes and times."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pipelines.errors import BadMedia
from pipelines.storage.guarded_web import MAX_REDIRECTS, read_allowed_url

seen: list[tuple[str, str]] = []


class _Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        seen.append((self.headers["Host"], self.path))
        path, _, query = self.path.partition("?")
        if path.startswith("/to"):
            self.send_response(302)
            self.send_header("Location", query)
            self.end_headers()
        elif path == "/loop":
            self.send_response(307)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif path == "/missing":
            self.send_error(404)
        elif path == "/declared":
            self.send_response(200)
            self.send_header("Content-Length", "1000000")
            self.end_headers()
        elif path == "/endless":
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b"x" * 65536)
            except OSError:
                pass
        elif path in ("/trickle", "/slow-head"):
            try:
                if path == "/trickle":
                    self.send_response(200)
                    self.end_headers()
                for _ in range(100):
                    self.wfile.write(b"x")
                    self.wfile.flush()
                    time.sleep(0.05)
            except OSError:
                pass
        else:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"content")

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join(5)


def refused(reason: str, url: str, hosts: list[str], **options: object) -> str:
    with pytest.raises(BadMedia) as caught:
        read_allowed_url(url, hosts, 1000, **options)  # type: ignore[arg-type]
    assert caught.value.reason == reason, caught.value
    return caught.value.detail


def test_an_address_is_allowed_by_its_own_name_and_port(port: int) -> None:
    here = f"127.0.0.1:{port}"
    assert read_allowed_url(f"http://{here}/a?b=c d", [here], 1000) == b"content"
    assert seen[-1] == (here, "/a?b=c%20d")
    assert read_allowed_url(f"http://{here}/to?/a", [here], 1000) == b"content"
    for hosts in ([], ["*"], [f"*:{port}"], ["127.0.0.1"], ["127.0.0.1:1"], ["example.com"]):
        refused("refused_url", f"http://{here}/a", hosts)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "127.0.0.1",
            "10.1.2.3",
            "192.168.0.1",
            "172.16.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "0.0.0.0",
            "224.0.0.1",
        ),
        *("::1", "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "2002:7f00:1::", "::", "ff02::1"),
    ],
)
def test_names_of_private_addresses_are_refused(address: str) -> None:
    detail = refused(
        "refused_url", "http://example.com/a", ["*"], resolve=lambda host, port: ["93.184.216.34", address]
    )
    assert detail == "example.com is not a public address"


def test_a_name_is_resolved_once_and_the_connection_goes_to_that_address(port: int) -> None:
    answers = iter([["127.0.0.1"], ["127.0.0.1"]])
    here = f"127.0.0.1:{port}"
    refused("refused_url", f"http://example.com:{port}/a", [f"example.com:{port}"], resolve=lambda h, p: next(answers))
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    assert read_allowed_url(f"http://{here}/a", [here], 1000, resolve=resolve) == b"content"
    assert asked == ["127.0.0.1"]


def test_each_redirect_is_checked(port: int) -> None:
    here = f"127.0.0.1:{port}"
    for target in (
        "http://127.0.0.1:1/a",
        "http://localhost/a",
        "file:///etc/passwd",
        "ftp://example.com/a",
        "http://[::1]/",
    ):
        refused("refused_url", f"http://{here}/to?{target}", [here])
    assert "redirects" in refused("unreadable_file", f"http://{here}/loop", [here])
    assert [path for _, path in seen].count("/loop") == MAX_REDIRECTS + 1


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "gopher://a/b", "http://", "http://user:word@example.com/a", "http://a:99999/", "x"]
)
def test_other_addresses_are_refused(url: str) -> None:
    assert "word" not in refused("refused_url", url, ["*"], resolve=lambda host, port: ["93.184.216.34"])


def test_sizes_and_times_are_limited(port: int) -> None:
    here = f"127.0.0.1:{port}"
    refused("missing_file", f"http://{here}/missing", [here])
    refused("too_many_bytes", f"http://{here}/declared", [here])
    refused("too_many_bytes", f"http://{here}/endless", [here])
    for path in ("trickle", "slow-head"):
        start_s = time.monotonic()
        assert "too long" in refused("unreadable_file", f"http://{here}/{path}", [here], timeout_s=0.3)
        assert time.monotonic() - start_s < 2


def test_names_below_a_name_are_allowed() -> None:
    def resolve(host: str, port: int) -> list[str]:
        raise OSError(host)

    for host, entry in (("a.example.com", ".example.com"), ("example.com", "example.com"), ("other.org", "*")):
        refused("unreadable_file", f"https://{host}/a", [entry], resolve=resolve)
    for host, entry in (("example.com.evil.org", "example.com"), ("evilexample.com", ".example.com"), ("a.b", "c.b")):
        refused("refused_url", f"https://{host}/a", [entry], resolve=resolve)
    refused("refused_url", "https://example.com:8443/a", ["example.com"], resolve=resolve)
