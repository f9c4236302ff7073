"""What code that took over a decoder can do in the child: nothing but use memory and time. Every attempt is real."""

import logging
import os
import platform
import socket
import subprocess
import sys

import pytest

from pipelines.config import MediaConfig
from pipelines.media import confine, sandbox
from pipelines.media.sandbox import Sandbox
from tests.cases import attempts

needs_seccomp = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="the attempts are system calls of x86-64"
)


@pytest.fixture(scope="module")
def child():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "HF_TOKEN", "HOME", "LD_PRELOAD", "UNKNOWN_TO_US"):
            patch.setenv(name, "")
        with Sandbox(MediaConfig()) as running:
            running.call(abs, -1)
            yield running


def test_the_child_gets_an_allow_listed_environment(child):
    ours = {"OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "RZEN_MEDIA_SANDBOX"}
    assert set(child.call(attempts.environment)) <= ours | {*sandbox._VARIABLES, "LC_CTYPE"}


@needs_seccomp
def test_the_child_has_no_new_privileges_and_a_filter(child):
    status = child.call(attempts.read, "/proc/self/status")
    assert "NoNewPrivs:\t1" in status
    assert "Seccomp:\t2" in status


@needs_seccomp
def test_the_child_has_no_network(child, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix:
        unix.bind(str(tmp_path / "unix"))
        unix.listen()
        port = tcp.getsockname()[1]
        for attempt, argument in (
            (attempts.connect, port),
            (attempts.send_udp, port),
            (attempts.connect_unix, str(tmp_path / "unix")),
        ):
            assert not attempts.prevented(attempt, argument), "it works outside of the child"
            assert child.call(attempts.prevented, attempt, argument)


@needs_seccomp
def test_the_child_starts_no_program_and_no_process(child):
    for attempt, *arguments in (
        (attempts.run, "/bin/true"),
        (attempts.replace, "/bin/true"),
        (attempts.fork,),
        (attempts.call, 435, None, 0),  # clone3
        (attempts.call, 425, 1, None),  # io_uring_setup, which would open and write past the filter
    ):
        assert child.call(attempts.prevented, attempt, *arguments), attempt
    assert child.call(attempts.use_a_thread) == "from a thread"


@needs_seccomp
def test_the_child_writes_nothing(child, tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    new = str(tmp_path / "new")
    for attempt, *arguments in (
        (attempts.create, new),
        (attempts.openat2, new.encode()),
        (attempts.truncate_open_file, str(victim)),
        (attempts.change_by_mapping, str(victim)),
        (os.truncate, str(victim), 0),
        (os.unlink, str(victim)),
        (os.rename, str(victim), new),
        (os.link, str(victim), new),
        (os.symlink, str(victim), new),
        (os.mkdir, new),
        (os.chmod, str(victim), 0o777),
        (os.utime, str(victim), (0, 0)),
        (os.mkfifo, new),
        (os.setxattr, str(victim), "user.x", b"x"),
        (attempts.allocate_outside_of_the_address_space,),
    ):
        assert child.call(attempts.prevented, attempt, *arguments), attempt
    assert victim.read_text() == "as it was"
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


@needs_seccomp
def test_the_child_reaches_no_other_process(child):
    for attempt in (
        attempts.kill_parent,
        attempts.kill_parents_thread,
        attempts.limit_parent,
        attempts.type_on_terminal,
    ):
        assert child.call(attempts.prevented, attempt), attempt
    assert child.call(attempts.prevented, attempts.call, 101, 16, os.getpid(), 0, 0)  # ptrace, attach


@pytest.mark.parametrize(("lock", "expected"), [("landlock", "file tcp"), ("seccomp", "file tcp fork")])
def test_each_lock_holds_alone(lock, expected, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as server:
        new, port = str(tmp_path / "new"), server.getsockname()[1]
        script = f"""
import ctypes
from pipelines.media import confine
from tests.cases import attempts
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
print(int(confine._use_{lock}(libc)), flush=True)
tried = dict(file=(attempts.create, {new!r}), tcp=(attempts.connect, {port}), fork=(attempts.fork,))
print(*(name for name, attempt in tried.items() if attempts.prevented(*attempt)))
"""
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", script]
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    version, prevented, *_ = answer.stdout.split("\n")
    if int(version) < (4 if lock == "landlock" else 1):
        pytest.skip("this kernel lacks this lock")
    assert prevented == expected


def test_a_kernel_without_locks_is_reported_once(monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "_told", set())
    with caplog.at_level(logging.WARNING):
        sandbox._warn_once(["open connections"])
        sandbox._warn_once(["open connections"])
    assert [record.getMessage() for record in caplog.records] == [
        "the decoding child can open connections: this kernel has no lock for it (see pipelines/media)"
    ]


def test_what_is_missing_depends_on_the_locks(monkeypatch):
    monkeypatch.setattr(confine.resource, "setrlimit", lambda *_: None)
    monkeypatch.setattr(confine.ctypes, "CDLL", lambda *_, **__: _NoLocks())
    monkeypatch.setattr(confine, "_use_seccomp", lambda _: False)
    for version, missing in (
        (0, ("open connections", "start programs", "delete files")),
        (1, ("open connections", "start programs")),
        (4, ("start programs",)),
    ):
        monkeypatch.setattr(confine, "_use_landlock", lambda _, version=version: version)
        assert confine.confine() == missing


class _NoLocks:
    def prctl(self, *_: int) -> int:
        return 0
