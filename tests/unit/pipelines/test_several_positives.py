"""Rows with several positives, in the layouts that have them: ingested, planned and drawn into batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pipelines.ingest.job
from pipelines.config import DataConfig, MediaConfig, MixtureConfig
from pipelines.feed.reader import Reader
from pipelines.ingest.groups import list_table
from pipelines.ingest.ingest import ingest
from pipelines.plan.build import build_plan
from pipelines.plan.plan import Plan
from pipelines.plan.types import SourceTable
from pipelines.plan.weights import one_of_each_query
from pipelines.samples import Sample
from pipelines.storage.location import open_store
from rzen.objective.identity import Identity
from tests.inline import run_here
from tests.tables import Rows, opened, write_pictures, write_table

ROWS = 12
Answers = dict[str, set[str]]
"""Text of a query -> all of its positives: texts, or the names of their media."""


def positives_of(n: int) -> list[int]:
    """One to three positives of a row. Of two, the last one is the first one of the next row: entities share pages."""
    return [3 * n + k for k in range(1 + n % 3)] if n % 3 != 1 else [3 * n, 3 * (n + 1)]


def _mbeir(n: int) -> dict[str, Any]:
    start = {"qid": f"7:{n}", "query_txt": f"q{n}", "query_img_path": None, "query_modality": "text"}
    return start | {"pos_cand_list": [f"7:{p}" for p in positives_of(n)], "neg_cand_list": []}


def _swift(n: int) -> dict[str, Any]:
    positives = [[{"role": "user", "content": f"p{p}"}] for p in positives_of(n)]
    return {"messages": [{"role": "user", "content": f"q{n}"}], "positive_messages": positives}


LAYOUTS = {
    "mbeir": _mbeir,
    "flag_embedding": lambda n: {"query": f"q{n}", "pos": [f"p{p}" for p in positives_of(n)], "neg": []},
    "ms_swift": _swift,
    "tevatron": lambda n: {
        "query_id": str(n),
        "query_text": f"q{n}",
        "positive_document_ids": [f"d{p}" for p in positives_of(n)],
    },
}
POOLS: dict[str, Rows] = {
    "mbeir": [{"did": f"7:{p}", "txt": None, "img_path": f"images/{p}.jpg"} for p in range(3 * ROWS + 3)],
    "tevatron": [{"docid": f"d{p}", "text": f"p{p}"} for p in range(3 * ROWS + 3)],
}


@pytest.fixture(params=LAYOUTS)
def data(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve rows of a layout, ingested."""
    monkeypatch.setattr(pipelines.ingest.job, "run", run_here)
    name = request.param
    write_pictures(tmp_path, *(f"images/{p}.jpg" for p in range(3 * ROWS + 3)))
    settings: dict[str, Any] = {"media_root": str(tmp_path), "task": "t"}
    if name in POOLS:
        settings["pool"] = {"table": write_table(tmp_path / "pool.jsonl", POOLS[name])}
    reader = opened(write_table(tmp_path / "t.jsonl", [LAYOUTS[name](n) for n in range(ROWS)]), **settings)
    assert reader.preset == name
    ingest([], open_store(str(tmp_path / "data")), tables=[list_table(reader)], media=MediaConfig(), **_ALL)
    return tmp_path / "data"


_ALL: dict[str, Any] = {"held_out_fraction": 0.0, "seed": 0, "samples_per_shard": 5}


def samples_of(reader: Reader) -> list[Sample]:
    (count,) = reader.sizes().values()
    return [sample for sample, _ in reader.raw("mine", range(count))]


def answers_of(samples: list[Sample]) -> dict[str, set[str]]:
    """Query -> the content of all of its positives."""
    found: dict[str, set[str]] = defaultdict(set)
    for sample in samples:
        found[sample.query.text].add(sample.target_sha256)
    return found


def batches(reader: Reader, plan: Plan) -> list[list[Sample]]:
    found = []
    for step in range(plan.num_steps):
        share = reader.batch(plan, step, 0, 1)
        assert not share.rejected
        found.append([decoded.sample for decoded in share.batch])
    return found


def test_all_positives_of_a_row_are_samples(data: Path) -> None:
    answers = answers_of(samples_of(Reader(DataConfig(root=str(data)))))
    assert {query: len(found) for query, found in answers.items()} == {
        f"q{n}": len(positives_of(n)) for n in range(ROWS)
    }


@pytest.mark.parametrize("positives", ["all", "one"])
def test_no_batch_has_another_positive_of_a_query_as_a_negative(data: Path, positives: Any) -> None:
    """Although rows share positives: each batch contrasts a query with targets that are no positives of its row."""
    mixture = MixtureConfig(positives=positives, run_length=2)
    reader = Reader(DataConfig(root=str(data), mixture=mixture))
    samples = samples_of(reader)
    answers = answers_of(samples)
    plan = build_plan(reader.tables(), mixture, global_batch=3, epochs=30, seed=1)
    drawn: Counter[tuple[str, str]] = Counter()
    for batch in batches(reader, plan):
        for sample in batch:
            drawn[sample.query.text, sample.target_sha256] += 1
            others = {other.target_sha256 for other in batch if other.key != sample.key}
            assert not others & answers[sample.query.text]
    assert set(drawn) == {(query, target) for query, found in answers.items() for target in found}
    if positives == "one":
        assert plan.num_steps == 30 * ROWS // 3
        of_query = Counter(query for query, _ in drawn.elements())
        assert set(of_query.values()) == {30}


def test_positives_that_meet_in_a_batch_are_masked_by_the_objective(data: Path) -> None:
    """One batch holds all: the ids that the objective gets say which targets are right answers of a query."""
    reader = Reader(DataConfig(root=str(data)))
    samples = samples_of(reader)
    answers = answers_of(samples)
    plan = build_plan(reader.tables(), MixtureConfig(), global_batch=len(samples), epochs=1)
    (batch,) = batches(reader, plan)
    assert len(batch) == len(samples)
    ids = [
        torch.tensor([int.from_bytes(bytes.fromhex(text)[:8], signed=True) for text in texts])
        for texts in ([one.target_sha256 for one in batch], [one.query_sha256 for one in batch])
    ]
    num = len(batch)
    identity = Identity.of(*ids, None, None, num_pairs=num, num_mined=0, device=torch.device("cpu"))
    marked = identity.query_to_targets(torch.arange(num))
    expected = [[other.target_sha256 in answers[sample.query.text] for other in batch] for sample in batch]
    assert marked.tolist() == expected
    assert marked.sum() > num


def test_queries_that_share_a_positive_are_apart_although_another_one_is_drawn() -> None:
    """Query 5 has the targets 1 and 2, query 6 the targets 2 and 3, query 7 only target 3. Query 8 shares nothing."""
    targets, queries = np.array([1, 2, 2, 3, 3, 9, 9]), np.array([5, 5, 6, 6, 7, 8, 4], np.uint64)
    table = SourceTable(40, np.arange(7), targets, queries)
    drawn = one_of_each_query(table)
    assert drawn.queries.tolist() == [5, 5, 5, 5, 5, 8, 4]
    plan = build_plan({"a": drawn}, MixtureConfig(run_length=2), global_batch=4, epochs=40, seed=2)
    for step in range(plan.num_steps):
        assert sum(index < 5 for _, index in plan.batch(step).rows) <= 1
    assert one_of_each_query(SourceTable(40, np.arange(7), targets, np.arange(7))).queries.tolist() == [*range(7)]
    (*_, note) = build_plan({"a": drawn}, MixtureConfig(), global_batch=18, epochs=1).sources[0].notes()
    assert note.startswith("1 sets of queries are linked by common positives and larger (up to 3) than an epoch has")
