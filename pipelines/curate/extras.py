"""Libraries of the extra `curation`, imported when a rule needs them."""

from __future__ import annotations

import importlib
from typing import Any

from pipelines.errors import UserError


def import_extra(module: str) -> Any:
    """Import a library of the extra. Raises `UserError` if it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        name = module.partition(".")[0]
        if error.name != name:
            raise
        raise UserError(name, "is not installed", "run `pip install 'rzen[curation]'`") from error
