"""Splits, benchmarks and custom datasets to scores, report and submission, through the job that users run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import rzen
from jobs.cli import main
from jobs.embedding.vectors import VectorCache, write_part
from jobs.evaluation.datasets import Bundle
from jobs.evaluation.evaluate import run
from jobs.evaluation.score import models_of
from jobs.evaluation.scores import Model, Scorer
from jobs.evaluation.specs import EvaluateSpec
from pipelines.benchmarks.catalog import open_dataset
from pipelines.benchmarks.custom import read_custom
from pipelines.benchmarks.table import M_BEIR, M_BEIR_GLOBAL, MMEB_V2
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.decode import ItemDecoder
from pipelines.items.types import as_ids
from pipelines.items.units import units
from pipelines.storage.location import open_store
from tests.data import publish
from tests.kills import run_until_a_part_is_stored
from tests.layouts import picture, planted, put, put_frames, put_lines, put_mbeir, put_mmeb
from tests.tiny import tiny_checkpoint

SUITES = ("MMEB-V2", "M-BEIR", "M-BEIR global")
TASKS = ("mscoco_task0", "oven_task6")
NUM_PICTURES = 400


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_checkpoint(tmp_path_factory.mktemp("backbone"))


def spec_of(tmp_path: Path, backbone: str, **changes: Any) -> EvaluateSpec:
    fields: dict[str, Any] = {
        "kind": "evaluate",
        "models": {"tiny": {"base": backbone}},
        "prompt": {"max_visual_tokens": 8},
        "dtype": "float32",
        "media": {"frames": 2},
        "cpus_per_actor": 0.5,
        "cpus_per_task": 0.5,
        "cache": str(tmp_path / "cache"),
        "out": str(tmp_path / "out"),
    }
    return EvaluateSpec.model_validate(fields | changes)


def cache_of(spec: EvaluateSpec) -> VectorCache:
    """The vectors of the one model on datasets of files."""
    stores = dict.fromkeys(spec.models, open_store(spec.cache))
    ((_, cache),) = models_of(spec, Bundle(spec.media, None), stores)
    return cache


def files(folder: Path) -> dict[str, bytes]:
    """Everything below a folder but what says where it is."""
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.endswith("leaderboard.json")}


@pytest.mark.ray
def test_scores_of_all_meta_tasks_are_those_computed_by_hand(tmp_path: Path, backbone: str, ray_cluster: None) -> None:
    """With planted vectors in the cache: nothing is left to embed."""
    wanted = put_mmeb(tmp_path / "mmeb")
    put_mbeir(tmp_path / "mbeir")
    spec = spec_of(
        tmp_path,
        backbone,
        suites=dict(zip(SUITES, [str(tmp_path / "mmeb"), *[str(tmp_path / "mbeir")] * 2], strict=True)),
        submission={
            "tiny": {
                "model_name": "tiny",
                "model_backbone": "Qwen2-VL",
                "model_size": "1K parameters",
                "embedding_dimension": 64,
                "max_length_tokens": 512,
                "model_release_date": "2026-11-21",
                "url": "https://example.org",
            }
        },
    )
    store = cache_of(spec).store
    for name, (found, _) in wanted.items():
        for vectors in planted(open_dataset(MMEB_V2[name], tmp_path / "mmeb"), found):
            write_part(store, [id.decode() for id in vectors.ids], vectors.rows)
    # Of three images and two texts; alone among its own kind, each finds the same but for the other kind.
    answers = {"9:7": ["9:0"], "9:8": ["5:0", "9:1"], "5:1": ["9:2", "5:0", "5:1"]}
    for task in TASKS:
        dataset = open_dataset(M_BEIR_GLOBAL[task], tmp_path / "mbeir")
        queries, candidates = planted(dataset, answers)
        write_part(store, [id.decode() for id in queries.ids], queries.rows)
        write_part(store, [id.decode() for id in candidates.ids], candidates.rows)

    run(spec)
    out = tmp_path / "out"
    for name, (_, score) in wanted.items():
        content = json.loads((out / f"MMEB-V2/tiny/{name}_score.json").read_text())
        assert content[MMEB_V2[name].metric] == pytest.approx(score), name
    mean = json.loads((out / "MMEB-V2/tiny/leaderboard.json").read_text())["means"][-1]
    assert (mean["num_datasets"], mean["num_counted"]) == (78, 0)  # none has the queries of the protocol
    assert mean["official"] == 0.0
    for suite, caption, question in (("M-BEIR", 1.0, 0.0), ("M-BEIR-global", 0.5, 0.0)):
        folder = out / suite / "tiny"
        scores = {name: json.loads((folder / f"{name}_score.json").read_text()) for name in TASKS}
        assert [scores[name][M_BEIR[name].metric] for name in TASKS] == [1.0, 1.0]  # recall at 5 of 5 candidates
        assert [scores[name]["hit@1"] for name in TASKS] == [caption, question]
        ranks = [json.loads(line)["label_ranks"] for line in (folder / "oven_task6_pred.jsonl").open()]
        assert ranks == [[2 if suite == "M-BEIR" else 3]]
    entry = json.loads((out / "MMEB-V2/tiny/submission.json").read_text())
    assert entry["metadata"]["model_name"] == "tiny"
    assert entry["metrics"] == {"image": {}, "video": {}, "visdoc": {}}
    page = (out / "index.html").read_text()
    assert "EgoSchema" in page
    assert 'class="hit relevant"' in page
    assert "http://" not in page.replace("http://www.w3.org", "")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts, pictures, both, clips and pages of PDFs; some queries are a candidate themselves."""
    root = tmp_path_factory.mktemp("own")
    for number in range(NUM_PICTURES):
        put(root / f"{number}.jpg", picture(str(number)))
    for name in "ab":
        put_frames(root / "clips" / name)
    corpus: list[dict[str, Any]] = [{"_id": f"i{number}", "image": f"{number}.jpg"} for number in range(NUM_PICTURES)]
    corpus += [{"_id": f"t{number}", "text": "word " * (1 + number % 7) + str(number)} for number in range(50)]
    corpus += [{"_id": f"v{name}", "video": f"clips/{name}"} for name in "ab"]
    corpus += [{"_id": "both", "image": "3.jpg", "text": "with words"}]
    put_lines(root / "corpus.jsonl", corpus)
    queries = [{"_id": f"q{line['_id']}", **{k: v for k, v in line.items() if k != "_id"}} for line in corpus[::9]]
    put_lines(root / "queries.jsonl", [*queries, {"_id": "asked", "text": "word", "instruction": "Find a picture."}])
    grades = [f"{line['_id']}\t{line['_id'][1:]}\t1" for line in queries]
    put(root / "qrels/test.tsv", "\n".join(["query\tcandidate\tgrade", *grades, "asked\ti5\t2"]))
    put(root / "dataset.json", '{"metric": "hit@1"}')
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, backbone: str, own: Path, ray_cluster: None) -> Path:
    """Folder of a run with one actor, which nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run(spec_of(folder, backbone, custom={"mine": str(own)}, instruction_sensitivity=True))
    return folder


@pytest.mark.ray
def test_vectors_are_those_of_each_item_alone_and_scores_follow(whole: Path, backbone: str, own: Path) -> None:
    spec = spec_of(whole, backbone, custom={"mine": str(own)})
    dataset = read_custom(own, "mine")
    cache = cache_of(spec)
    embedder = rzen.load(backbone, identity=spec.identity)
    decoder = ItemDecoder(spec.media)
    items = [*(query.item for query in dataset.queries), *dataset.candidates]
    alone = np.concatenate([embedder.encode([decoder.input(item)]) for item in items])
    got = cache.load(as_ids(item.id for item in items), whole / "loaded.npy")
    assert np.abs(got.rows - alone).max() < 1e-5
    queries, candidates = np.split(alone.astype(np.float64), [len(dataset.queries)])
    ids = [item.id for item in dataset.candidates]
    hits = []
    for query, row in zip(dataset.queries, queries @ candidates.T, strict=True):
        (right,) = (ids.index(id) for id in query.relevance)
        others = np.delete(row, right)
        hits.append(others.max() < row[right] - 1e-6)
    score = json.loads((whole / "out/custom/tiny/mine_score.json").read_text())
    assert score["hit@1"] == pytest.approx(np.mean(hits))
    assert sum(hits) >= len(hits) - 2  # a query that is a candidate finds itself, but for equal pictures
    told = json.loads((whole / "out/custom/tiny/diagnostics.json").read_text())["mine"]
    assert 0 <= told["changed_by_instruction"] <= 1 / len(dataset.queries)  # one query has an instruction


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("actors", [2, pytest.param(3, marks=pytest.mark.long)])
def test_any_number_of_actors_writes_the_same_files(
    whole: Path, tmp_path: Path, backbone: str, own: Path, actors: int
) -> None:
    run(spec_of(tmp_path, backbone, custom={"mine": str(own)}, instruction_sensitivity=True, actors=actors))
    assert files(tmp_path / "out") == files(whole / "out")
    assert files(tmp_path / "cache") == files(whole / "cache")


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_job_that_was_killed_goes_on_to_the_same_files(whole: Path, tmp_path: Path, backbone: str, own: Path) -> None:
    spec = spec_of(tmp_path, backbone, custom={"mine": str(own)}, instruction_sensitivity=True)
    path = put(tmp_path / "spec.yaml", spec.model_dump_json())
    run_until_a_part_is_stored(path, tmp_path / "cache", "*/*.ids")
    some, all = (len(list((folder / "cache").glob("*/*.ids"))) for folder in (tmp_path, whole))
    assert 0 < some < all
    run(spec)
    assert files(tmp_path / "out") == files(whole / "out")
    assert files(tmp_path / "cache") == files(whole / "cache")


@pytest.mark.ray
def test_another_prompt_is_embedded_again_and_the_same_not_at_all(
    whole: Path, backbone: str, own: Path, tmp_path: Path
) -> None:
    changed = spec_of(whole, backbone, custom={"mine": str(own)}, prompt={"max_visual_tokens": 4})
    before = files(whole / "cache")
    run(spec_of(whole, backbone, custom={"mine": str(own)}, out=str(tmp_path / "again")))
    assert files(whole / "cache") == before
    same = spec_of(whole, backbone, custom={"mine": str(own)})
    assert cache_of(same).store.url != cache_of(changed).store.url


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
def test_a_picture_that_cannot_be_read_stops_its_dataset_alone(
    tmp_path: Path, backbone: str, ray_cluster: None
) -> None:
    for name in ("good", "bad"):
        root = tmp_path / name
        for number in range(3):
            put(root / f"{number}.jpg", b"no picture" if (name, number) == ("bad", 1) else picture(str(number)))
        put_lines(root / "corpus.jsonl", [{"_id": f"{name}{number}", "image": f"{number}.jpg"} for number in range(3)])
        put_lines(root / "queries.jsonl", [{"_id": "q", "image": "0.jpg"}])
        put(root / "qrels/test.tsv", f"q\t{name}0\t1\n")
    own = {name: str(tmp_path / name) for name in ("bad", "good")}
    run(spec_of(tmp_path, backbone, custom=own))
    lines = json.loads((tmp_path / "out/custom/tiny/leaderboard.json").read_text())["datasets"]
    problems = {line["name"]: line["problem"] for line in lines}
    assert problems["good"] == ""
    assert "1 of 4 items cannot be embedded, the first: bad1: unsupported_format: " in problems["bad"]
    assert not (tmp_path / "out/custom/tiny/bad_score.json").exists()
    put(tmp_path / "bad/1.jpg", picture("mended"))
    run(spec_of(tmp_path, backbone, custom=own))
    assert (tmp_path / "out/custom/tiny/bad_score.json").exists()


@pytest.mark.ray
@pytest.mark.slow
def test_a_split_is_scored_as_each_sample_embedded_alone_says(tmp_path: Path, backbone: str, ray_cluster: None) -> None:
    """Two models in one job, one of them without instructions; some samples have one target, also of two tasks."""
    sizes = {
        "red": ("text_image", 40),
        "blue": ("text_image", 12),
        "name": ("image_class", 9),
        "page": ("text_page", 7),
    }
    publish(open_store(str(tmp_path / "data")), sizes, duplicates={"blue": [3, 5]})
    models = {"tiny": {"base": backbone}, "bare": {"base": backbone, "instructions": False}}
    data = {"root": str(tmp_path / "data")}
    tasks = ["text_image", "text_page"]
    spec = spec_of(
        tmp_path, backbone, models=models, data=data, tasks=tasks, metrics=["hit@5", "ndcg@5"], baseline="bare"
    )
    scored = {(row["model"], row["task"], row["pool"], row["metric"]): row for row in run(spec)["rows"]}
    reader = Reader(DataConfig(root=str(tmp_path / "data")))
    samples = [sample for source in ("red", "blue") for sample in reader.samples(source, range(sizes[source][1]))]
    pages = list(reader.samples("page", range(7)))
    embedder = rzen.load(backbone, identity=spec.identity)
    rows = json.loads((tmp_path / "out/results.json").read_text())["rows"]
    assert rows == [*scored.values()]
    assert [*scored] == [
        (model, task, pool, metric)
        for model in models
        for pool, metrics in (("task", ("hit@5", "ndcg@5")), ("mixed", ("hit@1", "asked_modality@1", "routed_hit@1")))
        for task in tasks
        for metric in metrics
    ]
    targets = {s.sample.target_sha256: s.positive for s in samples}
    assert {s.sample.target_sha256 for s in pages} < targets.keys()
    vectors = embedder.encode(list(targets.values()))
    for model, has_instruction in (("tiny", True), ("bare", False)):

        def ranks(some: list[Any], has_instruction: bool = has_instruction) -> NDArray[np.int64]:
            asked = [s.query if has_instruction else replace(s.query, instruction="") for s in some]
            right = [list(targets).index(s.sample.target_sha256) for s in some]
            cosines = embedder.encode(asked).astype(np.float64) @ vectors.T
            others = [np.delete(row, own) >= row[own] - 1e-6 for row, own in zip(cosines, right, strict=True)]
            return np.sum(others, axis=1)

        hit = scored[model, "text_image", "task", "hit@5"]
        assert hit["value"] == pytest.approx(np.mean(ranks(samples) < 5))
        assert (hit["num_queries"], hit["num_candidates"], hit["split"]) == (52, 40, "train")
        assert hit["chance"] == pytest.approx(5 / 40)
        for task, some in zip(tasks, (samples, pages), strict=True):
            mixed = scored[model, task, "mixed", "hit@1"]
            assert mixed["value"] == pytest.approx(np.mean(ranks(some) < 1))
            assert (mixed["num_candidates"], mixed["chance"]) == (40, pytest.approx(1 / 40))
            assert scored[model, task, "mixed", "asked_modality@1"]["value"] == 1.0
    markdown = (tmp_path / "out/train/models.md").read_text()
    assert markdown.count("| one pool of 40 |") == 1
    assert markdown.count("text_image") == 6  # means and difference, in both pools; three differences in the mixed one
    assert all(markdown.count(f"| one pool, {name} |") == 1 for name in ("hit@1", "asked_modality@1", "routed_hit@1"))
    assert (tmp_path / "out/train/bare/text_image_pred.jsonl").read_text().count("\n") == 52
    html = (tmp_path / "out/index.html").read_text()
    assert 'class="hit relevant"' in html
    assert 'aria-label="One pool of train"' in html
    searches = html[html.index('id="searches"') : html.index('id="examples"')]
    assert searches.count('class="pair"') == len(tasks)  # one query of each, as both models answer it
    assert searches.count('<li class="hit relevant"') == 2 * len(tasks)
    assert "the difference to bare" in html


@pytest.mark.ray
@pytest.mark.slow
def test_a_split_with_a_damaged_sample_is_refused(tmp_path: Path, backbone: str, ray_cluster: None) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 12)}, bad={"red": [3]})
    with pytest.raises(UserError, match=r"1 of 24 items cannot be embedded, the first: .*key 00000003: unsupported_f"):
        run(spec_of(tmp_path, backbone, data={"root": str(tmp_path / "data")}))


@pytest.mark.ray
@pytest.mark.slow
def test_a_model_that_is_tried_leaves_only_its_scores(tmp_path: Path, backbone: str, ray_cluster: None) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 12)})
    spec = spec_of(tmp_path, backbone, data={"root": str(tmp_path / "data")}, custom={"mine": "nowhere"})
    assert spec.data is not None
    model = Model(spec.models["tiny"], open_store(str(tmp_path / "model")))
    scorer = Scorer(spec)
    (row, _) = scorer.scores({"tried": model})["tried"]
    assert (row.model, row.num_queries) == ("tried", 12)
    assert np.mean(scorer.by_query({"tried": model})["tried"]["text_image"]) == row.value
    assert [path.split("/")[0] for path in model.store.list()] == ["scores"]
    assert len(model.store.list()) == 1
    assert not (tmp_path / "cache").exists()


def test_units_are_of_like_items_whatever_their_order(own: Path) -> None:
    items = list(read_custom(own, "mine").candidates)
    found = units(items)
    assert found == units(items[::-1])
    assert sorted(item.id for unit in found for item in unit) == sorted(item.id for item in items)
    assert [{item.modality for item in unit} for unit in found[1:-1]] == [{"image"}] * (len(found) - 2)
    assert max(len(unit) for unit in found[1:]) == 64


def test_nothing_there_is_one_error_that_says_what_to_fetch(
    tmp_path: Path, backbone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(tmp_path, backbone, suites={"MMEB-V2": str(tmp_path / "nowhere")})
    with pytest.raises(UserError, match=r"no dataset is there; the first lacks: .*fetch https://"):
        run(spec)
    path = put(tmp_path / "spec.yaml", spec.model_dump_json())
    assert main(["evaluate", "--list", str(path)]) == 0
    listed = capsys.readouterr().out
    assert listed.startswith("MMEB-V2: 0 of 78 datasets are there\n")
    assert listed.count("missing: ") == 78
