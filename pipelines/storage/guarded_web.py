"""Files at addresses that a client of a server names: only of hosts that are allowed, and never inside the network.

A name is resolved once. The connection goes to the address that was checked, so that a second answer of the name server
changes nothing. Each redirect is checked as the first URL.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from typing import Any
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from pipelines.errors import BadMedia

TIMEOUT_S = 15.0
"""Limit of the whole download, redirects included."""
MAX_REDIRECTS = 3
_PORTS = {"http": 80, "https": 443}
_REDIRECTS = (301, 302, 303, 307, 308)
_GONE = (404, 410)
_CHUNK_BYTES = 64 << 10
_KEPT_IN_URLS = "%/:=&?~#+!$,;'@()*[]"
Resolve = Callable[[str, int], list[str]]


def resolve_addresses(host: str, port: int) -> list[str]:
    """Return the addresses of a host. Raises `OSError` for one that nobody knows."""
    found: list[Any] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [address[4][0].partition("%")[0] for address in found]


def read_allowed_url(
    url: str,
    hosts: Collection[str],
    max_bytes: int,
    *,
    timeout_s: float = TIMEOUT_S,
    resolve: Resolve = resolve_addresses,
) -> bytes:
    """Return a file of an allowed host.

    An entry of `hosts` is a name (`cdn.example.com`), all names below one (`.example.com`), either with a port, or `*`
    for every public host. Other ports than those of http and https must be named. Addresses that are not public are
    refused, unless an entry is that very address with its port (`10.0.0.7:9000`).

    Raises `BadMedia`: refused_url, missing_file, unreadable_file, too_many_bytes.
    """
    deadline_s = time.monotonic() + timeout_s
    for _ in range(MAX_REDIRECTS + 1):
        target = _checked(url)
        addresses = _addresses(target, hosts, resolve)
        try:
            data, location = _request(target, addresses, max_bytes, deadline_s)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise BadMedia("unreadable_file", f"{target.hostname} does not answer as a web server") from error
        if location is None:
            return data
        url = urljoin(url, location)
    raise BadMedia("unreadable_file", f"more than {MAX_REDIRECTS} redirects")


def _checked(url: str) -> SplitResult:
    try:
        target = urlsplit(quote(url, safe=_KEPT_IN_URLS))
        _ = target.port
    except ValueError as error:  # its text may hold a password
        raise BadMedia("refused_url", "is not a valid address") from error
    if target.scheme not in _PORTS or not target.hostname:
        raise BadMedia("refused_url", "is not an http:// or https:// address")
    if target.username is not None or target.password is not None:
        raise BadMedia("refused_url", "has a user name")
    return target


def _addresses(target: SplitResult, hosts: Collection[str], resolve: Resolve) -> list[str]:
    """Return the addresses to connect to, those of an allowed host."""
    host, port = str(target.hostname).lower().rstrip("."), _port(target)
    origin = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if not any(_allows(entry.lower(), host, port, target.scheme) for entry in hosts):
        raise BadMedia("refused_url", f"{host} is not among the hosts that are allowed")
    try:
        addresses = resolve(host, port)
    except (OSError, UnicodeError) as error:
        raise BadMedia("unreadable_file", f"there is no host {host}") from error
    named = origin in {entry.lower() for entry in hosts} and host in addresses  # the address itself is allowed
    if not addresses or not (named or all(map(_is_public, addresses))):
        raise BadMedia("refused_url", f"{host} is not a public address")
    return addresses


def _port(target: SplitResult) -> int:
    return target.port or _PORTS[target.scheme]


def _allows(entry: str, host: str, port: int, scheme: str) -> bool:
    name, _, wanted = entry.rpartition(":") if entry.rpartition(":")[2].isdecimal() else (entry, "", "")
    if port != (int(wanted) if wanted else _PORTS[scheme]):
        return False
    name = name.strip("[]")
    return name == "*" or (host.endswith(name) if name.startswith(".") else host == name)


def _is_public(address: str) -> bool:
    found = ipaddress.ip_address(address)
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return found.is_global and not found.is_multicast and (mapped is None or mapped.is_global)


def _request(target: SplitResult, addresses: list[str], max_bytes: int, deadline_s: float) -> tuple[bytes, str | None]:
    """Return the content, or where a redirect leads."""
    connection = _Pinned(target, addresses, _left_s(deadline_s))
    alarm = threading.Timer(_left_s(deadline_s), connection.abort)  # a socket's timeout starts again with each byte
    alarm.daemon = True
    alarm.start()
    path = (target.path or "/") + (f"?{target.query}" if target.query else "")
    try:
        connection.request("GET", path, headers={"User-Agent": "rzen", "Accept-Encoding": "identity"})
        answer = connection.getresponse()
        if answer.status in _REDIRECTS and (location := answer.headers.get("Location")):
            return b"", location
        if answer.status != 200:
            reason = "missing_file" if answer.status in _GONE else "unreadable_file"
            raise BadMedia(reason, f"{target.hostname} answered {answer.status}")
        return _read(answer, max_bytes, deadline_s), None
    except (OSError, http.client.HTTPException):
        _left_s(deadline_s)  # says that it was the time
        raise
    finally:
        alarm.cancel()
        connection.close()


def _read(answer: http.client.HTTPResponse, max_bytes: int, deadline_s: float) -> bytes:
    expected = answer.headers.get("Content-Length", "")
    if expected.isdecimal() and int(expected) > max_bytes:
        raise BadMedia("too_many_bytes", f"{expected} bytes, at most {max_bytes}")
    data = bytearray()
    while chunk := answer.read1(_CHUNK_BYTES):
        data += chunk
        if len(data) > max_bytes:
            raise BadMedia("too_many_bytes", f"more than {max_bytes} bytes")
    _left_s(deadline_s)
    if expected.isdecimal() and len(data) != int(expected):
        raise BadMedia("unreadable_file", f"the server sent {len(data)} of {expected} bytes")
    return bytes(data)


def _left_s(deadline_s: float) -> float:
    left_s = deadline_s - time.monotonic()
    if left_s <= 0:
        raise BadMedia("unreadable_file", "the server takes too long")
    return left_s


class _Pinned(http.client.HTTPConnection):
    """A connection to one of some addresses, with the name of the host in the request and in TLS."""

    def __init__(self, target: SplitResult, addresses: list[str], timeout_s: float) -> None:
        super().__init__(str(target.hostname), _port(target), timeout=timeout_s)
        self._addresses = addresses
        self._socket: socket.socket | None = None  # http.client forgets its own while the answer is read
        self._is_tls = target.scheme == "https"
        self.default_port = _PORTS[target.scheme]  # which the Host header leaves out

    def connect(self) -> None:
        """Connect to the first address that answers."""
        for address in self._addresses:
            try:
                self.sock = self._socket = socket.create_connection((address, self.port), self.timeout)
                break
            except OSError:
                if address == self._addresses[-1]:
                    raise
        if self._is_tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)
            self._socket = self.sock

    def abort(self) -> None:
        """End the connection from another thread."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
