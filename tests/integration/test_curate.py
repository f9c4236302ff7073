"""Job of kind `curate`: planted samples are left out, on Ray, with a model, after kills, in object stores."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from jobs.curation import curate
from jobs.curation.specs import CurateSpec
from pipelines.candidates.table import open_table
from pipelines.config import DataConfig
from pipelines.feed.reader import Reader
from pipelines.shards.manifest import read_manifest
from pipelines.storage.location import open_store
from tests.curation import CHANGES, Pair, edited, encoded, publish, scenes
from tests.kills import run_until_a_part_is_stored
from tests.tiny import tiny_export

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]
NUM_SCENES = 96


def make_data(folder: Path) -> dict[str, dict[int, str]]:
    """Publish a dataset, and return source -> sample -> why it is left out by the rules that need no model."""
    rng = Random(0)
    drawn, other = scenes(NUM_SCENES), scenes(8, seed=9)
    pairs: list[Pair] = [(text, encoded(image, "PNG")) for text, image in drawn]
    for number in range(4):
        text, image = drawn[10 * number]
        pairs.append((edited(text, rng), CHANGES[number % 3](image)))
    pairs += [pairs[1], ("broken", b"not a picture"), ("leaks", CHANGES[1](other[2][1]))]
    texts: list[Pair] = [(f"is {number} more than {rng.random()}", f"reply {number}") for number in range(30)]
    publish(folder, {"pictures": pairs, "texts": [*texts, texts[4]]})
    publish(folder, {"pictures": [(f"scene {n}", encoded(image)) for n, (_, image) in enumerate(other)]}, "held_out")
    left_out = dict.fromkeys(range(NUM_SCENES, NUM_SCENES + 4), "near_media")
    left_out |= {NUM_SCENES + 4: "exact_pair", NUM_SCENES + 5: "bad_media", NUM_SCENES + 6: "leak_media"}
    return {"pictures": left_out, "texts": {30: "exact_pair"}}


def spec_of(folder: Path, name: str = "out", **changes: Any) -> CurateSpec:
    fields: dict[str, Any] = {
        "kind": "curate",
        "data": {"root": str(folder / "data")},
        "cache": str(folder / "cache"),
        "out": str(folder / name),
        "cpus_per_task": 0.5,
        "cpus_per_actor": 0.5,
    }
    return CurateSpec.model_validate(fields | changes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reasons(out: str, endpoint: str | None = None) -> dict[str, dict[int, str]]:
    """Source -> sample -> reason, as the files of a table say."""
    store = open_store(out, endpoint)
    found = {}
    for source, path in json.loads(store.read("report.json"))["files"].items():
        rows = pq.read_table(io.BytesIO(store.read(path))).to_pylist()
        found[source] = {row["sample"]: row["reason"] for row in rows}
        assert all(row["key"] == f"{row['sample']:06d}" for row in rows)
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Path:
    """Folder with a dataset and the table of a job that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    expected = make_data(folder)
    before = files(folder / "data")
    result = curate.run(spec_of(folder))
    assert (result["samples"], result["kept"]) == (134, 126)
    assert result["dropped"] == {"exact_pair": 2, "bad_media": 1, "near_media": 4, "leak_media": 1}
    assert reasons(str(folder / "out")) == expected
    assert files(folder / "data") == before
    return folder


def test_training_reads_the_table(whole: Path) -> None:
    table = open_table(str(whole / "out"))
    manifest = read_manifest(open_store(str(whole / "data")), "train")
    table.check_data(manifest)
    assert table.manifest.stage == "curate"
    for source, found in reasons(str(whole / "out")).items():
        rows = table.plan_rows(source)
        assert rows.sample.tolist() == sorted(found)
        assert not rows.keep.any()
        assert table.manifest.plan[source].num_dropped == len(found)
    assert json.loads((whole / "out/report.json").read_bytes())["table"] == table.fingerprint


def test_the_report_shows_examples(whole: Path) -> None:
    page = (whole / "out/report.html").read_text()
    assert page.count("<article>") == 3 + 2 + 1 + 1
    for text in ("near_media", "kept: target", "evaluation set", "held_out of the data", "unsupported_format"):
        assert text in page
    assert page.count('<image id="thumbnail-') >= 9


def test_the_same_command_does_nothing_and_other_examples_are_another_report(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spec, out = spec_of(whole, "twice"), whole / "twice"
    first = curate.run(spec)
    before = files(out)
    with monkeypatch.context() as patch:
        patch.setattr(curate, "load_samples", None)
        assert curate.run(spec) == first
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{out} is up to date: nothing to curate left out for pictures texts all exact_pair 1 1 2" in shown
    assert files(out) == before
    curate.run(spec.model_copy(update={"num_examples": 0}))
    assert {name for name, data in files(out).items() if data != before[name]} == {"report.html", "report.json"}
    (out / "report.html").unlink()
    assert curate.run(spec) == first
    assert files(out) == before


def test_one_task_at_a_time_gives_the_same_bytes(whole: Path) -> None:
    expected = files(whole / "out")
    curate.run(spec_of(whole, "alone", cache=str(whole / "alone-cache"), cpus_per_task=4.0))
    assert files(whole / "alone") == {name: data.replace(b"/out", b"/alone") for name, data in expected.items()}
    assert files(whole / "alone-cache") == files(whole / "cache")


def test_a_job_that_was_killed_ends_with_the_same_bytes(whole: Path) -> None:
    spec = spec_of(whole, "killed", cache=str(whole / "killed-cache"))
    path = whole / "killed.yaml"
    path.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_defaults=True)))
    run_until_a_part_is_stored(path, whole / "killed-cache/media", "*.parquet")
    there = {path: path.stat().st_mtime_ns for path in (whole / "killed-cache").rglob("*.parquet")}
    assert there
    assert not (whole / "killed/candidates.json").exists()
    curate.run(spec)
    assert files(whole / "killed") == files(whole / "out")
    assert {path: path.stat().st_mtime_ns for path in there} == there


def test_other_rules_decode_nothing_again(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_work(*args: object) -> None:
        raise AssertionError("the cache has all features")

    monkeypatch.setattr(curate, "write_features", no_work)
    rules = {"exact": None, "near": {"of": "target"}, "filters": None, "leakage": {"held_out": False}}
    result = curate.run(spec_of(whole, "other", rules=rules))
    assert result["dropped"] == {"near_media": 5, "near_text": 1}
    assert reasons(str(whole / "out"))["texts"] == {30: "exact_pair"}


def test_an_object_store_and_a_custom_dataset(
    whole: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    custom = whole / "custom"
    (custom / "qrels").mkdir(parents=True)
    (_, data), *_ = ((text, encoded(image)) for text, image in scenes(1))
    (custom / "a.jpg").write_bytes(data)
    (custom / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (custom / "corpus.jsonl").write_text('{"_id": "d", "image": "a.jpg"}\n')
    (custom / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    out = "s3://curation/out"
    arguments = ["curate", str(whole / "data"), out, "--against", f"mine={custom}", "--json"]
    arguments += ["--set", "cache=s3://curation/cache", "--set", "rules.leakage.held_out=false"]
    arguments += ["--set", "rules.near=null", "--set", "rules.exact=null"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["dropped"] == {"bad_media": 1, "leak_media": 2}
    assert reasons(out)["pictures"] == {0: "leak_media", NUM_SCENES: "leak_media", NUM_SCENES + 5: "bad_media"}


def test_a_wrong_option_is_one_error(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["curate", str(whole / "data"), str(whole / "x"), "--against", "MMEB-V2"]) == 1
    assert "--against MMEB-V2: is not NAME=FOLDER" in capsys.readouterr().err
    assert main(["curate", str(whole / "data"), str(whole / "x"), "--set", "rules.semantic.cosine=0.9"]) == 1
    assert "rules.semantic needs vectors: name a model" in capsys.readouterr().err
    assert not (whole / "x").exists()


@pytest.mark.slow
def test_rules_that_need_a_model(whole: Path, tmp_path: Path) -> None:
    tiny_export(tmp_path)
    rules = {"exact": None, "near": None, "leakage": None, "alignment": {"quantile": 0.1}}
    rules |= {"semantic": {"cosine": 0.9999, "cluster_samples": 1000}}
    spec = spec_of(whole, "model", model=str(tmp_path / "model"), rules=rules)
    result = curate.run(spec)
    sizes = {"pictures": 102, "texts": 31}  # one picture is broken
    assert result["dropped"]["misaligned"] == sum(int(0.1 * size) for size in sizes.values())
    found = reasons(str(whole / "model"))
    reader = Reader(DataConfig(root=str(whole / "data")))
    import rzen

    embedder = rzen.load(str(tmp_path / "model"))
    samples = [*reader.samples("texts", range(31))]
    cosines = [
        float(embedder.encode([sample.query])[0] @ embedder.encode([sample.positive])[0])  # type: ignore[union-attr]
        for sample in samples
    ]
    lowest = sorted(range(31), key=cosines.__getitem__)[:3]
    assert {number for number, reason in found["texts"].items() if reason == "misaligned"} == set(lowest)
    # The pair that is there twice has equal vectors, unless one of both was left out before.
    twice = {4, 30} - set(lowest)
    assert len(twice) < 2 or len(twice & set(found["texts"])) == 1
    again = curate.run(spec.model_copy(update={"out": str(whole / "again"), "actors": 2}))
    assert again["dropped"] == result["dropped"]
    assert files(whole / "again") == files(whole / "model")

    # The pictures are one cluster of more than 20 samples, and so are the texts.
    full = {"cosine": None, "cluster_samples": 1000, "max_per_cluster": 20, "full_clusters": "weigh"}
    some = rules | {"alignment": None, "semantic": full, "within": "source"}
    weighted = curate.run(spec_of(whole, "weighted", model=str(tmp_path / "model"), rules=some))
    assert weighted["dropped"] == {"bad_media": 1}
    assert {name: one["samples"] for name, one in weighted["weighted"].items()} == {"pictures": 102, "texts": 31}
    assert all(one["total"] == pytest.approx(20, abs=1e-3) for one in weighted["weighted"].values())
    page = (whole / "weighted/report.html").read_text()
    assert "2 of 2 full clusters" in page
    for text in ("Weights, pictures", "Weights, texts", "102 samples of <bdi>pictures</bdi>, weight 0.196"):
        assert text in page
    assert curate.run(spec_of(whole, "weighted", model=str(tmp_path / "model"), rules=some)) == weighted
    data = DataConfig(root=str(whole / "data"), curation=[str(whole / "weighted")])
    table = Reader(data).tables()["texts"]
    assert (len(table.weighted), table.num_kept) == (31, 20)
    assert table.weights == pytest.approx(np.full(31, 20 / 31))
