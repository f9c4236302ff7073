"""The groups of an ingest job: what is stored of them, what is left to do, and the manifests that they give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from pipelines.errors import UserError
from pipelines.ingest.blocks import HELD_OUT, MIN_TRAIN_SAMPLES, TRAIN, plan_blocks
from pipelines.ingest.execution import run
from pipelines.ingest.groups import ListedTable, TableGroup, form_groups
from pipelines.ingest.markers import Plan, StoredGroup, WrittenBlock, read_groups, read_markers
from pipelines.ingest.planning import FolderWork, GroupWork, TableWork, collect, make_plan, missing_blocks
from pipelines.ingest.report import IngestReport
from pipelines.ingest.settings import IngestSettings
from pipelines.samples import CellRef, FramesRef, RawSample, Reference, Rejected, Sample
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo
from pipelines.storage.location import open_object

OnProgress = Callable[[int, int, str], None]
"""Gets samples done, all samples as far as they are known, and a note about groups."""
_FOLDER = "input"


@dataclass(slots=True)
class _Group:
    """A group of the folder or of a table, and what is known of it. `input` is its setting in the spec."""

    id: str
    input: str
    table: TableGroup | None = None
    plan: Plan | None = None
    blocks: dict[int, WrittenBlock] = field(default_factory=dict)

    @property
    def is_complete(self) -> bool:
        return self.plan is not None and len(self.blocks) == len(self.plan.blocks)

    @property
    def num_samples(self) -> int:
        """Samples of the plan, or an estimate before it is made."""
        if self.plan:
            return self.plan.num_samples
        return self.table.num_rows if self.table else 0

    @property
    def num_stored(self) -> int:
        """Samples of the blocks that are stored."""
        return sum(self.plan.blocks[number].num_samples for number in self.blocks) if self.plan else 0

    def take(self, plan: Plan) -> None:
        """Set the plan. Blocks that are not its own are forgotten."""
        self.plan = plan
        digests = [block.digest for block in plan.blocks]
        self.blocks = {
            number: block
            for number, block in self.blocks.items()
            if number < len(digests) and block.digest == digests[number]
        }


class IngestJob:
    """All groups of a job, in their order. It holds the samples of a folder, and no sample of a table."""

    def __init__(self, settings: IngestSettings, report: IngestReport, on_progress: OnProgress) -> None:
        self.report = report
        self.groups: list[_Group] = []
        self._settings = settings
        self._on_progress = on_progress
        self._works: list[tuple[_Group, GroupWork]] = []
        self._folder = FolderWork(())
        self._samples_done = self._samples_known = self._groups_done = 0

    def plan_folder(self, raw: Iterable[RawSample | Rejected]) -> None:
        """Plan the samples of the folder, which are one group."""
        samples, tally, seen = collect(raw)
        settings = self._settings
        blocks = plan_blocks(samples, settings.held_out_fraction, settings.seed, settings.samples_per_shard)
        plan = make_plan(samples, blocks, tally, seen)
        tags = _file_tags(samples, settings.endpoint)
        group = _Group(settings.group_id([*(block.digest for block in plan.blocks), *tags]), _FOLDER, plan=plan)
        self._folder = FolderWork(missing_blocks(group.id, blocks, plan, {}, settings))
        self.groups.append(group)

    def form_groups(self, tables: Sequence[ListedTable], reuse: bool) -> None:
        """Form the groups of the tables, and find out what is stored of all groups."""
        out = self._settings.out
        known = read_groups(out) if reuse else {}
        for table in tables:
            formed = form_groups(table, known, self._settings)
            self.groups += [_Group(group.id, f"sources.{group.source}", group) for group in formed]
        markers = read_markers(out, [group.id for group in self.groups])
        for group in self.groups:
            self._take_stored(group, markers[group.id])
        counted = [group for group in self.groups if group.table or group.num_samples]
        self.report.num_groups = len(counted)
        self.report.num_reused = self._groups_done = sum(group.is_complete for group in counted)
        self._samples_done = sum(group.num_stored for group in self.groups)
        self._samples_known = sum(group.num_samples for group in self.groups)

    def _take_stored(self, group: _Group, stored: StoredGroup) -> None:
        """Keep what is stored of a group, and add the rest to the work."""
        group.blocks = stored.blocks
        if group.plan:
            group.take(group.plan)
            missing = [work for work in self._folder.blocks if work.number not in group.blocks]
            self._works.append((group, FolderWork(missing)))
        elif stored.plan and stored.is_complete:
            group.take(stored.plan)
        else:
            assert group.table
            digests = {number: block.digest for number, block in stored.blocks.items()}
            self._works.append((group, TableWork(group.table, digests)))

    def run(self) -> None:
        """Do what is not stored yet."""
        self._show()
        for place, result in run([work for _, work in self._works], self._settings):
            group = self._works[place][0]
            if isinstance(result, Plan):
                self._samples_known += result.num_samples - group.num_samples
                group.take(result)
                self._samples_done += group.num_stored
            else:
                assert group.plan
                group.blocks[result.number] = result
                self._samples_done += group.plan.blocks[result.number].num_samples
            self._groups_done += group.is_complete
            self._show()

    def _show(self) -> None:
        note = f"{self._groups_done:,} of {self.report.num_groups:,} groups"
        if self.report.num_reused:
            note += f", {self.report.num_reused:,} stored before"
        self._on_progress(self._samples_done, self._samples_known, note)

    @property
    def table_groups(self) -> dict[str, dict[str, tuple[str, ...]]]:
        """Source in the spec -> group -> ids of its units."""
        found: dict[str, dict[str, tuple[str, ...]]] = {}
        for group in self.groups:
            if group.table:
                found.setdefault(group.table.source, {})[group.id] = group.table.unit_ids
        return found

    def manifests(self, splits: Sequence[str]) -> list[Manifest]:
        """Return the manifests of the splits, without settings, and count the results in the report.

        Raises `UserError` for a source of two inputs, or whose groups leave too little to train on.
        """
        tasks = self.tasks()
        self._check_train()
        shards: dict[str, dict[str, list[ShardInfo]]] = {split: {} for split in splits}
        for plan in self._plans():
            self.report.seen += plan.seen
            self.report.add(plan.tally)
        for group in self.groups:
            assert group.plan
            for number, planned in enumerate(group.plan.blocks):
                written = group.blocks[number]
                self.report.add(written.tally)
                if written.shard:
                    shards[planned.split].setdefault(planned.source, []).append(written.shard)
                    self.report.num_bytes += written.shard.num_bytes
        manifests = []
        for split, by_source in shards.items():
            sources = {
                source: SourceInfo(tasks[source], sum(shard.num_samples for shard in found), tuple(found))
                for source, found in sorted(by_source.items())
            }
            self.report.accepted[split] = {source: info.num_samples for source, info in sources.items()}
            manifests.append(Manifest(split, sources))
        return manifests

    def _plans(self) -> Iterator[Plan]:
        for group in self.groups:
            assert group.plan
            yield group.plan

    @property
    def names_all_splits(self) -> bool:
        """Whether no sample leaves its split to the job."""
        return not any(any(plan.num_free.values()) for plan in self._plans())

    def tasks(self) -> dict[str, str]:
        """Return source -> task. Raises `UserError` for a source of two inputs."""
        tasks: dict[str, str] = {}
        inputs: dict[str, str] = {}
        for group, plan in zip(self.groups, self._plans(), strict=True):
            for source, task in plan.tasks.items():
                tasks[source] = task
                if inputs.setdefault(source, group.input) != group.input:
                    problem = f"has samples of {inputs[source]} and of {group.input}"
                    raise UserError(f"source {source}", problem, "give one of them another name")
        return tasks

    def examples(self) -> dict[str, list[Sample]]:
        """Return the first stored samples of each source."""
        found: dict[str, list[Sample]] = {}
        for group, plan in zip(self.groups, self._plans(), strict=True):
            for number, block in enumerate(plan.blocks):
                if block.source not in found and (texts := group.blocks[number].examples):
                    found[block.source] = [Sample.from_json(text) for text in texts]
        return found

    def _check_train(self) -> None:
        """Raise `UserError` where groups, which know nothing of each other, hold out nearly all of a source."""
        of_split: dict[str, Counter[str]] = {TRAIN: Counter(), HELD_OUT: Counter()}
        for group, plan in zip(self.groups, self._plans(), strict=True):
            for block in plan.blocks:
                if group.table and not group.table.is_whole and plan.num_free.get(block.source):
                    of_split[block.split][block.source] += block.num_samples
        for source, count in of_split[HELD_OUT].items():
            if of_split[TRAIN][source] < MIN_TRAIN_SAMPLES:
                problem = f"holds out {count} samples and leaves {of_split[TRAIN][source]} to train on"
                raise UserError(f"source {source}", problem, "set a smaller held_out_fraction")


def _file_tags(samples: Iterable[RawSample], endpoint: str | None) -> Iterator[str]:
    """Yield a tag of each file of the samples once, in order: those of a folder may be replaced."""
    paths = {path: None for raw in samples for ref in raw.files.values() for path in _paths(ref)}
    for path in paths:
        try:
            store, name = open_object(path, endpoint)
            yield store.tag(name)
        except (OSError, ValueError, UserError):  # it is counted when it is read
            yield "missing"


def _paths(ref: Reference) -> Iterator[str]:
    if isinstance(ref, FramesRef):
        for picture in ref.pictures:
            yield from _paths(picture)
    elif not isinstance(ref, CellRef):
        yield ref.path
