"""A Chromium without a window, which is told what to do by its DevTools protocol."""

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

    async def evaluate(self, expression: str) -> str:
        """The value of an expression in JavaScript; nothing while another page comes."""
        told = await self.tell("Runtime.evaluate", expression=expression)
        return "" if "error" in told else str(told["result"]["result"].get("value", ""))

    async def wait_for(self, pattern: str) -> str:
        """The text of the page, as soon as it has the pattern."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not re.search(pattern, text := await self.evaluate("document.body ? document.body.innerText : ''")):
            assert time.monotonic() < deadline_s, f"no {pattern} on the page:\n{text}"
            await asyncio.sleep(0.5)
        return text

    async def picture(self, path: Path) -> None:
        """A PNG file of what a reader sees."""
        told = await self.tell("Page.captureScreenshot")
        path.write_bytes(base64.b64decode(told["result"]["data"]))

    async def click(self, label: str) -> None:
        """The button with this label."""
        buttons = f"[...document.querySelectorAll('button')].filter(one => one.textContent == {label!r})"
        await self.evaluate(f"{buttons}[0].click()")

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
