"""Imports of libraries that may be missing, and cheaper imports of large ones, which each process of a job pays again.

The figures are of one core of a shared x86-64 machine (2026-11-29), with Python 3.11.
"""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from pipelines.errors import UserError

_NOT_FOR_MODELS = ("scipy",)
"""Imported by transformers if installed, for losses of object detectors: 0.3 s of CPU in each worker and actor."""

NOT_FOR_SAVING = ("deepspeed",)
"""Imported by accelerate if installed, to see whether a model that is saved is one of its engines: 3 s of CPU."""


def import_extra(module: str, extra: str, setting: str, instead: str | None = None) -> Any:
    """Import a library that `pip install 'rzen[extra]'` installs. Raises `UserError` if it is not installed.

    `setting` is what needs the library, and `instead` a setting that needs no extra. An `ImportError` for another
    reason passes, such as that of a memory limit.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        if error.name != name:
            raise
        fix = f"run `pip install 'rzen[{extra}]'`" + (f", or set {instead}" if instead else "")
        raise UserError(setting, f"{name} is not installed", fix) from error


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Do not collect garbage in the block, which imports large libraries.

    Imports make objects that live as long as the process, and the collector visits all of them again and again. Those
    of a training worker take 6.2 s of CPU instead of 7.6 s.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def without_modules(*names: str) -> Iterator[None]:
    """Make imports of these modules raise `ModuleNotFoundError` in the block, except of those imported already.

    This is for libraries that import others only because they are installed. One thread at a time may use the block.
    """
    hidden = [name for name in names if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the import system gives None this meaning
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


@contextmanager
def importing_models() -> Iterator[None]:
    """Import transformers and what stands on it in the block, cheaply.

    transformers asks once whether a module is installed. So modules are hidden only from its first import.
    """
    is_first = "transformers" not in sys.modules
    with without_garbage_collection(), without_modules(*_NOT_FOR_MODELS) if is_first else nullcontext():
        yield
