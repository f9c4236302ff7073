"""The server's routes with a tiny model: clients of other servers, bad inputs, keys, limits, exchange of the model."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import cohere
import numpy as np
import openai
import pytest
import voyageai
from PIL import Image

import rzen
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.samples import DecodedInput
from rzen.config import ModelIdentity, PromptConfig
from rzen.export.export import ExportOptions, export_model
from rzen.serving.engine import Engine, EngineSettings
from rzen.serving.guards import ApiKeys
from rzen.serving.place import Place
from rzen.serving.types import EmbedRequest, ServedInput
from tests.serving import NAME, http_server, send_raw
from tests.tiny import TEXTS, TINY, tiny_checkpoint
from tests.vectors import MEDIA, clip, document, embed_corpus, picture, publish_mixed

PROMPT = PromptConfig(max_visual_tokens=16, max_text_tokens=60)
CLOSE = 1e-6
KEY = "a key of the tests"
Json = Any


def export(folder: Path, seed: int = 0) -> Path:
    base = tiny_checkpoint(folder.with_name(f"{folder.name}-base"), TINY.model_copy(update={"seed": seed}))
    export_model(base, None, folder, ModelIdentity(prompt=PROMPT), ExportOptions(dtype="float32"))
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models, `model` and `other`, and the `vectors` of a corpus by the first."""
    root = tmp_path_factory.mktemp("serving")
    export(root / "other", seed=1)
    model = rzen.load(export(root / "model"), media=MEDIA)
    publish_mixed(root / "data", 4)
    embed_corpus(model, DataConfig(root=str(root / "data"), media=MEDIA), root / "vectors")
    return root


@pytest.fixture(scope="module")
def offline(root: Path) -> rzen.Embedder:
    return rzen.load(root / "model", media=MEDIA)


def place(root: Path, model: str = "model") -> Place:
    return Place(str(root / model), corpus=str(root / "vectors") if model == "model" else None, dimensions=(16,))


def new_engine(root: Path, **settings: Any) -> Engine:
    engine = Engine(EngineSettings(media=MEDIA, **settings))
    engine.load(place(root))
    return engine


@pytest.fixture(scope="module")
def engine(root: Path) -> Iterator[Engine]:
    engine = new_engine(root)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def url(engine: Engine) -> Iterator[str]:
    with http_server(engine) as url:
        yield url


def post(url: str, body: Json, headers: dict[str, str] | None = None) -> tuple[int, Json, Any]:
    """Status, body and headers of an answer."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def embed(url: str, body: Json) -> np.ndarray:
    status, content, _ = post(f"{url}/v1/embeddings", body)
    assert status == 200, content
    assert [one["index"] for one in content["data"]] == list(range(len(content["data"])))
    return np.array([one["embedding"] for one in content["data"]], np.float32)


def data_uri(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def test_openais_client_gets_the_vectors_of_the_model(url: str, offline: rzen.Embedder) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    expected = offline.encode(list(TEXTS))
    answer = client.embeddings.create(model=NAME, input=list(TEXTS))  # the client asks for base64 by itself
    np.testing.assert_allclose([one.embedding for one in answer.data], expected, atol=CLOSE)
    tokens = sum(int(offline.processor.encode([DecodedInput(text)]).lengths[0]) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == tokens
    as_numbers = client.embeddings.create(model=NAME, input=TEXTS[0], encoding_format="float").data[0].embedding
    np.testing.assert_allclose(as_numbers, expected[0], atol=CLOSE)
    short = client.embeddings.create(model=NAME, input=TEXTS[0], dimensions=16).data[0].embedding
    np.testing.assert_allclose(short, offline.encode(TEXTS[0], dimensions=16), atol=CLOSE)
    ids = [offline.processor._tokenizer.encode(text, add_special_tokens=False).ids for text in TEXTS]
    answer = client.embeddings.create(model=NAME, input=ids)
    np.testing.assert_allclose([one.embedding for one in answer.data], expected, atol=CLOSE)
    np.testing.assert_allclose(
        client.embeddings.create(model=NAME, input=ids[1]).data[0].embedding, expected[1], atol=CLOSE
    )
    with pytest.raises(openai.BadRequestError, match="trained for 16, 64"):
        client.embeddings.create(model=NAME, input="x", dimensions=17)
    with pytest.raises(openai.NotFoundError, match="use 'tiny'"):
        client.embeddings.create(model="other", input="x")
    assert [one.id for one in client.models.list()] == [NAME]


def test_media_of_each_dialect_give_the_vectors_of_the_model(url: str, offline: rzen.Embedder, tmp_path: Path) -> None:
    image, page, video = picture(3), document(2), clip(1)
    for name, data in (("a.png", image), ("a.pdf", page), ("a.mp4", video)):
        (tmp_path / name).write_bytes(data)
    shown = offline.encode(tmp_path / "a.png")
    mixed = offline.encode({"text": "in blue", "image": tmp_path / "a.png"}, instruction="Find it:")
    uri = data_uri(image)
    part = {"type": "image_url", "image_url": {"url": uri}}
    words = {"type": "text", "text": "in blue"}
    chat = [{"role": "system", "content": "Find it:"}, {"role": "user", "content": [part, words]}]
    bodies = [
        {"messages": [{"role": "user", "content": [part]}]},
        {"input": [{"image": base64.b64encode(image).decode()}]},
        {"input": [{"image": uri}]},
        {"input": [{"content": [part]}]},
        {"input": [uri], "modality": "image"},
    ]
    for body in bodies:
        np.testing.assert_allclose(embed(url, body), [shown], atol=CLOSE, err_msg=str(body)[:80])
    for body in (
        {"messages": chat},
        {"input": [{"content": [words, part]}], "instruction": "Find it:"},
        {"input": {"text": "in blue", "image": uri, "instruction": "Find it:"}},
    ):
        np.testing.assert_allclose(embed(url, body), [mixed], atol=CLOSE, err_msg=str(body)[:80])
    np.testing.assert_allclose(embed(url, {"messages": [chat, chat]}), [mixed, mixed], atol=CLOSE)
    np.testing.assert_allclose(embed(url, {"input": [chat]}), [mixed], atol=CLOSE)
    others = embed(url, {"input": [{"document": data_uri(page)}, {"video": data_uri(video, "video/mp4")}]})
    np.testing.assert_allclose(others, offline.encode([tmp_path / "a.pdf", tmp_path / "a.mp4"]), atol=CLOSE)
    as_text = embed(url, {"input": [uri[:40]]})  # a text is a text, whatever it looks like
    np.testing.assert_allclose(as_text, [offline.encode({"text": uri[:40]})], atol=CLOSE)


def test_coheres_client(url: str, offline: rzen.Embedder, tmp_path: Path) -> None:
    client = cohere.ClientV2(api_key="none", base_url=url)
    (tmp_path / "a.png").write_bytes(picture(3))
    answer = client.embed(
        model=NAME, texts=list(TEXTS), input_type="search_query", embedding_types=["float", "ubinary"]
    )
    expected = offline.encode(list(TEXTS), task="text_image")
    np.testing.assert_allclose(answer.embeddings.float_, expected, atol=CLOSE)
    assert answer.embeddings.ubinary == np.packbits(expected >= 0, axis=1).tolist()
    answer = client.embed(
        model=NAME, images=[data_uri(picture(3))], input_type="image", embedding_types=["float"], output_dimension=16
    )
    target = offline.encode(tmp_path / "a.png", task="text_image", role="target", dimensions=16)
    np.testing.assert_allclose(answer.embeddings.float_, [target], atol=CLOSE)
    assert answer.meta is not None
    assert answer.meta.billed_units is not None
    assert answer.meta.billed_units.images == 1
    content = [{"type": "text", "text": "in blue"}, {"type": "image_url", "image_url": {"url": data_uri(picture(3))}}]
    inputs = [{"content": content}]
    answer = client.embed(model=NAME, inputs=inputs, input_type="clustering", embedding_types=["float"])  # type: ignore[arg-type]
    mixed = offline.encode({"text": "in blue", "image": tmp_path / "a.png"})
    np.testing.assert_allclose(answer.embeddings.float_, [mixed], atol=CLOSE)
    with pytest.raises(cohere.core.ApiError) as caught:
        client.embed(model=NAME, texts=["x"], images=["y"], input_type="image", embedding_types=["float"])
    assert caught.value.status_code == 400


def test_voyages_client(url: str, offline: rzen.Embedder, tmp_path: Path) -> None:
    client = voyageai.Client(api_key="none", base_url=f"{url}/v1", max_retries=0)
    (tmp_path / "a.png").write_bytes(picture(3))
    image = Image.open(io.BytesIO(picture(3)))
    answer = client.multimodal_embed([["in blue", image], ["a red circle"]], model=NAME, input_type="document")
    target = {"text": "in blue", "image": tmp_path / "a.png"}
    expected = [
        offline.encode(target, task="text_image", role="target"),
        offline.encode("a red circle", task="text_text", role="target"),
    ]
    np.testing.assert_allclose(answer.embeddings, expected, atol=CLOSE)
    assert answer.image_pixels == image.width * image.height
    assert answer.total_tokens > answer.text_tokens > 0
    texts = client.embed(["a red circle"], model=NAME, input_type="query", output_dimension=16)
    wanted = offline.encode("a red circle", task="text_image", dimensions=16)
    np.testing.assert_allclose(texts.embeddings, [wanted], atol=CLOSE)


def test_requests_of_text_embeddings_inference(url: str, offline: rzen.Embedder) -> None:
    status, content, _ = post(f"{url}/embed", {"inputs": list(TEXTS), "prompt_name": "text_page"})
    assert status == 200
    np.testing.assert_allclose(content, offline.encode(list(TEXTS), task="text_page"), atol=CLOSE)
    long = "a red circle " * 60
    status, content, _ = post(f"{url}/embed", {"inputs": [TEXTS[0], long]})
    assert (status, content["error_type"], content["index"]) == (400, "Validation", 1)
    status, content, _ = post(f"{url}/embed", {"inputs": long, "truncate": True})
    np.testing.assert_allclose(content, [offline.encode(long)], atol=CLOSE)


@pytest.mark.parametrize(
    ("given", "status", "reason"),
    [
        ({"image": data_uri(b"\x89PNG\r\n\x1a\n" + b"damaged" * 9)}, 422, "corrupt_image"),
        ({"image": data_uri(b"plain text", "image/png")}, 415, "unsupported_format"),
        ({"image": "not base64!"}, 400, None),
        ({"image": "file:///etc/passwd"}, 400, None),
        ({"image": "https://example.com/a.png"}, 400, "refused_url"),
        ({"video": data_uri(picture(0))}, 422, "other_kind"),
        ({"document": data_uri(document(0)), "page": 99}, 422, "no_such_page"),
        ([5, 1 << 40], 400, None),
        ("", 400, None),
    ],
)
def test_a_bad_input_is_named_by_its_index(url: str, given: Json, status: int, reason: str | None) -> None:
    found, content, headers = post(f"{url}/v1/embeddings", {"input": ["a red circle", given, "x"]})
    error = content["error"]
    assert (found, error["index"], error.get("reason")) == (status, 1, reason), error
    assert headers["x-request-id"]


def test_what_would_change_vectors_silently_is_refused(url: str) -> None:
    for name, value in (("mm_processor_kwargs", {}), ("normalize", False), ("dimension", 16), ("task", "no_task")):
        status, content, _ = post(f"{url}/v1/embeddings", {"input": "x", name: value})
        assert (status, content["error"]["param"]) == (400, name), content
    assert post(f"{url}/v1/embeddings", b'{"input": NaN}')[0] == 400
    assert post(f"{url}/v1/embeddings", b"[" * 100_000)[0] == 400
    assert post(f"{url}/v1/embeddings", b'{"input": "\\ud800"}')[0] == 400
    assert post(f"{url}/v1/embeddings", {"input": "x"}, {"Content-Type": "text/plain"})[0] == 415
    assert post(f"{url}/v1/nothing", {"input": "x"})[0] == 404


def test_search_finds_what_the_model_finds(url: str, root: Path, offline: rzen.Embedder) -> None:
    query = "a red circle above a blue bar chart"
    for body, options in (
        ({"query": query, "top_k": 3}, {"top_k": 3}),
        ({"query": query, "task": "text_page"}, {"task": "text_page"}),
        ({"query": query, "modalities": ["video", "text"]}, {"modalities": ["video", "text"]}),
        ({"query": query, "instruction": "Find:"}, {"instruction": "Find:"}),
    ):
        status, content, headers = post(f"{url}/v1/search", body)
        assert status == 200, content
        expected = offline.search(root / "vectors", query, **options)  # type: ignore[arg-type]
        found = content["data"]
        assert [(hit["rank"], hit["origin"]) for hit in found] == [(hit.rank, hit.origin) for hit in expected]  # type: ignore[union-attr]
        np.testing.assert_allclose([h["score"] for h in found], [h.score for h in expected], atol=CLOSE)  # type: ignore[union-attr]
        assert headers["x-rzen-version"] == content["version"]
    status, content, _ = post(f"{url}/v1/search", {"query": {"image": data_uri(picture(3))}, "modalities": ["image"]})
    assert (content["data"][0]["origin"], content["data"][0]["score"]) == ("3.png", pytest.approx(1, abs=1e-5))
    assert post(f"{url}/v1/search", {"query": query, "sources": ["no such"]})[1]["data"] == []
    assert post(f"{url}/v1/search", {"query": query, "sources": ["mixed"], "top_k": 1})[1]["data"]
    named = post(f"{url}/v1/search", {"query": query, "filters": ["origin=3.png"]})[1]["data"]
    assert [hit["origin"] for hit in named] == ["3.png"]
    assert post(f"{url}/v1/search", {"query": query, "filters": ["color=red"]})[0] == 400
    assert post(f"{url}/v1/search", {"query": query, "modalities": ["smell"]})[0] == 400
    assert post(f"{url}/v1/rerank", {"query": query, "documents": ["x"]})[0] == 404


def test_a_reranker_scores_as_it_does_alone(root: Path, tmp_path: Path) -> None:
    engine = Engine(EngineSettings(media=MEDIA))
    reranker = str(tiny_checkpoint(tmp_path / "reranker"))
    engine.load(Place(str(root / "other"), reranker=reranker))
    alone = rzen.load_reranker(reranker, media=MEDIA)
    (tmp_path / "a.png").write_bytes(picture(3))
    query = "a red circle"
    documents: list[Any] = [
        TEXTS[0],
        {"image": data_uri(picture(3))},
        "x",
        {"content": [{"type": "text", "text": TEXTS[1]}]},
    ]
    inputs = [TEXTS[0], tmp_path / "a.png", "x", TEXTS[1]]
    expected = alone.predict([(query, document) for document in inputs], instruction="Find:")
    order = np.argsort(-expected, kind="stable").tolist()
    try:
        with http_server(engine) as url:
            body = {"query": query, "documents": documents, "instruction": "Find:"}
            status, content, _ = post(f"{url}/v1/rerank", body | {"return_documents": True})
            assert status == 200, content
            assert [one["index"] for one in content["results"]] == order
            found = [one["relevance_score"] for one in content["results"]]
            np.testing.assert_allclose(found, expected[order], atol=1e-6)
            assert [one["document"] for one in content["results"]] == [
                {"text": documents[i]} if isinstance(documents[i], str) else documents[i] for i in order
            ]
            client = cohere.ClientV2(api_key="none", base_url=url)
            answer = client.rerank(model=NAME, query=query, documents=[TEXTS[0], "x"], top_n=1)
            best = alone.rank(query, [TEXTS[0], "x"], top_k=1)[0]
            assert [(one.index, one.relevance_score) for one in answer.results] == [
                (best.index, pytest.approx(best.score, abs=1e-6))
            ]
            status, content, _ = post(f"{url}/rerank", {"query": query, "texts": inputs[2:], "return_text": True})
            assert {one["text"] for one in content} == {"x", TEXTS[1]}
            pairs = {"text_1": ["a", "b"], "text_2": ["x", "y"]}
            scores = [one["score"] for one in post(f"{url}/v1/score", pairs)[1]["data"]]
            np.testing.assert_allclose(scores, alone.predict([("a", "x"), ("b", "y")]), atol=1e-6)
            scores = [
                one["score"] for one in post(f"{url}/score", {"queries": "a", "documents": ["x", "y"]})[1]["data"]
            ]
            np.testing.assert_allclose(scores, alone.predict([("a", "x"), ("a", "y")]), atol=1e-6)
            status, content, _ = post(f"{url}/rerank", {"query": "a", "documents": ["x", {"image": "AAAA"}]})
            assert (status, content["error"]["param"]) == (415, "document[1]")
            assert post(f"{url}/score", {"queries": ["a", "b"], "documents": ["x"] * 3})[0] == 400
    finally:
        engine.close()


def test_keys_open_the_server(engine: Engine, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# of the tests\n{KEY}\n")
    with http_server(engine, ApiKeys(str(path))) as url:
        body = {"input": "x"}
        for headers, status in (
            ({}, 401),
            ({"Authorization": "Bearer wrong"}, 401),
            ({"Authorization": f"Basic {KEY}"}, 401),
            ({"Authorization": f"Bearer {KEY}"}, 200),
            ({"X-API-Key": KEY}, 200),
        ):
            assert post(f"{url}/v1/embeddings", body, headers)[0] == status, headers  # type: ignore[arg-type]
        assert post(f"{url}/v1/embeddings", body)[2]["www-authenticate"] == "Bearer"
        assert post(f"{url}/v2/embed", body)[1]["message"].startswith("a key is needed")
        for route in ("healthz", "readyz"):
            with urllib.request.urlopen(f"{url}/{route}") as answer:
                assert answer.status == 200
        path.write_text("another key of the tests\n")
        assert post(f"{url}/v1/embeddings", body, {"X-API-Key": KEY})[0] == 401
    path.write_text("short\n")
    with pytest.raises(UserError, match="fewer than 16 characters"):
        ApiKeys(str(path))


def test_bodies_are_limited_in_bytes_and_time(engine: Engine) -> None:
    with http_server(engine, max_body_bytes=100_000, body_timeout_s=0.5) as url:
        assert post(f"{url}/v1/embeddings", {"input": "x" * 100_001})[0] == 413
        head = b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        declared = send_raw(url, head + b"Content-Length: 10000000000\r\n\r\n")
        assert declared.startswith(b"HTTP/1.1 413")
        chunk = b"8000\r\n" + b"x" * 0x8000 + b"\r\n"
        assert send_raw(url, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 4).startswith(b"HTTP/1.1 413")
        start_s = time.monotonic()
        slow = send_raw(url, head + b"Content-Length: 100\r\n\r\n{")
        assert slow.startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start_s < 5
        assert post(f"{url}/v1/embeddings", {"input": "x"})[0] == 200


def test_a_decompression_bomb_is_refused(url: str) -> None:
    bomb = io.BytesIO()
    Image.new("1", (9_000, 9_000)).save(bomb, "PNG")
    assert len(bomb.getvalue()) < 200_000
    status, content, _ = post(f"{url}/v1/embeddings", {"input": [{"image": data_uri(bomb.getvalue())}]})
    assert (status, content["error"]["reason"]) == (422, "too_many_pixels")


class _Files(BaseHTTPRequestHandler):
    """`/a.png` is a picture, `/away?PORT` redirects to another port, `/slow` never ends."""

    def do_GET(self) -> None:
        if self.path.startswith("/away"):
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.path.partition('?')[2]}/a.png")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        self.wfile.write(picture(3))

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def files() -> Iterator[int]:
    server = HTTPServer(("127.0.0.1", 0), _Files)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_port
    server.shutdown()
    server.server_close()
    thread.join(5)


def test_urls_of_allowed_hosts_are_fetched_and_redirects_are_checked(
    engine: Engine, files: int, offline: rzen.Embedder, tmp_path: Path
) -> None:
    (tmp_path / "a.png").write_bytes(picture(3))
    host = f"127.0.0.1:{files}"
    with http_server(engine, allow_urls=(host,)) as url:
        found = embed(url, {"input": [{"image": f"http://{host}/a.png"}]})
        np.testing.assert_allclose(found, [offline.encode(tmp_path / "a.png")], atol=CLOSE)
        with socket.create_server(("127.0.0.1", 0)) as inside:
            inside.settimeout(0.2)
            port = inside.getsockname()[1]
            for target in (f"http://{host}/away?{port}", f"http://127.0.0.1:{port}/a.png"):
                status, content, _ = post(f"{url}/v1/embeddings", {"input": ["x", {"image": target}]})
                assert (status, content["error"]["index"], content["error"]["reason"]) == (400, 1, "refused_url")
            with pytest.raises(TimeoutError):  # nobody has connected
                inside.accept()


def test_a_full_queue_says_when_to_ask_again(root: Path) -> None:
    engine = new_engine(root, max_waiting_tokens=1)
    try:
        with http_server(engine) as url, ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: post(f"{url}/v1/embeddings", {"input": ["a red circle"] * 64}), range(8)))
        statuses = [status for status, _, _ in answers]
        assert {*statuses} == {200, 429}
        for status, content, headers in answers:
            if status == 429:
                assert int(headers["Retry-After"]) >= 1
                assert content["error"]["type"] == "rate_limit_error"
    finally:
        engine.close()


def test_a_model_is_exchanged_while_requests_are_answered(root: Path) -> None:
    engine = new_engine(root)
    try:
        vectors = {engine.served.version: engine.served.embedder.encode(list(TEXTS))}
        seen: list[tuple[str, np.ndarray]] = []
        with http_server(engine) as url:
            done = threading.Event()

            def ask() -> None:
                while not done.is_set():
                    status, content, headers = post(f"{url}/v1/embeddings", {"input": list(TEXTS)})
                    assert status == 200, content
                    found = np.array([one["embedding"] for one in content["data"]], np.float32)
                    seen.append((headers["x-rzen-version"], found))

            with ThreadPoolExecutor(3) as pool:
                asking = [pool.submit(ask) for _ in range(3)]
                time.sleep(0.3)
                engine.load(place(root, "other"))
                vectors[engine.served.version] = engine.served.embedder.encode(list(TEXTS))
                time.sleep(0.3)
                done.set()
                for one in asking:
                    one.result()
        assert {version for version, _ in seen} == {*vectors}
        assert len(vectors) == 2
        for version, found in seen:  # none has a version and vectors that do not belong together
            np.testing.assert_allclose(found, vectors[version], atol=CLOSE)
    finally:
        engine.close()


def test_a_model_without_its_corpus_is_not_used(root: Path) -> None:
    engine = new_engine(root)
    try:
        before = engine.served
        with pytest.raises(UserError, match="has vectors of"):
            engine.load(Place(str(root / "other"), corpus=str(root / "vectors")))
        assert engine.served is before
    finally:
        engine.close()


def test_a_replaced_model_has_another_tag(root: Path, tmp_path: Path) -> None:
    here = Place(str(export(tmp_path / "model")))
    before = here.tag()
    assert here.tag() == before
    (tmp_path / "model/model.safetensors").touch()
    assert here.tag() != before


def test_readiness_compares_a_vector(root: Path) -> None:
    engine = new_engine(root)
    try:
        with http_server(engine) as url:
            assert urllib.request.urlopen(f"{url}/readyz").status == 200
            for parameter in engine.served.embedder.model.parameters():
                parameter.mul_(float("nan"))
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(f"{url}/readyz")
            assert caught.value.code == 503
            status, content, _ = post(f"{url}/v1/embeddings", {"input": ["x"]})
            assert (status, content["error"]["reason"]) == (500, "model_error")
            post(f"{url}/v1/embeddings", {"input": ["x"]})
            assert engine.may_be_broken
            assert urllib.request.urlopen(f"{url}/healthz").status == 200
    finally:
        engine.close()


def test_requests_before_the_model_is_loaded_are_told_to_wait() -> None:
    engine = Engine(EngineSettings())
    with http_server(engine) as url:
        status, _, headers = post(f"{url}/v1/embeddings", {"input": "x"})
    assert (status, headers["Retry-After"]) == (503, "5")
    with pytest.raises(Exception, match="being loaded"):
        asyncio.run(engine.embed(EmbedRequest((ServedInput("x"),))))
    engine.close()
