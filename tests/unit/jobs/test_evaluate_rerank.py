"""Job of kind `evaluate` with a re-ranker, its tasks and actors in this process: scores, weights, resuming, errors."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rzen
from jobs.embedding import engine
from jobs.evaluation import evaluate, rerank
from jobs.evaluation.item_pairs import pair_key, units_of
from jobs.evaluation.specs import EvaluateSpec
from jobs.judging import local
from jobs.spec.no_effect import unused_settings
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.types import Item, content_id
from pipelines.samples import Input
from pipelines.storage.location import open_store
from rzen.config import PairPromptConfig, TinyBackbone
from rzen.evaluation.reranking import WEIGHTS
from tests.data import publish
from tests.judging import through_actors_here
from tests.layouts import picture, put, put_lines
from tests.tiny import tiny_checkpoint

TOP_K = 7
PROMPT = {"max_visual_tokens": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """An embedder and a re-ranker, tiny and random."""
    folder = tmp_path_factory.mktemp("models")
    return tiny_checkpoint(folder / "embedder"), tiny_checkpoint(folder / "reranker", TinyBackbone(seed=5))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a split to score and one to choose weights on, and a custom dataset of texts and pictures."""
    folder = tmp_path_factory.mktemp("data")
    store = open_store(str(folder / "data"))
    publish(store, {"red": ("text_image", 11), "page": ("text_page", 5)}, split="held_out")
    publish(store, {"red": ("text_image", 9)}, split="train")
    for number in range(6):
        put(folder / f"mine/{number}.png", picture(str(number)))
    put_lines(folder / "mine/corpus.jsonl", [{"_id": f"c{number}", "image": f"{number}.png"} for number in range(6)])
    put_lines(folder / "mine/queries.jsonl", [{"_id": f"q{number}", "text": f"number {number}"} for number in range(3)])
    put(folder / "mine/qrels/test.tsv", "query\tcandidate\tgrade\nq0\tc0\t1\nq1\tc1\t2\nq1\tc4\t1\nq2\tc5\t1\n")
    return folder


def spec_of(root: Path, out: Path, models: tuple[str, str], /, **changes: Any) -> EvaluateSpec:
    base: dict[str, Any] = {
        "kind": "evaluate",
        "models": {"tiny": {"base": models[0]}},
        "data": {"root": str(root / "data"), "split": "held_out"},
        "prompt": PROMPT,
        "dtype": "float32",
        "rerank": {"model": {"base": models[1], "prompt": PROMPT}, "top_k": TOP_K},
        "cache": str(out / "cache"),
        "out": str(out / "out"),
        "num_examples": 0,
    }
    changed = base | changes
    changed["rerank"] = base["rerank"] | changes.get("rerank", {})
    return EvaluateSpec.model_validate(changed)


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    run_here(monkeypatch)


def run_here(patch: pytest.MonkeyPatch, **options: Any) -> None:
    """`options` are those of `through_actors_here`, for the re-ranker."""
    patch.setattr(engine, "through_actors", through_actors_here())
    patch.setattr(local, "through_actors", through_actors_here(**options))
    patch.setattr(evaluate, "ray_cluster", nullcontext)
    patch.setattr(evaluate, "check_workers", lambda workers: None)


@pytest.fixture(scope="module")
def whole(root: Path, models: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an evaluation with a chosen and a given weight wrote, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        evaluate.run(spec_of(root, folder, models, **tuned(root)))
    return folder


def tuned(root: Path) -> dict[str, Any]:
    tune = {"root": str(root / "data"), "split": "train"}
    return {"rerank": {"tune": tune, "tune_queries": 7, "weights": {"text_page": 0.25}}}


def reranked(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "out/results.json").read_text())["rerank"]["tiny"]
    return found


def files(folder: Path) -> dict[str, bytes]:
    """All but settings, which name folders, and listings."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    left_out = ("leaderboard.json", "out/results.json", "index.html")
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith(left_out)}


def test_scores_are_those_of_the_re_ranker_by_itself(root: Path, whole: Path, models: tuple[str, str]) -> None:
    """Each query with its candidates, scored through `rzen.load_reranker`."""
    reader = Reader(DataConfig(root=str(root / "data"), split="held_out"))
    samples = list(reader.samples("red", range(11)))
    embedder = rzen.load(models[0], identity=spec_of(root, whole, models).identity)
    prompt = PairPromptConfig.model_validate(PROMPT)
    reranker = rzen.load_reranker(models[1], prompt=prompt)
    targets = [one.positive for one in samples]
    cosines = embedder.encode([one.query for one in samples]) @ embedder.encode(targets).T
    ranks: dict[str, list[int]] = {"before": [], "reranked": [], "ceiling": []}
    probabilities, labels = [], []
    for number, sample in enumerate(samples):
        order = np.argsort(-cosines[number])
        first = order[:TOP_K].tolist()
        p = reranker.predict([(sample.query, targets[one]) for one in first], instruction=sample.query.instruction)
        probabilities += p.tolist()
        labels += [float(one == number) for one in first]
        old = int(np.flatnonzero(order == number)[0]) + 1
        ranks["before"].append(old)
        again = [first[place] for place in np.argsort(-p)]
        ranks["reranked"].append(again.index(number) + 1 if number in again else old)
        ranks["ceiling"].append(1 if number in again else old)
    found = reranked(whole)["text_image"]
    assert (found["num_queries"], found["top_k"], found["metric"]) == (11, TOP_K, "hit@1")
    for stage, mine in ranks.items():
        assert found[stage]["hit@1"] == pytest.approx(np.mean(np.array(mine) <= 1)), stage
        assert found[stage]["recall@7"] == pytest.approx(np.mean(np.array(mine) <= TOP_K))
        ndcg = np.mean([1 / np.log2(1 + rank) if rank <= 5 else 0 for rank in mine])
        assert found[stage]["ndcg_linear@5"] == pytest.approx(ndcg)
    assert ranks["before"] != ranks["reranked"]
    brier = np.mean((np.array(probabilities) - np.array(labels)) ** 2)
    assert found["calibration"]["brier"] == pytest.approx(brier, abs=1e-5)
    assert found["calibration"]["num_pairs"] == 11 * TOP_K


def test_weights_are_chosen_on_the_other_split_or_given(whole: Path) -> None:
    found = reranked(whole)
    chosen = found["text_image"]["weight"]
    assert (chosen["source"], chosen["num_queries"]) == ("chosen", 7)
    assert list(map(float, chosen["curve"])) == list(WEIGHTS)
    assert chosen["weight"] in WEIGHTS
    given = found["text_page"]["weight"]
    assert (given["weight"], given["source"], given["curve"]) == (0.25, "given", None)
    assert found["text_page"]["metric"] == "ndcg_linear@5"


def test_a_custom_dataset_takes_the_weight_of_a_task(
    root: Path, whole: Path, models: tuple[str, str], tmp_path: Path
) -> None:
    chosen = reranked(whole)["text_image"]["weight"]
    rerank = tuned(root)["rerank"] | {"weights": {}, "tune_tasks": {"mine": "text_image"}}
    custom = {"mine": str(root / "mine"), "other": str(root / "mine")}
    spec = spec_of(root, tmp_path, models, data=None, custom=custom, rerank=rerank)
    (found,) = json.loads(json.dumps(evaluate.run(spec)["rerank"])).values()
    assert found["tiny"]["mine"]["weight"] == chosen
    assert set(found["tiny"]["mine"]) >= {"before", "reranked", "fused", "ceiling"}
    assert found["tiny"]["other"]["weight"] is None
    assert "fused" not in found["tiny"]["other"]
    with_data = spec_of(root, tmp_path / "both", models, custom=custom, rerank=rerank | {"weights": {"mine": 0.5}})
    both = json.loads(json.dumps(evaluate.run(with_data)["rerank"]))
    assert both["held_out"]["tiny"]["text_image"]["weight"] == chosen
    (files,) = (some for suite, some in both.items() if suite != "held_out")
    assert (files["tiny"]["mine"]["weight"]["weight"], files["tiny"]["mine"]["weight"]["source"]) == (0.5, "given")


@pytest.mark.parametrize(
    ("tasks", "problem"),
    [
        ({"nobody": "text_image"}, r"^rerank.tune_tasks.nobody: is no dataset of suites or custom; use one of mine"),
        ({"mine": "text_page"}, r"^rerank.tune_tasks.mine=text_page: is no task of .* train; use one of text_image"),
    ],
)
def test_a_task_that_weights_are_not_chosen_for_is_refused(
    root: Path, models: tuple[str, str], tmp_path: Path, tasks: dict[str, str], problem: str
) -> None:
    rerank = tuned(root)["rerank"] | {"weights": {}, "tune_tasks": tasks}
    with pytest.raises(UserError, match=problem):
        evaluate.run(spec_of(root, tmp_path, models, data=None, custom={"mine": str(root / "mine")}, rerank=rerank))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"rerank.tune_tasks names tasks of rerank.tune, which is not set"):
        spec_of(root, tmp_path, models, rerank={"tune_tasks": tasks})


def test_files_tables_and_the_report_show_it(whole: Path) -> None:
    out = whole / "out"
    assert json.loads((out / "held_out/tiny/rerank.json").read_text()) == reranked(whole)
    tables = (out / "held_out/models.md").read_text()
    assert "| tiny, re-ranked | metric | queries | before | re-ranked, top 7 |" in tables
    assert "| 0.25 given |" in tables
    html = (out / "index.html").read_text()
    assert 'aria-label="tiny re-ranked on held_out"' in html
    assert "first 7 candidates" in html
    settings = json.loads((out / "results.json").read_text())["settings"]
    assert settings["spec"]["rerank"]["top_k"] == TOP_K


@pytest.mark.parametrize("options", [{"actors": 2}, {"backwards": True}])
def test_any_order_of_units_writes_the_same_bytes(
    root: Path, whole: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any
) -> None:
    monkeypatch.setattr("jobs.judging.pairs.MAX_PAIRS", 5)
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch)
        evaluate.run(spec_of(root, tmp_path / "one", models, **tuned(root)))
    run_here(monkeypatch, **options)
    evaluate.run(spec_of(root, tmp_path / "other", models, **tuned(root)))
    assert files(tmp_path / "other") == files(tmp_path / "one")
    assert len(list((tmp_path / "one/cache").rglob("*.ids"))) > len(list((whole / "cache").rglob("*.ids")))


def test_a_job_that_was_killed_resumes_to_the_same_bytes_and_scores_no_pair_twice(
    root: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.judging.pairs.MAX_PAIRS", 5)
    evaluate.run(spec_of(root, tmp_path / "one", models))
    run_here(monkeypatch, stop_after=3)
    spec = spec_of(root, tmp_path / "killed", models)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(spec)
    num_pairs: list[int] = []
    score = local.ScorePairs.__call__
    monkeypatch.setattr(
        local.ScorePairs, "__call__", lambda self, row: num_pairs.append(row["num_pairs"]) or score(self, row)
    )
    monkeypatch.setattr(local, "through_actors", through_actors_here())
    evaluate.run(spec)
    assert sum(num_pairs) == 11 * TOP_K + 5 * 5 - 3 * 5
    assert files(tmp_path / "killed") == files(tmp_path / "one")
    num_pairs.clear()
    evaluate.run(spec)
    assert num_pairs == []


def test_two_embedders_share_the_scores_of_their_pairs(
    root: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_pairs: list[int] = []
    score = local.ScorePairs.__call__
    monkeypatch.setattr(
        local.ScorePairs, "__call__", lambda self, row: num_pairs.append(row["num_pairs"]) or score(self, row)
    )
    both = {"tiny": {"base": models[0]}, "same": {"base": models[0]}, "other": {"base": models[1]}}
    mine = {"mine": str(root / "mine")}
    found = evaluate.run(spec_of(root, tmp_path, models, models=both, data=None, custom=mine))["rerank"]["custom"]
    assert sum(num_pairs) == 3 * 6  # three queries and six candidates
    assert found["tiny"] == found["same"] != found["other"]
    assert found["tiny"]["mine"]["num_queries"] == 3


def test_pieces_of_a_dataset_are_put_together(
    root: Path, whole: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rerank, "PAIRS_AT_ONCE", 3 * TOP_K)
    evaluate.run(spec_of(root, tmp_path, models, **tuned(root)))
    assert reranked(tmp_path)["text_image"]["reranked"] == reranked(whole)["text_image"]["reranked"]


def test_a_custom_dataset_with_a_pair_that_cannot_be_scored_is_left_out(
    root: Path, models: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def without_answer(self: Any, row: dict[str, Any]) -> dict[str, Any]:
        return {"num_pairs": row["num_pairs"], "reasons": row["reasons"]}

    monkeypatch.setattr(local.ScorePairs, "__call__", without_answer)
    spec = spec_of(root, tmp_path, models, data=None, custom={"mine": str(root / "mine")})
    assert evaluate.run(spec)["rerank"] == {"custom": {"tiny": {}}}
    assert "18 of 18 pairs have no finite score" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match=r"text_image: 77 of 77 pairs have no finite score of .*: ingest again"):
        evaluate.run(spec_of(root, tmp_path, models))


def test_errors_name_what_to_change(root: Path, models: tuple[str, str], tmp_path: Path) -> None:
    same = {"root": f"{root / 'data'}/", "split": "held_out"}
    with pytest.raises(ValueError, match=r"rerank.tune is the split that is scored .*: a weight that is chosen on the"):
        spec_of(root, tmp_path, models, rerank={"tune": same})
    with pytest.raises(UserError, match=r"rerank.weights.text_imag: is no task or dataset that is scored; use one of"):
        evaluate.run(spec_of(root, tmp_path, models, rerank={"weights": {"text_imag": 1.0}}))
    nothing = {"tune": {"root": str(root / "data"), "split": "train"}}
    with pytest.raises(UserError, match=r"rerank.tune .* train: has no samples of text_page; name another split"):
        evaluate.run(spec_of(root, tmp_path, models, tasks=["text_page"], rerank=nothing))
    unused = spec_of(root, tmp_path, models, data=None, custom={"mine": "mine"}, rerank=nothing | {"tune_queries": 9})
    assert [str(one).partition(":")[0] for one in unused_settings(unused)][:1] == [
        "rerank.tune.root='" + nothing["tune"]["root"] + "' has no effect"
    ]


def test_units_are_a_pure_function_of_the_pairs_and_keys_of_the_contents() -> None:
    items = [Item(content_id(n), str(n), Input("word " * (n % 5)), content_id(["c", n % 13])) for n in range(20)]
    asked = Item(content_id("q"), "q", Input("asked"), content_id("q"), "Find it.")
    pairs = [(pair_key(query, one), query, one) for query in (asked, items[3]) for one in items]
    found = units_of(pairs)
    assert sum(map(len, found)) == len({key for key, _, _ in pairs}) == 26
    for again in (units_of(pairs[::-1]), units_of([*pairs, *pairs[3:9]])):
        assert [unit.keys.tolist() for unit in again] == [unit.keys.tolist() for unit in found]
        assert [unit.documents for unit in again] == [unit.documents for unit in found]
    for unit in found:
        for key, (query, document) in zip(unit.keys.tolist(), unit.pairs.tolist(), strict=True):
            assert key.decode() == pair_key(unit.queries[query], unit.documents[document])
        part = unit.only(np.arange(1, len(unit)))
        assert part.keys.tolist() == unit.keys[1:].tolist()
        assert pair_key(part.queries[part.pairs[0, 0]], part.documents[part.pairs[0, 1]]).encode() == part.keys[0]
    assert pair_key(asked, items[0]) != pair_key(Item("", "", Input("asked"), asked.content), items[0])
