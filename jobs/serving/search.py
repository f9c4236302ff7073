"""Job of kind `search`: words in, ranked hits on the terminal and on one HTML page out."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.embedding.embed import MANIFEST, VectorsFile, data_of, read_vectors_file
from jobs.runtime.models import load_embedder
from jobs.runtime.progress import console, say
from jobs.runtime.revision import revision, versions
from jobs.serving.specs import SearchSpec
from jobs.spec.model import ModelRef
from jobs.training.runs import METRICS, read_rows
from pipelines.errors import UserError
from pipelines.feed.reader import Reader
from pipelines.redaction import has_hidden
from pipelines.samples import DecodedInput, Rejected
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from pipelines.stored_json import read_json
from rzen.config import ModelIdentity
from rzen.evaluation.ranking import top_k
from rzen.evaluation.results import ResultsFile, plot_losses, plot_scores
from rzen.evaluation.vectors import as_stored, check_width
from rzen.report.hits import MODALITIES, Hit, Search, terminal_hits
from rzen.report.render import check_replaceable
from rzen.report.write import write_page

_NUM_CAPTIONS = 4


def run(spec: SearchSpec) -> dict[str, Any]:
    """Prints the hits of every query; writes the page where one is asked for."""
    if spec.html is not None:
        check_replaceable(Path(spec.html))
    store = open_store(spec.vectors, spec.endpoint)
    manifest = _read_manifest(store)
    corpus, vectors_ND = _read_vectors(store, manifest, spec)
    embedder = load_embedder(ModelRef(base=manifest["model"]), spec.endpoint, ModelIdentity(), manifest["dtype"])
    queries = spec.queries or _captions(corpus)
    queries_QD = embedder.embed([DecodedInput(text=query, instruction=spec.instruction) for query in queries])
    check_width(vectors_ND, queries_QD.shape[1], store.url)
    rows_QK, scores_QK = top_k(queries_QD, vectors_ND, spec.top_k)
    # Vectors may come from others, and trust is the user's to give: `embed` does not record it.
    data = manifest["data"].model_copy(update={"trusted": False})
    if has_hidden(data.endpoint):  # the environment knows the one with the password
        data = data.model_copy(update={"endpoint": None})

    @cache  # of many searches, because each reader starts a process for untrusted media
    def reader_of(split: str) -> Reader:
        return Reader(data_of(data, split))

    searches = [
        Search(query, _hits(reader_of, corpus.take(rows_K).to_pylist(), scores_K))
        for query, rows_K, scores_K in zip(queries, rows_QK, scores_QK, strict=True)
    ]
    for search in searches:
        console.print(terminal_hits(search))
    if spec.html is None:
        return {"outputs": []}
    _write_page(spec, manifest, searches)
    say(f"  {spec.html}")
    return {"outputs": [spec.html]}


def _read_manifest(store: Store) -> VectorsFile:
    try:
        return read_vectors_file(store)
    except FileNotFoundError as error:
        raise UserError(
            f"{store.url}/{MANIFEST}", "does not exist", "run a job of kind embed that writes here"
        ) from error


def _read_vectors(store: Store, manifest: VectorsFile, spec: SearchSpec) -> tuple[pa.Table, Any]:
    """Rows that may be found and their vectors `[N, D]`; of equal targets the first one."""
    tables = [_read_part(store, part) for part in manifest["parts"]]
    if not tables:
        raise UserError(store.url, "holds no vectors", "embed a dataset with targets that can be decoded")
    table = pa.concat_tables(tables)
    _, first = np.unique(table["target_sha256"].to_numpy(zero_copy_only=False), return_index=True)
    wanted = np.isin(table["modality"].to_numpy(zero_copy_only=False), spec.modalities or MODALITIES)
    kept = np.intersect1d(first, np.flatnonzero(wanted))
    if not len(kept):
        raise UserError("modalities", f"{store.url} holds none of {', '.join(spec.modalities or [])}", "ask for others")
    table = table.take(kept)
    return table.drop_columns(["vector"]), as_stored(np.stack(table["vector"].to_numpy(zero_copy_only=False)))


def _read_part(store: Store, path: str) -> pa.Table:
    try:
        return pq.read_table(io.BytesIO(store.read(path)))
    except (FileNotFoundError, pa.ArrowException, OSError) as error:
        raise UserError(f"{store.url}/{path}", f"cannot be read: {error}", "run the job embed again") from error


def _captions(corpus: pa.Table) -> list[str]:
    """Titles of a few targets, spread over the corpus."""
    spread = np.linspace(0, len(corpus) - 1, min(_NUM_CAPTIONS, len(corpus)), dtype=int)
    return list(dict.fromkeys(corpus["title"].take(spread).to_pylist()))


def _hits(reader_of: Callable[[str], Reader], rows: list[dict[str, Any]], scores_K: Any) -> list[Hit]:
    return [
        Hit(
            rank=rank,
            score=float(score),
            modality=row["modality"],
            title=row["title"],
            origin=row["origin"],
            thumbnails=_thumbnails(reader_of, row),
        )
        for rank, (row, score) in enumerate(zip(rows, scores_K, strict=True), start=1)
    ]


def _thumbnails(reader_of: Callable[[str], Reader], row: dict[str, Any]) -> list[Any]:
    """The target's frames; none for a text, or where the file has become unreadable."""
    if row["modality"] == "text":
        return []
    (target,) = reader_of(row["split"]).inputs(row["source"], [(row["index"], "positive")])
    if isinstance(target, Rejected):
        return []
    return [frame for visual in target.visuals for frame in visual.frames]


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
