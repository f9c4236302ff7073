"""A result as it is kept: a Markdown table of the largest difference from rzen's vectors, by kind of input."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def report(title: str, packages: Sequence[str], columns: Mapping[str, Mapping[str, float | str]], notes: str) -> str:
    """`columns`: title -> kind of input -> difference, or why there is none."""
    here = Path(__file__).parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
    revision = subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    kinds = list(dict.fromkeys(kind for column in columns.values() for kind in column))
    lines = [
        f"# {title}",
        "",
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, revision {revision}, CPU ({platform.machine()}), Python"
        f" {platform.python_version()}, {versions}.",
        "",
        notes,
        "",
        f"| side | {' | '.join(columns)} |",
        f"|---|{'---:|' * len(columns)}",
    ]
    for kind in kinds:
        cells = (column.get(kind, "") for column in columns.values())
        texts = (cell if isinstance(cell, str) else f"{cell:.1e}" for cell in cells)
        lines.append(f"| {kind} | {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"


def largest(columns: Mapping[str, Mapping[str, float | str]]) -> float:
    """Largest difference of all."""
    return max(value for column in columns.values() for value in column.values() if isinstance(value, float))
