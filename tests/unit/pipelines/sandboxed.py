"""Functions that the tests of the sandbox run in its child.

They are not in the test module, because the child would then import pytest, numpy and pymupdf.
"""

import contextlib
import os
import time

from pipelines.media import sandbox

MAX_CPU_S = 1

HOARD = []


def hoard(num_bytes: int) -> int:
    """As a decoder that leaks."""
    HOARD.append(bytes(num_bytes))
    return len(HOARD)


def load_slowly() -> float:
    with sandbox.exclude_from_cpu_limit():
        while time.process_time() < 1.5 * MAX_CPU_S:
            pass
    return time.process_time()


def load_slowly_and_then_never_return() -> None:
    load_slowly()
    while True:
        pass


def import_nothing() -> None:
    raise ImportError("No module named 'decord'")


def answer_wildly(answer: bytes) -> None:
    """As memory that a decoder has written over: to every pipe that may lead to the parent."""
    for descriptor in range(3, 20):
        with contextlib.suppress(OSError):
            os.write(descriptor, answer)
