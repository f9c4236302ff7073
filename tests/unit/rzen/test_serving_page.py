"""The search page in a browser: words, a dropped picture, filters, a link that repeats a search."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

import rzen
from pipelines.config import DataConfig
from rzen.config import ModelIdentity, PromptConfig
from rzen.export.export import ExportOptions, export_model
from rzen.serving.engine import Engine, EngineSettings
from rzen.serving.guards import ApiKeys
from rzen.serving.place import Place
from tests.chromium import CHROMIUM, PATIENCE_S, Page, browser
from tests.serving import http_server
from tests.tiny import tiny_checkpoint
from tests.vectors import MEDIA, embed_corpus, embed_folder, picture, publish_mixed, scenes

KEY = "a key of the tests"
DROP = """
(() => {
  const bytes = Uint8Array.from(atob("%s"), (one) => one.charCodeAt(0));
  const moved = new DataTransfer();
  moved.items.add(new File([bytes], "a.png", { type: "image/png" }));
  document.dispatchEvent(new DragEvent("drop", { dataTransfer: moved, bubbles: true, cancelable: true }));
})()
"""
SHOWN = "[...document.querySelectorAll('#hits .facts')].map((one) => one.textContent).join('|')"
LOADED = "[...document.querySelectorAll('#hits img')].filter((one) => one.naturalWidth > 0).length"


FIRST = "document.querySelector('#hits li')"
COLOR = """
(() => {
  const video = document.querySelector("#hits video");
  if (!video || video.readyState < 2) return "";
  const canvas = new OffscreenCanvas(1, 1).getContext("2d");
  canvas.drawImage(video, 0, 0, 1, 1);
  const [red, green, blue] = canvas.getImageData(0, 0, 1, 1).data;
  return `${[red, green, blue].map((one) => Math.round(one / 250))} ${video.title}`;
})()
"""


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    identity = ModelIdentity(prompt=PromptConfig(max_visual_tokens=16))
    export_model(tiny_checkpoint(folder / "base"), None, folder / "model", identity, ExportOptions(dtype="float32"))
    publish_mixed(folder / "data", 4)
    data = DataConfig(root=str(folder / "data"), media=MEDIA)
    embed_corpus(rzen.load(folder / "model", media=MEDIA), data, folder / "vectors")
    (folder / "keys").write_text(f"{KEY}\n")
    engine = Engine(EngineSettings(media=MEDIA))
    engine.load(Place(str(folder / "model"), corpus=str(folder / "vectors")))
    with http_server(engine, ApiKeys(str(folder / "keys"))) as url:
        yield url
    engine.close()


def test_the_page_needs_no_key_and_loads_nothing_from_elsewhere(url: str) -> None:
    for path, kind in (("/", "text/html"), ("/page/search.js", "text/javascript"), ("/page/search.css", "text/css")):
        with urllib.request.urlopen(f"{url}{path}") as answer:
            assert answer.headers["Content-Type"].startswith(kind)
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert b"http" not in answer.read()


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_people_search_with_words_and_pictures(url: str, tmp_path: Path) -> None:
    async def look() -> None:
        async with browser(tmp_path) as page:
            await page.tell("Page.enable")
            await page.tell("Page.navigate", url=f"{url}/#q=a+red+circle&show=page")
            await page.wait_for("a key is needed")
            await page.evaluate(f"sessionStorage.setItem('key', '{KEY}'); location.reload()")
            await page.wait_for(r"4 hits in")  # the address repeats the search, with its filter
            assert {fact.split(",")[0].split(". ")[1] for fact in (await page.evaluate(SHOWN)).split("|")} == {"page"}
            await page.evaluate("document.querySelector('#filters input[value=page]').click()")
            await page.wait_for(r"16 hits in")
            while await page.evaluate(LOADED) != "12":  # of images, pages and videos
                await asyncio.sleep(0.1)
            if folder := os.environ.get("RZEN_TEST_PICTURES"):
                await page.picture(Path(folder, "search.png"))
            await page.evaluate("document.querySelector('#query').value = ''")
            await page.evaluate(DROP % base64.b64encode(picture(3)).decode())
            while not (first := await page.evaluate(SHOWN)).startswith("1. image, 1.000"):
                await asyncio.sleep(0.1)
            assert first.split("|")[0].endswith("3.png")
            await page.evaluate("document.querySelector('#remove').click(); document.querySelector('#query').focus()")
            await page.type("a blue square")
            await page.wait_for(r"16 hits in")
            assert json.loads(await page.evaluate("JSON.stringify(location.hash)")) == "#q=a+blue+square"

    asyncio.run(asyncio.wait_for(look(), 120))


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_a_moment_of_a_video_is_found_played_and_asked_with(tmp_path: Path) -> None:
    """A video of five colors is one hit with five moments. The page plays the one that was chosen."""
    identity = ModelIdentity(prompt=PromptConfig(max_visual_tokens=16))
    export_model(tiny_checkpoint(tmp_path / "base"), None, tmp_path / "model", identity, ExportOptions(dtype="float32"))
    (tmp_path / "media").mkdir()
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    (tmp_path / "media/film.webm").write_bytes(scenes(colors, 2, "webm", "libvpx-vp9"))
    (tmp_path / "media/photo.png").write_bytes(picture(1))
    embed_folder(tmp_path / "model", tmp_path / "media", tmp_path / "vectors", "--segment-seconds", "2")
    engine = Engine(EngineSettings(media=MEDIA))
    engine.load(Place(str(tmp_path / "model"), corpus=str(tmp_path / "vectors")))

    (tmp_path / "browser").mkdir()

    async def until(page: Page, expression: str, expected: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while expected not in (found := await page.evaluate(expression)):
            assert time.monotonic() < deadline_s, f"{found!r} is not {expected!r}"
            await asyncio.sleep(0.1)

    async def look(url: str) -> None:
        async with browser(tmp_path / "browser") as page:
            await page.tell("Page.enable")
            await page.tell("Page.navigate", url=f"{url}/#q=a+color&show=video")
            await page.wait_for("1 hits in")  # the segments of a video are one hit
            await until(page, LOADED, "1")
            buttons = f"[...{FIRST}.querySelectorAll('button')].map((one) => one.textContent).join('|')"
            starts = (await page.evaluate(buttons)).split("|")
            assert starts[:2] == ["Play", "More like this"]
            assert len(starts) == 6
            place = (await page.evaluate(SHOWN)).split("film.webm ")[1]
            assert {place.split("-")[0], *starts[2:]} == {"0:00", "0:02", "0:04", "0:06", "0:08"}
            for start in (place.split("-")[0], *starts[2:4]):
                await page.click("Play" if start == place.split("-")[0] else start)
                second = int(start[-1])
                color = ",".join(str(one // 250) for one in colors[second // 2])
                await until(page, COLOR, f"{color} film.webm {start}-0:{second + 2:02}")
            if folder := os.environ.get("RZEN_TEST_PICTURES"):
                await page.picture(Path(folder, "moments.png"))
            await page.click("More like this")
            await page.wait_for(f"Like film.webm {place}")
            await until(page, f"{buttons}.split('|').length", "5")  # without the moment that is asked with
            assert "like=" in await page.evaluate("location.hash")
            await page.evaluate("location.reload()")
            await page.wait_for(f"Like film.webm {place}")
            await page.wait_for("1 hits in")
            await page.evaluate("document.querySelector('#query').focus()")
            await page.type("a color")
            await until(page, f"{buttons}.split('|').length", "6")

    with http_server(engine) as url:
        asyncio.run(asyncio.wait_for(look(url), 120))
    engine.close()
