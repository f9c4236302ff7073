"""A block to a shard: its samples are loaded, decoded once as a check, and stored. Then its marker is."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pipelines.errors import BadMedia
from pipelines.ingest.card import NUM_EXAMPLES
from pipelines.ingest.markers import WrittenBlock, write_block_marker
from pipelines.ingest.members import load_samples
from pipelines.ingest.planning import BlockWork
from pipelines.ingest.report import Tally
from pipelines.ingest.settings import IngestSettings
from pipelines.samples import Members, Rejected, Sample
from pipelines.shards.manifest import DIGEST_CHARS, index_path
from pipelines.shards.write import write_shard
from pipelines.sources.references import ReferenceReader
from pipelines.storage.store import disk_errors


def write_block(work: BlockWork, settings: IngestSettings) -> WrittenBlock:
    """Store the shard, the index and the marker of a block, with a few samples in memory at a time."""
    block, tally, out = work.block, Tally(), settings.out
    examples: list[str] = []

    def usable(reader: ReferenceReader) -> Iterator[tuple[Sample, Members]]:
        for raw, loaded in load_samples(
            block.samples, settings.media, materialized=settings.materialized, reader=reader
        ):
            if isinstance(loaded, BadMedia):
                tally.reject(Rejected(raw.sample.origin or raw.sample.key, loaded.reason, loaded.detail))
                continue
            if block.ordinal == 0 and len(examples) < NUM_EXAMPLES:
                examples.append(loaded[0].to_json().decode())
            yield loaded

    written = WrittenBlock(work.number, block.digest, tally=tally)
    place = tempfile.gettempdir()
    with disk_errors(place), tempfile.TemporaryDirectory(prefix="rzen-shard-", dir=place) as folder:
        local = Path(folder, Path(block.path).name)
        with ReferenceReader(settings.media, settings.endpoint, work.cells) as reader:
            shard = write_shard(local, usable(reader))
        if shard.num_samples:
            shard = replace(shard, path=f"{block.path.removesuffix('.tar')}-{shard.sha256[:DIGEST_CHARS]}.tar")
            out.upload(local, shard.path)
            out.upload(Path(index_path(str(local))), shard.index_path)
            tags = (out.tag(shard.path), out.tag(shard.index_path))
            written = replace(written, shard=shard, tags=tags, examples=tuple(examples))
    write_block_marker(out, work.group, written)
    return written
