"""What `generate.py` makes manifests of: shipped specs, with what is changed in them on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

READER, WORKER = "rzen-reader", "rzen-worker"
KEYS = "/etc/rzen/api-keys"
"""Folder in the pods of the server, with the file `keys` of the Secret rzen-api-keys. The server sees changes of it."""

_ADAPTER = "$RZEN_STORE/runs/{}/adapter"
_SOUP = "$RZEN_STORE/runs/soups/uniform/adapter"


@dataclass(frozen=True)
class Job:
    """A shipped spec on a cluster that starts without workers, with all that it reads and writes below RZEN_STORE."""

    spec: str
    """File in jobs/."""
    set: tuple[str, ...] = ()
    """What is changed in it; the shell of the head's pod fills in $RZEN_STORE."""
    account: str = "rzen-head"
    """Service account of the driver."""
    deadline_s: int = 7 * 86400
    """After so long an attempt of the job is ended."""
    tasks_write: bool = False
    """Its tasks on nodes without GPU write to the store: shards, indexes, or listings of what is embedded."""


JOBS = {
    "ingest": Job(
        "tables.yaml",
        (
            "sources.products.table=$RZEN_STORE/tables/products.csv",
            "sources.products.media_root=$RZEN_STORE/tables",
            "out=$RZEN_STORE/data",
        ),
        tasks_write=True,
    ),
    "index": Job("index.yaml", ("out=$RZEN_STORE/data", "sources.pairs.urls=[$RZEN_STORE/shards]"), tasks_write=True),
    "export-data": Job("export_data.yaml", ("data=$RZEN_STORE/data", "out=$RZEN_STORE/exported"), tasks_write=True),
    "curate": Job(
        "curate.yaml",
        ("data.root=$RZEN_STORE/data", "out=$RZEN_STORE/curation", "cache=$RZEN_STORE/curation-cache"),
        tasks_write=True,
    ),
    "stage1": Job(
        "stage1.yaml", ("data.root=$RZEN_STORE/data", "run.root=$RZEN_STORE/runs", "cluster.autoscaling=true")
    ),
    "stage2": Job(
        "stage2.yaml",
        (
            "data.root=$RZEN_STORE/data",
            "run.root=$RZEN_STORE/runs",
            f"init_adapter={_ADAPTER.format('stage1')}",
            "cluster.autoscaling=true",
        ),
    ),
    "finetunes": Job(
        "finetunes.yaml",
        (
            "set.data.root=$RZEN_STORE/data",
            "set.run.root=$RZEN_STORE/runs",
            f"set.init_adapter={_ADAPTER.format('stage1')}",
            "set.cluster.autoscaling=true",
            "out=$RZEN_STORE/runs/soups",
        ),
    ),
    "soup": Job(
        "soup.yaml",
        (
            *(f"models.{name}.adapter={_ADAPTER.format(name)}" for name in ("balanced", "images", "documents")),
            "out=$RZEN_STORE/soups",
        ),
    ),
    "evaluate": Job(
        "evaluate.yaml",
        (
            *(
                f"models.{name}.adapter={_ADAPTER.format(name)}"
                for name in ("stage1", "balanced", "images", "documents")
            ),
            f"models.soup.adapter={_SOUP}",
            "data.root=$RZEN_STORE/data",
            "actors=6",
            "gpus_per_actor=1",
            "autoscaling=true",
            "cache=$RZEN_STORE/vector-cache",
            "out=/tmp/evaluation",  # on the head, and gone with it 12 hours later; the table is in the log
        ),
        tasks_write=True,
    ),
    "evaluate-reranker": Job(
        "evaluate_reranker.yaml",
        (
            f"models.soup.adapter={_SOUP}",
            f"rerank.model.adapter={_ADAPTER.format('reranker')}",
            "data.root=$RZEN_STORE/data",
            "rerank.tune.root=$RZEN_STORE/validation",
            "actors=8",
            "gpus_per_actor=1",
            "autoscaling=true",
            "cache=$RZEN_STORE/vector-cache",
            "out=/tmp/evaluation",  # as that of `evaluate`
        ),
        tasks_write=True,
    ),
    "export": Job("export.yaml", (f"model.adapter={_SOUP}", "out=$RZEN_STORE/model")),
    "embed": Job(
        "embed.yaml",
        (
            "model=$RZEN_STORE/model",
            "data.root=$RZEN_STORE/data",
            "out=$RZEN_STORE/vectors",
            "actors=8",
            "autoscaling=true",
        ),
        tasks_write=True,
    ),
    "mine": Job(
        "mine.yaml",
        (
            "model=$RZEN_STORE/model",
            "data.root=$RZEN_STORE/data",
            "out=$RZEN_STORE/negatives",
            "actors=8",
            "autoscaling=true",
        ),
        tasks_write=True,
    ),
    "judge": Job(
        "judge.yaml",
        (
            "table=$RZEN_STORE/negatives/mined",
            "data.root=$RZEN_STORE/data",
            "out=$RZEN_STORE/judged",
            "actors=8",
            "autoscaling=true",
        ),
        tasks_write=True,
    ),
    "reranker": Job(
        "reranker.yaml",
        (
            "data.root=$RZEN_STORE/data",
            "data.candidates=$RZEN_STORE/negatives/mined",
            "run.root=$RZEN_STORE/runs",
            "cluster.autoscaling=true",
        ),
    ),
    "select": Job("select.yaml", ("table=$RZEN_STORE/judged", "out=$RZEN_STORE/selected")),
    "cluster": Job("cluster.yaml", ("table=$RZEN_STORE/negatives/mined", "out=$RZEN_STORE/clustered")),
}
"""Name of a RayJob -> the job."""

RETRAIN = Job(
    "retrain.yaml",
    (
        "set.data.root=$RZEN_STORE/data",
        "set.run.root=$RZEN_STORE/runs",
        "set.cluster.autoscaling=true",
        "evaluate.set.data.root=$RZEN_STORE/frozen",
        "evaluate.set.gpus_per_actor=1",
        "evaluate.set.autoscaling=true",
        "corpus={spec: embed.yaml, set: {data: {root: $RZEN_STORE/data}, actors: 8, autoscaling: true}}",
        "registry=$RZEN_STORE/registry",
    ),
    account="rzen-promoter",
    deadline_s=3 * 86400,
    tasks_write=True,
)
"""The job of retrain/cronjob.yaml."""


SERVE = Job(
    "serve.yaml",
    (
        "model=null",
        "registry=$RZEN_STORE/registry",
        "host=0.0.0.0",
        f"api_keys={KEYS}/keys",
        "canary={fraction: 0.1}",
        "replicas=1",
        "max_replicas=8",
        "gateways=2",
        "cpus_per_replica=6",
        "gpus_per_replica=1",
    ),
    account="rzen-serve",
)
"""The server of serve/rayservice.yaml. Its nodes decode what users send, so they only read the store."""
