"""Command `look`: what is in a table or folder, and the spec that reads it."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.options import AsJson, print_json
from jobs.commands.output import print_text
from pipelines.errors import BadMedia

if TYPE_CHECKING:
    from pipelines.sources.table_look import TableLook
    from rzen.report.look import ShownSample

_MAX_NAME = 60


def look(
    place: Annotated[
        str,
        typer.Argument(
            metavar="TABLE_OR_FOLDER",
            help="table, glob, folder, or s3://, gs://, abfs:// or hf:// URL; patterns in quotes",
        ),
    ],
    name: Annotated[str, typer.Option(help="name of the source in the spec that is printed")] = "mine",
    preset: Annotated[str | None, typer.Option(help="layout to read it with (default: the one that fits)")] = None,
    media_root: Annotated[
        str | None, typer.Option(help="folder, zip, tar or URL of the media (default: looked for nearby)")
    ] = None,
    samples: Annotated[int, typer.Option(help="number of samples to show", min=0, max=100)] = 3,
    html: Annotated[Path | None, typer.Option(help="file of a page that shows the samples with their pictures")] = None,
    as_json: AsJson = False,
) -> None:
    """Show what is in a table or folder, what it becomes, and the spec that reads it.

    Prints the format, the columns with an example, and the layout if it is a published one. Up to 1,000 rows are read,
    and up to 1,000 media. Prints a spec to save and run, and samples with the prompt that a model will get. Nothing is
    written but the page. Exits with 1 if nothing could be used.
    """
    from pipelines.sources.table_look import look_at
    from rzen.report.look import write_look

    if _is_plain_folder(place):
        _look_at_folder(place, as_json)
        return
    found = look_at(place, name=name, preset=preset, media_root=media_root, num_samples=samples)
    shown = _shown(found)
    spec = _spec(name, found.settings)
    if html is not None:
        write_look(
            html,
            title=found.table,
            columns=found.columns,
            facts=_facts(found),
            problems=found.problems,
            spec=_yaml(spec) if spec else "",
            samples=shown,
        )
    if as_json:
        print_json(_as_json(found, spec, shown))
    else:
        _print(found, spec, shown)
        if html is not None:
            print_text(f"wrote {html}")
    if not found.num_samples:
        raise typer.Exit(1)


def _is_plain_folder(place: str) -> bool:
    """Return whether a place is a folder of media and captions: tables in it would be read as tables."""
    from pipelines.sources.folder import LIST_NAME
    from pipelines.sources.table_files import is_table

    folder = Path(place).expanduser()
    if "://" in place or not folder.is_dir():
        return False
    if (folder / "dataset_dict.json").is_file():
        return False
    return not any(is_table(path.name) and path.name != LIST_NAME for path in folder.rglob("*"))


def _look_at_folder(place: str, as_json: bool) -> None:
    from collections import Counter

    from pipelines.config import MediaConfig
    from pipelines.samples import Rejected
    from pipelines.sources.folder import read_folder

    counts: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for item in read_folder(place, MediaConfig()):
        if isinstance(item, Rejected):
            rejected[item.reason] += 1
            examples.setdefault(item.reason, item.origin)
        else:
            counts[item.sample.source] += 1
    spec = {"kind": "ingest", "input": place, "out": "runs/data"}
    if as_json:
        print_json({"folder": place, "samples": counts, "rejected": rejected, "examples": examples, "spec": spec})
    else:
        listed = ", ".join(f"{source} {count:,}" for source, count in sorted(counts.items())) or "no samples"
        print_text(f"{place}: a folder of files with captions: {listed}")
        for reason, count in rejected.most_common():
            print_text(f"  {reason} {count:,}, such as {examples[reason]}")
        _print_spec(spec)
    if not counts:
        raise typer.Exit(1)


def _spec(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the spec that reads a table, without settings if there are none."""
    return {"kind": "ingest", "out": "runs/data", "sources": {name: settings}} if settings else {}


def _shown(found: TableLook) -> list[ShownSample]:
    """Return the samples as a model will get them. Those that cannot be decoded become problems."""
    from pipelines.config import MediaConfig
    from pipelines.ingest.members import load_sample
    from pipelines.media.decode import Decoder
    from pipelines.sources.references import ReferenceReader
    from rzen.report.look import show_sample

    config = MediaConfig()
    shown = []
    endpoint = found.reader.endpoint if found.reader else None
    with ReferenceReader(config, endpoint) as reader, Decoder(config) as decoder:
        reader.prepare(found.samples)
        for raw in found.samples:
            try:
                sample, members = load_sample(raw, config, reader=reader)
                shown.append(show_sample(decoder.sample(sample, members, instructions=True), members))
            except BadMedia as bad:
                found.problems.append(f"{raw.sample.origin}: {bad}")
    return shown


def _as_json(found: TableLook, spec: dict[str, Any], shown: list[ShownSample]) -> dict[str, Any]:
    names = [one.name for one in fields(found) if one.name not in ("reader", "settings", "samples")]
    return {name: getattr(found, name) for name in names} | {
        "samples": [sample.as_json() for sample in shown],
        "spec": spec,
    }


def _facts(found: TableLook) -> dict[str, str]:
    rows = "" if found.rows is None else f", {found.rows:,} rows"
    facts = {"table": f"{found.format}, {_count(found.files, 'file')}{rows}, {_count(found.units, 'unit')}"}
    if found.preset:
        facts["layout"] = f"{found.preset}: {found.about}"
    if found.settings:
        read = f"{found.num_samples:,} of the first {found.rows_read:,}, task {found.task or 'unknown'}"
        facts["samples"] = read
    if found.media:
        facts["media"] = ", ".join(f"{kind} {count:,}" for kind, count in found.media.items())
    return facts


def _print(found: TableLook, spec: dict[str, Any], shown: list[ShownSample]) -> None:
    print_text(found.table)
    width = min(_MAX_NAME, max((len(column["name"]) for column in found.columns), default=0))
    for column in found.columns:
        print_text(f"  {column['name']:<{width}}  {column['type']}  {column['example']}")
    for title, text in _facts(found).items():
        print_text(f"{title}: {text}")
    for problem in found.problems:
        print_text(f"problem: {problem}")
    for number, sample in enumerate(shown, start=1):
        print_text()
        print_text(f"sample {number}, {sample.origin}")
        for side in sample.sides:
            print_text(f"  {side.role}: {'; '.join(side.media) or 'text'}")
            prompt = side.prompt if number == 1 else side.content  # the rest of the prompt is always the same
            for line in prompt.splitlines():
                print_text(f"    {line}")
    if spec:
        _print_spec(spec)


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" + ("s" if number != 1 else "")


def _print_spec(spec: dict[str, Any]) -> None:
    print_text("\nA spec that reads it, to save as ingest.yaml and run with `rzen run ingest.yaml`:\n")
    print_text(_yaml(spec), end="")


def _yaml(spec: dict[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(json.loads(json.dumps(spec)), sort_keys=False, allow_unicode=True, width=120)
