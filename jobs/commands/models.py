"""Commands for models and vectors: evaluate, export, embed, mine, judge, index-bench, search, serve."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.data import is_table, name_of
from jobs.commands.options import AsJson, Changes, ResultAsJson, SpecPath, gpus_here, print_json, read_spec, run_file
from jobs.commands.output import print_text
from pipelines.errors import UserError
from rzen.export.formats import FORMATS, ExportFormat
from rzen.index.kinds import INDEX_KINDS, LOCAL_KINDS

BENCHMARK_SPEC, EMBED_SPEC = "jobs/benchmark.yaml", "jobs/embed.yaml"
MINE_SPEC, JUDGE_SPEC = "jobs/mine.yaml", "jobs/judge.yaml"
EXPORT_SPEC, SEARCH_SPEC, SERVE_SPEC = "jobs/export.yaml", "jobs/search.yaml", "jobs/serve.yaml"


if TYPE_CHECKING:
    Index = StrEnum
else:  # Typer takes no list of `IndexKind`
    Index = StrEnum("Index", {name: name for name in ("auto", *INDEX_KINDS)})


class Modality(StrEnum):
    """What a search may find. Typer takes no list of `pipelines.samples.Modality`."""

    image = "image"
    page = "page"
    video = "video"
    text = "text"


def evaluate(
    spec: SpecPath = BENCHMARK_SPEC,
    list_: Annotated[bool, typer.Option("--list", help="list the datasets, and what is missing of each")] = False,
    as_json: ResultAsJson = False,
    changes: Changes = None,
) -> None:
    """Score models. With --list, print which benchmark datasets are there and what to fetch.

    The spec is of kind `evaluate`: a held-out split, MMEB-V2, M-BEIR, and custom retrieval datasets.
    """
    if list_:
        _list_datasets(spec, changes, as_json)
    else:
        run_file(spec, changes, kind="evaluate", as_json=as_json)


def _list_datasets(path: str, changes: list[str] | None, as_json: bool) -> None:
    from jobs.evaluation.specs import EvaluateSpec
    from pipelines.benchmarks.catalog import check_datasets, format_status

    spec, _ = read_spec(path, changes, "evaluate")
    assert isinstance(spec, EvaluateSpec)
    found = check_datasets({suite: Path(root) for suite, root in spec.suites.items()})
    if as_json:
        rows = [{"suite": one.row.suite, "dataset": one.row.name, "missing": one.missing} for one in found]
        custom = [{"dataset": name, "path": path, "exists": Path(path).exists()} for name, path in spec.custom.items()]
        print_json({"suites": rows, "custom": custom})
        return
    print_text(format_status(found), end="")
    for name, folder in spec.custom.items():
        print_text(f"custom: {name}, {folder}{'' if Path(folder).exists() else ', which does not exist'}")


def export(
    base: Annotated[str, typer.Argument(metavar="BASE", help="checkpoint: directory, s3:// URL or hub name")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory or s3:// URL of the export")],
    adapter: Annotated[
        str | None,
        typer.Option(help="adapter merged into the base, or with --format adapter written with its model card"),
    ] = None,
    format: Annotated[
        ExportFormat | None,
        typer.Option(help=f"{'; '.join(f'{name}: {text}' for name, text in FORMATS.items())} (default: model)"),
    ] = None,
    scores: Annotated[str | None, typer.Option(help="results.json of an evaluation, for the model card")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Make a directory that other libraries load, with a model card."""
    given = {"format": format, "scores": scores}
    settings: dict[str, Any] = {"model": {"base": base, "adapter": adapter}, "out": out}
    run_file(EXPORT_SPEC, changes, settings | {key: value for key, value in given.items() if value}, as_json=as_json)


def embed(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="exported model: directory, s3:// URL or hub name")],
    targets: Annotated[
        str,
        typer.Argument(
            metavar="TARGETS",
            help="what is to be found: a folder of images, videos, PDFs and texts, a table, or a dataset",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory or s3:// URL of the vectors and their index")],
    media: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="of a table: column with files, or paths of files")
    ] = None,
    text: Annotated[str | None, typer.Option(metavar="COLUMN", help="of a table: column with texts")] = None,
    title: Annotated[
        str | None, typer.Option(metavar="COLUMN", help="of a table: column with what is shown next to a hit")
    ] = None,
    index: Annotated[
        Index | None,
        typer.Option(help="what searches the vectors (default: auto, which is LanceDB above 200,000 vectors)"),
    ] = None,
    segment_seconds: Annotated[
        float | None,
        typer.Option(help="find moments: divide longer videos into segments, such as 30 (default: one vector a video)"),
    ] = None,
    segment_overlap_seconds: Annotated[
        float | None, typer.Option(help="seconds that two adjacent segments share (default: 0)")
    ] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Embed a folder, a table or a dataset, for `rzen search`. Captions are not needed.

    Files of a folder or table are kept as a dataset in OUT/data. The same command again embeds only what is new. A
    version is visible when it is whole, and the one before stays readable.
    """
    settings: dict[str, Any] = {"model": model, "out": out}
    if _is_dataset(targets):
        if media or text or title:
            raise UserError(targets, "is a dataset", "leave out --media, --text and --title, which are for tables")
        settings["data.root"] = targets
    else:
        settings |= {"data.root": f"{out.rstrip('/')}/data", "splits": ["train", "held_out", "uncaptioned"]}
        settings |= _table_settings(targets, media, text, title) if is_table(targets) else {"input": targets}
    given = {"segment_seconds": segment_seconds, "segment_overlap_seconds": segment_overlap_seconds}
    settings |= {key: value for key, value in given.items() if value is not None}
    if index is not None:
        settings["index"] = index.value
    run_file(EMBED_SPEC, changes, settings | gpus_here(), as_json=as_json)


def _is_dataset(url: str) -> bool:
    from pipelines.shards.manifest import manifest_path
    from pipelines.storage.location import open_store

    store = open_store(url)
    return any(store.exists(manifest_path(split)) for split in ("train", "held_out", "uncaptioned"))


def _table_settings(table: str, media: str | None, text: str | None, title: str | None) -> dict[str, Any]:
    source: dict[str, Any] = {"table": table}
    if media or text:  # without either, the columns say what is what
        source["positive"] = {key: value for key, value in (("media", media), ("text", text)) if value}
        if title:
            source["query"] = {"text": title}
    return {"sources": {name_of(table): source}}


def index_bench(
    vectors: Annotated[str, typer.Argument(metavar="VECTORS", help="output of `rzen embed`")],
    kinds: Annotated[
        list[Index] | None,
        typer.Option(
            "--kind", help="kind of index (may be repeated; default: all, and qdrant only where QDRANT_URL is set)"
        ),
    ] = None,
    num_queries: Annotated[int, typer.Option("--queries", min=1, help="vectors of the corpus that are searched")] = 200,
    k: Annotated[int, typer.Option(min=1, help="neighbors that must be found")] = 10,
    as_json: AsJson = False,
) -> None:
    """Compare kinds of index on the vectors of a corpus: recall, bytes, build time, time of a query.

    Indices are built in a temporary folder, and the corpus stays as it is. Recall is the share of the k nearest targets
    that exact search finds. Queries are vectors of the corpus, one at a time.
    """
    from dataclasses import asdict

    from rich.table import Table

    from jobs.runtime.progress import console, say
    from rzen.embedding.corpus import read_corpus
    from rzen.index.bench import measure
    from rzen.index.qdrant import URL

    if not kinds or "auto" in kinds:
        wanted = INDEX_KINDS if os.environ.get(URL) else LOCAL_KINDS
    else:
        wanted = tuple(kind for kind in INDEX_KINDS if kind in kinds)
    tell = (lambda text: None) if as_json else (lambda text: say(f"  {text}", "dim"))
    scores = measure(read_corpus(vectors).parts, wanted, num_queries=num_queries, k=k, on_progress=tell)
    if as_json:
        print_json([asdict(score) for score in scores])
        return
    table = Table("index", f"recall@{k}", "MB", "build s", "p50 ms", "p95 ms")
    for one in scores:
        row = (one.recall, one.bytes, one.build_s, one.p50_ms, one.p95_ms)
        forms = ((3, 1), (1, 1e6), (1, 1), (2, 1), (2, 1))
        cells = [
            "–" if value is None else f"{value / unit:,.{digits}f}"
            for value, (digits, unit) in zip(row, forms, strict=True)
        ]
        table.add_row(one.kind, *cells)
    console.print(table)


def mine(
    data: Annotated[str, typer.Argument(metavar="DATA", help="dataset: directory or s3:// URL")],
    model: Annotated[str, typer.Argument(metavar="MODEL", help="exported model: directory, s3:// URL or hub name")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory or s3:// URL of the candidate table")],
    negatives: Annotated[int | None, typer.Option(help="negatives of each sample (default: 5)")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Find hard negatives of each sample with a model, and choose among them.

    Training reads them with data.candidates. OUT/report.html shows what each rule left out.
    """
    settings: dict[str, Any] = {"data.root": data, "model": model, "out": out}
    if negatives is not None:
        settings["select.negatives_per_sample"] = negatives
    run_file(MINE_SPEC, changes, settings | gpus_here(), as_json=as_json)


def judge(spec: SpecPath = JUDGE_SPEC, changes: Changes = None, as_json: ResultAsJson = False) -> None:
    """Score the candidates of a table with a re-ranker or a model behind an endpoint."""
    run_file(spec, changes, kind="judge", as_json=as_json)


def search(
    queries: Annotated[
        list[str],
        typer.Argument(
            metavar="QUERY", help="text in quotes, or file or URL of an image, PDF page (a.pdf#page=2) or video"
        ),
    ],
    vectors: Annotated[
        str | None, typer.Option(help="output of `rzen embed` (default: the newest below runs/)")
    ] = None,
    text: Annotated[str | None, typer.Option(help="text that goes with each query that is a file")] = None,
    top_k: Annotated[int | None, typer.Option(help="hits per query")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="task of the queries, such as text_image: sets the instruction and the modality"),
    ] = None,
    modalities: Annotated[
        list[Modality] | None,
        typer.Option("--modality", help="modality that may be found (may be repeated)"),
    ] = None,
    filters: Annotated[
        list[str] | None,
        typer.Option(
            "--filter",
            metavar="CONDITION",
            help="column, operator and values of what may be found: 'source=photos,scans' (may be repeated)",
        ),
    ] = None,
    version: Annotated[str | None, typer.Option(help="earlier version of the vectors (default: the live one)")] = None,
    html: Annotated[str | None, typer.Option(help="HTML file to write")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Search an embedded corpus with texts, pictures, PDF pages or videos."""
    given: dict[str, Any] = {
        "vectors": vectors,
        "top_k": top_k,
        "task": task,
        "modalities": modalities or None,
        "html": html,
    }
    given |= {"filters": filters or None, "version": version}
    settings: dict[str, Any] = {"queries": queries}
    settings |= {key: value for key, value in given.items() if value is not None}
    run_file(SEARCH_SPEC, changes, settings, as_json=as_json)


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="exported model: directory, s3:// URL or hub name")
    ] = None,
    registry: Annotated[
        str | None, typer.Option(help="registry of retraining: serve the model and corpus that are promoted there")
    ] = None,
    corpus: Annotated[str | None, typer.Option(help="output of `rzen embed` with this model, for /v1/search")] = None,
    adapter: Annotated[str | None, typer.Option(help="LoRA adapter on top of the model")] = None,
    reranker: Annotated[str | None, typer.Option(help="re-ranker for /rerank and /score")] = None,
    host: Annotated[str | None, typer.Option(help="address to listen on (default: 127.0.0.1)")] = None,
    port: Annotated[int | None, typer.Option(help="port to listen on (default: 8000)")] = None,
    api_keys: Annotated[str | None, typer.Option(help="file with a key on each line")] = None,
    allow_urls: Annotated[
        str | None,
        typer.Option(metavar="HOST,...", help="hosts that files may be fetched from (default: URLs are refused)"),
    ] = None,
    replicas: Annotated[int | None, typer.Option(help="model replicas (default: 1)")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Answer requests for vectors and searches over HTTP, until Ctrl-C.

    Clients of OpenAI, Cohere, Voyage, Jina, vLLM, infinity and text-embeddings-inference work with it. Name a MODEL,
    or a registry that is followed.
    """
    given: dict[str, Any] = {"corpus": corpus, "adapter": adapter, "host": host, "port": port, "api_keys": api_keys}
    given |= {"reranker": reranker, "replicas": replicas, "allow_urls": allow_urls.split(",") if allow_urls else None}
    settings: dict[str, Any] = {"model": model, "registry": registry}
    settings |= {key: value for key, value in given.items() if value is not None}
    run_file(SERVE_SPEC, changes, settings, as_json=as_json)
