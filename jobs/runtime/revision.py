"""Identifies the code and the libraries that a result was made with."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
from pathlib import Path

_PACKAGES = ("ray", "torch", "transformers", "deepspeed", "peft")


def revision() -> str:
    """Return the git revision of the code, with `-dirty` if there are uncommitted changes.

    Container images have no git history. They set RZEN_REVISION.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RZEN_REVISION", "unknown")


def versions() -> dict[str, str]:
    """Return package -> installed version of the libraries that decide results."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}
