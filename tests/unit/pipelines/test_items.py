"""Items of shards: ids of content, units of work, and decoding by position."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.items.decode import ItemDecoder
from pipelines.items.listing import ListedShard, read_listing, row_item, shards_of, write_listing
from pipelines.items.types import Item
from pipelines.items.units import UNIT_COST, item_cost, units, windows
from pipelines.samples import DecodedSample, Input, Media, Rejected, Sample
from pipelines.storage.location import open_store
from pipelines.storage.store import LocalStore
from tests.data import publish


def items_of(folder: Path, source: str) -> tuple[DataConfig, list[Item]]:
    """Query and target of every sample."""
    data = DataConfig(root=str(folder / "data"))
    store = open_store(str(folder / "listings"))
    found = []
    for shard in shards_of(Reader(data)):
        write_listing(data, shard, store)
        for index, sample in enumerate(read_listing(shard, store), start=shard.start):
            assert isinstance(sample, Sample)
            if shard.source == source:
                found += [row_item(shard, index, sample, "query"), row_item(shard, index, sample, "positive")]
    return data, found


def test_rows_decode_as_the_reader_decodes_samples(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("t", 20)}, bad={"red": [5]})
    data, items = items_of(tmp_path, "red")
    found = list(ItemDecoder(MediaConfig(), data).inputs(items))
    for index, sample in enumerate(Reader(data).samples("red", range(20))):
        query, target = found[2 * index : 2 * index + 2]
        assert not isinstance(query, Rejected)
        assert query.text == f"red {index}"  # a text needs no shard, and is good where its sample is not
        if isinstance(sample, DecodedSample):
            assert not isinstance(target, Rejected)
            assert (query, target.instruction) == (sample.query, sample.positive.instruction)
            assert np.array_equal(target.visuals[0].frames, sample.positive.visuals[0].frames)
        else:
            assert target == sample
    with pytest.raises(BadMedia, match="key 00000005"):
        ItemDecoder(MediaConfig(), data).input(items[11])


def test_adjacent_rows_are_read_by_one_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("t", 20)})
    data, items = items_of(tmp_path, "red")
    targets = items[1::2]
    asked = [targets[index] for index in (2, 3, 4, 9, 10, 15)]  # shards hold 8
    ranges = []
    read_range = LocalStore.read_range

    def counted(self: LocalStore, path: str, offset: int, length: int) -> bytes:
        ranges.append(path)
        return read_range(self, path, offset, length)

    monkeypatch.setattr(LocalStore, "read_range", counted)
    assert not any(isinstance(some, Rejected) for some in ItemDecoder(MediaConfig(), data).inputs(asked))
    assert len(ranges) == 3


def test_rows_of_a_dataset_that_was_replaced_are_refused(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("t", 20)})
    data, items = items_of(tmp_path, "red")
    fingerprints = {"train": Reader(data).fingerprint}
    publish(open_store(str(tmp_path / "data")), {"red": ("t", 12)})
    with pytest.raises(UserError, match="was replaced while it was read"):
        list(ItemDecoder(MediaConfig(), data, fingerprints).inputs(items))


def test_an_id_is_that_of_the_content() -> None:
    shard = ListedShard("train", "red", "t", 0, 9, "digest")
    moved = replace(shard, split="held_out", source="blue", digest="other", start=100)
    sample = Sample(
        "k", "red", "t", Input("q"), Input("", (Media("image", "p0.png"),)), target_sha256="ab", query_sha256="ef"
    )

    def target(sample: Sample, shard: ListedShard = shard) -> str:
        return row_item(shard, 0, sample, "positive").id

    def query(sample: Sample, shard: ListedShard = shard) -> str:
        return row_item(shard, 0, sample, "query").id

    assert target(sample) == target(replace(sample, key="other", query=Input("z")), moved)
    assert query(sample) == query(replace(sample, key="other", positive=Input("z"), target_sha256="gh"), moved)
    asked = [
        replace(sample, query_sha256="01"),
        replace(sample, instruction="Find it."),
        replace(sample, query=Input("", (Media("image", "q0.png"),))),
    ]
    assert len({query(sample), target(sample), *map(query, asked)}) == 5
    others = [
        replace(sample, target_sha256="cd"),
        replace(sample, target_instruction="Represent it."),
        replace(sample, positive=Input("", (Media("document", "p0.png"),))),
    ]
    assert len({target(sample), *map(target, others)}) == 4


def test_units_hold_adjacent_rows_and_each_item_once(tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("t", 150)})
    _, items = items_of(tmp_path, "red")
    found = units(items)
    assert found == units(items[::-1])
    rows = [(item.row.role, item.row.index) for unit in found for item in unit if item.row]
    assert rows == [(role, index) for role in ("query", "positive") for index in range(150)]
    assert len(found) == 3  # 150 texts and 54 images, 64 images, 32 images
    assert sorted(item.id for unit in found for item in unit) == sorted(item.id for item in items)
    assert all(sum(map(item_cost, unit)) <= UNIT_COST for unit in found)
    in_windows = [item for window in windows([*items, *items], 100) for unit in window for item in unit]
    assert sorted(item.id for item in in_windows) == sorted(item.id for item in items)
