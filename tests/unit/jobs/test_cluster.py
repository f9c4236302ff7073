import json
import os

import pytest
from ray.train.v2._internal.constants import get_env_vars_to_propagate

from jobs.runtime.cluster import MAX_LINKED, metrics_link, ray_cluster, set_environment, user_error
from pipelines.errors import UserError
from tests.paths import ROOT

MISTAKE = UserError("place", "problem", "fix")


class TaskError(UserError):
    """As Ray wraps an error of a task: an instance of its class too, printing a traceback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback", "of many lines")
        self.cause = cause


class WorkersError(Exception):
    """As Ray Train tells failures by rank."""

    def __init__(self, worker_failures: dict[int, Exception]) -> None:
        super().__init__("workers failed")
        self.worker_failures = worker_failures


def caused_by(cause: Exception) -> Exception:
    error = RuntimeError("around")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MISTAKE,
        TaskError(MISTAKE),
        caused_by(TaskError(MISTAKE)),
        WorkersError({0: RuntimeError("connection reset"), 1: TaskError(MISTAKE)}),
        caused_by(WorkersError({1: caused_by(MISTAKE)})),
    ],
)
def test_mistake_is_found_in_what_ray_makes_of_it(error: Exception) -> None:
    assert user_error(error) is MISTAKE


def test_other_errors_hold_no_mistake() -> None:
    assert user_error(caused_by(WorkersError({0: RuntimeError("bug")}))) is None


def test_local_ray_gets_a_token_of_its_own_and_a_cluster_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_TRAIN_ENABLE_STATE_TRACKING"):
        monkeypatch.delenv(name, raising=False)
    for name in ("PYTHONPATH", "PATH", "RAY_CHDIR_TO_TRIAL_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    set_environment()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(os.environ["RAY_AUTH_TOKEN"]) == 64
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    set_environment()
    assert "RAY_AUTH_TOKEN" not in os.environ
    assert os.environ["RAY_TRAIN_ENABLE_STATE_TRACKING"] == "1"
    monkeypatch.delenv("RAY_TRAIN_ENABLE_STATE_TRACKING")


def test_a_local_ray_watches_for_no_preemption_and_a_cluster_does(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    for variable in (name, "RAY_ADDRESS"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("PYTHONPATH", "PATH", "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_ENABLE_STATE_TRACKING"):
        monkeypatch.setenv(variable, os.environ.get(variable, ""))
    set_environment()
    assert os.environ[name] == "0"
    assert name in get_env_vars_to_propagate()  # from the driver to Ray Train's controller, which starts the watcher
    monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    set_environment()
    assert name not in os.environ


def test_link_to_the_numbers_is_that_of_our_dashboard_as_a_browser_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_GRAFANA_HOST", "RAY_GRAFANA_IFRAME_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert metrics_link(["stage2"]) is None
    monkeypatch.setenv("RAY_GRAFANA_HOST", "http://grafana.monitoring")
    assert metrics_link(["stage2"]) == "http://grafana.monitoring/d/rzen?var-run=stage2"
    monkeypatch.setenv("RAY_GRAFANA_IFRAME_HOST", "https://numbers.example/")
    assert metrics_link(["a b", "c"]) == "https://numbers.example/d/rzen?var-run=a+b&var-run=c"
    assert metrics_link(["run"] * (MAX_LINKED + 1)) == "https://numbers.example/d/rzen"
    board = json.loads((ROOT / "infra/monitoring/grafana/rzen.json").read_text())
    assert board["uid"] == "rzen"
    assert "run" in [variable["name"] for variable in board["templating"]["list"]]


def test_a_ray_that_starts_slowly_is_tried_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    failures = [TimeoutError("the node did not register in 30 s")]
    started: list[str] = []

    def init(address: str, **_: object) -> None:
        if failures:
            raise failures.pop()
        started.append(address)

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    with ray_cluster():
        assert started == ["local"]
    assert "Ray did not start (the node did not register in 30 s); trying once more" in capsys.readouterr().out
    failures += [RuntimeError("no"), Exception("The current node timed out during startup.")]  # Ray's words and class
    with pytest.raises(UserError, match="Ray: does not start on this machine: no"), ray_cluster():
        pass
    assert failures == []
    failures += [OSError("validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: /long")]
    with pytest.raises(UserError, match="107 bytes: /long; set RAY_TMPDIR to a folder"), ray_cluster():
        pass
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    failures += [ConnectionError("refused")]
    with pytest.raises(UserError, match=r"no Ray answers \(refused\)"), ray_cluster():
        pass
