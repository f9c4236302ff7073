"""Runs a Ray cluster with monitoring on this machine until Ctrl-C: `python -m infra.local.up`.

It starts Ray's head with its dashboard. If they are installed, it also starts Prometheus with our alerts and Grafana
with our dashboard. Once the dashboard answers, it prints the variables to paste into other shells. At the end it stops
only what it started: `ray stop` would end every Ray of the machine.

The cluster's token is that in ~/.ray/auth_token, where all of Ray's tools look for it. The first start writes it there.

tests/infra/test_local.py runs it with stand-ins for the programs. tests/infra/test_prometheus.py uses a real Ray
and Prometheus.
"""

from __future__ import annotations

import argparse
import http.client
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml

from jobs.runtime.local_s3 import free_port

MONITORING = Path(__file__).resolve().parents[1] / "monitoring"
RAY_DASHBOARD = "session_latest/metrics/grafana/dashboards/default_grafana_dashboard.json"
_DISCOVERY = "prom_metrics_service_discovery.json"
_START_TIMEOUT = "RAY_worker_register_timeout_seconds"
_LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_POLL_S = 0.2
_GRACE_S = 20
_START_S = 180


def main() -> int:
    """Start the programs, print their addresses, and wait. Return 1 if one cannot start or ended by itself."""
    options = _options()
    folder = Path(options.temp_dir)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        environment = os.environ | _environment(options)
    except OSError as error:
        sys.stderr.write(f"{error.filename}: {error.strerror}: cannot keep a token there; set RAY_AUTH_TOKEN\n")
        return 1
    commands = _commands(options, folder)
    if problems := _taken_ports(options, list(commands)):
        sys.stderr.write("\n".join([*problems, ""]))
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell that starts it in the background has SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    started: dict[str, subprocess.Popen[bytes]] = {}
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                # A session of its own: Ctrl-C reaches this program, which then ends the others in their order.
                started[name] = subprocess.Popen(
                    command, env=environment, stdout=log, stderr=log, start_new_session=True
                )
        deadline_s = time.monotonic() + _START_S
        while not _answers(options.dashboard_port):
            if not _all_run(started, folder):
                return 1
            if time.monotonic() > deadline_s:
                sys.stderr.write(f"ray: its dashboard does not answer after {_START_S} s: {folder / 'ray.log'}\n")
                return 1
            time.sleep(_POLL_S)
        _say(options, environment, folder, list(commands))
        while _all_run(started, folder):
            time.sleep(_POLL_S)
        return 1
    except KeyboardInterrupt:
        return 0
    finally:
        _end(started)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=6379, help="port of Ray, for RAY_ADDRESS (%(default)s)")
    parser.add_argument("--dashboard-port", type=int, default=8265, help="port of the dashboard (%(default)s)")
    parser.add_argument("--client-port", type=int, default=10001, help="port of Ray's client server (%(default)s)")
    parser.add_argument("--prometheus-port", type=int, default=9090, help="port of Prometheus (%(default)s)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="port of Grafana (%(default)s)")
    parser.add_argument("--num-cpus", type=int, help="CPUs that Ray offers (default: those of the machine)")
    parser.add_argument("--scrape-s", type=int, default=15, help="seconds between scrapes (%(default)s)")
    parser.add_argument("--temp-dir", default="/tmp/rzen", help="folder of logs; must be short (%(default)s)")
    return parser.parse_args()


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Return what Ray reads from its environment. RAY_AUTH_MODE and RAY_AUTH_TOKEN of the user win."""
    chosen = {
        "RAY_AUTH_MODE": os.environ.get("RAY_AUTH_MODE", "token"),
        # All of its processes listen on 127.0.0.1 only, those of the metrics too. Whoever connects needs it as well.
        _LOOPBACK: os.environ.get(_LOOPBACK, "0"),
        # By default every Ray of a machine uses these two ports, and it gives no error if they are taken.
        "AUTOSCALER_METRIC_PORT": os.environ.get("AUTOSCALER_METRIC_PORT", str(free_port())),
        "DASHBOARD_METRIC_PORT": os.environ.get("DASHBOARD_METRIC_PORT", str(free_port())),
        # As jobs.runtime.cluster: if the first processes take longer to start, whoever connects waits forever.
        _START_TIMEOUT: os.environ.get(_START_TIMEOUT, "600"),
        "RAY_PROMETHEUS_HOST": f"http://127.0.0.1:{options.prometheus_port}",
    }
    if shutil.which("grafana"):
        chosen |= {
            # Ray's dashboard embeds Grafana's: its own on one tab of the page Metrics, ours on the other.
            "RAY_GRAFANA_HOST": f"http://127.0.0.1:{options.grafana_port}",
            "RAY_GRAFANA_DATA_DASHBOARD_UID": "rzen",
            "RAY_PROMETHEUS_NAME": "rzen",
            # For Grafana and its files in infra/monitoring/grafana.
            "RZEN_PROMETHEUS": f"http://127.0.0.1:{options.prometheus_port}",
            "RZEN_DASHBOARDS": str(MONITORING / "grafana"),
            "RZEN_RAY_DASHBOARD": f"{options.temp_dir}/{RAY_DASHBOARD}",
            "GF_SERVER_HTTP_ADDR": "127.0.0.1",
            "GF_SERVER_HTTP_PORT": str(options.grafana_port),
            "GF_PATHS_DATA": f"{options.temp_dir}/grafana",
            "GF_PATHS_PROVISIONING": f"{options.temp_dir}/provisioning",
            "GF_SECURITY_ALLOW_EMBEDDING": "true",
            "GF_AUTH_ANONYMOUS_ENABLED": "true",
        }
    if chosen["RAY_AUTH_MODE"] == "token" and not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & set(os.environ):
        _keep_token(_token_file())
    return chosen


def _token_file() -> Path:
    """Return the file in which Ray's tools look for a token."""
    return Path.home() / ".ray" / "auth_token"


def _token_path(environment: Mapping[str, str]) -> str:
    return environment.get("RAY_AUTH_TOKEN_PATH") or str(_token_file())


def _keep_token(path: Path) -> None:
    """Write a new token that only this user can read, unless there is one."""
    path.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))


def _commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Return program -> command for the installed programs, in the order in which they start."""
    ray = ["ray", "start", "--head", "--block", "--disable-usage-stats", f"--port={options.port}"]
    ray += ["--dashboard-host=127.0.0.1", f"--dashboard-port={options.dashboard_port}"]
    ray += [f"--ray-client-server-port={options.client_port}", f"--dashboard-agent-listen-port={free_port()}"]
    ray += [f"--metrics-export-port={free_port()}", f"--temp-dir={folder}"]
    # Any free ports. Ray's own range, 10002 to 19999, may hold one of the ports above, and Ray would not start.
    ray += ["--min-worker-port=0", "--max-worker-port=0"]
    if options.num_cpus is not None:
        ray.append(f"--num-cpus={options.num_cpus}")
    commands = {"ray": ray}
    if shutil.which("prometheus"):
        commands["prometheus"] = [
            "prometheus",
            f"--config.file={_prometheus_config(folder, options.scrape_s)}",
            f"--storage.tsdb.path={folder / 'metrics'}",
            f"--web.listen-address=127.0.0.1:{options.prometheus_port}",
        ]
    if shutil.which("grafana"):
        for kind, name in (("datasources", "datasource.yaml"), ("dashboards", "provider.yaml")):
            (folder / "provisioning" / kind).mkdir(parents=True, exist_ok=True)
            shutil.copy(MONITORING / "grafana" / name, folder / "provisioning" / kind)
        commands["grafana"] = ["grafana", "server", "--homepath", os.environ.get("GRAFANA_HOME", "/usr/share/grafana")]
    return commands


def _taken_ports(options: argparse.Namespace, names: list[str]) -> list[str]:
    """Return a line for each port that another program, or another option, has."""
    chosen = {"port": options.port, "dashboard-port": options.dashboard_port, "client-port": options.client_port}
    chosen |= {f"{name}-port": getattr(options, f"{name}_port") for name in names if name != "ray"}
    problems, seen = [], dict[int, str]()
    for option, port in chosen.items():
        if port in seen:
            problems.append(f"port {port} is that of --{seen[port]}: choose another with --{option}")
        elif _is_taken(port):
            problems.append(f"port {port} is taken by another program: choose another with --{option}")
        seen.setdefault(port, option)
    return problems


def _is_taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # or one that ended a moment ago would count
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def _answers(dashboard_port: int) -> bool:
    """Return whether Ray's job server answers. It may ask for the token."""
    connection = http.client.HTTPConnection("127.0.0.1", dashboard_port, timeout=10)
    try:
        connection.request("GET", "/api/version")
        return connection.getresponse().status < 500
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _all_run(started: dict[str, subprocess.Popen[bytes]], folder: Path) -> bool:
    """Return whether all programs run. Print which one does not, and the last line of its log."""
    for name, process in started.items():
        if process.poll() is not None:
            log = folder / f"{name}.log"
            lines = log.read_text(errors="replace").split("\n")
            last = next((line.strip() for line in reversed(lines) if line.strip()), "it is empty")
            sys.stderr.write(f"{name} has ended: {log}: {last}\n")
            return False
    return True


def _prometheus_config(folder: Path, scrape_s: int) -> Path:
    """Write monitoring/prometheus.yaml for the Ray in `folder`. Return its path."""
    config = yaml.safe_load((MONITORING / "prometheus.yaml").read_text())
    config["global"] = {"scrape_interval": f"{scrape_s}s", "evaluation_interval": f"{scrape_s}s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    (discovery,) = config["scrape_configs"][0]["file_sd_configs"]
    discovery |= {"files": [str(folder / _DISCOVERY)], "refresh_interval": f"{scrape_s}s"}
    path = folder / "prometheus.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def _say(options: argparse.Namespace, environment: dict[str, str], folder: Path, names: list[str]) -> None:
    dashboard = f"http://127.0.0.1:{options.dashboard_port}"
    exported = {"RAY_ADDRESS": f"127.0.0.1:{options.port}", "RAY_API_SERVER_ADDRESS": dashboard}
    exported |= {
        name: environment[name]
        for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", _LOOPBACK)
        if name in environment
    }
    lines = [f"export {name}={value}" for name, value in exported.items()]
    asks = ""
    if environment["RAY_AUTH_MODE"] == "token":
        source = "RAY_AUTH_TOKEN" if "RAY_AUTH_TOKEN" in environment else f"`cat {_token_path(environment)}`"
        asks = f", which asks once for the token: {source}"
    lines += [f"# dashboard  {dashboard}{asks}", f"# logs  {folder}"]
    urls = {"prometheus": options.prometheus_port, "grafana": options.grafana_port}
    for name, port in urls.items():
        lines.append(f"# {name}  http://127.0.0.1:{port}" if name in names else f"# {name} is not installed")
    sys.stdout.write("\n".join([*lines, "# Ctrl-C ends it", ""]))
    sys.stdout.flush()


def _end(started: dict[str, subprocess.Popen[bytes]]) -> None:
    for process in reversed(started.values()):
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    sys.exit(main())
