"""Which code this is, and the versions of the libraries that decide its results."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path

_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft")


def revision() -> str:
    """Of the code, where it lies in a git repository; `-dirty` with uncommitted changes. Images, which hold no history,
    name theirs in RZEN_REVISION.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RZEN_REVISION", "unknown")


def versions() -> dict[str, str]:
    """Return name -> installed version of the packages that decide what is computed."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
