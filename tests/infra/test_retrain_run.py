"""A run of retraining on Kubernetes against an API server that keeps RayJobs in a dictionary, over TLS."""

import datetime
import ipaddress
import json
import os
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.paths import ROOT

FOLDER = ROOT / "infra" / "kuberay" / "retrain"
PATH = "/apis/ray.io/v1/namespaces/rzen/rayjobs"


@dataclass
class Api:
    """What the server holds, and what a RayJob becomes once it has been asked for."""

    account: Path
    port: int = 0
    jobs: dict[str, Any] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    ends: list[dict[str, str]] = field(default_factory=list)


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    template = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    state = Api(account=tmp_path, jobs={"retrain": template})
    _write_certificate(tmp_path)
    (tmp_path / "token").write_text("secret")
    (tmp_path / "namespace").write_text("rzen")

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, code: int, body: Any) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self) -> None:
            name = self.path.removeprefix(f"{PATH}/")
            if self.headers["Authorization"] != "Bearer secret":
                self._answer(401, {})
            elif name not in state.jobs:
                self._answer(404, {})
            else:
                status = state.ends.pop(0) if name != "retrain" and state.ends else {}
                self._answer(200, state.jobs[name] | {"status": status})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name = body["metadata"]["name"]
            if self.path != PATH or name in state.jobs:
                self._answer(409, {})
                return
            state.jobs[name] = body
            state.created.append(name)
            self._answer(201, body)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "ca.crt", tmp_path / "key.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
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


def run(api: Api, name: str = "retrain-29392020") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "ACCOUNT_DIR": str(api.account),
        "JOB_NAME": name,
        "JOB_UID": "0a1b",
        "KUBERNETES_SERVICE_HOST": "127.0.0.1",
        "KUBERNETES_SERVICE_PORT": str(api.port),
        "POLL_S": "0.01",
    }
    command = [sys.executable, str(FOLDER / "retrain_run.py"), "retrain"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)


RUNNING = {"jobDeploymentStatus": "Running", "jobStatus": "RUNNING"}
SUCCEEDED = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "message": "no data"}


def test_a_tick_starts_a_copy_and_waits_for_its_end(api: Api) -> None:
    api.ends = [{}, RUNNING, RUNNING, SUCCEEDED]
    assert run(api).returncode == 0
    assert api.ends == []
    made, template = api.jobs["retrain-29392020"], api.jobs["retrain"]
    assert made["spec"] == template["spec"] | {"suspend": False}
    assert template["spec"]["suspend"] is True
    (owner,) = made["metadata"]["ownerReferences"]
    assert owner == {"apiVersion": "batch/v1", "kind": "Job", "name": "retrain-29392020", "uid": "0a1b"}


def test_a_repeated_tick_waits_for_the_run_that_there_is(api: Api) -> None:
    api.ends = [SUCCEEDED]
    assert run(api).returncode == 0
    api.ends = [RUNNING, SUCCEEDED]
    again = run(api)
    assert (again.returncode, api.created) == (0, ["retrain-29392020"])
    assert "was started before" in again.stderr
    api.ends = [SUCCEEDED]
    assert run(api, "retrain-29402100").returncode == 0
    assert api.created == ["retrain-29392020", "retrain-29402100"]


def test_a_failed_run_is_a_failed_tick(api: Api) -> None:
    api.ends = [RUNNING, FAILED]
    ended = run(api)
    assert ended.returncode == 1
    assert "FAILED: no data" in ended.stderr


def test_the_account_may_do_what_a_tick_does_and_no_more() -> None:
    (role,) = [
        document for document in yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text()) if document["kind"] == "Role"
    ]
    assert role["rules"] == [{"apiGroups": ["ray.io"], "resources": ["rayjobs"], "verbs": ["get", "create"]}]


def test_names_of_ticks_are_short_enough_for_rayjobs() -> None:
    (cron,) = [
        document
        for document in yaml.safe_load_all((FOLDER / "cronjob.yaml").read_text())
        if document["kind"] == "CronJob"
    ]
    assert len(cron["metadata"]["name"]) + len("-29392020") <= 47
    assert cron["spec"]["concurrencyPolicy"] == "Forbid"
    job = yaml.safe_load((FOLDER / "rayjob.yaml").read_text())
    assert job["spec"]["activeDeadlineSeconds"] < cron["spec"]["jobTemplate"]["spec"]["activeDeadlineSeconds"]
