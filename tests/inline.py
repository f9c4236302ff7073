"""The tasks of jobs that ingest and embed, one after the other in this process, without Ray, to count and to kill."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext

import pytest

import jobs.data.ingest
import jobs.embedding.embed
import pipelines.ingest.job
from jobs.embedding.engine import BadItems, EmbedItems, Models, _missing, _prepare
from jobs.embedding.specs import Workers
from pipelines.ingest.markers import Plan, WrittenBlock
from pipelines.ingest.planning import GroupWork
from pipelines.ingest.settings import IngestSettings
from pipelines.ingest.writing import write_block
from pipelines.items.types import Item
from pipelines.items.units import windows


def run_here(works: Sequence[GroupWork], settings: IngestSettings) -> Iterator[tuple[int, Plan | WrittenBlock]]:
    """As `pipelines.ingest.execution.run`."""
    for place, work in enumerate(works):
        for item in work.plan(settings):
            yield place, item if isinstance(item, Plan) else write_block(item, settings)


def embed_here(
    items: Iterable[Item],
    models: Models,
    workers: Workers,
    on_progress: Callable[[int, int], None],
    on_long_videos: Callable[[int], None] = lambda count: None,
) -> list[BadItems]:
    """As `jobs.embedding.engine.embed_items`, for one model."""
    ((settings, vectors),) = models
    actor = EmbedItems([settings], [vectors.store])
    bad: BadItems = {}
    for window in windows(items):
        for unit in window:
            if missing := _missing(unit, vectors):
                row = actor(_prepare({"model": 0, "items": pickle.dumps(missing)}, [settings]))
                bad |= pickle.loads(row["bad"])
                on_long_videos(row["num_long_videos"])
        vectors.refresh()
    return [bad]


def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let jobs that ingest and embed run in this process."""
    for module in (jobs.data.ingest, jobs.embedding.embed):
        monkeypatch.setattr(module, "ray_cluster", nullcontext)
    monkeypatch.setattr(jobs.embedding.embed, "check_workers", lambda spec: None)
    monkeypatch.setattr(jobs.embedding.embed, "embed_items", embed_here)
    monkeypatch.setattr(pipelines.ingest.job, "run", run_here)
