"""An ablation of two variants with two seeds, from the runs to the report, and again where a part of it is gone.

Ray evaluates; training is left out, which four times would take minutes: every run ends with the weights it began with.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import jobs.training.launch
from jobs.cli import main
from jobs.runtime.lease import HeldLeases
from jobs.training.encoder import BACKBONE
from jobs.training.fit import build_backbone, prepare
from jobs.training.specs import TrainSpec
from pipelines.config import MediaConfig
from pipelines.ingest.ingest import ingest
from pipelines.sources.folder import read_folder
from pipelines.storage.location import open_store
from pipelines.storage.publish import publish_folder
from pipelines.synthetic.config import CorpusConfig
from pipelines.synthetic.corpus import make_corpus
from rzen.model.locate import local_folder

pytestmark = [pytest.mark.ray, pytest.mark.slow]
CORPUS = CorpusConfig(
    num_images=8,
    num_composed=0,
    num_documents=0,
    num_clips=0,
    num_texts=0,
    num_repeated=1,
    repeats=3,
    num_classified=12,
)
STAGE = """\
kind: train
name: stage
run: {{root: "{0}/runs", tracking: {{tensorboard: false}}}}
data: {{root: "{0}/data"}}
model:
  backbone: {{hidden: 16, layers: 1, heads: 2, vision_width: 16, vision_depth: 1, vocabulary: 300}}
  tune: full
  prompt: {{max_visual_tokens: 4}}
  dtype: float32
global_batch: 4
steps: 2
cluster: {{cpus_per_worker: 0.5}}
"""
EVALUATE = """\
kind: evaluate
models: {{not_ours: {{base: nowhere}}}}
data: {{root: "{0}/data", split: held_out}}
dtype: float32
out: nowhere.json
"""
ABLATION = """\
kind: ablation
stage: stage.yaml
set: {{objective: {{false_negatives: null}}}}
variants:
  baseline: {{objective: {{hardness: null}}}}
  other: {{model: {{backbone: {{seed: 5}}}}}}
contrasts: {{gain: {{other: 1, baseline: -1}}}}
seeds: 2
evaluate: {{spec: evaluate.yaml}}
out: "{0}/out"
"""


def end_at_the_start(specs: list[TrainSpec], max_parallel: int, write_overview: Callable[[], None] | None) -> None:
    """In place of `launch`: everything but the steps."""
    for spec in specs:
        if prepared := prepare(spec, HeldLeases()):
            run = prepared.run
            build_backbone(prepared)
            publish_folder(Path(local_folder(run.store.child(BACKBONE).url, None)), run.store.child(run.result))
            numbers = {
                "dropped_fraction": 0.1,
                "effective_fraction": 0.9,
                "temperature": 0.02,
                "step_s": 0.75,
                "feed_wait_s": 0.25,
                "samples_per_s": 5.0,
                "loss": 1.5,
            }
            run.finish({"steps": 1}, [{"step": 0, "skipped": 0, **numbers}])


@pytest.fixture(scope="module")
def untrained() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jobs.training.launch, "launch", end_at_the_start)
        yield


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None, untrained: None) -> Path:
    folder = tmp_path_factory.mktemp("ablation")
    make_corpus(folder / "corpus", CORPUS)
    raw = read_folder(str(folder / "corpus"), MediaConfig())
    store = open_store(str(folder / "data"))
    ingest(raw, store, media=MediaConfig(), held_out_fraction=0.3, seed=0, samples_per_shard=50)
    for name, text in (("stage", STAGE), ("evaluate", EVALUATE), ("ablation", ABLATION)):
        (folder / f"{name}.yaml").write_text(text.format(folder))
    assert main(["run", str(folder / "ablation.yaml")]) == 0
    return folder


def report(job: Path) -> Any:
    return json.loads((job / "out/ablation.json").read_text())


def test_every_variant_is_scored_with_every_seed(job: Path) -> None:
    content = report(job)
    assert [(run["variant"], run["seed"]) for run in content["runs"]] == [
        ("baseline", 0),
        ("other", 0),
        ("baseline", 1),
        ("other", 1),
    ]
    assert {row["task"] for run in content["runs"] for row in run["rows"]} == {"text_image", "image_class"}
    assert [(some["variant"], some["task"], some["num_seeds"]) for some in content["effects"]][-2:] == [
        ("baseline", "mean", 2),
        ("other", "mean", 2),
    ]
    orders = {}
    for name in ("baseline-s0", "other-s0", "baseline-s1"):
        spec = json.loads((job / "runs" / name / "spec.json").read_text())
        orders[name] = (spec["data"]["seed"], spec["spec"]["seed"])
    assert orders == {"baseline-s0": (0, 0), "other-s0": (0, 0), "baseline-s1": (1, 1)}
    page = (job / "out/ablation.md").read_text()
    assert "* 2 variants x 2 seeds (of 2 requested)" in page
    assert "workers computed 2 s in training steps only" in page
    assert "* registered before the first run, 20" in page
    assert "* gain: other - baseline" in page
    gains = {some["task"]: some["difference"] for some in content["contrasts"]}
    differences = {some["task"]: some["difference"] for some in content["effects"] if some["variant"] == "other"}
    assert gains == pytest.approx(differences)
    html = (job / "out/index.html").read_text()
    assert all(f'<th scope="row">{name}</th>' in html for name in orders)
    assert {"model.backbone.seed", "objective.hardness"} <= set(re.findall(r"<code>([\w.]+)</code>", html))


def test_both_seeds_of_an_untrained_variant_are_one_model_and_the_variants_are_two(job: Path) -> None:
    """So that a score that went to a wrong run would show."""
    rows = {(run["variant"], run["seed"]): [row["value"] for row in run["rows"]] for run in report(job)["runs"]}
    assert rows["baseline", 0] == rows["baseline", 1] != rows["other", 0] == rows["other", 1]


def test_only_what_is_gone_is_done_again(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = report(job)
    (gone,) = (job / "runs/other-s1/scores").iterdir()
    gone.unlink()
    kept = {path: path.read_bytes() for path in (job / "runs").rglob("*") if path.is_file()}
    changed_ns = {path: path.stat().st_mtime_ns for path in kept}
    assert main(["run", str(job / "ablation.yaml")]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 4
    assert out.count("1 models on") == 1
    assert {path: path.stat().st_mtime_ns for path in kept} == changed_ns
    assert gone.exists()
    after = report(job)
    for part in ("runs", "effects", "contrasts"):
        assert after[part] == before[part]
    assert after["settings"]["registered"] == before["settings"]["registered"]


def test_scores_of_another_evaluation_do_not_count(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(job / "ablation.yaml"), "--set", "evaluate.set.metrics=[mrr]"]) == 0
    out = capsys.readouterr().out
    assert (out.count("finished before"), out.count("4 models on")) == (4, 1)
    assert report(job)["settings"]["registered"].endswith("; changed since: evaluate")
    own = [row for run in report(job)["runs"] for row in run["rows"] if row["pool"] == "task"]
    assert {row["metric"] for row in own} == {"mrr"}
