"""Four fine-tunes, of which one loses its worker every time and one loses it once; then the same command again."""

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from jobs.cli import main
from pipelines.storage.location import open_store
from tests.data import publish
from tests.specs import evaluate, stage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.nightly]
FINETUNES = """\
kind: finetunes
stage: stage.yaml
runs:
  doomed: {{}}
  unlucky: {{}}
  calm: {{}}
grid: {{seed: [1]}}
max_parallel: 2
min_survivors: 2
soups:
  uniform: {{method: mean}}
  greedy: {{method: greedy}}
  searched: {{method: searched, evaluations: 5}}
evaluate: {{spec: evaluate.yaml}}
out: "{0}/soups"
"""


def workers_of(run: str) -> list[int]:
    """Workers of a run that have made a step: TensorBoard's files of it are open."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if any(f"rzen-tensorboard-{run}-" in file.path for file in process.open_files()):
                found.append(process.pid)
        except psutil.Error:  # it has just ended
            continue
    return found


def kill(run: str, times: int, killed: list[str]) -> None:
    for _ in range(times):
        while not (workers := workers_of(run)):
            time.sleep(0.2)
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
        killed.append(run)
        while set(workers_of(run)) & set(workers):
            time.sleep(0.2)


@pytest.mark.timeout(600)
def test_survivors_are_souped_and_the_lost_run_is_named(
    tmp_path: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    publish(open_store(str(tmp_path / "data")), {"red": ("text_image", 24)})
    checkpoint, cluster = {"every_steps": 5, "keep_best": False}, {"cpus_per_worker": 0.5, "max_restarts": 1}
    (tmp_path / "stage.yaml").write_text(stage(str(tmp_path), steps=30, checkpoint=checkpoint, cluster=cluster))
    (tmp_path / "evaluate.yaml").write_text(evaluate(f"{tmp_path}/data"))
    (tmp_path / "finetunes.yaml").write_text(FINETUNES.format(tmp_path))
    job = ["run", str(tmp_path / "finetunes.yaml")]
    killed: list[str] = []
    for arguments in (("doomed-seed-1", 2, killed), ("unlucky-seed-1", 1, killed)):
        threading.Thread(target=kill, args=arguments, daemon=True).start()

    assert main([*job, "--set", "runs.late={}"]) == 0
    out = capsys.readouterr().out
    assert sorted(killed) == ["doomed-seed-1", "doomed-seed-1", "unlucky-seed-1"]
    assert "doomed-seed-1 failed permanently and is not in the soups" in out

    summary = json.loads((tmp_path / "soups/summary.json").read_text())
    survivors = ["unlucky-seed-1", "calm-seed-1", "late-seed-1"]
    states = {name: some["state"] for name, some in summary["runs"].items()}
    assert states == {"doomed-seed-1": "failed"} | dict.fromkeys(survivors, "finished")
    assert "failed 2 times" in summary["runs"]["doomed-seed-1"]["reason"]
    assert [parent["name"] for parent in summary["soups"]["uniform"]["parents"]] == sorted(survivors)
    scores = {row["model"]: row["value"] for row in summary["rows"]}
    assert list(scores) == [*survivors, "uniform", "greedy", "searched"]
    # Chosen on what they are scored on: neither can be worse than what it started from.
    assert scores["greedy"] >= max(scores[name] for name in survivors)
    assert scores["searched"] >= scores["uniform"]
    page = (tmp_path / "soups/summary.md").read_text()
    assert "| doomed-seed-1 | failed |" in page
    assert "biased upwards" in page
    html = (tmp_path / "soups/index.html").read_text()
    assert all(f'<th scope="row">{name}' in html for name in (*states, "uniform", "greedy", "searched"))
    assert "Soups against their parents" in html
    assert "that is failed" in (tmp_path / "runs/doomed-seed-1/index.html").read_text()

    log = (tmp_path / "runs/unlucky-seed-1/log.txt").read_text()
    for event in ("starts at step 0 of 30, 1 workers", "lost a worker", "restart 1 of 1 from step", "finished"):
        assert event in log

    before = contents(tmp_path)
    assert main([*job, "--set", "runs.late={}"]) == 0
    assert contents(tmp_path) == before
    again = capsys.readouterr().out
    assert again.count("finished before") == 3
    assert "doomed-seed-1 failed permanently" in again


def contents(folder: Path) -> dict[str, Any]:
    return {str(path): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}
