"""Job of kind `search`: words, pictures, pages and clips in, ranked hits on the terminal and on one HTML page out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jobs.runtime.progress import console, say
from jobs.runtime.revision import revision, versions
from jobs.serving.specs import SearchSpec
from jobs.training.runs import METRICS, read_rows
from pipelines.config import DataConfig
from pipelines.errors import BadMedia, UserError
from pipelines.feed.reader import Reader
from pipelines.redaction import has_hidden
from pipelines.samples import DecodedInput, Rejected, UInt8Array
from pipelines.storage.location import open_store
from pipelines.stored_json import read_json
from rzen.embedding.corpus import Corpus, CorpusHit, VectorsFile, read_corpus
from rzen.embedding.embedder import Embedder, load
from rzen.embedding.inputs import Embeddable, is_file, shown_as
from rzen.evaluation.results import ResultsFile, plot_losses, plot_scores
from rzen.report.hits import Hit, Search, terminal_hits
from rzen.report.render import check_replaceable
from rzen.report.write import write_page

_NUM_CAPTIONS = 4


def run(spec: SearchSpec) -> dict[str, Any]:
    """Prints the hits of every query; writes the page where one is asked for."""
    if spec.html is not None:
        check_replaceable(Path(spec.html))
    corpus = read_corpus(spec.vectors, spec.modalities, spec.endpoint)
    # Before the model is loaded, because that takes long.
    queries = _captions(corpus) if spec.queries is None else _checked(spec.queries)
    embedder = load(corpus.manifest["model"], dtype=corpus.manifest["dtype"], endpoint=spec.endpoint)
    corpus.check_made_by(embedder.made_by, f"what is there now ({embedder.base})")
    asked = _decoded(corpus, queries, spec, embedder)
    found = corpus.nearest(embedder.encode(asked), spec.top_k)
    pictures = _Pictures(corpus.manifest) if spec.html is not None else None
    searches = [
        Search(shown_as(query), _hits(hits, pictures), _frames(shown))
        for query, hits, shown in zip(queries, found, asked, strict=True)
    ]
    for search in searches:
        console.print(terminal_hits(search))
    if spec.html is None:
        return {"outputs": []}
    _write_page(spec, corpus.manifest, searches)
    say(f"  {spec.html}")
    return {"outputs": [spec.html]}


def _captions(corpus: Corpus) -> list[Embeddable]:
    """Titles of a few targets, spread over the corpus. None is taken for a path."""
    spread = np.linspace(0, len(corpus.rows) - 1, min(_NUM_CAPTIONS, len(corpus.rows)), dtype=int)
    titles = list(dict.fromkeys(corpus.rows["title"].take(spread).to_pylist()))
    return [{"text": title} for title in titles]


def _checked(queries: Sequence[str]) -> list[Embeddable]:
    """Return the queries. Raises `UserError` for one that looks like a file and does not exist."""
    for query in queries:
        is_file(query)
    return [*queries]


def _decoded(corpus: Corpus, queries: Sequence[Embeddable], spec: SearchSpec, embedder: Embedder) -> list[DecodedInput]:
    pixels = embedder.processor.visual_pixels
    try:
        return corpus.read_queries(queries, spec.instruction, pixels, spec.endpoint)
    except BadMedia as error:
        raise UserError("search", str(error), "name a file that can be decoded") from error


class _Pictures:
    """Pictures of targets. There are none of a split whose data changed after they were embedded, or cannot be read.

    The hits still hold then: vector, title and origin were stored together.
    """

    def __init__(self, manifest: VectorsFile) -> None:
        # Vectors may come from others, and trust is the user's to give: `embed` does not record it.
        self._data = manifest["data"].model_copy(update={"trusted": False})
        if has_hidden(self._data.endpoint):  # the environment knows the one with the password
            self._data = self._data.model_copy(update={"endpoint": None})
        self._fingerprints = manifest.get("fingerprints", {})
        # One reader for each split, because each reader starts a process for untrusted media.
        self._readers: dict[str, Reader | None] = {}

    def of(self, hit: CorpusHit) -> list[UInt8Array]:
        """Return the target's frames; none for a text, or where the file has become unreadable."""
        if hit.modality == "text":
            return []
        try:
            if hit.split not in self._readers:
                self._readers[hit.split] = self._checked(self._data.model_copy(update={"split": hit.split}))
            reader = self._readers[hit.split]
            if reader is None:
                return []
            (target,) = reader.inputs(hit.source, [(hit.index, "positive")])
        except UserError as error:
            say(f"  hits of {hit.split} have no pictures: {error}", "yellow")
            self._readers[hit.split] = None
            return []
        return [] if isinstance(target, Rejected) else _frames(target)

    def _checked(self, data: DataConfig) -> Reader:
        """Return a reader of the data that was embedded. Raises `UserError` for other data."""
        reader = Reader(data)
        if reader.fingerprint != self._fingerprints.get(data.split):
            fix = "run `rzen embed` again"
            raise UserError(f"{data.root} {data.split}", "changed after it was embedded", fix)
        return reader


def _hits(found: Iterable[CorpusHit], pictures: _Pictures | None) -> list[Hit]:
    return [
        Hit(hit.rank, hit.score, hit.modality, hit.title, hit.origin, pictures.of(hit) if pictures else [])
        for hit in found
    ]


def _frames(shown: DecodedInput) -> list[UInt8Array]:
    return [frame for visual in shown.visuals for frame in visual.frames]


def _write_page(spec: SearchSpec, manifest: VectorsFile, searches: list[Search]) -> None:
    empty: ResultsFile = {"settings": {}, "rows": []}
    results = read_json(Path(spec.results), ResultsFile, "evaluate again") if spec.results else empty
    plots = {}
    if spec.curves:
        plots["Training loss"] = plot_losses({name: _curve(spec, url) for name, url in spec.curves.items()})
    if results["rows"]:
        plots["Retrieval scores"] = plot_scores(results["rows"])
    facts = {
        "model": manifest["model"],
        "corpus": f"{manifest['num_vectors']:,} targets of {manifest['data'].root}",
        "code": revision(),
        **versions(),
    }
    assert spec.html is not None
    content = {"settings": results["settings"], "rows": [asdict(row) for row in results["rows"]]}
    write_page(Path(spec.html), title="rzen", searches=searches, results=content, plots=plots, facts=facts)


def _curve(spec: SearchSpec, url: str) -> list[tuple[int, float]]:
    rows = read_rows(open_store(url, spec.endpoint), METRICS)
    return [(row["step"], row["loss"]) for row in rows if not row["skipped"]]
