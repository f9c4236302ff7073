"""Imports the packages of this project by name, in a folder that has a package `jobs` or `pipelines` of its own.

Python looks for packages along `sys.path`, and Ray puts the working directory of a job at its beginning. A user's
`jobs` would then hide ours. Only `rzen` carries the name of the project, so that it can be found everywhere: it
imports the other two from the folder that it is in itself. Later imports take them from `sys.modules`.

Uses the standard library only, because it runs before anything else.
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
