"""Kind `judge`: the candidates of a table get the scores of a judge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from jobs.embedding.specs import Workers
from jobs.spec.job import JobConfig
from jobs.spec.kinds import Kind
from jobs.spec.no_effect import NoEffect
from pipelines.config import Config, DataConfig, NonNegativeInt, PositiveFloat, PositiveInt
from rzen.config import Dtype, PairPromptConfig, PairTemplateName

NonNegativeFloat = Annotated[float, Field(ge=0)]


class ModelJudge(Config):
    """A re-ranker, or any checkpoint of a supported family with its language-model head."""

    base: str
    """Checkpoint: a directory, an s3:// URL or a hub name."""
    adapter: str | None = None
    """Adapter: a directory or an s3:// URL."""
    prompt: PairPromptConfig | None = None
    """How a pair is asked about. `null`: as the model was trained, and as Qwen3-VL-Reranker where it does not say."""
    dtype: Dtype | None = None
    """Compute type; that of the export where not given."""


class ApiJudge(Config):
    """A model behind an OpenAI-compatible endpoint that returns `logprobs`."""

    url: str
    """Base URL of the API, such as `https://api.openai.com/v1` or `http://vllm:8000/v1`."""
    model: str
    """Name of the model. Kept scores go by it, and not by the URL."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the API key. Servers without keys need none."""
    template: PairTemplateName = "qwen3_reranker"
    """How a pair is asked about."""
    max_text_chars: PositiveInt = 8000
    """Characters of text that the query keeps, and the document. Longer texts are cut."""
    max_image_pixels: PositiveInt = 1280 * 28 * 28
    """Larger images, pages and frames are made smaller, and sent as JPEG."""
    concurrency: PositiveInt = 16
    """Requests at a time."""
    requests_per_minute: PositiveFloat | None = None
    """Requests are spread evenly to keep below this rate. `null`: no limit."""
    retries: NonNegativeInt = 8
    """How often a request is repeated after 429, a server error or a cut connection, with growing pauses."""
    timeout_s: PositiveFloat = 120.0
    """Seconds to wait for an answer."""
    input_price: NonNegativeFloat = 0.0
    """Price of a million input tokens, in any currency."""
    output_price: NonNegativeFloat = 0.0
    """Price of a million output tokens."""
    max_cost: PositiveFloat | None = None
    """The job stops before it costs more than this, by the prices above. Answers so far are kept."""


class JudgeSpec(Workers, JobConfig):
    """Score the candidates of a table with a re-ranker or a model behind an endpoint."""

    kind: Literal["judge"]
    """Must be `judge`."""
    table: str
    """Candidate table that a job of kind `mine` or `select` wrote: a directory or an s3:// URL."""
    data: DataConfig
    """Dataset of the table. Its split is the table's."""
    model: ModelJudge | None = None
    """The checkpoint that scores."""
    api: ApiJudge | None = None
    """The endpoint that scores, instead of `model`."""
    top_k: PositiveInt | None = None
    """Only the first candidates of each sample are scored, up to this many. `null`: all."""
    out: str
    """Directory or s3:// URL of the table with scores. Scores are kept in `scores/` there, and not made again."""
    endpoint: str | None = None
    """S3 endpoint of `table`, `out` and the model; the environment's AWS_ENDPOINT_URL where not given."""

    @model_validator(mode="after")
    def _one_judge(self) -> JudgeSpec:
        if (self.model is None) == (self.api is None):
            given = "neither" if self.model is None else "both"
            raise ValueError(f"{given} of model and api are set: one judge scores; set the other one to null")
        return self


def _gpus(spec: JudgeSpec, named: Sequence[JobConfig]) -> float:
    return spec.actors * spec.gpus_per_actor if spec.model else 0.0


def _always(spec: JudgeSpec) -> bool:
    return True


def _asks_an_endpoint(spec: JudgeSpec) -> bool:
    return spec.api is not None


_LOCAL_ONLY = ("chunk_tokens", "actors", "cpus_per_actor", "gpus_per_actor", "autoscaling")

JUDGE = Kind(
    name="judge",
    spec=JudgeSpec,
    run="jobs.judging.judge:run",
    reads={"table": "candidate table", "data": "dataset", "model": "checkpoint with its language-model head"},
    makes={"out": "candidate table with the scores of a judge"},
    inputs=lambda spec: {"table": "table", "data": "dataset", "model": "checkpoint"},
    gpus=_gpus,
    no_effect=(
        NoEffect("data.split", _always, "the table decides"),
        NoEffect("data.mixture", _always, "every sample of the table is judged"),
        NoEffect("data.negatives_per_sample", _always, "candidates of the table only are judged"),
        NoEffect("data.max_bad_fraction", _always, "pairs that cannot be read are counted, and have no score"),
        *(NoEffect(name, _asks_an_endpoint, "an endpoint judges") for name in _LOCAL_ONLY),
    ),
)
