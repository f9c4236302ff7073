"""Search by words, pictures, pages and clips: `rzen search` and `Embedder.search` find and refuse the same."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import rzen
from jobs.cli import main
from jobs.serving import search
from jobs.serving.specs import SearchSpec
from pipelines.config import DataConfig
from pipelines.errors import UserError
from pipelines.instructions import INSTRUCTIONS
from pipelines.samples import DecodedInput
from rzen.config import ModelIdentity, PromptConfig, TinyBackbone
from rzen.embedding.corpus import CorpusHit, read_corpus
from rzen.export.export import ExportOptions, export_model
from tests.tiny import TINY, tiny_checkpoint
from tests.vectors import MEDIA, clip, document, embed_corpus, manifest_of, picture, publish_mixed

COUNT = 5
WORDS = "a red circle above a blue bar chart"
PROMPT = PromptConfig(max_visual_tokens=16)


def exported(folder: Path, tiny: TinyBackbone = TINY, prompt: PromptConfig = PROMPT) -> rzen.Embedder:
    """An export in `folder`, loaded."""
    base = tiny_checkpoint(folder.with_name(f"{folder.name}-base"), tiny)
    export_model(
        base,
        None,
        folder,
        ModelIdentity(prompt=prompt),
        ExportOptions(dtype="float32", instructions={"bare": "Find it."}),
    )
    return rzen.load(folder, media=MEDIA)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, rzen.Embedder, dict[str, bytes]]:
    """Folder with `data`, `vectors`, `model` and the files of the corpus; the model; the files."""
    folder = tmp_path_factory.mktemp("search")
    files = publish_mixed(folder / "data", COUNT)
    model = exported(folder / "model")
    embed_corpus(model, DataConfig(root=str(folder / "data"), media=MEDIA), folder / "vectors")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder, model, files


@pytest.fixture
def folder(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the dataset and its vectors, in the working directory."""
    for name in ("data", "vectors"):
        shutil.copytree(made[0] / name, tmp_path / name)
    text = (tmp_path / "vectors/vectors.json").read_text()
    (tmp_path / "vectors/vectors.json").write_text(text.replace(f"{made[0]}/data", f"{tmp_path}/data"))
    for name in made[2]:
        shutil.copy(made[0] / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(made: Any) -> rzen.Embedder:
    found: rzen.Embedder = made[1]
    return found


def spec(queries: list[str] | None, **changes: Any) -> SearchSpec:
    fields: dict[str, Any] = {"kind": "search", "queries": queries, "vectors": "vectors", "top_k": 4}
    return SearchSpec.model_validate(fields | changes)


def shown_hits(text: str) -> list[tuple[int, float, str]]:
    """Rank, score and origin of each hit on the terminal."""
    found = re.findall(r"^ *(\d+) +(-?[\d.]+) +(?:image|page|video|text) .* (\S+) *$", text, re.MULTILINE)
    return [(int(rank), float(score), origin) for rank, score, origin in found]


@pytest.mark.parametrize("modalities", [None, ["page", "video"]])
def test_the_job_and_the_model_find_the_same(
    folder: Path, model: rzen.Embedder, modalities: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    queries = [WORDS, "3.png", "0.pdf#page=0", "some text, number 2"]
    result = search.run(spec(queries, modalities=modalities))
    found = model.search("vectors", queries, top_k=4, modalities=modalities)
    hits_of = [[asdict(hit) for hit in hits] for hits in found]
    listed = [{"query": query, "hits": hits} for query, hits in zip(queries, hits_of, strict=True)]
    assert json.loads(json.dumps(result)) == {"outputs": [], "searches": listed}
    expected = [(hit.rank, round(hit.score, 3), hit.origin) for hits in found for hit in hits]
    assert shown_hits(capsys.readouterr().out) == expected
    assert len(expected) == 4 * 4
    assert {hit.modality for hits in found for hit in hits} <= set(modalities or ["image", "page", "video", "text"])


@pytest.mark.parametrize("name", ["3.png", "4.pdf", "2.mp4"])
def test_a_file_of_the_corpus_finds_itself_and_is_shown(
    folder: Path, model: rzen.Embedder, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    query = f"{name}#page=0" if name.endswith("pdf") else name
    instruction = "Understand the content of the provided image."
    for given in (query, folder / query, (folder / name).as_uri()):
        (best, *_) = model.search(folder / "vectors", given, instruction=instruction)
        assert isinstance(best, CorpusHit)
        assert (best.rank, best.origin, best.split, best.source) == (1, name, "train", "mixed")
        assert best.score == pytest.approx(1, abs=1e-5)
    search.run(spec([query], html="hits.html", instruction=instruction))
    assert shown_hits(capsys.readouterr().out)[0] == (1, 1.0, name)
    html = (folder / "hits.html").read_text()
    assert f"<h3><bdi>{query}</bdi></h3>" in html
    asked = html[html.index('class="asked"') : html.index('<ol class="hits"')]
    assert asked.count("<use") == (4 if name.endswith("mp4") else 1)
    search.run(spec([WORDS], html="hits.html"))
    assert 'class="asked"' not in (folder / "hits.html").read_text()


def test_pictures_arrays_and_mixes_are_queries_in_python(folder: Path, model: rzen.Embedder) -> None:
    with Image.open("1.png") as image:
        queries = [image, np.asarray(image), {"image": "1.png"}]
        for hits in model.search("vectors", queries, top_k=1):
            assert [hit.origin for hit in hits] == ["1.png"]
        mixed = {"image": image, "text": "the same in blue"}
        found = model.search("vectors", mixed, top_k=3)
    instruction = "Given an image, find a similar image with the described changes:"
    assert found == model.search(
        "vectors", {"image": "1.png", "text": "the same in blue"}, top_k=3, instruction=instruction
    )
    assert model.search("vectors", []) == []
    assert len(model.search("vectors", "x", top_k=99)) == 4 * COUNT
    for wrong in (0, -1):
        with pytest.raises(UserError, match=f"top_k: is {wrong}"):
            model.search("vectors", "x", top_k=wrong)
    with pytest.raises(UserError, match=r"modalities: has 'document'; use image, page, video, text"):
        model.search("vectors", "x", modalities=["document"])  # type: ignore[list-item]


@pytest.mark.parametrize("task", ["text_page", "text_video", "bare"])
def test_a_task_sets_instruction_and_modality_by_the_table_of_the_model(
    folder: Path, model: rzen.Embedder, task: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = model.tasks[task]
    modalities = [known["modality"]] if "modality" in known else None
    assert known["instruction"] == ("Find it." if task == "bare" else INSTRUCTIONS[task][0])
    expected = model.search("vectors", WORDS, top_k=4, instruction=known["instruction"], modalities=modalities)
    assert model.search("vectors", WORDS, top_k=4, task=task) == expected
    assert {hit.modality for hit in expected} == set(modalities) if modalities else len(expected) == 4
    result = search.run(spec([WORDS], task=task))
    assert result["searches"][0]["hits"] == [asdict(hit) for hit in expected]
    assert main(["search", WORDS, "--vectors", "vectors", "--task", task, "--top-k", "4", "--set", "html=null"]) == 0
    shown = shown_hits(capsys.readouterr().out)
    assert shown[:4] == shown[4:] == [(hit.rank, round(hit.score, 3), hit.origin) for hit in expected]
    (first, *_) = model.search("vectors", WORDS, task=task, modalities=["text"])
    assert first.modality == "text", "what the caller names wins"


def test_an_unknown_task_is_refused_with_the_known_ones(folder: Path, model: rzen.Embedder) -> None:
    tasks = ", ".join(sorted([*INSTRUCTIONS, "bare"]))
    problem = f"task='pages': is not known; use {tasks}, or give an instruction"
    with pytest.raises(UserError, match=problem):
        model.search("vectors", WORDS, task="pages")
    with pytest.raises(UserError, match=problem):
        search.run(spec([WORDS], task="pages"))
    for find in (
        lambda: model.search("vectors", WORDS, task="text_page", instruction="Find it."),
        lambda: search.run(spec([WORDS], task="text_page", instruction="Find it.")),
    ):
        with pytest.raises(UserError, match=r"task='text_page': and instruction='Find it.' are both given; give one"):
            find()
    with pytest.raises(UserError, match=r"gone/vectors.json: does not exist; run a job of kind embed"):
        search.run(spec([WORDS], task="text_page", vectors="gone"))


def test_a_task_adds_no_instruction_where_the_targets_have_none(folder: Path, model: rzen.Embedder) -> None:
    data = manifest_of(folder / "vectors")["data"] | {"instructions": False}
    embed_corpus(model, DataConfig.model_validate(data), folder / "vectors")
    expected = model.search("vectors", WORDS, instruction="", modalities=["page"])
    assert model.search("vectors", WORDS, task="text_page") == expected


def test_queries_get_the_instruction_that_fits_unless_the_targets_have_none(folder: Path, model: rzen.Embedder) -> None:
    def asked(queries: list[Any], instruction: str | None = None) -> list[str]:
        corpus = read_corpus("vectors")
        return [
            one.instruction for one in corpus.read_queries(queries, instruction, model.processor.visual_pixels, None)
        ]

    kept = DecodedInput("x", instruction="Keep it.")
    queries = ["x", "1.png", "1.pdf", "1.mp4", {"image": "1.png", "text": "x"}, {"text": "x", "instruction": ""}, kept]
    fitting = asked(queries)
    assert fitting[:2] == [
        "Find an image that matches the given caption:",
        "Understand the content of the provided image.",
    ]
    assert "document image" in fitting[2]
    assert "video clip" in fitting[3]
    assert "described changes" in fitting[4]
    assert fitting[5:] == ["", "Keep it."]
    assert asked(queries, "Find it.") == ["Find it."] * 5 + ["", "Keep it."]
    data = manifest_of(folder / "vectors")["data"] | {"instructions": False}
    embed_corpus(model, DataConfig.model_validate(data), folder / "vectors")
    assert asked(queries) == [""] * 6 + ["Keep it."]


@pytest.mark.parametrize("name", ["3.png", "4.pdf#page=0", "2.mp4"])
def test_a_file_and_a_text_are_one_query(folder: Path, model: rzen.Embedder, name: str) -> None:
    kind = {"png": "image", "pdf": "document", "mp4": "video"}[name.split("#")[0].rpartition(".")[2]]
    both: Any = {"text": "in blue", kind: name.split("#")[0]} | ({"page": 0} if kind == "document" else {})
    (found,) = search.run(spec([name], text="in blue"))["searches"]
    assert found["query"] == f"{name} + in blue"
    assert [hit["score"] for hit in found["hits"]] == [
        pytest.approx(hit.score, abs=1e-6) for hit in model.search("vectors", both, top_k=4)
    ]
    with pytest.raises(UserError, match="text: goes with files, and some words is a text"):
        search.run(spec([name, "some words"], text="in blue"))


def test_conditions_limit_what_is_found(folder: Path, model: rzen.Embedder) -> None:
    result = search.run(spec([WORDS], filters=["modality=image,video", "index<11"], top_k=99))
    found = [hit["origin"] for hit in result["searches"][0]["hits"]]
    assert sorted(found) == ["0.mp4", *(f"{number}.png" for number in range(COUNT))]
    everything = model.search("vectors", WORDS, top_k=99)
    assert found == [hit.origin for hit in everything if hit.modality in ("image", "video") and hit.index < 11]
    with pytest.raises(
        UserError, match=r"filter color: is not a column of .*vectors; use split, source, index, modality"
    ):
        model.search("vectors", WORDS, filters={"color": "red"})
    with pytest.raises(UserError, match="holds no target with source = nobody; ask for others"):
        model.search("vectors", WORDS, filters=["source=nobody"])


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("gone.png", "gone.png: does not exist; correct the path"),
        ("my photos/gone.mp4", "my photos/gone.mp4: does not exist"),
        ("4.pdf#page=7", "no_such_page: queries[0]: 4.pdf: page 7 of 1"),
        ("3.png#page=1", "3.png: is a image and has no page 1"),
        ("ftp://a/b.png", "has the scheme 'ftp'"),
        ("vectors/vectors.json", "is a file with the extension '.json'"),
        ("vectors", "vectors: is a folder; name a file of it; for vectors, write --vectors before the folder"),
        ("./vectors", "./vectors: is a folder"),
    ],
)
def test_what_looks_like_a_file_is_not_searched_as_words(
    folder: Path, query: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = Path(search.__file__).parents[1] / "search.yaml"
    assert (
        main(["run", str(jobs), "--set", f"queries=['{query}']", "--set", "vectors=vectors", "--set", "html=null"]) == 1
    )
    told = capsys.readouterr()
    assert problem in told.err
    assert "rank" not in told.out


def test_captions_of_the_corpus_are_words_even_if_they_name_files(
    made: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = folder / "vectors/parts/a.parquet"
    rows = pq.read_table(part)
    pq.write_table(rows.set_column(rows.column_names.index("title"), "title", [["gone.png"] * len(rows)]), part)
    corpus = read_corpus("vectors")
    chosen = search._chosen(corpus, search.Targets(corpus.manifest))
    assert chosen[0] == ("gone.png", {"text": "gone.png"}, "gone.png")
    # The title of a text is the text, and what asks for it is its own query.
    assert [(name, asked.text, title) for name, asked, title in chosen[1:]] == [
        ("caption 19", "caption 19", "gone.png")
    ]
    shutil.copy(made[0] / "vectors/parts/a.parquet", part)
    search.run(spec(None))
    told = capsys.readouterr().out
    assert (told.count("rank  score"), told.count("(the right answer)")) == (4, 4)


def test_the_target_of_a_caption_is_framed_with_its_rank_even_behind_the_hits(
    folder: Path, model: rzen.Embedder, capsys: pytest.CaptureFixture[str]
) -> None:
    titles = pq.read_table("vectors/parts/a.parquet")["title"].to_pylist()
    ranks = {}
    for title in titles:
        everything = model.search("vectors", title, top_k=len(titles))
        (answer,) = (hit for hit in everything if hit.title == title)
        # How many questions are embedded together decides the last bits, and so the rank among nearly equal scores.
        if sum(abs(hit.score - answer.score) < 1e-5 for hit in everything) == 1:
            ranks[title] = answer.rank
    near, far = min(ranks, key=ranks.__getitem__), max(ranks, key=ranks.__getitem__)
    assert ranks[near] <= 4 < ranks[far], "of a model that knows nothing"
    search.run(spec([near, far, WORDS], html="hits.html"))
    shown = capsys.readouterr().out
    assert shown.count("(the right answer)") == 2
    assert [rank for rank, _, _ in shown_hits(shown)] == [1, 2, 3, 4, 1, 2, 3, 4, ranks[far], 1, 2, 3, 4]
    assert (folder / "hits.html").read_text().count('<li class="hit relevant"') == 2


def test_a_corpus_without_captions_is_searched_by_its_own_media(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = folder / "vectors/parts/a.parquet"
    rows = pq.read_table(part)
    pq.write_table(rows.set_column(rows.column_names.index("title"), "title", [[""] * len(rows)]), part)
    search.run(spec(None, modalities=["image", "video"], html="hits.html"))
    first, *_ = hits = shown_hits(capsys.readouterr().out)
    assert first == (1, 1.0, "0.png")
    assert len(hits) == 4 * 4
    html = (folder / "hits.html").read_text()
    assert "<h3><bdi>0.png</bdi></h3>" in html
    assert 'aria-label="image: 0.png"' in html
    assert 'class="title"' not in html


def test_the_vectors_below_runs_that_were_written_last_are_searched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="runs: holds no vectors; run `make demo`, or name"):
        search.run(spec([WORDS], vectors=None))
    for age_s, name in enumerate(["runs/photos/store/vectors", "runs/demo/store/vectors"]):
        shutil.copytree("vectors", name)
        os.utime(Path(name, "vectors.json"), (1e9 - age_s, 1e9 - age_s))
    assert main(["search", WORDS, "--set", "html=null"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "searches runs/photos/store/vectors, which was embedded last; --vectors takes the other 1" in shown
    assert main(["search", WORDS, "--vectors", "vectors", "--set", "html=null"]) == 0
    assert "which was embedded last" not in capsys.readouterr().out


def test_vectors_of_another_model_are_refused_by_name(folder: Path, model: rzen.Embedder, tmp_path: Path) -> None:
    other = exported(tmp_path / "other", TINY.model_copy(update={"seed": 5}))
    with pytest.raises(UserError, match=rf"/vectors: has vectors of {model.base}, and {other.base} has other weights;"):
        other.search("vectors", WORDS)
    prompted = exported(tmp_path / "prompted", prompt=PromptConfig(max_visual_tokens=16, template="plain"))
    with pytest.raises(UserError, match="has another prompt or readout; load the model of the vectors"):
        prompted.search("vectors", WORDS)
    moved = tmp_path / "moved"
    shutil.copytree(model.base, moved)
    assert rzen.load(moved, media=MEDIA).search("vectors", WORDS) == model.search("vectors", WORDS)


def test_a_model_that_was_replaced_under_its_name_is_refused(
    folder: Path, model: rzen.Embedder, tmp_path: Path
) -> None:
    exported(tmp_path / "replaced", TINY.model_copy(update={"seed": 6}))
    path = folder / "vectors/vectors.json"
    path.write_text(path.read_text().replace(str(model.base), str(tmp_path / "replaced")))
    with pytest.raises(UserError, match=r"what is there now .*replaced\) has other weights"):
        search.run(spec([WORDS]))


def test_vectors_of_earlier_versions_are_refused_with_what_to_do(folder: Path, model: rzen.Embedder) -> None:
    content = manifest_of(folder / "vectors")
    embed_corpus(model, DataConfig.model_validate(content["data"]), folder / "vectors", made_by=None, fingerprints=None)
    with pytest.raises(
        UserError, match=r"/vectors: does not say which weights made its vectors; run `rzen embed` again"
    ):
        model.search("vectors", WORDS)
    with pytest.raises(UserError, match="does not say which weights made"):
        search.run(spec([WORDS]))


@pytest.mark.parametrize("change", ["smaller", "other", "gone", "no shards"])
def test_a_dataset_that_changed_costs_the_pictures_and_no_hit(
    folder: Path, change: str, capsys: pytest.CaptureFixture[str]
) -> None:
    search.run(spec([WORDS], top_k=99, html="hits.html"))
    before = capsys.readouterr().out
    assert "no pictures" not in before
    assert (folder / "hits.html").read_text().count("data:image/webp") > COUNT
    if change == "no shards":
        (folder / f"data/train/mixed/{COUNT}.tar").unlink()
    else:
        shutil.rmtree(folder / "data")
    if change in ("smaller", "other"):
        publish_mixed(folder / "data", 1 if change == "smaller" else COUNT + 1)
    search.run(spec([WORDS], top_k=99, html="hits.html"))
    after = capsys.readouterr().out
    assert shown_hits(after) == shown_hits(before)
    assert after.count("hits of train have no pictures") == 1
    problem = {"gone": "there is no such manifest", "no shards": f"{COUNT}.tar"}.get(
        change, "changed after it was embedded"
    )
    assert problem in " ".join(after.split())
    assert "data:image/webp" not in (folder / "hits.html").read_text()
    search.run(spec([WORDS], top_k=99))  # the terminal needs none
    assert "no pictures" not in capsys.readouterr().out


def test_vectors_are_kept_in_memory_until_they_change(folder: Path, model: rzen.Embedder) -> None:
    first = model.search("vectors", WORDS, top_k=2)
    kept = model._corpus
    assert model.search("vectors", WORDS, top_k=2) == first
    assert model._corpus is kept
    model.search("vectors", WORDS, modalities=["text"])
    assert model._corpus is not kept
    shutil.rmtree(folder / "data")
    publish_mixed(folder / "data", 1)
    embed_corpus(model, DataConfig.model_validate(manifest_of(folder / "vectors")["data"]), folder / "vectors")
    assert len(model.search("vectors", WORDS, top_k=99)) == 4


def test_files_of_the_corpus_are_distinct() -> None:
    assert len({make(number) for make in (picture, document, clip) for number in range(COUNT)}) == 3 * COUNT
