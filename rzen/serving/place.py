"""Where a server finds model and corpus. It loads no model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from pipelines.errors import UserError
from pipelines.storage.location import open_store
from rzen.config import Dtype
from rzen.embedding.corpus import MANIFEST, VERSIONS


@dataclass(frozen=True, slots=True)
class Place:
    """Where model and corpus are, and how they are loaded."""

    model: str
    adapter: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()
    """Name and URL of adapters that share the model, in addition to the model itself."""
    corpus: str | None = None
    corpus_version: str | None = None
    """Version of the corpus. None takes the live one, and follows it."""
    reranker: str | None = None
    endpoint: str | None = None
    dtype: Dtype | None = None
    dimensions: tuple[int, ...] | None = None
    """Widths that clients may ask for. None takes those that `config.json` names."""

    def tag(self) -> str:
        """Return what changes when model or corpus are replaced: the tags of their files, without reading them."""
        parts = [repr(self)]
        for url in filter(None, (self.model, self.adapter, self.reranker, *dict(self.adapters).values())):
            if "://" in url or Path(url).expanduser().is_dir():  # a hub name does not change
                parts.append(json.dumps(open_store(url, self.endpoint).tags()))
        if self.corpus is not None:
            path = MANIFEST if self.corpus_version is None else f"{VERSIONS}/{self.corpus_version}.json"
            parts.append(open_store(self.corpus, self.endpoint).tag(path))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class TaggedPlace:
    """A place, and the tag of what was there when somebody looked."""

    place: Place
    tag: str

    def is_there(self) -> bool:
        """Return whether the place still has what the tag names."""
        try:
            return self.place.tag() == self.tag
        except (UserError, OSError):  # such as a version of the corpus that was removed
            return False
