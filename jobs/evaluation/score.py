"""Datasets to scores: what is lacking is embedded by the engine, then each model is scored on each dataset."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from jobs.embedding.engine import BadItems, Models, describe, embed_items
from jobs.embedding.settings import embedder_settings
from jobs.embedding.vectors import VectorCache
from jobs.evaluation.datasets import DAMAGED, Bundle, Entry
from jobs.evaluation.specs import EvaluateSpec
from jobs.runtime.progress import Bars
from pipelines.benchmarks.join import JoinedDatasets, join_datasets
from pipelines.benchmarks.types import Dataset, Pool, Row, read_pool, without_instructions
from pipelines.errors import UserError
from pipelines.items.types import Item, as_ids
from pipelines.items.units import WINDOW_ITEMS
from pipelines.storage.store import Store
from rzen.evaluation.dataset_scores import DatasetScores, score_dataset
from rzen.evaluation.mixed_pool import MixedScores, score_mixed_pool
from rzen.evaluation.vectors import Vectors

_NUM_TOP = 100
"""First candidates of each query that files list."""


@dataclass(frozen=True)
class Scored:
    """One model on one dataset. The vectors are those of the dataset's queries and candidates, memory-mapped until the
    next one is asked for. `plain` are the scores without instructions, where these were asked for.
    """

    model: str
    scores: DatasetScores
    queries: Vectors
    candidates: Vectors
    plain: DatasetScores | None


@dataclass(frozen=True)
class Problem:
    """Why a model has no score on a dataset."""

    model: str
    row: Row
    text: str


def endpoint_of(spec: EvaluateSpec) -> str | None:
    """Return the S3 endpoint of models and cache: the spec's, or that of its data."""
    return spec.endpoint or (spec.data.endpoint if spec.data else None)


def models_of(spec: EvaluateSpec, bundle: Bundle, stores: Mapping[str, Store]) -> Models:
    """Return each model with its vectors, in the order of the spec. Reads all weights, to identify them.

    `stores` has the folder of each model's vectors.
    """
    settings = [
        embedder_settings(
            name,
            ref,
            spec.identity,
            endpoint=endpoint_of(spec),
            media=bundle.media,
            dtype=spec.dtype,
            chunk_tokens=spec.chunk_tokens,
            data=bundle.data,
            splits=[bundle.data.split] if bundle.data else [],
        )
        for name, ref in spec.models.items()
    ]
    return [(some, VectorCache(stores[some.name], some.config)) for some in settings]


def score_models(spec: EvaluateSpec, bundle: Bundle, models: Models) -> Iterator[Scored | Problem]:
    """Yield every model on every dataset, group by group, model by model.

    A dataset of files that cannot be read, embedded or scored is a `Problem`, and the others go on. For a split it is a
    `UserError`: its data are ours.
    """
    done, total = 0, len(models) * len(bundle.entries)
    names = ", ".join(some.name for some, _ in models)
    with Bars() as bars, tempfile.TemporaryDirectory(prefix="rzen-vectors-", dir=spec.scratch) as scratch:
        on_progress = partial(bars.update, "embed", unit="items", note=names)
        for group, problems in _groups(bundle.entries):
            for row, text in problems:
                yield from (Problem(some.name, row, text) for some, _ in models)
            bad = embed_items(_items(spec, group), models, spec, on_progress)
            for (some, vectors), mine in zip(models, bad, strict=True):
                corpora = _Corpora(vectors, Path(scratch))
                for dataset in group:
                    try:
                        yield _score(spec, some.name, dataset, corpora, mine, is_ours=bundle.data is not None)
                    except UserError as error:
                        if bundle.data is not None:
                            raise
                        yield Problem(some.name, dataset.row, str(error))
                    done += 1
                    bars.update("score", done, total, unit="datasets", note=f"{some.name} {dataset.row.name}")


def score_mixed_pools(
    spec: EvaluateSpec, models: Models, datasets: Mapping[str, Sequence[Dataset]]
) -> dict[str, dict[str, MixedScores]]:
    """Return model -> dataset -> its scores among the candidates of all `datasets` of the model, scored before.

    A model with fewer than two datasets has none: their own pool is the mixed one.
    """
    found: dict[str, dict[str, MixedScores]] = {some.name: {} for some, _ in models}
    joined: dict[tuple[str, ...], JoinedDatasets] = {}
    with tempfile.TemporaryDirectory(prefix="rzen-vectors-", dir=spec.scratch) as scratch:
        for some, vectors in models:
            mine = datasets[some.name]
            if len(mine) < 2:
                continue
            names = tuple(dataset.row.name for dataset in mine)
            if names not in joined:
                joined[names] = join_datasets(mine)
            whole, corpora = joined[names], _Corpora(vectors, Path(scratch))
            _, candidates = corpora.candidates(whole.dataset, whole.pool)
            found[some.name] = score_mixed_pool(whole, corpora.queries(whole.dataset), candidates)
    return found


def _groups(entries: Sequence[Entry]) -> Iterator[tuple[list[Dataset], list[tuple[Row, str]]]]:
    """Datasets that are embedded in one job, opened when their turn comes, and those that cannot be opened.

    Datasets of one corpus that follow each other are in one group: the corpus is read and embedded once.
    """
    group: list[Dataset] = []
    problems: list[tuple[Row, str]] = []
    size = 0
    for row, opened in entries:
        try:
            dataset = opened()
        except UserError as error:
            problems.append((row, str(error)))
            continue
        is_new = not group or group[-1].corpus != dataset.corpus
        if is_new and size >= WINDOW_ITEMS:
            yield group, problems
            group, problems, size = [], [], 0
        group.append(dataset)
        size += len(dataset.queries) + (_num_candidates(dataset) if is_new else 0)
    if group or problems:
        yield group, problems


def _num_candidates(dataset: Dataset) -> int:
    return len(dataset.candidates) if isinstance(dataset.candidates, Sequence) else WINDOW_ITEMS


def _items(spec: EvaluateSpec, group: Sequence[Dataset]) -> Iterator[Item]:
    """Everything to embed for a group; a corpus only the first time."""
    seen: set[str] = set()
    for dataset in group:
        for asked in filter(None, (dataset, _plain(spec, dataset))):
            yield from (query.item for query in asked.queries)
        if dataset.corpus not in seen:
            seen.add(dataset.corpus)
            yield from dataset.candidates


def _plain(spec: EvaluateSpec, dataset: Dataset) -> Dataset | None:
    """The dataset without instructions, where it has some and is to be asked without them, too."""
    if spec.instruction_sensitivity and any(query.item.instruction for query in dataset.queries):
        return without_instructions(dataset)
    return None


class _Corpora:
    """Pool and vectors of one corpus at a time: datasets that share it follow each other."""

    def __init__(self, vectors: VectorCache, scratch: Path) -> None:
        self._vectors, self._scratch = vectors, scratch
        self._name: str | None = None

    def candidates(self, dataset: Dataset, pool: Pool | None = None) -> tuple[Pool, Vectors]:
        """Return the pool, read unless it is given, and the vectors in its order, those that there are."""
        if self._name != dataset.corpus:
            self._name = None
            self._pool = pool or read_pool(dataset)
            self._loaded = self._vectors.load(self._pool.ids, self._scratch / "candidates.npy")
            self._name = dataset.corpus
        return self._pool, self._loaded

    def queries(self, dataset: Dataset) -> Vectors:
        """Return the vectors of the queries in their order."""
        return self._vectors.load(as_ids(query.item.id for query in dataset.queries), self._scratch / "queries.npy")


def _score(
    spec: EvaluateSpec, model: str, dataset: Dataset, corpora: _Corpora, bad: BadItems, *, is_ours: bool
) -> Scored:
    pool, candidates = corpora.candidates(dataset)
    _refuse(dataset, pool, bad, is_ours)
    queries = corpora.queries(dataset)
    num_top = max(_NUM_TOP, spec.rerank.top_k if spec.rerank else 0)
    scores = score_dataset(dataset, queries, candidates, pool=pool, num_top=num_top, collapse_is_error=not is_ours)
    without = None
    if plain := _plain(spec, dataset):
        without = score_dataset(plain, corpora.queries(plain), candidates, pool=pool, collapse_is_error=not is_ours)
    return Scored(model, scores, queries, candidates, without)


def _refuse(dataset: Dataset, pool: Pool, bad: BadItems, is_ours: bool) -> None:
    """Raise `UserError` for a dataset with an item that could not be embedded: without it the task is another."""
    wanted = np.concatenate([pool.ids, as_ids(query.item.id for query in dataset.queries)])
    mine = [id for id, there in zip(bad, np.isin(as_ids(bad), wanted), strict=True) if there]
    if mine:
        problem = f"{len(mine)} of {len(wanted)} items cannot be embedded, the first: {describe(bad[mine[0]])}"
        raise UserError(dataset.row.name, problem, DAMAGED if is_ours else "fetch its files again")
