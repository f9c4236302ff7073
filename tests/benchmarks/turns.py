"""What the benchmarks share: runs in processes of their own, the spread of what they found, and showing it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.paths import ROOT


def answer(module: str, *words: str, **environment: str) -> Any:
    """What `python -m module words` prints last, as JSON. Raises `CalledProcessError` where it fails."""
    command = [sys.executable, "-m", module, *words]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    variables = os.environ | {"PYTHONPATH": path} | environment
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


class Host:
    """A process, `python -m module words`, that answers what it is asked, in JSON lines, until the block ends."""

    def __init__(self, module: str, *words: str, **environment: str) -> None:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": path} | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, question: object) -> Any:
        """Return the answer. Raises `RuntimeError` if the process has ended, after its traceback was printed."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(question), file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise RuntimeError(f"{self._process.args} ended")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    @staticmethod
    def serve(answer: Callable[[Any], object], context: AbstractContextManager[object]) -> None:
        """Answer the lines of the standard input, within a context. What libraries print goes to the standard error."""
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        with context:
            for line in sys.stdin:
                print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


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
