"""The timer of retraining, by systemd's own checks where these are installed."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.paths import ROOT

FOLDER = ROOT / "infra" / "cluster" / "systemd"
RETRAIN = FOLDER.parents[1] / "kuberay" / "retrain" / "cronjob.yaml"


def complaints(folder: Path) -> str:
    """What `systemd-analyze verify` says, apart from programs that this machine lacks."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed")
    names = ["rzen-retrain.service", "rzen-retrain.timer"]
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", *names]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    return "\n".join(line for line in lines if "rzen-retrain" in line and "is not executable" not in line)


def test_units_are_what_systemd_reads(tmp_path: Path) -> None:
    assert complaints(FOLDER) == ""
    shutil.copytree(FOLDER, tmp_path / "units")
    for name, right, wrong in (
        ("rzen-retrain.timer", "OnCalendar=Mon", "OnCalendar=Someday"),
        ("rzen-retrain.service", "ExecStart=/bin/sh", "ExecStarts=/bin/sh"),
    ):
        text = (FOLDER / name).read_text()
        assert right in text
        (tmp_path / "units" / name).write_text(text.replace(right, wrong))
        assert complaints(tmp_path / "units") != ""
        (tmp_path / "units" / name).write_text(text)


def test_both_schedules_say_the_same() -> None:
    cron = next(some for some in yaml.safe_load_all(RETRAIN.read_text()) if some["kind"] == "CronJob")
    minute, hour, *_, weekday = cron["spec"]["schedule"].split()
    day = ["Sun", "Mon", "Tue", "Wed", "Thu", "Fri", "Sat"][int(weekday)]
    timer = (FOLDER / "rzen-retrain.timer").read_text()
    assert f"OnCalendar={day} *-*-* {int(hour):02}:{int(minute):02}:00 UTC\n" in timer
    assert cron["spec"]["timeZone"] == "Etc/UTC"


def command_of(key: str) -> list[str]:
    """A command of the service as systemd gives it to the shell."""
    (line,) = re.findall(rf"^{key}=/bin/sh -c '(.*)'$", (FOLDER / "rzen-retrain.service").read_text(), re.MULTILINE)
    script = line.replace("$$", "$").replace("%%", "%")
    return ["/bin/sh", "-c", script.replace("/opt/rzen/.venv/bin/rzen", "echo submits")]


def test_a_unit_that_is_started_again_follows_its_job_until_the_end_was_seen(tmp_path: Path) -> None:
    job = tmp_path / "job"

    def start() -> str:
        environment = os.environ | {"STATE_DIRECTORY": str(tmp_path)}
        subprocess.run(command_of("ExecStartPre"), env=environment, check=True)
        done = subprocess.run(command_of("ExecStart"), env=environment, check=True, capture_output=True, text=True)
        words = done.stdout.split()
        assert words[:-1] == ["submits", "submit", "jobs/retrain.yaml", "--submission-id"]
        return words[-1]

    def end(code: str, status: str) -> None:
        variables = {"STATE_DIRECTORY": str(tmp_path), "EXIT_CODE": code, "EXIT_STATUS": status}
        subprocess.run(command_of("ExecStopPost"), env=os.environ | variables, check=True)

    first = start()
    assert re.fullmatch(r"retrain-\d{8}T\d{6}", first)
    for code, status in (("killed", "KILL"), ("dumped", "SEGV"), ("exited", "75"), ("exited", "130")):
        end(code, status)
        assert start() == first
    for status in ("0", "1"):
        end("exited", status)
        assert not job.exists()
        start()
