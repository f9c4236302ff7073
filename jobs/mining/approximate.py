"""Inverted lists of each pool, made once for all actors, and how much of the exact result they find."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from jobs.mining.pools import NO_ITEM, Pool
from jobs.mining.scratch import Scratch
from jobs.mining.search import PoolVectors, SearchSettings, fetched, index_path
from jobs.mining.specs import InvertedListsConfig
from pipelines.ingest.tasks import run_tasks
from pipelines.stored_json import parse_json, stored_file
from rzen.index.by_id import Ids, VectorIndex
from rzen.neighbors.exact import nearest
from rzen.neighbors.inverted_lists import InvertedLists, recall

NUM_MEASURED = 1000
_LISTS_PER_ROOT = 4


@stored_file
class RecallFile(TypedDict):
    """What was measured of the lists of a pool: share of the exact candidates that they find."""

    recall: float


@dataclass(frozen=True, slots=True)
class ListsWork:
    """The lists of one pool. `pool` and `vectors` may be references of Ray."""

    number: int
    pool: Any
    queries: Ids
    vectors: Any
    settings: SearchSettings
    config: InvertedListsConfig


def build_lists(works: Sequence[ListsWork], cpus_per_task: float) -> Iterator[tuple[int, float]]:
    """Make the lists that are not there. Yield the place of each work, and the recall of its lists."""
    yield from run_tasks(_build, works, cpus_per_task)


def _build(work: ListsWork) -> float:
    store, path = work.settings.writer.store, index_path(work.settings.job, work.number)
    measured = f"{path}.json"
    try:
        return parse_json(store.read(measured), f"{store.url}/{measured}", RecallFile, "delete the file")["recall"]
    except FileNotFoundError:
        pass
    pool: Pool = fetched(work.pool)
    vectors: VectorIndex = fetched(work.vectors)
    scratch = Scratch(work.settings.scratch, work.settings.job)
    searched = PoolVectors(work.number, pool, vectors, scratch, work.settings)
    num_lists = work.config.lists or max(1, int(_LISTS_PER_ROOT * np.sqrt(len(pool))))
    lists = InvertedLists.build(searched.vectors_UD, num_lists, work.config.seed)
    store.write(path, lists.to_bytes().tobytes())
    found = _recall(work, lists, searched, vectors)
    store.write(measured, json.dumps({"recall": found}).encode())
    return found


def _recall(work: ListsWork, lists: InvertedLists, searched: PoolVectors, vectors: VectorIndex) -> float:
    """Compare with exact search for queries that a seed draws. Nothing is excluded in either."""
    asked = np.unique(work.queries[work.queries != NO_ITEM])
    asked = asked[~vectors.missing(asked)]
    drawn = np.random.default_rng(work.config.seed).permutation(len(asked))[:NUM_MEASURED]
    with tempfile.TemporaryDirectory(prefix="rzen-queries-") as folder:
        queries_QD = np.array(vectors.load(asked[np.sort(drawn)], Path(folder, "queries.npy")).rows)
    depth = work.settings.depth
    exact = nearest(queries_QD, searched.vectors_UD, depth)
    return recall(lists.nearest(queries_QD, searched.vectors_UD, depth, work.config.probes), exact)
