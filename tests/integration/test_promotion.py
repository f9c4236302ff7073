"""A server that follows a registry: promotions, mistakes and rollbacks under load, without an error or a mixed pair."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rzen
from jobs.runtime.local_s3 import free_port
from jobs.serving.pairs import PairFile
from jobs.serving.serve import deploy
from jobs.serving.specs import ServeSpec
from jobs.workflows.registry import Champion, Registry
from pipelines.config import DataConfig
from pipelines.storage.location import open_store
from pipelines.storage.publish import publish_folder
from rzen.config import ModelIdentity, PromptConfig
from rzen.embedding.corpus import MANIFEST, VERSIONS
from rzen.export.export import ExportOptions, export_model
from tests.tiny import TINY, tiny_checkpoint
from tests.vectors import MEDIA, embed_corpus, publish_mixed

pytestmark = [pytest.mark.ray, pytest.mark.slow]
QUERIES = [f"caption {number}" for number in range(4)]
TOP_K = 3
CLOSE = 1e-5
Hits = dict[str, np.ndarray]


class Promoted:
    """A registry with the pairs `a` and `b`, and the scores of the hits that each gives for the queries."""

    def __init__(self, folder: Path) -> None:
        self.registry = Registry(open_store(str(folder / "registry")))
        self.pairs: dict[str, PairFile] = {}
        self.expected: Hits = {}
        publish_mixed(folder / "data", 2)
        for seed, name in enumerate("ab"):
            self._add(folder, name, seed)

    def _add(self, folder: Path, name: str, seed: int) -> None:
        base = tiny_checkpoint(folder / f"base-{name}", TINY.model_copy(update={"seed": seed}))
        exported = folder / f"export-{name}"
        export_model(base, None, exported, ModelIdentity(prompt=PromptConfig(max_visual_tokens=16)),
                     ExportOptions(dtype="float32"))  # fmt: skip
        self.registry.publish(name, exported, {"base": None})
        publish_folder(exported, self.registry.exports(name))
        model = rzen.load(exported, media=MEDIA)
        corpus = Path(self.registry.corpora(name).url)
        embed_corpus(model, DataConfig(root=str(folder / "data"), media=MEDIA), corpus, version=name)
        (corpus / VERSIONS).mkdir()
        shutil.copy(corpus / MANIFEST, corpus / VERSIONS / f"{name}.json")
        found = model.search(str(corpus), QUERIES, top_k=TOP_K)
        self.expected[name] = np.array([[hit.score for hit in hits] for hits in found])
        pair = self.registry.pair(name)
        assert pair is not None
        self.pairs[name] = pair

    def promote(self, name: str, pair: PairFile) -> Champion:
        now = self.registry.champion()
        return self.registry.promote(name, reason="tests", instead_of=now, pair=pair)


@pytest.fixture(scope="module")
def promoted(tmp_path_factory: pytest.TempPathFactory) -> Promoted:
    return Promoted(tmp_path_factory.mktemp("promoted"))


class Load:
    """Clients that search all the time. Every answer must be that of one pair, or the `planted` error."""

    def __init__(self, url: str, expected: Hits, planted: str | None = None) -> None:
        self._url, self._expected, self._planted = url, expected, planted
        self._done = threading.Event()
        self.versions: dict[str, set[str]] = {}
        """Version in the header -> pairs whose hits it came with."""
        self.answers: list[str] = []
        """The pair of each answer, or `error`."""
        self.clients: list[Future[None]] = []

    def ask(self, number: int) -> None:
        while not self._done.is_set():
            self.ask_once(number % len(QUERIES))

    def ask_once(self, number: int) -> None:
        body = json.dumps({"query": QUERIES[number], "top_k": TOP_K}).encode()
        request = urllib.request.Request(f"{self._url}/v1/search", body, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:  # raises for any status but 200
                version, hits = answer.headers["x-rzen-version"], json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            if self._planted is None or json.load(error)["error"]["code"] != self._planted:
                raise
            self.answers.append("error")
            return
        scores = np.array([hit["score"] for hit in hits])
        near = [name for name, rows in self._expected.items() if np.abs(rows[number] - scores).max() < CLOSE]
        assert len(near) == 1, "hits of no pair, or of a model and the corpus of another"
        self.versions.setdefault(version, set()).add(near[0])
        self.answers.append(near[0])

    def wait_for(self, name: str, count: int = 12) -> None:
        """Wait until so many answers in a row are those of a pair. Raises the error of a client."""
        self.wait_until(lambda: set(self.answers[-count:]) == {name} and len(self.answers) >= count)

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds. Raises the error of a client."""
        deadline_s = time.monotonic() + 90
        while not condition():
            for client in self.clients:
                if client.done():
                    client.result()
            assert time.monotonic() < deadline_s, self.answers[-12:]
            time.sleep(0.05)

    def stop(self) -> None:
        self._done.set()


def server(promoted: Promoted, canary: dict[str, Any]) -> ServeSpec:
    """Two replicas that follow the registry."""
    return ServeSpec.model_validate(
        {
            "kind": "serve",
            "registry": promoted.registry.store.url,
            "port": free_port(),
            "reload_s": 0.3,
            "replicas": 2,
            "cpus_per_replica": 0.5,
            "canary": canary,
            "media": MEDIA.model_dump(),
        }
    )


def test_promotions_and_rollbacks_under_load_answer_with_one_pair(ray_cluster: None, promoted: Promoted) -> None:
    from ray import serve

    assert np.abs(promoted.expected["a"] - promoted.expected["b"]).max(axis=1).min() > 100 * CLOSE
    promoted.promote("a", promoted.pairs["a"])
    spec = server(promoted, {"fraction": 0.5, "requests": 8, "timeout_s": 30})
    load = Load(deploy(spec), promoted.expected)
    with ThreadPoolExecutor(3) as pool:
        load.clients = [pool.submit(load.ask, number) for number in range(3)]
        try:
            load.wait_for("a")
            promoted.promote("b", promoted.pairs["b"])
            load.wait_for("b")
            tried = load.answers[load.answers.index("b") :]
            assert "a" in tried, "the trial had only a share of the requests"
            # A model and the corpus of another: no replica uses it.
            promoted.promote("a", PairFile(**{**promoted.pairs["b"], "model": promoted.pairs["a"]["model"]}))
            before = len(load.answers)
            time.sleep(3)
            assert set(load.answers[before:]) == {"b"}
            promoted.registry.rollback("the pair does not belong together")
            promoted.promote("a", promoted.pairs["a"])
            load.wait_for("a")
        finally:
            load.stop()
    serve.shutdown()
    for client in load.clients:
        client.result()
    assert sorted(map(sorted, load.versions.values())) == [["a"], ["b"]]


@pytest.fixture(autouse=True)
def no_server_is_left() -> Iterator[None]:
    """End the server of a test that failed, too: other modules start their own."""
    yield
    from ray import serve

    serve.shutdown()


def replicas() -> dict[str, Any]:
    """The running model replicas, by name."""
    import ray

    found = {}
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if "#ModelReplica#" in actor["name"]:
            with suppress(ValueError):  # it has ended since
                found[actor["name"]] = ray.get_actor(actor["name"], actor["namespace"])
    return found


def break_model(replica: Any, model: str) -> int:
    """Let a model fail on every input, in one replica. Return its process id."""
    import ray

    def plant(actor: Any) -> int:
        from rzen.serving.served import Served

        embed = Served.embed

        def embed_or_fail(served: Any, inputs: Any) -> Any:
            if served.place.model == model:
                return [ArithmeticError("planted") for _ in inputs]
            return embed(served, inputs)

        Served.embed = embed_or_fail  # type: ignore[method-assign]
        return os.getpid()

    pid: int = ray.get(replica.__ray_call__.remote(plant))
    return pid


def test_errors_of_one_replica_return_all_replicas_to_the_pair_before(ray_cluster: None, promoted: Promoted) -> None:
    from ray import serve

    promoted.promote("a", promoted.pairs["a"])
    # Only errors end this trial: without the other replica's, the healthy one would go on with it.
    spec = server(promoted, {"fraction": 0.5, "requests": 100_000, "timeout_s": 600})
    load = Load(deploy(spec), promoted.expected, planted="model_error")
    before = replicas()
    assert len(before) == 2
    name, broken = before.popitem()
    pid = break_model(broken, promoted.pairs["b"]["model"])
    with ThreadPoolExecutor(3) as pool:
        load.clients = [pool.submit(load.ask, number) for number in range(3)]
        try:
            load.wait_for("a")
            promoted.promote("b", promoted.pairs["b"])
            load.wait_until(lambda: load.answers.count("error") >= 3)
            load.wait_for("a", 60)
            assert "b" in load.answers, "the healthy replica tried the pair, too"
            os.kill(pid, signal.SIGKILL)
            load.wait_until(lambda: len(replicas().keys() - {name}) == 2)  # another one has started
            given_up = len(load.answers)
            load.wait_until(lambda: len(load.answers) > given_up + 100)
            assert set(load.answers[given_up:]) == {"a"}, "a replica that starts does not use what was given up"
        finally:
            load.stop()
    serve.shutdown()
    for client in load.clients:
        client.result()
    assert load.answers.count("error") < 12, "the trial ended soon after the third error"
