"""The cache of vectors: what is there, in which order it comes, and what half a part is worth."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from jobs.embedding.vectors import VectorCache, write_part
from pipelines.items.types import as_ids
from pipelines.storage.location import open_store

WAY = {"weights": "a", "media": {"frames": 8}}
IDS = [f"{number:032x}" for number in range(7)]


def rows(*numbers: int) -> np.ndarray:
    return np.array([[number, -number, 0.5] for number in numbers], np.float32)


@pytest.fixture
def cache(tmp_path: Path) -> VectorCache:
    cache = VectorCache(open_store(str(tmp_path / "cache")), WAY)
    write_part(cache.store, IDS[:3], rows(0, 1, 2))
    write_part(cache.store, [IDS[5], IDS[4]], rows(5, 4))
    cache.refresh()
    return cache


def test_vectors_come_in_the_order_that_is_asked_for(cache: VectorCache, tmp_path: Path) -> None:
    wanted = as_ids([IDS[4], IDS[6], IDS[0], IDS[5]])
    assert cache.missing(wanted).tolist() == [False, True, False, False]
    assert cache.missing(wanted.reshape(2, 2)).tolist() == [[False, True], [False, False]]
    found = cache.load(wanted, tmp_path / "found.npy")
    assert found.ids.tolist() == as_ids([IDS[4], IDS[0], IDS[5]]).tolist()
    assert np.array_equal(found.rows, rows(4, 0, 5))
    assert len(cache.load(as_ids([IDS[6]]), tmp_path / "none.npy").rows) == 0


def test_all_is_missing_where_there_is_nothing(tmp_path: Path) -> None:
    empty = VectorCache(open_store(str(tmp_path / "empty")), WAY)
    assert empty.missing(as_ids([IDS[0], IDS[6]])).tolist() == [True, True]
    assert empty.missing(as_ids([])).tolist() == []


def test_an_earlier_load_is_not_changed_by_the_next(cache: VectorCache, tmp_path: Path) -> None:
    first = cache.load(as_ids(IDS[:2]), tmp_path / "found.npy")
    cache.load(as_ids(IDS[4:6]), tmp_path / "found.npy")
    assert np.array_equal(first.rows, rows(0, 1))


def test_parts_are_found_when_they_are_whole(cache: VectorCache, tmp_path: Path) -> None:
    (part,) = write_and_list(cache, [IDS[6]])
    cache.store.delete(part + ".ids")  # as if the job had been killed between the two
    assert VectorCache(open_store(str(tmp_path / "cache")), WAY).missing(as_ids([IDS[6]])).all()
    write_part(cache.store, [IDS[6]], rows(6))
    again = pickle.loads(pickle.dumps(cache))
    again.refresh()
    assert not again.missing(as_ids(IDS[:3] + IDS[4:])).any()


def write_and_list(cache: VectorCache, ids: list[str]) -> set[str]:
    before = set(cache.store.list())
    write_part(cache.store, ids, rows(*range(len(ids))))
    return {path.partition(".")[0] for path in set(cache.store.list()) - before}


def test_a_vector_that_is_there_twice_is_one(cache: VectorCache, tmp_path: Path) -> None:
    write_part(cache.store, IDS[1:4], rows(1, 2, 3))
    cache.refresh()
    assert np.array_equal(cache.load(as_ids(IDS[:4]), tmp_path / "found.npy").rows, rows(0, 1, 2, 3))


def test_another_way_knows_nothing_of_it(cache: VectorCache, tmp_path: Path) -> None:
    other = VectorCache(open_store(str(tmp_path / "cache")), WAY | {"weights": "b"})
    assert other.missing(as_ids(IDS)).all()
    assert (
        not VectorCache(open_store(str(tmp_path / "cache")), dict(reversed(WAY.items()))).missing(as_ids(IDS[:3])).any()
    )
