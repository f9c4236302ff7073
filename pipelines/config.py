"""Settings of data, media, mixture and feed, each documented where it is declared. Job specs contain these models."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


DocumentBackend = Literal["pymupdf", "pypdfium2"]


@cache
def has_pymupdf() -> bool:
    """Return whether the extra `pymupdf` is installed."""
    return find_spec("pymupdf") is not None


def _default_document_backend() -> DocumentBackend:
    return "pymupdf" if has_pymupdf() else "pypdfium2"


class Config(BaseModel):
    """Base of all settings. Values are frozen.

    Unknown keys, types that would be converted silently and infinite numbers are errors.
    """

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


_PIXELS = 1280 * 28 * 28


class MediaConfig(Config):
    """How files become pixels, and the limits within which untrusted files are opened."""

    frames: PositiveInt = 8
    """Frames per video, uniform over its length. With `fps`, at most this many. The benchmark protocol uses 8."""
    fps: PositiveFloat | None = None
    """Frames per second of video, evenly reduced to `frames` if there are more. `null`: always `frames`."""
    video_backend: Literal["pyav", "decord"] = "pyav"
    """`pyav` is right on every container tried. `decord` is an extra of the package and runs only in a child process.
    Files that it would decode wrongly (AV1, edit lists, rotation, open groups, transport streams, ...) are rejected as
    `decord_unsupported`."""
    document_backend: DocumentBackend = Field(default_factory=_default_document_backend)
    """`pymupdf` (AGPL-3.0 or commercial) if it is installed, else `pypdfium2` (BSD/Apache). Both give the same page
    within anti-aliasing. Manifests and records of runs hold the library that was used."""
    image_pixels: PositiveInt = _PIXELS
    """A JPEG of more pixels is decoded at 1/2, 1/4 or 1/8 of its size, never below this. The default follows the model
    that reads the image: `prompt.max_visual_tokens` times the pixels of a token of its backbone."""
    page_pixels: PositiveInt = _PIXELS
    """Pixels of a rendered page. The default follows the model, as that of `image_pixels`. Where no model reads the
    page, it is 1280 tokens of 28 x 28 pixels."""
    max_pixels: PositiveInt = 64_000_000
    """Larger images and frames are rejected as `too_many_pixels` (decompression bombs)."""
    max_aspect_ratio: PositiveFloat = 200.0
    """Longer or flatter media are rejected as `extreme_aspect_ratio` (the backbone's own limit)."""
    max_bytes: PositiveInt = 1 << 30
    """Larger files are rejected as `too_many_bytes` and not read."""
    max_video_s: PositiveFloat = 3600.0
    """Longer videos are rejected as `too_long_video`: one hour."""
    max_video_frames: PositiveInt = 216_000
    """Videos of more frames are rejected as `too_many_frames`: an hour at 60 frames per second."""
    max_pages: PositiveInt = 2000
    """Documents with more pages are rejected as `too_many_pages`."""
    max_cpu_s: PositiveInt = 30
    """CPU seconds that the decoding child may spend on one file. Then it is killed, and the file is counted."""
    max_memory_bytes: PositiveInt = 4 << 30
    """Address space of the decoding child."""

    def for_model(self, visual_pixels: int) -> MediaConfig:
        """Return the settings for a model that takes in images of `visual_pixels`. Other pixels than the default stay.

        The default goes by its value, so that settings that were written out in full mean the same.
        """
        follows = [name for name in ("image_pixels", "page_pixels") if getattr(self, name) == _PIXELS]
        return self.model_copy(update=dict.fromkeys(follows, visual_pixels))


class ResampleConfig(Config):
    """Draw sources that converge slowly more often (paper, section 4; the rule is our choice)."""

    every_steps: PositiveInt
    """The weights change at every multiple of this step. There, training pauses for the time of a start."""
    strength: PositiveFloat = 1.0
    """A source's share grows with (its loss now / its loss in the first `every_steps` steps)^strength."""
    max_factor: Annotated[float, Field(ge=1)] = 4.0
    """No share grows or shrinks by more than this factor, compared with the mixture without resampling."""


class MixtureConfig(Config):
    """What share of the steps each source gets. Every global batch is drawn from one source (paper, section 4)."""

    weights: dict[str, PositiveFloat] | None = None
    """Source name -> relative share of the steps. Sources not named are left out. `null`: all, by their size."""
    groups: dict[str, list[str]] = {}
    """Name -> sources that are merged into one, as the paper does with image classification (section 4). The group
    replaces its members: each batch is drawn from all of them, by their size."""
    max_samples_per_source: PositiveInt = 100_000
    """At most this many samples of a source are used (paper, section 4): random runs of adjacent samples, which depend
    on `seed`."""
    blocks: dict[str, PositiveInt] = {}
    """Source or group -> number of samples that are contrasted with each other, fewer than a global batch. A global
    batch then consists of several blocks of one size, each from one source. Sources not named fill whole global batches
    (paper)."""
    run_length: PositiveInt = 16
    """Adjacent samples of a shard that stay together when an epoch is permuted: one range request for each run. Ingest
    shuffles samples globally, so that adjacent samples have nothing in common. Our choice."""
    positives: Literal["all", "one"] = "all"
    """What an epoch takes of a query with several positives, which are samples with an equal query in a source. `all`
    takes each of them. `one` draws one, and others in later epochs, so that each query counts once (M-BEIR, MM-Embed).
    """
    resample: ResampleConfig | None = None
    """Change the weights during the run, by the losses so far. The run records the changes."""
    merge_small: bool = False
    """Sources with fewer samples than a batch, after drops and weights: `false` rejects them, `true` merges them into
    one source named `small`, with a smaller batch if necessary. For folders of a few files."""


class DataConfig(Config):
    """Where samples are stored and how they are read."""

    root: str
    """Directory or s3:// URL under which `ingest` or `index` published `{split}/manifest.json`."""
    endpoint: str | None = None
    """S3 endpoint of the data root and of external shards. Default: the environment's AWS_ENDPOINT_URL."""
    split: Literal["train", "held_out"] = "train"
    """Split to read: `train` or `held_out`."""
    instructions: bool = True
    """Put each sample's instruction before its text. Stage 1 of the recipe has none, stage 2 has."""
    trusted: bool = False
    """Whether you made the files yourself. `false` decodes videos and documents in a child process with limits and
    without rights, which costs some time. `true` decodes them in the process of the task. Results are the same."""
    negatives_per_sample: NonNegativeInt = 0
    """At most this many negatives of each sample are decoded and used: its own, then those of `candidates`."""
    candidates: str | None = None
    """Candidate table (directory or s3:// URL) that `mine`, `select`, `judge` or `cluster` made of this split. Its
    drops and clusters decide the batches, and its candidates are negatives up to `negatives_per_sample`."""
    negatives_draw: Literal["first", "random"] = "first"
    """Which candidates of the table a sample takes: the `first`, or `random` ones, other ones in each epoch."""
    curation: list[str] = Field(default=[])
    """Tables of `curate` (directories or s3:// URLs). A sample that any of them drops is not trained on. A weight
    is the share of the epochs that take the sample; weights of several tables are multiplied."""
    teacher_vectors: str | None = None
    """Vectors of a larger model (directory or s3:// URL), from a job of kind `embed` with `queries: true`. A pair finds
    them by its content. `objective.embedding_distillation` learns from them."""
    media: MediaConfig = MediaConfig()
    """Decoding."""
    mixture: MixtureConfig = MixtureConfig()
    """Shares of the sources."""
    max_bad_fraction: Fraction = 0.01
    """Stop when more than this share of the samples read so far was bad and had to be replaced."""


class CacheConfig(Config):
    """Decoded pixels that a node keeps, so that later epochs and other runs of the job do not decode them again."""

    max_bytes: PositiveInt = 1 << 30
    """At most this many bytes on each node. A full cache keeps what it has. An image of 1280 tokens has 3 MB."""
    folder: str | None = None
    """Folder of each node below which the cache is, such as one on a local SSD. `null` is /dev/shm, which is memory of
    the node. The job deletes its cache at its end, on the node of its own process. The next job on another node deletes
    what is left there."""


class FeedConfig(Config):
    """How Ray Data reads, decodes and encodes ahead of the training workers."""

    samples_per_task: PositiveInt = 128
    """About this many samples of one worker are made by one task: its share of several steps, at least of one. Small
    tasks waste time (256 instead of 128 made a tenth more images), large ones memory."""
    cpus_per_task: PositiveFloat = 0.5
    """Logical CPUs that a task reserves. With 1, CPUs idle for 0.15 s between tasks (measured), because Ray Data checks
    ten times a second. With 0.5 there are two tasks for each CPU, in memory too."""
    max_tasks: PositiveInt | None = None
    """At most this many tasks at a time, each with its samples in memory. `null`: as many as the CPUs allow."""
    prefetch_tasks: NonNegativeInt = 1
    """Finished tasks that each worker fetches ahead of the one that it uses."""
    cache: CacheConfig | None = None
    """Keep decoded pixels on the nodes. `null` decodes in every epoch. Batches are the same, bit for bit."""
