"""Items to stored vectors: a Ray Data job that decodes on any node and embeds in actors with the model.

What is embedded together decides the last bits of a vector. It depends only on the items and on what the store lacks.
So any number of actors gives the same bytes, and so does a job that was killed and started again
(tests/integration/test_evaluate.py, tests/integration/test_embed.py).
"""

from __future__ import annotations

import gc
import json
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import ray.data

from jobs.embedding.settings import EmbedderSettings
from jobs.embedding.specs import Workers
from jobs.embedding.vectors import VectorCache, write_part
from jobs.runtime.cluster import Resources, check_size, ray_data
from pipelines.config import FeedConfig
from pipelines.errors import BadMedia
from pipelines.imports import importing_models
from pipelines.items.decode import ItemDecoder
from pipelines.items.types import Item, as_ids
from pipelines.items.units import windows
from pipelines.samples import Rejected
from rzen.config import PromptConfig
from rzen.inputs.processor import EncodedBatch, Processor
from rzen.model.locate import checkpoint_folder

if TYPE_CHECKING:
    from rzen.embedding.embedder import Embedder

Models = Sequence[tuple[EmbedderSettings, VectorCache]]
LONG_VIDEO_S = 60.0
"""Longer videos are worth being divided into segments."""
_APART = 0.999
BadItems = dict[str, Rejected]
"""Id -> why the item cannot be embedded."""


def embed_items(
    items: Iterable[Item],
    models: Models,
    workers: Workers,
    on_progress: Callable[[int, int], None],
    on_long_videos: Callable[[int], None] = lambda count: None,
) -> list[BadItems]:
    """Embed with each model what its store lacks. Return the bad items of each model.

    `on_progress` gets (done, all), counted over all models. `on_long_videos` gets the number of items with a
    video of more than `LONG_VIDEO_S`, several times.
    """
    bad: list[BadItems] = [{} for _ in models]
    total = 0
    for window in windows(items):
        work = [
            (number, missing)
            for number, (_, vectors) in enumerate(models)
            for unit in window
            if (missing := _missing(unit, vectors))
        ]
        total += len(models) * sum(map(len, window))
        done = total - sum(len(unit) for _, unit in work)
        on_progress(done, total)
        for row in _rows(work, models, workers) if work else ():
            bad[int(row["model"])] |= pickle.loads(row["bad"])
            on_long_videos(int(row["num_long_videos"]))
            done += int(row["num_items"])
            on_progress(done, total)
        for _, vectors in models:
            vectors.refresh()
    return bad


def check_workers(workers: Workers) -> None:
    """Raise `UserError` if the cluster cannot grow, and never holds the actors and one task that decodes at once."""
    if workers.autoscaling:
        return
    each = Resources(workers.cpus_per_actor, workers.gpus_per_actor)
    check_size("actors", workers.actors, each, FeedConfig(cpus_per_task=workers.cpus_per_task))


def describe(bad: Rejected) -> str:
    """Return name, reason and detail of a bad item."""
    return f"{bad.origin}: {bad.reason}: {bad.detail}".removesuffix(": ")


def _missing(unit: list[Item], vectors: VectorCache) -> list[Item]:
    lacking = vectors.missing(as_ids(item.id for item in unit))
    return [item for item, lacks in zip(unit, lacking, strict=True) if lacks]


def _rows(work: list[tuple[int, list[Item]]], models: Models, workers: Workers) -> Iterator[dict[str, Any]]:
    settings = [some for some, _ in models]
    rows = [{"model": number, "items": pickle.dumps(unit)} for number, unit in work]
    stores = [vectors.store for _, vectors in models]
    return through_actors(rows, _prepare, (settings,), EmbedItems, (settings, stores), workers)


def through_actors(
    rows: Sequence[dict[str, Any]],
    prepare: Callable[..., dict[str, Any]],
    prepare_args: tuple[Any, ...],
    actor: Callable[..., Any],
    actor_args: tuple[Any, ...],
    workers: Workers,
) -> Iterator[dict[str, Any]]:
    """Yield what actors make of rows, in any order. `prepare` decodes each row on any node, in a task of its own."""
    cpus_per_task = workers.cpus_per_task
    if (cpus_per_task, 0) == (workers.cpus_per_actor, workers.gpus_per_actor):
        cpus_per_task *= _APART  # tasks and actors that reserve the same would be fused: only actors would decode
    with ray_data():
        made = (
            ray.data.from_items(list(rows), override_num_blocks=len(rows))
            .map(prepare, fn_args=prepare_args, num_cpus=cpus_per_task)
            .map(
                actor,
                fn_constructor_args=actor_args,
                compute=ray.data.ActorPoolStrategy(size=workers.actors),
                num_cpus=workers.cpus_per_actor,
                num_gpus=workers.gpus_per_actor,
            )
        )
        yield from made.iter_rows()


def _prepare(row: dict[str, Any], settings: Sequence[EmbedderSettings]) -> dict[str, Any]:
    """A unit, pickled: `good` is id -> token ids and patches of one input, `bad` is id -> why there are none.

    `num_long_videos` counts items with a video of more than `LONG_VIDEO_S`.
    """
    some = settings[int(row["model"])]
    decoder = _decoder(some)
    processor = _processor(some.model.base, some.identity.prompt, some.endpoint)
    good: dict[str, EncodedBatch] = {}
    bad: BadItems = {}
    num_long_videos = 0
    items: list[Item] = pickle.loads(row["items"])
    for item, decoded in zip(items, decoder.inputs(items), strict=True):
        if isinstance(decoded, Rejected):
            bad[item.id] = decoded
            continue
        num_long_videos += any(one.times_s and one.times_s[-1] > LONG_VIDEO_S for one in decoded.visuals)
        try:
            good[item.id] = processor.encode([decoded if some.model.instructions else replace(decoded, instruction="")])
        except BadMedia as error:
            bad[item.id] = Rejected(item.name, error.reason, error.detail)
    return {
        "model": row["model"],
        "good": pickle.dumps(good),
        "bad": pickle.dumps(bad),
        "num_long_videos": num_long_videos,
    }


@cache
def _processor(base: str, prompt: PromptConfig, endpoint: str | None) -> Processor:
    """Read once in a process."""
    return Processor(checkpoint_folder(base, endpoint), prompt)


def _load(some: EmbedderSettings) -> Embedder:
    with importing_models():
        from rzen.embedding.embedder import load  # torch is for the actors, not for the tasks that decode

    model = some.model
    return load(
        model.base,
        model.adapter,
        dtype=some.dtype,
        identity=some.identity,
        chunk_tokens=some.chunk_tokens,
        endpoint=some.endpoint,
    )


_decoders: dict[str, ItemDecoder] = {}


def _decoder(some: EmbedderSettings) -> ItemDecoder:
    """One in a process for each state of the data, with its manifest and indices."""
    data = some.data.model_dump_json() if some.data else ""
    key = json.dumps([some.media.model_dump_json(), data, some.fingerprints])
    if key not in _decoders:
        _decoders.clear()
        _decoders[key] = ItemDecoder(some.media, some.data, some.fingerprints)
    return _decoders[key]


class EmbedItems:
    """An actor that holds one model at a time, embeds units and stores their parts."""

    def __init__(self, settings: Sequence[EmbedderSettings], stores: Sequence[Any]) -> None:
        self._settings, self._stores = settings, stores
        self._loaded: tuple[int, Embedder] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return how many items there were, and those that could not be embedded."""
        number = int(row["model"])
        good: dict[str, EncodedBatch] = pickle.loads(row["good"])
        if good:
            vectors = self._embedder(number).embed_encoded(list(good.values()))
            write_part(self._stores[number], list(good), vectors)
        num_items = len(good) + len(pickle.loads(row["bad"]))
        return {"model": number, "num_items": num_items, "bad": row["bad"], "num_long_videos": row["num_long_videos"]}

    def _embedder(self, number: int) -> Embedder:
        if self._loaded is None or self._loaded[0] != number:
            self._loaded = None
            gc.collect()  # the weights of the model before, which may fill the GPU
            some = self._settings[number]
            self._loaded = number, _load(some)
        return self._loaded[1]
