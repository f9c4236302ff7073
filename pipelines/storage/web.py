"""Files at http:// and https:// addresses, within limits of size, time and redirects."""

from __future__ import annotations

import ipaddress
import socket
import time
import urllib.error
import urllib.request
from http.client import HTTPException, HTTPMessage, InvalidURL
from typing import IO, Any, NamedTuple
from urllib.parse import quote, urlsplit

from pipelines.errors import BadMedia
from pipelines.storage.urls import WEB_SCHEMES

_TIMEOUT_S = 20.0  # of a server that sends nothing
_MIN_BYTES_PER_S = 16 << 10
_CHUNK_BYTES = 256 << 10
_MAX_REDIRECTS = 5
_PAUSES_S = (0.3, 1.0)  # between attempts
_TRANSIENT = (429, 500, 502, 503, 504)
_GONE = (404, 410)
_KEPT_IN_URLS = "%/:=&?~#+!$,;'@()*[]"


class WebFile(NamedTuple):
    """All bytes of a file, its content type, and its URL after redirects."""

    data: bytes
    content_type: str
    url: str


def read_url(url: str, max_bytes: int) -> WebFile:
    """Return a file on the web.

    A server that is overloaded or breaks off is asked up to three times. Redirects are followed, at most five, but
    not from a public address to a private one. Raises `BadMedia`: missing_file, unreadable_file, too_many_bytes.
    """
    for pause_s in (*_PAUSES_S, None):
        try:
            return _read(url, max_bytes)
        except urllib.error.HTTPError as error:
            with error:
                if error.code not in _TRANSIENT or pause_s is None:
                    reason = "missing_file" if error.code in _GONE else "unreadable_file"
                    raise BadMedia(reason, f"the server answered {error.code} {error.reason}") from error
        except (InvalidURL, ValueError) as error:  # its text may hold a password
            raise BadMedia("unreadable_file", "is not a valid address") from error
        except (OSError, HTTPException) as error:
            if pause_s is None or _is_lasting(error):
                raise BadMedia("unreadable_file", str(error)) from error
        time.sleep(pause_s)
    raise AssertionError("the last attempt returns or raises")


def _read(url: str, max_bytes: int) -> WebFile:
    request = urllib.request.Request(quote(url, safe=_KEPT_IN_URLS), headers={"User-Agent": "rzen"})
    opener = urllib.request.build_opener(_Redirects(urlsplit(url).hostname))
    start_s = time.monotonic()
    with opener.open(request, timeout=_TIMEOUT_S) as answer:
        expected = answer.headers.get("Content-Length", "")
        if expected.isdecimal() and int(expected) > max_bytes:
            raise BadMedia("too_many_bytes", f"{expected} bytes, at most {max_bytes}")
        chunks, num_bytes = [], 0
        while chunk := answer.read1(_CHUNK_BYTES):  # what has arrived, so that the rate is checked in time
            chunks.append(chunk)
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise BadMedia("too_many_bytes", f"more than {max_bytes} bytes")
            if time.monotonic() - start_s > _TIMEOUT_S + num_bytes / _MIN_BYTES_PER_S:
                raise BadMedia("unreadable_file", f"the server sends less than {_MIN_BYTES_PER_S} bytes per second")
        if expected.isdecimal() and num_bytes != int(expected):
            raise ConnectionError(f"the server sent {num_bytes} of {expected} bytes")
        return WebFile(b"".join(chunks), str(answer.headers.get("Content-Type", "")), answer.geturl())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects within the web: never to another scheme, nor from a public host into a private network."""

    max_redirections = _MAX_REDIRECTS

    def __init__(self, host: str | None) -> None:
        self._host = host

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        target = urlsplit(newurl)
        if target.scheme not in WEB_SCHEMES:
            raise BadMedia("unreadable_file", f"the server redirects to {target.scheme}://")
        if _is_private(target.hostname) and not _is_private(self._host):
            raise BadMedia("unreadable_file", f"the server redirects to the private address {target.hostname}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _is_private(host: str | None) -> bool:
    """Return whether a name stands for an address that is not public. One that nobody knows is left to the request."""
    try:
        found: list[Any] = socket.getaddrinfo(host, None)
    except OSError:  # a proxy may know it
        return False
    return any(not ipaddress.ip_address(address[4][0].partition("%")[0]).is_global for address in found)


def _is_lasting(error: Exception) -> bool:
    """Return whether there is no such host, so that asking again is no use."""
    return isinstance(getattr(error, "reason", None), socket.gaierror)
