"""Parsers and writers of the server's dialects: pure functions, with literal requests."""

from __future__ import annotations

import base64
import pickle
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from rzen.serving.dialects.formats import as_json, cut_vectors
from rzen.serving.dialects.routes import ROUTES
from rzen.serving.types import EmbedRequest, Limits, MediaPart, RequestError, ServedInput, Usage, Wish

LIMITS = Limits(max_inputs=4, max_media=2, max_image_bytes=100, max_video_bytes=200, max_text_bytes=50)
PNG = b"\x89PNG some bytes"
URI = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
URL = "https://example.com/a.png"
IMAGE = MediaPart("image", PNG)
OPENAI, COHERE, VOYAGE, TEI = "/v1/embeddings", "/v2/embed", "/v1/multimodalembeddings", "/embed"
PART = {"type": "image_url", "image_url": {"url": URI}}


def parsed(route: str, **body: Any) -> EmbedRequest:
    return ROUTES[route].parse(body, LIMITS)


@pytest.mark.parametrize(
    ("route", "body", "inputs"),
    [
        (OPENAI, {"input": "a"}, [ServedInput("a")]),
        (OPENAI, {"input": ["a", "b"]}, [ServedInput("a"), ServedInput("b")]),
        (OPENAI, {"input": [1, 2]}, [ServedInput(token_ids=(1, 2))]),
        (OPENAI, {"input": [[1], [2, 3]]}, [ServedInput(token_ids=(1,)), ServedInput(token_ids=(2, 3))]),
        (OPENAI, {"input": URI}, [ServedInput(URI)]),
        (OPENAI, {"input": URI, "modality": "image"}, [ServedInput(media=(IMAGE,))]),
        (OPENAI, {"input": [URL], "modality": "video"}, [ServedInput(media=(MediaPart("video", url=URL),))]),
        (
            OPENAI,
            {"input": [{"text": "a"}, {"image": URL}]},
            [ServedInput("a"), ServedInput(media=(MediaPart("image", url=URL),))],
        ),
        (OPENAI, {"input": {"image": [URI, URI]}}, [ServedInput(media=(IMAGE, IMAGE))]),
        (
            OPENAI,
            {"input": {"document": URL, "page": 2}},
            [ServedInput(media=(MediaPart("document", url=URL, page=2),))],
        ),
        (OPENAI, {"input": [{"content": [{"type": "text", "text": "a"}, PART]}]}, [ServedInput("a", (IMAGE,))]),
        (OPENAI, {"messages": [{"role": "user", "content": "a"}]}, [ServedInput("a")]),
        (
            OPENAI,
            {
                "messages": [
                    {"role": "system", "content": "Find:"},
                    {"role": "user", "content": [PART]},
                    {"role": "assistant", "content": ""},
                ]
            },
            [ServedInput(media=(IMAGE,), instruction="Find:")],
        ),
        (OPENAI, {"messages": [[{"role": "user", "content": "a"}]] * 2}, [ServedInput("a"), ServedInput("a")]),
        (COHERE, {"texts": ["a", "b"]}, [ServedInput("a"), ServedInput("b")]),
        (COHERE, {"images": [URI]}, [ServedInput(media=(IMAGE,))]),
        (COHERE, {"inputs": [{"content": [{"type": "text", "text": "a"}, PART]}]}, [ServedInput("a", (IMAGE,))]),
        (
            VOYAGE,
            {"inputs": [{"content": [{"type": "image_url", "image_url": URL}]}]},
            [ServedInput(media=(MediaPart("image", url=URL),))],
        ),
        (
            VOYAGE,
            {
                "inputs": [
                    {
                        "content": [
                            {"type": "text", "text": "a"},
                            {"type": "image_base64", "image_base64": URI},
                            {"type": "text", "text": "b"},
                        ]
                    }
                ]
            },
            [ServedInput("a\nb", (IMAGE,))],
        ),
        (
            VOYAGE,
            {"inputs": [{"content": [{"type": "video_url", "video_url": URL}]}]},
            [ServedInput(media=(MediaPart("video", url=URL),))],
        ),
        (TEI, {"inputs": "a"}, [ServedInput("a")]),
        (TEI, {"inputs": ["a", "b"]}, [ServedInput("a"), ServedInput("b")]),
    ],
)
def test_inputs(route: str, body: dict[str, Any], inputs: list[ServedInput]) -> None:
    request = parsed(route, **body)
    assert list(request.inputs) == inputs
    assert pickle.loads(pickle.dumps(request)) == request


@pytest.mark.parametrize(
    ("route", "body", "wish"),
    [
        (OPENAI, {}, Wish()),
        (OPENAI, {"instruction": "Find:"}, Wish("Find:")),
        (OPENAI, {"task": "retrieval.query"}, Wish(role="query")),
        (OPENAI, {"task": "retrieval.passage"}, Wish(role="target")),
        (OPENAI, {"task": "text_image", "role": "target"}, Wish(task="text_image", role="target")),
        (OPENAI, {"input_type": "document"}, Wish(role="target")),
        (COHERE, {"input_type": "search_query"}, Wish(role="query")),
        (COHERE, {"input_type": "classification"}, Wish()),
        (TEI, {"prompt_name": "text_page"}, Wish(task="text_page", role="query")),
    ],
)
def test_instructions(route: str, body: dict[str, Any], wish: Wish) -> None:
    field = {OPENAI: "input", COHERE: "texts", TEI: "inputs"}[route]
    assert parsed(route, **body, **{field: ["a"]}).wish == wish


@pytest.mark.parametrize(
    ("route", "body", "status", "param"),
    [
        (OPENAI, {}, 400, "input"),
        (OPENAI, {"input": "a", "messages": []}, 400, "input"),
        (OPENAI, {"input": []}, 400, "input"),
        (OPENAI, {"input": ["a"] * 5}, 413, "input"),
        (OPENAI, {"input": ["a", 1]}, 400, "input[1]"),
        (OPENAI, {"input": ["a", []]}, 400, "input[1]"),
        (OPENAI, {"input": [True]}, 400, "input[0]"),
        (OPENAI, {"input": ["a", "x" * 51]}, 413, "input[1]"),
        (OPENAI, {"input": ["é" * 26]}, 413, "input[0]"),
        (OPENAI, {"input": ["  "]}, 400, "input[0]"),
        (OPENAI, {"input": [{"image": URI[:-1]}]}, 400, "input[0].image"),
        (OPENAI, {"input": [{"image": URI.replace(";base64", "")}]}, 400, "input[0].image"),
        (OPENAI, {"input": [{"image": "A" * 140}]}, 413, "input[0].image"),
        (OPENAI, {"input": [{"image": [URI] * 3}]}, 413, "input[0]"),
        (OPENAI, {"input": [{"image": "ftp://a/b.png"}]}, 400, "input[0].image"),
        (OPENAI, {"input": [{"picture": URI}]}, 400, "input[0]"),
        (OPENAI, {"input": [{"content": [{"type": "input_audio"}]}]}, 415, "input[0].content[0]"),
        (OPENAI, {"input": ["a"], "modality": "audio"}, 415, "modality"),
        (
            OPENAI,
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            400,
            "messages[1].content",
        ),
        (OPENAI, {"messages": [{"role": "user", "content": "a"}] * 2}, 400, "messages"),
        (OPENAI, {"input": "a", "dimensions": 0}, 400, "dimensions"),
        (OPENAI, {"input": "a", "dimensions": True}, 400, "dimensions"),
        (OPENAI, {"input": "a", "encoding_format": "int8"}, 400, "encoding_format"),
        (OPENAI, {"input": "a", "chat_template": "x"}, 400, "chat_template"),
        (OPENAI, {"input": "a", "instruction": "x", "task": "y"}, 400, "instruction"),
        (OPENAI, {"input": "a", "task": "x", "prompt_name": "y"}, 400, "task"),
        (OPENAI, {"input": "a", "inptu": 1}, 400, "inptu"),
        (COHERE, {"texts": ["a"], "images": [URI]}, 400, "texts"),
        (COHERE, {"texts": ["a"], "embedding_types": ["int8"]}, 400, "embedding_types"),
        (COHERE, {"texts": ["a"], "truncate": "START"}, 400, "truncate"),
        (VOYAGE, {"inputs": ["a"]}, 400, "inputs[0]"),
        (TEI, {"inputs": ["a"], "normalize": False}, 400, "normalize"),
    ],
)
def test_mistakes_are_named(route: str, body: dict[str, Any], status: int, param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parsed(route, **body)
    assert (caught.value.status, caught.value.param) == (status, param), caught.value
    again = pickle.loads(pickle.dumps(caught.value))
    assert again.to_json() == caught.value.to_json()
    if "[" in param and not param.startswith("messages"):  # messages are parts of one input
        assert caught.value.index == int(param.partition("[")[2].partition("]")[0])


def test_bodies_that_are_no_objects() -> None:
    for route in ROUTES:
        for body in (None, [], "a", 1):
            with pytest.raises(RequestError):
                ROUTES[route].parse(body, LIMITS)


def test_formats_of_vectors() -> None:
    vectors = np.array([[0.5, -0.5, 0.5, -0.5, 0, 0, 0, 0, 0.1], [-1, 0, 0, 0, 0, 0, 0, 0, -0.0]], np.float32)
    assert as_json(vectors, "float") == vectors.tolist()
    assert base64.b64decode(as_json(vectors, "base64")[0]) == struct.pack("<9f", *vectors[0])
    assert as_json(vectors, "ubinary") == [[0b10101111, 0b10000000], [0b01111111, 0b10000000]]
    assert as_json(vectors, "binary") == [[47, 0], [-1, 0]]
    cut = cut_vectors(vectors, 2)
    np.testing.assert_allclose(cut, [[0.5**0.5, -(0.5**0.5)], [-1, 0]], rtol=1e-6)


def test_answers_and_errors_have_the_form_of_each_dialect() -> None:
    vectors, usage = np.eye(2, dtype=np.float32), Usage(10, 4, 1, 99)
    error = RequestError(422, "input 1: corrupt_image", "input[1]", 1, "corrupt_image")
    answers = {
        route: ROUTES[route].answer(EmbedRequest((ServedInput("a"),) * 2), vectors, usage, "m", "id")
        for route in ROUTES
    }
    failures = {route: ROUTES[route].failure(error, "id") for route in ROUTES}
    assert answers[OPENAI]["data"][1] == {"object": "embedding", "index": 1, "embedding": [0.0, 1.0]}
    assert answers[OPENAI]["usage"] == {"prompt_tokens": 10, "total_tokens": 10}
    assert answers[COHERE]["embeddings"] == {"float": [[1.0, 0.0], [0.0, 1.0]]}
    assert answers[COHERE]["meta"]["billed_units"] == {"input_tokens": 6, "images": 1}
    assert answers[VOYAGE]["usage"] == {"text_tokens": 6, "image_pixels": 99, "video_pixels": 0, "total_tokens": 10}
    assert answers[TEI] == [[1.0, 0.0], [0.0, 1.0]]
    expected = {
        "type": "unprocessable_media",
        "param": "input[1]",
        "code": "corrupt_image",
        "index": 1,
        "reason": "corrupt_image",
    }
    assert failures[OPENAI] == {"error": {"message": "input 1: corrupt_image", **expected}}
    assert failures[COHERE]["message"] == failures[VOYAGE]["detail"] == failures[TEI]["error"] == error.message
    assert failures[TEI]["error_type"] == "Tokenizer"


def test_reading_requests_loads_no_torch() -> None:
    code = "import sys, rzen.serving.gateway, jobs.serving.specs; assert not {'torch', 'ray'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
