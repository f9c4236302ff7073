"""What a user may pass to `Embedder.encode`, how texts, files and URLs are told apart, and errors with their place."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import av
import boto3
import numpy as np
import pytest
from PIL import Image
from reportlab.pdfgen.canvas import Canvas

import rzen
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.samples import DecodedInput, Visual
from pipelines.storage import web
from rzen.config import ModelIdentity
from rzen.embedding.inputs import is_file, shown_as
from tests.tiny import PROMPT, TEXTS, tiny_checkpoint

PIXELS = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
CLIP = np.random.default_rng(1).integers(0, 256, (5, 48, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> rzen.Embedder:
    folder = tmp_path_factory.mktemp("model")
    media = MediaConfig(frames=4, max_bytes=1 << 20, max_pixels=100_000)
    return rzen.load(tiny_checkpoint(folder), identity=ModelIdentity(prompt=PROMPT), media=media)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A picture, a PDF of three pages, one of one page, a clip."""
    folder = tmp_path_factory.mktemp("files")
    Image.fromarray(PIXELS).save(folder / "a.png")
    for name, count in (("three.pdf", 3), ("one.pdf", 1)):
        canvas = Canvas(str(folder / name), pagesize=(200, 300))
        for page in range(count):
            canvas.circle(40 + 50 * page, 150, 30, fill=1)
            canvas.showPage()
        canvas.save()
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(16):
            frame = np.full((48, 64, 3), 15 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return folder


class Server(BaseHTTPRequestHandler):
    """Serves what `pages` holds: path -> status, headers and body; a list is answered one after the other.

    A barrier is answered with a picture when as many wait as it asks for.
    """

    pages: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        answer = self.pages[self.path]
        if isinstance(answer, threading.Barrier):
            answer.wait(60)
            answer = (200, {}, picture())
        status, headers, body = answer.pop(0) if isinstance(answer, list) else answer
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()


def picture() -> bytes:
    sink = io.BytesIO()
    Image.fromarray(PIXELS).save(sink, "PNG")
    return sink.getvalue()


def close(a: Any, b: Any) -> bool:
    return bool(np.abs(a - b).max() < 1e-5)


def test_every_way_to_pass_a_picture_gives_its_vector(
    model: rzen.Embedder, files: Path, server: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = boto3.client("s3", endpoint_url=s3_endpoint)
    client.create_bucket(Bucket="pictures")
    client.put_object(Bucket="pictures", Key="my folder/a.png", Body=picture())
    client.put_object(Bucket="pictures", Key="a.png", Body=picture())
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.chdir(files)
    Server.pages = {
        "/a.png": (200, {}, picture()),
        "/a%20b.png": (200, {}, picture()),
        "/picture?id=3": (200, {"Content-Type": "image/png; charset=x"}, picture()),
        "/moved": (302, {"Location": "/a.png"}, b""),
    }
    path = files / "a.png"
    ways: list[Any] = [
        *("a.png", str(path), path, Path("a.png"), path.as_uri()),
        *("s3://pictures/a.png", {"image": "s3://pictures/my folder/a.png"}),
        *(f"{server}/a.png", f"{server}/moved", f"{server}/picture?id=3", {"image": f"{server}/a b.png"}),
        *(Image.open(path), PIXELS, {"image": PIXELS}, {"image": [path]}, {"image": "a.png", "text": ""}),
    ]
    expected = model.encode([DecodedInput(visuals=(Visual("image", PIXELS[None]),))])
    found = model.encode(ways)
    assert found.shape == (len(ways), 64)
    for given, vector in zip(ways, found, strict=True):
        assert close(vector, expected[0]), given


def test_videos_pages_and_mixes(model: rzen.Embedder, files: Path) -> None:
    video = model.encode([CLIP, {"video": CLIP}, DecodedInput(visuals=(Visual("video", CLIP),))])
    assert close(video[1:], video[:1])
    clip = model.encode([files / "clip.mp4", {"video": str(files / "clip.mp4")}, (files / "clip.mp4").as_uri()])
    assert close(clip[1:], clip[:1])
    name = str(files / "three.pdf")
    pages = model.encode([f"{name}#page=0", f"{name}#page=1", Path(f"{name}#page=2")])
    assert np.abs(pages[0] - pages[1]).max() > 1e-4
    assert np.abs(pages[1] - pages[2]).max() > 1e-4
    named = [{"document": name, "page": 1}, {"document": f"{name}#page=1"}, (files / "three.pdf").as_uri() + "#page=1"]
    assert close(model.encode(named), pages[1])
    alone = model.encode([files / "one.pdf", f"{files}/one.pdf#page=0"])
    assert close(alone[0], alone[1])
    assert close(alone[0], pages[0])
    image = Visual("image", PIXELS[None])
    mixes = [
        {"image": files / "a.png", "text": TEXTS[0]},
        {"text": TEXTS[1], "image": [PIXELS, PIXELS], "video": CLIP, "instruction": "Find it."},
    ]
    expected = [
        DecodedInput(TEXTS[0], (image,), "Say it."),
        DecodedInput(TEXTS[1], (image, image, Visual("video", CLIP)), "Find it."),
    ]
    assert close(model.encode(mixes, instruction="Say it."), model.encode(expected))


def test_pictures_in_memory_are_shown_as_those_in_files(model: rzen.Embedder, tmp_path: Path) -> None:
    """Turned by Exif, transparent, with a palette, gray of 16 bits: the same pixels, and the image stays as it was."""
    rgba = Image.fromarray(np.dstack([PIXELS, np.where(PIXELS[..., 0] > 128, 255, 0)]).astype(np.uint8), "RGBA")
    turned = Image.fromarray(PIXELS)
    turned.getexif()[0x0112] = 6
    gray = Image.fromarray(PIXELS[..., 0].astype(np.uint16) * 257)
    palette = Image.fromarray(PIXELS).convert("P")
    palette.info["transparency"] = 3
    for number, (image, form) in enumerate(((rgba, "png"), (turned, "png"), (gray, "png"), (palette, "png"))):
        path = tmp_path / f"{number}.{form}"
        image.save(path, exif=image.getexif())
        opened = Image.open(path)
        before = dict(opened.info)
        in_file, in_memory, again = model.encode([path, opened, opened])
        assert close(in_memory, in_file), number
        assert close(again, in_file), number
        assert opened.info == before


def test_one_input_gives_one_vector_and_none_give_none(model: rzen.Embedder, files: Path) -> None:
    several = model.encode([TEXTS[0], TEXTS[1]])
    one = model.encode(TEXTS[0])
    assert (one.shape, one.dtype, several.shape) == ((64,), np.float32, (2, 64))
    assert close(one, several[0])
    for single in (files / "a.png", PIXELS, CLIP, Image.fromarray(PIXELS), {"text": "x"}, DecodedInput("x")):
        assert model.encode(single).shape == (64,)
    assert model.encode([]).shape == (0, 64)
    for same in (tuple(TEXTS[:2]), iter(TEXTS[:2]), np.array(TEXTS[:2]), np.array(TEXTS[:2], dtype=object)):
        assert close(model.encode(same), several)


def test_instructions_and_tasks(model: rzen.Embedder) -> None:
    asked = DecodedInput(TEXTS[0], instruction="Find an image that matches the given caption:")
    kept = DecodedInput(TEXTS[0], instruction="Keep it.")
    assert close(model.encode(TEXTS[0], task="text_image"), model.encode(asked))
    shown = DecodedInput(TEXTS[0], instruction="Understand the content of the provided document image.")
    assert close(model.encode(TEXTS[0], task="text_page", role="target"), model.encode(shown))
    given = [kept, {"text": TEXTS[0], "instruction": "Keep it."}]
    assert close(model.encode(given, instruction="Find it."), model.encode(kept))
    without = {"text": TEXTS[0], "instruction": ""}
    assert close(model.encode(without, instruction="Find it."), model.encode(TEXTS[0]))
    with pytest.raises(UserError, match=r"task='image': is not known; use text_image, text_page"):
        model.encode(TEXTS[0], task="image")
    with pytest.raises(UserError, match="are both given"):
        model.encode(TEXTS[0], task="text_image", instruction="Find it.")
    with pytest.raises(UserError, match="role='document': is not known"):
        model.encode(TEXTS[0], task="text_image", role="document")  # type: ignore[arg-type]


def test_dimensions_batch_size_device_and_progress(model: rzen.Embedder, capsys: pytest.CaptureFixture[str]) -> None:
    whole = model.encode(TEXTS)
    cut = model.encode(TEXTS, dimensions=16)
    assert np.allclose(np.linalg.norm(cut, axis=1), 1, atol=1e-6)
    assert close(cut, whole[:, :16] / np.linalg.norm(whole[:, :16], axis=1, keepdims=True))
    assert model.encode(TEXTS[0], dimensions=16).shape == (16,)
    assert model.dimensions == model.encode(TEXTS, dimensions=64).shape[1] == 64
    for wrong in (0, 65):
        with pytest.raises(UserError, match=f"dimensions: is {wrong}; use 1 to 64"):
            model.encode(TEXTS, dimensions=wrong)
    sizes: list[int] = []
    hook = model.model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert close(model.encode(TEXTS, batch_size=2), whole)
    hook.remove()
    assert sizes == [2, 2, 1]
    with pytest.raises(UserError, match="batch_size: is 0"):
        model.encode(TEXTS, batch_size=0)
    capsys.readouterr()
    assert close(model.encode(TEXTS, device="cpu", show_progress_bar=True, normalize_embeddings=True), whole)
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert not shown.out
    with pytest.raises(UserError, match="vectors have length 1"):
        model.encode(TEXTS, normalize_embeddings=False)


def test_device_moves_the_model(model: rzen.Embedder) -> None:
    import copy

    moved = copy.copy(model)
    moved.model = copy.deepcopy(model.model)
    with pytest.raises(NotImplementedError):  # tensors on `meta` have no values
        moved.encode(TEXTS[0], device="meta")
    assert {parameter.device.type for parameter in moved.model.parameters()} == {"meta"}


def test_texts_paths_and_urls_are_told_apart(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    (files / "two words.png").write_bytes(picture())
    (files / "notes.txt").write_text("x")
    for text in (
        *(
            "a red circle",
            "",
            ".jpg",
            "png",
            "jpg, png and pdf",
            "the end of cat.jpg",
            "3.5",
            "e.g. Dr.Who",
            "x" * 9000,
        ),
        *(
            "notes",
            "index.html",
            "missing.txt",
            "see https://example.com/a.png",
            "https://example.com/a b.png",
            "and/or",
        ),
        *("a.png\nb", "line\na.png", "http:// is a scheme", "3://4 is a fraction", f"{'x' * 300}.txt", "~nobody/a.txt"),
    ):
        assert not is_file(text), text
    for path in ("a.png", "./a.png", "two words.png", "three.pdf#page=2", "https://x.org", "s3://b/k", "FILE:///a.png"):
        assert is_file(path), path
    for missing in ("b.png", "A.JPEG", "no such/folder a.mp4", "four.pdf#page=0", f"{'x' * 300}.png", "~nobody/a.png"):
        with pytest.raises(UserError, match="does not exist; correct the path; for a text, add words or pass"):
            is_file(missing)
    with pytest.raises(UserError, match=r"notes.txt: is a file with the extension '.txt'; files may have .jpg"):
        is_file("notes.txt")
    (files / "and").mkdir()
    (files / "two words").mkdir()
    for text in ("and", "and/or", "two words/", "see and/"):
        assert not is_file(text), text
    for folder in ("and/", "./and", str(files)):
        with pytest.raises(UserError, match=r"is a folder; embed its files with `rzen embed`; for a text, add words"):
            is_file(folder)


def test_a_text_of_a_dict_is_never_a_file(model: rzen.Embedder, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(files)
    for text in ("a.png", "b.png", "https://nobody.invalid/a.png"):
        assert close(model.encode({"text": text}), model.encode(DecodedInput(text=text)))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (3, "int is not an input; pass a text, a path"),
        (None, "NoneType is not an input"),
        (b"bytes", "bytes is not an input"),
        (["a", "b"], "list is not an input"),
        ("missing.png", "missing.png: does not exist"),
        (
            "ftp://host/a.png",
            "has the scheme 'ftp'; use http, https, s3, gs, gcs, abfs, abfss, hf, file",
        ),
        ("data:image/png;base64,iVBO", "has the scheme 'data'"),
        (Path("a.doc"), r"a.doc: has the extension '.doc'"),
        (np.zeros((4, 4, 4), np.uint8), r"is an array \[4, 4, 4\] of uint8; pass uint8 RGB"),
        (np.zeros((4, 4, 3), np.float32), r"is an array \[4, 4, 3\] of float32"),
        ({"video": PIXELS}, "has pixels of one image for 'video'"),
        ({"picture": PIXELS}, "has the key 'picture'; use text, image, video, document, page, instruction"),
        ({}, "has neither text nor media"),
        ({"text": "", "image": None}, "has neither text nor media"),
        ({"text": 3}, "has text=int; pass a str"),
        ({"text": "x", "page": 0}, "has page=0; name one document"),
        ({"image": "three.pdf"}, "three.pdf: is a document, not a image"),
        ("three.pdf", r"three.pdf: has 3 pages; an input is one page: write #page=0 to #page=2 after the name"),
        ("a.png#page=1", "a.png: is a image and has no page 1"),
    ],
)
def test_what_is_no_input_is_refused_with_its_place(
    model: rzen.Embedder, files: Path, given: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(files)
    with pytest.raises(UserError, match=rf"^inputs\[2\].*{problem}"):
        model.encode(["fine", TEXTS[0], given])


@pytest.mark.parametrize(
    ("given", "reason", "detail"),
    [
        (Path("b.png"), "missing_file", r"inputs\[1\]: b.png"),
        ("broken.png", "unsupported_format", r"inputs\[1\]: broken.png: begins with b'broken'"),
        ("three.pdf#page=3", "no_such_page", r"inputs\[1\]: three.pdf: page 3 of 3"),
        ("large.png", "too_many_bytes", r"inputs\[1\]: large.png"),
        (np.zeros((400, 300, 3), np.uint8), "too_many_pixels", r"inputs\[1\]: 300 x 400"),
        (Image.new("RGB", (400, 300)), "too_many_pixels", r"inputs\[1\]: 400 x 300"),
        (np.zeros((1, 300, 3), np.uint8), "extreme_aspect_ratio", r"inputs\[1\]: 300 x 1"),
        ("s3://absent-pictures/a.png", "missing_file", "absent-pictures"),
        ("s3://broken-pictures/b.png", "missing_file", r"inputs\[1\]: s3://broken-pictures/b.png"),
        ("s3://broken-pictures/large.png", "too_many_bytes", r"1048577 bytes, at most 1048576"),
    ],
)
def test_files_that_cannot_be_used_are_named_with_a_countable_reason(
    model: rzen.Embedder,
    files: Path,
    given: Any,
    reason: str,
    detail: str,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(files)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    (files / "broken.png").write_bytes(b"broken")
    (files / "large.png").write_bytes(bytes((1 << 20) + 1))
    if "broken-pictures" in str(given):
        client = boto3.client("s3", endpoint_url=s3_endpoint)
        client.create_bucket(Bucket="broken-pictures")
        client.put_object(Bucket="broken-pictures", Key="large.png", Body=bytes((1 << 20) + 1))
    with pytest.raises(BadMedia, match=detail) as error:
        model.encode([TEXTS[0], given])
    assert error.value.reason == reason


def test_a_damaged_picture_in_memory_is_refused(model: rzen.Embedder, tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture()[:4000])
    with pytest.raises(BadMedia, match=r"corrupt_image: input: "):
        model.encode(Image.open(tmp_path / "cut.png"))


def test_servers_have_limits(model: rzen.Embedder, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_PAUSES_S", (0.01, 0.01))
    large = bytes((1 << 20) + 1)
    Server.pages = {
        "/gone.png": (404, {}, b""),
        "/refused.png": (403, {}, b""),
        "/page": (200, {"Content-Type": "text/html"}, b"<p>"),
        "/large.png": (200, {"Content-Length": str(1 << 40)}, b""),
        "/unsized.png": (200, {"Content-Length": "", "Connection": "close"}, large),
        "/busy.png": (503, {}, b""),
        "/circle.png": (302, {"Location": "/circle.png"}, b""),
        "/file.png": (302, {"Location": "file:///etc/passwd"}, b""),
        "/ftp.png": (302, {"Location": "ftp://127.0.0.1/a.png"}, b""),
    }
    for path, reason, detail in (
        ("gone.png", "missing_file", "answered 404"),
        ("refused.png", "unreadable_file", "answered 403"),
        ("page", "unsupported_format", "the server sends text/html"),
        ("large.png", "too_many_bytes", f"{1 << 40} bytes"),
        ("unsized.png", "too_many_bytes", f"more than {1 << 20} bytes"),
        ("busy.png", "unreadable_file", "answered 503"),
        ("circle.png", "unreadable_file", "answered 302"),
        ("file.png", "unreadable_file", "not allowed"),
        ("ftp.png", "unreadable_file", "redirects to ftp://"),
    ):
        with pytest.raises(BadMedia, match=rf"^{reason}: inputs\[1\]: {server}/{path}: .*{detail}"):
            model.encode([TEXTS[0], f"{server}/{path}"])
    with pytest.raises(BadMedia, match=r"unreadable_file: input: http://nobody.invalid/a.png"):
        model.encode("http://nobody.invalid/a.png")
    with pytest.raises(BadMedia, match=r"unreadable_file: input: http://\*\*\*@127.0.0.1/a.png") as error:
        model.encode("http://me:secret@127.0.0.1/a.png")
    assert "secret" not in str(error.value)


def test_urls_are_fetched_at_once_and_each_once(model: rzen.Embedder, server: str) -> None:
    together = threading.Barrier(4)
    Server.pages |= {f"/slow/{number}.png": together for number in range(4)}
    Server.pages["/once.png"] = [(200, {}, picture())]  # a second request would find nothing
    urls = [f"{server}/slow/{number}.png" for number in range(4)]
    once = f"{server}/once.png"
    inputs = [urls[0], {"text": "a", "image": [once, urls[1]]}, once, *urls[2:], "a text"]
    expected = model.encode([PIXELS, {"text": "a", "image": [PIXELS, PIXELS]}, *[PIXELS] * 3, "a text"])
    assert close(model.encode(inputs), expected)


def test_a_url_that_fails_is_named_by_its_position(model: rzen.Embedder, server: str) -> None:
    Server.pages |= {"/good.png": (200, {}, picture()), "/gone.png": (404, {}, b"")}
    with pytest.raises(BadMedia, match=r"missing_file: inputs\[2\]: .*/gone.png"):
        model.encode([f"{server}/good.png", "text", f"{server}/gone.png", f"{server}/good.png"])


def test_a_server_that_is_busy_or_breaks_off_is_asked_again(
    model: rzen.Embedder, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(web, "_PAUSES_S", (0.01, 0.01))
    broken = {"Content-Length": str(len(picture())), "Connection": "close"}
    Server.pages = {"/a.png": [(503, {}, b""), (200, broken, picture()[:50]), (200, {}, picture())]}
    assert close(model.encode(f"{server}/a.png"), model.encode(PIXELS))


def test_a_slow_server_is_given_up(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "_TIMEOUT_S", 0.0)
    monkeypatch.setattr(web, "_MIN_BYTES_PER_S", 1 << 50)
    monkeypatch.setattr(web.urllib.request.OpenerDirector, "open", _without_timeout(web.urllib.request))
    Server.pages = {"/a.png": (200, {}, picture())}
    with pytest.raises(BadMedia, match="bytes per second"):
        web.read_url(f"{server}/a.png", 1 << 20)


def _without_timeout(module: Any) -> Any:
    opened = module.OpenerDirector.open
    return lambda self, request, timeout: opened(self, request)


def test_a_public_server_cannot_redirect_into_a_private_network(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Server.pages = {"/a.png": (302, {"Location": f"{server}/b.png"}, b""), "/b.png": (200, {}, picture())}
    assert web.read_url(f"{server}/a.png", 1 << 20).data == picture()  # a private one may
    seen = []

    def is_private(host: str | None, known: Any = web._is_private) -> bool:
        seen.append(host)
        return len(seen) == 1 and known(host)  # the first question is for the target

    monkeypatch.setattr(web, "_is_private", is_private)
    with pytest.raises(BadMedia, match=r"redirects to the private address 127.0.0.1"):
        web.read_url(f"{server}/a.png", 1 << 20)


@pytest.mark.parametrize(
    ("host", "private"),
    [
        ("127.0.0.1", True),
        ("10.1.2.3", True),
        ("169.254.169.254", True),
        ("::1", True),
        ("8.8.8.8", False),
    ],
)
def test_private_addresses(host: str, private: bool) -> None:
    assert web._is_private(host) == private


def test_similarity_is_the_cosine_of_any_vectors(model: rzen.Embedder) -> None:
    vectors = model.encode(TEXTS)
    assert close(model.similarity(vectors, vectors[:2]), vectors @ vectors[:2].T)
    assert model.similarity(vectors[0], vectors).shape == (1, 5)
    assert close(model.similarity([3, 0], [[2, 2], [0, 0]]), [[0.5**0.5, 0]])
    assert model.similarity(vectors.astype(np.float64), vectors).dtype == np.float32
    with pytest.raises(UserError, match="similarity: has vectors of width 64, not 16"):
        model.similarity(vectors, vectors[:, :16])


def test_names_of_inputs_are_short_and_hold_no_secret() -> None:
    assert shown_as("a\nred  circle") == "a red circle"
    assert shown_as("https://me:secret@x.org/a.png") == "https://***@x.org/a.png"
    assert len(shown_as("x" * 500)) == 80
    assert shown_as({"image": Path("a.png"), "text": "in blue", "instruction": "Find it."}) == "a.png + in blue"
    assert shown_as({"image": PIXELS}) == shown_as(PIXELS) == "image"
    assert (shown_as(CLIP), shown_as(DecodedInput("x"))) == ("video", "x")


def test_a_model_is_loaded_from_a_url_with_its_adapter_and_no_name(
    tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.storage.location import open_store

    folder = Path(tiny_checkpoint(tmp_path / "model"))
    monkeypatch.setenv("RZEN_CACHE", str(tmp_path / "cache"))
    store = open_store("s3://loaded/model", s3_endpoint)
    store.ensure_bucket()
    store.upload_tree(folder)
    expected = rzen.load(folder).encode(TEXTS)
    assert np.array_equal(rzen.load("s3://loaded/model", endpoint=s3_endpoint).encode(TEXTS), expected)
    assert np.array_equal(rzen.load(folder.as_uri()).encode(TEXTS), expected)
    with pytest.raises(UserError, match="s3://loaded/gone: there is nothing"):
        rzen.load("s3://loaded/gone", endpoint=s3_endpoint)
    with pytest.raises(UserError, match="is neither a directory nor a hub name"):
        rzen.load(tmp_path / "gone")
