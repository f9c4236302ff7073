"""Commands for specs of any kind: validate, run, submit, attach, kinds, explain, schema."""

from __future__ import annotations

import json
import sys
import textwrap
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jobs.commands.options import (
    Address,
    AsJson,
    Changes,
    ResultAsJson,
    SpecPath,
    print_json,
    print_warnings,
    read_spec,
    run_file,
)
from jobs.commands.output import print_error, print_text
from jobs.spec.kinds import Kind, find_kind, kind_names, local_places
from jobs.spec.load import recorded_files
from jobs.spec.no_effect import warnings
from pipelines.errors import UserError

if TYPE_CHECKING:
    from jobs.spec.explain import Explanation

_WIDTH = 100  # letters of a line


def validate(
    specs: Annotated[list[str], typer.Argument(metavar="SPEC", help="YAML files")],
    show: Annotated[
        bool, typer.Option("--show", help="print each resolved spec as JSON, and messages to the standard error")
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="print a JSON list of the specs, with kind, error and warnings of each")
    ] = False,
    changes: Changes = None,
) -> None:
    """Check specs without running anything, and warn of settings without effect.

    Takes about a second, without torch or Ray.
    """
    from jobs.runtime.dispatch import named_specs
    from jobs.runtime.progress import is_quiet

    found: list[dict[str, Any]] = []
    for path in specs:
        try:
            spec, document = read_spec(path, changes)
            named = named_specs(spec, document)
        except UserError as error:
            found.append({"spec": path, "error": str(error)})
            if not as_json:
                print_error(f"error: {error}")
            continue
        entry = {"spec": path, "kind": spec.kind, "error": None, "warnings": [*warnings(spec, named, document)]}
        settings = spec.model_dump(mode="json")
        found.append(entry | {"settings": settings} if show else entry)
        if as_json:
            continue
        print_warnings(spec, named, document)
        if not is_quiet():
            (print_error if show else print_text)(f"{path}: valid {spec.kind} job")
        if show:
            print_json(settings)
    if as_json:
        print_json(found)
    if any(entry["error"] for entry in found):
        raise typer.Exit(1)


def run(spec: SpecPath, changes: Changes = None, as_json: ResultAsJson = False) -> None:
    """Run a job here, or on the Ray cluster that RAY_ADDRESS names."""
    run_file(spec, changes, as_json=as_json)


def submit(
    spec: Annotated[str, typer.Argument(metavar="SPEC", help="YAML file inside the working directory")],
    address: Address = None,
    working_dir: Annotated[str, typer.Option(help="folder that is sent to the cluster and that the job runs in")] = ".",
    submission_id: Annotated[
        str | None,
        typer.Option(help="name of the job; if the cluster has it already, follow it", show_default=False),
    ] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="print the submission id and return")] = False,
    changes: Changes = None,
    ray_options: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    """Run a job on a Ray cluster and follow its log to the end. The exit status is that of the job.

    Given again with the same --submission-id, the command follows the job that it started before.
    """
    from jobs.runtime.dispatch import named_specs
    from jobs.runtime.job_server import Access, JobServer
    from jobs.runtime.submit import RayOptions, Submission
    from jobs.runtime.submit import submit as submit_job

    with recorded_files() as files:
        checked, document = read_spec(spec, changes)  # reports a mistake here, not in the log of the job
        named = named_specs(checked, document)
    print_warnings(checked, named, document)
    for setting, place in (pair for one in (checked, *named) for pair in local_places(one).items()):
        print_error(f"warning: {setting}={place} is on a disk, which all nodes of the cluster must share")
    options = RayOptions.model_validate_json(ray_options or "{}")
    server = JobServer(Access(address, options.headers, options.verify))
    submission = Submission(spec, changes or (), checked, named, files, working_dir, submission_id, options)
    raise typer.Exit(submit_job(server, submission, wait=not no_wait))


def attach(
    job: Annotated[str, typer.Argument(metavar="ID", help="submission id of the job")], address: Address = None
) -> None:
    """Follow a job that was submitted before, from the start of its log. The exit status is that of the job."""
    from jobs.runtime.follow import attach as attach_to_job
    from jobs.runtime.job_server import Access, JobServer

    raise typer.Exit(attach_to_job(JobServer(Access(address)), job))


def kinds(as_json: AsJson = False) -> None:
    """List the kinds of job, with what each reads and makes. Kinds of installed packages are included."""
    found = [find_kind(name) for name in kind_names()]
    if as_json:
        print_json([_described(kind) for kind in found])
        return
    width = max(len(kind.name) for kind in found)
    for kind in found:
        print_text(f"{kind.name:<{width}}  {kind.summary}")
        for verb, places in (("reads", kind.reads), ("makes", kind.makes)):
            if places:
                print_text(f"{'':<{width}}    {verb}  {'; '.join(f'{key}: {what}' for key, what in places.items())}")


def _described(kind: Kind) -> dict[str, object]:
    return {
        "kind": kind.name,
        "summary": kind.summary,
        "reads": dict(kind.reads),
        "makes": dict(kind.makes),
        "runs_on_kubernetes": not kind.local,
        "declared_in": kind.spec.__module__,
    }


def explain(
    setting: Annotated[
        str, typer.Argument(metavar="[SETTING]", help="dotted key, such as optim.lr (default: all settings)")
    ] = "",
    kind: Annotated[str | None, typer.Option(help="kind of job (default: all kinds that have the setting)")] = None,
    as_json: AsJson = False,
) -> None:
    """Explain a setting: type and limits, default, documentation, and where the shipped specs set it.

    Lists the settings inside of a group of settings.
    """
    from jobs.spec.explain import explain as explain_setting

    found = explain_setting(setting, kind)
    if as_json:
        print_json(
            [{"key": setting, "kinds": one.kinds, **asdict(one.setting), "shipped": one.shipped} for one in found]
        )
        return
    for position, one in enumerate(found):
        if position:
            print_text()
        _print_explanation(setting, one)


def _print_explanation(key: str, found: Explanation) -> None:
    setting = found.setting
    print_text(f"{key}{' of ' if key else ''}{', '.join(found.kinds)}")
    for line in textwrap.wrap(setting.text, _WIDTH):
        print_text(f"  {line}")
    if setting.type != "mapping":
        print_text(f"  type       {setting.type}")
        print_text(f"  default    {'none, it must be set' if setting.required else json.dumps(setting.default)}")
    for reason in setting.no_effect:
        print_text(f"  no effect  {reason}")
    for place, value in found.shipped.items():
        print_text(f"  set in     {place}: {json.dumps(value)}")
    width = max(map(len, setting.settings), default=0)
    for name, text in setting.settings.items():
        print_text(f"  {name:<{width}}  {textwrap.shorten(text, _WIDTH - width, placeholder=' ...')}")


def schema(
    kind: Annotated[str | None, typer.Argument(metavar="[KIND]", help="kind of job (default: all kinds)")] = None,
) -> None:
    """Print the settings of a kind of job as JSON Schema.

    Without a KIND, one schema for all specs: it follows the `kind` of each file. Editors complete and check YAML by it.
    """
    from jobs.spec.schema import schema_of_all, schema_of_kind

    json.dump(schema_of_kind(kind) if kind else schema_of_all(), sys.stdout, indent=1)
    print_text()
