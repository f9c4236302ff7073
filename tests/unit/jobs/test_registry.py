from __future__ import annotations

import json
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.records import as_json
from jobs.serving.pairs import CHAMPION, PairFile, find_place, read_pair
from jobs.workflows.registry import Champion, Registry
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.publish import publish_folder
from pipelines.storage.store import Store
from rzen.embedding.corpus import MANIFEST, VERSIONS
from rzen.serving.place import Place


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "local":
        return open_store(str(tmp_path / "registry"))
    endpoint = request.getfixturevalue("s3_endpoint")
    store = open_store(f"s3://registry-{tmp_path.name.replace('_', '-').lower()}/r", endpoint)
    store.ensure_bucket()
    return store


@pytest.fixture
def registry(store: Store, tmp_path: Path) -> Registry:
    (tmp_path / "model").mkdir()
    for name in ("rzen.json", "adapter_config.json"):
        (tmp_path / "model" / name).write_text(f"of {name}")
    registry = Registry(store)
    for model in ("a", "b", "c"):
        registry.publish(model, tmp_path / "model", {"parents": [model], "base": None})  # as a full fine-tune has it
    return registry


def test_models_are_there_whole_and_never_change(registry: Registry, tmp_path: Path) -> None:
    assert registry.models() == ["a", "b", "c"]
    assert registry.lineage("b")["parents"] == ["b"]
    assert open_store(registry.url("a"), getattr(registry.store, "endpoint", None)).list() == [
        "adapter_config.json",
        "lineage.json",
        "rzen-output.json",
        "rzen.json",
    ]
    with pytest.raises(UserError, match="is there already, and models never change"):
        registry.publish("a", tmp_path / "model", {})
    assert not registry.has("d")
    with pytest.raises(UserError, match="has no model 'd'"):
        registry.lineage("d")


def test_promotions_and_rollbacks_are_one_history(registry: Registry) -> None:
    assert registry.champion() is None
    with pytest.raises(UserError, match="has no champion before"):
        registry.rollback("nothing there")
    first = registry.promote("a", reason="the first", instead_of=None)
    second = registry.promote("b", reason="better", instead_of=first, report={"gain": 0.1})
    assert registry.champion() == second == Champion(2, "b")
    assert registry.rollback("b fails in service") == Champion(3, "a")
    assert registry.rollback("it was not b") == Champion(4, "b")  # back to what was before
    history = [(one["generation"], one["model"], one["previous"], one["reason"]) for one in registry.promotions()]
    assert history == [
        (1, "a", None, "the first"),
        (2, "b", "a", "better"),
        (3, "a", "b", "b fails in service"),
        (4, "b", "a", "it was not b"),
    ]
    assert json.loads(registry.store.read(CHAMPION))["model"] == "b"


def embedded(registry: Registry, model: str, version: str) -> PairFile:
    """Publish the export of a model and a version of its corpus, as retraining does."""
    folder = Path(tempfile.mkdtemp())
    (folder / "config.json").write_text(model)
    if registry.pair(model) is None:
        publish_folder(folder, registry.exports(model))
    content = {
        "parts": [],
        "num_vectors": 0,
        "model": model,
        "config": "c",
        "dtype": "float32",
        "data": {"root": "data"},
        "version": version,
    }
    registry.corpora(model).write(f"{VERSIONS}/{version}.json", as_json(content))
    registry.corpora(model).write(MANIFEST, as_json(content))
    pair = registry.pair(model)
    assert pair is not None
    return pair


def test_a_promotion_publishes_model_and_corpus_at_once_and_a_rollback_those_before(registry: Registry) -> None:
    assert registry.pair("a") is None
    first = registry.promote("a", reason="the first", instead_of=None, pair=embedded(registry, "a", "v1"))
    assert read_pair(registry.store) == {
        "model": registry.exports("a").url,
        "corpus": registry.corpora("a").url,
        "corpus_version": "v1",
    }
    grown = embedded(registry, "a", "v2")
    assert read_pair(registry.store)["corpus_version"] == "v1"  # what is not promoted is not served
    second = registry.promote("a", reason="the corpus has grown", instead_of=first, pair=grown)
    registry.promote("b", reason="better", instead_of=second, pair=embedded(registry, "b", "w1"))
    assert read_pair(registry.store)["model"] == registry.exports("b").url
    registry.rollback("complaints")
    assert read_pair(registry.store) == grown
    registry.corpora("b").delete(f"{VERSIONS}/w1.json")
    with pytest.raises(UserError, match="corpora/b: has no version w1 any more"):
        registry.rollback("it was not b")
    assert read_pair(registry.store) == grown


def test_servers_need_a_promotion_with_a_corpus(registry: Registry) -> None:
    with pytest.raises(UserError, match="has no champion yet"):
        read_pair(registry.store)
    registry.promote("a", reason="the first", instead_of=None)
    with pytest.raises(UserError, match="promoted a without vectors of a corpus; set `corpus` in the spec"):
        read_pair(registry.store)


def test_places_are_those_of_the_registry_or_of_the_settings(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = embedded(registry, "a", "v1")
    registry.promote("a", reason="the first", instead_of=None, pair=pair)
    endpoint = getattr(registry.store, "endpoint", None)
    root, _, name = registry.store.url.rpartition("/")
    monkeypatch.setenv("RZEN_STORE", root)
    place = find_place({"registry": f"$RZEN_STORE/{name}", "endpoint": endpoint, "dimensions": [16]})
    assert place == Place(**pair, endpoint=endpoint, dimensions=(16,))
    assert find_place({"model": "$RZEN_STORE/model"}) == Place(f"{root}/model")
    adapted = find_place({"model": "m", "adapters": {"a": "$RZEN_STORE/a", "b": "b"}})
    assert adapted == Place("m", adapters=(("a", f"{root}/a"), ("b", "b")))
    monkeypatch.delenv("RZEN_STORE")
    with pytest.raises(UserError, match="RZEN_STORE is not set"):
        find_place({"model": "$RZEN_STORE/model"})


def test_a_decision_about_another_champion_is_not_carried_out(registry: Registry) -> None:
    seen = registry.promote("a", reason="the first", instead_of=None)
    registry.promote("b", reason="somebody was faster", instead_of=seen)
    with pytest.raises(UserError, match="has another champion by now: b"):
        registry.promote("c", reason="better than a", instead_of=seen)
    with pytest.raises(UserError, match="has no model 'nobody'"):
        registry.promote("nobody", reason="", instead_of=registry.champion())
    assert registry.champion() == Champion(2, "b")


def test_of_many_promoters_one_wins(registry: Registry) -> None:
    champion = registry.promote("a", reason="the first", instead_of=None)

    def attempt(number: int) -> bool:
        try:
            registry.promote("bc"[number % 2], reason=str(number), instead_of=champion)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(attempt, range(6)))
    assert won.count(True) == 1
    assert [one["reason"] for one in registry.promotions()] == ["the first", str(won.index(True))]
    assert registry.champion() == Champion(2, "bc"[won.index(True) % 2])


def test_what_a_killed_promoter_left_is_finished_by_the_next_who_looks(registry: Registry) -> None:
    registry.promote("a", reason="the first", instead_of=None)
    by = {"reason": "better", "report": None, "at": "2026", "by": "me"}
    registry.store.write(
        "promotions/000002.json", json.dumps({"model": "b", "previous": "a", "generation": 2, **by}).encode()
    )
    assert json.loads(registry.store.read(CHAMPION))["model"] == "a"
    assert registry.champion() == Champion(2, "b")
    assert json.loads(registry.store.read(CHAMPION))["model"] == "b"


def test_one_holds_the_lease_and_the_other_is_told(registry: Registry) -> None:
    other = Registry(registry.store)
    with registry.lease(30), pytest.raises(UserError, match="retrains"), other.lease(30):
        pass
    with other.lease(30) as lease:  # given back
        lease.check()


def test_of_many_who_begin_at_once_one_gets_the_lease(registry: Registry) -> None:
    enough = threading.Barrier(6)

    def attempt(_: int) -> bool:
        enough.wait()
        try:
            with Registry(registry.store).lease(30):
                time.sleep(1)
        except UserError:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(attempt, range(6))).count(True) == 1


def test_a_lease_is_renewed_while_its_holder_lives_and_ends_after_its_death(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry.lease(0.9) as lease:
        time.sleep(1.5)
        lease.check()
        with pytest.raises(UserError), Registry(registry.store).lease(30):
            pass
    monkeypatch.setattr("jobs.runtime.lease.Lease._keep", lambda _: None)
    monkeypatch.setattr("jobs.runtime.lease.Lease.release", lambda _: None)
    with registry.lease(0.5) as dead:  # never renewed, never given back
        time.sleep(0.6)
        with pytest.raises(UserError, match="was not renewed in time"):
            dead.check()
    with Registry(registry.store).lease(30):
        pass


def test_retraining_runs_are_kept_in_order(registry: Registry) -> None:
    registry.record("2", {"outcome": "nothing new"})
    registry.record("1", {"outcome": "training"})
    registry.record("2", {"outcome": "promoted"})
    told: list[Any] = [(retraining["id"], retraining["outcome"]) for retraining in registry.retrainings()]
    assert told == [("1", "training"), ("2", "promoted")]
    assert registry.retraining("3") == {}
