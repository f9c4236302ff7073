"""Encoders: what gives equal bytes in every run, and what they do to the process that calls them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

CONSTANT: dict[str, dict[str, str]] = {"libx264": {"mbtree": "0"}}
"""Codec -> options for equal bytes in every run: x264's macroblock tree reads memory that it has not written."""


@contextmanager
def scheduling_kept() -> Iterator[None]:
    """SVT-AV1 gives a process of root real-time priority: it, and all that it starts later, would starve all others."""
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)
