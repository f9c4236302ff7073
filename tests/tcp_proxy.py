"""A TCP proxy that cuts connections and refuses new ones, as networks and load balancers do."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # linger for 0 s: close() sends RST


class TcpProxy:
    """Forwards connections to a port of this machine until the block ends."""

    def __init__(self, port: int) -> None:
        self._target = ("127.0.0.1", port)
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._refuses = False
        self._server = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        self.num_streams = 0
        """Connections that became streams of a log."""

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Reset all connections."""
        with self._lock:
            for connection in self._open:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def refuse(self, refuses: bool) -> None:
        """Reset all connections, and every new one at once, or no longer."""
        self._refuses = refuses
        if refuses:
            self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        if self._refuses:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            client.close()
            return
        with client, socket.create_connection(self._target) as server:
            with self._lock:
                self._open |= {client, server}
            answers = threading.Thread(target=_copy, args=(server, client), daemon=True)
            answers.start()
            self._copy_requests(client, server)
            answers.join()
            with self._lock:
                self._open -= {client, server}

    def _copy_requests(self, client: socket.socket, server: socket.socket) -> None:
        _copy(client, server, self._count)

    def _count(self, data: bytes) -> None:
        if b"/logs/tail" in data:
            self.num_streams += 1


def _copy(source: socket.socket, target: socket.socket, see: Callable[[bytes], None] | None = None) -> None:
    try:
        while data := source.recv(1 << 16):
            if see:
                see(data)
            target.sendall(data)
    except OSError:
        pass  # cut
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
