"""A Ray cluster on this machine that grows and shrinks: a head without CPUs, and Ray's autoscaler v2 with the fake node
provider, whose nodes are raylets.

Ray's own `AutoscalingCluster` needs a file that the wheel lacks, and ends every Ray on the host when it starts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import psutil
from ray._private.services import get_node_ip_address
from ray._raylet import GcsClient
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FAKE_HEAD_NODE_TYPE
from ray.autoscaler.v2.utils import is_autoscaler_v2
from ray.core.generated.gcs_pb2 import GcsNodeInfo

from jobs.runtime.local_s3 import free_port

START_S, STOP_S, ANSWER_S = 120, 20, 30


@dataclass
class AutoscalingCluster:
    """A running one. What its control store (GCS) knows is the truth here, not what is logged."""

    address: str
    folder: Path
    head: subprocess.Popen[bytes]
    orphans: list[psutil.Process] = field(default_factory=list)
    """Children of the nodes that were killed."""

    def has_autoscaler_v2(self) -> bool:
        return bool(is_autoscaler_v2(fetch_from_server=True, gcs_client=self._gcs))

    def nodes(self) -> dict[str, bool]:
        """Every node besides the head that there has ever been, in the order of their start: id -> whether it lives."""
        workers = sorted((info for info in self._infos() if not info.is_head_node), key=lambda info: info.start_time_ms)
        return {info.node_id.hex(): info.state == GcsNodeInfo.ALIVE for info in workers}

    def living(self) -> list[str]:
        """Ids of the nodes that live."""
        return [node for node, lives in self.nodes().items() if lives]

    def kill(self, node: str) -> None:
        """SIGKILL to the raylet of a node; its workers end by themselves."""
        for process in self._family():
            if process.name() == "raylet" and f"--node_id={node}" in process.cmdline():
                self.orphans += process.children(recursive=True)
                process.send_signal(signal.SIGKILL)
                return
        raise AssertionError(f"no raylet of node {node}")

    def is_up(self) -> bool:
        assert self.head.poll() is None, self.log()
        host, port = self.address.split(":")
        with socket.socket() as probe:
            listens = probe.connect_ex((host, int(port))) == 0  # a client would wait for half a minute
        return listens and any(info.is_head_node for info in self._infos())

    def log(self) -> str:
        """What the head and the autoscaler last said."""
        logs = [self.folder / "head.log", *self.folder.glob("session_2*/logs/monitor.log")]
        # It complains every second of its own default.
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines() if "legacy" not in line]
        return "\n".join(lines[-60:])

    def stop(self) -> None:
        family = [*self._family(), *self.orphans]
        self.head.kill()
        self.head.wait()
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # by its id and the time of its start
        psutil.wait_procs(family, STOP_S)

    def _infos(self) -> list[GcsNodeInfo]:
        return list(self._gcs.get_all_node_info(timeout=ANSWER_S).values())

    @cached_property
    def _gcs(self) -> GcsClient:
        return GcsClient(address=self.address)

    def _family(self) -> list[psutil.Process]:
        return psutil.Process(self.head.pid).children(recursive=True) if self.head.poll() is None else []


@contextmanager
def autoscaling_cluster(num_nodes: int, cpus: float, idle_s: float) -> Iterator[AutoscalingCluster]:
    """At most `num_nodes` nodes of `cpus`, none at first. A node that has been idle for `idle_s` goes."""
    with short_folder() as folder:
        cluster = _start(Path(folder), num_nodes, cpus, idle_s)
        try:
            until("the head is up", cluster.is_up, START_S, cluster.log)
            yield cluster
        finally:
            cluster.stop()


def short_folder() -> tempfile.TemporaryDirectory[str]:
    """For Ray: sockets lie in it, and their paths must be short."""
    return tempfile.TemporaryDirectory(prefix="rz", dir="/tmp", ignore_cleanup_errors=True)


def _start(folder: Path, num_nodes: int, cpus: float, idle_s: float) -> AutoscalingCluster:
    port = free_port()
    address = f"{get_node_ip_address()}:{port}"
    config = folder / "autoscaling.json"
    config.write_text(json.dumps(_config(address, num_nodes, cpus, idle_s)))
    options = {
        "port": port,
        "num-cpus": 0,
        "object-store-memory": 256 << 20,
        "temp-dir": folder,
        "autoscaling-config": config,
        "include-dashboard": "false",
        # Their defaults are fixed, and taken by any other Ray on the host.
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": 0,
        "min-worker-port": 0,
        "max-worker-port": 0,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    environment = os.environ | {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_AUTH_MODE": "disabled",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_FAKE_CLUSTER": "1",
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_enable_autoscaler_v2": "1",
        "RAY_health_check_period_ms": "1000",  # a killed node is missed after five of them
    }
    with (folder / "head.log").open("wb") as log:
        return AutoscalingCluster(address, folder, subprocess.Popen(command, env=environment, stdout=log, stderr=log))


def _config(address: str, num_nodes: int, cpus: float, idle_s: float) -> dict[str, Any]:
    commands = ["initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray"]
    return {
        "cluster_name": "rzen",
        "provider": {
            "type": "external",  # the name `fake_multinode` asks for the file that the wheel lacks
            "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
            "gcs_address": address,
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "use_node_id_as_ip": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "max_workers": num_nodes,
        "head_node_type": FAKE_HEAD_NODE_TYPE,
        "available_node_types": {
            FAKE_HEAD_NODE_TYPE: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": cpus, "object_store_memory": 256 << 20},
                "node_config": {},
                "max_workers": num_nodes,
            },
        },
        "idle_timeout_minutes": idle_s / 60,
        "upscaling_speed": 1.0,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        "cluster_synced_files": [],
        "rsync_exclude": [],
        "rsync_filter": [],
    } | {f"{name}_commands": [] for name in commands}


def until(what: str, condition: Callable[[], Any], timeout_s: float, explain: Callable[[], str]) -> None:
    """Waits for `condition`; what went wrong is in `explain()`."""
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}\n{explain()}"
        time.sleep(0.1)
