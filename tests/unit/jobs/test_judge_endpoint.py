"""Job of kind `judge` with an endpoint: faults, kills, refusals, cost, and the units of a part."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.judging import judge, pairs
from pipelines.candidates.table import open_table
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.listing import shards_of
from tests.judging import distinct_pairs, make_table, scores_of, spec_of, table_files
from tests.paths import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a table of its candidates."""
    folder = tmp_path_factory.mktemp("judging")
    make_table(folder)
    return folder


class Server(ThreadingHTTPServer):
    """Speaks enough of the protocol. The score of a pair depends on its text and pictures only."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.faults: Iterator[str] = iter(())
        self.refused = ""
        self.silent = ""
        self.delay_s = 0.0
        self.keys: set[str] = set()
        self.lock = threading.Lock()
        self.times_s: list[float] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        server, content = self.server, body["messages"][-1]["content"]
        question = json.dumps(content)
        with server.lock:
            server.asked[question] += 1
            server.keys.add(self.headers["authorization"])
            server.times_s.append(time.monotonic())
            fault = next(server.faults, "")
        if fault == "cut":
            self.close_connection = True
            self.connection.close()
            return
        if fault:
            return self.reply(int(fault), {"error": {"message": f"fault {fault}"}})
        assert (body["logprobs"], body["top_logprobs"], body["temperature"]) == (True, 20, 0)
        if server.refused and server.refused in question:
            return self.reply(400, {"error": {"message": "no such picture"}})
        time.sleep(server.delay_s)
        words = ["maybe"] if server.silent and server.silent in question else ["Yes", " yes", "no", "x"]
        chances = dict(zip(words, spread(question), strict=False))
        tops = [{"token": word, "logprob": float(np.log(chance)), "bytes": None} for word, chance in chances.items()]
        token = {"token": words[0], "logprob": 0.0, "bytes": None, "top_logprobs": tops}
        choice = {"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "length"}
        usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
        with server.lock:
            server.answered[question] += 1
        answer = {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "usage": usage}
        return self.reply(200, answer | {"choices": [choice | {"logprobs": {"content": [token]}}]})

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if status == 429:
            self.send_header("retry-after", "0.05")
        self.end_headers()
        self.wfile.write(data)

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # of a client that was killed
            super().handle()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


def spread(question: str) -> tuple[float, float, float, float]:
    """Chances of `Yes`, ` yes`, `no` and another token."""
    share = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4]) / 2**32
    return (0.5 * share, 0.25 * share, 0.75 * (1 - share) + 1e-9, 0.25)


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def by_endpoint(server: Server, **changes: Any) -> dict[str, Any]:
    return {"api": {"url": server.url, "model": "big", "concurrency": 4, **changes}}


def test_an_endpoint_with_faults_gives_each_pair_its_score(
    folder: Path, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JUDGE_KEY", "secret-key")
    server.faults = iter(["429", "500", "cut", "", "503", "", "429", "cut"])
    prices = {"input_price": 2.0, "output_price": 10.0, "api_key_env": "JUDGE_KEY"}
    result = judge.run(spec_of(folder, tmp_path, by_endpoint(server, **prices)))
    assert server.keys == {"Bearer secret-key"}
    assert server.answered.total() == len(distinct_pairs())  # equal queries and equal targets are one pair
    assert result["judged"] == len(distinct_pairs()) + 4
    assert result["reasons"] == {"unsupported_format": 4}
    assert "secret" not in "".join(str(data) for data in table_files(tmp_path).values())
    scores = {score for positive, some in scores_of(tmp_path).values() for score in (positive, *some)}
    expected = {np.float32(spread(question)[0] * 1.5 / 0.75) for question in server.answered}
    assert all(min(abs(score - one) for one in expected) < 1e-6 for score in scores if not np.isnan(score))
    picture = next(part for part in json.loads(next(iter(server.answered))) if part["type"] == "image_url")
    assert picture["image_url"]["url"].startswith("data:image/jpeg;base64,")
    texts = [part["text"] for part in json.loads(next(iter(server.answered))) if part["type"] == "text"]
    assert texts[0].startswith("<Instruct>: Find the colour.<Query>:")
    assert texts[0].endswith("\n<Document>:")


def test_a_killed_job_asks_again_only_for_what_was_on_its_way(folder: Path, server: Server, tmp_path: Path) -> None:
    server.delay_s = 0.02
    spec = spec_of(folder, tmp_path / "out", by_endpoint(server))
    (tmp_path / "judge.json").write_text(spec.model_dump_json())
    job = subprocess.Popen([sys.executable, "-m", "jobs.run", str(tmp_path / "judge.json")], cwd=ROOT)
    while server.answered.total() < 20 and job.poll() is None:
        time.sleep(0.002)
    job.send_signal(signal.SIGKILL)
    job.wait()
    time.sleep(0.1)
    assert 20 <= server.answered.total() < 50
    judge.run(spec)
    assert len(distinct_pairs()) <= server.answered.total() <= len(distinct_pairs()) + 4
    undisturbed = spec_of(folder, tmp_path / "whole", by_endpoint(server))
    judge.run(undisturbed)
    assert table_files(tmp_path / "out") == table_files(tmp_path / "whole")


def test_refusals_silence_and_cost(folder: Path, server: Server, tmp_path: Path) -> None:
    server.refused, server.silent = "red 2\\n", "red 5\\n"
    result = judge.run(spec_of(folder, tmp_path / "a", by_endpoint(server)))
    # The positive, and two candidates: blue 2 and 5 show what red 2 and 5 show.
    assert result["reasons"] == {"unsupported_format": 4, "refused": 3, "no_answer": 3}
    found = scores_of(tmp_path / "a")
    for index in (2, 5):
        assert np.isnan([found["red", index][0], *found["red", index][1]]).all()
    asked = server.asked.total()
    again = judge.run(spec_of(folder, tmp_path / "a", by_endpoint(server)))
    assert server.asked.total() == asked  # also of those without a score
    assert (again["scored"], again["without_score"]) == (result["scored"], result["without_score"])
    expensive = by_endpoint(server, input_price=1e4, max_cost=10.0, concurrency=1)
    with pytest.raises(UserError, match=r"api.max_cost=10: the job has cost 1\d\.00; raise api.max_cost, and run"):
        judge.run(spec_of(folder, tmp_path / "b", expensive))
    assert 10 <= server.asked.total() - asked <= 13


def test_an_endpoint_that_cannot_be_used_ends_the_job(folder: Path, server: Server, tmp_path: Path) -> None:
    server.faults = iter(["401"] * 100)
    with pytest.raises(UserError, match=r"127.0.0.1:\d+/v1: answers 401: .*; check api.url, api.model and the API"):
        judge.run(spec_of(folder, tmp_path, by_endpoint(server)))
    server.faults, server.refused = iter(()), "Find"
    with pytest.raises(UserError, match=r"refused each of the first 20 pairs; check the model"):
        judge.run(spec_of(folder, tmp_path, by_endpoint(server)))
    server.refused = ""
    dead = by_endpoint(server, url="http://127.0.0.1:9/v1", retries=0)
    with pytest.raises(UserError, match=r"127.0.0.1:9/v1: does not answer: Connection error.; check api.url and the"):
        judge.run(spec_of(folder, tmp_path, dead))


def test_requests_are_spread(folder: Path, server: Server, tmp_path: Path) -> None:
    judge.run(spec_of(folder, tmp_path, by_endpoint(server, requests_per_minute=3000), top_k=1))
    between_s = np.diff(sorted(server.times_s))
    assert server.times_s[-1] - server.times_s[0] > 0.8 * 0.02 * len(between_s)


def test_units_have_each_pair_once_and_a_limited_cost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a model: whatever the limits, the units of a part hold its distinct pairs."""
    table = open_table(str(folder / "table"))
    reader = Reader(DataConfig(root=str(folder / "data")))
    shard = next(shard for shard in shards_of(reader) if shard.source == "red")
    source, samples = shard.source, list(reader.records(shard.source, range(8)))
    rows = table.rows(source, 0)
    for cost in (40, 1024):
        monkeypatch.setattr(pairs, "UNIT_COST", cost)
        found = pairs.pairs_of(rows, samples, shard, table.manifest, None, True, np.zeros(0, np.int64))
        keys = [key for unit in found.units for key in unit.keys.tolist()]
        assert sorted(keys) == found.keys.tolist()
        assert (len(found.units) > 5) == (cost == 40)
        for unit in found.units:
            assert 16 * len(unit.documents) + len(unit.queries) <= max(cost, 17)
        chosen = found.keys[::3]
        left = pairs.missing_of(found.units, chosen)
        assert sorted(key for unit in left for key in unit.keys.tolist()) == chosen.tolist()
