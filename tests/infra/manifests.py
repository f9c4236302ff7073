"""Kubernetes manifests held against schemas and against what the operator checks beyond them.

The schemas of KubeRay are not part of this repository: RZEN_KUBERAY_CRDS names a folder with its custom resource
definitions (rayclusters.yaml, rayjobs.yaml; helm-chart/kuberay-operator/crds of its repository), v1.7.
"""

import copy
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml

Manifest = dict[str, Any]
CRDS = os.environ.get("RZEN_KUBERAY_CRDS")
_FILES = {"RayCluster": "rayclusters.yaml", "RayJob": "rayjobs.yaml"}
_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")


def read(path: Path) -> list[Manifest]:
    """The documents of a file, without those that are not manifests."""
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def schema_problems(manifest: Manifest) -> list[str]:
    """What the API server would refuse in a RayCluster or RayJob, unknown fields included."""
    schema = _schema(manifest["kind"])
    filled = _with_defaults(schema, copy.deepcopy(manifest))
    return [
        f"{'.'.join(map(str, error.absolute_path))}: {error.message[:200]}"
        for error in jsonschema.Draft202012Validator(schema).iter_errors(filled)
    ]


@cache
def _schema(kind: str) -> Manifest:
    assert CRDS
    text = Path(CRDS, _FILES[kind]).read_text()
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [version for version in definition["spec"]["versions"] if version["storage"]]
    schema = _strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}  # the API server knows it by heart
    return schema


def _strict(node: Any) -> Any:
    """OpenAPI of a custom resource as JSON Schema that refuses unknown fields."""
    if isinstance(node, list):
        return [_strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    strict = {key: _strict(value) for key, value in node.items() if key != "default"}
    if "default" in node:
        strict["default"] = node["default"]
    if node.get("x-kubernetes-int-or-string"):
        strict.pop("type", None)
        strict["anyOf"] = [{"type": "integer"}, {"type": "string"}]
        if pattern := strict.pop("pattern", None):
            strict["anyOf"][1]["pattern"] = pattern
    is_object = isinstance(node.get("properties"), dict) and node.get("type") == "object"
    if is_object and "additionalProperties" not in node and not node.get("x-kubernetes-preserve-unknown-fields"):
        strict["additionalProperties"] = False
    return strict


def _with_defaults(schema: Manifest, value: Any) -> Any:
    if isinstance(value, dict):
        for name, part in schema.get("properties", {}).items():
            if name not in value and isinstance(part, dict) and "default" in part:
                value[name] = copy.deepcopy(part["default"])
            if name in value:
                value[name] = _with_defaults(part, value[name])
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        return [_with_defaults(schema["items"], item) for item in value]
    return value


def operator_problems(manifest: Manifest) -> list[str]:
    """What KubeRay's operator refuses although the schema allows it (its controllers/ray/utils/validation.go)."""
    kind, spec, name = manifest["kind"], manifest["spec"], manifest["metadata"]["name"]
    longest = {"RayCluster": 53, "RayJob": 47, "RayService": 47}[kind]
    problems = []
    if len(name) > longest:
        problems.append(f"name: {len(name)} characters, {longest} at most")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        problems.append(f"name: {name} is not a DNS label")
    if kind == "RayJob":
        problems += _job_problems(spec)
        cluster = spec.get("rayClusterSpec")
        return problems + (_cluster_problems(cluster) if cluster else [])
    return problems + _cluster_problems(spec)


def _job_problems(spec: Manifest) -> list[str]:
    problems = []
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not spec.get("shutdownAfterJobFinishes"):
        problems.append("ttlSecondsAfterFinished needs shutdownAfterJobFinishes")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        problems.append("suspend needs shutdownAfterJobFinishes")
    if spec.get("suspend") and spec.get("clusterSelector"):
        problems.append("suspend and clusterSelector exclude each other")
    if not spec.get("rayClusterSpec") and not spec.get("clusterSelector"):
        problems.append("neither rayClusterSpec nor clusterSelector")
    if spec.get("activeDeadlineSeconds", 1) <= 0:
        problems.append("activeDeadlineSeconds must be positive")
    if spec.get("backoffLimit", 0) < 0:
        problems.append("backoffLimit must not be negative")
    return problems


def _cluster_problems(spec: Manifest) -> list[str]:
    problems = []
    autoscaling = spec.get("enableInTreeAutoscaling", False)
    is_v2 = autoscaling and spec.get("autoscalerOptions", {}).get("version") == "v2"
    for group in (spec["headGroupSpec"], *spec.get("workerGroupSpecs", [])):
        name, start = group.get("groupName", "head"), group.get("rayStartParams", {})
        if group.get("resources") and any(start.get(key) for key in _START_RESOURCES):
            problems.append(f"{name}: resources both in rayStartParams and in resources")
        if "labels" in start:
            problems.append(f"{name}: labels belong into the group, not into rayStartParams")
        if is_v2 and group["template"]["spec"].get("restartPolicy", "Never") != "Never":
            problems.append(f"{name}: restartPolicy must be Never or unset with autoscaler v2")
        if not is_v2 and ("priority" in group or "idleTimeoutSeconds" in group):
            problems.append(f"{name}: priority and idleTimeoutSeconds need autoscaler v2")
        if autoscaling and group.get("suspend"):
            problems.append(f"{name}: cannot be suspended with the autoscaler on")
    environment = {entry["name"] for entry in spec["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])}
    if "RAY_enable_autoscaler_v2" in environment:
        problems.append("head: RAY_enable_autoscaler_v2 and autoscalerOptions.version exclude each other")
    if spec.get("authOptions", {}).get("mode") == "token":
        version = tuple(int(part) for part in spec.get("rayVersion", "0").split("."))
        if version < (2, 52):
            problems.append("authOptions.mode token needs a rayVersion of 2.52 or later")
    return problems


def house_problems(manifest: Manifest) -> list[str]:
    """What nobody refuses and we do not want, in a RayCluster or RayJob."""
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    problems = []
    if spec.get("authOptions", {}).get("mode") != "token":
        problems.append("the job server asks for no token")
    if spec["headGroupSpec"]["rayStartParams"].get("num-cpus") != "0":
        problems.append("head: takes tasks")
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        name, pod = group.get("groupName", "head"), group["template"]["spec"]
        (container,) = pod["containers"]
        if not pod["securityContext"].get("runAsNonRoot"):
            problems.append(f"{name}: may run as root")
        if container["securityContext"].get("allowPrivilegeEscalation", True):
            problems.append(f"{name}: may become root")
        if {"name": "shm", "mountPath": "/dev/shm"} not in container["volumeMounts"]:
            problems.append(f"{name}: 64 MiB of shared memory")
        uses_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        if uses_gpu != container["image"].split(":")[0].endswith("rzen-gpu"):
            problems.append(f"{name}: image and GPU do not go together")
        if "groupName" in group:
            problems += _worker_problems(name, group, pod, container)
    return problems


def _worker_problems(name: str, group: Manifest, pod: Manifest, container: Manifest) -> list[str]:
    problems = []
    if group["minReplicas"] or group["replicas"]:
        problems.append(f"{name}: does not scale from zero")
    if pod.get("automountServiceAccountToken", True):
        problems.append(f"{name}: workers hold a token of Kubernetes")
    drain = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])[-1]
    pause = re.search(r"--deadline-remaining-seconds (\d+) && sleep (\d+)$", drain)
    if not drain.startswith("ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION ") or not pause:
        problems.append(f"{name}: Ray does not hear that the pod goes")
    elif pod.get("terminationGracePeriodSeconds", 30) < int(pause[2]) + 30:
        problems.append(f"{name}: is killed before it has drained")
    on_spot = pod["nodeSelector"].get("rzen/capacity") != "on-demand"
    if on_spot != any(toleration["key"] == "rzen/spot" for toleration in pod.get("tolerations", [])):
        problems.append(f"{name}: tolerations and nodes do not go together")
    return problems
