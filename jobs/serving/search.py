"""Job of kind `search`: words, pictures, pages and clips in, ranked hits on the terminal and on one HTML page out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from jobs.runtime.progress import console, say
from jobs.runtime.revision import revision, versions
from jobs.serving.specs import SearchSpec
from jobs.serving.targets import Targets
from jobs.training.runs import METRICS, read_rows
from pipelines.errors import BadMedia, UserError
from pipelines.media.files import KINDS, split_page
from pipelines.samples import DecodedInput
from pipelines.storage.location import open_store
from pipelines.stored_json import read_json
from rzen.embedding.corpus import (
    MANIFEST,
    Corpus,
    CorpusHit,
    VectorsFile,
    range_of,
    read_corpus,
    read_manifest,
)
from rzen.embedding.inputs import Embeddable, is_file, shown_as
from rzen.embedding.tasks import NamedTask, modalities_of, read_tasks, task_of
from rzen.evaluation.results import ResultsFile, plot_losses, plot_scores
from rzen.model.locate import checkpoint_folder
from rzen.report.hits import Hit, Search, terminal_hits
from rzen.report.render import check_replaceable
from rzen.report.write import write_page

if TYPE_CHECKING:
    from rzen.embedding.embedder import Embedder

_NUM_QUERIES = 4
_RUNS = Path("runs")
Query = tuple[str, Embeddable, str]
"""A query: its name for people, what is asked, and the title of its right answer, if there is one."""


def run(spec: SearchSpec) -> dict[str, Any]:
    """Print the hits of every query, and write the page where one is asked for. Return the hits as `searches`."""
    if spec.html is not None:
        check_replaceable(Path(spec.html))
    vectors_url = spec.vectors or _last_vectors()
    task = None if spec.task is None else _named_task(spec, vectors_url, spec.task)
    corpus = read_corpus(
        vectors_url,
        spec.modalities or modalities_of(task),
        spec.endpoint,
        filters=spec.filters,
        version=spec.version,
    )
    instruction = corpus.instruction_of(task) if task else spec.instruction
    targets = Targets(corpus.manifest)
    # Before the model is loaded, because that takes long.
    queries = _chosen(corpus, targets) if spec.queries is None else _checked(spec.queries, spec.text)
    from rzen.embedding.embedder import load  # torch is not imported for a mistake in the settings

    embedder = load(corpus.manifest["model"], dtype=corpus.manifest["dtype"], endpoint=spec.endpoint)
    corpus.check_made_by(embedder.made_by, f"what is there now ({embedder.base})")
    asked = _decoded(corpus, [query for _, query, _ in queries], instruction, spec.endpoint, embedder)
    vectors = embedder.encode(asked)
    found = corpus.nearest(vectors, spec.top_k)
    answers = [corpus.titled(title, vector) for (_, _, title), vector in zip(queries, vectors, strict=True)]
    pictures = targets if spec.html is not None else None
    searches = [
        Search(name, _hits(hits, answer, pictures), shown.frames)
        for (name, _, _), hits, answer, shown in zip(queries, found, answers, asked, strict=True)
    ]
    for search in searches:
        console.print(terminal_hits(search))
    listed = [
        {"query": name, "hits": [asdict(hit) for hit in hits]}
        for (name, _, _), hits in zip(queries, found, strict=True)
    ]
    if spec.html is None:
        return {"outputs": [], "searches": listed}
    _write_page(spec, corpus.manifest, searches)
    say(f"  {spec.html}")
    return {"outputs": [spec.html], "searches": listed}


def _last_vectors() -> str:
    """Return the folder of the vectors below `runs` that were written last. Raises `UserError` if there are none."""
    found = sorted(_RUNS.rglob(MANIFEST), key=lambda file: file.stat().st_mtime_ns)
    if not found:
        fix = "run `make demo`, or name the output of `rzen embed` with --vectors"
        raise UserError(str(_RUNS), "holds no vectors", fix)
    others = f"; --vectors takes the other {len(found) - 1}" if len(found) > 1 else ""
    say(f"  searches {found[-1].parent}, which was embedded last{others}")
    return str(found[-1].parent)


def _chosen(corpus: Corpus, targets: Targets) -> list[Query]:
    """Return the queries of a few targets, spread over the corpus, or without queries the targets themselves.

    No caption is taken for a path.
    """
    chosen: dict[str, Query] = {}
    for row in corpus.examples(_NUM_QUERIES):
        place, title = (row["split"], row["source"], row["index"]), row["title"]
        # The title of a medium is its caption, and that of a text is the text itself.
        if row["modality"] == "text" and (query := targets.query(*place)):
            chosen[query.text or row["origin"]] = (query.text or row["origin"], query, title)
        elif title:
            chosen[title] = (title, {"text": title}, title)
        elif target := targets.read(*place, range_of(row)):
            name = " ".join(map(str, filter(None, (row["origin"], range_of(row)))))
            chosen[name] = (name, target, "")
    if not chosen:
        raise UserError(corpus.url, "has no captions, and its media cannot be read", "name queries")
    return list(chosen.values())


def _checked(queries: Sequence[str], text: str | None) -> list[Query]:
    """Return the queries with their names, files together with the text.

    Raises `UserError` for one that looks like a file and does not exist, for a folder, and for a text that no file goes
    with.
    """
    for query in queries:
        if _is_folder(query):
            raise UserError(query, "is a folder", "name a file of it; for vectors, write --vectors before the folder")
    are_files = list(map(is_file, queries))
    if text is None:
        return [(shown_as(query), query, shown_as(query)) for query in queries]
    if not all(are_files):
        query = queries[are_files.index(False)]
        raise UserError("text", f"goes with files, and {shown_as(query)} is a text", "write both as one query")
    return [(f"{shown_as(query)} + {text}", _with_text(query, text), "") for query in queries]


def _is_folder(query: str) -> bool:
    """Whether a query is a path of a folder, or the name of vectors. Another name of a folder may be a text."""
    try:
        return Path(query).is_dir() and ("/" in query or (Path(query) / MANIFEST).is_file())
    except OSError:  # a text that is too long for a name
        return False


def _with_text(query: str, text: str) -> Embeddable:
    name, page = split_page(query)
    kind = KINDS[Path(urlsplit(name).path if "://" in name else name).suffix.lower()]
    return {"text": text, kind: name} | ({} if page is None else {"page": page})


def _named_task(spec: SearchSpec, vectors_url: str, name: str) -> NamedTask:
    """Return the task of this name in the table of the model that made the vectors."""
    model = read_manifest(vectors_url, spec.endpoint)["model"]
    return task_of(read_tasks(Path(checkpoint_folder(model, spec.endpoint))), name, spec.instruction)


def _decoded(
    corpus: Corpus, queries: Iterable[Embeddable], instruction: str | None, endpoint: str | None, embedder: Embedder
) -> list[DecodedInput]:
    pixels = embedder.processor.visual_pixels
    try:
        return corpus.read_queries(queries, instruction, pixels, endpoint)
    except BadMedia as error:
        raise UserError("search", str(error), "name a file that can be decoded") from error


def _hits(found: Sequence[CorpusHit], answer: CorpusHit | None, targets: Targets | None) -> list[Hit]:
    """Return the hits, and last the `answer`, the target of the query's own caption, where it is not among them."""
    places = [hit.target for hit in found]
    right = answer and answer.target
    shown = [*found, answer] if answer and right not in places else found
    return [
        Hit(
            hit.rank,
            hit.score,
            hit.modality,
            hit.title,
            hit.place(),
            targets.pictures(hit) if targets else [],
            relevant=hit.target == right,
        )
        for hit in shown
    ]


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
