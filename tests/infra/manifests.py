"""Kubernetes manifests held against schemas and against what the operator checks beyond them.

    python -m tests.infra.manifests     checks every file of infra/kuberay and both overlays; `make check` runs it

The schemas of KubeRay are not part of this repository. RZEN_KUBERAY_CRDS names a folder with its custom resource
definitions, v1.7: rayclusters.yaml, rayjobs.yaml and rayservices.yaml of helm-chart/kuberay-operator/crds in its
repository. Without it, build/kuberay-crds is looked for.
"""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from ray.serve.schema import ServeDeploySchema

from infra.kuberay import generate, shipped
from jobs.runtime.lease import PATIENCE
from jobs.serving.specs import SERVE, ServeSpec
from jobs.training.launch import SAVE_S
from tests.paths import ROOT

Manifest = dict[str, Any]
FOLDER = ROOT / "infra" / "kuberay"
OVERLAYS = ("dev", "prod")
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
WITHOUT_CRDS = (
    "KubeRay's schemas are not at hand, and the manifests are not checked against them: copy the folder"
    " helm-chart/kuberay-operator/crds of github.com/ray-project/kuberay v1.7 to build/kuberay-crds"
)
_DEFAULT_CRDS = ROOT / "build" / "kuberay-crds"
CRDS = os.environ.get("RZEN_KUBERAY_CRDS") or (str(_DEFAULT_CRDS) if _DEFAULT_CRDS.is_dir() else None)
_FILES = {"RayCluster": "rayclusters.yaml", "RayJob": "rayjobs.yaml", "RayService": "rayservices.yaml"}
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, and not everywhere
_START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
_UNITS = {"Mi": 2**20, "Gi": 2**30, "Ti": 2**40}
_OBJECT_STORE = 0.3  # of a node's memory; Ray's default
_DRAIN_S = 30  # Ray's own, after SIGTERM
_GATEWAY_CPUS = 0.2
_DIGEST = re.compile(r"@sha256:([0-9a-f]{64}|DIGEST_OF_[A-Z_]+)$")


def plain_files() -> list[Path]:
    """Return the files with manifests, those that kustomize reads left out."""
    return [path for path in sorted(FOLDER.rglob("*.yaml")) if path.name != "kustomization.yaml"]


def build_overlay(name: str) -> list[Manifest]:
    """Return the documents of an overlay. Needs kubectl."""
    command = ["kubectl", "kustomize", str(FOLDER / "overlays" / name)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return list(yaml.load_all(text, _LOADER))


def read(path: Path) -> list[Manifest]:
    """The documents of a file, without those that are not manifests."""
    return [document for document in yaml.load_all(path.read_text(), _LOADER) if document]


def schema_problems(manifest: Manifest) -> list[str]:
    """What the API server would refuse in a RayCluster, RayJob or RayService, unknown fields included."""
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
    definition = yaml.load(text, _LOADER)
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


def cluster_of(manifest: Manifest) -> Manifest:
    """Return the cluster that a RayCluster, RayJob or RayService describes."""
    spec: Manifest = manifest["spec"]
    cluster: Manifest = spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec
    return cluster


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
    if kind == "RayService":
        problems += _service_problems(spec)
    return problems + _cluster_problems(cluster_of(manifest))


def _service_problems(spec: Manifest) -> list[str]:
    problems = []
    strategy = spec.get("upgradeStrategy", {})
    if strategy.get("type", "NewCluster") not in ("NewCluster", "NewClusterWithIncrementalUpgrade", "None"):
        problems.append(f"upgradeStrategy.type: {strategy['type']} is none that there is")
    if strategy.get("type") == "NewClusterWithIncrementalUpgrade" and "clusterUpgradeOptions" not in strategy:
        problems.append("upgradeStrategy: an incremental upgrade needs clusterUpgradeOptions")
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        problems.append("rayClusterDeletionDelaySeconds must not be negative")
    if spec["rayClusterConfig"]["headGroupSpec"].get("headService", {}).get("metadata", {}).get("name"):
        problems.append("headGroupSpec.headService.metadata.name must not be set")
    return problems


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
    """What nobody refuses and we do not want, in a RayCluster, RayJob or RayService."""
    spec = cluster_of(manifest)
    problems = _stop_problems(spec["headGroupSpec"]["template"]["spec"])
    if manifest["kind"] == "RayJob":
        if manifest["spec"].get("submissionMode") != "HTTPMode":
            problems.append("ends when the stream of a log ends, not when the job does")
        if not manifest["spec"].get("backoffLimit"):
            problems.append("a lost head is the end of the job")
        head = spec["headGroupSpec"]["template"]["spec"]
        if float(_env(head["containers"][0]).get(PATIENCE, "0")) <= head.get("terminationGracePeriodSeconds", 30):
            problems.append("fails while a pod of its last attempt still holds a lease")
    if manifest["kind"] == "RayService":
        problems += _server_problems(manifest["spec"])
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
        uses_gpu = "nvidia.com/gpu" in container["resources"]["limits"]
        if uses_gpu != container["image"].split("@")[0].split(":")[0].endswith("rzen-gpu"):
            problems.append(f"{name}: image and GPU do not go together")
        problems += [f"{name}: {problem}" for problem in _disk_problems(pod, container)]
        if "groupName" in group:
            problems += _worker_problems(name, group, pod, container)
    mounts = spec["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    if spec.get("enableInTreeAutoscaling") and "/tmp/ray" not in {mount["mountPath"] for mount in mounts}:
        problems.append("head: the operator mounts a volume without a limit on /tmp/ray")
    scaler = spec.get("autoscalerOptions", {})
    if not scaler.get("securityContext", {}).get("readOnlyRootFilesystem"):
        problems.append("autoscaler: its root can be written")
    return problems


def _server_problems(service: Manifest) -> list[str]:
    """What is wrong with the server of a RayService, or with its nodes for it."""
    config = ServeDeploySchema.model_validate(yaml.safe_load(service["serveConfigV2"]))
    (application,) = config.applications
    (replica,) = application.deployments
    document = {**application.args, **dict(replica.user_config or {})}
    server = ServeSpec.model_validate(document)
    problems = [problem] if (problem := SERVE.impossible and SERVE.impossible(server)) else []
    if not service.get("suspend"):
        problems.append("starts when it is applied")
    if not service.get("excludeHeadPodFromServeSvc"):
        problems.append("requests go through the head")
    http = dict(config.http_options)
    if http["host"] != "0.0.0.0":
        problems.append("other pods cannot reach the server")
    if server.registry is None and (server.model is None or server.corpus is None):
        problems.append("serves no pair of model and corpus")
    cluster = service["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        name, pod = group.get("groupName", "head"), group["template"]["spec"]
        (container,) = pod["containers"]
        if {"name": "serve", "containerPort": http["port"]} not in container["ports"]:
            problems.append(f"{name}: the operator looks for the server on another port")
        if "rzen-credentials" in str(container["envFrom"]):
            problems.append(f"{name}: what answers users holds secrets that write")
        if name != "head":
            problems += [f"{name}: {problem}" for problem in _replica_problems(server, group, pod, container)]
    return problems


def _replica_problems(server: ServeSpec, group: Manifest, pod: Manifest, container: Manifest) -> Iterator[str]:
    limits = container["resources"]["limits"]
    most = server.max_replicas or server.replicas
    if pod["serviceAccountName"] != shipped.READER:
        yield "what answers users may do more than read"
    cpus = server.cpus_per_replica + _GATEWAY_CPUS * server.gateways
    if cpus > float(limits["cpu"]) or server.gpus_per_replica > float(limits.get("nvidia.com/gpu", 0)):
        yield "no replica fits into a node"
    elif group["maxReplicas"] * float(limits["nvidia.com/gpu"]) < most * server.gpus_per_replica:
        yield f"has too few nodes for {most} replicas"
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    if str(Path(server.api_keys or "/").parent) not in mounts:
        yield "no volume brings the file of keys"


def _stop_problems(pod: Manifest) -> list[str]:
    """What takes a job the time for its last checkpoint when the head goes, or when the job is stopped."""
    (container,) = pod["containers"]
    wait_s = int(_env(container).get("RAY_JOB_STOP_WAIT_TIME_S", "3"))
    problems = []
    if wait_s < SAVE_S + 15:
        problems.append(f"head: a job that is stopped is killed after {wait_s} s, and saves for {SAVE_S} s")
    command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    if command[:3] != ["python", "-m", "jobs.runtime.stop_jobs"]:
        problems.append("head: jobs are killed when their head goes")
    elif int(command[3]) < wait_s + 10:
        problems.append("head: does not wait until its jobs have stopped")
    elif pod.get("terminationGracePeriodSeconds", 30) < int(command[3]) + _DRAIN_S:
        problems.append("head: is killed before its jobs have stopped")
    return problems


def _disk_problems(pod: Manifest, container: Manifest) -> list[str]:
    problems = []
    volumes = {volume["name"]: volume["emptyDir"] for volume in pod["volumes"] if "emptyDir" in volume}
    mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in container["volumeMounts"]}
    limits, requests = container["resources"]["limits"], container["resources"]["requests"]
    spilled = _OBJECT_STORE * quantity(limits["memory"])
    if mounts.get("/dev/shm", {}).get("medium") != "Memory":
        problems.append("64 MiB of shared memory")
    elif quantity(mounts["/dev/shm"].get("sizeLimit", "0Gi")) < spilled:
        problems.append("its object store does not fit into /dev/shm")
    on_disk = [volume for volume in volumes.values() if volume.get("medium") != "Memory"]
    if any("sizeLimit" not in volume for volume in on_disk):
        problems.append("a volume without a limit fills the disk of its node")
        return problems
    stated = {quantity(some.get("ephemeral-storage", "0Gi")) for some in (limits, requests)}
    if min(stated) < sum(quantity(volume["sizeLimit"]) for volume in on_disk) + 2**30 or len(stated) > 1:
        problems.append("is not promised the disk that its volumes may take, and is evicted")
    ray = mounts.get("/tmp/ray", mounts.get("/tmp", {}))
    if quantity(ray.get("sizeLimit", "0Gi")) < 1.2 * spilled:
        problems.append("is evicted when Ray spills its object store")
    if not container["securityContext"].get("readOnlyRootFilesystem"):
        problems.append("its root can be written")
    environment = _env(container)
    if environment.get("HOME") not in mounts:
        problems.append("its home cannot be written")
    if environment.get("RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE") != "1":
        problems.append("reports an empty disk")
    return problems


def _env(container: Manifest) -> dict[str, str]:
    return {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def quantity(text: str) -> float:
    """Return the bytes of a quantity such as 16Gi."""
    return float(text[:-2]) * _UNITS[text[-2:]]


def image_problems(manifest: Manifest) -> list[str]:
    """Images that may be other ones tomorrow: all but those that a digest names."""
    images = re.findall(r"^\s*(?:- )?image: (\S+)$", yaml.safe_dump(manifest), re.MULTILINE)
    return [f"{image} has no digest" for image in images if not _DIGEST.search(image)]


def pod_problems(pod: Manifest, config_maps: dict[str, Manifest]) -> list[str]:
    """Files that a container's command names and no mount brings, and mounts that hide the token of the account."""
    problems = []
    sources = {
        volume["name"]: config_maps.get(volume["configMap"]["name"], {}).get("data", {})
        for volume in pod.get("volumes", [])
        if "configMap" in volume
    }
    for container in pod["containers"]:
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        # In Debian's images /var/run is a link to /run.
        hidden = [path for path in mounts if path in ("/var/run", "/run", "/var", "/var/run/secrets", "/run/secrets")]
        problems += [f"{path}: hides the token of the service account" for path in hidden]
        brought = {f"{path}/{file}" for path, name in mounts.items() for file in sources.get(name, {})}
        named = [word for word in container.get("command", []) if re.fullmatch(r"/\S+\.(py|sh|yaml|json)", word)]
        problems += [f"{word}: no mount brings it" for word in named if word not in brought]
    return problems


def _worker_problems(name: str, group: Manifest, pod: Manifest, container: Manifest) -> list[str]:
    problems = []
    if group["minReplicas"] or group["replicas"]:
        problems.append(f"{name}: does not scale from zero")
    if pod.get("automountServiceAccountToken", True):
        problems.append(f"{name}: workers hold a token of Kubernetes")
    if "nvidia.com/gpu" not in container["resources"]["limits"]:
        secrets = {entry["secretRef"]["name"] for entry in container["envFrom"] if "secretRef" in entry}
        if secrets != {pod["serviceAccountName"]}:
            problems.append(f"{name}: decoders of untrusted files hold secrets of others")
        if pod["serviceAccountName"] not in (shipped.READER, shipped.WORKER):
            problems.append(f"{name}: decoders of untrusted files may do more than workers")
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


def all_problems(manifest: Manifest) -> list[str]:
    """Every rule for a manifest, and KubeRay's schema if it is at hand."""
    if manifest["kind"] not in RAY_KINDS:
        return []
    found = operator_problems(manifest) + house_problems(manifest)
    return found + (schema_problems(manifest) if CRDS else [])


def check() -> Iterator[str]:
    """Yield a line for each problem of the manifests in infra/kuberay, as they are and as the overlays change them."""
    stale = [path for path, text in generate.files().items() if not path.is_file() or path.read_text() != text]
    yield from (f"{path.relative_to(ROOT)}: run python -m infra.kuberay.generate" for path in stale)
    built = [(f"infra/kuberay/{path.relative_to(FOLDER)}", read(path)) for path in plain_files()]
    if shutil.which("kubectl"):
        for name in OVERLAYS:
            documents = build_overlay(name)
            built.append((f"overlay {name}", documents))
            maps = {document["metadata"]["name"]: document for document in documents if document["kind"] == "ConfigMap"}
            for document in documents:
                problems = image_problems(document)
                if document["kind"] == "CronJob":
                    problems += pod_problems(document["spec"]["jobTemplate"]["spec"]["template"]["spec"], maps)
                yield from (_line(f"overlay {name}", document, problem) for problem in problems)
    for place, documents in built:
        for document in documents:
            yield from (_line(place, document, problem) for problem in all_problems(document))


def _line(place: str, document: Manifest, problem: str) -> str:
    return f"{place}: {document['kind']} {document['metadata']['name']}: {problem}"


def main() -> int:
    """Check. Exit status 1 if there is a problem."""
    problems = list(check())
    notes = [] if CRDS else [WITHOUT_CRDS]
    if not shutil.which("kubectl"):
        notes.append("kubectl is not installed: the overlays of infra/kuberay are not checked")
    sys.stderr.write("".join(f"{line}\n" for line in (*notes, *problems)))
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
