"""Settings of kind `train`: one training run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from jobs.spec.job import JobConfig, Name
from jobs.spec.run import CheckpointConfig, ClusterConfig, EvalConfig, RunConfig
from pipelines.config import DataConfig, FeedConfig, NonNegativeInt, PositiveFloat, PositiveInt
from rzen.config import (
    AnyObjectiveConfig,
    ModelConfig,
    ModelIdentity,
    ObjectiveConfig,
    OptimConfig,
    PairPromptConfig,
    PromptConfig,
    RerankerIdentity,
    identity_of,
    prompt_setting,
)


class TrainSpec(JobConfig):
    """Train one stage: batches, objective, checkpoints, and a model at the end."""

    kind: Literal["train"]
    """Must be `train`."""
    name: Name
    """Name of the run: its folder below `run.root` and the label of its metrics."""
    run: RunConfig = RunConfig()
    """Where the run is stored."""
    data: DataConfig
    """Dataset, mixture and decoding."""
    feed: FeedConfig = FeedConfig()
    """How samples reach the workers."""
    model: ModelConfig
    """Backbone, prompt and which weights are trained."""
    init_adapter: str | None = None
    """Adapter to continue from (directory or s3:// URL), such as that of stage 1. Its rank, alpha, dropout and modules
    hold, and it must have been trained on this backbone. `null` starts a new adapter."""
    objective: AnyObjectiveConfig = ObjectiveConfig()
    """What is trained, and its loss: an embedder (`kind: contrastive`, the default) or a re-ranker (`kind: rerank`)."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate schedule."""
    global_batch: Annotated[int, Field(ge=2)] = 768
    """Samples of one optimizer step over all workers. An embedder contrasts each with all others (paper: 768). A
    re-ranker reads each with its negatives."""
    steps: PositiveInt | None = None
    """Number of optimizer steps. `null` derives it from `epochs`."""
    epochs: PositiveFloat = 1.0
    """Passes over the data, if `steps` is null (paper: 1). A pass has the whole batches of all sources together. With
    `data.mixture.weights`, sources are seen more or less often than that. The job prints the epochs of each source, and
    `done.json` has what was trained on."""
    seed: NonNegativeInt = 0
    """Seed of batches, new weights and dropout."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """When checkpoints are written and which are kept."""
    eval: EvalConfig | None = EvalConfig()
    """Scores on the `held_out` split of `data.root` while the run trains, for the sources that it trains on. `null`, or
    a dataset without this split: no scores."""
    cluster: ClusterConfig = ClusterConfig()
    """Workers and what they reserve."""

    @model_validator(mode="after")
    def _possible(self) -> TrainSpec:
        if self.init_adapter is not None and self.model.tune != "lora":
            raise ValueError("init_adapter needs model.tune: lora")
        self._check_frames()
        if isinstance(self.objective, ObjectiveConfig):
            self._check_contrast(self.objective)
        else:
            self._check_rerank()
        if self.model.quantize and self.optim.zero_stage == 3:
            raise ValueError(f"model.quantize={self.model.quantize} works with optim.zero_stage 1 and 2 only")
        if self.model.quantize and not self.cluster.gpus_per_worker:
            raise ValueError(f"model.quantize={self.model.quantize} needs a CUDA GPU; set cluster.gpus_per_worker")
        return self

    @property
    def identity(self) -> ModelIdentity | RerankerIdentity:
        """What the trained model is saved with: prompt and readout of an embedder, or the prompt of a re-ranker."""
        return identity_of(self.model, self.objective)

    @property
    def prompt(self) -> PromptConfig | PairPromptConfig:
        """How samples become token sequences: by the prompt of an embedder, or of a re-ranker."""
        return self.model.prompt if isinstance(self.objective, ObjectiveConfig) else self.objective.prompt

    def _check_frames(self) -> None:
        groups, tokens = -(-self.data.media.frames // 2), self.prompt.max_visual_tokens
        if groups > tokens and self.prompt.template != "rzen_release":
            problem = f"data.media.frames={self.data.media.frames} need {groups} tokens of a video at least"
            raise ValueError(f"{problem}, above {prompt_setting(self.objective)}.max_visual_tokens={tokens}")

    def _check_rerank(self) -> None:
        if not self.data.negatives_per_sample:
            raise ValueError(
                "objective.kind: rerank needs negatives for each query; set data.negatives_per_sample, and"
                " data.candidates for those of a candidate table"
            )
        if self.model.identity != ModelIdentity():
            raise ValueError(
                "model.prompt and model.readout are those of embedders; a re-ranker has objective.prompt, and answers"
                " at its last token"
            )

    def _check_contrast(self, all_tasks: ObjectiveConfig) -> None:
        for task in ["", *all_tasks.tasks]:
            place = f"objective.tasks.{task}" if task else "objective"
            objective = all_tasks.of_task(task)
            if not (objective.in_batch or self.data.negatives_per_sample):
                raise ValueError(f"{place}.in_batch: false leaves no negatives; set data.negatives_per_sample")
            if objective.distillation and not (self.data.candidates and self.data.negatives_per_sample):
                raise ValueError(
                    f"{place}.distillation learns a teacher's scores of candidates; set data.candidates and"
                    " data.negatives_per_sample"
                )
            if objective.embedding_distillation and self.data.teacher_vectors is None:
                raise ValueError(
                    f"{place}.embedding_distillation learns from a teacher's vectors; set data.teacher_vectors"
                )
