"""Lets Ray's command submit specs: RAY_JOB_SUBMIT_HOOK=jobs.hook.submit ray job submit jobs/stage2.yaml."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jobs.cli import main


def submit(*, entrypoint: Sequence[str], address: str | None, working_dir: str | None, no_wait: bool, **_: Any) -> None:
    """Submit a YAML file as `rzen submit` does. Ray calls this with all arguments of its command.

    Ends the process with the exit status of the job. Ray handles any other entrypoint itself. Arguments for settings
    that a spec has under `submit` are ignored.
    """
    if not entrypoint or not entrypoint[0].endswith((".yaml", ".yml")):
        return
    options = [*(["--address", address] if address else []), *(["--working-dir", working_dir] if working_dir else [])]
    sys.exit(main(["submit", *entrypoint, *options, *(["--no-wait"] if no_wait else [])]))
