"""Connects a job to Ray: the cluster that submitted it, the one that RAY_ADDRESS names, or a local one."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jobs.runtime.noise import hide_known_noise
from jobs.runtime.progress import say
from jobs.spec.run import ClusterConfig
from pipelines.config import FeedConfig
from pipelines.errors import TakenError, UserError
from rzen.packages import ROOT, are_hidden, import_own_packages

LOCAL: dict[str, Any] = {"include_dashboard": False}


@dataclass(frozen=True)
class Resources:
    """What a worker, task or actor reserves."""

    cpus: float
    gpus: float


POLL_S = 0.3
MAX_LINKED = 16  # runs that a link can name
_ROUNDING = 1e-9
_START_ERRORS = (Exception,)  # Ray raises it itself where a node does not answer in time
_LONG_PATH = "AF_UNIX path length"


def set_environment() -> None:
    """Set what Ray and the math libraries read from the environment, and hide their known noise.

    Call this before they are imported.
    """
    hide_known_noise()
    os.environ |= {"RAY_TQDM": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # they would mix with our output
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["RAY_CHDIR_TO_TRIAL_DIR"] = "0"  # workers resolve relative paths in the job's folder
    if os.environ.get("RAY_ADDRESS"):
        # Shows Ray Train's runs at /api/train/v2/runs/v1 (this Ray's dashboard has no page for them). It costs an actor
        # of 400 MB. A local Ray has no dashboard.
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
        return
    # A local Ray is one node, which nobody takes back. Ray Train's watcher is an actor of 200 MB and 2 s of CPU a run.
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Without this, its processes listen on all interfaces, those of the metrics too. Ray means it for desktops, and it
    # does the same on Linux. Other users of the machine still reach it, so that it needs a token.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # Tasks of less than one CPU mean more processes than CPUs. Ray would warn about it every few seconds.
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", "8")
    # Ray ends processes that were idle for a second, and new ones import everything again. This time bridges the pause
    # between two jobs, and that of the data loader when a trainer has enough batches.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", "20000")
    # If the first processes take longer to start, Ray ends them, and whoever connects waits forever. Ray's 60 s are
    # short for a first import on a busy machine.
    os.environ.setdefault("RAY_worker_register_timeout_seconds", "600")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    # Threads and loops of their own are for code that blocks. The server's does not, and a request takes 10% less CPU.
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    os.environ.setdefault("RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP", "0")
    # Ray's processes are new interpreters. They must find this package, and the commands of this environment.
    _put_first("PYTHONPATH", ROOT)
    _put_first("PATH", str(Path(sys.executable).parent))


def _put_first(variable: str, folder: str) -> None:
    """Make a folder the first entry of a variable such as PATH, once."""
    others = [entry for entry in os.environ.get(variable, "").split(os.pathsep) if entry not in ("", folder)]
    os.environ[variable] = os.pathsep.join([folder, *others])


def metrics_link(runs: Sequence[str]) -> str | None:
    """Return the URL of Grafana's dashboard for these runs. None if the cluster's head knows no Grafana.

    Jobs inherit the environment of the head. Ray's dashboard reads the same variables and embeds the same page.
    """
    host = os.environ.get("RAY_GRAFANA_IFRAME_HOST") or os.environ.get("RAY_GRAFANA_HOST")
    if not host:
        return None
    chosen = f"?{urlencode({'var-run': runs}, doseq=True)}" if len(runs) <= MAX_LINKED else ""  # else all of them
    return f"{host.rstrip('/')}/d/rzen{chosen}"


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Connect to Ray, or start a local one that ends with the block. Do nothing if this process is connected.

    A local one that does not start, because the machine is busy, is tried once more.
    """
    import ray

    if ray.is_initialized():
        yield
        return
    _quiet()
    address = os.environ.get("RAY_ADDRESS")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        _start(address)
    except _START_ERRORS as error:
        if address:
            problem = f"no Ray answers ({_first_line(error)})"
            raise UserError(f"RAY_ADDRESS={address}", problem, "start it, or unset it") from error
        if _LONG_PATH in str(error):
            fix = "set RAY_TMPDIR to a folder with a short path, such as /tmp"
            raise UserError("Ray", f"does not start: {_first_line(error)}", fix) from error
        say(f"  Ray did not start ({_first_line(error)}); trying once more", "yellow")
        ray.shutdown()
        try:
            _start(address)
        except _START_ERRORS as again:
            problem = f"does not start on this machine: {_first_line(again)}"
            raise UserError("Ray", problem, "its logs are in /tmp/ray; on a busy machine, try again later") from again
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler leaves no time for a last checkpoint
    try:
        yield
    finally:
        ray.shutdown()


def _start(address: str | None) -> None:
    import ray

    ray.init(
        address=address or "local",
        log_to_driver=False,
        logging_level=logging.ERROR,
        runtime_env=_runtime_env(),
        **({} if address else LOCAL),
    )


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _runtime_env() -> dict[str, Any] | None:
    """Return what workers need to find this package in a working directory that hides it. Mostly nothing.

    Ray gives the working directory to its workers as the first entry of `sys.path`. Workers with an environment of
    their own cannot be those that Ray has started in advance, so that it is only asked for where it is needed.
    """
    if not are_hidden(str(Path.cwd())):
        return None
    return {"worker_process_setup_hook": f"{import_own_packages.__module__}.{import_own_packages.__name__}"}


@contextmanager
def ray_data() -> Iterator[None]:
    """Run Ray Data without its progress bars. A `UserError` in a task is raised as itself."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    with ray.data.DataContext.current(context):
        try:
            yield
        except Exception as error:
            raise user_error(error) or error from error


def _quiet() -> None:
    import ray.data  # sets its own level when it is imported

    logging.getLogger(ray.data.__name__).setLevel(logging.ERROR)


def check_size(what: str, count: int, each: Resources, feed: FeedConfig | None = None) -> None:
    """Raise `UserError` if the cluster can never hold `count` of `what` and one task of the data loader at once.

    Ray would wait indefinitely, without a message.
    """
    import ray

    present = ray.cluster_resources()
    feed_cpus = feed.cpus_per_task if feed else 0.0
    for resource, amount, rest in (("CPU", each.cpus, feed_cpus), ("GPU", each.gpus, 0.0)):
        needed = count * amount + rest
        if needed > present.get(resource, 0.0) + _ROUNDING:
            feed_share = f" + {rest:g} for the data loader" if rest else ""
            raise UserError(
                f"the cluster has {present.get(resource, 0.0):g} {resource}s",
                f"{count} {what} x {amount:g}{feed_share} need {needed:g}",
                "ask for less in the spec, add nodes, or set autoscaling: true there if the cluster can grow",
            )


def has_room(running: Sequence[ClusterConfig], another: ClusterConfig, feed: FeedConfig) -> bool:
    """Return whether the cluster at its present size holds another training run and one task of its data loader.

    Always true if nothing runs or the cluster can grow: it grows for work that has no room.
    """
    import ray

    if not running or another.autoscaling:
        return True
    clusters = [*running, another]
    needed = {
        "CPU": sum(some.workers * some.cpus_per_worker for some in clusters) + feed.cpus_per_task,
        "GPU": sum(some.workers * some.gpus_per_worker for some in clusters),
    }
    present = ray.cluster_resources()
    return all(amount <= present.get(resource, 0.0) + _ROUNDING for resource, amount in needed.items())


def user_error(error: BaseException) -> UserError | None:
    """Return the `UserError` inside an error of Ray. Task errors wrap causes, Ray Train lists failures by rank."""
    if isinstance(error, UserError) and type(error) in (UserError, TakenError):
        return error  # Ray's subclass prints a traceback and has the original as `cause`
    inside = [error.__cause__, getattr(error, "cause", None), getattr(error, "controller_failure", None)]
    inside += getattr(error, "worker_failures", {}).values()
    causes = [user_error(cause) for cause in inside if isinstance(cause, BaseException) and cause is not error]
    return next((cause for cause in causes if cause), None)
