"""What the benchmarks share: runs in processes of their own, the spread of what they found, and showing it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.paths import ROOT


def answer(module: str, *words: str, **environment: str) -> Any:
    """What `python -m module words` prints last, as JSON. Raises `CalledProcessError` where it fails."""
    command = [sys.executable, "-m", module, *words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def seconds_of(step: Callable[[], object], device: str) -> float:
    """How long a step takes until the device has done it."""
    _synchronize(device)
    begun_s = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - begun_s


def _synchronize(device: str) -> None:
    if device == "cuda":
        import torch  # most benchmarks need none

        torch.cuda.synchronize()


def spread(values: Sequence[float], form: str) -> str:
    """Median, smallest and largest."""
    middle = f"{statistics.median(values):{form}}"
    return middle if len(values) == 1 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def say(line: str) -> None:
    """On the terminal, apart from the report."""
    print(line, file=sys.stderr, flush=True)


def show(report: str, script: str, *, write: bool, on_gpu: bool = False) -> None:
    """Prints a report, and keeps it beside the `script` by choice: `name.md`, or `name_cuda.md`."""
    print(report)
    if write:
        path = Path(script)
        path.with_name(f"{path.stem}{'_cuda' if on_gpu else ''}.md").write_text(report, encoding="utf-8")
