"""A server that follows a registry: promotions, mistakes and rollbacks under load, without an error or a mixed pair."""

from __future__ import annotations

import json
import shutil
import threading
import time
import urllib.request
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

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
    """Clients that search all the time. Every answer must be that of one pair."""

    def __init__(self, url: str, expected: Hits) -> None:
        self._url, self._expected = url, expected
        self._done = threading.Event()
        self.versions: dict[str, set[str]] = {}
        """Version in the header -> pairs whose hits it came with."""
        self.answers: list[str] = []
        self.clients: list[Future[None]] = []

    def ask(self, number: int) -> None:
        while not self._done.is_set():
            self.ask_once(number % len(QUERIES))

    def ask_once(self, number: int) -> None:
        body = json.dumps({"query": QUERIES[number], "top_k": TOP_K}).encode()
        request = urllib.request.Request(f"{self._url}/v1/search", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:  # raises for any status but 200
            version, hits = answer.headers["x-rzen-version"], json.load(answer)["data"]
        scores = np.array([hit["score"] for hit in hits])
        near = [name for name, rows in self._expected.items() if np.abs(rows[number] - scores).max() < CLOSE]
        assert len(near) == 1, "hits of no pair, or of a model and the corpus of another"
        self.versions.setdefault(version, set()).add(near[0])
        self.answers.append(near[0])

    def wait_for(self, name: str, count: int = 12) -> None:
        """Wait until so many answers in a row are those of a pair. Raises the error of a client."""
        deadline_s = time.monotonic() + 90
        while set(self.answers[-count:]) != {name} or len(self.answers) < count:
            for client in self.clients:
                if client.done():
                    client.result()
            assert time.monotonic() < deadline_s, self.answers[-count:]
            time.sleep(0.05)

    def stop(self) -> None:
        self._done.set()


def test_promotions_and_rollbacks_under_load_answer_with_one_pair(ray_cluster: None, promoted: Promoted) -> None:
    from ray import serve

    assert np.abs(promoted.expected["a"] - promoted.expected["b"]).max(axis=1).min() > 100 * CLOSE
    promoted.promote("a", promoted.pairs["a"])
    spec = {
        "kind": "serve",
        "registry": promoted.registry.store.url,
        "port": free_port(),
        "reload_s": 0.3,
        "cpus_per_replica": 0.5,
        "canary": {"fraction": 0.5, "requests": 8, "timeout_s": 30},
        "media": MEDIA.model_dump(),
    }
    load = Load(deploy(ServeSpec.model_validate(spec)), promoted.expected)
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
