"""Ray's dashboard as a browser shows it: jobs, the run of Ray Train and the way to our numbers, to who has the token.

Without Chromium or Prometheus the test is skipped. Grafana has a stand-in, which says that it is well and shows which
page it was asked for: what is tested is that Ray's dashboard and the job's log lead to our page.
"""

import asyncio
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from infra.local.up import RAY_DASHBOARD
from pipelines.storage.location import open_store
from tests.chromium import CHROMIUM, PATIENCE_S, browser
from tests.data import publish
from tests.infra.local_cluster import LocalCluster, local_cluster
from tests.specs import stage

GRAFANA = f"""#!{sys.executable}
import http.server, os
class Answers(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json" if self.path == "/api/health" else "text/plain")
        self.end_headers()
        self.wfile.write(b'{{"database": "ok"}}' if self.path == "/api/health" else self.path.encode())
http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["GF_SERVER_HTTP_PORT"])), Answers).serve_forever()
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.skipif(not shutil.which("prometheus"), reason="Prometheus is not installed")
def test_who_has_the_token_sees_the_job_its_run_and_its_numbers(tmp_path: Path) -> None:
    programs, here, data = (tmp_path / name for name in ("bin", "here", "data"))
    for folder in (programs, here):
        folder.mkdir()
    (programs / "grafana").write_text(GRAFANA)
    (programs / "grafana").chmod(0o755)
    publish(open_store(str(data)), {"red": ("text_image", 24)})
    for name, root in (("good", tmp_path), ("bad", tmp_path / "nowhere")):
        run = {"root": f"{tmp_path}/runs", "tracking": {"tensorboard": False}}
        (here / f"{name}.yaml").write_text(stage(str(root), name=name, run=run, steps=100_000))
    with local_cluster("--num-cpus=3", programs=programs) as cluster:
        good, bad = (submit(cluster.environment, here, name) for name in ("good", "bad"))
        wait_for(tmp_path / "runs/good/metrics.jsonl", cluster.folder)
        asyncio.run(look(tmp_path, cluster, good, bad))
        assert (cluster.folder / RAY_DASHBOARD).is_file()  # what Grafana is told to show on the other tab


def submit(environment: dict[str, str], folder: Path, name: str) -> str:
    """The id of a job that trains, as soon as the job server has taken it."""
    command = ["rzen", "submit", "--no-wait", f"{name}.yaml"]
    deadline_s = time.monotonic() + PATIENCE_S
    while (done := subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)).returncode:
        assert time.monotonic() < deadline_s, done.stdout + done.stderr
        time.sleep(1)
    (job,) = re.findall(r"submitted (\S+)", done.stdout)
    return job


def wait_for(path: Path, logs: Path) -> None:
    """A file that a run writes."""
    deadline_s = time.monotonic() + 2 * PATIENCE_S
    while not path.exists():
        told = "".join(log.read_text() for log in logs.glob("session_latest/logs/job-driver-*"))
        assert time.monotonic() < deadline_s, told
        time.sleep(0.5)


async def look(folder: Path, cluster: LocalCluster, good: str, bad: str) -> None:
    """As somebody who mistypes the token at first."""
    url, token = (cluster.environment[name] for name in ("RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"))
    async with browser(folder) as page:
        await page.tell("Page.navigate", url=f"{url}/#/jobs")
        refused = await page.wait_for("Authentication Token Required")
        assert "raysubmit" not in refused
        await page.type("f" * 64)
        assert "raysubmit" not in await page.wait_for("Invalid authentication token")

        await page.tell("Page.navigate", url="about:blank")
        await page.tell("Page.navigate", url=f"{url}/#/jobs")
        await page.wait_for("Authentication Token Required")
        await page.type(token)
        row = "{}(?:(?!raysubmit).)*{}".format  # the states are in the rows that they belong to
        await page.wait_for(f"(?s)(?=.*{row(good, 'RUNNING')})(?=.*{row(bad, 'FAILED')})")
        await page.picture(folder / "jobs.png")  # for whoever wants to see; pytest keeps the folders of three runs
        assert (folder / "jobs.png").stat().st_size > 10_000

        numbers = f"{cluster.grafana}/d/rzen?var-run=good"
        await page.tell("Page.navigate", url=f"{url}/#/jobs/{good}")
        await page.wait_for(rf"(?s)\A(?!.*{bad}).*RUNNING.*{re.escape(numbers)}")
        await page.tell("Page.navigate", url=f"{url}/#/jobs/{bad}")
        await page.wait_for(r"(?s)FAILED.*error: .*nowhere/data")

        await page.tell("Page.navigate", url=f"{url}/#/actors")  # the controller of Ray Train's run, and its worker
        await page.wait_for(r"(?s)(?=.*TrainController)(?=.*RayTrainWorker)")
        await page.tell("Page.navigate", url=f"{url}/api/train/v2/runs/v1")
        (run,) = json.loads(await page.wait_for(r"train_runs"))["train_runs"]
        assert (re.sub("-.*", "", run["name"]), run["status"]) == ("good", "RUNNING")

        await page.tell("Page.navigate", url=numbers)
        await page.wait_for(r"\A/d/rzen\?var-run=good\Z")
        await page.tell("Page.navigate", url=f"{url}/#/metrics")
        await page.wait_for("(?i)view tab in grafana")
        await page.click("Ray Data")
        shown = await page.evaluate("document.querySelector('iframe').src")
        assert shown.startswith(f"{cluster.grafana}/d/rzen/?")  # ours, on a tab of Ray's own page
        await page.picture(folder / "metrics.png")
