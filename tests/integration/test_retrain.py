"""Runs of scheduled retraining against an S3 API: promoted, nothing new, refused, killed on the way, rolled back."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobs.cli import main
from jobs.evaluation.scores import Model, Scorer
from jobs.runtime.lease import LEASE
from jobs.serving.pairs import find_place, read_pair
from jobs.workflows.registry import Registry
from pipelines.config import MediaConfig
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from rzen.embedding.corpus import read_manifest
from rzen.serving.served import load_served
from tests.data import publish
from tests.specs import evaluate, stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
RETRAIN = """\
kind: retrain
stage: stage.yaml
evaluate: {{spec: evaluate.yaml}}
corpus: {{spec: embed.yaml}}
gate: {{min_queries: 24}}
min_new_samples: 4
registry: "{0}/registry"
"""


@pytest.fixture
def bucket(tmp_path: Path, s3_endpoint: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("RZEN_CACHE", str(tmp_path / "cache"))
    url = "s3://retrain"
    run = {"root": f"{url}/runs", "tracking": {"tensorboard": False}}
    (tmp_path / "stage.yaml").write_text(stage(url, run=run, steps=3))
    (tmp_path / "evaluate.yaml").write_text(evaluate(f"{url}/frozen"))
    (tmp_path / "embed.yaml").write_text(
        f"kind: embed\nmodel: x\ndata: {{root: '{url}/data'}}\nsplits: [train]\nout: x\ncpus_per_task: 0.5\n"
    )
    (tmp_path / "retrain.yaml").write_text(RETRAIN.format(url))
    bucket = open_store(url)
    publish(bucket.child("data"), {"red": ("text_image", 16)})
    publish(bucket.child("frozen"), {"blue": ("text_image", 24)})
    return bucket


def _losing_the_lease(store: Store) -> Callable[..., Any]:
    by_query = Scorer.by_query

    def robbed(scorer: Scorer, models: Mapping[str, Model]) -> Any:
        scores = by_query(scorer, models)
        content = json.loads(store.read(LEASE)) | {"holder": "another", "machine": "another"}
        store.write(LEASE, json.dumps(content).encode())
        time.sleep(3.5)  # longer than the lease
        return scores

    return robbed


@pytest.mark.timeout(600)
def test_retraining_promotes_refuses_and_does_nothing(
    tmp_path: Path, bucket: Store, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(bucket.child("registry"))
    run = ["run", str(tmp_path / "retrain.yaml")]

    # Another process takes the lease while this one scores: it publishes nothing (kuberay#5211).
    with monkeypatch.context() as robbed:
        robbed.setattr(Scorer, "by_query", _losing_the_lease(registry.store))
        assert main([*run, "--set", "lease_s=3"]) == 1
    assert "lease.json: was taken by another process" in capsys.readouterr().err
    assert (registry.models(), registry.promotions()) == ([], [])

    assert main(run) == 0
    assert "promoted after-0-" in capsys.readouterr().out
    first = registry.champion()
    assert first is not None
    assert first.generation == 1
    lineage = registry.lineage(first.model)
    assert (lineage["parent"], lineage["soup"], lineage["data"]["samples"]) == (None, None, {"red": 16})
    served = read_pair(registry.store)
    assert served == registry.pair(first.model)
    assert read_manifest(served["corpus"])["num_vectors"] == 16
    load_served(find_place({"registry": registry.store.url}), MediaConfig(), 1024).close()  # they belong together

    assert main(run) == 0
    assert f"nothing new: the data are those of the champion, {first.model}" in capsys.readouterr().out
    publish(bucket.child("data"), {"red": ("text_image", 18)})
    assert main(run) == 0
    assert "nothing to do yet: 2 new samples, fewer than 4" in capsys.readouterr().out

    publish(bucket.child("data"), {"red": ("text_image", 24)})
    no_better = [*run, "--set", "gate.min_gain=1.0"]
    assert main(no_better) == 0
    assert "not all above 1.0" in capsys.readouterr().out
    assert registry.champion() == first
    assert main(no_better) == 0
    assert "was made of these data and refused" in capsys.readouterr().out

    # Killed between publishing and promoting: the next run promotes, and trains nothing.
    anything = [*run, "--set", "gate.min_gain=-1.0", "--set", "gate.max_drop=1.0"]
    with monkeypatch.context() as killed:
        killed.setattr(Registry, "promote", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(anything) == 130
    assert registry.champion() == first
    assert len(registry.models()) == 3
    capsys.readouterr()
    assert main(anything) == 0
    out = capsys.readouterr().out
    assert "promoted after-1-" in out
    assert "steps of" not in out  # no run was looked at
    assert len([path for path in bucket.list("runs") if path.endswith("/done.json")]) == 2  # no other gate trains again
    second = registry.champion()
    assert second is not None
    assert second.generation == 2
    assert read_manifest(read_pair(registry.store)["corpus"])["num_vectors"] == 24
    lineage = registry.lineage(second.model)
    assert lineage["parent"] == first.model
    assert {parent["name"]: parent["weight"] for parent in lineage["soup"]["parents"]} == {
        "candidate": 1,
        "champion": 1,
    }
    assert lineage["spec"]["init_adapter"] == registry.url(first.model)

    with registry.lease(60):
        assert main(run) == 1
    assert "retrains" in capsys.readouterr().err

    assert main(["registry", "--registry", "s3://retrain/registry", "rollback", "--reason", "complaints"]) == 0
    rolled_back = registry.champion()
    assert rolled_back is not None
    assert (rolled_back.generation, rolled_back.model) == (3, first.model)
    assert read_pair(registry.store) == served
    history = [(one["model"], one["previous"], one["reason"]) for one in registry.promotions()]
    assert [model for model, _, _ in history] == [first.model, second.model, first.model]
    assert history[-1] == (first.model, second.model, "complaints")
    capsys.readouterr()
    assert main(["registry", "--registry", "s3://retrain/registry", "list"]) == 0
    out = capsys.readouterr().out
    assert f"* {first.model}" in out
    assert "complaints" in out
    assert f"servers load {served['model']} with {served['corpus']}, version {served['corpus_version']}" in out
    assert main(["registry", "--registry", "s3://retrain/registry", "show", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["id"] == first.model
    assert main(["registry", "--registry", "s3://retrain/registry", "diff", second.model]) == 0
    assert "data.samples.red 16 -> 24" in capsys.readouterr().out
