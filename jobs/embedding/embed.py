"""Job of kind `embed`: a Ray Data job with model actors, from samples in shards to vectors in Parquet.

{out}/parts/{split}-{source}-{start}.parquet    one row a target: where it is, what it is, its vector
      vectors.json                              parts, model and data, written last: readers trust only this
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from jobs.embedding.specs import EmbedSpec
from jobs.runtime.cluster import Resources, check_size, ray_cluster, ray_data
from jobs.runtime.models import load_exported
from jobs.runtime.progress import Bars, say
from jobs.runtime.records import as_json
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.samples import DecodedSample, MediaKind, Rejected, Sample
from pipelines.storage.location import open_store, resolve_endpoint
from pipelines.storage.store import Store
from rzen.evaluation.encode import embed_inputs
from rzen.report.hits import Modality

MANIFEST, PARTS = "vectors.json", "parts"
_MODALITIES: dict[MediaKind, Modality] = {"image": "image", "document": "page", "video": "video"}


def run(spec: EmbedSpec) -> dict[str, Any]:
    """Embeds the target of every sample of the splits, and publishes the vectors."""
    readers: dict[str, Reader] = {split: Reader(data_of(spec.data, split)) for split in spec.splits}
    units = _units(spec, readers)
    total = sum(unit["stop"] - unit["start"] for unit in units)
    store = open_store(spec.out, spec.endpoint)
    say(f"  {total:,} targets of {spec.data.root}, model {spec.model}, {spec.actors} actor(s) -> {store.url}")
    store.ensure_bucket()
    store.delete(MANIFEST)
    store.delete_tree(PARTS)
    parts: list[str] = []
    skipped: Counter[str] = Counter()
    with ray_cluster(), Bars() as bars:
        if not spec.autoscaling:
            check_size("actors", spec.actors, Resources(spec.cpus_per_actor, spec.gpus_per_actor))
        done = 0
        for row in _embedded(spec, units, readers, store):
            parts.append(row["part"])
            skipped.update(json.loads(row["skipped"]))
            done += int(row["num_samples"])
            bars.update("embed", done, total)
    content = {
        "parts": sorted(parts),
        "num_vectors": total - skipped.total(),
        "skipped": dict(skipped),
        # Absolute, where local: whoever searches may be in another folder.
        "model": open_store(spec.model, spec.endpoint).url,
        "dtype": spec.dtype,
        "data": spec.data.model_dump(mode="json") | {"root": open_store(spec.data.root, spec.data.endpoint).url},
    }
    store.write(MANIFEST, as_json(content))
    for reason, count in skipped.items():
        say(f"  skipped: {reason} {count:,}", "yellow")
    return {"outputs": [spec.out], "vectors": content["num_vectors"], "skipped": dict(skipped)}


def _units(spec: EmbedSpec, readers: dict[str, Reader]) -> list[dict[str, Any]]:
    """Stretches of neighboring samples of one source, one unit of work each."""
    return [
        {"split": split, "source": source, "start": start, "stop": min(start + spec.samples_per_task, size)}
        for split, reader in readers.items()
        for source, size in reader.sizes().items()
        for start in range(0, size, spec.samples_per_task)
    ]


def data_of(data: DataConfig, split: str) -> DataConfig:
    """The same data, another split."""
    return data.model_copy(update={"split": split})


def _embedded(
    spec: EmbedSpec, units: list[dict[str, Any]], readers: dict[str, Reader], store: Store
) -> Iterator[dict[str, Any]]:
    with ray_data():
        rows = ray.data.from_items(units, override_num_blocks=len(units)).map(
            EmbedTargets,
            fn_constructor_args=(spec, resolve_endpoint(spec.endpoint), readers, store),
            compute=ray.data.ActorPoolStrategy(size=spec.actors),
            num_cpus=spec.cpus_per_actor,
            num_gpus=spec.gpus_per_actor,
        )
        yield from rows.iter_rows()


class EmbedTargets:
    """An actor with the model: embeds one unit of work and stores its part."""

    def __init__(self, spec: EmbedSpec, endpoint: str | None, readers: dict[str, Reader], store: Store) -> None:
        self._readers = readers
        self._store = store
        self._batch_size = spec.batch_size
        self._processor, self._embedder = load_exported(spec.model, endpoint, spec.dtype)

    def __call__(self, unit: dict[str, Any]) -> dict[str, Any]:
        """The name of the part, samples seen, and counts of the skipped ones by reason."""
        split, source = unit["split"], unit["source"]
        items = self._readers[split].samples(source, range(unit["start"], unit["stop"]))
        indices = iter(range(unit["start"], unit["stop"]))
        rows: list[dict[str, Any]] = []
        skipped: Counter[str] = Counter()
        while batch := list(islice(items, self._batch_size)):
            numbered = [(next(indices), item) for item in batch]
            skipped.update(item.reason for _, item in numbered if isinstance(item, Rejected))
            rows += self._embed(split, [(i, item) for i, item in numbered if isinstance(item, DecodedSample)])
        part = f"{PARTS}/{split}-{source}-{unit['start']:09d}.parquet"
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
        self._store.write(part, sink.getvalue())
        return {"part": part, "num_samples": unit["stop"] - unit["start"], "skipped": json.dumps(skipped)}

    def _embed(self, split: str, samples: list[tuple[int, DecodedSample]]) -> list[dict[str, Any]]:
        if not samples:
            return []
        sides = [decoded.positive for _, decoded in samples]
        vectors_ND = embed_inputs(self._processor, self._embedder, sides, self._batch_size)
        return [
            _row(split, index, decoded.sample, vector)
            for (index, decoded), vector in zip(samples, vectors_ND, strict=True)
        ]


def _row(split: str, index: int, sample: Sample, vector: np.ndarray[Any, Any]) -> dict[str, Any]:
    media = sample.positive.media
    return {
        "split": split,
        "source": sample.source,
        "index": index,
        "modality": _MODALITIES[media[0].kind] if media else "text",
        "title": sample.query.text if media else sample.positive.text,
        "origin": sample.origin,
        "target_sha256": sample.target_sha256,
        "vector": vector.astype(np.float32),
    }
