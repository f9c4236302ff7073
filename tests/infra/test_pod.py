"""A head's pod on this machine: real Ray with the environment of the rendered manifests, its root mounted read-only."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.kuberay import generate
from jobs.runtime.local_s3 import free_port
from pipelines.storage.location import open_store
from tests.data import publish
from tests.paths import ROOT
from tests.specs import stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(300)]

DISK = "ray_node_disk_utilization_percentage"
RULES = ROOT / "infra" / "monitoring" / "rules.yaml"
TOKEN = "0123456789abcdef" * 4
SLOW = """
import signal, sys, time
def save(*_):
    time.sleep(12)
    open(sys.argv[1], "w").write("saved")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
print("ready", flush=True)
time.sleep(300)
"""
"""A job that needs 12 s for its checkpoint when it is stopped."""


def head() -> dict[str, Any]:
    """The container of a RayJob's head."""
    manifest = yaml.safe_load((generate.HERE / "jobs" / "stage1.yaml").read_text())
    (container,) = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    return dict(container)


@dataclass(frozen=True)
class Pod:
    """A head that runs."""

    tmp: Path
    """Its /tmp, from outside."""
    environment: dict[str, str]
    address: str
    """Of its job server."""
    metrics: str

    def call(self, code: str) -> str:
        """Run Python code with `client`, as someone who has the token. Return what it prints."""
        lines = ["import time", "from ray.job_submission import JobSubmissionClient"]
        lines += [f"client = JobSubmissionClient({self.address!r})", code]
        command = [sys.executable, "-c", "\n".join(lines)]
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, name: str, command: str, environment: dict[str, str] | None = None) -> None:
        """Submit a job."""
        runtime_env = {"env_vars": environment or {}}
        self.call(f"client.submit_job(entrypoint={command!r}, submission_id={name!r}, runtime_env={runtime_env})")

    def wait(self, name: str, word: str = "") -> str:
        """Wait until a job has ended, or has printed a word. Return its status and log."""
        ends = (
            f"client.get_job_status({name!r}).is_terminal() or {word!r} and {word!r} in client.get_job_logs({name!r})"
        )
        told = f"print(client.get_job_status({name!r}).value, client.get_job_logs({name!r}))"
        return self.call(f"while not ({ends}): time.sleep(0.3)\n{told}")

    def series(self, name: str) -> dict[str, float]:
        """Return the series of a metric with their labels, as soon as the pod reports it, and their values."""

        def read() -> dict[str, float]:
            with urllib.request.urlopen(self.metrics, timeout=10) as answer:
                lines = [line.rpartition(" ") for line in answer.read().decode().splitlines()]
            return {series: float(value) for series, _, value in lines if series.startswith(f"{name}{{")}

        _until(lambda: bool(read()), self.tmp / "head.log")
        return read()


@pytest.fixture(scope="module")
def pod() -> Iterator[Pod]:
    mounts = ["unshare", "--map-root-user", "--mount", "sh", str(Path(__file__).with_name("read_only_root.sh"))]
    tmp = Path(tempfile.mkdtemp(prefix="rzp", dir="/tmp"))
    try:
        able = subprocess.run([*mounts, str(tmp), str(ROOT), "true"], capture_output=True, text=True, check=False)
        if able.returncode:
            pytest.skip(f"may not mount a read-only root here ({able.stderr.strip()})")
        ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port")}
        ports |= {name: free_port() for name in ("dashboard-agent-listen-port", "metrics-export-port")}
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "PYTHONPATH": str(ROOT)}
        ours |= {"PATH": os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])}
        ours |= {name: str(free_port()) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
        manifest = {entry["name"]: entry["value"] for entry in head()["env"]}
        in_pod = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "KUBERNETES_SERVICE_PORT": "443"}
        in_pod |= {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0"}  # for a quick end of the tests
        # Four CPUs, which a head on Kubernetes has not: here it is the node of workers, too.
        command = ["ray", "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats"]
        command += ["--dashboard-host=127.0.0.1", *(f"--{name}={port}" for name, port in ports.items())]
        with (tmp / "head.log").open("w") as log:
            process = subprocess.Popen(
                [*mounts, str(tmp), str(ROOT), *command], env=kept | ours | manifest | in_pod, stdout=log, stderr=log
            )
        try:
            address = f"http://127.0.0.1:{ports['dashboard-port']}"
            metrics = f"http://127.0.0.1:{ports['metrics-export-port']}/metrics"
            _until(lambda: _answers(f"{address}/api/version"), tmp / "head.log", process)
            yield Pod(tmp, kept | ours, address, metrics)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def _answers(url: str) -> bool:
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {TOKEN}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def _until(true: Callable[[], bool], log: Path, process: "subprocess.Popen[bytes] | None" = None) -> None:
    deadline_s = time.monotonic() + 120
    while not true():
        assert time.monotonic() < deadline_s, log.read_text()[-3000:]
        assert process is None or process.poll() is None, log.read_text()[-3000:]
        time.sleep(0.3)


def test_training_runs_where_only_the_volumes_can_be_written(pod: Pod) -> None:
    publish(open_store(str(pod.tmp / "store")).child("data"), {"red": ("text_image", 16)})
    (pod.tmp / "stage.yaml").write_text(stage("/tmp/store", run={"root": "/tmp/store/runs"}, steps=2))
    mounts = {mount["mountPath"] for mount in head()["volumeMounts"]}
    assert mounts == {"/dev/shm", "/tmp", "/tmp/ray"}
    pod.submit("train", "touch /root/mine; touch /home/mine; python -m rzen run /tmp/stage.yaml")
    log = pod.wait("train")
    assert log.startswith("SUCCEEDED"), log
    assert "'/root/mine': Read-only file system" in log
    assert (pod.tmp / "store" / "runs" / "stage" / "done.json").is_file()


def test_a_head_reports_the_disk_of_its_node(pod: Pod, tmp_path: Path) -> None:
    """Without the variable of the manifest it reports 0 % of one byte (ray#24292, #14676)."""
    disk = shutil.disk_usage("/")
    (series, percent), *others = pod.series(DISK).items()
    assert not others
    assert percent == pytest.approx(100 * disk.used / (disk.used + disk.free), abs=10)
    if not shutil.which("promtool"):
        pytest.skip("Prometheus is not installed")
    assert fires(tmp_path, series, percent, limit=percent - 1)
    assert not fires(tmp_path, series, percent, limit=percent + 1)
    assert not fires(tmp_path, series, 0.0, limit=percent - 1)  # what a pod reports without the variable


def fires(folder: Path, series: str, value: float, limit: float) -> bool:
    """Whether the alert on full disks, for more than `limit` percent, fires for what a pod has reported."""
    groups = yaml.safe_load(RULES.read_text())["groups"]
    (rule,) = [rule for group in groups for rule in group["rules"] if rule["alert"] == "RzenDiskFull"]
    assert "> 90" in rule["expr"]
    rule = {**rule, "expr": rule["expr"].replace("> 90", f"> {limit}"), "annotations": {}}
    case = {
        "interval": "1m",
        "input_series": [{"series": series.replace("{", '{instance="pod",'), "values": f"{value}x20"}],
        "alert_rule_test": [
            {
                "eval_time": "15m",
                "alertname": "RzenDiskFull",
                "exp_alerts": [{"exp_labels": {"instance": "pod", "severity": "warning"}}],
            }
        ],
    }
    (folder / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "disk", "rules": [rule]}]}))
    (folder / "test.yaml").write_text(yaml.safe_dump({"rule_files": ["rules.yaml"], "tests": [case]}))
    command = ["promtool", "test", "rules", str(folder / "test.yaml")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "got:[]" in (done.stdout + done.stderr).replace(" ", ""), done.stdout + done.stderr
    return done.returncode == 0


def test_a_job_has_time_to_save_when_its_head_goes(pod: Pod) -> None:
    """As `preStop` of the manifest does it. Ray by itself kills the job after 3 s (ray#30803, kuberay#5004)."""
    (pod.tmp / "slow.py").write_text(SLOW)
    pod.submit("ours", "python /tmp/slow.py /tmp/ours")
    pod.submit("default", "python /tmp/slow.py /tmp/default", {"RAY_JOB_STOP_WAIT_TIME_S": "3"})
    assert [pod.wait(name, "ready").split()[0] for name in ("ours", "default")] == ["RUNNING", "RUNNING"]
    command = head()["lifecycle"]["preStop"]["exec"]["command"]
    subprocess.run([*command, "--address", pod.address], env=pod.environment, cwd=ROOT, check=True)
    assert (pod.tmp / "ours").read_text() == "saved"
    assert not (pod.tmp / "default").exists()
    assert [pod.wait(name).split()[0] for name in ("ours", "default")] == ["STOPPED", "STOPPED"]
