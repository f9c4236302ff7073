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
    assert after.manifest.made_from == {"mine": before.fingerprint}
    assert (after.manifest.pools, after.manifest.plan) == (before.manifest.pools, before.manifest.plan)
    assert after.manifest.settings["judge"]["prompt"]["template"] == "qwen3_reranker"
    for ordinal in range(3):
        old, new = before.rows("red", ordinal), after.rows("red", ordinal)
        for name in ("candidate", "id", "recall", "bounds", "keep", "cluster"):
            assert np.array_equal(getattr(old, name), getattr(new, name), equal_nan=name == "recall")


def test_a_second_run_judges_nothing(folder: Path, whole: Path, model: str) -> None:
    before = table_files(whole)
    assert judge.run(spec_of(folder, whole, by_model(model)))["judged"] == 4  # those that cannot be read
    assert table_files(whole) == before


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
