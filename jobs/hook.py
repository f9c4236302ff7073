"""Ray's own command for our specs: with RAY_JOB_SUBMIT_HOOK=jobs.hook.submit, `ray job submit jobs/stage2.yaml`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from jobs.cli import main


def submit(*, entrypoint: Sequence[str], address: str | None, working_dir: str | None, no_wait: bool, **_: Any) -> None:
    """Called by Ray with all arguments of its command: a YAML file is submitted as by `rzen submit`.

    Ends the process with the job's exit status. Any other entrypoint is left to Ray. What a spec settles (`submit`) is
    not looked at among the arguments.
    """
    if not entrypoint or not entrypoint[0].endswith((".yaml", ".yml")):
        return
    options = [*(["--address", address] if address else []), *(["--working-dir", working_dir] if working_dir else [])]
    sys.exit(main(["submit", *entrypoint, *options, *(["--no-wait"] if no_wait else [])]))
