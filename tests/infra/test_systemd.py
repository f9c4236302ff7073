"""The timer of retraining, by systemd's own checks where these are installed."""

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
        ("rzen-retrain.service", "ExecStart=/usr/bin/flock", "ExecStarts=/usr/bin/flock"),
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
