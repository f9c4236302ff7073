"""Adapters of one base on one server: each gives its own vectors, whoever asks at the same time."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rzen
from pipelines.errors import UserError
from rzen.config import ModelIdentity, PromptConfig, ReadoutConfig
from rzen.embedding.shared import share
from rzen.export.export import ExportOptions, export_model
from rzen.serving.engine import Engine, EngineSettings
from rzen.serving.place import Place
from tests.export.make import trained_adapter
from tests.serving import NAME, http_server
from tests.tiny import TEXTS, tiny_checkpoint

CLOSE = 1e-6
IDENTITY = ModelIdentity(prompt=PromptConfig(max_visual_tokens=16))


def trained(base: str, folder: Path, seed: int, identity: ModelIdentity = IDENTITY) -> str:
    return str(trained_adapter(base, folder, identity, seed, rank=2 + seed, std=0.1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model `base` and its adapters `shops` and `maps`."""
    root = tmp_path_factory.mktemp("adapters")
    export_model(tiny_checkpoint(root / "tiny"), None, root / "base", IDENTITY, ExportOptions(dtype="float32"))
    prompt = IDENTITY.prompt.model_copy(update={"max_text_tokens": 7})  # the second one reads less of a text
    trained(str(root / "base"), root / "shops", 1)
    trained(str(root / "base"), root / "maps", 2, ModelIdentity(prompt=prompt))
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, np.ndarray]:
    """Model for clients -> its vectors of the texts, alone in memory."""
    alone = {f"{NAME}:{name}": rzen.load(root / "base", root / name) for name in ("shops", "maps")}
    return {name: model.encode(list(TEXTS)) for name, model in ({NAME: rzen.load(root / "base")} | alone).items()}


@pytest.fixture(scope="module")
def url(root: Path) -> Iterator[str]:
    engine = Engine(EngineSettings())
    adapters = tuple((name, str(root / name)) for name in ("shops", "maps"))
    engine.load(Place(str(root / "base"), adapters=adapters))
    with http_server(engine, adapters=("shops", "maps")) as found:
        yield found
    engine.close()


def ask(url: str, path: str, body: Any = None) -> tuple[int, Any, str | None]:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"{url}{path}", data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer), answer.headers["x-rzen-version"]
    except urllib.error.HTTPError as error:
        return error.code, json.load(error), None


def test_each_adapter_gives_its_own_vectors_at_the_same_time(url: str, expected: dict[str, np.ndarray]) -> None:
    names = list(expected)
    assert min(np.abs(expected[a] - expected[b]).max() for a in names for b in names if a < b) > 100 * CLOSE

    def client(number: int) -> str | None:
        name = names[number % len(names)]
        status, answer, version = ask(url, "/v1/embeddings", {"model": name, "input": list(TEXTS)})
        assert (status, answer["model"]) == (200, name), answer
        vectors = np.array([one["embedding"] for one in answer["data"]])
        np.testing.assert_allclose(vectors, expected[name], atol=CLOSE)
        return version

    with ThreadPoolExecutor(6) as pool:
        versions = list(pool.map(client, range(18)))
    assert len(set(versions)) == len(names)  # each has a version of its own
    assert versions[:3] * 6 == versions


def test_models_are_listed_and_others_refused(url: str) -> None:
    listed = ask(url, "/v1/models")[1]["data"]
    assert [one["id"] for one in listed] == [NAME, f"{NAME}:shops", f"{NAME}:maps"]
    assert ask(url, f"/v1/models/{NAME}:maps")[1]["parent"] == NAME
    status, answer, _ = ask(url, "/v1/embeddings", {"model": f"{NAME}:other", "input": "x"})
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    assert f"use '{NAME}' or '{NAME}:shops' or '{NAME}:maps'" in answer["error"]["message"]
    status, answer, _ = ask(url, "/v1/search", {"model": f"{NAME}:maps", "query": "x"})
    assert (status, answer["error"]["code"]) == (404, "no_corpus")
    assert ask(url, "/readyz")[0] == 200


def test_adapters_that_do_not_fit_are_refused(root: Path, tmp_path: Path) -> None:
    mean = ModelIdentity(prompt=IDENTITY.prompt, readout=ReadoutConfig(pooling="mean"))
    with pytest.raises(UserError, match=r"adapters.mean .*was trained with the readout .*serve it by itself"):
        share(rzen.load(root / "base"), {"mean": trained(str(root / "base"), tmp_path / "mean", 3, mean)})
    elsewhere = trained(tiny_checkpoint(tmp_path / "other"), tmp_path / "elsewhere", 1)
    config = json.loads((tmp_path / "elsewhere/rzen.json").read_text())
    (tmp_path / "elsewhere/rzen.json").write_text(json.dumps(config | {"base_sha256": "0" * 64}))
    with pytest.raises(UserError, match="base"):
        share(rzen.load(root / "base"), {"elsewhere": elsewhere})


def test_made_by_is_that_of_the_adapter_alone(root: Path) -> None:
    found = share(rzen.load(root / "base"), {"shops": str(root / "shops")})
    assert found["shops"].made_by == rzen.load(root / "base", root / "shops").made_by
    assert found[None].made_by == rzen.load(root / "base").made_by
