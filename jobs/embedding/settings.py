"""How a model embeds: what an actor needs to load it, and all that decides its vectors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from jobs.runtime.revision import versions
from jobs.spec.model import ModelRef
from pipelines.config import DataConfig, MediaConfig
from pipelines.feed.reader import Reader
from pipelines.storage.location import resolve_endpoint
from rzen.config import Dtype, ModelIdentity
from rzen.inputs.processor import Processor
from rzen.model.checkpoints import made_by, read_identity, stored_dtype
from rzen.model.locate import checkpoint_folder, local_folder


@dataclass(frozen=True)
class EmbedderSettings:
    """One model in one configuration. Pickles. `data` says where the shards of items are that are rows of them.

    `config` is content only, no name and no place: equal configurations give equal vectors, up to what is embedded
    together, and share a folder of the cache.
    """

    name: str
    model: ModelRef
    identity: ModelIdentity
    endpoint: str | None
    media: MediaConfig
    data: DataConfig | None
    fingerprints: dict[str, str]
    """Split of `data` -> fingerprint of the manifest by which the items were listed."""
    dtype: Dtype | None
    chunk_tokens: int
    config: dict[str, Any]


class EmbeddingJob(Protocol):
    """A spec of a job that embeds items of one dataset with one model."""

    @property
    def data(self) -> DataConfig:
        """Dataset of the items."""

    @property
    def dtype(self) -> Dtype | None:
        """Compute type; None for that of the export."""

    @property
    def chunk_tokens(self) -> int:
        """Tokens embedded at once."""

    @property
    def endpoint(self) -> str | None:
        """S3 endpoint of model and output."""


def settings_of_job(
    name: str,
    spec: EmbeddingJob,
    model: str,
    splits: Iterable[str],
    *,
    adapter: str | None = None,
    data: DataConfig | None = None,
) -> EmbedderSettings:
    """Return how a job embeds items of its dataset, or of another one that it reads in the same way."""
    return embedder_settings(
        name,
        ModelRef(base=model, adapter=adapter, instructions=spec.data.instructions),
        ModelIdentity(),
        endpoint=spec.endpoint,
        media=spec.data.media,
        dtype=spec.dtype,
        chunk_tokens=spec.chunk_tokens,
        data=data or spec.data,
        splits=splits,
    )


def embedder_settings(
    name: str,
    model: ModelRef,
    default: ModelIdentity,
    *,
    endpoint: str | None,
    media: MediaConfig,
    dtype: Dtype | None,
    chunk_tokens: int,
    data: DataConfig | None = None,
    splits: Iterable[str] = (),
) -> EmbedderSettings:
    """Read the identity of a model from its files, with the hash of its weights.

    `default` holds for models that do not say how they are read; `dtype` is that of an export where it is `None`.
    `splits` are those of `data` that the items come from.
    """
    resolved = resolve_endpoint(endpoint)
    base = Path(checkpoint_folder(model.base, resolved))
    adapter = Path(local_folder(model.adapter, resolved)) if model.adapter else None
    identity = read_identity(adapter or base, default)
    media = media.for_model(Processor(str(base), identity.prompt).visual_pixels)
    config: dict[str, Any] = {
        **made_by(base, adapter, identity),
        "identity": identity.model_dump(mode="json"),
        "instructions": model.instructions,
        "media": media.model_dump(mode="json"),
        "dtype": dtype or stored_dtype(base),
        "versions": versions(),
    }
    fingerprints: dict[str, str] = {}
    if data is not None:  # workers may lack the variable of the endpoint
        data = data.model_copy(update={"endpoint": resolve_endpoint(data.endpoint), "media": media})
        for split in splits:
            fingerprints[split] = Reader(data.model_copy(update={"split": split})).fingerprint
    return EmbedderSettings(name, model, identity, resolved, media, data, fingerprints, dtype, chunk_tokens, config)
