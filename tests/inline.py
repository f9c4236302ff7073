"""The tasks of an ingest job one after the other, in this process: without Ray, for counting and killing."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pipelines.ingest.markers import Plan, WrittenBlock
from pipelines.ingest.planning import GroupWork
from pipelines.ingest.settings import IngestSettings
from pipelines.ingest.writing import write_block


def run_here(works: Sequence[GroupWork], settings: IngestSettings) -> Iterator[tuple[int, Plan | WrittenBlock]]:
    """As `pipelines.ingest.execution.run`."""
    for place, work in enumerate(works):
        for item in work.plan(settings):
            yield place, item if isinstance(item, Plan) else write_block(item, settings)
