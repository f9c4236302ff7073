"""Ray's dashboard as a browser shows it: who has the token sees the job that was submitted, and others see nothing.

Chromium runs without a window and is told what to do by its DevTools protocol. Without Chromium the test is skipped.
"""

import asyncio
import base64
import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.infra.local_cluster import local_cluster

CHROMIUM = shutil.which("chromium")
PATIENCE_S = 120


class Page:
    """A page of a running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count()

    async def tell(self, method: str, **params: Any) -> dict[str, Any]:
        """What the browser answers to a command: `result`, or `error`."""
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while True:
            answer: dict[str, Any] = await self._socket.receive_json(timeout=PATIENCE_S)
            if answer.get("id") == number:
                return answer

    async def text(self) -> str:
        """What a reader sees; nothing while another page comes."""
        told = await self.tell("Runtime.evaluate", expression="document.body ? document.body.innerText : ''")
        return "" if "error" in told else str(told["result"]["result"]["value"])

    async def wait_for(self, pattern: str) -> str:
        """The text of the page, as soon as it has the pattern."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not re.search(pattern, text := await self.text()):
            assert time.monotonic() < deadline_s, f"no {pattern} on the page:\n{text}"
            await asyncio.sleep(0.5)
        return text

    async def picture(self, path: Path) -> None:
        """A PNG file of what a reader sees."""
        told = await self.tell("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(told["result"]["data"]))

    async def type(self, text: str) -> None:
        """Into the field that has the focus, and Enter."""
        await self.tell("Input.insertText", text=text)
        for kind in ("keyDown", "keyUp"):
            await self.tell("Input.dispatchKeyEvent", type=kind, key="Enter", windowsVirtualKeyCode=13, text="\r")


@asynccontextmanager
async def browser(folder: Path) -> AsyncIterator[Page]:
    """An empty page of a Chromium that keeps everything in `folder`."""
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += ["--no-first-run", f"--user-data-dir={folder}", "--remote-debugging-port=0", "about:blank"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        port = folder / "DevToolsActivePort"
        deadline_s = time.monotonic() + PATIENCE_S
        while not port.is_file() or not port.read_text().strip():
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline_s, "Chromium does not start"
            await asyncio.sleep(0.2)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port.read_text().splitlines()[0]}/json") as answer:
                (page,) = [some for some in json.loads(await answer.text()) if some["type"] == "page"]
            async with session.ws_connect(page["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                yield Page(socket)
    finally:
        process.terminate()
        process.wait(30)


def submit(environment: dict[str, str], name: str, code: str) -> None:
    """A job of one line of Python, as soon as the job server answers."""
    command = ["ray", "job", "submit", "--no-wait", f"--submission-id={name}", "--", "python", "-c", code]
    deadline_s = time.monotonic() + PATIENCE_S
    while (done := subprocess.run(command, env=environment, capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline_s, done.stdout + done.stderr
        time.sleep(1)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
def test_the_job_page_shows_jobs_with_their_states_to_who_has_the_token(tmp_path: Path) -> None:
    with local_cluster("--num-cpus=1") as cluster:
        submit(cluster.environment, "rzen-good", "print('done')")
        submit(cluster.environment, "rzen-bad", "raise SystemExit('no such data')")
        url, token = (cluster.environment[name] for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"))
        asyncio.run(look(tmp_path, url, token))


async def look(folder: Path, url: str, token: str) -> None:
    """As somebody who mistypes the token at first."""
    async with browser(folder) as page:
        await page.tell("Page.navigate", url=f"{url}/#/jobs")
        refused = await page.wait_for("Authentication Token Required")
        assert "rzen-" not in refused
        await page.type("f" * 64)
        assert "rzen-" not in await page.wait_for("Invalid authentication token")

        await page.tell("Page.navigate", url="about:blank")
        await page.tell("Page.navigate", url=f"{url}/#/jobs")
        await page.wait_for("Authentication Token Required")
        await page.type(token)
        row = "{}(?:(?!rzen-).)*{}".format  # the states are in the rows that they belong to
        await page.wait_for(f"(?s)(?=.*{row('rzen-good', 'SUCCEEDED')})(?=.*{row('rzen-bad', 'FAILED')})")

        await page.picture(folder / "jobs.png")  # for whoever wants to see; pytest keeps the folders of three runs
        assert (folder / "jobs.png").stat().st_size > 10_000

        await page.tell("Page.navigate", url=f"{url}/#/jobs/rzen-bad")
        await page.wait_for(r"(?s)\A(?!.*rzen-good).*rzen-bad.*FAILED")
