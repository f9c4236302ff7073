"""Features of many inputs: equal to what the files hold, and in files instead of memory."""

from __future__ import annotations

import gc

import numpy as np
import pyarrow as pa
import pytest

from pipelines.curate.columns import Column, ListColumn, TextColumns
from pipelines.curate.tables import MediaTable, TextTable
from tests.curation import anonymous_mb, random_features


def test_tables_have_the_rows_of_all_files_in_order() -> None:
    parts = [random_features(count, seed) for seed, count in enumerate((3, 1, 5))]
    media = pa.concat_tables(one for _, one in parts)
    reasons = pa.array(["", "bad", *[""] * 6, "worse"])
    media = media.set_column(media.schema.get_field_index("reason"), "reason", reasons)
    hashes = pa.array([[], [], *([n, n + 1] for n in range(7))], pa.list_(pa.uint64()))
    media = media.set_column(media.schema.get_field_index("hashes"), "hashes", hashes)
    texts = pa.concat_tables(one for one, _ in parts)
    found = TextTable.of(one for one, _ in parts)
    assert found.keys.to_pylist() == texts["key"].to_pylist()
    assert found.texts[4].as_py() == texts["text"][4].as_py()
    assert [one.item() for one in found.content] == texts["content"].to_pylist()
    assert found.min_hash.tobytes() == b"".join(texts["min_hash"].to_pylist())
    assert found.bounds.tolist() == list(range(0, 34 * 9 + 1, 34))
    assert found.ngrams[34 * 5 : 34 * 6].tolist() == texts["ngrams"][5].as_py()
    shown = MediaTable.of(media.slice(start, size) for start, size in ((0, 2), (2, 6), (8, 1)))
    assert shown.bounds.tolist() == [0, 0, *range(0, 15, 2)]
    assert shown.hashes[2:4].tolist() == [1, 2]
    assert shown.grids.tobytes() == b"".join(media["grids"].to_pylist())
    assert shown.reasons == {1: "bad", 8: "worse"}
    assert shown.kinds.tolist() == [b"i"] * 9
    with pytest.raises(ValueError, match="read-only"):
        shown.width[0] = 1


def test_no_values_are_empty_arrays() -> None:
    assert Column().array(np.int64).shape == (0,)
    bounds, values = ListColumn().arrays(np.uint64)
    assert (bounds.tolist(), values.tolist()) == ([0], [])
    assert [len(one) for one in TextColumns("a", "b").arrays()] == [0, 0]
    assert len(TextTable.of([]).content) == 0


def test_inputs_are_in_files_and_not_in_memory() -> None:
    """Of 40,000 inputs with 1.7 KB each, 70 MB, less than a fifth is in the memory of the process."""
    texts, media = random_features(1000, 0)
    TextTable.of([texts]), MediaTable.of([media])
    gc.collect()
    before = anonymous_mb()
    found = TextTable.of([texts] * 40), MediaTable.of([media] * 40)
    grown = anonymous_mb() - before
    assert len(found[0].content) == len(found[1].kinds) == 40_000
    assert grown < 14
