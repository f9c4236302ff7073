"""What every task of an ingest job knows: where the dataset is, and the settings that decide its bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from pipelines.config import MediaConfig
from pipelines.media.libraries import library_versions
from pipelines.storage.store import Store

VERSION = 1
"""Raised when equal samples and settings give other shards, so that those of earlier versions are written again."""


@dataclass(frozen=True)
class IngestSettings:
    """The settings of a job. `endpoint` is that of raw media at s3:// URLs."""

    out: Store
    media: MediaConfig
    held_out_fraction: float
    seed: int
    samples_per_shard: int
    materialized: bool = False
    endpoint: str | None = None

    @property
    def stored(self) -> dict[str, Any]:
        """What manifests say about how the dataset was made."""
        return {
            "held_out_fraction": self.held_out_fraction,
            "seed": self.seed,
            "samples_per_shard": self.samples_per_shard,
            "materialized": self.materialized,
            "media": self.media.model_dump(),
        }

    @cached_property
    def _content(self) -> str:
        return json.dumps([VERSION, self.stored, library_versions(self.media)], sort_keys=True)

    def group_id(self, parts: Iterable[str]) -> str:
        """Return 32 hex digits for a group of samples: a hash of its parts, in order, and of these settings."""
        content = hashlib.sha256(self._content.encode())
        for part in parts:
            content.update(b"\0" + part.encode())
        return content.hexdigest()[:32]
