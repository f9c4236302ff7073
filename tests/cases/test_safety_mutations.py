"""A slice of the damaged files that `tests/faults/mutations.py` tries: no exception but the two of bad input."""

import random

import pytest

from tests.faults.mutations import SHARES, Mutations, images, mutated

FILES = {"image": 80, "video": 20, "document": 20, "tar": 60, "stored JSON": 80, "YAML": 40}


@pytest.fixture(scope="module")
def mutations(tmp_path_factory):
    tried = Mutations(tmp_path_factory.mktemp("mutations"), seed=1)
    yield tried
    tried.close()


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_used_counted_or_one_error(mutations, kind):
    found = mutations.run(kind, FILES[kind])
    assert found.used + found.errors + found.counted.total() > 0
    assert found.used < FILES[kind]
    assert "decoder_error" not in found.counted, "an exception that a decoder does not handle"


def test_what_is_neither_is_not_hidden(mutations, monkeypatch):
    def broken(data: bytes) -> None:
        raise KeyError("a fault of ours")

    monkeypatch.setitem(mutations._readers, "image", broken)
    with pytest.raises(KeyError):
        mutations.run("image", 1)


def test_a_slow_file_is_a_fault(mutations, monkeypatch):
    monkeypatch.setattr("tests.faults.mutations.LIMIT_S", 0.0)
    with pytest.raises(AssertionError, match="took"):
        mutations.run("image", 1)


def test_damages_change_the_file():
    rng = random.Random(0)
    first, *_ = images()
    assert len({mutated(first, first, rng) for _ in range(100)}) > 80
