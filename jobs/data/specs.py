"""Kinds `corpus`, `emoji`, `ingest`, `index` and `export_data`: jobs that make datasets, or other files of them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jobs.spec.job import JobConfig, Named
from jobs.spec.kinds import Kind, no_gpus
from jobs.spec.no_effect import NoEffect
from pipelines.config import MediaConfig, NonNegativeInt, PositiveInt
from pipelines.formats.format import FormatName
from pipelines.samples import Split
from pipelines.shards.mapping import SourceMapping
from pipelines.sources.emoji import EmojiConfig
from pipelines.sources.table_config import FromPrompts, TableSource
from pipelines.synthetic.config import CorpusConfig


class CorpusSpec(JobConfig):
    """Draw the synthetic corpus: real image, PDF and video files with captions."""

    kind: Literal["corpus"]
    """Must be `corpus`."""
    out: str
    """Local folder of the corpus. It must be new, empty or hold an earlier corpus."""
    corpus: CorpusConfig = CorpusConfig()
    """How many files of each type to draw."""


class EmojiSpec(JobConfig):
    """Fetch Fluent emoji and their names in many languages from npm's registry."""

    kind: Literal["emoji"]
    """Must be `emoji`."""
    out: str
    """Local folder of the corpus. It must be new, empty or hold an earlier corpus."""
    emoji: EmojiConfig = EmojiConfig()
    """Which names, keywords and pictures are trained on, and which are tested."""


class IngestSpec(JobConfig):
    """Turn a folder of files, or tables, into shards, index and manifest."""

    kind: Literal["ingest"]
    """Must be `ingest`."""
    input: str | None = None
    """Local folder of images, videos and PDFs with captions (see the README of pipelines/sources). On a cluster, all
    nodes must share it, so that the RayJob of Kubernetes takes tables only."""
    sources: Named[TableSource] = Field(default_factory=dict)
    """Name of a source -> its table and which columns are query, positive and negatives. `rzen look TABLE` writes it.
    Samples of `input` and of all sources make one dataset."""
    follow_links: bool = False
    """Whether to read links to files outside of `input`, as download caches have. `false` counts them as
    `outside_folder`."""
    keep_uncaptioned: bool = False
    """Whether to store media without a caption, pages without text, passages of texts, and tables without a `query` in
    the split `uncaptioned`. They are embedded and searched, and never trained on. `false` counts those of a folder."""
    out: str
    """Directory or s3:// URL of the dataset."""
    endpoint: str | None = None
    """S3 endpoint of `out` and of `sources`. `null` uses AWS_ENDPOINT_URL from the environment."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Fraction of the samples that is held out for evaluation. Samples with the same target stay together."""
    samples_per_shard: PositiveInt = 1000
    """Largest number of samples in a shard."""
    seed: NonNegativeInt = 0
    """Seed of the split and the order. The same seed and files give the same bytes."""
    reuse: bool = True
    """Whether to keep what an earlier run has stored of the same tables and files with the same settings. Set it to
    `false` after media were replaced that a table names by their paths: everything is then made again."""
    materialized: bool = False
    """Whether to store video frames (JPEG) and page images (lossless WebP) as `media` chooses them, instead of the
    files. Reading clips and dense pages is then cheaper, but `frames`, `fps` and `page_pixels` are fixed."""
    media: MediaConfig = MediaConfig()
    """Limits for opening files."""

    @model_validator(mode="after")
    def _reads_something(self) -> IngestSpec:
        if self.input is None and not self.sources:
            raise ValueError("has neither `input` nor `sources`")
        return self


class IndexSource(SourceMapping):
    """Shards of one source, and how their members become samples."""

    urls: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Tar files: local paths, file:// and s3:// URLs. `{000..099}` and `{a,b}` are expanded, `*` and `?` match within a
    folder, and a folder stands for every .tar file below it."""


class IndexSpec(JobConfig):
    """Make a dataset from external webdataset or img2dataset shards, without copying them."""

    kind: Literal["index"]
    """Must be `index`."""
    sources: Annotated[Named[IndexSource], Field(min_length=1)]
    """Name of a source -> its shards and their mapping to samples."""
    out: str
    """Directory or s3:// URL of the dataset: indices, report and manifest. The shards themselves are only read."""
    endpoint: str | None = None
    """S3 endpoint of the shards and of `out`. `null` uses AWS_ENDPOINT_URL from the environment."""
    split: Split = "train"
    """Split of the dataset that the shards become."""
    decode: bool = False
    """Whether to decode every file once, in a child process with limits, and to leave out files that cannot be
    decoded. Worth its time for `held_out`: `rzen evaluate` refuses bad files, training replaces them."""
    media: MediaConfig = MediaConfig()
    """Limits for opening files, if `decode` is on."""


class ExportDataSpec(JobConfig):
    """Write a dataset in the format of another library."""

    kind: Literal["export_data"]
    """Must be `export_data`."""
    data: str
    """Directory or s3:// URL of the dataset."""
    out: str
    """Directory or s3:// URL of the export. An earlier export of the split is replaced."""
    endpoint: str | None = None
    """S3 endpoint of `data`, of its external shards and of `out`. `null` uses AWS_ENDPOINT_URL from the environment."""
    format: FormatName
    """`webdataset`: tars, as img2dataset writes them. `mmeb`: Parquet with zips of pictures. `sentence_transformers`:
    Parquet with columns anchor, positive, negative_1."""
    split: Split = "train"
    """Split that is written."""
    sources: Annotated[list[str], Field(min_length=1)] | None = None
    """Sources that are written. `null` writes all."""


def _places(spec: IngestSpec) -> dict[str, str]:
    """Return all places that tasks of an ingest read or write, by setting. Those of a list get numbers."""
    found = {"input": spec.input, "out": spec.out}
    for name, source in spec.sources.items():
        pool, start = source.pool, f"sources.{name}"
        found |= _numbered(f"{start}.table", source.table) | _numbered(f"{start}.media_root", source.media_root)
        if pool:
            found |= _numbered(f"{start}.pool.table", pool.table)
            found |= _numbered(f"{start}.pool.media_root", pool.media_root)
        if isinstance(source.instruction, FromPrompts):
            found[f"{start}.instruction.mbeir"] = source.instruction.mbeir
    return {setting: url for setting, url in found.items() if url is not None}


def _places_of_index(spec: IndexSpec) -> dict[str, str]:
    found = {"out": spec.out}
    for name, source in spec.sources.items():
        found |= _numbered(f"sources.{name}.urls", source.urls)
    return found


def _numbered(setting: str, urls: str | list[str] | None) -> dict[str, str]:
    if isinstance(urls, list):
        return {f"{setting}[{number}]": url for number, url in enumerate(urls)}
    return {} if urls is None else {setting: urls}


def _lacks_query(source: TableSource) -> bool:
    return source.query is None and source.positive is not None


CORPUS = Kind(
    name="corpus",
    spec=CorpusSpec,
    run="jobs.data.corpus:run",
    reads={},
    makes={"out": "folder of files with captions"},
    local="draws files into a local folder",
    resumes=False,
    no_effect=(
        NoEffect("corpus.pages_per_document", lambda spec: not spec.corpus.num_documents, "corpus.num_documents is 0"),
        NoEffect("corpus.repeats", lambda spec: not spec.corpus.num_repeated, "corpus.num_repeated is 0"),
        NoEffect("corpus.clip_frames", lambda spec: not spec.corpus.num_clips, "corpus.num_clips is 0"),
        NoEffect("corpus.hard_fraction", lambda spec: not spec.corpus.num_images, "corpus.num_images is 0"),
    ),
)
EMOJI = Kind(
    name="emoji",
    spec=EmojiSpec,
    run="jobs.data.emoji:run",
    reads={},
    makes={"out": "folder of pictures with names, and retrieval datasets"},
    local="writes files into a local folder",
    resumes=False,
)
INGEST = Kind(
    name="ingest",
    spec=IngestSpec,
    run="jobs.data.ingest:run",
    reads={"input": "folder of files", "sources": "tables"},
    makes={"out": "dataset: shards, indices, report, manifest"},
    fingerprint="jobs.data.ingest:fingerprint",
    gpus=no_gpus,
    places=_places,
    no_effect=(
        NoEffect(
            "keep_uncaptioned",
            lambda spec: spec.input is None and not any(map(_lacks_query, spec.sources.values())),
            "rows of tables have both sides",
        ),
        NoEffect("media.page_pixels", lambda spec: not spec.materialized, "pages are stored as they are"),
        NoEffect("media.frames", lambda spec: not spec.materialized, "videos are stored as they are"),
        NoEffect("media.fps", lambda spec: not spec.materialized, "videos are stored as they are"),
    ),
)
INDEX = Kind(
    name="index",
    spec=IndexSpec,
    run="jobs.data.index:run",
    reads={"sources": "external shards"},
    makes={"out": "dataset: indices, report, manifest"},
    fingerprint="jobs.data.index:fingerprint",
    gpus=no_gpus,
    places=_places_of_index,
    no_effect=(NoEffect("media", lambda spec: not spec.decode, "decode: false opens no file"),),
)
EXPORT_DATA = Kind(
    name="export_data",
    spec=ExportDataSpec,
    run="jobs.data.export_data:run",
    reads={"data": "dataset"},
    inputs=lambda spec: {"data": "dataset"},
    makes={"out": "files of the format, report, spec that reads them back"},
    gpus=no_gpus,
)
