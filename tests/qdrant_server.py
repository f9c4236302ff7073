"""A server with the REST routes of Qdrant that an index uses, in front of the local mode of Qdrant's client.

It stands in for Qdrant's server, which no package registry has. It answers real requests of the real client, and has
Qdrant's filters. It has no graph and no quantized vectors: each search compares with all vectors. RZEN_TEST_QDRANT_URL
names a real server instead.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextmanager
def qdrant_server(api_key: str | None = None) -> Iterator[str]:
    """Yield the URL of a server that is empty."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api_key))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(api_key: str | None) -> type[BaseHTTPRequestHandler]:
    from qdrant_client import QdrantClient, models

    client, lock = QdrantClient(":memory:"), threading.Lock()

    def create(name: str, body: Any) -> Any:
        config = models.CreateCollection.model_validate(body)
        return client.create_collection(name, config.vectors, quantization_config=config.quantization_config)

    def upsert(name: str, body: Any) -> Any:
        return client.upsert(name, models.Batch.model_validate(body["batch"]))

    def search(name: str, body: Any) -> Any:
        requests = models.QueryRequestBatch.model_validate(body).searches
        return [found.model_dump(mode="json") for found in client.query_batch_points(name, requests)]

    def facet(name: str, body: Any) -> Any:
        asked = models.FacetRequest.model_validate(body)
        limit = asked.limit or 10
        return client.facet(name, asked.key, facet_filter=asked.filter, limit=limit, exact=bool(asked.exact))

    def delete(name: str, body: Any) -> Any:
        return client.delete(name, models.FilterSelector.model_validate(body))

    def set_payload(name: str, body: Any) -> Any:
        asked = models.SetPayload.model_validate(body)
        return client.set_payload(name, asked.payload, asked.points or asked.filter)

    def delete_payload(name: str, body: Any) -> Any:
        asked = models.DeletePayload.model_validate(body)
        return client.delete_payload(name, asked.keys, asked.points or asked.filter)

    routes = {
        ("GET", "/exists"): lambda name, body: {"exists": client.collection_exists(name)},
        ("GET", ""): lambda name, body: client.get_collection(name),
        ("PUT", ""): create,
        ("DELETE", ""): lambda name, body: client.delete_collection(name),
        ("PUT", "/index"): lambda name, body: {"operation_id": 0, "status": "completed"},
        ("PUT", "/points"): upsert,
        ("POST", "/points/query/batch"): search,
        ("POST", "/points/delete"): delete,
        ("POST", "/points/payload"): set_payload,
        ("POST", "/points/payload/delete"): delete_payload,
        ("POST", "/facet"): facet,
    }

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"null")
            if api_key is not None and self.headers.get("api-key") != api_key:
                self.send(401, {"status": {"error": "Must provide an API key"}})
                return
            found = re.fullmatch(r"/collections/([^/?]+)([^?]*)(\?.*)?", self.path)
            assert found is not None, self.path
            with lock:
                result = routes[self.command, found[2]](found[1], body)
            plain = result.model_dump(mode="json") if hasattr(result, "model_dump") else result
            self.send(200, {"result": plain, "status": "ok", "time": 0.0})

        do_GET = do_PUT = do_POST = do_DELETE = answer  # noqa: N815

        def send(self, status: int, content: Any) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Print nothing."""

    return Handler
