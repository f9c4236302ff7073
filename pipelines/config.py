"""Settings of the data half, each documented where it is declared. Job specs are composed of these models."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of all settings: unknown keys and silently converted types are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class MediaConfig(Config):
    """How files become pixels, and the limits within which strangers' files are opened."""

    frames: PositiveInt = 8
    """Frames per video, uniform over its length. Our choice; the benchmark protocol uses 8."""
    video_backend: Literal["pyav", "decord"] = "pyav"
    """`pyav` is right on every container tried; `decord` cannot open AV1 and runs only in a child process."""
    document_backend: Literal["pymupdf", "pypdfium2"] = "pymupdf"
    """pymupdf is AGPL-3.0 or commercial; pypdfium2 is BSD/Apache. Both give the same page within anti-aliasing."""
    image_pixels: PositiveInt = 1_003_520
    """A JPEG of more pixels may be decoded at 1/2, 1/4 or 1/8 of its size, never below this: 1280 visual tokens."""
    page_pixels: PositiveInt = 1_003_520
    """Pixels of a rendered page: 1280 visual tokens of 28 x 28 pixels (paper, at most 1280 per image)."""
    max_pixels: PositiveInt = 64_000_000
    """Larger images and frames are rejected as `too_many_pixels` (decompression bombs)."""
    max_aspect_ratio: PositiveFloat = 200.0
    """Longer or flatter media are rejected as `extreme_aspect_ratio` (the backbone's own limit)."""
    max_bytes: PositiveInt = 1 << 30
    """Larger files are rejected as `too_many_bytes`, unread."""
    max_pages: PositiveInt = 2000
    """Documents with more pages are rejected as `too_many_pages`."""
    max_cpu_s: PositiveInt = 30
    """CPU seconds that the decoding child may spend on one file before it is killed and the file is counted."""
    max_memory_bytes: PositiveInt = 4 << 30
    """Address space of the decoding child."""


class MixtureConfig(Config):
    """What share of the steps each source gets. Every global batch is drawn from one source (paper, section 4)."""

    weights: dict[str, PositiveFloat] | None = None
    """Source name -> relative share of the steps; sources not named are left out. `null`: all, by their size."""
    max_samples_per_source: PositiveInt = 100_000
    """At most this many samples of a source are used (paper, section 4)."""
    run_length: PositiveInt = 16
    """Neighbouring samples of a shard that stay together when an epoch is permuted: one range request each.
    Samples are shuffled globally when shards are written, so neighbours are strangers. Our choice."""
    merge_small: bool = False
    """Sources with fewer samples than a global batch: `false` refuses them, `true` merges them into one source named
    `small`, with a smaller batch if need be. For folders of a few files."""


class DataConfig(Config):
    """Where samples lie and how they are read."""

    root: str
    """Directory or s3:// URL under which `ingest` published `{split}/manifest.json`."""
    endpoint: str | None = None
    """S3 endpoint; the environment's AWS_ENDPOINT_URL where not given."""
    split: str = "train"
    """Split to read: `train` or `held_out`."""
    instructions: bool = True
    """Put each sample's instruction before its text. Stage 1 of the recipe has none, stage 2 has."""
    media: MediaConfig = MediaConfig()
    """Decoding."""
    mixture: MixtureConfig = MixtureConfig()
    """Shares of the sources."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the samples read so far could not be decoded and had to be replaced."""


class FeedConfig(Config):
    """How Ray Data reads, decodes and encodes ahead of the training workers."""

    samples_per_task: PositiveInt = 128
    """About this many samples of one worker are made by one task: its share of several steps, at least of one.
    Small tasks waste time (measured: 64, 128, 256 reach 0.48, 0.67, 0.77 of a bare loop), large ones memory."""
    cpus_per_task: PositiveFloat = 1.0
    """Logical CPUs that a task reserves; below 1, tasks overlap reading with decoding."""
    max_tasks: PositiveInt | None = None
    """At most this many tasks at a time, each with its samples in memory; `null`: as many as the CPUs allow."""
    prefetch_tasks: NonNegativeInt = 1
    """Finished tasks that each worker fetches ahead of the one it is working off."""
