"""Jobs that replace an output and die at any of their calls to the disk: the old or the new result, whole.

A few of the calls are tried. RZEN_TEST_KILLED_CALLS=all tries every one and prints how many there were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import jobs.embedding.embed
import pipelines.ingest.indexing
import pipelines.ingest.job
from jobs.cli import main
from jobs.embedding.vectors import write_part
from jobs.training.runs import Run
from jobs.training.specs import TrainSpec
from pipelines.config import DataConfig, MediaConfig
from pipelines.feed.reader import Reader
from pipelines.ingest.ingest import ingest
from pipelines.shards.mapping import InputMapping, SourceMapping
from pipelines.shards.verify import verify
from pipelines.sources.folder import read_folder
from pipelines.storage.location import localize, open_store
from pipelines.storage.publish import LEASE, MARK, publish_folder
from pipelines.storage.store import LocalStore, is_partial
from tests.adapters import adapter
from tests.data import publish
from tests.inline import run_here
from tests.kills import is_killed
from tests.tiny import tiny_checkpoint

pytestmark = pytest.mark.slow
EVERY = os.environ.get("RZEN_TEST_KILLED_CALLS") == "all"
FEW = 6  # calls that are tried otherwise


@dataclass(frozen=True)
class Output:
    """A job that writes a version into a folder, and a reader that returns which version it finds."""

    folder: Path
    write: Callable[[str], object]
    read: Callable[[], object]


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in (MARK, LEASE))
    paths = (path for path in paths if not is_partial(path.relative_to(folder)))  # of a write that was killed
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def dataset(folder: Path) -> tuple[int, ...]:
    """How many samples both splits have. Every file is compared with the manifest."""
    sizes = []
    for split in ("train", "held_out"):
        assert [text for text in verify(open_store(str(folder)), split) if "not in the manifest" not in text] == []
        sizes.append(sum(Reader(DataConfig(root=str(folder), split=split)).sizes().values()))
    return tuple(sizes)


@pytest.fixture
def ingested(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    monkeypatch.setattr(pipelines.ingest.job, "run", run_here)
    for version, count in (("old", 8), ("new", 14)):
        (tmp_path / version).mkdir()
        lines = [json.dumps({"query": f"question {n}", "positive": f"answer {n}"}) for n in range(count)]
        (tmp_path / version / "captions.jsonl").write_text("\n".join(lines))

    def write(version: str) -> object:
        raw = read_folder(str(tmp_path / version), MediaConfig())
        out = open_store(str(tmp_path / "out"))
        return ingest(raw, out, media=MediaConfig(), held_out_fraction=0.25, seed=0, samples_per_shard=4)

    return Output(tmp_path / "out", write, lambda: dataset(tmp_path / "out"))


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    def run(task: Any, jobs: Any, cpus_per_task: float) -> Iterator[Any]:
        yield from ((number, task(job)) for number, job in enumerate(jobs))

    monkeypatch.setattr(pipelines.ingest.indexing, "run_tasks", run)
    for version, count in (("old", 8), ("new", 16)):
        publish(open_store(str(tmp_path / version)), {"red": ("text_image", count)})

    def write(version: str) -> object:
        mapping = SourceMapping(query=InputMapping(text="json:query.text"), positive=InputMapping(media="p0.png"))
        sources = {"red": (mapping, [str(tmp_path / version / "train/red")])}
        return pipelines.ingest.indexing.index(sources, open_store(str(tmp_path / "out")), "train")

    def read() -> object:
        problems = verify(open_store(str(tmp_path / "out")), "train")
        assert [text for text in problems if "not in the manifest" not in text] == []
        return Reader(DataConfig(root=str(tmp_path / "out"))).sizes()

    return Output(tmp_path / "out", write, read)


@pytest.fixture
def embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Output:
    def embed_items(items: Any, models: Any, spec: Any, on_progress: Any, **more: Any) -> Any:
        ids = [item.id for item in items]
        write_part(models[0][1].store, ids, np.ones((len(ids), 4), dtype=np.float32))
        models[0][1].refresh()
        return [{}]

    monkeypatch.setattr(jobs.embedding.embed, "embed_items", embed_items)
    monkeypatch.setattr(jobs.embedding.embed, "ray_cluster", nullcontext)
    monkeypatch.setattr(jobs.embedding.embed, "check_workers", lambda spec: None)
    tiny_checkpoint(tmp_path / "model")
    for version, count in (("old", 8), ("new", 14)):
        publish(open_store(str(tmp_path / version)), {"red": ("text_image", count)})
        spec = f"kind: embed\nmodel: {tmp_path}/model\ndata: {{root: {tmp_path}/{version}}}\nsplits: [train]\n"
        (tmp_path / f"{version}.yaml").write_text(f"{spec}dtype: float32\nsamples_per_part: 4\nout: {tmp_path}/out\n")

    def read() -> object:
        manifest = json.loads((tmp_path / "out/vectors.json").read_text())
        assert all((tmp_path / "out" / part).is_file() for part in manifest["parts"])
        return manifest["num_vectors"]

    return Output(tmp_path / "out", lambda version: main(["run", str(tmp_path / f"{version}.yaml")]), read)


@pytest.fixture
def exported(tmp_path: Path) -> Output:
    tiny_checkpoint(tmp_path / "base")
    for version, dtype in (("old", "float32"), ("new", "bfloat16")):
        spec = f"kind: export\nmodel: {{base: {tmp_path}/base}}\ndtype: {dtype}\nout: {tmp_path}/out/model\n"
        (tmp_path / f"{version}.yaml").write_text(spec)
    out = tmp_path / "out/model"
    return Output(out, lambda version: main(["run", str(tmp_path / f"{version}.yaml")]), lambda: files_of(out))


@pytest.fixture
def soup(tmp_path: Path) -> Output:
    for seed, name in enumerate("ab"):
        adapter(tmp_path / name, rank=2, alpha=4, seed=seed)
    models = ", ".join(f"{name}: {{base: nowhere, adapter: {tmp_path}/{name}}}" for name in "ab")
    for version, weights in (("old", "{a: 1, b: 1}"), ("new", "{a: 3, b: 1}")):
        soups = f"soups: {{mean: {{method: mean, weights: {weights}}}}}\n"
        (tmp_path / f"{version}.yaml").write_text(f"kind: soup\nmodels: {{{models}}}\n{soups}out: {tmp_path}/out\n")
    made = tmp_path / "out/mean/adapter"
    return Output(
        tmp_path / "out", lambda version: main(["run", str(tmp_path / f"{version}.yaml")]), lambda: files_of(made)
    )


@pytest.fixture
def trained(tmp_path: Path) -> Output:
    """The folder of a run: it begins, publishes its result, and ends."""

    def write(version: str) -> object:
        fields = {"kind": "train", "name": "r", "seed": int(version == "new"), "data": {"root": "data"}}
        fields |= {"run": {"root": f"{tmp_path}/out", "overwrite": True}, "model": {"backbone": "some/model"}}
        run = Run(TrainSpec.model_validate(fields))
        if not run.begin({"data": version}):
            return None
        result = tmp_path / f"result-{version}"
        result.mkdir(exist_ok=True)
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (result / name).write_text(version)
        publish_folder(result, run.store.child(run.result))
        return run.finish({"steps": 1}, [])

    def read() -> object:
        return files_of(localize(f"{tmp_path}/out/r/adapter", tmp_path / "cache"))

    return Output(tmp_path / "out/r", write, read)


KINDS = ("ingested", "indexed", "embedded", "exported", "soup", "trained")


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_call_leaves_the_old_or_the_new_result(kind: str, request: pytest.FixtureRequest) -> None:
    output: Output = request.getfixturevalue(kind)
    store = LocalStore(output.folder)
    output.write("new")
    new = output.read()
    output.write("old")
    old = output.read()
    assert old != new
    num_calls = 0
    while is_killed(lambda: output.write("new"), store, num_calls := num_calls + 50):
        output.write("old")
    output.write("old")
    tried = range(num_calls) if EVERY else sorted({round(n * num_calls / FEW) for n in range(FEW)})
    results = []
    for number in tried:
        killed = is_killed(lambda: output.write("new"), store, number)
        results.append(output.read())
        assert results[-1] in (old, new), (kind, number)
        output.write("new")  # the same command again
        assert output.read() == new, (kind, number)
        output.write("old")
        assert output.read() == old, (kind, number)
        if not killed:
            break
    assert results[0] == old
    print(f"{kind}: {len(results)} calls tried, {results.count(old)} left the old result, the others the new one")
