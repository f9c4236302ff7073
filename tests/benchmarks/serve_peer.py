"""rzen's server next to infinity's: the same exported model, requests and clients, in turns.

    python -m tests.benchmarks.serve --peer FOLDER --write     replaces this section of serve.md

FOLDER has infinity_emb and what it needs to import, next to the project's torch and transformers: `pip install --target
FOLDER --no-deps infinity_emb uvloop typer ...`. Nothing of it is copied here. infinity takes every model with a vision
part for a CLIP. Here, its engine for sentence-transformers is chosen for it, which opens the export, texts only.

Each turn is a new process for each server, so that the other one takes no CPU. Clients keep their connections, and have
a list of requests of their own. Each vector is compared with the offline engine's. CPU seconds are those of all
processes of the server, without the clients'.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import rzen
from jobs.runtime.local_s3 import free_port
from rzen.export.export import ExportOptions, export_model
from rzen.model.backbone import build_tiny
from tests.benchmarks.encode import BACKBONE, IDENTITY
from tests.benchmarks.machine import describe_machine
from tests.benchmarks.turns import Host, say, spread
from tests.paths import ROOT

TITLE = "## Next to infinity"
SERVERS = ("rzen", "infinity")
CLIENTS, WARM_UP, CLOSE = 16, 24, 1e-5
CHUNK_TOKENS, BATCH = 4096, 32
_START_S = 300.0
_TICKS = os.sysconf("SC_CLK_TCK")
_MODULE = "tests.benchmarks.serve_peer"
Requests = list[list[int]]
"""Numbers of the texts of each request."""


@dataclass(frozen=True)
class Turn:
    """What the clients of a server saw."""

    items: int
    wall_s: float
    cpu_s: float
    seconds: list[float]
    difference: float
    """Largest difference of a number from the offline engine's."""

    @property
    def rate(self) -> float:
        return self.items / self.wall_s

    @property
    def rate_of_cpu(self) -> float:
        return self.items / self.cpu_s

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.seconds, percent)) * 1e3


def draw(count: int) -> tuple[list[str], dict[str, Requests]]:
    """Texts as in `serve.py`, half of them of 5 to 30 words and half of 100 to 400, and two loads."""
    rng = np.random.default_rng(0)
    bounds = [(5, 30) if number % 2 else (100, 400) for number in range(80)]
    texts = [" ".join(f"word{word}" for word in rng.integers(0, 90, rng.integers(*bound))) for bound in bounds]
    mixed = [rng.integers(0, len(texts), rng.integers(1, 5)).tolist() for _ in range(count)]
    short = [[int(number) * 2 + 1] for number in rng.integers(0, len(texts) // 2, 2 * count)]
    return texts, {"1 to 4 texts of 5 to 400 words": mixed, "1 text of 5 to 30 words": short}


def ask_all(port: int, texts: Sequence[str], requests: Requests, expected_ND: np.ndarray) -> tuple[list[float], float]:
    """Return the seconds of each request, and the largest difference of a vector. Raises for any other answer."""
    bodies = [
        json.dumps({"model": "bench", "input": [texts[row] for row in rows], "encoding_format": "base64"}).encode()
        for rows in requests
    ]
    waiting, lock = iter(range(len(bodies))), threading.Lock()

    def ask() -> Iterator[tuple[int, float, bytes]]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=120)) as connection:
            while True:
                with lock:
                    number = next(waiting, None)
                if number is None:
                    return
                start_s = time.perf_counter()
                connection.request("POST", "/v1/embeddings", bodies[number], {"Content-Type": "application/json"})
                answer = connection.getresponse()
                data = answer.read()
                assert answer.status == 200, data[:300]
                yield number, time.perf_counter() - start_s, data

    with ThreadPoolExecutor(CLIENTS) as pool:
        answered = [one for found in pool.map(lambda _: list(ask()), range(CLIENTS)) for one in found]
    difference = 0.0
    for number, _, data in answered:
        rows = [np.frombuffer(base64.b64decode(one["embedding"]), "<f4") for one in json.loads(data)["data"]]
        difference = max(difference, float(np.abs(np.stack(rows) - expected_ND[requests[number]]).max()))
    return [seconds for _, seconds, _ in answered], difference


def cpu_seconds(root: int) -> float:
    """Return the CPU seconds of a process and of all below it, those that ended included."""
    children: dict[int, list[int]] = {}
    ticks: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            pid = int(stat.parent.name)
            children.setdefault(int(fields[1]), []).append(pid)
            ticks[pid] = sum(map(int, fields[11:15]))
    found, waiting = 0, [root]
    while waiting:
        pid = waiting.pop()
        found += ticks.get(pid, 0)
        waiting += children.get(pid, [])
    return found / _TICKS


def measure(folder: Path, peer: Path, turns: int, count: int) -> str:
    """Return the section of the report. Raises `AssertionError` for a vector that differs."""
    texts, loads = draw(count)
    build_tiny(folder / "base", BACKBONE, texts)
    export_model(str(folder / "base"), None, folder / "model", IDENTITY, ExportOptions(dtype="float32"))
    expected_ND = rzen.load(folder / "model", chunk_tokens=CHUNK_TOKENS).encode(texts)
    found: dict[tuple[str, str], list[Turn]] = {(load, name): [] for load in loads for name in SERVERS}
    for turn in range(turns):
        for name in SERVERS if turn % 2 == 0 else reversed(SERVERS):
            with Host(_MODULE, name, str(folder / "model"), **_environment(name, peer)) as host:
                started = host.ask("start")
                for load, requests in loads.items():
                    ask_all(started["port"], texts, requests[:WARM_UP], expected_ND)
                    cpu_s, wall_s = cpu_seconds(started["pid"]), time.perf_counter()
                    seconds, difference = ask_all(started["port"], texts, requests, expected_ND)
                    wall_s, cpu_s = time.perf_counter() - wall_s, cpu_seconds(started["pid"]) - cpu_s
                    assert difference < CLOSE, f"{name}: a vector differs by {difference:.1e}"
                    one = Turn(sum(map(len, requests)), wall_s, cpu_s, seconds, difference)
                    found[load, name].append(one)
                    say(f"turn {turn + 1}, {name}, {load}: {one.rate:.1f} items/s, {one.rate_of_cpu:.1f} by CPU")
    return _report(found, loads, _version(peer), turns)


def _environment(name: str, peer: Path) -> dict[str, str]:
    # Ray gives way to every other process by default, and infinity does not.
    shared = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    if name == "rzen":
        return shared
    off = {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0", "HF_HUB_OFFLINE": "1"}
    return shared | off | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(peer)])}


def _version(peer: Path) -> str:
    """Return the version of infinity in a folder."""
    (metadata,) = peer.glob("infinity_emb-*.dist-info")
    return metadata.name.removeprefix("infinity_emb-").removesuffix(".dist-info")


def _report(found: dict[tuple[str, str], list[Turn]], loads: dict[str, Requests], version: str, turns: int) -> str:
    lines = [
        TITLE,
        "",
        f"{describe_machine()}, clients included.",
        f"Median of {turns} turns (smallest to largest), {CLIENTS} clients. Both servers have the same export and one",
        f"thread of torch. infinity_emb {version} has its engine for sentence-transformers, and batches of {BATCH}.",
        f"rzen has one gateway, one replica and {CHUNK_TOKENS:,} tokens a batch. infinity takes",
        "only texts with this model. `serve_peer.py` tells how it is measured.",
        "",
        "| requests | server | items/s | items per CPU second | p50, ms | p95, ms | vectors differ by |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    ratios = []
    for load, requests in loads.items():
        for name in SERVERS:
            of = found[load, name]
            cells = [
                f"{len(requests):,} of {load}",
                name,
                spread([one.rate for one in of], ".1f"),
                spread([one.rate_of_cpu for one in of], ".1f"),
                spread([one.percentile_ms(50) for one in of], ".0f"),
                spread([one.percentile_ms(95) for one in of], ".0f"),
                f"{max(one.difference for one in of):.0e}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        pairs = list(zip(*(found[load, name] for name in SERVERS), strict=True))
        rates = spread([ours.rate / theirs.rate for ours, theirs in pairs], ".2f")
        of_cpu = spread([ours.rate_of_cpu / theirs.rate_of_cpu for ours, theirs in pairs], ".2f")
        ratios.append(f"* {load}: rzen has {rates} of infinity's items/s,\n  and {of_cpu} of its items per CPU second.")
    return "\n".join([*lines, "", *ratios, ""])


@contextlib.contextmanager
def serve_rzen(model: Path, port: int) -> Iterator[None]:
    """Run the server on a Ray of its own."""
    from jobs.runtime.cluster import ray_cluster, set_environment

    set_environment()
    from jobs.serving.serve import deploy
    from jobs.serving.specs import ServeSpec

    settings = {"kind": "serve", "model": str(model), "name": "bench", "port": port, "reload_s": None}
    spec = ServeSpec.model_validate(settings | {"chunk_tokens": CHUNK_TOKENS, "cpus_per_replica": 0.5})
    with ray_cluster():
        from ray import serve

        deploy(spec)
        yield
        serve.shutdown()


@contextlib.contextmanager
def serve_infinity(model: Path, port: int) -> Iterator[None]:
    """Run infinity's own application in a thread."""
    import uvicorn
    from infinity_emb import EngineArgs  # type: ignore[import-not-found]
    from infinity_emb.infinity_server import create_server  # type: ignore[import-not-found]
    from infinity_emb.transformer.utils import EmbedderEngine  # type: ignore[import-not-found]

    from rzen.export.opening import has_torchvision, register_processors

    if not has_torchvision():
        register_processors()
    # By its name, because the package has a function of the same name.
    selection: Any = sys.modules["infinity_emb.inference.select_model"]
    selection.get_engine_type_from_config = lambda engine_args: EmbedderEngine.torch
    engine = EngineArgs(
        model_name_or_path=str(model),
        served_model_name="bench",
        engine="torch",
        device="cpu",
        dtype="float32",
        bettertransformer=False,  # it needs optimum, and knows BERT and others like it
        model_warmup=False,
        batch_size=BATCH,
    )
    app = create_server(engine_args_list=[engine], url_prefix="/v1")
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline_s = time.monotonic() + _START_S
    while not server.started:
        assert thread.is_alive(), "infinity ended"
        assert time.monotonic() < deadline_s, "infinity does not start"
        time.sleep(0.1)
    yield
    server.should_exit = True
    thread.join()


def main() -> None:
    """Run a server until the standard input ends."""
    name, model = sys.argv[1:]
    port = free_port()
    run = {"rzen": serve_rzen, "infinity": serve_infinity}[name]
    Host.serve(lambda _: {"port": port, "pid": os.getpid()}, run(Path(model), port))


if __name__ == "__main__":
    main()
