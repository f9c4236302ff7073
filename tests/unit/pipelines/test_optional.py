"""Everything works without the extras pymupdf, decord and heif, and each record names the library that was used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.config import MediaConfig
from pipelines.media.documents import page_texts, render_page
from pipelines.synthetic import config as corpus_config
from pipelines.synthetic.config import CorpusConfig
from pipelines.synthetic.documents import all_pages, draw_document

# None in sys.modules makes an import fail as if nothing were installed. Children of the sandbox run this file too.
WITHOUT = "import sys\nsys.modules['pymupdf'] = sys.modules['decord'] = sys.modules['pillow_heif'] = None\n"

CORPUS_TO_PIXELS = """
import json, sys
from pathlib import Path

from pipelines.config import DataConfig, MediaConfig
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.ingest.blocks import plan_blocks
from pipelines.ingest.planning import BlockWork
from pipelines.ingest.settings import IngestSettings
from pipelines.ingest.writing import write_block
from pipelines.media.decode import Decoder
from pipelines.media.libraries import library_versions
from pipelines.samples import DecodedSample
from pipelines.shards.manifest import Manifest, SourceInfo, publish_manifest
from pipelines.sources.folder import read_folder
from pipelines.storage.location import open_store
from pipelines.synthetic.config import CorpusConfig
from pipelines.synthetic.corpus import make_corpus

folder, media = Path(sys.argv[1]), MediaConfig(frames=4, page_pixels=20_000)
corpus = CorpusConfig(num_images=1, num_composed=1, num_documents=1, pages_per_document=3, num_clips=2, num_texts=1)
make_corpus(folder / "raw", corpus)
# The PDF once more without captions: its passages come from the text layer.
(folder / "bare").mkdir()
(folder / "bare/report.pdf").write_bytes((folder / "raw/documents/0000.pdf").read_bytes())
store, decoded, queries = open_store(str(folder / "data")), {}, []
raw = [*read_folder(str(folder / "raw"), media), *read_folder(str(folder / "bare"), media)]
sources = {}
settings = IngestSettings(store, media, 0.0, 0, 100)
for number, block in enumerate(plan_blocks(raw, 0.0, 0, 100)):
    written = write_block(BlockWork("0" * 32, number, block), settings)
    assert not written.tally.rejected, written.tally.rejected
    task = block.samples[0].sample.task
    sources[block.source] = SourceInfo(task, written.shard.num_samples, (written.shard,))
publish_manifest(store, Manifest("train", sources, {"media": media.model_dump()}))
reader = Reader(DataConfig(root=store.url, media=media))
for source, info in sources.items():
    for sample in reader.samples(source, range(info.num_samples)):
        assert isinstance(sample, DecodedSample), sample
        queries.append(sample.query.text)
        for visual in sample.positive.visuals:
            decoded.setdefault(source, []).append(visual.frames.shape)
errors = []
for name, kind, data in (("document_backend", "document", b"%PDF-1.7 %%EOF"), ("video_backend", "video", None)):
    asked = media.model_copy(update={name: {"document_backend": "pymupdf", "video_backend": "decord"}[name]})
    data = data or next((folder / "raw/clips").iterdir()).read_bytes()
    for isolated in (False, True):
        try:
            Decoder(asked, isolated=isolated).member(kind, data)
        except UserError as error:
            errors.append(str(error))
print(json.dumps({
    "decoded": decoded, "queries": queries, "errors": errors, "corpus": corpus.pdf_library,
    "media": reader._manifest.settings["media"], "libraries": library_versions(media),
    "loaded": [name for name in ("pymupdf", "decord") if sys.modules.get(name)],
}))
"""


def test_corpus_ingest_and_decoding_work_without_the_extras(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(WITHOUT)
    path = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, "-c", CORPUS_TO_PIXELS, str(tmp_path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["loaded"] == []
    assert result["corpus"] == "reportlab"
    assert result["media"]["document_backend"] == "pypdfium2"
    assert result["media"]["video_backend"] == "pyav"
    assert {name.split()[0] for name in result["libraries"].values()} == {"pillow", "pyav", "pypdfium2"}
    pages = result["decoded"]["text_page"]
    assert len(pages) == 6
    assert all(shape[0] == 1 and abs(shape[1] * shape[2] / 20_000 - 1) < 0.02 for shape in pages)
    assert result["decoded"]["text_video"] == [[4, 112, 112, 3]] * 2
    assert sum("quarter by quarter" in query or "over the year" in query for query in result["queries"]) == 3
    assert (
        result["errors"]
        == [
            "media.document_backend=pymupdf: pymupdf is not installed; run `pip install 'rzen[pymupdf]'`, or set"
            " media.document_backend: pypdfium2"
        ]
        * 2
        + [
            "media.video_backend=decord: decord is not installed; run `pip install 'rzen[decord]'`, or set"
            " media.video_backend: pyav"
        ]
        * 2
    )


def test_both_libraries_draw_the_same_pages() -> None:
    pages = list(all_pages())
    some = [pages[0], pages[300], pages[800], pages[1300]]
    files = [draw_document(some, "Report 0001", Random(1), library) for library in ("pymupdf", "reportlab")]
    assert files[1] == draw_document(some, "Report 0001", Random(1), "reportlab")
    media = MediaConfig(document_backend="pypdfium2", page_pixels=60_000)
    texts = [[sorted(text.split()) for text in page_texts(data, media)] for data in files]
    assert texts[0] == texts[1]
    for number in range(len(some)):
        first, second = (render_page(data, number, media).astype(int) for data in files)
        assert np.abs(first - second).mean() < 0.5
        assert np.abs(first - 255).mean() > 20  # and it is not an empty page


def test_a_corpus_cannot_be_drawn_with_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert CorpusConfig(pdf_library="pymupdf").pdf_library == "pymupdf"
    monkeypatch.setattr(corpus_config, "has_pymupdf", lambda: False)
    assert CorpusConfig().pdf_library == "reportlab"
    with pytest.raises(ValidationError, match=r"pymupdf is not installed: run `pip install 'rzen\[pymupdf\]'`"):
        CorpusConfig(pdf_library="pymupdf")
