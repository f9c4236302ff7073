"""Generates manifests: RayJobs from the specs in jobs/, the PrometheusRule from the alert rules.

    python -m infra.kuberay.generate            writes the files
    python -m infra.kuberay.generate --check    exit status 1 if one of them is not what would be written

Each RayJob has its own cluster: the head, and the groups of base/raycluster.yaml that its spec needs. They have as many
nodes as it can use. Kinds that need local files have no RayJob. `local` in their declaration says why. A spec
whose tasks would look for a local file is an error, which names the setting.
`tests/infra/test_kuberay.py` runs the check, and passes each command through the shell that reads it.

The operator itself submits the Ray job and asks for its status (HTTPMode), with the token of `authOptions`
(kuberay#4210). In the other modes, a pod submits the job and follows its log. There the end of the log stream is the
end of the job: 30 s later, the operator deletes the cluster of a job that still runs (kuberay#4921, #5099, #5100).

When the head's pod is replaced, the operator submits the job to the new head (kuberay#4824). Later versions may fail
the RayJob, and then `backoffLimit` starts it again (kuberay#4984). In both cases, the job waits for the lease that the
lost driver held, and resumes.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from jobs.runtime import lease
from jobs.runtime.dispatch import named_specs
from jobs.spec.job import JobConfig
from jobs.spec.kinds import gpus_of, local_places
from jobs.spec.load import check, override, read_document
from pipelines.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLUSTER = HERE / "base" / "raycluster.yaml"
RULES = HERE.parent / "monitoring" / "rules.yaml"
READER, WORKER = "rzen-reader", "rzen-worker"
_GPU = "nvidia.com/gpu"
_STORE = "s3://store"  # stands for $RZEN_STORE, which the head knows, where specs are checked

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
        "registry=$RZEN_STORE/registry",
    ),
    account="rzen-promoter",
    deadline_s=3 * 86400,
    tasks_write=True,
)
"""The job of retrain/cronjob.yaml."""


def files() -> dict[Path, str]:
    """Path -> content of every generated file."""
    written = {HERE / "jobs" / f"{name}.yaml": _yaml(rayjob(name, job)) for name, job in JOBS.items()}
    written[HERE / "jobs" / "kustomization.yaml"] = _yaml(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": [f"{name}.yaml" for name in JOBS],
        }
    )
    written[HERE / "retrain" / "rayjob.yaml"] = _yaml(rayjob("retrain", RETRAIN))
    written[HERE / "base" / "prometheusrule.yaml"] = _yaml(
        {
            "apiVersion": "monitoring.coreos.com/v1",
            "kind": "PrometheusRule",
            "metadata": {"name": "rzen", "labels": {"release": "prometheus"}},
            "spec": yaml.safe_load(RULES.read_text()),
        }
    )
    return written


def rayjob(name: str, job: Job) -> dict[str, Any]:
    """The manifest of a job."""
    spec, *named = specs(job)
    gpus = gpus_of(spec, named)
    cluster = copy.deepcopy(yaml.safe_load(CLUSTER.read_text())["spec"])
    head = cluster["headGroupSpec"]["template"]["spec"]
    head["serviceAccountName"] = job.account
    # Pods of an attempt may outlive it by their grace, and its driver holds its leases for as long (kuberay#5211).
    patience_s = head["terminationGracePeriodSeconds"] + 50
    head["containers"][0]["env"].append({"name": lease.PATIENCE, "value": str(patience_s)})
    cluster["workerGroupSpecs"] = list(filter(None, (_sized(group, gpus) for group in cluster["workerGroupSpecs"])))
    if job.tasks_write:
        for group in cluster["workerGroupSpecs"]:
            _let_write(group["template"]["spec"])
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            # Applied, it does nothing; started, it makes its cluster.
            "suspend": True,
            "submissionMode": "HTTPMode",
            "entrypoint": command(job),
            "rayClusterSpec": cluster,
            "shutdownAfterJobFinishes": True,
            # Time to read the log, which is gone with the head, and results that are only there. The other nodes have
            # gone by then, idle.
            "ttlSecondsAfterFinished": 12 * 3600,
            "activeDeadlineSeconds": job.deadline_s,
            # A head that does not come up within an hour is an error to be told.
            "preRunningDeadlineSeconds": 3600,
            # Two new clusters at most for a job that has failed. It resumes, so a lost head costs the steps since its
            # last checkpoint. A mistake in a spec shows on the head, before any other node has started.
            "backoffLimit": 2,
        },
    }


def command(job: Job) -> str:
    """Return the entrypoint. The head's shell reads it, and fills in RZEN_STORE."""
    words = ["rzen", "run", f"jobs/{job.spec}"]
    return " ".join([*words, *(word for setting in job.set for word in ("--set", f'"{setting}"'))])


def specs(job: Job) -> list[JobConfig]:
    """The checked spec of a job and those that it names.

    Raises `UserError` if one is not valid, or names a place on a local disk for tasks on other nodes.
    """
    changes = [setting.replace("$RZEN_STORE", _STORE) for setting in job.set]
    document = override(read_document(ROOT / "jobs" / job.spec), changes)
    spec = check(document)
    named = named_specs(spec, document)
    for one in (spec, *named):
        for setting, place in local_places(one).items():
            problem = f"{setting}={place} is on a local disk, and pods share none"
            raise UserError(f"jobs/{job.spec}", problem, f'add "{setting}=$RZEN_STORE/..." to its changes')
    return [spec, *named]


def _sized(group: dict[str, Any], gpus: float) -> dict[str, Any] | None:
    """The group with as many nodes as hold so many GPUs; None if it has GPUs and none are wanted."""
    (container,) = group["template"]["spec"]["containers"]
    gpus_per_node = int(container["resources"]["limits"].get(_GPU, 0))
    if not gpus_per_node:
        return group
    return group | {"maxReplicas": math.ceil(gpus / gpus_per_node)} if gpus else None


def _let_write(pod: dict[str, Any]) -> None:
    """Give a decoding pod the account of workers, and the Secret of that name instead of the one that only reads."""
    if pod["serviceAccountName"] == READER:
        pod["serviceAccountName"] = WORKER
        (container,) = pod["containers"]
        (secret,) = [entry["secretRef"] for entry in container["envFrom"] if "secretRef" in entry]
        secret["name"] = WORKER


class _Dumper(yaml.SafeDumper):
    """Without anchors: what stands for something stands there."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _yaml(content: dict[str, Any]) -> str:
    header = (
        "# Written by infra/kuberay/generate.py; change that, jobs/, base/raycluster.yaml or the rules in its place.\n"
    )
    return header + yaml.dump(content, Dumper=_Dumper, sort_keys=False, width=120)


def main() -> int:
    """Writes, or with --check compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    stale = [path for path, text in files().items() if not path.is_file() or path.read_text() != text]
    for path in stale:
        sys.stderr.write(f"{path.relative_to(ROOT)}\n")
        if not options.check:
            path.write_text(files()[path])
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
