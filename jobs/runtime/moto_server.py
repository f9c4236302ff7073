"""Moto's S3 server with atomic conditional writes: `python -m jobs.runtime.moto_server PORT`.

Moto compares the tag and writes the object in two steps. Of two writers at the same moment both would succeed, which an
object store rules out. A lock around conditional writes prevents that.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import run_simple

_CONDITIONS = ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH")


class AtomicWrites:
    """A WSGI application that lets one conditional write at a time through to `app`."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self._app = app
        self._lock = threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["REQUEST_METHOD"] != "PUT" or not any(name in environ for name in _CONDITIONS):
            return self._app(environ, start_response)
        with self._lock:
            return list(self._app(environ, start_response))


def serve(port: int) -> None:
    """Serve on the loopback interface until the process gets SIGTERM."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    app = AtomicWrites(DomainDispatcherApplication(create_backend_app))
    run_simple("127.0.0.1", port, app, threaded=True, request_handler=MotoRequestHandler)


if __name__ == "__main__":
    serve(int(sys.argv[1]))
