"""Which code this is. Imports nothing, so that everything can ask."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


def revision() -> str:
    """Of the code, where it lies in a git repository; `-dirty` with uncommitted changes. Images, which hold no history,
    name theirs in RZEN_REVISION.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RZEN_REVISION", "unknown")
