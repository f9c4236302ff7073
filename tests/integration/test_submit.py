"""Jobs on a cluster that was started for them: Ray's own command, with and without the hook, tokens, stop and go on.

Some tests follow what users of Ray reported: numbers such as ray#41590 are those of public reports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails

from pipelines.storage.location import open_store
from tests.data import publish
from tests.infra.local_cluster import local_cluster
from tests.plug_in import TICKS, write_plug_in
from tests.specs import stage
from tests.tcp_proxy import TcpProxy

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]
HOOK = {"RAY_JOB_SUBMIT_HOOK": "jobs.hook.submit"}
CORPUS = (
    '#!/usr/bin/env -S python -m jobs.run\nkind: corpus\nout: "{0}/corpus"\ncorpus: {{num_images: 4, num_composed: 0, '
)
CORPUS += "num_documents: 0, num_clips: 0, num_texts: 0}}\n"


def train(root: Path, steps: int) -> str:
    """A run that takes no checkpoint by itself."""
    run = {"root": f"{root}/runs", "tracking": {"tensorboard": False}}
    return stage(str(root), name="stopped", run=run, steps=steps, checkpoint={"every_steps": 10_000})


@dataclass
class Cluster:
    """A head with its dashboard, on which every request needs a token."""

    environment: dict[str, str]
    url: str
    head: int
    """Its process."""

    def details(self, job: str) -> JobDetails:
        """The state of a job."""
        request = urllib.request.Request(f"{self.url}/api/jobs/{job}", headers=self._token())
        with urllib.request.urlopen(request) as answer:
            return JobDetails(**json.load(answer))

    def ids(self) -> list[str]:
        """All jobs that were submitted."""
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/jobs/", headers=self._token())) as answer:
            return [job["submission_id"] for job in json.load(answer) if job["submission_id"]]

    def _token(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}

    def process(self, name: str) -> psutil.Process:
        """The newest process of this cluster whose command has `name` in it."""
        found = []
        for process in psutil.Process(self.head).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return max(found, key=psutil.Process.create_time)

    def start(self, *command: str, cwd: Path, log: Path, **variables: str) -> subprocess.Popen[bytes]:
        """Start a command that goes on, and that appends to `log`."""
        with log.open("ab") as out:
            return subprocess.Popen(command, cwd=cwd, env=self.environment | variables, stdout=out, stderr=out)

    def run(self, *command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=cwd, env=self.environment | variables, capture_output=True, text=True, timeout=300
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """As `python -m infra.local.up` starts it, in the folder of the repository."""
    with local_cluster("--num-cpus=4") as started:
        environment = dict(started.environment)
        environment.pop("RAY_ADDRESS")  # a laptop knows the dashboard alone
        yield Cluster(environment, environment["RAY_API_SERVER_ADDRESS"], started.head)


def test_the_literal_command_runs_a_spec_where_the_cluster_was_started(cluster: Cluster, tmp_path: Path) -> None:
    """Without the hook: Ray runs the file itself, in the folder that the head was started in."""
    spec = tmp_path / "corpus.yaml"
    spec.write_text(CORPUS.format(tmp_path))
    spec.chmod(0o755)
    done = cluster.run("ray", "job", "submit", str(spec), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 samples in" in done.stdout
    assert (tmp_path / "corpus").is_dir()


def test_with_the_hook_the_folder_of_a_new_spec_travels_along(cluster: Cluster, tmp_path: Path) -> None:
    laptop = tmp_path / "laptop"
    laptop.mkdir()
    new = cluster.run("rzen", "new", "corpus", "mine.yaml", cwd=laptop)
    assert "`rzen submit mine.yaml` sends it to a cluster" in new.stdout, new.stderr
    none = dict.fromkeys(("num_composed", "num_documents", "num_clips", "num_texts"), 0)
    with (laptop / "mine.yaml").open("a") as spec:
        spec.write(f'out: "{tmp_path}/corpus"\ncorpus: {json.dumps(none)}\n')
    done = cluster.run("ray", "job", "submit", "--", "mine.yaml", "--set", "corpus.num_images=5", cwd=laptop, **HOOK)
    assert done.returncode == 0, done.stdout + done.stderr
    for told in ("5 samples in", "dashboard  http://", "rzen stop raysubmit_", "succeeded"):
        assert told in done.stdout


def test_a_job_that_fails_gives_its_exit_status_and_one_message(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "train.yaml").write_text(train(tmp_path, 3))  # there are no data
    done = cluster.run("rzen", "submit", "train.yaml", cwd=tmp_path)
    assert done.returncode == 1
    assert re.search(r"error: .*/data.*manifest", done.stdout)
    assert "Traceback" not in done.stdout
    mistake = cluster.run("ray", "job", "submit", "--", "train.yaml", "--set", "steps=-1", cwd=tmp_path, **HOOK)
    assert mistake.returncode == 1
    assert "error: --set steps=-1: steps=-1: input should be" in mistake.stderr
    assert "submitted" not in mistake.stdout  # a mistake in a spec never gets to the cluster


def test_a_kind_of_another_package_is_submitted(cluster: Cluster, tmp_path: Path) -> None:
    """Its package is in the folder that is sent along."""
    folder = tmp_path / "laptop"
    write_plug_in(folder)
    (folder / "count.yaml").write_text(f'kind: count\nfile: count.yaml\nout: "{tmp_path}/lines.json"\n')
    unknown = cluster.run("rzen", "submit", "count.yaml", cwd=folder)
    assert "kind='count' is not a kind of job" in unknown.stderr
    path = os.pathsep.join([str(folder), cluster.environment["PYTHONPATH"]])
    done = cluster.run("rzen", "submit", "count.yaml", cwd=folder, PYTHONPATH=path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((tmp_path / "lines.json").read_text()) == {"lines": 3, "runs": 1}


def test_without_the_token_nobody_submits(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "corpus.yaml").write_text(CORPUS.format(tmp_path))
    for wrong in ({"RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}):
        done = cluster.run("rzen", "submit", "corpus.yaml", cwd=tmp_path, **wrong)
        assert done.returncode == 1
        assert "asks for a token" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "corpus").exists()


def lines_of(log: Path) -> list[int]:
    """The numbered lines in what a submitter printed."""
    return [int(number) for number in re.findall(r"^line (\d+)$", log.read_text(), re.MULTILINE)]


def wait_for_lines(log: Path, more: int = 3) -> None:
    """Wait until a submitter has printed some more lines."""
    before, deadline = len(lines_of(log)), time.monotonic() + 120
    while len(lines_of(log)) < before + more:
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.05)


@pytest.fixture
def ticking(tmp_path: Path) -> Iterator[Path]:
    """A folder with a package of kind `ticks`, and its spec among the results, which git ignores."""
    folder = tmp_path / "laptop"
    write_plug_in(folder, TICKS, "ticking", "ticks")
    (folder / "runs").mkdir()
    (folder / ".gitignore").write_text("/runs/\n")
    (folder / "runs/ticks.yaml").write_text(f"kind: ticks\nuntil: {tmp_path}/end\nstatus: 7\n")
    yield folder
    (tmp_path / "end").touch()  # a test that has failed leaves no job


def test_a_job_is_followed_whatever_happens_to_connections_server_and_submitter(
    cluster: Cluster, ticking: Path, tmp_path: Path
) -> None:
    """The log is cut five times (ray#57002, ray#51601), the job server restarts (ray#60665), the submitter is killed.

    Another address in the environment is not that of the job (ray#41590, ray#36064). Its spec is under `runs/`, which
    git ignores (ray#50167).
    """
    first, second = tmp_path / "first.log", tmp_path / "second.log"
    path = os.pathsep.join([str(ticking), cluster.environment["PYTHONPATH"]])
    elsewhere = {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9", "RAY_ADDRESS": "127.0.0.1:9", "PYTHONPATH": path}
    before = cluster.ids()
    with TcpProxy(int(cluster.url.rpartition(":")[2])) as proxy:
        command = ["rzen", "submit", "runs/ticks.yaml", "--submission-id", "kept", "--address", proxy.url]
        submitter = cluster.start(*command, cwd=ticking, log=first, **elsewhere)
        try:
            wait_for_lines(first)
            for _ in range(5):
                proxy.cut()
                wait_for_lines(first)
            assert proxy.num_streams >= 6
            server = cluster.process("JobHead")
            server.kill()
            proxy.refuse(True)
            time.sleep(1)
            proxy.refuse(False)
            wait_for_lines(first)
            assert cluster.process("JobHead").pid != server.pid
        finally:
            submitter.send_signal(signal.SIGKILL)
            submitter.wait()
        again = cluster.start(*command, cwd=ticking, log=second, **elsewhere)
        wait_for_lines(second)
        (tmp_path / "end").touch()
        assert again.wait(120) == 7, second.read_text()
    seen = lines_of(first)
    assert seen == list(range(len(seen)))
    (number,) = re.findall(r"ends after (\d+) lines", second.read_text())
    assert lines_of(second) == list(range(int(number)))
    assert f"submitted kept to {proxy.url}" in first.read_text()
    assert first.read_text().count("does not answer") <= 2  # one message for each outage
    assert f"kept is on {proxy.url} already: running" in second.read_text()
    assert set(cluster.ids()) - set(before) == {"kept"}

    other = [*command[:-1], cluster.url, "--set", "status=8"]
    refused = cluster.run(*other, cwd=ticking, PYTHONPATH=path)
    assert refused.returncode == 1
    assert "error: kept: was submitted with other settings of status; choose another --submission-id" in refused.stderr


def test_the_hook_passes_on_what_ray_was_given(cluster: Cluster, tmp_path: Path) -> None:
    """Also kuberay#2154: ids, metadata and environments of jobs."""
    (tmp_path / "laptop").mkdir()
    spec = CORPUS.format(tmp_path) + "submit: {env: {A: spec, B: spec}, cpus: 2}\n"
    (tmp_path / "laptop/corpus.yaml").write_text(spec)
    options = ["--address", cluster.url, "--submission-id", "hooked", "--metadata-json", '{"team": "search"}']
    options += ["--runtime-env-json", '{"env_vars": {"B": "mine"}}', "--entrypoint-num-cpus", "0.5"]
    wrong = HOOK | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:9"}
    command = ["ray", "job", "submit", *options, "--no-wait", "--", "corpus.yaml"]
    done = cluster.run(*command, cwd=tmp_path / "laptop", **wrong)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"submitted hooked to {cluster.url}" in done.stdout
    job = cluster.details("hooked")
    assert job.metadata is not None
    assert job.metadata["team"] == "search"
    assert job.metadata["job_name"] == "corpus corpus"  # what the dashboard shows
    assert job.runtime_env is not None
    assert job.runtime_env["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "60", "A": "spec", "B": "mine"}
    followed = cluster.run("rzen", "attach", "hooked", cwd=tmp_path)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert "4 samples in" in followed.stdout
    unknown = cluster.run("rzen", "attach", "nobody", cwd=tmp_path)
    assert unknown.returncode == 1
    assert f"error: nobody: is not a job on {cluster.url}; name one of hooked" in unknown.stderr


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("entrypoint-label-selector", {"ray.io/node-id": "0f" * 28}, r"it could not be placed \(.*not schedulable"),
        ("runtime-env-json", {"py_modules": ["gcs://_ray_pkg_0.zip"]}, r"could not be set up \(.*Failed to download"),
    ],
)
def test_a_job_that_never_started_says_why(
    option: str, value: dict[str, object], reason: str, cluster: Cluster, tmp_path: Path
) -> None:
    """It is not a job whose process was lost (ray#41437), and another attempt would not help."""
    (tmp_path / "corpus.yaml").write_text(CORPUS.format(tmp_path) + "submit: {retries: 1}\n")
    command = ["ray", "job", "submit", f"--{option}", json.dumps(value), "--", "corpus.yaml"]
    done = cluster.run(*command, cwd=tmp_path, **HOOK)
    assert done.returncode == 1
    assert re.search(f"failed, exit status 1: .*{reason}", done.stdout), done.stdout
    assert "lost" not in done.stdout
    assert "attempt" not in done.stdout


@pytest.mark.long
def test_a_job_whose_process_is_lost_runs_again(cluster: Cluster, ticking: Path, tmp_path: Path) -> None:
    path = os.pathsep.join([str(ticking), cluster.environment["PYTHONPATH"]])
    command = ["rzen", "submit", "runs/ticks.yaml", "--submission-id", "lost", "--set", "submit.retries=1"]
    log = tmp_path / "log"
    submitter = cluster.start(*command, cwd=ticking, log=log, PYTHONPATH=path)
    for attempt in (1, 2):
        while f"attempt {attempt} of 2" not in log.read_text() and attempt > 1:
            assert submitter.poll() is None, log.read_text()
            time.sleep(0.2)
        wait_for_lines(log)
        cluster.process("ray::JobSupervisor").kill()
    assert submitter.wait(120) == 1
    assert len(re.findall(r"lost(?:-2)? failed, exit status 1: its process was lost \(.*died", log.read_text())) == 2
    again = cluster.run(*command, cwd=ticking, PYTHONPATH=path)
    assert again.returncode == 1
    assert "lost-2 is on" in again.stdout


@pytest.mark.long
def test_a_stopped_job_leaves_a_checkpoint_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 24)})
    (tmp_path / "train.yaml").write_text(train(tmp_path, 3000))
    started = cluster.run("rzen", "submit", "train.yaml", "--no-wait", cwd=tmp_path)
    assert started.returncode == 0
    (job,) = re.findall(r"submitted (\S+)", started.stdout)
    run = tmp_path / "runs/stopped"
    deadline = time.monotonic() + 300
    while not (run / "metrics.jsonl").exists():
        assert time.monotonic() < deadline, cluster.run("ray", "job", "logs", job, cwd=tmp_path).stdout
        time.sleep(0.2)
    (listed,) = json.loads(cluster.run("rzen", "runs", "--json", cwd=tmp_path).stdout)
    assert (listed["state"], listed["steps"]) == ("running", 3000)
    stopped = cluster.run("rzen", "stop", job, cwd=tmp_path)
    assert (stopped.returncode, stopped.stdout) == (0, f"{job} stopped\n"), stopped.stderr
    log = cluster.run("rzen", "logs", job, cwd=tmp_path).stdout
    assert "saving; the same command resumes from there" in log
    (listed,) = json.loads(cluster.run("rzen", "runs", "--json", cwd=tmp_path).stdout)
    assert listed["state"] == "interrupted"
    checkpoint = json.loads((run / "latest.json").read_text())["path"]  # the spec asks for none
    step = json.loads((run / checkpoint / "state.json").read_text())["step"]
    assert 0 < step < 3000

    (tmp_path / "train.yaml").write_text(train(tmp_path, 3000))
    again = cluster.run("rzen", "submit", "train.yaml", cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"resumes from step {step}" in again.stdout
    rows = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(3000))
