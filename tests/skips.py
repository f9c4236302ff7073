"""The command that makes a skipped test run, by the reason for which it was skipped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

COMMANDS = {
    "Prometheus is not installed": "apt-get install prometheus",
    "Chromium is not installed": "apt-get install chromium",
    "kubectl is not installed": "apt-get install kubernetes-client",
    "systemd-analyze is not installed": "apt-get install systemd",
    "kubernetes-validate is not installed": ".venv/bin/pip install -c requirements.lock -e '.[infra]'",
    "google-api-python-client is not installed": ".venv/bin/pip install -c requirements.lock -e '.[infra]'",
    "qdrant-client is not installed": ".venv/bin/pip install -c requirements.lock -e '.[qdrant]'",
    "mteb is not installed": ".venv/bin/pip install -e '.[mteb]'",
    "RZEN_TEST_RAY_WORKERS=own": "unset RZEN_TEST_RAY_WORKERS",
    "RZEN_KUBERAY_CRDS names no folder": "export RZEN_KUBERAY_CRDS=kuberay/helm-chart/kuberay-operator/crds, in a clone"
    " of github.com/ray-project/kuberay at v1.7",
    "may not mount a small tmpfs here": "run the tests as root",
    "may not mount a read-only root here": "run the tests as root",
    "the attempts are system calls of x86-64": "run the tests on Linux on x86-64",
    "of processes are read from /proc": "run the tests on Linux",
    "this kernel lacks this lock": "run the tests on Linux 6.7 or later",
    "quantizing is possible here": "run the tests on a machine without GPU",
}


def command_for(reason: str) -> str | None:
    """Return the command for a reason, or None when the table has none."""
    return next((command for known, command in COMMANDS.items() if known in reason), None)


def summary(reasons: Iterable[str]) -> list[str]:
    """Return one line for each reason: number of tests, reason, command."""
    counts = Counter(reason.removeprefix("Skipped: ") for reason in reasons)
    return [
        f"{count} skipped: {reason}. To run them: {command_for(reason) or 'see the test'}"
        for reason, count in counts.most_common()
    ]
