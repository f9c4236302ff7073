"""Benchmark items to vectors in a cache: a Ray Data job, decoding on any node, embedding in actors with the model.

What is embedded together decides the last bits of a vector. It depends on the items that are asked for and on nothing
else: any number of actors, and a job that was killed and begun again, give the same bytes
(tests/integration/test_benchmark.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np
import ray.data

from jobs.embedding.vectors import VectorCache, write_part
from jobs.runtime.cluster import ray_data
from jobs.runtime.models import Dtype, checkpoint_folder, load_model
from jobs.spec.model import ModelRef
from pipelines.benchmarks.decode import ItemDecoder
from pipelines.benchmarks.types import Item, as_ids
from pipelines.config import MediaConfig
from pipelines.errors import BadMedia
from pipelines.samples import MediaKind
from pipelines.storage.store import Store
from rzen.config import ModelIdentity, PromptConfig
from rzen.inputs.processor import EncodedBatch, Processor

WINDOW_ITEMS = 250_000
"""Items of one Ray job; more would cost the driver too much memory, and fewer would load the model more often."""
_UNIT_COST = 1024
_COSTS: dict[MediaKind, int] = {"image": 16, "document": 16, "video": 64}
"""A unit of work is 1024 texts, 64 images or 16 videos: some ten seconds, and at most 0.5 GB of patches."""


@dataclass(frozen=True)
class Encoding:
    """How items are embedded, and with how much of the cluster."""

    model: ModelRef
    identity: ModelIdentity
    endpoint: str | None
    media: MediaConfig
    dtype: Dtype
    chunk_tokens: int
    actors: int
    cpus_per_actor: float
    gpus_per_actor: float
    cpus_per_task: float


def encode(
    items: Iterable[Item], cache: VectorCache, how: Encoding, on_progress: Callable[[int, int], None]
) -> dict[str, str]:
    """Embeds what the cache lacks. Returns why, by id, for items that cannot be. `on_progress` gets (done, all)."""
    bad: dict[str, str] = {}
    total = 0
    for window in _windows(items):
        work = [missing for unit in window if (missing := _missing(unit, cache))]
        total += sum(map(len, window))
        done = total - sum(map(len, work))
        on_progress(done, total)
        for row in _rows(work, cache.store, how) if work else ():
            bad |= pickle.loads(row["bad"])
            done += int(row["num_items"])
            on_progress(done, total)
        cache.refresh()
    return bad


def units(items: Sequence[Item]) -> list[list[Item]]:
    """Pure. Items of like form and length together, so that little of a batch is padding; in order of that."""
    ordered = sorted(items, key=lambda item: (_cost(item), item.modality, len(item.side.text), item.id))
    found: list[list[Item]] = []
    room = 0
    for item in ordered:
        if not found or room < _cost(item):
            found.append([])
            room = _UNIT_COST
        found[-1].append(item)
        room -= _cost(item)
    return found


def _cost(item: Item) -> int:
    return sum(_COSTS[media.kind] for media in item.side.media) or 1


def _windows(items: Iterable[Item]) -> Iterator[list[list[Item]]]:
    """Every item once, in units, so many at a time."""
    seen: set[bytes] = set()
    window: list[Item] = []
    for item in items:
        if (id := bytes.fromhex(item.id)) not in seen:  # half the size: there may be ten million
            seen.add(id)
            window.append(item)
        if len(window) == WINDOW_ITEMS:
            yield units(window)
            window = []
    if window:
        yield units(window)


def _missing(unit: list[Item], cache: VectorCache) -> list[Item]:
    return [item for item, lacks in zip(unit, cache.missing(as_ids(item.id for item in unit)), strict=True) if lacks]


def _rows(work: list[list[Item]], store: Store, how: Encoding) -> Iterator[dict[str, Any]]:
    with ray_data():
        rows = (
            ray.data.from_items([{"items": pickle.dumps(unit)} for unit in work], override_num_blocks=len(work))
            .map(
                _prepare,
                fn_args=(how.model, how.identity.prompt, how.endpoint, how.media),
                num_cpus=how.cpus_per_task,
            )
            .map(
                EmbedItems,
                fn_constructor_args=(how, store),
                compute=ray.data.ActorPoolStrategy(size=how.actors),
                num_cpus=how.cpus_per_actor,
                num_gpus=how.gpus_per_actor,
            )
        )
        yield from rows.iter_rows()


def _prepare(
    row: dict[str, Any], ref: ModelRef, prompt: PromptConfig, endpoint: str | None, media: MediaConfig
) -> dict[str, Any]:
    """A unit, pickled: `good` is id -> token ids and patches of one side, `bad` is id -> why there are none."""
    processor, decoder = _tools(ref.base, prompt, endpoint, media)
    good: dict[str, EncodedBatch] = {}
    bad: dict[str, str] = {}
    for item in pickle.loads(row["items"]):
        try:
            side = decoder.side(item)
            good[item.id] = processor.encode([side if ref.instructions else replace(side, instruction="")])
        except BadMedia as error:
            bad[item.id] = f"{item.name}: {error.reason}: {error.detail}".removesuffix(": ")
    return {"good": pickle.dumps(good), "bad": pickle.dumps(bad)}


@cache
def _tools(base: str, prompt: PromptConfig, endpoint: str | None, media: MediaConfig) -> tuple[Processor, ItemDecoder]:
    """Read once in a process."""
    return Processor(checkpoint_folder(base, endpoint), prompt), ItemDecoder(media)


class EmbedItems:
    """An actor with the model: embeds one unit and stores its part."""

    def __init__(self, how: Encoding, store: Store) -> None:
        self._store, self._chunk_tokens = store, how.chunk_tokens
        _, self._embedder = load_model(how.model, how.endpoint, how.identity, how.dtype)

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """How many items there were, and those that could not be embedded."""
        import torch

        from rzen.model.chunks import chunks_of, embed

        good: dict[str, EncodedBatch] = pickle.loads(row["good"])
        if good:
            sides = list(good.values())
            lengths = np.concatenate([side.lengths for side in sides])
            chunks = chunks_of(lengths, self._chunk_tokens, packed=self._embedder.packs)
            with torch.inference_mode():
                vectors = embed(self._embedder, sides, chunks, twice=False).cpu().numpy()
            write_part(self._store, list(good), vectors)
        return {"num_items": len(good) + len(pickle.loads(row["bad"])), "bad": row["bad"]}
