"""The server under a mixed load: latency, throughput against the offline engine, lost and wrong answers.

    python -m tests.benchmarks.serve --minutes 10 --write      writes serve.md
    python -m tests.benchmarks.serve --minutes 0.5 --clients 8   a glance
    python -m tests.benchmarks.serve --peer FOLDER --write       next to infinity; see serve_peer.py

Clients ask without a pause for the vectors of one to four items: texts of 5 to 400 words, and JPEGs of 60 to 900 pixels
a side. Every twentieth request has a bad item, which must be refused with its index. After a third of the time the
model is exchanged, after two thirds a replica is killed. Each vector is compared with that of the model of the answer.

The offline engine is `rzen.load(...).encode` on the same items, alone on the machine, before and after. Clients, proxy,
gateway and replica share the machine.
"""

from __future__ import annotations

import argparse
import base64
import io
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import rzen
from jobs.runtime.cluster import ray_cluster, set_environment
from jobs.runtime.local_s3 import free_port
from jobs.serving.serve import deploy
from jobs.serving.specs import ServeSpec
from rzen.export.export import ExportOptions, export_model
from rzen.model.backbone import build_tiny
from tests.benchmarks import serve_peer
from tests.benchmarks.encode import BACKBONE, IDENTITY
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import say

ITEMS, BAD_EVERY, CLOSE = 120, 20, 1e-5
CHUNK_TOKENS = 4096
Item = dict[str, Any]


def draw() -> list[Item]:
    """Two of three items are texts, the others images, as `/v1/embeddings` takes them."""
    rng = np.random.default_rng(0)
    items: list[Item] = []
    for number in range(ITEMS):
        if number % 3 < 2:
            low, high = (5, 30) if number % 2 else (100, 400)
            items.append({"text": " ".join(f"word{word}" for word in rng.integers(0, 90, rng.integers(low, high)))})
        else:
            height_px, width_px = (int(side) for side in rng.integers(60, 900, 2))
            small = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            sink = io.BytesIO()
            Image.fromarray(small).resize((width_px, height_px), Image.Resampling.BICUBIC).save(sink, "JPEG")
            items.append({"image": base64.b64encode(sink.getvalue()).decode()})
    return items


def offline(model: Path, items: Sequence[Item], folder: Path) -> tuple[np.ndarray, float]:
    """Vectors of the items, and items per second."""
    inputs: list[Any] = []
    for number, item in enumerate(items):
        if "image" in item:
            path = folder / f"{number}.jpg"
            path.write_bytes(base64.b64decode(item["image"]))
            inputs.append(path)
        else:
            inputs.append(item)
    embedder = rzen.load(model, chunk_tokens=CHUNK_TOKENS)
    embedder.encode(inputs[:8])
    start_s = time.perf_counter()
    vectors = embedder.encode(inputs)
    return vectors, len(items) / (time.perf_counter() - start_s)


@dataclass
class Load:
    """What clients have seen so far."""

    seconds: list[tuple[float, float]] = field(default_factory=list)
    """Start and duration of each request that was answered."""
    counts: Counter[str] = field(default_factory=Counter)
    items: int = 0
    failures: list[str] = field(default_factory=list)


class Clients:
    """Ask until they are stopped, and compare each answer with the vectors of its version."""

    def __init__(self, url: str, items: Sequence[Item], expected: dict[str, np.ndarray], clients: int) -> None:
        self._url, self._items, self._expected = url, items, expected
        self._done = threading.Event()
        self._lock = threading.Lock()
        self.load = Load()
        self._pool = ThreadPoolExecutor(clients)
        self._asking = [self._pool.submit(self._ask, number) for number in range(clients)]

    def stop(self) -> Load:
        self._done.set()
        for one in self._asking:
            one.result()
        self._pool.shutdown()
        return self.load

    def _ask(self, client: int) -> None:
        rng = np.random.default_rng(client)
        for number in itertools.count(1):
            if self._done.is_set():
                return
            rows = rng.integers(0, len(self._items), rng.integers(1, 5)).tolist()
            is_bad = number % BAD_EVERY == 0
            inputs = [self._items[row] for row in rows] + ([{"image": "bm90IGEgcGljdHVyZQ=="}] if is_bad else [])
            start_s = time.perf_counter()
            problem = self._problem(inputs, rows, is_bad)
            seconds = time.perf_counter() - start_s
            with self._lock:
                if problem == "refused":
                    self.load.counts["refused"] += 1
                elif problem:
                    self.load.failures.append(problem)
                else:
                    self.load.counts["bad item" if is_bad else "answered"] += 1
                    self.load.seconds.append((start_s, seconds))
                    self.load.items += 0 if is_bad else len(rows)

    def _problem(self, inputs: list[Item], rows: list[int], is_bad: bool) -> str:
        """Return what is wrong with an answer; nothing if it is right."""
        data = json.dumps({"input": inputs, "encoding_format": "base64"}).encode()
        request = urllib.request.Request(f"{self._url}/v1/embeddings", data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                content, version = json.loads(answer.read()), answer.headers["x-rzen-version"]
        except urllib.error.HTTPError as error:
            if error.code == 429:
                time.sleep(float(error.headers["Retry-After"]))
                return "refused"
            content = json.loads(error.read())
            if is_bad and (error.code, content["error"].get("index")) == (415, len(rows)):
                return ""
            return f"{error.code} {content['error']['message'][:100]}"
        except OSError as error:
            return f"lost: {error}"
        if is_bad:
            return "a bad item was accepted"
        rows_D = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in content["data"]]
        difference = float(np.abs(np.stack(rows_D) - self._expected[version][rows]).max())
        return "" if difference < CLOSE else f"a vector differs by {difference:.1e}"


def version_of(url: str) -> str:
    """Version of the model that answers now."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=120) as answer:
        version: str = json.loads(answer.read())["data"][0]["version"]
    return version


def kill_a_replica() -> None:
    """End the process of a model replica."""
    import ray

    actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "ModelReplica" in actor["name"]]
    replica = ray.get_actor(actors[0]["name"], actors[0]["namespace"])
    os.kill(ray.get(replica.__ray_call__.remote(lambda self: os.getpid())), signal.SIGKILL)


def measure(folder: Path, minutes: float, clients: int, replicas: int) -> tuple[str, bool]:
    """Return the report, and whether no answer was lost or wrong."""
    items = draw()
    texts = [item["text"] for item in items if "text" in item]
    models = {}
    for seed, name in enumerate("ab"):
        build_tiny(folder / f"base-{name}", BACKBONE.model_copy(update={"seed": seed}), texts)
        export_model(str(folder / f"base-{name}"), None, folder / name, IDENTITY, ExportOptions(dtype="float32"))
        models[name] = offline(folder / name, items, folder)
    spec = ServeSpec.model_validate(
        {
            "kind": "serve",
            "model": str(folder / "a"),
            "name": "bench",
            "port": free_port(),
            "replicas": replicas,
            "chunk_tokens": CHUNK_TOKENS,
            "cpus_per_replica": 0.5,
            "reload_s": None,
        }
    )
    with ray_cluster():
        from ray import serve

        url = deploy(spec)
        expected = {version_of(url): models["a"][0]}
        say(f"{url} answers; {clients} clients for {minutes:g} minutes")
        begun_s = time.perf_counter()
        load = _Exchange(Clients(url, items, expected, clients), expected, models["b"][0]).run(spec, folder, minutes)
        whole_s = time.perf_counter() - begun_s
        serve.shutdown()
    again = offline(folder / "a", items, folder)[1]
    return _report(load, whole_s, (models["a"][1], again), clients, replicas), not load.failures


class _Exchange:
    """Exchanges the model and kills a replica while clients ask."""

    def __init__(self, clients: Clients, expected: dict[str, np.ndarray], vectors_of_b: np.ndarray) -> None:
        self._clients, self._expected, self._vectors_of_b = clients, expected, vectors_of_b

    def run(self, spec: ServeSpec, folder: Path, minutes: float) -> Load:
        third_s = minutes * 20
        time.sleep(third_s)
        other = spec.model_copy(update={"model": str(folder / "b")})
        self._expected[_version_at(folder / "b")] = self._vectors_of_b
        deploy(other)
        say("the model is exchanged")
        time.sleep(third_s)
        kill_a_replica()
        say("a replica is killed")
        time.sleep(third_s)
        return self._clients.stop()


def _version_at(model: Path) -> str:
    from pipelines.config import MediaConfig
    from rzen.serving.place import Place
    from rzen.serving.served import load_served

    return load_served(Place(str(model)), MediaConfig(), CHUNK_TOKENS).version


def _report(load: Load, whole_s: float, alone: tuple[float, float], clients: int, replicas: int) -> str:
    seconds = np.array([duration for _, duration in load.seconds])
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    rate = load.items / whole_s
    offline_rate = sum(alone) / 2
    lines = [
        "# Serving a mixed load",
        "",
        f"{describe_machine()}. {clients} clients and {replicas} replica(s) on the same machine,",
        f"{whole_s / 60:.1f} minutes, a model exchanged and a replica killed meanwhile, a bad item in every twentieth",
        "request. `serve.py` tells how it is measured.",
        "",
        "| | |",
        "|---|---:|",
        f"| requests that were answered | {load.counts['answered']:,} |",
        f"| requests with a bad item, refused with its index | {load.counts['bad item']:,} |",
        f"| requests that were told to wait (429) | {load.counts['refused']:,} |",
        f"| answers that were lost or wrong | {len(load.failures):,} |",
        f"| latency p50, s | {p50:.2f} |",
        f"| latency p95, s | {p95:.2f} |",
        f"| latency p99, s | {p99:.2f} |",
        f"| longest, s | {seconds.max():.2f} |",
        f"| items/s | {rate:.1f} |",
        f"| items/s of the offline engine, before and after | {alone[0]:.1f}, {alone[1]:.1f} |",
        f"| share of the offline engine | {rate / offline_rate:.2f} |",
        "",
    ]
    lines += [f"* {text}: {count}" for text, count in Counter(load.failures).most_common(5)]
    return "\n".join(lines)


def write_section(path: Path, report: str) -> None:
    """Replace the part of a file that a report is: the comparison with the peer, or all before it."""
    load, title, comparison = path.read_text(encoding="utf-8").partition(serve_peer.TITLE)
    if report.startswith(serve_peer.TITLE):
        title, comparison = "", report
    else:
        load = report
    path.write_text(f"{load.rstrip()}\n\n{title}{comparison}".rstrip() + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--peer", type=Path, help="folder with infinity_emb; compares the servers")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--requests", type=int, default=80)
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    is_right = True  # `serve_peer` raises for a vector that differs
    with tempfile.TemporaryDirectory(prefix="rzen-serve-") as folder:
        if options.peer:
            report = serve_peer.measure(Path(folder), options.peer.absolute(), options.turns, options.requests)
        else:
            set_environment()
            report, is_right = measure(Path(folder), options.minutes, options.clients, options.replicas)
    print(report)
    if options.write:
        write_section(Path(__file__).with_suffix(".md"), report)
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
