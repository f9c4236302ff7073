"""A run of retraining on Kubernetes against an API server that keeps its objects in a dictionary, over TLS."""

import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from infra.kuberay.retrain import retrain_run
from tests.paths import ROOT

FOLDER = ROOT / "infra" / "kuberay" / "retrain"
RAYJOBS = "/apis/ray.io/v1/namespaces/rzen/rayjobs"
LEASES = "/apis/coordination.k8s.io/v1/namespaces/rzen/leases"
NAME, UID = "retrain-29392020", "0a1b"
FAILED = 3


@dataclass
class Api:
    """What the server holds, what RayJobs become as they are asked for, and how its next answers fail."""

    account: Path
    port: int = 0
    objects: dict[str, dict[str, Any]] = field(default_factory=lambda: {RAYJOBS: {}, LEASES: {}})
    token: str = "secret"
    created: list[str] = field(default_factory=list)
    deleted: list[str] = field(default_factory=list)
    ends: list[dict[str, str] | None] = field(default_factory=list)
    """Status of the run's RayJob at each GET; None deletes it. The last one stays."""
    faults: dict[str, list[int | str]] = field(default_factory=dict)
    """Method and kind, as "GET rayjobs" -> a status each; "reset" cuts the connection before, "lost" after the work."""
    hook: Callable[["Api", str, str], None] = lambda *_: None
    """Called with the method and path of each request, before it."""
    version: int = 0

    @property
    def jobs(self) -> dict[str, Any]:
        """The RayJobs by name."""
        return self.objects[RAYJOBS]

    def put(self, folder: str, body: dict[str, Any], created_s: float | None = None) -> dict[str, Any]:
        """Keep an object as the server does."""
        self.version += 1
        at = datetime.datetime.fromtimestamp(created_s or time.time(), datetime.UTC)
        made = {"uid": f"uid-{self.version}", "creationTimestamp": at.strftime("%Y-%m-%dT%H:%M:%SZ")}
        body["metadata"] = made | body["metadata"] | {"resourceVersion": str(self.version)}
        self.objects[folder][body["metadata"]["name"]] = body
        return body

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Do what a request asks for."""
        folder, _, name = (path, "", body["metadata"]["name"]) if method == "POST" else path.rpartition("/")
        kept = self.objects[folder]
        if method == "POST":
            if name in kept:
                return 409, {"message": "already exists"}
            if folder == RAYJOBS:
                self.created.append(name)
            return 201, self.put(folder, body)
        if name not in kept:
            return 404, {"message": "not found"}
        if method == "DELETE":
            if body["preconditions"]["uid"] != kept[name]["metadata"]["uid"]:
                return 409, {"message": "another uid"}
            self.deleted.append(name)
            return 200, kept.pop(name)
        if method == "PUT":
            if body["metadata"]["resourceVersion"] != kept[name]["metadata"]["resourceVersion"]:
                return 409, {"message": "has been modified"}
            return 200, self.put(folder, body)
        if name == NAME and folder == RAYJOBS and self.ends:
            status = self.ends.pop(0) if len(self.ends) > 1 else self.ends[0]
            if status is None:
                del kept[name]
                return 404, {"message": "not found"}
            kept[name]["status"] = status
        return 200, kept[name]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    state = Api(account=tmp_path)
    state.put(RAYJOBS, yaml.safe_load((FOLDER / "rayjob.yaml").read_text()))
    _write_certificate(tmp_path)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "namespace").write_text("rzen")

    class Handler(BaseHTTPRequestHandler):
        def _handle(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
            state.hook(state, self.command, self.path)
            kind = next(folder for folder in state.objects if self.path.startswith(folder)).rpartition("/")[2]
            faults = state.faults.get(f"{self.command} {kind}", [])
            fault = faults.pop(0) if faults else None
            if isinstance(fault, int):
                self._send(fault, {"message": f"fault {fault}"})
            elif self.headers["Authorization"] != f"Bearer {state.token}":
                self._send(401, {"message": "Unauthorized"})
            elif fault == "reset":
                self.close_connection = True
            else:
                answer = state.answer(self.command, self.path, body)
                if fault == "lost":
                    self.close_connection = True
                elif fault == "cut":
                    self._send(*answer, cut=True)
                else:
                    self._send(*answer)

        def _send(self, code: int, body: Any, cut: bool = False) -> None:
            content = json.dumps(body).encode()
            self.send_response(code)
            if code == 429:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: len(content) // 2] if cut else content)

        do_GET = do_POST = do_PUT = do_DELETE = _handle  # noqa: N815  names of the library

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


def _write_certificate(folder: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def run(api: Api, name: str = NAME, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {
        "ACCOUNT_DIR": str(api.account),
        "JOB_NAME": name,
        "JOB_UID": UID,
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(api.port),
        "POLL_S": "0.01",
    }
    command = [sys.executable, str(FOLDER / "retrain_run.py"), "retrain"]
    environment = os.environ | values | environment
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def status(deployment: str, job: str = "", message: str = "") -> dict[str, str]:
    return {"jobDeploymentStatus": deployment, "jobStatus": job, "message": message}


RUNNING = status("Running", "RUNNING")
SUCCEEDED = status("Complete", "SUCCEEDED")


def test_a_tick_starts_a_copy_and_waits_for_its_end(api: Api) -> None:
    api.ends = [status(""), status("Initializing"), RUNNING, RUNNING, SUCCEEDED]
    assert run(api).returncode == 0
    assert len(api.ends) == 1
    made, template = api.jobs[NAME], api.jobs["retrain"]
    assert made["spec"] == template["spec"] | {"suspend": False}
    assert template["spec"]["suspend"] is True
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": NAME, "uid": UID}


def test_a_repeated_tick_waits_for_the_run_that_there_is(api: Api) -> None:
    api.ends = [SUCCEEDED]
    assert run(api).returncode == 0
    api.ends = [RUNNING, SUCCEEDED]
    again = run(api)
    assert (again.returncode, api.created) == (0, [NAME])
    assert "was started before" in again.stderr
    api.ends = []
    api.hook = lambda api, *_: api.jobs.get("retrain-29402100", {}).update(status=SUCCEEDED)
    assert run(api, "retrain-29402100").returncode == 0
    assert api.created == [NAME, "retrain-29402100"]


@pytest.mark.parametrize(
    "end",
    [
        status("Failed", "FAILED", "no data"),
        status("ValidationFailed", "", "no data"),  # kuberay#3980, kueue#13415
        status("Failed", "RUNNING", "no data"),
        status("Complete", "STOPPED", "no data"),
        status("Complete", "FAILED", "no data"),
    ],
    ids=lambda end: "-".join(end.values()),
)
def test_every_end_but_success_is_a_failed_tick(api: Api, end: dict[str, str]) -> None:
    api.ends = [RUNNING, end]
    ended = run(api)
    assert ended.returncode == FAILED
    assert end["jobDeploymentStatus"] in ended.stderr
    assert "no data" in ended.stderr


def test_every_state_of_kuberay_is_known() -> None:
    """As in `rayjob_types.go` of KubeRay 1.7; its schema only says that a state is a string."""
    known = {*retrain_run.ENDED, *retrain_run.UNDER_WAY}
    assert known == {
        "", "Initializing", "Running", "Complete", "Failed", "ValidationFailed", "Suspending", "Suspended", "Retrying",
        "Waiting",
    }  # fmt: skip


def test_a_state_that_nobody_knows_is_reported_and_waited_out(api: Api) -> None:
    api.ends = [status("Pondering"), status("Retrying"), RUNNING, SUCCEEDED]
    ended = run(api)
    assert ended.returncode == 0
    assert "Pondering, a state that this program does not know" in ended.stderr
    assert ended.stderr.count("does not know") == 1


@pytest.mark.parametrize("request_", ["GET leases", "POST leases", "GET rayjobs", "POST rayjobs", "PUT leases"])
def test_an_api_server_that_fails_is_waited_for(api: Api, request_: str) -> None:
    api.ends = [RUNNING, SUCCEEDED]
    api.faults = {request_: [500, 503, "reset", 504, "lost", "cut"]}
    ended = run(api)
    assert (ended.returncode, api.created) == (0, [NAME]), ended.stderr
    assert "503 fault 503; trying again" in ended.stderr


def test_an_outage_while_the_run_is_under_way_is_reported_once_and_waited_out(api: Api) -> None:
    api.ends = [RUNNING, SUCCEEDED]
    asked = []

    def outage(api: Api, method: str, path: str) -> None:
        if api.created:
            asked.append(path)
            if len(asked) == 3:
                api.faults["GET rayjobs"] = [503] * 5 + [429]

    api.hook = outage
    begun_s = time.monotonic()
    ended = run(api)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("503 fault 503; trying again") == 1
    assert "answers again" in ended.stderr
    assert time.monotonic() - begun_s < 30


def test_an_answer_that_never_comes_is_asked_for_again(api: Api) -> None:
    api.ends = [SUCCEEDED]
    slow = [True]

    def hang(api: Api, method: str, path: str) -> None:
        if slow.pop() if slow else False:
            time.sleep(1.5)

    api.hook = hang
    ended = run(api, TIMEOUT_S="0.3")
    assert ended.returncode == 0, ended.stderr
    assert "timed out" in ended.stderr


def test_a_creation_whose_answer_was_lost_makes_one_rayjob(api: Api) -> None:
    api.ends = [SUCCEEDED]
    api.faults = {"POST rayjobs": ["lost", 500, "reset"]}
    assert run(api).returncode == 0
    assert api.created == [NAME]


def test_a_rayjob_that_was_deleted_is_not_made_again(api: Api) -> None:
    api.ends = [RUNNING, None]
    ended = run(api)
    assert (ended.returncode, api.created) == (FAILED, [NAME])
    assert "deleted before its end" in ended.stderr
    ended = run(api)  # the pod was replaced as well
    assert (ended.returncode, api.created) == (FAILED, [NAME])
    assert "was deleted, and is not started again" in ended.stderr


def test_a_rayjob_that_another_has_made_anew_is_not_taken_for_ours(api: Api) -> None:
    def replace(api: Api, method: str, path: str) -> None:
        if method == "GET" and path.endswith(NAME) and NAME in api.jobs:
            api.put(RAYJOBS, {"metadata": {"name": NAME}, "spec": {}, "status": SUCCEEDED})

    api.hook = replace
    ended = run(api)
    assert ended.returncode == FAILED
    assert "deleted before its end" in ended.stderr
    api.hook = lambda *_: None
    api.objects[LEASES].clear()
    api.jobs[NAME]["metadata"]["ownerReferences"] = [{"uid": "another"}]
    ended = run(api)
    assert ended.returncode == FAILED
    assert "of another Job" in ended.stderr


def test_no_run_starts_while_the_rayjob_of_another_is_under_way(api: Api) -> None:
    api.ends = [RUNNING, None]
    run(api)
    api.put(RAYJOBS, {"metadata": {"name": NAME}, "spec": {}, "status": RUNNING})
    api.ends = []
    ended = run(api, "retrain-29402100")
    assert (ended.returncode, api.created) == (FAILED, [NAME])
    assert f"the RayJob of an earlier run, {NAME}, is not at its end (Running)" in ended.stderr


def test_of_two_runs_at_the_same_moment_one_is_left(api: Api) -> None:
    other = "retrain-29402100"

    def race(api: Api, method: str, path: str) -> None:
        if method == "POST" and path == RAYJOBS:  # another run takes the Lease before this one has a RayJob
            lease = {"metadata": {"name": "retrain"}, "spec": {"holderIdentity": other}}
            api.put(LEASES, lease)

    api.hook = race
    ended = run(api)
    assert ended.returncode == FAILED
    assert f"another run ({other}) has started at the same time" in ended.stderr
    assert api.deleted == [NAME]


def test_a_run_ends_at_its_own_deadline_and_leaves_no_rayjob(api: Api) -> None:
    api.ends = [RUNNING]
    ended = run(api, DEADLINE_S="1")
    assert (ended.returncode, api.deleted) == (FAILED, [NAME])
    assert "not at its end after 1 s (Running); its RayJob is deleted" in ended.stderr


def test_the_deadline_counts_from_the_rayjob_not_from_the_pod(api: Api) -> None:
    api.ends = [RUNNING]
    api.put(RAYJOBS, {"metadata": {"name": NAME, "ownerReferences": [{"uid": UID}]}}, time.time() - 5000)
    assert (run(api, DEADLINE_S="4000").returncode, api.deleted) == (FAILED, [NAME])


def test_a_rayjob_that_no_operator_looks_at_does_not_block_the_schedule(api: Api) -> None:
    ended = run(api, START_S="1")
    assert (ended.returncode, api.deleted) == (FAILED, [NAME])
    assert "no KubeRay operator has looked at its RayJob" in ended.stderr


def test_a_token_that_is_replaced_is_read_again(api: Api) -> None:
    api.ends = [RUNNING, SUCCEEDED]

    def rotate(api: Api, method: str, path: str) -> None:
        if api.created and api.token == "secret":
            api.token = "newer"
            threading.Timer(0.02, (api.account / "token").write_text, ["newer"]).start()

    api.hook = rotate
    ended = run(api, POLL_S="0.2")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("code", "told"),
    [(401, "refuses the token of the service account"), (403, "apply the Role"), (422, "no repetition")],
)
def test_what_no_repetition_changes_is_one_clear_error(api: Api, code: int, told: str) -> None:
    api.faults = {"POST rayjobs": [code] * 20}
    ended = run(api)
    assert (ended.returncode, api.created) == (FAILED, [])
    assert f"POST rayjobs: {code} fault {code}; " in ended.stderr
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr


def test_without_a_template_or_a_token_nothing_is_started(api: Api) -> None:
    template = api.jobs.pop("retrain")
    ended = run(api)
    assert ended.returncode == FAILED
    assert "there is no RayJob retrain to copy" in ended.stderr
    api.jobs["retrain"] = template
    (api.account / "token").unlink()
    ended = run(api)
    assert ended.returncode == FAILED
    assert "no token of a service account" in ended.stderr


def cronjob() -> dict[str, Any]:
    documents = yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text())
    (cron,) = [document for document in documents if document["kind"] == "CronJob"]
    return cast(dict[str, Any], cron)


def test_the_account_may_do_what_a_tick_does_and_no_more() -> None:
    (role,) = [
        document for document in yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text()) if document["kind"] == "Role"
    ]
    leases = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"]}
    assert role["rules"] == [
        {"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create", "delete"]},
        leases | {"resourceNames": ["retrain"], "verbs": ["get", "update"]},
        leases | {"verbs": ["create"]},
    ]


def test_names_of_ticks_are_short_enough_for_rayjobs() -> None:
    assert len(cronjob()["metadata"]["name"]) + len("-29392020") <= 47


def test_a_failed_run_is_not_repeated_and_its_deadlines_follow_each_other() -> None:
    spec = cronjob()["spec"]
    job = spec["jobTemplate"]["spec"]
    assert spec["concurrencyPolicy"] == "Forbid"
    assert job["template"]["spec"]["restartPolicy"] == "Never"  # podFailurePolicy needs it
    (container,) = job["template"]["spec"]["containers"]
    failed = {"containerName": container["name"], "operator": "In", "values": [retrain_run.FAILED]}
    assert {"action": "FailJob", "onExitCodes": failed} in job["podFailurePolicy"]["rules"]
    (deadline,) = [entry["value"] for entry in container["env"] if entry["name"] == "DEADLINE_S"]
    rayjob = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())["spec"]
    assert rayjob["activeDeadlineSeconds"] < int(deadline) < job["activeDeadlineSeconds"] - 1200
