"""The whole road of the demo, at a size of seconds, on an S3 API."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModel

from jobs.cli import main
from pipelines.media import sandbox
from pipelines.storage.location import open_store
from rzen.evaluation.results import Result, markdown_table
from rzen.model.locate import local_folder
from tests.paths import ROOT

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]
MODELS = ["stage1", "soup", "first", "second"]
TASKS = ["text_image", "text_page", "text_video", "image_text_image", "text_text"]
SMALL = {
    "vars.store": "s3://road/demo",
    "jobs.corpus.set.corpus": "{num_images: 40, num_composed: 40, num_documents: 5, num_clips: 40, num_texts: 40}",
    "jobs.ingest.set.held_out_fraction": "0.2",
    "jobs.stage1.set.global_batch": "8",
    "jobs.stage1.set.steps": "6",
    "jobs.stage1.set.checkpoint.every_steps": "3",
    "jobs.finetunes.set.runs.third": "null",  # two are enough to be souped
    "jobs.evaluate.set.models.third": "null",
    "jobs.evaluate.set.models.before": "null",
    "jobs.search.set.curves.third": "null",
    "jobs.finetunes.set.set.global_batch": "8",
    "jobs.finetunes.set.set.steps": "4",
    # Fewer processes, each of which imports its libraries: other tests have several workers, actors and tasks at once.
    "jobs.stage1.set.cluster.workers": "1",
    "jobs.evaluate.set.actors": "1",
} | {
    f"jobs.{job}.cpus_per_task": "2"
    for job in ("stage1.set.feed", "finetunes.set.set.feed", "evaluate.set", "embed.set")
}


@pytest.fixture(scope="module")
def road(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, s3_endpoint: str) -> Any:
    """Folder of the outputs, and the command that made them."""
    out = tmp_path_factory.mktemp("road")
    changes = SMALL | {"vars.out": str(out)}
    command = ["run", str(ROOT / "jobs/demo.yaml"), *(w for k, v in changes.items() for w in ("--set", f"{k}={v}"))]
    before = {name: os.environ.get(name) for name in ("AWS_ENDPOINT_URL", "RZEN_CACHE")}
    os.environ |= {"AWS_ENDPOINT_URL": s3_endpoint, "RZEN_CACHE": str(out / "cache")}
    assert main(command) == 0
    yield out, command
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def test_every_model_is_scored_on_every_task(road: Any) -> None:
    out, _ = road
    rows = json.loads((out / "evaluation/results.json").read_text())["rows"]
    assert {(row["model"], row["task"], row["pool"], row["metric"]) for row in rows} == {
        (model, task, pool, metric)
        for model in MODELS
        for task in TASKS
        for pool, metrics in (("task", ("hit@1", "ndcg@5")), ("mixed", ("hit@1", "asked_modality@1", "routed_hit@1")))
        for metric in metrics
    }
    assert all(0 <= row["value"] <= 1 and row["num_queries"] == 8 for row in rows)
    sizes = {(row["pool"], row["metric"] == "routed_hit@1", row["num_candidates"]) for row in rows}
    kinds = {("mixed", True, 8), ("mixed", True, 16)}  # images are the targets of two tasks
    assert sizes == {("task", False, 8), ("mixed", False, 8 * len(TASKS))} | kinds
    assert list(dict.fromkeys(row["model"] for row in rows)) == MODELS
    assert (out / "evaluation/results.md").read_text() == markdown_table([Result(**row) for row in rows])


def test_exported_soup_is_a_checkpoint_for_automodel(road: Any, s3_endpoint: str) -> None:
    folder = Path(local_folder("s3://road/demo/model", s3_endpoint))
    model = AutoModel.from_pretrained(folder)
    assert type(model).__name__ == "Qwen2VLModel"
    assert json.loads((folder / "rzen.json").read_text())["readout"]["pooling"] == "last_token"


def test_every_target_has_one_vector_of_length_one(road: Any, s3_endpoint: str) -> None:
    import io

    import pyarrow.parquet as pq

    store = open_store("s3://road/demo/vectors", s3_endpoint)
    manifest = json.loads(store.read("vectors.json"))
    rows = [row for part in manifest["parts"] for row in pq.read_table(io.BytesIO(store.read(part))).to_pylist()]
    assert len(rows) == manifest["num_vectors"] == 40 + 40 + 5 * 8 + 40 + 40
    assert len({(row["split"], row["source"], row["index"]) for row in rows}) == len(rows)
    assert np.allclose(np.linalg.norm([row["vector"] for row in rows], axis=1), 1, atol=1e-5)
    assert {row["modality"] for row in rows} == {"image", "page", "video", "text"}


def test_page_is_one_file_with_pictures_scores_and_curves(road: Any) -> None:
    out, _ = road
    html = (out / "index.html").read_text()
    assert "a pink bar chart below a blue circle on an orange background" in html
    assert html.count("data:image/webp") >= 4
    assert all(f'aria-label="{name}"' in html for name in ("Training loss", "Retrieval scores"))
    assert "https://" not in html.replace("https://www.w3.org", "")
    start = html.index('<script type="application/json" id="results">')
    embedded = html[html.index(">", start) + 1 : html.index("</script>", start)]
    assert json.loads(embedded) == json.loads((out / "evaluation/results.json").read_text())


def test_finished_stations_are_not_repeated_and_a_changed_one_is(road: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _, command = road
    assert main(command) == 0
    assert capsys.readouterr().out.count("done before") == 9
    assert main([*command, "--set", "jobs.search.set.top_k=3"]) == 0
    again = capsys.readouterr().out
    assert again.count("done before") == 7
    assert "[8/9] search (search)" in again
    assert "[8/9] search (search): done before" not in again


def test_search_from_the_command_line(
    road: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = []
    monkeypatch.setattr(
        sandbox, "_start", lambda *args, start=sandbox._start: children.append(start(*args)) or children[-1]
    )
    page = tmp_path / "hits.html"
    arguments = ["search", "a green star", "--vectors", "s3://road/demo/vectors", "--top-k", "6", "--modality", "page"]
    assert main([*arguments, "--html", str(page)]) == 0
    out = capsys.readouterr().out
    assert out.count("documents/") == 6
    assert page.exists()
    assert 1 <= len(children) <= 2, "one for each split, not one for each hit"


def test_search_without_queries_takes_captions_of_the_corpus(road: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sets = ["--set", "queries=null", "--set", "vectors=s3://road/demo/vectors", "--set", "html=null"]
    assert main(["run", str(ROOT / "jobs/search.yaml"), *sets]) == 0
    assert capsys.readouterr().out.count("rank  score") == 4


@pytest.mark.long
def test_same_code_trains_from_object_storage_with_the_stage_of_the_recipe(road: Any, s3_endpoint: str) -> None:
    """`rzen run jobs/stage2.yaml --set data.root=s3://...`, with the sizes of this machine."""
    changes = {
        "name": "own",
        "run.root": "s3://road/demo/runs",
        "data.root": "s3://road/demo/data",
        "data.media": "{frames: 4, page_pixels: 17920}",
        "model.backbone": "s3://road/demo/runs/stage1/model",
        "model.prompt.max_visual_tokens": "16",
        "model.dtype": "float32",
        "init_adapter": "null",
        "global_batch": "8",
        "steps": "3",
        "cluster": "{workers: 2, cpus_per_worker: 0.5, gpus_per_worker: 0}",
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    assert main(["run", str(ROOT / "jobs/stage2.yaml"), *sets]) == 0
    store = open_store("s3://road/demo/runs/own", s3_endpoint)
    assert json.loads(store.read("done.json"))["steps"] == 3
    identity = json.loads(store.read("adapter/rzen.json"))
    assert identity["prompt"]["template"] == "rzen_paper"
