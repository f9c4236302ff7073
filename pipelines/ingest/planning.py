"""Rows of a group to blocks, each with what its task needs: a table is read once, and then forgotten."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from pipelines.errors import UserError
from pipelines.ingest.blocks import Block, pair_identity, plan_blocks
from pipelines.ingest.groups import TableGroup
from pipelines.ingest.markers import Plan, PlannedBlock, delete_block_marker, write_plan
from pipelines.ingest.report import Tally
from pipelines.ingest.settings import IngestSettings
from pipelines.samples import RawSample, Rejected
from pipelines.sources.references import Cells, ReferenceReader
from pipelines.storage.store import disk_errors

_SOURCE = re.compile(r"[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class BlockWork:
    """A block of a group that is not stored yet, with the bytes of its cells."""

    group: str
    number: int
    block: Block
    cells: Cells = field(default_factory=dict, repr=False)


@dataclass(frozen=True, slots=True)
class TableWork:
    """A group of a table that is not complete. `stored` has the digests of its blocks that are."""

    group: TableGroup
    stored: Mapping[int, str]

    def plan(self, settings: IngestSettings) -> Iterator[Plan | BlockWork]:
        """Yield the plan of the group, then its blocks that are not stored. Each unit is read at most twice."""
        group = self.group
        samples, tally, seen = collect(group.read())
        blocks = plan_blocks(
            samples,
            settings.held_out_fraction,
            settings.seed,
            settings.samples_per_shard,
            group=group.name,
            root=group.root,
        )
        plan = make_plan(samples, blocks, tally, seen)
        del samples
        write_plan(settings.out, group.id, plan)
        yield plan
        missing = missing_blocks(group.id, blocks, plan, self.stored, settings)
        place = tempfile.gettempdir()
        with disk_errors(place), ReferenceReader(settings.media, settings.endpoint) as reader:
            reader.prepare(raw for work in missing for raw in work.block.samples)
            for work in missing:
                yield BlockWork(group.id, work.number, work.block, reader.take(work.block.samples))


@dataclass(frozen=True, slots=True)
class FolderWork:
    """Blocks of samples that the job has listed itself."""

    blocks: Sequence[BlockWork]

    def plan(self, settings: IngestSettings) -> Iterator[Plan | BlockWork]:
        """Yield the blocks."""
        yield from self.blocks


GroupWork = TableWork | FolderWork


def collect(raw: Iterable[RawSample | Rejected]) -> tuple[list[RawSample], Tally, int]:
    """Return the samples without duplicates in the order given, the others by reason, and how many there were.

    Raises `UserError` for an invalid source.
    """
    unique: dict[str, RawSample] = {}
    tasks: dict[str, str] = {}
    tally, seen = Tally(), 0
    for item in raw:
        seen += 1
        if isinstance(item, Rejected):
            tally.reject(item)
            continue
        sample = item.sample
        if tasks.setdefault(sample.source, sample.task) != sample.task:
            problem = f"has samples of the tasks {tasks[sample.source]!r} and {sample.task!r}"
            raise UserError(f"source {sample.source}", problem, "give each task its own source")
        if not _SOURCE.fullmatch(sample.source):
            raise UserError(f"source {sample.source!r}", "is not a folder name", "use letters, digits, - and _")
        identity = f"{sample.source} {pair_identity(item)}"
        if identity in unique:
            tally.reject(Rejected(sample.origin, "duplicate", "the same query and target as an earlier sample"))
        unique.setdefault(identity, item)
    return list(unique.values()), tally, seen


def make_plan(samples: Sequence[RawSample], blocks: Sequence[Block], tally: Tally, seen: int) -> Plan:
    """Return what is stored of a plan."""
    return Plan(
        seen,
        {raw.sample.source: raw.sample.task for raw in samples},
        tuple(PlannedBlock(block.split, block.source, len(block.samples), block.digest) for block in blocks),
        dict(Counter(raw.sample.source for raw in samples if raw.split is None)),
        tally,
    )


def missing_blocks(
    group: str, blocks: Sequence[Block], plan: Plan, stored: Mapping[int, str], settings: IngestSettings
) -> list[BlockWork]:
    """Return the blocks that are not stored. Markers of other samples with the same number are deleted."""
    missing = []
    for number, (block, planned) in enumerate(zip(blocks, plan.blocks, strict=True)):
        if stored.get(number) == planned.digest:
            continue
        if number in stored:
            delete_block_marker(settings.out, group, number)
        missing.append(BlockWork(group, number, block))
    return missing
