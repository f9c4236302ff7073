"""The local cluster with stand-ins for ray, prometheus and grafana: what it starts, says and ends."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from infra.local.up import RAY_DASHBOARD
from tests.paths import ROOT

STAND_IN = f"""#!{sys.executable}
import os, pathlib, signal, sys, time
me = pathlib.Path(__file__)
def end(*_):
    with (me.parent / "ended").open("a") as ended:
        ended.write(me.name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
me.with_suffix(".environment").write_text("\\n".join(f"{{name}}={{value}}" for name, value in os.environ.items()))
me.with_suffix(".arguments").write_text(" ".join(sys.argv[1:]))
time.sleep(60)
"""


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """A folder for stand-ins, to be first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def install(programs: Path, *names: str) -> None:
    for name in names:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)


def start(programs: Path, folder: Path, **variables: str) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.Popen(
        [sys.executable, "-m", "infra.local.up", "--temp-dir", str(folder), "--num-cpus", "2"],
        cwd=ROOT,
        env=kept | {"PATH": str(programs)} | variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def said(process: subprocess.Popen[str]) -> list[str]:
    assert process.stdout is not None
    lines = []
    while not lines or lines[-1] != "# Ctrl-C ends it":
        line = process.stdout.readline()
        assert line, process.stderr.read() if process.stderr else ""
        lines.append(line.rstrip())
    return lines


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists() or not path.read_text():
        assert time.monotonic() < deadline, path
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_ends_what_it_started_and_nothing_else(programs: Path, tmp_path: Path, number: signal.Signals) -> None:
    install(programs, "ray", "prometheus", "grafana")
    other = subprocess.Popen([programs / "ray", "of", "somebody", "else"])
    wait_for(programs / "ray.arguments")
    process = start(programs, tmp_path / "t")
    try:
        said(process)
        for name in ("prometheus", "grafana"):
            wait_for(programs / f"{name}.arguments")
        while "--head" not in wait_for(programs / "ray.arguments"):
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(20) == 0
        assert (programs / "ended").read_text().split() == ["grafana", "prometheus", "ray"]
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()
        process.kill()


def test_ray_gets_a_token_and_monitoring_finds_it(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray", "prometheus", "grafana")
    folder = tmp_path / "t"
    process = start(programs, folder)
    try:
        lines = said(process)
        arguments = wait_for(programs / "ray.arguments")
        wait_for(programs / "grafana.arguments")
    finally:
        process.terminate()
        process.wait(20)
    environment = wait_for(programs / "ray.environment").splitlines()
    (token,) = [line for line in environment if line.startswith("RAY_AUTH_TOKEN=")]
    assert len(token.partition("=")[2]) == 64
    assert "RAY_AUTH_MODE=token" in environment
    assert f"export {token}" in lines
    assert "RAY_PROMETHEUS_HOST=http://127.0.0.1:9090" in environment
    assert "RAY_GRAFANA_HOST=http://127.0.0.1:3000" in environment
    assert "RAY_GRAFANA_DATA_DASHBOARD_UID=rzen" in environment  # Ray's dashboard shows ours
    assert "--dashboard-host=127.0.0.1" in arguments
    assert "--num-cpus=2" in arguments
    config = yaml.safe_load((folder / "prometheus.yaml").read_text())
    assert all(Path(name).is_file() for name in config["rule_files"])
    discovery = config["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert discovery == [str(folder / "prom_metrics_service_discovery.json")]
    assert (folder / "provisioning" / "dashboards" / "provider.yaml").is_file()
    assert (folder / "provisioning" / "datasources" / "datasource.yaml").is_file()
    grafana = dict(line.split("=", 1) for line in wait_for(programs / "grafana.environment").splitlines())
    assert (Path(grafana["RZEN_DASHBOARDS"]) / "rzen.json").is_file()
    assert grafana["RZEN_RAY_DASHBOARD"] == str(folder / RAY_DASHBOARD)
    provisioned = "".join(path.read_text() for path in (folder / "provisioning").rglob("*.yaml"))
    assert set(re.findall(r"\$\{(\w+)\}", provisioned)) <= set(grafana)


def test_without_monitoring_and_without_token_if_the_user_says_so(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray")
    process = start(programs, tmp_path / "t", RAY_AUTH_MODE="disabled")
    try:
        lines = said(process)
        wait_for(programs / "ray.arguments")
        environment = (programs / "ray.environment").read_text()
    finally:
        process.terminate()
        process.wait(20)
    assert "export RAY_AUTH_MODE=disabled" in lines
    assert "RAY_AUTH_TOKEN" not in environment
    assert "RAY_GRAFANA_HOST" not in environment
    assert {"# prometheus is not installed", "# grafana is not installed"} <= set(lines)


def test_a_ray_that_does_not_start_is_told(programs: Path, tmp_path: Path) -> None:
    (programs / "ray").write_text("#!/bin/sh\nexit 1\n")
    (programs / "ray").chmod(0o755)
    process = start(programs, tmp_path / "t")
    assert process.wait(20) == 1
    assert process.stderr is not None
    assert f"ray has ended: {tmp_path / 't' / 'ray.log'}" in process.stderr.read()
