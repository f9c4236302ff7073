"""Imports the packages of this project in a folder that has its own package `jobs` or `pipelines`.

Python searches `sys.path` for packages, and Ray puts the working directory of a job first. A user's `jobs` would then
hide ours. Only `rzen` has the name of the project, so Python finds it everywhere. It imports the other two from its
own folder. Later imports take them from `sys.modules`.

This module uses the standard library only, because it runs before anything else.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])
OTHERS = ("pipelines", "jobs")


def import_own_packages() -> None:
    """Import `pipelines` and `jobs` from the folder that `rzen` is in, unless they are imported already."""
    sys.path.insert(0, ROOT)
    try:
        for name in OTHERS:
            import_module(name)
    finally:
        sys.path.remove(ROOT)


def are_hidden(folder: str) -> bool:
    """Return whether a Python process that looks into `folder` first would find another `pipelines` or `jobs`."""
    for name in OTHERS:
        found = PathFinder.find_spec(name, [folder, *sys.path])
        if found is not None and found.origin != str(Path(ROOT, name, "__init__.py")):
            return True
    return False
