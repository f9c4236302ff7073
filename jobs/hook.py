"""Lets Ray's command submit specs: RAY_JOB_SUBMIT_HOOK=jobs.hook.submit ray job submit jobs/stage2.yaml."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jobs.cli import main
from jobs.commands.output import print_error
from pipelines.errors import UserError

_OPTIONS = {"metadata": "--metadata-json", "runtime_env": "--runtime-env-json"}
_IN_THE_WAY = "cannot be passed on to `rzen submit`"


def submit(
    *,
    entrypoint: Sequence[str],
    address: str | None = None,
    working_dir: str | None = None,
    submission_id: str | None = None,
    no_wait: bool = False,
    **options: Any,
) -> None:
    """Submit a YAML file as `rzen submit` does. Ray calls this with all arguments of its command.

    Ends the process with the exit status of the job. Ray handles any other entrypoint itself. What is given here wins
    over `submit` in the spec. `env_vars` and `excludes` of the runtime environment are added to those of the spec.
    """
    if not entrypoint or not entrypoint[0].endswith((".yaml", ".yml")):
        return
    try:
        passed_on = _ray_options(options)
        folder = passed_on["runtime_env"].pop("working_dir", None) if working_dir is None else working_dir
        if folder and "://" in folder:
            raise UserError(f"--working-dir {folder}", _IN_THE_WAY, "name a folder of this machine")
    except UserError as error:
        print_error(f"error: {error}")
        sys.exit(error.status)
    words = ["submit", *entrypoint, "--ray-options", json.dumps(passed_on)]
    named = {"--address": address, "--working-dir": folder, "--submission-id": submission_id}
    words += [word for name, value in named.items() if value for word in (name, value)]
    sys.exit(main([*words, *(["--no-wait"] if no_wait else [])]))


def _ray_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of Ray's command that only its hook has. Raise `UserError` for what has no place in a job."""
    from jobs.runtime.submit import SETTINGS, SPEC, RayOptions

    names = {"metadata_json": "metadata"}
    options = {names.get(name, name): value for name, value in given.items() if value is not None}
    options.pop("job_id", None)  # the old name of submission_id, which Ray has filled in
    options["runtime_env"] = _runtime_env(options.pop("runtime_env", None), options.pop("runtime_env_json", None))
    for name in {SPEC, SETTINGS} & set(options.get("metadata", {})):
        raise UserError(f"--metadata-json {name}", "is set by `rzen submit`", "choose another name")
    try:
        return RayOptions.model_validate(options | _command_line()).model_dump(mode="json")
    except ValidationError as error:
        first = error.errors()[0]
        name, *inner = map(str, first["loc"])
        place = " ".join([_OPTIONS.get(name, f"--{name.replace('_', '-')}"), *inner])
        problem = _IN_THE_WAY if first["type"] == "extra_forbidden" else first["msg"]
        raise UserError(place, problem, "leave it out or change it") from error


def _runtime_env(path: str | None, text: str | None) -> Any:
    from ray.dashboard.modules.dashboard_sdk import parse_runtime_env_args

    try:
        return parse_runtime_env_args(path, text) or {}
    except (OSError, ValueError) as error:
        place = f"--runtime-env {path}" if path else "--runtime-env-json"
        raise UserError(place, f"cannot be read: {error}", "see the documentation of Ray's runtime_env") from error


def _command_line() -> dict[str, Any]:
    """Return `--headers` and `--verify`, which Ray does not pass to hooks."""
    import click

    context = click.get_current_context(silent=True)
    given = context.params if context else {}
    headers, verify = given.get("headers"), given.get("verify", True)
    if isinstance(verify, str) and not Path(verify).exists():
        raise UserError(f"--verify {verify}", "does not exist", "name a file or folder of certificates")
    try:
        return {"headers": json.loads(headers) if headers else None, "verify": verify}
    except ValueError as error:
        raise UserError("--headers", "is not a JSON object", 'write it like {"X-Team": "search"}') from error
