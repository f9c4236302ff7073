"""Media files on local disks."""

from __future__ import annotations

from pathlib import Path

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia


def read_file(path: str, config: MediaConfig) -> bytes:
    """Return all bytes of a file. Raises `BadMedia`: too_many_bytes, missing_file, unreadable_file."""
    try:
        num_bytes = Path(path).stat().st_size
        if num_bytes > config.max_bytes:
            raise BadMedia("too_many_bytes", f"{num_bytes} bytes, at most {config.max_bytes}")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise BadMedia("missing_file") from error
    except OSError as error:
        raise BadMedia("unreadable_file", error.strerror or str(error)) from error
