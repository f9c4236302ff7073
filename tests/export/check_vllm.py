"""Exports in vLLM's server: texts, instructions, images and pages as messages, widths, and what plain `input` gives.

    python -m tests.export.check_vllm OUT              starts `vllm serve` for each export
    python -m tests.export.check_vllm OUT --url URL    asks a server that runs, such as `rzen serve OUT/vllm`

needs vllm, numpy and Pillow, and the folder that `make.py` has written. Of rzen it imports nothing.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.export.inputs import TEXT, Input, make_inputs
from tests.export.report import largest, report

EXPORT, TOKEN_PX, WIDTH = "vllm", 28, 64
START_S = 900.0
NOTES = """\
Largest difference from rzen's own vectors in fp32, on a tiny Qwen2-VL with a merged adapter, by `vllm serve --runner
pooling --dtype float32`. Inputs are messages, the instruction is the system message, pixels are PNG in data URIs.
Images that need a resize are resized by torchvision, which rounds otherwise than Pillow. Videos are not asked: a data
URI holds a compressed video, of which every decoder makes other pixels. "plain input" is the text alone as `input`,
without the chat template: it is another vector, and not an error of vLLM."""
RESIZED = {"image, resized", "page, shrunk", "two images + text", "plain input"}


def messages(one: Input) -> list[dict[str, Any]]:
    """An input as vLLM takes it."""
    content: list[dict[str, Any]] = []
    for visual in one.visuals:
        sink = io.BytesIO()
        Image.fromarray(visual.pixels[0]).save(sink, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(sink.getvalue()).decode()}"
        content.append({"type": "image_url", "image_url": {"url": url}})
    if one.text:
        content.append({"type": "text", "text": one.text})
    system = [{"role": "system", "content": one.instruction}] if one.instruction else []
    return [*system, {"role": "user", "content": content}]


def embed(url: str, **body: Any) -> np.ndarray:
    """The vector that a server gives. Raises `urllib.error.HTTPError`."""
    data = json.dumps({"encoding_format": "float"} | body).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return np.array(json.load(answer)["data"][0]["embedding"], np.float32)


@contextmanager
def vllm_server(folder: Path) -> Iterator[str]:
    """URL of vLLM with a model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["vllm", "serve", str(folder), "--runner", "pooling", "--dtype", "float32", "--max-model-len", "4096"]
    process = subprocess.Popen([*command, "--host", "127.0.0.1", "--port", str(port)])
    url = f"http://127.0.0.1:{port}"
    try:
        deadline_s = time.monotonic() + START_S
        while not _answers(f"{url}/health"):
            if process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"vLLM did not start in {START_S:g} s")
            time.sleep(1)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5):
            return True
    except OSError:
        return False


def compare(url: str, expected: Any) -> dict[str, float | str]:
    """Kind of input -> difference. Ends the program if a width is not that of the training."""
    found: dict[str, float | str] = {}
    for name, one in make_inputs(TOKEN_PX).items():
        if not any(visual.kind == "video" for visual in one.visuals):
            found[name] = float(np.abs(embed(url, messages=messages(one)) - expected[name]).max())
    found["plain input"] = float(np.abs(embed(url, input=TEXT) - expected["text"]).max())
    whole = expected["text"][:WIDTH]
    part = embed(url, messages=messages(Input(TEXT)), dimensions=WIDTH)
    found[f"{WIDTH} dimensions"] = float(np.abs(part - whole / np.linalg.norm(whole)).max())
    try:
        embed(url, messages=messages(Input(TEXT)), dimensions=WIDTH - 1)
    except urllib.error.HTTPError as error:
        found[f"{WIDTH - 1} dimensions"] = f"status {error.code}"
    else:
        sys.exit(f"{WIDTH - 1} dimensions, for which the model was not trained, were given")
    return found


def main() -> None:
    """Compares, and writes the result of vLLM beside this file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of make.py")
    parser.add_argument("--url", help="server that runs")
    options = parser.parse_args()
    expected = np.load(options.out / f"{EXPORT}.npz")
    if options.url:
        column = compare(options.url, expected)
        print("\n".join(f"{name}: {value}" for name, value in column.items()))
    else:
        with vllm_server(options.out / EXPORT) as url:
            column = compare(url, expected)
        text = report("Exports in vLLM", ("vllm", "torch", "transformers"), {"qwen2_vl": column}, NOTES)
        print(text)
        Path(__file__).with_name("vllm.md").write_text(text)
    if largest({"": {name: value for name, value in column.items() if name not in RESIZED}}) > 1e-5:
        sys.exit("more than 1e-5")


if __name__ == "__main__":
    main()
