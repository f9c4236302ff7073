"""A small published dataset of text-to-image pairs, written without Ray, with faults where a test wants them."""

import io
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.candidates.table import CandidateTable
from pipelines.candidates.types import CandidateManifest, CandidateRows, PlanRows, Pool, TableData, content_id
from pipelines.candidates.write import PartWriter, publish_table
from pipelines.errors import BadMedia
from pipelines.samples import DecodedSample, Input, Media, Members, Sample, Split
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.index import read_index_table, with_hashes
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, index_path, publish_manifest
from pipelines.shards.write import write_shard
from pipelines.storage.store import Store

SAMPLES_PER_SHARD = 8


def make_sample(
    source: str, task: str, number: int, bad: bool, colour: int | None = None, query: int | None = None
) -> tuple[Sample, Members]:
    """Text to an image of one colour, its number's where none is given; a `bad` one is no image.

    The text names `query` instead of the number, where it is given.
    """
    picture = io.BytesIO()
    colour = number if colour is None else colour
    Image.new("RGB", (12, 8), (colour % 256, colour // 256, 7)).save(picture, "PNG")
    members = {"p0.png": b"no image" if bad else picture.getvalue()}
    sample = Sample(
        key=f"{number:08d}",
        source=source,
        task=task,
        query=Input(f"{source} {number if query is None else query}"),
        positive=Input("", (Media("image", "p0.png"),)),
        negatives=(Input(f"not {source} {number}"), Input("nor this")),
        instruction="Find the colour.",
        origin=f"{number}.png",
    )
    return with_hashes(sample, members), members


def publish(
    store: Store,
    sources: Mapping[str, tuple[str, int]],
    bad: Mapping[str, Collection[int]] | None = None,
    duplicates: Mapping[str, Collection[int]] | None = None,
    equal_queries: Mapping[str, Collection[int]] | None = None,
    split: Split = "train",
) -> Manifest:
    """Writes a split: source -> (task, number of samples). Those in `bad` cannot be decoded, those in
    `duplicates` show what sample 0 shows, those in `equal_queries` ask what sample 1 asks. Shards hold 8.
    """
    store.ensure_bucket()
    infos = {}
    for source, (task, count) in sources.items():
        unusable, same, asked = ((some or {}).get(source, ()) for some in (bad, duplicates, equal_queries))
        samples = [
            make_sample(source, task, n, n in unusable, 0 if n in same else n, 1 if n in asked else n)
            for n in range(count)
        ]
        parts = [samples[start : start + SAMPLES_PER_SHARD] for start in range(0, count, SAMPLES_PER_SHARD)]
        shards = tuple(store_shard(store, split, source, ordinal, part) for ordinal, part in enumerate(parts))
        infos[source] = SourceInfo(task, count, shards)
    manifest = with_duplicates(store, Manifest(split, infos))
    publish_manifest(store, manifest)
    return manifest


def store_shard(
    store: Store, split: Split, source: str, ordinal: int, samples: list[tuple[Sample, Members]]
) -> ShardInfo:
    path = f"{split}/{source}/{source}-{ordinal:06d}.tar"
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, "shard.tar")
        info = write_shard(local, samples)
        store.upload(local, path)
        store.upload(Path(index_path(str(local))), index_path(path))
    return replace(info, path=path)


class ColourEncoder:
    """A sample is its source, its number and the red of its picture; `refused` numbers are bad media."""

    held_out_group = 1

    def __init__(self, refused: Collection[int] = ()) -> None:
        self.refused = refused

    def sample(self, sample: DecodedSample) -> tuple[str, int, int]:
        number = int(sample.sample.key)
        if number in self.refused:
            raise BadMedia("refused", str(number))
        return sample.sample.source, number, int(sample.positive.visuals[0].frames[0, 0, 0, 0])

    def collate(self, samples: list[tuple[str, int, int]]) -> np.ndarray:
        """int64 [B, 2]: number and red."""
        return np.array([sample[1:] for sample in samples])

    def held_out(self, groups: Sequence[Sequence[tuple[str, int, int]]]) -> np.ndarray:
        return self.collate([sample for group in groups for sample in group])


def publish_candidates(
    store: Store,
    stored: Store,
    data: Manifest,
    candidates: Mapping[str, Mapping[int, Sequence[int]]],
    *,
    dropped: Mapping[str, Collection[int]] | None = None,
    clusters: Mapping[str, Mapping[int, int]] | None = None,
    ids: Mapping[int, int] | None = None,
) -> CandidateTable:
    """Writes a table of samples in `stored`: source -> sample -> numbers of its candidates, in the data's own pools.

    `ids` are content ids that are not those of the candidates. The teacher gives candidate n the score n / 100, and
    each positive 0.5.
    """
    pools = tuple(
        Pool(data.split, name, info.fingerprint, info.num_samples) for name, info in sorted(data.sources.items())
    )
    contents = [
        content_id(sha256)
        for _, info in sorted(data.sources.items())
        for shard in info.shards
        for sha256 in read_index_table(stored, shard, ("target_sha256",))["target_sha256"].to_pylist()
    ]
    contents = [(ids or {}).get(number, content) for number, content in enumerate(contents)]
    writer = PartWriter.of(store, {"candidates": {name: dict(of) for name, of in candidates.items()}})
    parts, plans = {}, {}
    for name, info in data.sources.items():
        found, begin = [], 0
        for ordinal, shard in enumerate(info.shards):
            of = [candidates.get(name, {}).get(number, ()) for number in range(begin, begin + shard.num_samples)]
            flat = [number for some in of for number in some]
            rows = CandidateRows.of(
                [f"{number:08d}" for number in range(begin, begin + shard.num_samples)],
                [len(some) for some in of],
                candidate=flat,
                id=[contents[number] for number in flat],
                teacher=[number / 100 for number in flat],
                positive_teacher=[0.5] * len(of),
            )
            found.append(writer.write(name, ordinal, rows))
            begin += shard.num_samples
        parts[name] = tuple(found)
        keep, cluster = np.ones(info.num_samples, bool), np.full(info.num_samples, -1)
        keep[list((dropped or {}).get(name, ()))] = False
        for number, one in (clusters or {}).get(name, {}).items():
            cluster[number] = one
        plans[name] = PlanRows.of(keep, cluster)
    sources = {name: info.fingerprint for name, info in data.sources.items()}
    manifest = CandidateManifest("select", TableData("", data.split, sources), pools, parts)
    return publish_table(store, manifest, plans)
