"""Commands for models and vectors: evaluate, export, embed, mine, judge, search, serve."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from jobs.commands.options import Changes, ResultAsJson, SpecPath, print_json, read_spec, run_file
from jobs.commands.output import print_text

BENCHMARK_SPEC, EMBED_SPEC = "jobs/benchmark.yaml", "jobs/embed.yaml"
MINE_SPEC, JUDGE_SPEC = "jobs/mine.yaml", "jobs/judge.yaml"
EXPORT_SPEC, SEARCH_SPEC, SERVE_SPEC = "jobs/export.yaml", "jobs/search.yaml", "jobs/serve.yaml"


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
        Literal["model", "adapter", "rzen_release"] | None,
        typer.Option(
            help="model: for transformers, sentence-transformers, vLLM and mteb; adapter: for PEFT;"
            " rzen_release: for the script released with RzenEmbed (default: model)"
        ),
    ] = None,
    scores: Annotated[str | None, typer.Option(help="results.json of an evaluation, for the model card")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Make a directory that other libraries load, with a model card."""
    given = {"format": format, "scores": scores}
    settings: dict[str, Any] = {"model": {"base": base, "adapter": adapter}, "out": out}
    run_file(EXPORT_SPEC, changes, settings | {key: value for key, value in given.items() if value}, as_json=as_json)


def embed(spec: SpecPath = EMBED_SPEC, changes: Changes = None, as_json: ResultAsJson = False) -> None:
    """Embed the targets of a dataset, for `rzen search`."""
    run_file(spec, changes, kind="embed", as_json=as_json)


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
    run_file(MINE_SPEC, changes, settings, as_json=as_json)


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
    top_k: Annotated[int | None, typer.Option(help="hits per query")] = None,
    task: Annotated[
        str | None,
        typer.Option(help="task of the queries, such as text_image: sets the instruction and the modality"),
    ] = None,
    modalities: Annotated[
        list[Modality] | None,
        typer.Option("--modality", help="modality that may be found (may be repeated)"),
    ] = None,
    html: Annotated[str | None, typer.Option(help="HTML file to write")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Search an embedded corpus with texts, pictures, PDF pages or videos."""
    given = {"vectors": vectors, "top_k": top_k, "task": task, "modalities": modalities or None, "html": html}
    settings: dict[str, Any] = {"queries": queries}
    settings |= {key: value for key, value in given.items() if value is not None}
    run_file(SEARCH_SPEC, changes, settings, as_json=as_json)


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="exported model: directory, s3:// URL or hub name")],
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

    Clients of OpenAI, Cohere, Voyage, Jina, vLLM, infinity and text-embeddings-inference work with it.
    """
    given: dict[str, Any] = {"corpus": corpus, "adapter": adapter, "host": host, "port": port, "api_keys": api_keys}
    given |= {"reranker": reranker, "replicas": replicas, "allow_urls": allow_urls.split(",") if allow_urls else None}
    settings: dict[str, Any] = {"model": model}
    settings |= {key: value for key, value in given.items() if value is not None}
    run_file(SERVE_SPEC, changes, settings, as_json=as_json)
