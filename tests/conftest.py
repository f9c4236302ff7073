"""Fixtures and hooks of all tests: one S3 server and one local Ray cluster in each test process."""

import gc
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytest  # noqa: E402

from jobs.runtime.local_s3 import CREDENTIALS, free_port, s3_server  # noqa: E402
from pipelines.imports import without_garbage_collection, without_modules  # noqa: E402
from tests import groups, skips  # noqa: E402
from tests.ray_forks import fork_server, forked_workers  # noqa: E402

# Every process that a test starts would compile the whole project again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Before anything imports Ray or a maths library; Ray's workers inherit them.
os.environ |= {
    "AUTOSCALER_METRIC_PORT": str(free_port()),  # the defaults are fixed and taken by any other Ray on the host
    "DASHBOARD_METRIC_PORT": str(free_port()),
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "RAY_AUTH_MODE": "disabled",
    # Ray ends workers that have been idle for a second, and a new one imports its libraries again.
    "RAY_idle_worker_killing_time_threshold_ms": "600000",
    "RAY_num_workers_soft_limit": "8",
    # Ray gives way to every other process by default, and its tests end last.
    "RAY_worker_niceness": "0",
    # As jobs.runtime.cluster.
    "RAY_worker_register_timeout_seconds": "600",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
for name, value in CREDENTIALS.items():
    os.environ.setdefault(name, value)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> groups.GroupScheduling:
    return groups.GroupScheduling(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Import all tests, and with them all libraries, without what makes imports slow."""
    with without_garbage_collection(), without_modules("pymupdf.layout", "pymupdf4llm"):
        yield
    gc.freeze()  # the collector need not look at modules and tests again


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    groups.arrange(items)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    for line in skips.summary(str(report.longrepr[2]) for report in skipped if isinstance(report.longrepr, tuple)):
        terminalreporter.write_line(line)


@pytest.fixture(scope="module", autouse=True)
def no_process_group_is_left() -> Iterator[None]:
    """End the process group that a module has made in this process: other modules test what is without one."""
    yield
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """URL of an S3 server: moto's, or a real one named by RZEN_TEST_S3_ENDPOINT. Every test names its own bucket."""
    if external := os.environ.get("RZEN_TEST_S3_ENDPOINT"):
        yield external
        return
    with s3_server() as endpoint:
        yield endpoint


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """The one local Ray of the session, with four logical CPUs."""
    import ray.data

    folder = tempfile.mkdtemp(prefix="rz", dir="/tmp")  # sockets lie in it, and their paths must be short
    with fork_server() as address:
        with forked_workers(address):
            ray.init(
                num_cpus=4,
                include_dashboard=False,
                log_to_driver=False,
                object_store_memory=512 << 20,
                _temp_dir=folder,
            )
        logging.getLogger("ray.data").setLevel(logging.ERROR)  # or pages of it drown every failing test
        yield
        ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)
