"""Settings of a training run apart from the science: its place, cluster, checkpoints and tracking."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipelines.config import Config, NonNegativeInt, PositiveFloat, PositiveInt


class ClusterConfig(Config):
    """What a training run asks of the cluster."""

    workers: PositiveInt = 1
    """Number of Ray Train workers, one torch rank each (paper: 16 GPUs)."""
    cpus_per_worker: PositiveFloat = 1.0
    """Logical CPUs that each worker reserves. All workers together must leave CPUs for the data loader."""
    gpus_per_worker: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that each worker reserves. With 0, workers train on the CPU with gloo."""
    threads_per_worker: PositiveInt = 1
    """CPU threads that torch uses within a worker."""
    chunk_tokens: PositiveInt | Literal["auto"] | None = None
    """Gradient caching: the number of tokens that a worker embeds at once, visual tokens and padding included. A worker
    embeds every chunk twice unless there is only one, and a re-ranker reads every chunk once. Memory is then that of a
    chunk for any batch size, and results do not change. `null` embeds all inputs at once. `auto` finds the largest
    chunk that fits before the first step. It is kept in `chunk.json` of the run, so that a resumed run has the same."""
    memory_gib: PositiveFloat | None = None
    """Memory of a worker in GiB, for `chunk_tokens: auto` and `rzen plan`. `null` is all of a worker's GPU, or its
    share of the free memory of its machine."""
    autoscaling: bool = False
    """Whether the cluster can grow. `true` skips the check that it is large enough when the job starts. Without that
    check, a job on a cluster that is too small would wait indefinitely."""
    max_restarts: NonNegativeInt = 3
    """How often the run restarts from its last checkpoint after it lost a worker or node."""


class CheckpointConfig(Config):
    """Checkpoints: trained parameters and optimizer moments. Batches and random numbers follow from the step."""

    every_steps: PositiveInt = 200
    """Steps between two checkpoints. An interrupted run repeats at most this many steps."""
    keep: PositiveInt = 2
    """How many checkpoints to keep. Older ones are deleted."""
    keep_best: bool = True
    """Whether to keep the best checkpoint, too, and publish its model as `best/` unless it is the last. The best has
    the highest held-out score (`eval`). Without one, it has the highest mean accuracy in the training batches since
    the checkpoint before it."""


class EvalConfig(Config):
    """Scores on held-out samples while a run trains. They change no weights.

    The score is hit@1: queries of a source are searched among the targets of its samples. It is small and quick. A job
    of kind `evaluate` searches whole datasets.
    """

    every_steps: PositiveInt | None = None
    """Steps between two scores. One more is taken before the first step, and one after the last. `null` takes
    `checkpoint.every_steps`, so that each checkpoint has its score."""
    samples: PositiveInt = 100
    """Samples of each source, evenly spread over its held-out split. Those that cannot be decoded are left out, and so
    are graded ones. Each worker keeps its share encoded in memory. One score costs about as much as a third of a
    training step with as many samples."""


class TrackingConfig(Config):
    """Where the metrics of every step go, in addition to `metrics.jsonl` and Ray's metrics."""

    tensorboard: bool = True
    """Whether to write event files to `{root}/{name}/tensorboard/`."""
    mlflow: str | None = None
    """Tracking URI of MLflow. MLflow reads credentials from its environment variables on the workers."""
    wandb: bool = False
    """Whether to log to Weights & Biases. It reads key, entity and mode from its environment variables on the
    workers."""
    project: str = "rzen"
    """Name of the MLflow experiment and of the W&B project."""


class RunConfig(Config):
    """Where a training run is stored: `{root}/{name}/`."""

    root: str = "runs"
    """Directory or s3:// URL that holds the folder of the run."""
    endpoint: str | None = None
    """S3 endpoint of `root`. `null` uses AWS_ENDPOINT_URL from the environment."""
    overwrite: bool = False
    """What happens if a run of this name with other settings exists: `false` reports an error, `true` deletes it and
    restarts from scratch."""
    log_every_steps: PositiveInt = 10
    """Steps between two lines of progress, where output is not a terminal."""
    tracking: TrackingConfig = TrackingConfig()
    """Other places that the metrics go to."""
