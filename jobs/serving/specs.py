"""Kinds `export`, `check`, `search` and `serve`: jobs that hand models and vectors to users."""

from __future__ import annotations

import os
from typing import Annotated, Literal

from pydantic import Field

from jobs.spec.job import JobConfig, Name, Named
from jobs.spec.kinds import InputType, Kind, no_gpus
from jobs.spec.model import ModelRef
from jobs.spec.no_effect import NoEffect
from pipelines.config import DataConfig, MediaConfig, PositiveFloat, PositiveInt
from pipelines.samples import Modality
from rzen.config import ModelIdentity, PairPromptConfig, PromptConfig, ReadoutConfig
from rzen.export.formats import ExportFormat
from rzen.serving.canary import CanaryConfig


class ExportSpec(ModelIdentity, JobConfig):
    """Merge an adapter into its base: a directory that other libraries load."""

    kind: Literal["export"]
    """Must be `export`."""
    model: ModelRef
    """Model to export."""
    prompt: PromptConfig = PromptConfig()
    """Prompt of a model whose files do not record the one it was trained with."""
    readout: ReadoutConfig = ReadoutConfig()
    """Readout of a model whose files do not record how its vectors are made."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the stored weights. Base and adapter are added in fp32 and rounded once. An adapter keeps its type."""
    format: ExportFormat = "model"
    """`model`: base and adapter merged, for AutoModel, sentence-transformers, vLLM and mteb. `adapter`: for PEFT.
    `rzen_release`: merged, for the script released with RzenEmbed, which reads Qwen2-VL with the prompt `rzen_release`
    and positions `1d` only. `reranker`: a re-ranker, merged, with its language-model head, for
    AutoModelForImageTextToText, CrossEncoder of sentence-transformers, and vLLM."""
    pair_prompt: PairPromptConfig = PairPromptConfig()
    """How a re-ranker asks about a pair, if its files do not record it."""
    frames: Annotated[int, Field(ge=2, multiple_of=2)] | None = None
    """Frames of a video in libraries that fix their number and derive the frame size from it. `null` takes
    `data.media.frames` of the training if its settings are next to the weights, and 8 otherwise."""
    instructions: Named[str] = Field(default_factory=dict)
    """Name -> instruction, for `task` of rzen's own search and for `encode(..., prompt_name=...)` of
    sentence-transformers. The name of a task of rzen replaces its instruction of queries."""
    dimensions: list[PositiveInt] | None = None
    """Smaller widths for `dimensions` of requests to vLLM and `rzen serve`. `null` takes `objective.matryoshka` of the
    training if its settings are next to the weights. Of a soup, it takes those that all parents were trained for."""
    scores: str | None = None
    """Local results.json of an evaluation of these weights, for the model card."""
    license: str | None = None
    """License identifier for the model card, such as apache-2.0."""
    languages: list[str] = Field(default_factory=list)
    """Codes of languages for the model card, such as en."""
    datasets: list[str] = Field(default_factory=list)
    """Names of training datasets on the hub, for the model card."""
    out: str
    """Directory or s3:// URL of the export. An earlier export there is replaced."""
    endpoint: str | None = None
    """S3 endpoint of the model and `out`. `null` uses AWS_ENDPOINT_URL from the environment."""


class CheckSpec(JobConfig):
    """Open an export in sentence-transformers, and compare its vectors with rzen's."""

    kind: Literal["check"]
    """Must be `check`."""
    model: str
    """Directory or s3:// URL written by a job of kind `export`, with format `model`."""
    data: DataConfig
    """Dataset whose queries and targets are compared."""
    num_samples: PositiveInt = 8
    """Samples of each source, the first ones."""
    tolerance: PositiveFloat = 1e-4
    """Largest difference of a number in a vector of length 1. Both compute in float32 on the CPU."""
    out: str
    """Directory or s3:// URL of `comparison.json`: the largest difference for each kind of input."""
    endpoint: str | None = None
    """S3 endpoint of the model and `out`. `null` uses AWS_ENDPOINT_URL from the environment."""


class SearchSpec(JobConfig):
    """Search an embedded corpus with texts, pictures, PDF pages or clips, and write an HTML report."""

    kind: Literal["search"]
    """Must be `search`."""
    queries: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] | None
    """Texts, and files or URLs of images, videos and pages of PDFs (`report.pdf#page=2`, from zero). A text with the
    name of such a file is the file. `null` takes a few captions of the corpus, or a few of its media where it has no
    captions."""
    text: Annotated[str, Field(min_length=1)] | None = None
    """Text that goes with each query that is a file: picture and text are then one query."""
    vectors: str | None
    """Directory or s3:// URL written by a job of kind `embed`. `null` takes those below `runs` that were written last,
    and prints which."""
    endpoint: str | None = None
    """S3 endpoint of the vectors and the model. `null` uses AWS_ENDPOINT_URL from the environment."""
    instruction: str | None = None
    """Instruction put before every query. `null`: that of a task which fits the query, such as `Find an image that
    matches the given caption:` for a text. There is none if the targets were embedded without instructions."""
    task: Annotated[str, Field(min_length=1)] | None = None
    """Task of the queries, as the model names it in `rzen.json`: `text_image`, `text_page`, `text_video`,
    `image_text_image`, `text_text`, `image_class`. It sets the instruction, and the only modality that may be found.
    Leave `instruction` out then."""
    modalities: Annotated[list[Modality], Field(min_length=1)] | None = None
    """Modalities that may be found. `null`: that of `task`, else all."""
    filters: list[Annotated[str, Field(min_length=1)]] = Field(default_factory=list)
    """Conditions for all hits: a column, an operator (`=`, `!=`, `<`, `<=`, `>`, `>=`) and values, such as
    `source=photos,scans`. Columns are split, source, index, modality, title, origin and target_sha256, and
    start_s and end_s if videos were divided into segments."""
    version: str | None = None
    """Earlier version of the vectors that is kept: a name in their folder `versions`. `null`: the live one."""
    top_k: PositiveInt = 12
    """Hits per query."""
    html: str | None = None
    """Local HTML file to write."""
    results: str | None = None
    """Local results.json of an evaluation whose table is added to the report."""
    curves: Named[str] = Field(default_factory=dict)
    """Name -> folder of a training run whose loss curve is added to the report."""


class ServeSpec(JobConfig):
    """Answer requests for vectors and searches over HTTP, until it is stopped."""

    kind: Literal["serve"]
    """Must be `serve`."""
    model: str | None = None
    """Exported model: a directory or an s3:// URL. A checkpoint or a hub name works, too. `null` with a `registry`."""
    registry: str | None = None
    """Registry of a job of kind `retrain` with `corpus`. The server answers with the model and the corpus that are
    promoted there, and follows promotions and rollbacks. Leave `model`, `adapter` and `corpus` out then."""
    adapter: str | None = None
    """LoRA adapter on top of the model."""
    adapters: Named[str] = Field(default_factory=dict)
    """Name -> LoRA adapter of this model. Clients ask for `model:name`, and for `model` without one. Its weights are in
    memory once. Adapters embed, and do not search."""
    corpus: str | None = None
    """Directory or s3:// URL written by a job of kind `embed` with this model, for `/v1/search`."""
    reranker: str | None = None
    """Re-ranker for `/rerank` and `/score`: a directory, an s3:// URL or a hub name. It answers in the same process."""
    name: Name | None = None
    """Name of the model for clients. `null`: the last part of `model`, `rzen` with a registry."""
    endpoint: str | None = None
    """S3 endpoint of the registry, the model and the corpus. `null` uses AWS_ENDPOINT_URL from the environment."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Compute type. `null`: that of the export, else float32 on a CPU and bfloat16 on a GPU."""
    dimensions: list[PositiveInt] | None = None
    """Widths that clients may ask for, those of `objective.matryoshka` in training. `null`: those that `config.json`
    names in `matryoshka_dimensions`. Other widths than these and the full one are refused."""
    reload_s: PositiveFloat | None = 30.0
    """How often the server looks whether model or corpus were replaced. It then loads them while it answers. A pair
    that does not belong together is not used. `null` never looks."""
    canary: CanaryConfig | None = None
    """Trial of a new model and corpus, which all replicas have together. `null` uses them at once."""
    host: str = "127.0.0.1"
    """Address to listen on. Others than loopback need keys, or `anonymous: true`."""
    port: Annotated[int, Field(ge=1, le=65535)] = 8000
    """Port to listen on."""
    api_keys: str | None = None
    """File with a key on each line, on every node that answers. `null` takes RZEN_API_KEYS from the environment, with
    commas between keys. Clients send `Authorization: Bearer KEY`."""
    anonymous: bool = False
    """Whether everybody who reaches another address than loopback may ask without a key."""
    allow_urls: list[str] = Field(default_factory=list)
    """Hosts that files may be fetched from: `cdn.example.com`, `.example.com` for all below, `*` for every public host,
    `10.0.0.7:9000` for one address of your network. Other private addresses are refused. Empty: URLs are refused."""
    replicas: PositiveInt = 1
    """Number of model replicas, at least."""
    max_replicas: PositiveInt | None = None
    """Most model replicas. Their number follows the load: it grows after 30 s of more, and shrinks after 10 minutes of
    less. `null` keeps `replicas`."""
    target_requests: PositiveFloat = 16.0
    """Requests at once, waiting ones included, that each replica should have if `max_replicas` is set. Our choice."""
    gateways: PositiveInt = 1
    """Number of processes that read and answer requests."""
    cpus_per_replica: PositiveFloat = 1.0
    """Logical CPUs of each model replica. As many threads decode."""
    gpus_per_replica: Annotated[float, Field(ge=0)] = 0.0
    """GPUs of each model replica."""
    chunk_tokens: PositiveInt = 16_384
    """Tokens embedded at once, visual tokens and padding included."""
    max_waiting_tokens: PositiveInt = 262_144
    """Tokens of accepted requests of a replica. Further requests get 429 with Retry-After."""
    max_requests: PositiveInt = 1024
    """Requests at once that a replica holds. As many wait for one."""
    max_inputs: PositiveInt = 2048
    """Inputs of a request."""
    max_body_bytes: PositiveInt = 64 << 20
    """Bytes of a request."""
    body_timeout_s: PositiveFloat = 20.0
    """Seconds for the body of a request, and one more for each 16 KB that arrive."""
    max_image_bytes: PositiveInt = 20 << 20
    """Bytes of an image after base64, or from a URL."""
    max_video_bytes: PositiveInt = 100 << 20
    """Bytes of a video or document after base64, or from a URL."""
    media: MediaConfig = MediaConfig()
    """Decoding. Queries of a corpus are decoded as its targets were."""
    detach: bool = False
    """Return when the server answers, and leave it on the cluster. The same command with other settings changes it
    without a pause. `false` stays until Ctrl-C."""


def _impossible_server(spec: ServeSpec) -> str | None:
    named = [name for name in ("model", "adapter", "corpus") if getattr(spec, name) is not None]
    if spec.registry is not None and named:
        return f"{named[0]} and registry exclude each other: the registry names model and corpus"
    if spec.adapters and (spec.adapter or spec.registry):
        return "adapters needs a model that stays the same, without an adapter of its own: set model, and no registry"
    if spec.registry is None and spec.model is None:
        return "neither model nor registry is set: name one of them"
    if spec.max_replicas is not None and spec.max_replicas < spec.replicas:
        return f"max_replicas={spec.max_replicas} is less than replicas={spec.replicas}: use at least as many, or null"
    if is_loopback(spec.host) or spec.api_keys or spec.anonymous or os.environ.get("RZEN_API_KEYS"):
        return None
    return f"host={spec.host} lets other machines ask without a key: set api_keys, or anonymous: true"


def _inputs_of_server(spec: ServeSpec) -> dict[str, InputType]:
    """Return what the driver can look at: on a cluster, replicas have other folders, and variables in URLs."""
    types: dict[str, InputType] = {"model": "embedder", "adapter": "adapter", "corpus": "vectors"}
    types |= {"reranker": "checkpoint", **{f"adapters.{name}": "adapter" for name in spec.adapters}}
    places = {key: spec.adapters[key.partition(".")[2]] if "." in key else getattr(spec, key) for key in types}
    elsewhere = "RAY_ADDRESS" in os.environ
    return {
        key: type_
        for key, type_ in types.items()
        if (place := places[key]) and not place.startswith("$") and not (elsewhere and "://" not in place)
    }


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    return host == "localhost" or host == "::1" or host.startswith("127.")


EXPORT = Kind(
    name="export",
    spec=ExportSpec,
    run="jobs.serving.export:run",
    reads={"model": "checkpoint and adapter", "scores": "scores for the model card"},
    makes={"out": "model for other libraries, with a model card"},
    inputs=lambda spec: {"model": "checkpoint"},
    gpus=no_gpus,
    no_effect=(
        NoEffect("frames", lambda spec: spec.format in ("adapter", "rzen_release"), "the format has no video settings"),
        NoEffect("pair_prompt", lambda spec: spec.format != "reranker", "only format: reranker asks about pairs"),
        NoEffect("prompt", lambda spec: spec.format == "reranker", "a re-ranker has a pair_prompt"),
        NoEffect("readout", lambda spec: spec.format == "reranker", "a re-ranker has no vectors"),
        NoEffect("instructions", lambda spec: spec.format != "model", "only format: model has files for them"),
        NoEffect("dimensions", lambda spec: spec.format == "adapter", "an adapter has no config.json"),
        NoEffect("dimensions", lambda spec: spec.format == "reranker", "scores have no width"),
        NoEffect("dtype", lambda spec: spec.format == "adapter", "an adapter keeps its type"),
    ),
)
CHECK = Kind(
    name="check",
    spec=CheckSpec,
    run="jobs.serving.check:run",
    reads={"model": "exported model", "data": "dataset"},
    makes={"out": "differences of the vectors"},
    inputs=lambda spec: {"model": "embedder", "data": "dataset"},
    local="needs sentence-transformers, which images do not have",
    resumes=False,
    no_effect=(
        NoEffect("data.mixture", lambda spec: True, "the first samples of each source are compared"),
        NoEffect("data.negatives_per_sample", lambda spec: True, "queries and targets only are compared"),
        NoEffect("data.max_bad_fraction", lambda spec: True, "bad samples are left out"),
    ),
)
SEARCH = Kind(
    name="search",
    spec=SearchSpec,
    run="jobs.serving.search:run",
    reads={"vectors": "vectors of a corpus", "results": "scores", "curves": "metrics of training runs"},
    makes={"html": "HTML report"},
    inputs=lambda spec: {"vectors": "vectors"},
    local="writes a local report",
    resumes=False,
    no_effect=(
        NoEffect("results", lambda spec: spec.html is None, "they are part of the report, and html is not set"),
        NoEffect("curves", lambda spec: spec.html is None, "they are part of the report, and html is not set"),
    ),
)
SERVE = Kind(
    name="serve",
    spec=ServeSpec,
    run="jobs.serving.serve:run",
    reads={
        "model": "exported model",
        "registry": "promoted model and corpus",
        "adapters": "adapters of the model",
        "corpus": "vectors of a corpus",
        "reranker": "re-ranker",
    },
    makes={},
    inputs=_inputs_of_server,
    local="runs until it is stopped, and a RayJob ends: it has a RayService",
    resumes=False,
    impossible=_impossible_server,
    no_effect=(
        NoEffect("canary", lambda spec: spec.reload_s is None, "reload_s is null, and nothing is replaced"),
        NoEffect("target_requests", lambda spec: spec.max_replicas is None, "max_replicas is not set"),
        NoEffect("anonymous", lambda spec: is_loopback(spec.host), "only this machine reaches a loopback address"),
    ),
)
