"""The command line: `rzen validate | run | submit | ingest | search`."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from types import FrameType

from jobs.load import Document, check, override, read_document
from jobs.spec import FinetunesSpec, PipelineSpec, Spec
from pipelines.errors import UserError

DESCRIPTION = """\
Train universal multimodal embeddings: one vector space for text, images, videos and documents.

Everything is a job: a YAML file (jobs/*.yaml, every field documented in jobs/spec.py) that says what is read,
what is trained and where results go. Settings are changed in the file, or for once with --set.
"""
EPILOG = """\
the road, job by job:
  rzen run jobs/demo.yaml                                 all of it, on a corpus made on the spot
  rzen ingest ~/photos s3://bucket/photos                 a folder of files becomes shards
  rzen run jobs/stage1.yaml --set data.root=s3://bucket/photos
  rzen run jobs/stage2.yaml --set data.root=s3://bucket/photos --set optim.lr=1e-4
  rzen submit jobs/finetunes.yaml --address http://head:8265
  rzen search "a red circle above a blue bar chart"

Interrupted jobs go on where they were: give the same command again.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 a mistake that the message explains, 2 a wrong command line, 130 interrupted."""
    options = _parser().parse_args(arguments)
    warnings.simplefilter("ignore", FutureWarning)  # libraries announce theirs between our lines
    signal.signal(signal.SIGTERM, _terminate)
    try:
        status: int = options.command(options)
        return status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last finished station or checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except OSError as error:
        if error.errno is None:
            raise
        print(f"error: {error.filename or 'operating system'}: {error.strerror}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("rzen", description=DESCRIPTION, epilog=EPILOG, formatter_class=raw)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    validate = commands.add_parser("validate", help="check specs without running anything: a second, no torch, no Ray")
    validate.add_argument("spec", nargs="+", help="YAML file")
    validate.add_argument("--show", action="store_true", help="print the resolved spec as JSON")
    validate.set_defaults(command=_validate)

    run = commands.add_parser("run", help="run a job here, or on the Ray cluster that RAY_ADDRESS names")
    run.add_argument("spec", help="YAML file")
    run.set_defaults(command=_run)

    submit = commands.add_parser("submit", help="run a job on a Ray cluster and follow its log")
    submit.add_argument("spec", help="YAML file, inside the working directory")
    submit.add_argument("--address", help="of the cluster's dashboard; RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265")
    submit.add_argument("--working-dir", default=".", help="what is sent along: the repository (default: .)")
    submit.add_argument("--no-wait", action="store_true", help="print the submission id and return")
    submit.set_defaults(command=_submit)

    ingest = commands.add_parser("ingest", help="turn a folder of images, videos and PDFs into shards")
    ingest.add_argument("folder", help="captions beside the files, captions.jsonl, or PDFs with a text layer")
    ingest.add_argument("out", help="directory or s3:// URL of the data set")
    ingest.set_defaults(command=_ingest, spec="jobs/ingest.yaml")

    search = commands.add_parser("search", help="search an embedded corpus in words")
    search.add_argument("query", nargs="+", help="in quotes, one or several")
    search.add_argument("--vectors", help="written by a job of kind embed (default: that of the demo)")
    search.add_argument("--top-k", type=int, help="hits of each query")
    search.add_argument(
        "--modality", action="append", choices=["image", "page", "video", "text"], help="may be repeated"
    )
    search.add_argument("--page", help="HTML file to write")
    search.set_defaults(command=_search, spec="jobs/search.yaml")

    for command in (validate, run, submit, ingest, search):
        text = "change a setting, such as optim.lr=1e-4 (value in YAML; may be repeated)"
        command.add_argument("--set", action="append", default=[], metavar="A.B=C", help=text)
    return parser


def _validate(options: argparse.Namespace) -> int:
    failed = False
    for path in options.spec:
        try:
            spec, document = _load(path, options.set)
            _check_named_files(spec, document)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}: valid {spec.kind} job")
        if options.show:
            print(spec.model_dump_json(indent=1))
    return int(failed)


def _check_named_files(spec: Spec, document: Document) -> None:
    """Specs that name other specs are valid if those are, with what is changed in them."""
    from jobs.finetunes import resolve
    from jobs.pipeline import resolve_stations

    if isinstance(spec, FinetunesSpec):
        resolve(spec, document)
    if isinstance(spec, PipelineSpec):
        resolve_stations(spec, document)


def _load(path: str, overrides: Sequence[str]) -> tuple[Spec, Document]:
    document = override(read_document(path), overrides)
    return check(document), document


def _run(options: argparse.Namespace) -> int:
    from jobs.dispatch import run_spec

    run_spec(*_load(options.spec, options.set))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from jobs.submit import submit

    spec, document = _load(options.spec, options.set)  # a mistake is told here, not in a log
    _check_named_files(spec, document)
    return submit(options.spec, options.set, options.address, options.working_dir, wait=not options.no_wait)


def _ingest(options: argparse.Namespace) -> int:
    changes = [f"input={json.dumps(options.folder)}", f"out={json.dumps(options.out)}"]
    options.set = [*changes, *options.set]
    return _run(options)


def _search(options: argparse.Namespace) -> int:
    given = {"vectors": options.vectors, "top_k": options.top_k, "modalities": options.modality, "page": options.page}
    changes = {"queries": options.query} | {key: value for key, value in given.items() if value is not None}
    options.set = [*(f"{key}={json.dumps(value)}" for key, value in changes.items()), *options.set]
    return _run(options)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
