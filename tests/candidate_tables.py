"""A small candidate table of the dataset in `tests/data.py`, written by hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from pipelines.candidates.table import CandidateTable
from pipelines.candidates.types import (
    CandidateManifest,
    CandidateRows,
    PartInfo,
    Pool,
    TableData,
    content_id,
    modality_code,
)
from pipelines.candidates.write import PartWriter, publish_table
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.samples import Sample
from pipelines.shards.manifest import Manifest
from pipelines.storage.store import Store


def publish_candidates(
    store: Store,
    root: str,
    manifest: Manifest,
    candidates: Mapping[tuple[str, int], Sequence[int]],
    dropped: Sequence[tuple[str, int]] = (),
) -> CandidateTable:
    """Write a table. Its pools are the sources of the split. (source, index) -> numbers of its candidates."""
    reader = Reader(DataConfig(root=root, split=manifest.split))  # type: ignore[arg-type]
    pools = tuple(
        Pool(manifest.split, name, source.fingerprint, source.num_samples)  # type: ignore[arg-type]
        for name, source in manifest.sources.items()
    )
    samples = {name: list(reader.records(name, range(info.num_samples))) for name, info in manifest.sources.items()}
    targets = [sample for found in samples.values() for sample in found]
    writer = PartWriter.of(store, {"by": "hand"})
    parts = {}
    for name, source in manifest.sources.items():
        start, infos = 0, []
        for ordinal, shard in enumerate(source.shards):
            indices = range(start, start + shard.num_samples)
            numbers = [list(candidates.get((name, index), ())) for index in indices]
            flat = [number for some in numbers for number in some]
            rows = CandidateRows.of(
                [sample.key if isinstance(sample, Sample) else "" for sample in samples[name][start : indices.stop]],
                [len(some) for some in numbers],
                candidate=flat,
                id=[content_id(targets[number].target_sha256) for number in flat],  # type: ignore[union-attr]
                recall=[1 - number / 100 for number in flat],
                candidate_modality=[modality_code("image")] * len(flat),
                modality=[modality_code("image")] * len(indices),
                keep=[(name, index) not in dropped for index in indices],
            )
            infos.append(writer.write(name, ordinal, rows))
            start = indices.stop
        parts[name] = tuple(infos)
    sources = {name: source.fingerprint for name, source in manifest.sources.items()}
    table = CandidateManifest("mine", TableData(root, manifest.split, sources), pools=pools)
    return publish_table(store, replace(table, parts=parts))


class KilledError(Exception):
    """Stands for the death of a process."""


def killed_at(monkeypatch: pytest.MonkeyPatch, shard: int) -> list[int]:
    """Let writing this shard's part die, once. Return the list of the parts that are written from then on."""
    write = PartWriter.write
    written: list[int] = []

    def dying(
        self: PartWriter, source: str, number: int, rows: CandidateRows, notes: Mapping[str, Any] | None = None
    ) -> PartInfo:
        if number == shard and KilledError not in died:
            died.append(KilledError)
            raise KilledError
        written.append(number)
        return write(self, source, number, rows, notes)

    died: list[type[KilledError]] = []
    monkeypatch.setattr(PartWriter, "write", dying)
    return written
