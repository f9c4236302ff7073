"""A teacher's vectors: `rzen embed` stores them with queries, and a run finds them by content, without Ray."""

from __future__ import annotations

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rzen
from jobs.embedding import embed
from jobs.embedding.specs import EmbedSpec
from jobs.training.encoder import encoder_of
from jobs.training.runs import Run
from jobs.training.specs import TrainSpec
from jobs.training.start import data_of, plan_of
from jobs.training.teacher import Teacher
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.items.types import as_ids, query_id, target_id
from pipelines.samples import DecodedSample
from pipelines.storage.location import open_store
from rzen.embedding.corpus import MANIFEST, read_manifest
from rzen.inputs.pairs import PairEncoder
from rzen.inputs.processor import Processor
from tests.data import publish
from tests.inline import without_ray
from tests.tiny import PROMPT, TINY, tiny_checkpoint, tiny_export

SIZES = {"red": ("text_image", 40), "blue": ("text_image", 20)}
BAD = 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset with a model and its vectors; one picture of it cannot be decoded."""
    folder = tmp_path_factory.mktemp("teacher")
    publish(open_store(str(folder / "data")), SIZES, bad={"red": [BAD]}, duplicates={"blue": [3, 5]})
    tiny_export(folder)
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        embed.run(embed_spec(folder))
    return folder


def embed_spec(folder: Path, **changes: Any) -> EmbedSpec:
    fields: dict[str, Any] = {
        "kind": "embed",
        "model": str(folder / "model"),
        "data": {"root": str(folder / "data")},
        "splits": ["train"],
        "queries": True,
        "samples_per_part": 16,
        "out": str(folder / "vectors"),
    }
    return EmbedSpec.model_validate(fields | changes)


def train_spec(folder: Path, **changes: Any) -> TrainSpec:
    fields: dict[str, Any] = {
        "kind": "train",
        "name": "student",
        "run": {"root": str(folder / "runs")},
        "data": {"root": str(folder / "data"), "teacher_vectors": str(folder / "vectors")},
        "model": {"backbone": str(folder / "base"), "dtype": "float32"},
        "objective": {"embedding_distillation": {}},
        "global_batch": 8,
        "steps": 2,
        "cluster": {"gpus_per_worker": 0},
    }
    return TrainSpec.model_validate(fields | changes)


def teacher_of(folder: Path, **changes: Any) -> Teacher:
    found = Teacher.of(train_spec(folder, **changes))
    assert found is not None
    return found


def test_the_vectors_of_queries_are_those_of_the_model_and_no_search_finds_them(folder: Path) -> None:
    manifest = read_manifest(str(folder / "vectors"))
    assert [len(manifest[name]) for name in ("parts", "query_parts")] == [3 + 2, 3 + 2]  # type: ignore[literal-required]
    assert manifest["num_vectors"] == 59  # targets; one is bad
    model = rzen.load(str(folder / "model"))
    samples = list(Reader(embed_spec(folder).data).samples("red", range(12)))
    usable = [some for some in samples if isinstance(some, DecodedSample)]
    assert len(usable) == 11
    ids = as_ids(id for some in usable for id in (query_id(some.sample), target_id(some.sample))).reshape(-1, 2)
    found = pickle.loads(pickle.dumps(teacher_of(folder))).vectors(ids)
    expected = [model.encode([getattr(some, role) for some in usable]) for role in ("query", "positive")]
    np.testing.assert_allclose(found, np.stack(expected, axis=1), atol=2e-6)
    assert abs(found[:, 0] - found[:, 1]).max() > 0.01
    hits = model.search(folder / "vectors", "Find the colour. red 3", top_k=999)
    assert len(hits) == 40  # each picture once: those of blue are in red, too
    assert {hit.modality for hit in hits} == {"image"}


def test_an_input_without_a_vector_is_nan_and_counted(folder: Path) -> None:
    reader = Reader(train_spec(folder).data)
    ids = as_ids(id for sample, _ in reader.raw("red", [6, BAD]) for id in (query_id(sample), target_id(sample)))
    found = teacher_of(folder).vectors(ids.reshape(2, 2))
    assert np.isnan(found).all(axis=2).tolist() == [[False, False], [False, True]]
    assert np.isnan(found).any(axis=2).tolist() == [[False, False], [False, True]]
    pair = PairEncoder(Processor(tiny_checkpoint(folder / "base"), PROMPT)).sample(
        next(some for some in reader.samples("red", [6]) if isinstance(some, DecodedSample))
    )
    pairs = [replace(pair, teacher_vectors=some[None]) for some in found]
    assert [one.num_without_teacher for one in pairs] == [0, 1]


def test_batches_of_the_data_loader_bring_the_vectors_of_their_pairs(folder: Path) -> None:
    tiny_checkpoint(folder / "base")
    spec = train_spec(folder)
    teacher, run = teacher_of(folder), Run(spec)
    plan = plan_of(spec, Reader(spec.data))
    share = Reader(spec.data, encoder_of(run, teacher)).batch(plan, step=1, rank=1, world_size=2)
    source = share.blocks[0].source
    rows = [index for _, index in plan.batch(1, 1, 2).rows]
    samples = [sample for sample, _ in Reader(spec.data).raw(source, rows)]
    ids = as_ids(id for sample in samples for id in (query_id(sample), target_id(sample))).reshape(-1, 2)
    np.testing.assert_array_equal(share.batch.teacher_vectors, teacher.vectors(ids))
    assert share.batch.teacher_vectors.shape == (4, 2, TINY.hidden)
    assert share.batch.num_without_teacher == 0
    without = Reader(spec.data, encoder_of(run)).batch(plan, step=1, rank=1, world_size=2).batch
    assert (without.teacher_vectors, without.num_without_teacher) == (None, 0)


def test_the_start_says_which_samples_lack_vectors_and_refuses_those_of_other_data(
    folder: Path, tmp_path: Path
) -> None:
    spec, teacher = train_spec(folder), teacher_of(folder)
    reader = Reader(spec.data)
    warning = (
        "data.teacher_vectors: no vectors for 1 of the first 8 samples of red, which then learn from their pairs only"
    )
    assert teacher.check(reader, plan_of(spec, reader)) == [warning]
    publish(open_store(str(tmp_path / "data")), {"green": ("text_image", 16)})
    other = train_spec(folder, data={"root": str(tmp_path / "data"), "teacher_vectors": str(folder / "vectors")})
    reader = Reader(other.data)
    with pytest.raises(UserError, match=r"has no vectors of the first samples of green: other data or other instr"):
        teacher.check(reader, plan_of(other, reader))


def test_vectors_without_queries_or_without_vectors_are_refused(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "vectors" / MANIFEST).read_text())
    for missing, problem in (
        ("query_parts", r"has no vectors of queries; run a job of kind embed with queries: true"),
        ("version", r"was written by an earlier version of rzen; run the job embed again"),
    ):
        (tmp_path / MANIFEST).write_text(json.dumps({name: it for name, it in content.items() if name != missing}))
        with pytest.raises(UserError, match=problem):
            teacher_of(folder, data={"root": "d", "teacher_vectors": str(tmp_path)})
    with pytest.raises(UserError, match=r"vectors\.json: does not exist; run a job of kind embed"):
        teacher_of(folder, data={"root": "d", "teacher_vectors": str(tmp_path / "none")})
    with pytest.raises(ValueError, match=r"embedding_distillation learns from a teacher's vectors; set data\.teacher"):
        train_spec(folder, data={"root": "d"})
    assert Teacher.of(train_spec(folder, objective={})) is None


def test_the_content_of_the_vectors_is_part_of_the_run_and_their_place_is_not(folder: Path, tmp_path: Path) -> None:
    tiny_checkpoint(folder / "base")
    spec = train_spec(folder)
    reader = Reader(spec.data)
    plan = plan_of(spec, reader)
    assert Run(spec).begin(data_of(spec, reader, plan, Teacher.of(spec)))
    moved = train_spec(folder, data={"root": str(folder / "data"), "teacher_vectors": str(tmp_path / "moved")})
    with pytest.MonkeyPatch.context() as monkeypatch:
        without_ray(monkeypatch)
        embed.run(embed_spec(folder, out=str(tmp_path / "moved")))
        assert data_of(moved, reader, plan, Teacher.of(moved)) == data_of(spec, reader, plan, Teacher.of(spec))
        assert Run(moved).begin(data_of(moved, reader, plan, Teacher.of(moved)))
        before = teacher_of(folder, data=moved.data.model_dump())
        embed.run(
            embed_spec(folder, out=str(tmp_path / "moved"), data={"root": str(folder / "data"), "instructions": False})
        )
    with pytest.raises(UserError, match=r"holds a run with other settings: plan\.teacher_vectors"):
        Run(moved).begin(data_of(moved, reader, plan, Teacher.of(moved)))
    assert data_of(moved, reader, plan, before)["teacher_vectors"] == before.version  # not that which is live now
    some = as_ids([query_id(sample) for sample, _ in reader.raw("blue", [0])])[:, None]
    kept = before.vectors(some)  # an earlier version is kept
    assert abs(kept - teacher_of(folder, data=moved.data.model_dump()).vectors(some)).max() > 1e-4
    gone = replace(before, version="0" * 16)
    with pytest.raises(UserError, match=r"does not have version 0{16} any more, which this run learns from; keep more"):
        gone.vectors(some)
