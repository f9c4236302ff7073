"""The samples of a split without their files: shards are read once, by Ray tasks, and what they hold is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ray.data

from jobs.runtime.cluster import ray_data
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.items.listing import ListedShard, read_listing, shards_of, write_listing
from pipelines.samples import Rejected, Sample
from pipelines.storage.location import resolve_endpoint
from pipelines.storage.store import Store

_FEW = 8


def list_shards(
    data: DataConfig,
    splits: Iterable[str],
    store: Store,
    cpus_per_task: float,
    sources: Sequence[str] | None = None,
    *,
    on_cluster: bool = True,
) -> list[ListedShard]:
    """Make the listings that `store` lacks, and return all shards of the splits in order.

    Needs Ray if `on_cluster`. Otherwise this process reads one shard after the other.
    """
    shards = []
    for split in splits:
        found = shards_of(Reader(data.model_copy(update={"split": split})))
        shards += [shard for shard in found if sources is None or shard.source in sources]
    kept = set(store.list())
    lacking = [shard for shard in shards if shard.path not in kept]
    few = len(lacking) if not on_cluster else _FEW
    for _ in each_shard(write_listing, data, lacking, store, cpus_per_task, few=few):
        pass
    return shards


def each_shard(
    read: Callable[[DataConfig, ListedShard, Store], None],
    data: DataConfig,
    shards: Sequence[ListedShard],
    store: Store,
    cpus_per_task: float,
    *,
    few: int,
) -> Iterator[object]:
    """Call `read` for each shard, and yield after each. Needs Ray for more than `few` shards.

    So few are sooner read by this process than a task is started.
    """
    if len(shards) <= few:
        for shard in shards:
            read(data, shard, store)
            yield shard
        return
    data = data.model_copy(update={"endpoint": resolve_endpoint(data.endpoint)})
    rows = [{"number": number} for number in range(len(shards))]
    with ray_data():
        yield from (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(_read, fn_args=(read, data, shards, store), num_cpus=cpus_per_task)
            .iter_rows()
        )


def samples_of(shards: Iterable[ListedShard], store: Store) -> Iterator[tuple[ListedShard, int, Sample | Rejected]]:
    """Yield shard, index in the source, and sample (or why it cannot be read) in order."""
    for shard in shards:
        for index, sample in enumerate(read_listing(shard, store), start=shard.start):
            yield shard, index, sample


def _read(
    row: dict[str, Any],
    read: Callable[[DataConfig, ListedShard, Store], None],
    data: DataConfig,
    shards: Sequence[ListedShard],
    store: Store,
) -> dict[str, Any]:
    read(data, shards[int(row["number"])], store)
    return row
