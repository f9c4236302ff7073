"""The server on Ray Serve: vectors of the model through proxy, gateway and replica, under load, kills and exchanges."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

import rzen
from jobs.runtime.local_s3 import free_port
from jobs.serving.scraping import merged
from jobs.serving.serve import deploy
from jobs.serving.specs import ServeSpec
from rzen.config import ModelIdentity, PromptConfig
from rzen.export.export import ExportOptions, export_model
from tests.infra.test_prometheus import dashboard_queries, series_of
from tests.paths import ROOT
from tests.serving import send_raw
from tests.tiny import TEXTS, TINY, tiny_checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow]
KEY = "a key of the tests"
CLOSE = 1e-6
HEAD = f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nAuthorization: Bearer {KEY}\r\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the models `a` and `b`."""
    folder = tmp_path_factory.mktemp("models")
    identity = ModelIdentity(prompt=PromptConfig(max_visual_tokens=16))
    for seed, name in enumerate("ab"):
        base = tiny_checkpoint(folder / f"base-{name}", TINY.model_copy(update={"seed": seed}))
        export_model(base, None, folder / name, identity, ExportOptions(dtype="float32"))
    return folder


@pytest.fixture(scope="module")
def expected(models: Path) -> dict[str, np.ndarray]:
    """Vectors of the texts by each model."""
    return {name: rzen.load(models / name).encode(list(TEXTS)) for name in "ab"}


class Server:
    """A server whose model is at `folder/model`."""

    def __init__(self, folder: Path, models: Path) -> None:
        self.models, self.place = models, folder / "model"
        shutil.copytree(models / "a", self.place)
        (folder / "keys").write_text(f"{KEY}\n")
        self.spec = ServeSpec.model_validate(
            {
                "kind": "serve",
                "model": str(self.place),
                "port": free_port(),
                "name": "tiny",
                "reload_s": 0.5,
                "api_keys": str(folder / "keys"),
                "max_body_bytes": 1 << 20,
                "body_timeout_s": 1.0,
                "cpus_per_replica": 0.5,
            }
        )
        self.url = deploy(self.spec)

    def ask(self, path: str = "/v1/embeddings", body: Any = None, key: str = KEY) -> tuple[int, Any, Any]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        try:
            with urllib.request.urlopen(
                urllib.request.Request(f"{self.url}{path}", data, headers), timeout=60
            ) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, error.read(), error.headers

    def version(self) -> str:
        version: str = json.loads(self.ask("/v1/models")[1])["data"][0]["version"]
        return version


@pytest.fixture(scope="module")
def server(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Server]:
    from ray import serve

    yield Server(tmp_path_factory.mktemp("server"), models)
    serve.shutdown()


def under_load(server: Server, expected: dict[str, np.ndarray], change: Callable[[], None]) -> set[str]:
    """Change something while clients ask. Return the models that answered; each answer must be right."""
    done = threading.Event()
    found: set[str] = set()

    def ask(number: int) -> None:
        while not done.is_set():
            texts = [TEXTS[(number + i) % len(TEXTS)] for i in range(3)]
            status, data, _ = server.ask(body={"input": texts})
            assert status == 200, data
            vectors = np.array([one["embedding"] for one in json.loads(data)["data"]])
            rows = [(number + i) % len(TEXTS) for i in range(3)]
            near = [name for name in expected if np.abs(vectors - expected[name][rows]).max() < CLOSE]
            assert len(near) == 1, "vectors of no model, or of a mixture"
            found.add(near[0])
            bad = [*texts, {"image": "AAAA"}]
            status, data, _ = server.ask(body={"input": bad})
            assert (status, json.loads(data)["error"]["index"]) == (415, 3), data

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, number) for number in range(4)]
        try:
            time.sleep(0.3)
            change()
            time.sleep(0.3)
        finally:
            done.set()
        for one in asking:
            one.result()
    return found


def wait_for(condition: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.1)


def test_clients_get_the_vectors_of_the_model(server: Server, expected: dict[str, np.ndarray]) -> None:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0)
    answer = client.embeddings.create(model="tiny", input=list(TEXTS))
    np.testing.assert_allclose([one.embedding for one in answer.data], expected["a"], atol=CLOSE)
    assert server.ask("/readyz")[0] == server.ask("/healthz")[0] == 200


def test_attacks_are_refused_and_the_server_still_answers(server: Server) -> None:
    assert server.ask(body={"input": "x"}, key="wrong")[0] == 401
    # Not the whole body: the server closes the connection, and a client that still sends may not read the answer.
    begun = f"{HEAD}Content-Length: {(1 << 20) + 1}\r\n\r\n".encode() + b"x" * 1000
    assert send_raw(server.url, begun).startswith(b"HTTP/1.1 413")
    assert send_raw(server.url, f"{HEAD}Content-Length: 10000000000\r\n\r\n".encode()).startswith(b"HTTP/1.1 413")
    chunk = b"20000\r\n" + b"x" * 0x20000 + b"\r\n"
    chunked = f"{HEAD}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 9
    assert send_raw(server.url, chunked).startswith(b"HTTP/1.1 413")
    assert send_raw(server.url, f"{HEAD}Content-Length: 100\r\n\r\n{{".encode()).startswith(b"HTTP/1.1 408")
    assert server.ask(body={"input": {"image": "https://example.com/a.png"}})[0] == 400
    assert server.ask(body={"input": "x"})[0] == 200


def test_another_model_is_used_without_an_error(server: Server, expected: dict[str, np.ndarray]) -> None:
    before = server.version()

    def change() -> None:
        deploy(server.spec.model_copy(update={"model": str(server.models / "b")}))
        wait_for(lambda: server.version() != before)

    assert under_load(server, expected, change) == {"a", "b"}
    deploy(server.spec)
    wait_for(lambda: server.version() == before)


def test_a_replaced_model_is_used_without_an_error(server: Server, expected: dict[str, np.ndarray]) -> None:
    before = server.version()

    def replace(name: str) -> None:
        shutil.copytree(server.models / name, server.place.with_name(name))
        server.place.rename(server.place.with_name("old"))
        server.place.with_name(name).rename(server.place)
        shutil.rmtree(server.place.with_name("old"))

    def change() -> None:
        replace("b")
        wait_for(lambda: server.version() != before)

    assert under_load(server, expected, change) == {"a", "b"}
    replace("a")
    wait_for(lambda: server.version() == before)


def test_metrics_are_those_of_the_server(server: Server) -> None:
    def counted() -> float:
        text = server.ask("/metrics")[1].decode()
        found = re.findall(
            r'^ray_rzen_serve_requests_total\{.*route="/v1/embeddings".*status="200".*\} (\S+)', text, re.M
        )
        return sum(map(float, found))

    wait_for(lambda: counted() > 0)
    # The processes of gateway and model report at moments of their own.
    wait_for(lambda: "ray_rzen_serve_batch_s_bucket" in server.ask("/metrics")[1].decode())
    assert server.ask("/metrics")[1].decode().count("# TYPE ray_rzen_serve_requests_total") == 1


def test_the_dashboard_asks_for_what_the_server_exports(server: Server) -> None:
    names = {name for query in dashboard_queries("serving").values() for name in series_of(query)}
    # Autoscaling is off on this server.
    names.remove("ray_serve_autoscaling_target_replicas")

    def missing() -> set[str]:
        text = server.ask("/metrics")[1].decode()
        return {name for name in names if f"\n{name}{{" not in text}

    wait_for(lambda: not missing())
    version = rf'^ray_rzen_serve_version{{.*version="{server.version()}".*}} 1'
    wait_for(lambda: bool(re.search(version, server.ask("/metrics")[1].decode(), re.MULTILINE)))


# After the tests of metrics: those of a killed replica end, and a new one has only what happened to it.
def test_a_killed_replica_loses_no_request(server: Server, expected: dict[str, np.ndarray]) -> None:
    import ray

    def pid() -> int:
        actors = ray.util.list_named_actors(all_namespaces=True)
        (name,) = [actor for actor in actors if "ModelReplica" in actor["name"]]
        handle = ray.get_actor(name["name"], name["namespace"])
        found: int = ray.get(handle.__ray_call__.remote(lambda self: os.getpid()))
        return found

    def change() -> None:
        os.kill(pid(), signal.SIGKILL)
        time.sleep(1)
        wait_for(lambda: server.ask("/readyz")[0] == 200)

    assert under_load(server, expected, change) == {"a"}


def test_metrics_of_nodes_are_merged() -> None:
    one = '# HELP ray_serve_x X.\n# TYPE ray_serve_x counter\nray_serve_x{a="1"} 1\n# TYPE ray_y gauge\nray_y 5\n'
    two = one.replace('a="1"} 1', 'a="2"} 2')
    assert merged([one, two]) == (
        '# HELP ray_serve_x X.\n# TYPE ray_serve_x counter\nray_serve_x{a="1"} 1\nray_serve_x{a="2"} 2\n'
    )


@pytest.mark.long
def test_the_command_starts_and_ends_a_server(models: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "rzen", "serve", str(models / "a"), "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell starts what it puts in the background with SIGINT ignored, and its children would ignore it, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        lines = []
        while not any("curl" in line for line in lines):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        body = json.dumps({"input": "x"}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/embeddings", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request) as answer:
            assert answer.status == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, process.stdout.read()
    finally:
        process.kill()
        process.wait()
