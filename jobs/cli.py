"""The command line, `rzen COMMAND`; `rzen --help` tells the commands."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import warnings
from collections.abc import Sequence
from functools import partial
from types import FrameType
from typing import TYPE_CHECKING, Any

from jobs.evaluation.specs import BenchmarkSpec
from jobs.spec.job import JobConfig
from jobs.spec.load import Document, check, override, read_document
from pipelines.errors import UserError

if TYPE_CHECKING:
    from jobs.workflows.registry import Champion, Registry

DESCRIPTION = """\
Train universal multimodal embeddings: one vector space for text, images, videos and documents.

Everything is a job: a YAML file (jobs/*.yaml, `rzen schema KIND` documents every field) that says what is read,
what is trained and where results go. Settings are changed in the file, or for once with --set.
"""
EPILOG = """\
the road, job by job:
  rzen run jobs/demo.yaml                                 all of it, on a corpus made on the spot
  rzen ingest ~/photos s3://bucket/photos                 a folder of files becomes shards
  rzen index 's3://bucket/laion/{00000..00099}.tar' s3://bucket/data    or: shards of your own stay where they are
  rzen verify s3://bucket/photos                          is everything still as it was written?
  rzen run jobs/stage1.yaml --set data.root=s3://bucket/photos
  rzen run jobs/stage2.yaml --set data.root=s3://bucket/photos --set optim.lr=1e-4
  rzen submit jobs/finetunes.yaml --address http://head:8265
  rzen run jobs/retrain.yaml                              on a schedule: train on what is new, promote what is better
  rzen registry list                                      what came of it
  rzen evaluate --list                                    which benchmarks are there, and what to fetch
  rzen evaluate jobs/benchmark.yaml                       models on MMEB-V2 and M-BEIR
  rzen search "a red circle above a blue bar chart"

Interrupted jobs go on where they were: give the same command again.
"""


INDEX_SOURCE = "pairs"
INDEX_DESCRIPTION = """\
Make a data set of shards that others have written, without copying them. Each tar is read once: an index of its
samples goes below OUT, and last a manifest that names the tars where they are. What cannot be used is counted by reason
in OUT/{split}/report.json. Interrupted or repeated, the command reads only what is new or has changed.
"""
INDEX_EPILOG = """\
A SELECTOR names a member by its extension, or a field of a JSON member; with | the first that is there is taken:
  txt        json:caption        txt | json:caption        left.jpg        json:meta.title

  rzen index /data/laion s3://bucket/data                                 img2dataset: caption -> image
  rzen index 's3://bucket/clips/{000..499}.tar' runs/data --positive mp4 --task text_video
  rzen index 'pages-*.tar' runs/data --query json:question --positive pdf --task text_page --source pages
  rzen run jobs/stage1.yaml --set data.root=s3://bucket/data

Several sources, negatives and texts that come with each sample: jobs/index.yaml.
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
        print("\ninterrupted: the same command goes on from the last finished job or checkpoint", file=sys.stderr)
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

    index = commands.add_parser(
        "index",
        help="train from webdataset or img2dataset shards of your own, in place",
        description=INDEX_DESCRIPTION,
        epilog=INDEX_EPILOG,
        formatter_class=raw,
    )
    index.add_argument("url", nargs="+", help="tars: paths or s3:// URLs, folders, globs, {000..099} (in quotes)")
    index.add_argument("out", help="directory or s3:// URL of the data set: indices and manifest, no copies")
    index.add_argument("--source", default=INDEX_SOURCE, help="name of the source (default: %(default)s)")
    index.add_argument("--task", help="of its samples, which owns a temperature (default: text_image)")
    index.add_argument("--query", metavar="SELECTOR", help="text of the query (default: 'txt | json:caption')")
    index.add_argument("--query-media", metavar="SELECTOR", help="file of the query, beside its text or alone")
    index.add_argument("--positive", metavar="SELECTOR", help="file of the target (default: 'jpg | jpeg | png | webp')")
    index.add_argument("--positive-text", metavar="SELECTOR", help="text of the target, beside its file or alone")
    index.add_argument("--instruction", help="put before queries in stages with instructions (default: the task's)")
    index.add_argument("--split", choices=["train", "held_out"], help="what the shards become (default: train)")
    index.set_defaults(command=_index, spec="jobs/index.yaml")

    verify = commands.add_parser(
        "verify",
        help="compare a data set with its manifest: hashes, counts, missing and left-over files",
        description="Reads every byte of shards of ours; of indexed shards of others, their tags and indices."
        " Prints the problems and exits with 1 if there are any.",
    )
    verify.add_argument("root", help="directory or s3:// URL of the data set")
    verify.add_argument("--split", choices=["train", "held_out"], action="append", help="default: those that there are")
    verify.set_defaults(command=_verify)

    search = commands.add_parser("search", help="search an embedded corpus in words")
    search.add_argument("query", nargs="+", help="in quotes, one or several")
    search.add_argument("--vectors", help="written by a job of kind embed (default: that of the demo)")
    search.add_argument("--top-k", type=int, help="hits of each query")
    search.add_argument(
        "--modality", action="append", choices=["image", "page", "video", "text"], help="may be repeated"
    )
    search.add_argument("--html", help="HTML file to write")
    search.set_defaults(command=_search, spec="jobs/search.yaml")

    export = commands.add_parser("export", help="make a directory that other libraries load, with a model card")
    export.add_argument("base", help="checkpoint: directory, s3:// URL or hub name")
    export.add_argument("out", help="directory or s3:// URL")
    export.add_argument("--adapter", help="folded into the base, or with --format adapter written beside its card")
    export.add_argument(
        "--format",
        choices=["model", "adapter", "rzen_release"],
        help="model: for transformers, sentence-transformers, vLLM and mteb; adapter: for PEFT;"
        " rzen_release: for the script released with RzenEmbed (default: model)",
    )
    export.add_argument("--scores", help="results.json of an evaluation, for the card")
    export.set_defaults(command=_export, spec="jobs/export.yaml")

    evaluate = commands.add_parser(
        "evaluate",
        help="score models on benchmarks; with --list, tell which datasets are there and what to fetch",
        description="Runs a spec of kind benchmark: MMEB-V2, M-BEIR, and retrieval data sets of your own.",
    )
    evaluate.add_argument("spec", nargs="?", default="jobs/benchmark.yaml", help="YAML file (default: %(default)s)")
    evaluate.add_argument("--list", action="store_true", help="list the datasets, and what is missing of which")
    evaluate.set_defaults(command=_evaluate)

    registry = commands.add_parser(
        "registry",
        help="the models of scheduled retraining: list, show, diff, promote, rollback",
        description="What `kind: retrain` has made, and which model is the champion. Promotions are never undone: going"
        " back is a promotion of the model before.",
    )
    registry.add_argument("--registry", help="directory or s3:// URL (default: that of jobs/retrain.yaml)")
    verbs = registry.add_subparsers(required=True, metavar="VERB")
    verbs.add_parser("list", help="models, promotions and retraining runs").set_defaults(verb=_registry_list)
    show = verbs.add_parser("show", help="lineage of a model as JSON: data, settings, parents, scores, verdict")
    show.add_argument("model", nargs="?", help="id (default: the champion)")
    show.set_defaults(verb=_registry_show)
    diff = verbs.add_parser("diff", help="in what the lineages of two models differ")
    diff.add_argument("model", help="id")
    diff.add_argument("other", nargs="?", help="id (default: the champion)")
    diff.set_defaults(verb=_registry_diff)
    promote = verbs.add_parser("promote", help="make a model the champion, whatever the gate said")
    promote.add_argument("model", help="id")
    promote.set_defaults(verb=_registry_promote)
    rollback = verbs.add_parser("rollback", help="promote the champion before this one again")
    rollback.set_defaults(verb=_registry_rollback)
    for verb in (promote, rollback):
        verb.add_argument("--reason", required=True, help="for the history")
    registry.set_defaults(command=_registry)

    for command in (validate, run, submit, ingest, index, search, export, evaluate):
        text = "change a setting, such as optim.lr=1e-4 (value in YAML; may be repeated)"
        command.add_argument("--set", action="append", default=[], metavar="A.B=C", help=text)
    return parser


def _validate(options: argparse.Namespace) -> int:
    from jobs.runtime.dispatch import named_specs

    failed = False
    for path in options.spec:
        try:
            spec, document = _load(path, options.set)
            named_specs(spec, document)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = True
            continue
        print(f"{path}: valid {spec.kind} job")
        if options.show:
            print(spec.model_dump_json(indent=1))
    return int(failed)


def _load(path: str, overrides: Sequence[str]) -> tuple[JobConfig, Document]:
    document = override(read_document(path), overrides)
    return check(document), document


def _run(options: argparse.Namespace) -> int:
    from jobs.runtime.dispatch import run_spec

    run_spec(*_load(options.spec, options.set))
    return 0


def _submit(options: argparse.Namespace) -> int:
    from jobs.runtime.dispatch import named_specs
    from jobs.runtime.submit import submit

    spec, document = _load(options.spec, options.set)  # a mistake is told here, not in a log
    named_specs(spec, document)  # and these are valid, with what is changed in them
    wait = not options.no_wait
    return submit(options.spec, options.set, options.address, options.working_dir, spec.submit, wait=wait)


def _ingest(options: argparse.Namespace) -> int:
    changes = [f"input={json.dumps(options.folder)}", f"out={json.dumps(options.out)}"]
    options.set = [*changes, *options.set]
    return _run(options)


def _index(options: argparse.Namespace) -> int:
    from pipelines.sources.folder import INSTRUCTIONS

    mapping: dict[str, Any] = read_document(options.spec).data["sources"][INDEX_SOURCE]
    mapping["urls"] = options.url
    mapping["task"] = options.task or mapping["task"]
    mapping["instruction"], mapping["target_instruction"] = INSTRUCTIONS.get(mapping["task"], ("", ""))
    if options.instruction is not None:
        mapping["instruction"] = options.instruction
    if options.query or options.query_media:
        mapping["query"] = {"text": options.query, "media": options.query_media}
    if options.positive or options.positive_text:
        mapping["positive"] = {"text": options.positive_text, "media": options.positive}
    changes: dict[str, Any] = {"out": options.out}
    if options.split:
        changes["split"] = options.split
    if options.source != INDEX_SOURCE:
        changes[f"sources.{INDEX_SOURCE}"] = None
    for key, value in mapping.items():
        changes[f"sources.{options.source}.{key}"] = value
    options.set = [*(f"{key}={json.dumps(value)}" for key, value in changes.items()), *options.set]
    return _run(options)


def _verify(options: argparse.Namespace) -> int:
    from jobs.runtime.progress import Bars
    from pipelines.shards.manifest import manifest_path, read_manifest
    from pipelines.shards.verify import verify
    from pipelines.storage.location import open_store

    store = open_store(options.root)
    there = [split for split in ("train", "held_out") if store.exists(manifest_path(split))]
    failed = False
    for split in options.split or there or ["train"]:
        with Bars() as bars:
            problems = verify(store, split, on_progress=partial(bars.update, split, unit="shards"))
        for problem in problems:
            print(problem)
        manifest = read_manifest(store, split)
        num_shards = sum(len(source.shards) for source in manifest.sources.values())
        sound = f"{len(problems)} problem(s)" if problems else "sound"
        print(f"{store.url}/{split}: {manifest.num_samples:,} samples in {num_shards:,} shards, {sound}")
        failed |= bool(problems)
    return int(failed)


def _export(options: argparse.Namespace) -> int:
    changes: dict[str, Any] = {"model": {"base": options.base, "adapter": options.adapter}, "out": options.out}
    changes |= {name: value for name in ("format", "scores") if (value := getattr(options, name))}
    options.set = [*(f"{key}={json.dumps(value)}" for key, value in changes.items()), *options.set]
    return _run(options)


def _evaluate(options: argparse.Namespace) -> int:
    if not options.list:
        return _run(options)
    from pathlib import Path

    from pipelines.benchmarks.catalog import check_datasets, format_status

    spec, _ = _load(options.spec, options.set)
    if not isinstance(spec, BenchmarkSpec):
        raise UserError(options.spec, f"kind={spec.kind!r} knows no benchmarks", "name a spec of kind: benchmark")
    print(format_status(check_datasets({suite: Path(root) for suite, root in spec.suites.items()})), end="")
    for name, path in spec.custom.items():
        print(f"custom: {name}, {path}{'' if Path(path).exists() else ', which does not exist'}")
    return 0


def _registry(options: argparse.Namespace) -> int:
    from jobs.workflows.registry import Registry
    from pipelines.storage.location import open_store

    url = options.registry or read_document("jobs/retrain.yaml").data["registry"]
    options.verb(options, Registry(open_store(url)))
    return 0


def _registry_list(options: argparse.Namespace, registry: Registry) -> None:
    champion = registry.champion()
    for model in registry.models():
        lineage = registry.lineage(model)
        samples = sum(lineage.get("data", {}).get("samples", {}).values())
        mark = "*" if champion and champion.model == model else " "
        verdict = lineage.get("verdict", {})
        told = f"{'passed' if verdict['promote'] else 'refused'}: {'; '.join(verdict['reasons'])}" if verdict else ""
        print(f"{mark} {model}  {lineage['at'][:19]}  {samples:,} samples  {told}")
    for promotion in registry.promotions():
        was = f" in place of {promotion['previous']}" if promotion["previous"] else ""
        told = f"{promotion['model']}{was}: {promotion['reason']} ({promotion['by']})"
        print(f"promotion {promotion['generation']}  {promotion['at'][:19]}  {told}")
    for retraining in registry.retrainings():
        print(f"retraining {retraining['id']}  {retraining['at'][:19]}  {retraining['outcome']}")
    if champion is None:
        print(f"{registry.store.url}: no champion yet")


def _registry_show(options: argparse.Namespace, registry: Registry) -> None:
    print(json.dumps(registry.lineage(options.model or _champion(registry).model), indent=1))


def _registry_diff(options: argparse.Namespace, registry: Registry) -> None:
    from jobs.runtime.records import differences

    other = options.other or _champion(registry).model
    for change in differences(registry.lineage(other), registry.lineage(options.model)):
        print(change)


def _registry_promote(options: argparse.Namespace, registry: Registry) -> None:
    promoted = registry.promote(options.model, reason=options.reason, instead_of=registry.champion())
    print(f"promotion {promoted.generation}: {promoted.model}")


def _registry_rollback(options: argparse.Namespace, registry: Registry) -> None:
    promoted = registry.rollback(options.reason)
    print(f"promotion {promoted.generation}: {promoted.model}")


def _champion(registry: Registry) -> Champion:
    champion = registry.champion()
    if champion is None:
        raise UserError(registry.store.url, "has no champion yet", "name a model, or run jobs/retrain.yaml first")
    return champion


def _search(options: argparse.Namespace) -> int:
    given = {"vectors": options.vectors, "top_k": options.top_k, "modalities": options.modality, "html": options.html}
    changes = {"queries": options.query} | {key: value for key, value in given.items() if value is not None}
    options.set = [*(f"{key}={json.dumps(value)}" for key, value in changes.items()), *options.set]
    return _run(options)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
