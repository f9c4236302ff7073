"""Commands for datasets: ingest, index, curate, export-data, verify."""

from __future__ import annotations

import re
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from jobs.commands.options import AsJson, Changes, ResultAsJson, gpus_here, print_json, run_file
from jobs.commands.output import print_text
from jobs.spec.load import read_document
from pipelines.errors import UserError


class Split(StrEnum):
    """Splits of a dataset. Typer takes no list of `pipelines.samples.Split`."""

    train = "train"
    held_out = "held_out"


class DataFormat(StrEnum):
    """Formats of `export-data`, as `pipelines.formats.format.FormatName` has them."""

    webdataset = "webdataset"
    mmeb = "mmeb"
    sentence_transformers = "sentence_transformers"


INGEST_SPEC, INDEX_SPEC = "jobs/ingest.yaml", "jobs/index.yaml"
CURATE_SPEC, EXPORT_DATA_SPEC = "jobs/curate.yaml", "jobs/export_data.yaml"
DEFAULT_SOURCE = "pairs"  # the source that jobs/index.yaml has
INDEX_EXAMPLES = """\
\b
A SELECTOR names a member by its extension, or a field of a JSON member. With | the first one that exists is taken:
  txt        json:caption        txt | json:caption        left.jpg        json:meta.title

\b
  rzen index /data/laion s3://bucket/data                                 img2dataset: caption -> image
  rzen index 's3://bucket/clips/{000..499}.tar' runs/data --positive mp4 --task text_video
  rzen index 'pages-*.tar' runs/data --query json:question --positive pdf --task text_page --source pages
  rzen run jobs/stage1.yaml --set data.root=s3://bucket/data

Several sources, negatives and texts that come with each sample: see jobs/index.yaml.
"""


def ingest(
    place: Annotated[
        str,
        typer.Argument(
            metavar="FOLDER_OR_TABLE",
            help="files with captions next to them, captions.jsonl, PDFs with text; or a table: a file, glob or URL",
        ),
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory or s3:// URL of the dataset")],
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Turn a folder of images, videos and PDFs into shards, or a table.

    A table is read with the settings that `rzen look` suggests, which are printed. A folder with media in it is read as
    media. To change settings of a table, save the spec that `rzen look` prints.
    """
    settings: dict[str, Any] = {"input": place, "out": out}
    if is_table(place):
        settings |= {"input": None, "sources": {name_of(place): {"table": place}}}
    run_file(INGEST_SPEC, changes, settings, as_json=as_json)


def is_table(place: str) -> bool:
    """Return whether a place is a table: a file, a pattern, a URL, or a folder of tables without media."""
    from pipelines.media.files import KINDS
    from pipelines.sources import table_files
    from pipelines.sources.folder import LIST_NAME
    from pipelines.storage.urls import is_local, local_path

    if not is_local(place) or not local_path(place).is_dir():
        return not is_local(place) or table_files.is_table(place)
    names = [path.name for path in local_path(place).rglob("*")]
    has_media = any(name == LIST_NAME or Path(name).suffix.lower() in KINDS for name in names)
    return not has_media and any(map(table_files.is_table, names))


def name_of(place: str) -> str:
    """Return a name of a source for a table: that of its file or folder."""
    name = re.sub(r"[^A-Za-z0-9_-]+", "-", place.rstrip("/").rpartition("/")[2].partition(".")[0]).strip("-")
    return name or "table"


def index(
    urls: Annotated[
        list[str],
        typer.Argument(
            metavar="URL", help="tars: paths, s3://, gs:// or abfs:// URLs, folders, globs, {000..099} (in quotes)"
        ),
    ],
    out: Annotated[
        str,
        typer.Argument(metavar="OUT", help="directory or s3:// URL of the dataset: indices and manifest, no copies"),
    ],
    source: Annotated[str, typer.Option(help="name of the source")] = DEFAULT_SOURCE,
    task: Annotated[
        str | None,
        typer.Option(help="task name of the samples; each task learns its own temperature (default: text_image)"),
    ] = None,
    query: Annotated[
        str | None, typer.Option(metavar="SELECTOR", help="text of the query (default: 'txt | json:caption')")
    ] = None,
    query_media: Annotated[
        str | None, typer.Option(metavar="SELECTOR", help="file of the query, with or without a text")
    ] = None,
    positive: Annotated[
        str | None, typer.Option(metavar="SELECTOR", help="file of the target (default: 'jpg | jpeg | png | webp')")
    ] = None,
    positive_text: Annotated[
        str | None, typer.Option(metavar="SELECTOR", help="text of the target, with or without a file")
    ] = None,
    instruction: Annotated[
        str | None,
        typer.Option(help="instruction put before queries in stages with instructions (default: that of the task)"),
    ] = None,
    split: Annotated[Split | None, typer.Option(help="split that the shards become (default: train)")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Make a dataset from external shards, without copying them.

    The shards are tars in the layout of webdataset or img2dataset.

    The command reads each tar once. It writes an index of its samples below OUT, and at the end a manifest that names
    the tars where they are. It skips unusable samples, counts them by reason, and lists them in
    OUT/{split}/report.json. Run again, it reads only tars that are new or have changed.
    """
    from pipelines.instructions import INSTRUCTIONS

    mapping: dict[str, Any] = read_document(INDEX_SPEC).data["sources"][DEFAULT_SOURCE]
    mapping["urls"] = urls
    mapping["task"] = task or mapping["task"]
    mapping["instruction"], mapping["target_instruction"] = INSTRUCTIONS.get(mapping["task"], ("", ""))
    if instruction is not None:
        mapping["instruction"] = instruction
    if query or query_media:
        mapping["query"] = {"text": query, "media": query_media}
    if positive or positive_text:
        mapping["positive"] = {"text": positive_text, "media": positive}
    settings: dict[str, Any] = {"out": out}
    if split:
        settings["split"] = split
    if source != DEFAULT_SOURCE:
        settings[f"sources.{DEFAULT_SOURCE}"] = None
    settings |= {f"sources.{source}.{key}": value for key, value in mapping.items()}
    run_file(INDEX_SPEC, changes, settings, as_json=as_json)


def curate(
    data: Annotated[str, typer.Argument(metavar="DATA", help="directory or s3:// URL of the dataset")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory or s3:// URL of the table of drops")],
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FOLDER",
            help="evaluation set that must not leak: MMEB-V2, M-BEIR, or a name for a custom dataset (may be repeated)",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="exported model: leave out semantic duplicates, and the 2% of pairs that fit least, too"),
    ] = None,
    split: Annotated[Split | None, typer.Option(help="split that is judged (default: train)")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """List the samples that training should leave out: duplicates, leakage, misfits, files that cannot be decoded.

    Nothing is deleted. Training leaves the samples out if `data.curation` names OUT. OUT/report.html shows examples.
    """
    from pipelines.benchmarks.table import SUITES

    settings: dict[str, Any] = {"data.root": data, "out": out}
    if split:
        settings["data.split"] = split.value
    suites: dict[str, str] = {}
    custom: dict[str, str] = {}
    for entry in against or ():
        name, equals, folder = entry.partition("=")
        if not (name and equals and folder):
            raise UserError(f"--against {entry}", "is not NAME=FOLDER", "write --against MMEB-V2=/data/mmeb")
        (suites if name in SUITES else custom)[name] = folder
    if suites:
        settings["rules.leakage.suites"] = suites
    if custom:
        settings["rules.leakage.custom"] = custom
    if model:
        settings |= {"model": model, "rules.alignment": {"quantile": 0.02}, "rules.semantic": {"cosine": 0.98}}
        settings |= gpus_here()
    run_file(CURATE_SPEC, changes, settings, as_json=as_json)


def export_data(
    data: Annotated[str, typer.Argument(metavar="DATA", help="directory or s3:// URL of the dataset")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="directory or s3:// URL of the export")],
    format: Annotated[DataFormat, typer.Option(help="layout of the files")] = DataFormat.webdataset,
    split: Annotated[Split | None, typer.Option(help="split to write (default: train)")] = None,
    changes: Changes = None,
    as_json: ResultAsJson = False,
) -> None:
    """Write a dataset as WebDataset tars, as MMEB's tables, or as tables of sentence-transformers.

    Nothing is decoded or changed. Next to the files is a spec that reads them back. Unreadable samples are counted.
    """
    settings: dict[str, Any] = {"data": data, "out": out, "format": format.value}
    run_file(EXPORT_DATA_SPEC, changes, settings | ({"split": split.value} if split else {}), as_json=as_json)


def verify(
    root: Annotated[str, typer.Argument(metavar="ROOT", help="directory or s3:// URL of the dataset")],
    splits: Annotated[list[Split] | None, typer.Option("--split", help="split to check (default: all)")] = None,
    as_json: AsJson = False,
) -> None:
    """Check that a dataset is as its manifest says.

    Compares hashes and counts, and finds missing and left-over files. Reads every byte of shards that rzen wrote. Of
    external shards, it checks the tags and indices. Prints the problems and exits with 1 if there are any.
    """
    from jobs.runtime.progress import Bars
    from pipelines.shards.manifest import manifest_path, read_manifest
    from pipelines.shards.verify import verify as verify_split
    from pipelines.storage.location import open_store

    store = open_store(root)
    there = [split for split in Split if store.exists(manifest_path(split))]
    found: dict[str, dict[str, Any]] = {}
    for split in splits or there or [Split.train]:
        with Bars() as bars:
            problems = verify_split(store, split, on_progress=None if as_json else partial(bars.update, split))
        manifest = read_manifest(store, split)
        num_shards = sum(len(source.shards) for source in manifest.sources.values())
        found[split] = {"samples": manifest.num_samples, "shards": num_shards, "problems": problems}
        if not as_json:
            for problem in problems:
                print_text(problem)
            state = f"{len(problems)} problem(s)" if problems else "sound"
            print_text(f"{store.url}/{split}: {manifest.num_samples:,} samples in {num_shards:,} shards, {state}")
    if as_json:
        print_json(found)
    if any(split["problems"] for split in found.values()):
        raise typer.Exit(1)
