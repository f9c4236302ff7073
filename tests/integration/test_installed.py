"""The installed package in a folder that has packages `jobs` and `pipelines` of its own: commands, jobs, submission."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.runtime.local_s3 import free_port
from rzen.packages import are_hidden
from tests.paths import ROOT

PIPELINE = """\
kind: pipeline
name: all
state: runs/state
jobs:
  corpus:
    spec: jobs/corpus.yaml
    set:
      out: runs/corpus
      corpus: {num_images: 6, num_composed: 0, num_documents: 1, pages_per_document: 2, num_clips: 2, num_texts: 2}
  ingest: {spec: jobs/ingest.yaml, set: {input: runs/corpus, out: runs/data}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder whose packages cannot be imported, so that nothing works that imports them."""
    folder = tmp_path / "user"
    for name in ("jobs", "pipelines"):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(f"raise ImportError('{name} of the user')\n")
    (folder / "all.yaml").write_text(PIPELINE)
    return folder


def test_a_folder_with_packages_of_the_same_names_is_seen(folder: Path, tmp_path: Path) -> None:
    assert are_hidden(str(folder))
    assert not are_hidden(str(ROOT))
    assert not are_hidden(str(tmp_path))


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of a new environment: this package built and installed in it, its dependencies from the present one."""
    place = tmp_path_factory.mktemp("installed")
    source = place / "source"  # building leaves files in the folder that it builds
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True).stdout
    names = [name for name in tracked.decode().split("\0") if name and (ROOT / name).is_file()]
    for name in names:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", f"--wheel-dir={place}", str(source)]
    subprocess.run(wheel, check=True)
    venv.create(place / "venv", with_pip=False)
    python = place / "venv/bin/python"
    packages = place / f"venv/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # its own .pth files do not count
    (built,) = place.glob("rzen-*.whl")
    install = [*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(built)]
    subprocess.run(install, check=True, env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"})
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k != "PYTHONPATH"}
    return kept | {"PATH": os.pathsep.join([str(python.parent), "/usr/bin", "/bin"])}


def run(*command: str, cwd: Path, env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def check(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_commands_and_jobs_find_the_installed_package(environment: dict[str, str], folder: Path) -> None:
    code = "import jobs, rzen; print(jobs.__file__)"
    assert "jobs of the user" in run("python", "-c", code, cwd=folder, env=environment).stderr  # what is avoided
    for variables in ({}, {"PYTHONPATH": "."}):
        for command in (["rzen"], ["python", "-m", "rzen"]):
            told = check(
                run(*command, "validate", "all.yaml", "jobs/stage2.yaml", cwd=folder, env=environment | variables)
            )
            assert "jobs/stage2.yaml: valid train job" in told
    check(run("rzen", "run", "all.yaml", cwd=folder, env=environment))
    assert (folder / "runs/data/train/manifest.json").is_file()


@pytest.fixture
def cluster(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """Variables that name a cluster of the installed package, started in an empty folder."""
    ports = {name: free_port() for name in ("port", "dashboard-port", "ray-client-server-port", "metrics-export-port")}
    ports["dashboard-agent-listen-port"] = free_port()
    metrics = {name: str(free_port()) for name in ("AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT")}
    started = environment | metrics | {"RAY_AUTH_MODE": "disabled"}
    (tmp_path / "head").mkdir()
    with tempfile.TemporaryDirectory(prefix="rz", dir="/tmp") as temporary:
        command = ["python", "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"]
        command += ["--num-cpus=4", "--dashboard-host=127.0.0.1", f"--temp-dir={temporary}"]
        command += [f"--{name}={port}" for name, port in ports.items()]
        with (tmp_path / "head.log").open("wb") as log:
            head = subprocess.Popen(command, cwd=tmp_path / "head", env=started, stdout=log, stderr=log)
        try:
            named = started | {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{ports['dashboard-port']}"}
            listed = ["python", "-m", "ray.scripts.scripts", "job", "list"]
            deadline_s = time.monotonic() + 120
            while run(*listed, cwd=tmp_path, env=named).returncode != 0:
                assert time.monotonic() < deadline_s, (tmp_path / "head.log").read_text()
                time.sleep(1)
            yield named
        finally:
            head.terminate()
            head.wait(60)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_submitted_job_finds_the_installed_package(cluster: dict[str, str], folder: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    changes = {"state": f"{store}/state", "jobs.corpus.set.out": f"{store}/corpus"}
    changes |= {"jobs.ingest.set.input": f"{store}/corpus", "jobs.ingest.set.out": f"{store}/data"}
    options = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    told = check(run("rzen", "submit", "all.yaml", *options, cwd=folder, env=cluster))
    assert "all complete in" in told
    assert (store / "data/train/manifest.json").is_file()
