"""Every JSON file that rzen stores, cut, edited and of wrong types: it is read, or one error names place and fix."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import TypedDict

from jobs.evaluation.scores import ScoresFile
from jobs.runtime.lease import LEASE, hold_lease
from jobs.runtime.records import as_json
from jobs.sweeps.soup import _stored as read_summary
from jobs.training.runs import (
    HELD_OUT,
    LATEST,
    METRICS,
    PHASES,
    SPEC,
    Run,
    read_done,
    read_held_out,
    read_latest,
    read_rows,
    read_spec,
    to_lines,
)
from jobs.workflows.pipeline import RecordFile
from jobs.workflows.registry import Registry
from pipelines.benchmarks.custom import read_custom
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.samples import Input, Rejected, Sample
from pipelines.shards.duplicates import with_duplicates
from pipelines.shards.manifest import Manifest, ShardInfo, SourceInfo, publish_manifest
from pipelines.shards.verify import verify
from pipelines.shards.write import write_shard
from pipelines.storage.location import open_store
from pipelines.stored_json import parse_json, read_json, stored_file
from rzen.config import ModelIdentity
from rzen.embedding.corpus import MANIFEST as VECTORS
from rzen.embedding.corpus import read_vectors_file
from rzen.evaluation.results import ResultsFile
from rzen.families import read_family
from rzen.inputs.processor import VisionLayout
from rzen.model.checkpoints import AdapterFile, read_identity, read_temperatures, stored_dtype
from rzen.soup.make import total_weight
from rzen.training.checkpoint_state import MOMENTS, PARAMETERS, CheckpointState, parse_state

DAMAGES = (
    *(b"", b"{", b"[]", b"null", b"7", b'"text"', b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"{}", b"[{}]"),
    *(b'{"step": ' + b"9" * 5000 + b"}", b'{"a": "\\ud800"}', b"\x00", b"\xef\xbb\xbf{}"),
)
WRONG = (None, True, -1, 1.5, 10**30, "text", "", [], {}, [[]], {"a": {}}, "\x1b[2J", "../../../etc/passwd")


def places(content: object, at: tuple[object, ...] = ()) -> list[tuple[object, ...]]:
    """Return the place of every value inside of JSON."""
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


def damaged(data: bytes, rng: random.Random, count: int) -> list[bytes]:
    """Return fixed damages, cuts and changed bytes, and the JSON with a value replaced, left out or moved."""
    found = [*DAMAGES, data[: len(data) // 2], data[:-2], data + b"}"]
    lines = data.splitlines() if data.count(b"\n}") > 1 or data.count(b"\n{") else [data]
    for _ in range(count):
        content = json.loads(lines[0])
        at = rng.choice(places(content)[1:] or [()])
        if at and rng.random() < 0.8:
            part = content
            for key in at[:-1]:
                part = part[key]
            if rng.random() < 0.3:
                del part[at[-1]]
            else:
                part[at[-1]] = rng.choice(WRONG)
            found.append(b"\n".join([json.dumps(content).encode(), *lines[1:]]))
        else:
            broken = bytearray(data)
            broken[rng.randrange(len(broken))] = rng.randrange(256)
            found.append(bytes(broken))
    return found


def store_of(path: Path) -> object:
    return open_store(str(path.parent))


def run_of(path: Path) -> Run:
    run = object.__new__(Run)
    run.store = open_store(str(path.parent))
    return run


def registry_files(path: Path) -> None:
    registry = Registry(
        open_store(str(path.parents[1] if path.parent.name in ("promotions", "retrainings") else path.parent))
    )
    registry.champion()
    registry.promotions()
    registry.retrainings()
    registry.rollback("a test")


def lineage_file(path: Path) -> None:
    registry = Registry(open_store(str(path.parents[2])))
    registry.models()
    registry.lineage(path.parent.name)


def take_lease(path: Path) -> None:
    with hold_lease(open_store(str(path.parent)), 30, "tests"):
        pass


def read_dataset(path: Path) -> None:
    root = path.parents[1]
    reader = Reader(DataConfig(root=str(root)))
    for name, size in reader.sizes().items():
        for found in reader.samples(name, range(min(size, 2))):
            assert isinstance(found, Rejected) or found.query.text
    reader.tables()
    verify(open_store(str(root)), "train")


def read_state(path: Path) -> None:
    parse_state(path.read_bytes(), str(path))


def in_file(kind: type) -> Callable[[Path], object]:
    return lambda path: read_json(path, kind)


RUN = {
    "id": "a",
    "spec": {"name": "t", "optim": {"lr": 0.1}},
    "data": {"steps": 3, "data": {"a": "b"}},
    "revision": "x",
}
STATE = CheckpointState(3, 3, "p", {PARAMETERS: "0", MOMENTS: "1"})
ROWS = b"".join(json.dumps({"step": k, "loss": 0.5, "skipped": 0}).encode() + b"\n" for k in range(3))
SCORES = {
    "step": 2,
    "hit": 0.5,
    "seconds": 1.0,
    "sources": {"a": {"hit": 0.5, "candidates": 2, "queries": [0, 1], "ranks": [1, 2], "found": [0, 0]}},
}
PROMOTION = {"generation": 1, "model": "m", "previous": None, "reason": "r", "report": None, "at": "2", "by": "b"}
RESULT = {
    "model": "m",
    "task": "t",
    "metric": "hit@1",
    "value": 0.5,
    "num_queries": 1,
    "num_candidates": 2,
    "chance": 0.5,
}
IDENTITY = {**ModelIdentity().model_dump(), "dtype": "float32", "lineage": {"base": "b"}, "temperatures": {"t": 0.02}}
VISION = {"patch_size": 14, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5], "image_std": [0.5]}
VECTORS_FILE = {
    **{"parts": ["a.parquet"], "num_vectors": 1, "model": "m", "config": "c", "dtype": None, "skipped": {}},
    "made_by": {"base": "b", "adapter": None, "identity": ModelIdentity().model_dump(mode="json")},
    "data": DataConfig(root="r").model_dump(mode="json", exclude={"trusted"}),
    "fingerprints": {"train": "f"},
}


def identity_readers(path: Path) -> None:
    for read in (read_temperatures, stored_dtype, lambda folder: read_identity(folder, ModelIdentity())):
        read(path.parent)


# Kind -> path, content, and the readers of the file.
KINDS: dict[str, tuple[str, bytes, Callable[[Path], object]]] = {
    "spec.json": (SPEC, as_json(RUN), lambda path: read_spec(store_of(path))),
    "latest.json": (LATEST, as_json({"path": "checkpoints/000003", "best": {"path": "checkpoints/1", "accuracy": 0.5}}),
                    lambda path: (read_latest(store_of(path)), run_of(path).resume_point())),
    "phases.json": (PHASES, as_json([{"step": 3, "weights": {"a": 1.0}}]), lambda path: run_of(path).phases()),
    "done.json": ("done.json", as_json({"replaced": 0, "sources": {"a": {"samples": 8.0, "epochs": 1, "skipped": 0}}}),
                  lambda path: read_done(store_of(path))),
    "metrics.jsonl": (METRICS, ROWS, lambda path: read_rows(store_of(path), path.name)),
    "held_out.jsonl": (HELD_OUT, to_lines([SCORES] * 3), lambda path: read_held_out(store_of(path))),
    "state.json": ("state.json", STATE.to_json().encode(), read_state),
    "lease.json": (LEASE, as_json({"holder": "h", "until": 1.0, "by": "b", "at": "a", "nonce": "n"}), take_lease),
    "champion.json": ("champion.json", as_json({"generation": 1, "model": "m", "url": "u", "at": "a"}), registry_files),
    "promotion": ("promotions/000001.json", as_json(PROMOTION), registry_files),
    "retraining": ("retrainings/a.json", as_json({"id": "a", "at": "1", "outcome": "o"}), registry_files),
    "lineage.json": ("models/m/lineage.json", as_json({"id": "m", "at": "1", "by": "b", "data": {"samples": {"a": 1}}}),
                     lineage_file),
    "pipeline record": ("job.json", as_json({"key": "k", "result": {"outputs": ["a"]}}), in_file(RecordFile)),
    "vectors.json": (VECTORS, as_json(VECTORS_FILE), lambda path: read_vectors_file(store_of(path))),
    "scores": ("a.json", as_json({"rows": [RESULT], "by_query": {"t": [1.0]}}), in_file(ScoresFile)),
    "summary.json": ("summary.json", as_json({"key": "k", "soups": {"a": {}}, "rows": [RESULT], "runs": {}}),
                     lambda path: read_summary(store_of(path))),
    "results.json": ("results.json", as_json({"settings": {"spec": {}}, "rows": [RESULT]}), in_file(ResultsFile)),
    "soup.json": ("soup.json", as_json({"settings": {"method": "mean"}, "total_weight": 2.0}),
                  lambda path: total_weight(path.parent)),
    "rzen.json": ("rzen.json", as_json(IDENTITY), identity_readers),
    "adapter_config.json": ("adapter_config.json", as_json({"base_model_name_or_path": "b", "r": 8}),
                            in_file(AdapterFile)),
    "config.json": ("config.json", as_json({"model_type": "qwen2_vl"}), lambda path: read_family(path.parent)),
    "preprocessor_config.json": ("preprocessor_config.json", as_json(VISION),
                                 lambda path: VisionLayout.read(str(path.parent))),
    "dataset.json": ("dataset.json", as_json({"metric": "hit@1", "modality": "mixed", "split": "test"}),
                     lambda path: read_custom(path.parent)),
}  # fmt: skip


def told(path: Path, read: Callable[[Path], object]) -> bool:
    """Return whether reading ends with an error. It must be one line with a place in the folder and a fix."""
    try:
        read(path)
    except UserError as error:
        found = error
    else:
        return False
    assert str(path.parents[1]) in found.place
    assert "\n" not in str(found)
    assert found.problem
    assert found.fix
    assert len(str(found)) < 1000
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_read_or_one_error(tmp_path, kind):
    name, content, read = KINDS[kind]
    root = tmp_path / "store"
    path = root / name
    path.parent.mkdir(parents=True)
    others = {"champion.json": ("promotion",), "retraining": ("promotion",), "promotion": ("lineage.json",)}.get(
        kind, ()
    )
    for other in (*others, *(("lineage.json",) if others else ())):
        (root / KINDS[other][0]).parent.mkdir(parents=True, exist_ok=True)
        (root / KINDS[other][0]).write_bytes(KINDS[other][1])
    if kind == "dataset.json":
        write_benchmark(root)
    errors = 0
    variants = damaged(content, random.Random(kind), 80)
    for data in variants:
        path.write_bytes(data)
        errors += told(path, read)
    assert errors >= len(DAMAGES) - 6


def write_benchmark(root: Path) -> None:
    (root / "qrels").mkdir(parents=True)
    (root / "queries.jsonl").write_text('{"_id": "1", "text": "q"}\n')
    (root / "corpus.jsonl").write_text('{"_id": "a", "text": "x"}\n')
    (root / "qrels/test.tsv").write_text("query-id\tcorpus-id\tscore\n1\ta\t1\n")


@pytest.fixture
def dataset(tmp_path):
    """A published dataset of two sources, one of which has duplicates."""
    root = tmp_path / "store"
    store, sources = open_store(str(root)), {}
    for source in ("faq", "wiki"):
        (root / f"train/{source}").mkdir(parents=True)
        samples = [
            (Sample(f"{k:08}", source, "text_text", Input(f"q{k}"), Input("p"), target_sha256="0" * 64), {})
            for k in range(4)
        ]
        shard = write_shard(root / f"train/{source}/{source}-000000.tar", samples)
        sources[source] = SourceInfo("text_text", 4, (replace(shard, path=f"train/{source}/{shard.path}"),))
    publish_manifest(store, with_duplicates(store, Manifest("train", sources, {"media": {}})))
    return root / "train/manifest.json"


def with_right_fingerprint(content: dict) -> bytes:
    """A manifest whose maker has computed the fingerprint of what it says, where that is possible."""
    try:
        sources = {}
        for name, source in content["sources"].items():
            shards = tuple(ShardInfo(**shard) for shard in source["shards"])
            sources[name] = SourceInfo(**{**source, "shards": shards})
        made = Manifest(content["split"], sources, content["settings"], content["format_version"])
        return json.dumps({**content, "fingerprint": made.fingerprint}).encode()
    except (KeyError, TypeError, AttributeError):
        return json.dumps(content).encode()


def test_a_damaged_manifest_is_read_or_one_error(dataset):
    rng = random.Random(0)
    original = dataset.read_bytes()
    read_dataset(dataset)
    variants = damaged(original, rng, 60)
    for _ in range(150):
        content = json.loads(original)
        del content["fingerprint"]
        at = rng.choice(places(content)[1:])
        part = content
        for key in at[:-1]:
            part = part[key]
        part[at[-1]] = rng.choice(WRONG)
        variants.append(with_right_fingerprint(content))
    errors = 0
    for data in variants:
        dataset.write_bytes(data)
        errors += told(dataset, read_dataset)
    assert errors > 150


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("num_samples", "4", "sources.faq.num_samples='4': input should be a valid integer"),
        ("num_samples", -4, "sources.faq.num_samples=-4: input should be greater than or equal to 0"),
        ("task", ["x"], "sources.faq.task=['x']: input should be a valid string"),
        ("mapping", {"query": 3}, "sources.faq.mapping: "),
        ("shards", None, "not a manifest: "),
        ("unknown", 1, "sources.faq.unknown=1: "),
    ],
)
def test_the_error_of_a_manifest_names_the_key(dataset, key, value, expected):
    content = json.loads(dataset.read_bytes())
    content["sources"]["faq"][key] = value
    dataset.write_bytes(with_right_fingerprint(content))
    with pytest.raises(UserError) as caught:
        read_dataset(dataset)
    assert expected in str(caught.value) or expected in f"{caught.value.place}: "
    assert str(dataset) in str(caught.value)


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", ".hidden", "a\nb", "a\x1b[2J", "", "a" * 300])
def test_a_source_of_a_manifest_is_a_name(dataset, name):
    content = json.loads(dataset.read_bytes())
    content["sources"][name] = content["sources"].pop("faq")
    dataset.write_bytes(with_right_fingerprint(content))
    with pytest.raises(UserError, match="is not the name of a source"):
        read_dataset(dataset)


def test_a_shard_outside_of_the_dataset_is_refused(dataset, tmp_path):
    shutil.copy(dataset.parent / "faq/faq-000000.tar", tmp_path / "outside.tar")
    content = json.loads(dataset.read_bytes())
    for path in ("../outside.tar", str(tmp_path / "outside.tar")):
        content["sources"]["faq"]["shards"][0]["path"] = path
        dataset.write_bytes(with_right_fingerprint(content))
        with pytest.raises(UserError):
            read_dataset(dataset)


def test_damaged_samples_are_errors_of_their_shard():
    rng = random.Random(0)
    sample = Sample("0", "a", "t", Input("q"), Input("p"), negatives=(Input("n"),), relevance=1.0)
    wrong = 0
    for data in damaged(sample.to_json(), rng, 300):
        try:
            found = Sample.from_json(data)
        except ValueError as error:
            wrong += "\n" not in str(error)
            continue
        assert Sample.from_json(found.to_json()) == found
    assert wrong > 200


@stored_file
class _File(TypedDict):
    id: str
    data: dict[str, int]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b'{"id": "1", "data": {"x": "b"}}', "a.json: data.x='b': input should be a valid integer; fix it"),
        (b'{"data": {}}', "a.json: has no id; fix it"),
        (b'{"id": ', "a.json: is not JSON: EOF while parsing a value at line 1 column 7; fix it"),
        (b"[1]", "a.json: is [1]: input should be an object; fix it"),
    ],
)
def test_the_error_names_key_value_and_rule(data, expected):
    with pytest.raises(UserError) as caught:
        parse_json(data, "a.json", _File, "fix it")
    assert str(caught.value) == expected


def test_unknown_keys_are_kept():
    assert parse_json(b'{"id": "1", "data": {}, "new": [1]}', "a", _File) == {"id": "1", "data": {}, "new": [1]}
