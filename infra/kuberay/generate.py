"""Generates manifests: RayJobs and the RayService from the specs in jobs/, the PrometheusRule from the alert rules.

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

The RayService has a group of its own, with one GPU a node, because a replica needs no more. No shell reads its
settings: the server itself fills in $RZEN_STORE.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
from pathlib import Path
from typing import Any, cast

import yaml

from infra.kuberay.shipped import JOBS, KEYS, READER, RETRAIN, SERVE, WORKER, Job
from jobs.runtime import lease
from jobs.runtime.dispatch import named_specs
from jobs.serving.serve import serve_config
from jobs.serving.specs import ServeSpec
from jobs.spec.job import JobConfig
from jobs.spec.kinds import gpus_of, local_places
from jobs.spec.load import check, override, read_document
from pipelines.errors import UserError

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CLUSTER = HERE / "base" / "raycluster.yaml"
RULES = HERE.parent / "monitoring" / "rules.yaml"
_GPU = "nvidia.com/gpu"
_STORE = "s3://store"  # stands for $RZEN_STORE, which the head knows, where specs are checked


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
    written[HERE / "serve" / "rayservice.yaml"] = _yaml(rayservice("rzen-serve", SERVE))
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


def rayservice(name: str, job: Job) -> dict[str, Any]:
    """The manifest of a server."""
    spec = served_spec(job)
    cluster = copy.deepcopy(yaml.safe_load(CLUSTER.read_text())["spec"])
    head = cluster["headGroupSpec"]["template"]["spec"]
    head["serviceAccountName"] = job.account
    _read_only(head)
    (on_demand,) = (group for group in cluster["workerGroupSpecs"] if group["groupName"] == "train")
    most = (spec.max_replicas or spec.replicas) * spec.gpus_per_replica
    cluster["workerGroupSpecs"] = [_serving(on_demand, math.ceil(most))]
    for pod in (head, on_demand["template"]["spec"]):
        # Where the operator and its Service look for the proxy of Ray Serve.
        pod["containers"][0]["ports"].append({"name": "serve", "containerPort": spec.port})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": name},
        "spec": {
            # Applied, it does nothing; started, it makes its cluster.
            "suspend": True,
            # A change of this text alone is applied in place. Any other makes a new cluster, and for a while twice the
            # nodes. Requests go to the old one until the new one answers.
            "serveConfigV2": yaml.dump(serve_config(spec), sort_keys=False, width=120),
            "upgradeStrategy": {"type": "NewCluster"},
            # Requests that have begun on the old cluster are answered.
            "rayClusterDeletionDelaySeconds": 120,
            # The head takes no replica, and its proxy would be one more hop.
            "excludeHeadPodFromServeSvc": True,
            "rayClusterConfig": cluster,
        },
    }


def served_spec(job: Job) -> ServeSpec:
    """Return the checked spec of a server, with $RZEN_STORE where it reads the store."""
    document = override(read_document(ROOT / "jobs" / job.spec), list(job.set))
    spec = check(document)
    assert isinstance(spec, ServeSpec)
    return spec


def _serving(group: dict[str, Any], nodes: int) -> dict[str, Any]:
    """Return a group of so many nodes with one GPU each, made of one of larger nodes."""
    pod = group["template"]["spec"]
    pod["serviceAccountName"] = READER
    _read_only(pod)
    (container,) = pod["containers"]
    for kind in ("requests", "limits"):
        container["resources"][kind] = {"cpu": "8", "memory": "64Gi", "ephemeral-storage": "122Gi", _GPU: "1"}
    # Shared memory for Ray's object store, 30 % of the memory. On disk, what it may spill, and models.
    sizes = {"shm": {"medium": "Memory", "sizeLimit": "20Gi"}, "scratch": {"sizeLimit": "120Gi"}}
    pod["volumes"] = [{"name": volume, "emptyDir": size} for volume, size in sizes.items()]
    pod["volumes"].append({"name": "api-keys", "secret": {"secretName": "rzen-api-keys"}})
    container["volumeMounts"].append({"name": "api-keys", "mountPath": KEYS, "readOnly": True})
    return group | {"groupName": "serve", "maxReplicas": nodes}


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
        _secret(pod)["name"] = WORKER


def _read_only(pod: dict[str, Any]) -> None:
    """Give a pod the Secret with keys that only read."""
    _secret(pod)["name"] = READER


def _secret(pod: dict[str, Any]) -> dict[str, Any]:
    (container,) = pod["containers"]
    (secret,) = [entry["secretRef"] for entry in container["envFrom"] if "secretRef" in entry]
    return cast(dict[str, Any], secret)


class _Dumper(yaml.SafeDumper):
    """Without anchors: what stands for something stands there. A text of several lines is a block."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", data, style="|" if "\n" in data else None)


_Dumper.add_representer(str, _Dumper.represent_str)


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
