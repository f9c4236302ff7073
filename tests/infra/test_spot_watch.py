"""The spot watcher against the metadata services of both clouds, as documented, and a `ray` that takes notes."""

import datetime
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.paths import ROOT

SCRIPT = ROOT / "infra" / "cluster" / "spot_watch.py"
QUIET = 3  # polls without a notice


@dataclass
class Service:
    """What the service was asked, and for how many polls it has nothing to tell or is out of order."""

    url: str = ""
    asked: list[str] = field(default_factory=list)
    quiet: int = QUIET
    out_of_order: int = 0
    end: str = ""


@pytest.fixture
def service() -> Iterator[Service]:
    state = Service()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self, code: int, text: str = "") -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def _is_due(self) -> bool:
            state.quiet -= 1
            return state.quiet < 0

        def do_PUT(self) -> None:
            state.asked.append(f"PUT {self.path}")
            is_token = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self._answer(*((200, "a-token") if is_token else (400, "")))

        def do_GET(self) -> None:
            state.asked.append(f"GET {self.path}")
            if state.out_of_order > 0:
                state.out_of_order -= 1
                self._answer(503)
            elif self.path == "/latest/meta-data/spot/instance-action":
                if self.headers["X-aws-ec2-metadata-token"] != "a-token":
                    self._answer(401)
                elif self._is_due():
                    self._answer(200, json.dumps({"action": "terminate", "time": state.end}))
                else:
                    self._answer(404)
            elif self.path == "/computeMetadata/v1/instance/preempted":
                if self.headers["Metadata-Flavor"] != "Google":
                    self._answer(403)
                else:
                    self._answer(200, "TRUE" if self._is_due() else "FALSE")
            else:
                self._answer(404)

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    in_two_minutes = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=120)
    state.end = in_two_minutes.strftime("%Y-%m-%dT%H:%M:%SZ")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield state
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """A folder with a `ray` that writes down its arguments, and fails as often as a file `failures` has lines."""
    program = tmp_path / "ray"
    program.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys\n"
        "here = pathlib.Path(__file__).parent\n"
        "with (here / 'calls').open('a') as calls:\n"
        "    calls.write(' '.join(sys.argv[1:]) + '\\n')\n"
        "failures = (here / 'failures').read_text().splitlines() if (here / 'failures').exists() else []\n"
        "(here / 'failures').write_text('\\n'.join(failures[1:]))\n"
        "sys.exit(len(failures) > 0)\n"
    )
    program.chmod(0o755)
    return tmp_path


def watch(cloud: str, service: Service, ray: Path) -> list[list[str]]:
    """Runs the watcher to its end; the calls of `ray`, in words."""
    environment = os.environ | {"PATH": f"{ray}:{os.environ['PATH']}"}
    command = [sys.executable, str(SCRIPT), cloud, "--metadata", service.url, "--poll-s", "0.01"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    return [line.split(" ") for line in (ray / "calls").read_text().splitlines()]


EXPECTED = ["drain-node", "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot", "notice"]


def test_a_notice_of_ec2_drains_the_node_once(service: Service, ray: Path) -> None:
    (call,) = watch("aws", service, ray)
    assert call[:-2] == EXPECTED
    assert call[-2] == "--deadline-remaining-seconds"
    assert 100 <= int(call[-1]) <= 110  # of the two minutes, ten seconds before the end
    assert service.asked.count("PUT /latest/api/token") == QUIET + 1  # a token for every question


def test_a_notice_of_google_drains_the_node_once(service: Service, ray: Path) -> None:
    (call,) = watch("gcp", service, ray)
    assert call == [*EXPECTED, "--deadline-remaining-seconds", "20"]
    assert len(service.asked) == QUIET + 1


@pytest.mark.parametrize("cloud", ["aws", "gcp"])
def test_a_service_that_does_not_answer_is_asked_again(cloud: str, service: Service, ray: Path) -> None:
    service.out_of_order = 2
    assert len(watch(cloud, service, ray)) == 1


def test_a_refused_drain_is_tried_again(service: Service, ray: Path) -> None:
    (ray / "failures").write_text("no\nno")
    assert len(watch("gcp", service, ray)) == 3


def test_a_notice_that_comes_late_leaves_no_time(service: Service, ray: Path) -> None:
    service.end = "2020-01-01T00:00:00Z"
    (call,) = watch("aws", service, ray)
    assert call[-1] == "0"


def test_ray_knows_the_command() -> None:
    """The option names and the reason, as the installed Ray has them."""
    from ray.scripts.scripts import drain_node

    options = {option: parameter for parameter in drain_node.params for option in parameter.opts}
    assert {"--reason", "--reason-message", "--deadline-remaining-seconds"} <= set(options)
    assert "DRAIN_NODE_REASON_PREEMPTION" in options["--reason"].type.choices
