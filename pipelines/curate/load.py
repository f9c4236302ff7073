"""Features from the cache as the tables that the rules read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np
import pyarrow as pa

from pipelines.curate.features import FAMILIES, Family, FeatureSettings, Inputs, ShardInputs, read_features
from pipelines.curate.leakage import EvaluationInputs
from pipelines.curate.samples import Samples
from pipelines.curate.tables import MediaTable, TextTable
from pipelines.storage.ahead import read_ahead
from pipelines.storage.store import Store

_READERS = 16
_INPUTS_AT_ONCE = 100_000  # of evaluation sets: about 130 MB


def load_samples(
    inputs: Sequence[ShardInputs], families: Iterable[Family], settings: FeatureSettings, cache: Store
) -> Samples:
    """Return the samples of all shards, which are in the order of the manifest. All features must be in the cache."""
    shards = [some.shard for some in inputs]
    sources = tuple(dict.fromkeys(shard.source for shard in shards))
    task_of = {shard.source: shard.task for shard in shards}
    size_of = {shard.source: shard.stop for shard in shards}  # the last shard of a source ends it
    texts = TextTable.of(_read("texts", inputs, settings, cache))
    if "media" in families:
        media = MediaTable.of(_read("media", inputs, settings, cache))
    else:
        media = MediaTable.unknown(len(texts.content))
    starts = np.cumsum([0, *(size_of[name] for name in sources)], dtype=np.int64)
    return Samples(sources, tuple(task_of[name] for name in sources), starts, texts, media)


def load_evaluation(
    datasets: Iterable[tuple[str, Sequence[Inputs]]], settings: FeatureSettings, cache: Store
) -> Iterator[EvaluationInputs]:
    """Yield the inputs of evaluation sets, name by name, in groups of limited size."""
    for name, inputs in datasets:
        for group in _groups(inputs):
            texts, media = (_read(family, group, settings, cache) for family in FAMILIES)
            yield EvaluationInputs(name, group, TextTable.of(texts), MediaTable.of(media))


def _groups(inputs: Iterable[Inputs]) -> Iterator[list[Inputs]]:
    group: list[Inputs] = []
    for some in inputs:
        group.append(some)
        if sum(map(len, group)) >= _INPUTS_AT_ONCE:
            yield group
            group = []
    if group:
        yield group


def _read(family: Family, inputs: Sequence[Inputs], settings: FeatureSettings, cache: Store) -> Iterator[pa.Table]:
    """Yield the features of each of the inputs in order. A few are read ahead."""
    return read_ahead(partial(read_features, family, settings=settings, cache=cache), inputs, _READERS)
