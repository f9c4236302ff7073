"""Manifests for KubeRay, as far as they can be checked without a cluster, and faults that these checks have to find."""

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import yaml

from infra.kuberay import generate, shipped
from jobs.spec.kinds import find_kind, kind_names
from pipelines.errors import UserError
from tests.infra import manifests
from tests.infra.manifests import RAY_KINDS, Manifest
from tests.paths import ROOT

NEEDS_CRDS = pytest.mark.skipif(not manifests.CRDS, reason="RZEN_KUBERAY_CRDS names no folder with KubeRay's CRDs")


def documents() -> list[Manifest]:
    return [document for path in manifests.plain_files() for document in manifests.read(path)]


def ray_documents() -> list[Manifest]:
    return [document for document in documents() if document["kind"] in RAY_KINDS]


@pytest.fixture(scope="module")
def overlays() -> dict[str, list[Manifest]]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: overlays are not built")
    return {name: manifests.build_overlay(name) for name in manifests.OVERLAYS}


def test_generated_files_are_those_of_the_generator() -> None:
    for path, text in generate.files().items():
        assert path.read_text() == text, f"{path}: run python -m infra.kuberay.generate"


def test_every_kind_of_job_has_a_rayjob_or_a_reason_for_having_none() -> None:
    kinds = {generate.specs(job)[0].kind for job in (*shipped.JOBS.values(), shipped.RETRAIN)}
    local = {name for name in kind_names() if find_kind(name).local}
    assert not kinds & local
    assert set(kind_names()) == kinds | local


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ("sources.products.table=[$RZEN_STORE/a.csv, b.csv]", "sources.products.table[1]=b.csv"),
        ("sources.products.media_root=/data", "sources.products.media_root=/data"),
        ("sources.products.pool={table: file:///a.csv}", "sources.products.pool.table=file:///a.csv"),
        ("out=runs/data", "out=runs/data"),
        ("input=photos", "input=photos"),
        ("sources.products.instruction={mbeir: a.tsv}", "sources.products.instruction.mbeir=a.tsv"),
    ],
)
def test_an_ingest_of_local_files_has_no_rayjob(change: str, place: str) -> None:
    ingest = shipped.JOBS["ingest"]
    with pytest.raises(UserError) as raised:
        generate.rayjob("ingest", replace(ingest, set=(*ingest.set, change)))
    assert str(raised.value) == (
        f"jobs/tables.yaml: {place} is on a local disk, and pods share none;"
        f' add "{place.split("=")[0]}=$RZEN_STORE/..." to its changes'
    )


def test_nodes_follow_from_the_spec() -> None:
    jobs = {document["metadata"]["name"]: document for document in ray_documents() if document["kind"] == "RayJob"}
    most = {
        name: {group["groupName"]: group["maxReplicas"] for group in job["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
        for name, job in jobs.items()
    }
    assert most["stage1"] == {"decode": 16, "train-spot": 2, "train": 2}  # 16 workers, 8 GPUs on a node
    assert most["finetunes"] == {"decode": 16, "train-spot": 6, "train": 6}  # three of them side by side
    assert most["retrain"] == {"decode": 16, "train-spot": 2, "train": 2}
    assert most["export"] == {"decode": 16}


def heard(entrypoint: str, folder: Path) -> list[str]:
    """The words with which `rzen` starts. The operator sends the entrypoint as it is, and a shell on the head reads it,
    as Ray's job supervisor starts it.
    """
    _stand_in(folder / "rzen", 'printf "%s\\n" "$@"')
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "RZEN_STORE": "s3://bucket/some where"}
    done = subprocess.run(entrypoint, shell=True, env=environment, check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def _stand_in(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.parametrize("job", [*shipped.JOBS.values(), shipped.RETRAIN], ids=lambda job: job.spec)
def test_commands_pass_the_shell_of_the_head(job: shipped.Job, tmp_path: Path) -> None:
    settings = [setting.replace("$RZEN_STORE", "s3://bucket/some where") for setting in job.set]
    expected = ["run", f"jobs/{job.spec}", *(word for setting in settings for word in ("--set", setting))]
    assert heard(generate.command(job), tmp_path) == expected


def test_commands_that_quote_the_store_would_lose_it(tmp_path: Path) -> None:
    assert heard('rzen run a.yaml --set "out=$RZEN_STORE/data"', tmp_path)[-1] == "out=s3://bucket/some where/data"
    assert heard("rzen run a.yaml --set 'out=$RZEN_STORE/data'", tmp_path)[-1] == "out=$RZEN_STORE/data"


def test_a_pod_that_goes_tells_ray_and_waits_for_as_long_as_ray_accepts(tmp_path: Path) -> None:
    commands = {
        tuple(group["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"])
        for document in ray_documents()
        for group in manifests.cluster_of(document)["workerGroupSpecs"]
    }
    (command,) = commands
    _stand_in(tmp_path / "sleep", f'echo sleep "$@" >> {tmp_path}/calls')
    for accepts in (True, False):
        _stand_in(tmp_path / "ray", f'printf "%s|" "$@" > {tmp_path}/calls; exit {int(not accepts)}')
        subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=accepts)
        told, *waited = (tmp_path / "calls").read_text().rpartition("|")[::2]
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "pod deleted"]
        assert told.split("|") == ["drain-node", *reason, "--deadline-remaining-seconds", "90"]
        assert waited == (["sleep 90\n"] if accepts else [""])


@NEEDS_CRDS
@pytest.mark.parametrize("kind", RAY_KINDS)
def test_ray_manifests_fit_their_schema(kind: str) -> None:
    checked = [document for document in ray_documents() if document["kind"] == kind]
    assert checked
    for document in checked:
        assert manifests.schema_problems(document) == [], document["metadata"]["name"]


def test_ray_manifests_pass_the_operator_and_the_house() -> None:
    for document in ray_documents():
        problems = manifests.operator_problems(document) + manifests.house_problems(document)
        assert problems == [], document["metadata"]["name"]


Change = Callable[[Manifest], Any]


def _group(document: Manifest, index: int) -> Manifest:
    return document["spec"]["rayClusterSpec"]["workerGroupSpecs"][index]


def _pod(document: Manifest, index: int) -> Manifest:
    return _group(document, index)["template"]["spec"]


def _head(document: Manifest) -> Manifest:
    pod: Manifest = document["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    return pod


def _stop(document: Manifest) -> list[str]:
    command: list[str] = _head(document)["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    return command


def _resources(document: Manifest, index: int) -> Manifest:
    resources: Manifest = _pod(document, index)["containers"][0]["resources"]
    return resources


def _secret(document: Manifest, index: int) -> Manifest:
    (secret,) = [
        entry["secretRef"] for entry in _pod(document, index)["containers"][0]["envFrom"] if "secretRef" in entry
    ]
    return cast(Manifest, secret)


def _broken(change: Change) -> Manifest:
    document = copy.deepcopy(next(some for some in ray_documents() if some["metadata"]["name"] == "stage1"))
    change(document)
    return document


@NEEDS_CRDS
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["spec"].update(ttlSecondsAfterFinish=600), "ttlSecondsAfterFinish"),
        (lambda d: d["spec"].update(submissionMode=["K8sJobMode"]), "submissionMode"),
        (lambda d: d["spec"]["rayClusterSpec"]["authOptions"].update(mode="tokens"), "authOptions.mode"),
        (lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update({"num-cpus": 0}), "num-cpus"),
        (lambda d: _group(d, 0).pop("groupName"), "groupName"),
        (lambda d: _group(d, 0).update(minReplicas="0"), "minReplicas"),
        (lambda d: _pod(d, 0)["containers"][0].pop("name"), "'name' is a required property"),
        (lambda d: _pod(d, 0)["containers"][0]["resources"]["limits"].update(cpu="8 cores"), "limits.cpu"),
        (lambda d: _pod(d, 0).update(terminationGracePeriod=120), "terminationGracePeriod"),
    ],
)
def test_schema_finds_planted_faults(change: Change, told: str) -> None:
    assert told in "\n".join(manifests.schema_problems(_broken(change)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["metadata"].update(name="a" * 48), "48 characters"),
        (lambda d: d["metadata"].update(name="Stage1"), "not a DNS label"),
        (lambda d: d["spec"].update(shutdownAfterJobFinishes=False), "ttlSecondsAfterFinished needs"),
        (lambda d: d["spec"].update(activeDeadlineSeconds=0), "activeDeadlineSeconds"),
        (lambda d: d["spec"]["rayClusterSpec"]["autoscalerOptions"].update(version="v1"), "need autoscaler v2"),
        (lambda d: _pod(d, 0).update(restartPolicy="Always"), "restartPolicy"),
        (
            lambda d: _group(d, 0).update(rayStartParams={"num-cpus": "8"}, resources={"CPU": "8"}),
            "both in rayStartParams and in resources",
        ),
        (lambda d: _group(d, 0).update(rayStartParams={"labels": "a=b"}), "labels belong"),
        (lambda d: _group(d, 0).update(suspend=True), "cannot be suspended"),
        (lambda d: d["spec"]["rayClusterSpec"].update(rayVersion="2.51.1"), "2.52"),
    ],
)
def test_rules_of_the_operator_find_planted_faults(change: Change, told: str) -> None:
    assert told in "\n".join(manifests.operator_problems(_broken(change)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["spec"]["rayClusterSpec"]["authOptions"].update(mode="disabled"), "no token"),
        (lambda d: d["spec"]["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].clear(), "takes tasks"),
        (lambda d: _group(d, 1).update(minReplicas=1), "scale from zero"),
        (lambda d: _pod(d, 1).update(terminationGracePeriodSeconds=30), "killed before it has drained"),
        (lambda d: _pod(d, 1)["containers"][0].pop("lifecycle"), "does not hear"),
        (lambda d: _pod(d, 1)["containers"][0].update(image="rzen-cpu"), "image and GPU"),
        (lambda d: _pod(d, 1).update(tolerations=[]), "tolerations"),
        (lambda d: _pod(d, 0)["securityContext"].clear(), "run as root"),
        (lambda d: _pod(d, 0)["containers"][0]["volumeMounts"].pop(0), "shared memory"),
        # kuberay#4921, #5099, #5100
        (lambda d: d["spec"].update(submissionMode="K8sJobMode"), "ends when the stream of a log ends"),
        (lambda d: d["spec"].update(backoffLimit=0), "a lost head is the end of the job"),
        # ray#30803, kuberay#5004
        (lambda d: _head(d)["containers"][0]["env"].pop(2), "killed after 3 s, and saves for 30 s"),
        (lambda d: _head(d)["containers"][0].pop("lifecycle"), "killed when their head goes"),
        (lambda d: _head(d).pop("terminationGracePeriodSeconds"), "killed before its jobs have stopped"),
        (lambda d: _stop(d).__setitem__(3, "30"), "does not wait until its jobs have stopped"),
        # kuberay#5211
        (lambda d: _head(d)["containers"][0]["env"].pop(), "while a pod of its last attempt still holds a lease"),
        # ray#24292, #14676
        (lambda d: _pod(d, 1)["containers"][0]["env"].pop(), "train-spot: reports an empty disk"),
        (lambda d: _pod(d, 1)["volumes"][1].update(emptyDir={}), "a volume without a limit"),
        (lambda d: _head(d)["containers"][0]["volumeMounts"].pop(), "a volume without a limit on /tmp/ray"),
        (lambda d: _resources(d, 1)["requests"].pop("ephemeral-storage"), "not promised the disk"),
        (lambda d: _resources(d, 0)["limits"].update({"ephemeral-storage": "50Gi"}), "not promised the disk"),
        (lambda d: _pod(d, 1)["volumes"][1]["emptyDir"].update(sizeLimit="160Gi"), "when Ray spills"),
        (lambda d: _pod(d, 1)["volumes"][0]["emptyDir"].update(sizeLimit="64Gi"), "does not fit into /dev/shm"),
        (lambda d: _pod(d, 1)["containers"][0]["securityContext"].pop("readOnlyRootFilesystem"), "can be written"),
        (lambda d: _pod(d, 1)["containers"][0]["env"].pop(0), "its home cannot be written"),
        (
            lambda d: d["spec"]["rayClusterSpec"]["autoscalerOptions"]["securityContext"].pop("readOnlyRootFilesystem"),
            "autoscaler: its root can be written",
        ),
        (lambda d: _secret(d, 0).update(name="rzen-credentials"), "decode: decoders of untrusted files hold secrets"),
        (lambda d: _pod(d, 0).update(serviceAccountName="rzen-head"), "may do more than workers"),
    ],
)
def test_rules_of_the_house_find_planted_faults(change: Change, told: str) -> None:
    assert told in "\n".join(manifests.house_problems(_broken(change)))


def _served(change: Change) -> Manifest:
    document = copy.deepcopy(next(some for some in ray_documents() if some["kind"] == "RayService"))
    change(document)
    return document


def _configured(document: Manifest, change: Callable[[Any], Any]) -> None:
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    change(config)
    document["spec"]["serveConfigV2"] = yaml.safe_dump(config)


def _node(document: Manifest) -> Manifest:
    (group,) = document["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    return cast(Manifest, group)


def _of_node(document: Manifest) -> Manifest:
    return cast(Manifest, _node(document)["template"]["spec"]["containers"][0])


SERVER_FAULTS: list[tuple[Change, str]] = [
    (lambda d: d["spec"].update(suspend=False), "starts when it is applied"),
    (lambda d: d["spec"].pop("excludeHeadPodFromServeSvc"), "requests go through the head"),
    (lambda d: _configured(d, lambda c: c["http_options"].update(host="127.0.0.1")), "cannot reach the server"),
    (lambda d: _configured(d, lambda c: c["http_options"].update(port=8001)), "head: the operator looks for"),
    (lambda d: _configured(d, lambda c: c["applications"][0]["args"].pop("api_keys")), "ask without a key"),
    (
        lambda d: _configured(
            d, lambda c: c["applications"][0]["deployments"][0].update(user_config={"model": "s3://b/m"})
        ),
        "serves no pair",
    ),
    (lambda d: _of_node(d)["ports"].pop(), "serve: the operator looks for the server on another port"),
    (lambda d: _of_node(d)["volumeMounts"].pop(), "no volume brings the file of keys"),
    (lambda d: _of_node(d)["envFrom"][1]["secretRef"].update(name="rzen-credentials"), "holds secrets that write"),
    (lambda d: _of_node(d)["resources"]["limits"].update(cpu="4"), "no replica fits into a node"),
    (lambda d: _node(d).update(maxReplicas=7), "too few nodes for 8 replicas"),
    (lambda d: _node(d)["template"]["spec"].update(serviceAccountName="rzen-worker"), "may do more than read"),
]


@pytest.mark.parametrize(("change", "told"), SERVER_FAULTS)
def test_rules_of_the_server_find_planted_faults(change: Change, told: str) -> None:
    assert told in "\n".join(manifests.house_problems(_served(change)))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: d["metadata"].update(name="a" * 48), "48 characters"),
        (lambda d: d["spec"].update(upgradeStrategy={"type": "Rolling"}), "upgradeStrategy.type: Rolling"),
        (lambda d: d["spec"]["upgradeStrategy"].update(type="NewClusterWithIncrementalUpgrade"), "needs cluster"),
        (lambda d: d["spec"].update(rayClusterDeletionDelaySeconds=-1), "rayClusterDeletionDelaySeconds"),
    ],
)
def test_rules_of_the_operator_for_a_server_find_planted_faults(change: Change, told: str) -> None:
    assert told in "\n".join(manifests.operator_problems(_served(change)))


@NEEDS_CRDS
@pytest.mark.parametrize("name", ["serveConfig", "rayClusterSpec", "excludeHeadPod"])
def test_schema_knows_the_fields_of_a_server(name: str) -> None:
    assert name in "\n".join(manifests.schema_problems(_served(lambda d: d["spec"].update({name: {}}))))


def test_the_server_follows_its_load() -> None:
    """The application of the manifest, as Ray Serve builds it."""
    from jobs.serving.server import build

    (service,) = [document for document in ray_documents() if document["kind"] == "RayService"]
    (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
    gateway = build(application["args"])
    replica = gateway._bound_deployment.init_args[1]._bound_deployment
    scaling = replica._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 8, 16.0)
    assert replica._deployment_config.max_ongoing_requests > scaling.target_ongoing_requests
    assert replica.ray_actor_options == {"num_cpus": 6.0, "num_gpus": 1.0}


def core_documents() -> list[Manifest]:
    return [
        document for document in documents() if document["kind"] not in (*RAY_KINDS, "PodMonitor", "PrometheusRule")
    ]


def test_core_manifests_fit_the_schemas_of_kubernetes() -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    checked = core_documents()
    assert {document["kind"] for document in checked} == {
        "CronJob", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount"
    }  # fmt: skip
    for document in checked:
        validator.validate(document, validator.latest_version(), strict=True)
    for kind, change in (
        ("CronJob", lambda d: d["spec"].update(concurrency="Forbid")),
        ("CronJob", lambda d: d["spec"].update(startingDeadlineSeconds="3600")),
        ("NetworkPolicy", lambda d: d["spec"].update(podSelector="all")),
        ("Role", lambda d: d["rules"][0].pop("verbs")),
    ):
        fault = copy.deepcopy(next(document for document in checked if document["kind"] == kind))
        change(fault)
        with pytest.raises(validator.ValidationError):
            validator.validate(fault, validator.latest_version(), strict=True)


def test_versions_are_those_of_the_lock() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    (ray,) = re.findall(r"^ray==(\S+)$", lock, re.MULTILINE)
    for document in ray_documents():
        assert manifests.cluster_of(document)["rayVersion"] == ray


def test_accounts_network_and_monitoring_name_what_there_is() -> None:
    accounts = {document["metadata"]["name"] for document in documents() if document["kind"] == "ServiceAccount"}
    pods = [
        group["template"]["spec"]
        for document in ray_documents()
        for spec in [manifests.cluster_of(document)]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
    ]
    assert {pod["serviceAccountName"] for pod in pods} | {"rzen-retrain-run"} == accounts
    retrain = next(document for document in ray_documents() if document["metadata"]["name"] == "retrain")
    groups = retrain["spec"]["rayClusterSpec"]
    assert groups["headGroupSpec"]["template"]["spec"]["serviceAccountName"] == "rzen-promoter"
    for group in groups["workerGroupSpecs"]:  # what decodes untrusted files never promotes a model
        assert group["template"]["spec"]["serviceAccountName"] == "rzen-worker"
    ports = {port["name"]: port["containerPort"] for pod in pods for port in pod["containers"][0]["ports"]}
    (monitor,) = [document for document in documents() if document["kind"] == "PodMonitor"]
    scraped = {ports[endpoint["port"]] for endpoint in monitor["spec"]["podMetricsEndpoints"]}
    (policy,) = [document for document in documents() if document["metadata"]["name"] == "rzen-ray"]
    opened = {port["port"] for rule in policy["spec"]["ingress"] for port in rule.get("ports", [])}
    assert opened == scraped | {ports["dashboard"], ports["serve"]}
    (submits,) = [
        rule["from"] for rule in policy["spec"]["ingress"] if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])
    ]
    assert submits == [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kuberay-system"}}}]


def test_only_jobs_whose_tasks_write_give_decoders_an_account_that_may() -> None:
    accounts = {
        document["metadata"]["name"]: group["template"]["spec"]["serviceAccountName"]
        for document in ray_documents()
        for group in manifests.cluster_of(document)["workerGroupSpecs"]
        if group["groupName"] == "decode"
    }
    writers = {name for name, account in accounts.items() if account == "rzen-worker"}
    assert writers == {
        "curate",
        "export-data",
        "index",
        "ingest",
        "embed",
        "evaluate",
        "evaluate-reranker",
        "judge",
        "mine",
        "retrain",
    }
    assert {account for name, account in accounts.items() if name not in writers} == {"rzen-reader"}


def test_overlays_reach_every_image_and_name(overlays: dict[str, list[Manifest]]) -> None:
    for name, namespace in (("dev", "rzen-dev"), ("prod", "rzen")):
        text = yaml.safe_dump_all(overlays[name])
        images = set(re.findall(r"image: (\S+)", text))
        assert images == {f"REGISTRY/rzen-{kind}@sha256:DIGEST_OF_RZEN_{kind.upper()}" for kind in ("cpu", "gpu")}
        assert {document["metadata"]["namespace"] for document in overlays[name]} == {namespace}
        for document in overlays[name]:
            if document["kind"] in RAY_KINDS:
                assert manifests.operator_problems(document) + manifests.house_problems(document) == []
    kinds = [document["kind"] for document in overlays["prod"]]
    assert kinds.count("RayJob") == len(shipped.JOBS) + 1
    assert kinds.count("RayService") == 1
    assert "RayJob" not in [document["kind"] for document in overlays["dev"]]
    binding = next(document for document in overlays["prod"] if document["kind"] == "RoleBinding")
    assert binding["subjects"][0]["namespace"] == "rzen"


def test_an_image_without_a_digest_is_found() -> None:
    digest = "0123456789abcdef" * 4
    for image, problems in {
        "registry:5000/rzen-cpu:0.1.0": ["registry:5000/rzen-cpu:0.1.0 has no digest"],
        "rzen-cpu": ["rzen-cpu has no digest"],
        f"registry:5000/rzen-cpu@sha256:{digest}": [],
    }.items():
        assert manifests.image_problems({"containers": [{"image": image}]}) == problems


def _cronjob_and_maps(overlays: dict[str, list[Manifest]]) -> tuple[Manifest, dict[str, Manifest]]:
    maps = {some["metadata"]["name"]: some for some in overlays["prod"] if some["kind"] == "ConfigMap"}
    cron = next(document for document in overlays["prod"] if document["kind"] == "CronJob")
    return copy.deepcopy(cron["spec"]["jobTemplate"]["spec"]["template"]["spec"]), maps


def test_a_command_names_files_that_its_mounts_bring(overlays: dict[str, list[Manifest]]) -> None:
    pod, maps = _cronjob_and_maps(overlays)
    assert manifests.pod_problems(pod, maps) == []
    pod["containers"][0]["volumeMounts"][0]["mountPath"] = "/run"
    assert manifests.pod_problems(pod, maps) == [
        "/run: hides the token of the service account",
        "/retrain-run/retrain_run.py: no mount brings it",
    ]


@pytest.fixture
def changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of infra/ that the check reads."""
    for name in ("kuberay", "monitoring"):
        shutil.copytree(ROOT / "infra" / name, tmp_path / name)
    monkeypatch.setattr(manifests, "FOLDER", tmp_path / "kuberay")
    return tmp_path / "kuberay"


def test_the_check_of_all_files_names_a_planted_fault(
    changed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, right, wrong in (
        ("jobs/stage1.yaml", "backoffLimit: 2", "backoffLimit: 0"),
        ("base/raycluster.yaml", 'value: "60"', 'value: "3"'),
    ):
        text = (changed / name).read_text()
        assert right in text
        (changed / name).write_text(text.replace(right, wrong))
    monkeypatch.setattr(manifests, "CRDS", None)
    assert manifests.main() == 1
    errors = capsys.readouterr().err
    assert "infra/kuberay/jobs/stage1.yaml: RayJob stage1: a lost head is the end of the job\n" in errors
    assert (
        "infra/kuberay/base/raycluster.yaml: RayCluster rzen: head: a job that is stopped is killed after 3 s" in errors
    )
    assert errors.startswith(manifests.WITHOUT_CRDS)


@NEEDS_CRDS
def test_the_check_of_all_files_reads_the_schemas(changed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = changed / "jobs" / "export.yaml"
    path.write_text(path.read_text().replace("activeDeadlineSeconds", "activeDeadline"))
    assert manifests.main() == 1
    assert "infra/kuberay/jobs/export.yaml: RayJob export: spec: Additional properties" in capsys.readouterr().err


def test_the_check_of_all_files_builds_the_overlays(
    changed: Path, overlays: dict[str, list[Manifest]], capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed / "overlays" / "prod" / "kustomization.yaml"
    path.write_text(path.read_text().replace('digest: "sha256:DIGEST_OF_RZEN_GPU"', "newTag: 0.1.0"))
    assert manifests.main() == 1
    assert "overlay prod: RayJob stage1: REGISTRY/rzen-gpu:0.1.0 has no digest" in capsys.readouterr().err


@NEEDS_CRDS
def test_overlays_fit_the_schema(overlays: dict[str, list[Manifest]]) -> None:
    checked = [document for built in overlays.values() for document in built if document["kind"] in RAY_KINDS]
    for document in checked:
        assert manifests.schema_problems(document) == [], document["metadata"]["name"]
