"""The local cluster with stand-ins for ray, prometheus and grafana: what it starts, says and ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from infra.local.up import RAY_DASHBOARD
from jobs.runtime.local_s3 import free_port
from tests.paths import ROOT

STAND_IN = f"""#!{sys.executable}
import http.server, os, pathlib, signal, sys, time
me = pathlib.Path(__file__)
def end(*_):
    with (me.parent / "ended").open("a") as ended:
        ended.write(me.name + "\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
me.with_suffix(".environment").write_text("\\n".join(f"{{name}}={{value}}" for name, value in os.environ.items()))
me.with_suffix(".arguments").write_text(" ".join(sys.argv[1:]))
for port in (word.partition("=")[2] for word in sys.argv if word.startswith("--dashboard-port=")):
    time.sleep(float(os.environ.get("STARTS_AFTER_S", 0)))
    answers = type("Answers", (http.server.BaseHTTPRequestHandler,), {{"do_GET": lambda self: self.send_error(401)}})
    http.server.ThreadingHTTPServer(("127.0.0.1", int(port)), answers).serve_forever()
time.sleep(60)
"""
PORTS = ("port", "dashboard-port", "client-port", "prometheus-port", "grafana-port")


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


def start(programs: Path, folder: Path, *options: str, **variables: str) -> subprocess.Popen[str]:
    ports = [f"--{name}={free_port()}" for name in PORTS]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    return subprocess.Popen(
        [sys.executable, "-m", "infra.local.up", "--temp-dir", str(folder), "--num-cpus", "2", *ports, *options],
        cwd=ROOT,
        env=kept | {"PATH": str(programs), "HOME": str(programs.parent)} | variables,
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
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text()) == 64
    assert token.stat().st_mode & 0o777 == 0o600
    assert token.read_text() not in "".join(lines)
    assert "RAY_AUTH_MODE=token" in environment
    assert f"which asks once for the token: `cat {token}`" in "".join(lines)
    assert re.search(r"^RAY_PROMETHEUS_HOST=http://127.0.0.1:\d+$", "\n".join(environment), re.MULTILINE)
    assert re.search(r"^RAY_GRAFANA_HOST=http://127.0.0.1:\d+$", "\n".join(environment), re.MULTILINE)
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


def test_a_token_that_is_there_is_kept(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray")
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("mine")
    process = start(programs, tmp_path / "t")
    try:
        said(process)
        environment = wait_for(programs / "ray.environment")
    finally:
        process.terminate()
        process.wait(20)
    assert token.read_text() == "mine"
    assert "RAY_AUTH_TOKEN=" not in environment


def test_a_token_of_the_environment_is_not_written(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray")
    process = start(programs, tmp_path / "t", RAY_AUTH_TOKEN="mine")
    try:
        lines = said(process)
    finally:
        process.terminate()
        process.wait(20)
    assert "export RAY_AUTH_TOKEN=mine" in lines
    assert not (tmp_path / ".ray").exists()


def test_a_home_that_cannot_be_written_is_one_error(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray")
    (tmp_path / ".ray").write_text("a file")
    out, err = start(programs, tmp_path / "t").communicate(timeout=60)
    assert err == f"{tmp_path / '.ray'}: File exists: cannot keep a token there; set RAY_AUTH_TOKEN\n"
    assert out == ""


def test_ports_of_workers_cannot_be_those_of_ray(programs: Path, tmp_path: Path) -> None:
    """By default, Ray takes 10002 to 19999 for workers, and refuses a port of its own among them."""
    install(programs, "ray")
    process = start(programs, tmp_path / "t", "--port=10500")
    try:
        said(process)
        arguments = wait_for(programs / "ray.arguments")
    finally:
        process.terminate()
        process.wait(20)
    assert "--port=10500" in arguments
    assert "--min-worker-port=0 --max-worker-port=0" in arguments


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
    """There is nothing to paste yet."""
    (programs / "ray").write_text("#!/bin/sh\necho 'ValueError: no'\necho\nexit 1\n")
    (programs / "ray").chmod(0o755)
    out, err = start(programs, tmp_path / "t").communicate(timeout=60)
    assert err == f"ray has ended: {tmp_path / 't' / 'ray.log'}: ValueError: no\n"
    assert out == ""


def test_nothing_is_printed_to_paste_before_the_dashboard_answers(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray")
    process = start(programs, tmp_path / "t", STARTS_AFTER_S="1000")
    try:
        wait_for(programs / "ray.arguments")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (out, err, process.returncode) == ("", "", 0)


def test_taken_ports_are_named_with_their_options(programs: Path, tmp_path: Path) -> None:
    install(programs, "ray", "grafana")
    with socket.create_server(("127.0.0.1", 0)) as one, socket.create_server(("", 0)) as two:
        numbers = [some.getsockname()[1] for some in (one, two)]
        same = free_port()
        options = [f"--dashboard-port={numbers[0]}", f"--grafana-port={numbers[1]}", f"--prometheus-port={numbers[0]}"]
        process = start(programs, tmp_path / "t", *options, f"--port={same}", f"--client-port={same}")
        out, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert err.splitlines() == [
        f"port {numbers[0]} is taken by another program: choose another with --dashboard-port",
        f"port {same} is that of --port: choose another with --client-port",
        f"port {numbers[1]} is taken by another program: choose another with --grafana-port",
    ]  # Prometheus is not installed
    assert out == ""
    assert not (programs / "ray.arguments").exists()
