"""The spec of `ingest`: what it must read, and what makes a pipeline repeat it."""

import zipfile
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from jobs.data.ingest import fingerprint
from jobs.data.specs import IngestSpec
from tests.tables import picture, write_table

PAIR = {"query": {"text": "title"}, "positive": {"media": "photo"}}


def spec(**fields: Any) -> IngestSpec:
    return IngestSpec.model_validate({"kind": "ingest", "out": "o", **fields})


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({}, "has neither `input` nor `sources`"),
        ({"sources": {"a b": {"table": "t"}}}, "should match pattern"),
        ({"sources": {"a": {"table": "t", "query": {"text": "x["}}}}, "is not a step"),
        ({"sources": {"a": {"table": "t", "query": {}}}}, "names neither text nor media nor id"),
        ({"sources": {"a": {"table": "t", "query": {"id": "x", "text": "y"}}}}, "the pool gives both"),
        ({"sources": {"a": {"table": "t", "querry": {"text": "x"}}}}, "not permitted"),
        ({"sources": {"a": {"table": "t", "limit": 0}}}, "greater than or equal to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused(fields: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        spec(**fields)


def test_a_pipeline_repeats_the_job_when_a_table_pool_or_archive_changes(tmp_path: Path) -> None:
    table = write_table(tmp_path / "t.jsonl", [{"title": "a", "photo": "a.png"}])
    pool = write_table(tmp_path / "pool.jsonl", [{"id": "1"}])
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        archive.writestr("a.png", picture())
    source = {"table": table, "media_root": str(tmp_path / "z.zip"), "pool": {"table": pool, "id": "id"}, **PAIR}
    job = spec(sources={"a": source})
    before = fingerprint(job)
    assert set(before) == {table, pool, str(tmp_path / "z.zip")}
    assert fingerprint(job) == before
    for path in map(Path, (table, pool, tmp_path / "z.zip")):
        path.write_bytes(path.read_bytes() + b"\n")
        after = fingerprint(job)
        assert [url for url in before if after[url] != before[url]] == [str(path)]
        before = after
