"""Job of kind `embed`: the targets of a dataset become vectors in Parquet. It is incremental and resumable.

* `{out}/vectors.json`: parts, index, model and data of the live version. One write of it makes a version visible.
* `{out}/versions/{version}.json`: the same of each version that is kept.
* `{out}/index/`: what searches the vectors (`rzen/index`).
* `{out}/parts/{split}-{source}-{start}-{digest}.parquet`: one row a target, with place, title and vector.
* `{out}/queries/`: the same of the queries, with `queries: true`. A search does not read them.
* `{out}/parts/....ids`: ids of the vectors, for the next run and for a student that learns from them.
* `{out}/listings/`: what the shards hold.
* `{out}/unfinished/`: vectors of a run that has not ended.

The digest of a part is that of its rows' content. A part without a change keeps its file. Files of versions that are
kept stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jobs.embedding.engine import LONG_VIDEO_S, check_workers, embed_items
from jobs.embedding.listings import list_shards, samples_of
from jobs.embedding.parts import FOLDERS, RANGE, PartWriter, asks, make_parts
from jobs.embedding.segments import TargetSegments
from jobs.embedding.settings import settings_of_job
from jobs.embedding.specs import EmbedSpec
from jobs.embedding.targets import ingest_targets
from jobs.embedding.vectors import VectorCache, config_digest
from jobs.embedding.versions import commit, delete_old, previous_of, version_of
from jobs.runtime.cluster import ray_cluster
from jobs.runtime.lease import Lease, hold_output
from jobs.runtime.progress import Bars, say
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard, row_item
from pipelines.items.types import Item, Role
from pipelines.samples import Rejected, clock_time
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.embedding.corpus import VectorsFile, all_parts, read_vectors_file
from rzen.index.build import build_index, check_index, default_kind
from rzen.index.by_id import ids_path
from rzen.index.parts import Parts

KIND = "vectors"
LISTINGS, UNFINISHED = "listings", "unfinished"
_OURS = re.compile(
    rf"({'|'.join(FOLDERS.values())})/.+-\d{{9}}-[0-9a-f]{{16}}\.(parquet|ids)|{LISTINGS}/[0-9a-f]{{32}}\.parquet"
)
_MOST_NAMED = 5  # segments that were skipped, in the lines at the end


def run(spec: EmbedSpec) -> dict[str, Any]:
    """Embed the target of every sample that has no vector yet, and publish the vectors of all."""
    if not (spec.input or spec.sources):
        for split in spec.splits:  # refuses a missing dataset before anything is made
            Reader(spec.data.model_copy(update={"split": split})).sizes()
    store = open_store(spec.out, spec.endpoint)
    if spec.index != "auto":
        old = _live_version(store)
        check_index(spec.index, store, old.get("index") if old else None)
    with hold_output(store, KIND, "embeds") as lease, ray_cluster():
        check_workers(spec)
        unusable = ingest_targets(spec) if spec.input or spec.sources else {}
        result = _run(spec, store, lease)
    return result | ({"unusable": unusable} if unusable else {})


def _run(spec: EmbedSpec, store: Store, lease: Lease) -> dict[str, Any]:
    listings = store.child(LISTINGS)
    settings = settings_of_job("embed", spec, spec.model, spec.splits)
    segments = TargetSegments.of_job(spec, settings, listings)
    config = config_digest(settings.config)
    old = _live_version(store)
    old_parts = all_parts(old) if old and old["config"] == config else []
    roles: list[Role] = ["positive", "query"] if spec.queries else ["positive"]
    vectors = VectorCache(store.child(UNFINISHED), settings.config)
    vectors.add(store, old_parts)
    with Bars() as bars:
        shards = list_shards(spec.data, spec.splits, listings, spec.cpus_per_task)
        num_samples = sum(shard.stop - shard.start for shard in shards)
        inputs, unit = ("pairs", "inputs") if spec.queries else ("targets", "targets")
        made_by = f"model {spec.model}, {spec.actors} actor(s)"
        say(f"  {num_samples:,} {inputs} of {spec.data.root}, {made_by} -> {store.url}")
        segments.measure(shards, spec.cpus_per_task, partial(bars.update, "video lengths", unit="shards"))
        long_videos: Counter[str] = Counter()
        (bad,) = embed_items(
            _items(shards, listings, roles, segments),
            [(settings, vectors)],
            spec,
            partial(bars.update, "embed", unit=unit),
            on_long_videos=lambda count: long_videos.update(whole=count),
        )
    writer = PartWriter(store, vectors, config)
    for role in roles:
        for part in make_parts(shards, listings, role, segments, bad, spec.samples_per_part):
            writer.add(part)
    writer.flush()
    num_embedded = writer.count_missing(store, old_parts)
    num_vectors = writer.num_rows["positive"]
    version = version_of(config, [path for paths in writer.paths.values() for path in paths])
    kind = default_kind(num_vectors) if spec.index == "auto" else spec.index
    parts = Parts(store, sorted(writer.paths["positive"]))
    if kind != "exact":
        say(f"  index: {kind} of {num_vectors:,} vectors")
    entry = segments.entry(writer.divided)
    # Rows of a corpus with segments have two columns more, for which a table needs another schema.
    index_config = config if entry is None else config_digest({"config": config, "columns": list(RANGE)})
    content = {
        "parts": parts.paths,
        "num_vectors": num_vectors,
        "num_embedded": num_embedded,
        "skipped": dict(writer.skipped["positive"]),
        **({"query_parts": sorted(writer.paths["query"])} if spec.queries else {}),
        **({"segments": entry} if entry is not None else {}),
        "model": _absolute(spec.model),
        "config": config,
        "made_by": {name: settings.config[name] for name in ("base", "adapter", "identity")},
        "dtype": spec.dtype,
        "data": spec.data.model_dump(mode="json", exclude={"trusted"}) | {"root": _absolute(spec.data.root)},
        "fingerprints": settings.fingerprints,
        "version": version,
        "previous": previous_of(old, version, spec.keep_versions),
        "index": build_index(kind, parts, index_config, version, old.get("index") if old else None),
    }
    kept = commit(store, content, lease)
    kept_listings = [*(shard.path for shard in shards), *segments.paths]
    kept_parts = {part for one in kept for part in all_parts(one)}
    _delete_all_but(store, [*kept_parts, *(f"{LISTINGS}/{path}" for path in kept_listings)])
    delete_old(store, kept)
    say(f"  {num_embedded:,} {unit} went through the model; the others had their vector")
    for role in roles:
        for reason, count in writer.skipped[role].items():
            say(f"  skipped{' queries' if role == 'query' else ''}: {reason} {count:,}", "yellow")
    _report_segments(spec, old, writer, long_videos.total() if entry is None else 0)
    return {
        "outputs": [spec.out],
        "vectors": content["num_vectors"],
        "embedded": num_embedded,
        "skipped": dict(writer.skipped["positive"]),
        **({"segments": entry} if entry is not None else {}),
        "version": version,
        "index": kind,
    }


def _report_segments(spec: EmbedSpec, old: VectorsFile | None, writer: PartWriter, num_long_videos: int) -> None:
    """Say what was divided, which segments were skipped, and that a video could have been divided."""
    before = old.get("segments") if old else None
    if before is not None and before["seconds"] != spec.segment_seconds:
        now = "one vector a video" if spec.segment_seconds is None else f"segments of {spec.segment_seconds:g} s"
        say(f"  segments of {before['seconds']:g} s were replaced by {now}", "yellow")
    if spec.segment_seconds is not None:
        segments = writer.divided["segments"]
        say(f"  {_videos(writer.divided['videos'])} longer than {spec.segment_seconds:g} s: {segments:,} segments")
    for text in writer.bad_segments[:_MOST_NAMED]:
        say(f"  skipped segment: {text}", "yellow")
    if (others := len(writer.bad_segments) - _MOST_NAMED) > 0:
        say(f"  and {others:,} more segments", "yellow")
    if num_long_videos:
        say(
            f"  {_videos(num_long_videos)} longer than {clock_time(LONG_VIDEO_S)} and got one vector. To find moments"
            " in videos, embed again with --segment-seconds 30 (in a spec: segment_seconds: 30)"
        )


def _videos(count: int) -> str:
    return "1 video is" if count == 1 else f"{count:,} videos are"


def _absolute(url: str) -> str:
    """A local path as an absolute one, because whoever searches may be in another folder."""
    return str(Path(url).absolute()) if Path(url).exists() else url


def _live_version(store: Store) -> VectorsFile | None:
    """The version that an earlier job published, if there is one."""
    try:
        return read_vectors_file(store)
    except FileNotFoundError:
        return None


def _items(
    shards: Iterable[ListedShard], listings: Store, roles: Sequence[Role], segments: TargetSegments
) -> Iterator[Item]:
    for shard, index, sample in samples_of(shards, listings):
        if isinstance(sample, Rejected):
            continue
        for role in roles:
            if role == "query" and asks(sample):
                yield row_item(shard, index, sample, role)
            elif role == "positive" and not isinstance(found := segments.of(shard, index, sample), Rejected):
                for segment in found:
                    yield row_item(shard, index, sample, role, segment)


def _delete_all_but(store: Store, kept: Iterable[str]) -> None:
    wanted = set(kept)
    wanted |= {ids_path(path) for path in wanted}
    for folder in (*FOLDERS.values(), LISTINGS):
        for path in store.list(folder):
            if path not in wanted and _OURS.fullmatch(path):
                store.delete(path)
    store.delete_tree(UNFINISHED)
