"""What a spec scores: the tasks of a split, the datasets of public suites, and custom datasets."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from jobs.embedding.engine import describe
from jobs.embedding.listings import list_shards, samples_of
from jobs.evaluation.specs import EvaluateSpec
from jobs.runtime.progress import say
from pipelines.benchmarks.catalog import check_datasets, open_dataset
from pipelines.benchmarks.custom import read_custom
from pipelines.benchmarks.split import split_dataset
from pipelines.benchmarks.types import Dataset, Row
from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard
from pipelines.samples import Rejected, Sample
from pipelines.storage.store import Store
from rzen.evaluation.tasks import DATASET_METRICS, TASKS, task_of

Entry = tuple[Row, Callable[[], Dataset]]
DAMAGED = "the shard was damaged after ingest: ingest again"


@dataclass
class Bundle:
    """Datasets that are decoded in one way. `data` is None for datasets of files.

    `rows` has all datasets of each suite, `missing` those that cannot be opened: suite -> dataset -> how to get it.
    """

    media: MediaConfig
    data: DataConfig | None
    entries: list[Entry] = field(default_factory=list)
    rows: dict[str, list[Row]] = field(default_factory=dict)
    missing: dict[str, dict[str, str]] = field(default_factory=dict)


def split_bundle(spec: EvaluateSpec, reader: Reader, listings: Store) -> Bundle:
    """Return the tasks of the split that `reader` reads. Needs Ray: shards are listed by its tasks."""
    data = reader.data
    sources = _sources(spec, reader)
    counts = ", ".join(f"{task} {sum(reader.sizes()[s] for s in names):,}" for task, names in sources.items())
    say(f"  {len(spec.models)} models on {data.root} {data.split}: {counts}")
    wanted = [source for names in sources.values() for source in names]
    shards = list_shards(data, [data.split], listings, spec.cpus_per_task, wanted)
    bundle = Bundle(data.media, data)
    for task, names in sources.items():
        kind = task_of(task)
        metric = (spec.metrics or kind.metrics)[0]
        dataset = split_dataset(
            task,
            "train" if data.split == "train" else "held_out",
            _good([shard for shard in shards if shard.source in names], listings),
            pool_is_source=kind.pool == "source",
            metric=DATASET_METRICS.get(metric, metric),
            modality=kind.modality,
        )
        if not dataset.queries and not spec.tasks:
            say(f"  {task} is not scored: {', '.join(dataset.notes)}")
            continue
        bundle.rows.setdefault(dataset.row.suite, []).append(dataset.row)
        bundle.entries.append((dataset.row, partial(_same, dataset)))
    if not bundle.entries:
        raise UserError(f"{data.root} {data.split}", "has graded pairs only", "hold out pairs without a relevance")
    return bundle


def files_bundle(spec: EvaluateSpec) -> Bundle:
    """Return the datasets of the suites and the custom ones. Raises `UserError` if none of them is there."""
    bundle = Bundle(spec.media, None)
    roots: dict[str, Path] = {suite: Path(root) for suite, root in spec.suites.items()}
    found = check_datasets(roots)
    if unknown := sorted(set(spec.datasets or []) - {one.row.name for one in found}):
        raise UserError("datasets", f"{unknown[0]!r} is in none of the suites", "see `rzen evaluate --list`")
    for one in found:
        suite = one.row.suite
        bundle.rows.setdefault(suite, []).append(one.row)
        if spec.datasets is not None and one.row.name not in spec.datasets:
            continue
        if one.missing:
            bundle.missing.setdefault(suite, {})[one.row.name] = one.missing
        else:
            bundle.entries.append((one.row, partial(open_dataset, one.row, roots[suite])))
    for name, path in spec.custom.items():
        dataset = read_custom(Path(path), name)
        bundle.rows.setdefault(dataset.row.suite, []).append(dataset.row)
        bundle.entries.append((dataset.row, partial(_same, dataset)))
    if not bundle.entries:
        first = next((why for some in bundle.missing.values() for why in some.values()), "none is named")
        raise UserError("suites", f"no dataset is there; the first lacks: {first}", "see `rzen evaluate --list`")
    lacking = sum(map(len, bundle.missing.values()))
    datasets = f"{len(bundle.entries)} datasets of {len(bundle.rows)} suites"
    say(f"  {len(spec.models)} models on {datasets}; {lacking} are missing")
    return bundle


def _same(dataset: Dataset) -> Dataset:
    return dataset


def _sources(spec: EvaluateSpec, reader: Reader) -> dict[str, list[str]]:
    """Task -> its sources in the data, those of `TASKS` first."""
    place = f"{reader.data.root} {reader.data.split}"
    found: dict[str, list[str]] = {task: [] for task in TASKS}
    for source in reader.sizes():
        found.setdefault(reader.task_of(source), []).append(source)
    there = {task: sources for task, sources in found.items() if sources}
    if not there:
        raise UserError(place, "has no samples", "hold some out at ingest, or evaluate train")
    wanted = spec.tasks or [*there]
    for task in wanted:
        if task not in there:
            raise UserError(place, f"has no samples of task {task!r}", f"its tasks: {', '.join(there)}")
    if other := [task for task in wanted if task not in TASKS]:
        say(f"  scored as retrieval of any input by any input: {', '.join(other)}")
    return {task: there[task] for task in wanted}


def _good(shards: Sequence[ListedShard], listings: Store) -> Iterator[tuple[ListedShard, int, Sample]]:
    """Samples that can be read. Ingest read all of them once, so one that cannot be read is a damaged store."""
    for shard, index, sample in samples_of(shards, listings):
        if isinstance(sample, Rejected):
            raise UserError(sample.origin, describe(sample).removeprefix(f"{sample.origin}: "), DAMAGED)
        yield shard, index, sample
