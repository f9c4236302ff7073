"""Job of kind `judge` with a checkpoint, its tasks and actors in this process: scores, order of units, resuming."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import rzen
from jobs.judging import judge
from pipelines.candidates.table import open_table
from pipelines.candidates.types import MANIFEST
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.listing import shards_of
from pipelines.samples import DecodedInput, Rejected
from pipelines.storage.location import open_store
from rzen.config import PairPromptConfig
from tests.data import publish
from tests.judging import (
    CANDIDATES,
    DROPPED,
    PROMPT,
    SIZES,
    by_model,
    distinct_pairs,
    make_table,
    run_judges_here,
    scores_of,
    spec_of,
    table_files,
)
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("judge"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset and a table of its candidates."""
    folder = tmp_path_factory.mktemp("judging")
    make_table(folder)
    return folder


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_judges_here(monkeypatch)


@pytest.fixture(scope="module")
def whole(folder: Path, model: str) -> Iterator[Path]:
    """A table that one actor judged without disturbance."""
    with pytest.MonkeyPatch.context() as patch:
        run_judges_here(patch)
        yield _judged(folder, model)


def _judged(folder: Path, model: str) -> Path:
    out = folder / "whole"
    result = judge.run(spec_of(folder, out, by_model(model)))
    # Red 7 cannot be decoded: it is the positive of one sample and a candidate of three.
    assert (result["scored"], result["without_score"]) == (19 + 10 + 19 * 3 + 3 - 4, 4)
    assert result["reasons"] == {"unsupported_format": 4}
    return out


def test_every_pair_has_its_score_alone(folder: Path, whole: Path, model: str) -> None:
    reranker = rzen.load_reranker(model, prompt=PairPromptConfig.model_validate(PROMPT))
    reader = Reader(DataConfig(root=str(folder / "data")))
    names = ("red", "blue")
    queries = {name: list(reader.inputs(name, [(i, "query") for i in range(SIZES[name][1])])) for name in names}
    targets = [one for name in names for one in reader.inputs(name, [(i, "positive") for i in range(SIZES[name][1])])]
    assert {query.instruction for query in queries["red"] if isinstance(query, DecodedInput)} == {"Find the colour."}
    found = scores_of(whole)
    assert len(found) == 30
    seen = []
    for (source, index), (positive, candidates) in found.items():
        numbers = CANDIDATES.get((source, index), [])
        own = index if source == "red" else 20 + index
        for number, score in zip([own, *numbers], [positive, *candidates], strict=True):
            if (source, index) == DROPPED or isinstance(targets[number], Rejected):
                assert np.isnan(score)
                continue
            (expected,) = reranker.predict([(queries[source][index], targets[number])])  # type: ignore[list-item]
            assert abs(score - expected) < 1e-5
            seen.append(score)
    assert np.std(seen) > 1e-4


def test_the_table_says_what_it_was_made_of(folder: Path, whole: Path, model: str) -> None:
    before, after = open_table(str(folder / "table")), open_table(str(whole))
    assert after.manifest.stage == "judge"
    assert after.manifest.made_from["mine"] == before.fingerprint
    assert (after.manifest.pools, after.manifest.plan) == (before.manifest.pools, before.manifest.plan)
    assert after.manifest.settings["judge"]["prompt"]["template"] == "qwen3_reranker"
    for ordinal in range(3):
        old, new = before.rows("red", ordinal), after.rows("red", ordinal)
        for name in ("candidate", "id", "recall", "bounds", "keep", "cluster"):
            assert np.array_equal(getattr(old, name), getattr(new, name), equal_nan=name == "recall")


def test_a_second_run_does_nothing(
    folder: Path,
    whole: Path,
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = table_files(out)
    spec = spec_of(folder, out, by_model(model))
    with monkeypatch.context() as patch:
        patch.setattr(judge, "list_shards", None)
        result = judge.run(spec)
    assert (result["judged"], result["scored"], result["without_score"]) == (0, 19 + 10 + 19 * 3 + 3 - 4, 4)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{out} is up to date: nothing to judge 4 of its pairs have no score" in shown
    assert table_files(out) == before
    part = next(iter((out / "parts").iterdir()))
    part.unlink()
    assert judge.run(spec)["judged"] == 4  # those that cannot be read; scores are kept
    assert table_files(out) == before
    shutil.rmtree(out / "scores")  # as for another model that answers under the name
    assert judge.run(spec)["judged"] > 60
    assert table_files(out) == before


def test_other_orders_and_a_stopped_job_write_the_same_bytes(
    folder: Path, whole: Path, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_judges_here(monkeypatch, actors=2, backwards=True)
    assert judge.run(spec_of(folder, tmp_path / "two", by_model(model)))["judged"] > 60
    assert table_files(tmp_path / "two") == table_files(whole)
    spec = spec_of(folder, tmp_path / "stopped", by_model(model))
    run_judges_here(monkeypatch, stop_after=2)
    with pytest.raises(KeyboardInterrupt):
        judge.run(spec)
    assert not (tmp_path / "stopped" / MANIFEST).exists()
    run_judges_here(monkeypatch)
    assert 0 < judge.run(spec)["judged"] < 76
    assert table_files(tmp_path / "stopped") == table_files(whole)


def test_equal_pairs_of_several_shards_are_judged_once(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Red 1, 9 and 17, one of each shard, ask the same. Red 0 and 3 show the same, and red 7 cannot be read."""
    monkeypatch.setitem(CANDIDATES, ("red", 1), [2, 3, 22])
    monkeypatch.setitem(CANDIDATES, ("red", 9), [2, 0, 23])
    monkeypatch.setitem(CANDIDATES, ("red", 17), [3, 2, 23, 7])
    asked = (9, 17)
    make_table(tmp_path, equal_queries=asked)
    monkeypatch.setattr(judge, "PAIRS_AT_ONCE", 40)  # a shard at a time, and then all at once
    spec = spec_of(tmp_path, tmp_path / "out", by_model(model))
    result = judge.run(spec)
    bad = result["reasons"]["unsupported_format"]
    assert result["judged"] == len(distinct_pairs(asked)) + bad
    scores = scores_of(tmp_path / "out")
    assert scores["red", 1][1][:2] == [scores["red", 9][1][0], scores["red", 9][1][1]]
    assert scores["red", 17][1][:3] == [scores["red", 1][1][1], scores["red", 1][1][0], scores["red", 9][1][2]]
    (tmp_path / "out" / MANIFEST).unlink()
    assert judge.run(spec)["judged"] == bad

    monkeypatch.setattr(judge, "PAIRS_AT_ONCE", 10**6)
    at_once = judge.run(spec_of(tmp_path, tmp_path / "at_once", by_model(model)))
    assert at_once["judged"] == result["judged"]
    assert table_files(tmp_path / "at_once") == table_files(tmp_path / "out")
    for stop_after in (1, 3):
        spec = spec_of(tmp_path, tmp_path / f"stopped {stop_after}", by_model(model))
        run_judges_here(monkeypatch, stop_after=stop_after)
        with pytest.raises(KeyboardInterrupt):
            judge.run(spec)
        run_judges_here(monkeypatch)
        assert judge.run(spec)["judged"] < result["judged"]
        assert table_files(tmp_path / f"stopped {stop_after}") == table_files(tmp_path / "out")


def test_scores_of_one_shard_serve_another_that_comes_later(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A query was in one shard when its pairs were judged. Now a second shard has it, too."""
    monkeypatch.setitem(CANDIDATES, ("red", 9), [2, 8, 24])  # red 1 has 2, 21 and 8
    make_table(tmp_path, equal_queries=(9,))
    monkeypatch.setattr(judge, "PAIRS_AT_ONCE", 40)  # a shard at a time
    spec = spec_of(tmp_path, tmp_path / "out", by_model(model))
    with monkeypatch.context() as patch:
        patch.setattr(judge, "repeated_queries", lambda *_, **__: np.zeros(0, np.int64))
        apart = judge.run(spec)
    bad = apart["reasons"]["unsupported_format"]
    assert apart["judged"] == len(distinct_pairs((9,))) + 2 + bad
    second = next(one for one in shards_of(Reader(spec.data)) if (one.source, one.start) == ("red", 8))
    shutil.rmtree(tmp_path / "out" / "scores" / second.digest)
    (tmp_path / "out" / MANIFEST).unlink()
    later = judge.run(spec)
    assert later["judged"] == 8 + 8 * 3 - 4 - 2 + bad - 1  # of its 8 samples, one is dropped; two pairs are known


def test_a_table_in_an_object_store_has_the_same_bytes(
    folder: Path, whole: Path, model: str, tmp_path: Path, s3_endpoint: str
) -> None:
    spec = spec_of(folder, tmp_path, by_model(model), endpoint=s3_endpoint).model_copy(
        update={"out": "s3://judged/out"}
    )
    first = judge.run(spec)
    store = open_store("s3://judged/out", s3_endpoint)
    local = table_files(whole)
    assert {name: store.read(name) for name in local} == local
    assert first["fingerprint"] == open_table(str(whole)).fingerprint
    assert judge.run(spec)["judged"] == 0


def test_the_first_candidates_only(folder: Path, whole: Path, model: str, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "out")  # with its scores
    result = judge.run(spec_of(folder, tmp_path / "out", by_model(model), top_k=1))
    assert result["judged"] <= 5
    everything = scores_of(whole)
    for place, (positive, candidates) in scores_of(tmp_path / "out").items():
        assert positive == everything[place][0] or np.isnan(positive)
        assert candidates[:1] == everything[place][1][:1] or np.isnan(candidates[0])
        assert np.isnan(candidates[1:]).all()


def test_mistakes_are_named(folder: Path, model: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is the table that is judged; name another folder"):
        judge.run(spec_of(folder, folder / "table", by_model(model)))
    publish(open_store(str(tmp_path / "data")), SIZES)
    with pytest.raises(UserError, match=r"is of another version of red"):
        judge.run(spec_of(folder, tmp_path / "out", by_model(model), data={"root": str(tmp_path / "data")}))
