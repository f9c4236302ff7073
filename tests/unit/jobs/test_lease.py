"""Leases between processes and machines. What a registry makes of them is in `test_registry.py`."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.runtime.lease import LEASE, PATIENCE, hold_lease, hold_output
from pipelines.errors import UserError
from pipelines.storage.location import open_store
from pipelines.storage.store import Store
from tests.paths import ROOT

HOLDER = """
import sys, time
from jobs.runtime.lease import hold_lease
from pipelines.storage.location import open_store
with hold_lease(open_store(sys.argv[1]), 60, "trains"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path))


def leave(store: Store, **fields: Any) -> None:
    """A lease that was never given back, as a killed process leaves it."""
    with hold_lease(store, 60, "trains"):
        content = json.loads(store.read(LEASE))
    assert store.list() == []
    store.write(LEASE, json.dumps(content | fields).encode())


def test_a_killed_holder_on_this_machine_gives_way_at_once(store: Store) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, store.url], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=rf"\(process {holder.pid}\) trains here"), hold_lease(store, 60, "trains"):
        pass
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    begun_s = time.monotonic()
    with hold_lease(store, 60, "trains") as lease:
        lease.check()
    assert time.monotonic() - begun_s < 30


def test_a_number_that_another_process_has_by_now_is_no_holder(store: Store) -> None:
    leave(store, seconds=60.0, until=time.time() + 60, process=1)
    with hold_lease(store, 60, "trains"):
        pass


@pytest.mark.parametrize("skew_s", [-600, 0, 600])
def test_a_silent_holder_on_another_machine_is_waited_for_whatever_its_clock_says(store: Store, skew_s: float) -> None:
    leave(store, seconds=1.0, until=time.time() + skew_s, machine="another")
    begun_s = time.monotonic()
    with hold_lease(store, 60, "trains"):
        assert time.monotonic() - begun_s >= 1.0


@pytest.mark.parametrize("skew_s", [-600, 600])
def test_a_living_holder_on_another_machine_is_never_robbed(
    store: Store, monkeypatch: pytest.MonkeyPatch, skew_s: float
) -> None:
    with hold_lease(store, 0.9, "trains") as lease:
        monkeypatch.setattr("jobs.runtime.lease._machine", lambda: "another")
        now = time.time
        monkeypatch.setattr("jobs.runtime.lease.time.time", lambda: now() + skew_s)
        with pytest.raises(UserError, match="trains here"), hold_lease(store, 60, "trains"):
            pass
        lease.check()


def test_a_damaged_lease_is_one_clear_error(store: Store) -> None:
    for content in (b"", b"{", b"[]", b"{}"):
        store.write(LEASE, content)
        with pytest.raises(UserError, match=r"lease\.json: .*; delete the file if"), hold_lease(store, 60, "trains"):
            pass


def test_an_output_is_claimed_before_its_lease(store: Store) -> None:
    store.write("thesis.docx", b"mine")
    with pytest.raises(UserError, match=r"thesis\.docx"), hold_output(store, "run", "trains"):
        pass
    assert store.list() == ["thesis.docx"]
    run = store.child("run")
    with hold_output(run, "run", "trains"), pytest.raises(UserError, match="s here"), hold_output(run, "run", "trains"):
        pass


def take(store: Store) -> None:
    """What another process does that has waited for a silent holder."""
    content = json.loads(store.read(LEASE))
    store.write(LEASE, json.dumps(content | {"holder": "another", "nonce": "another"}).encode())


def wait_until(true: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_holder_learns_that_another_has_taken_its_lease(store: Store) -> None:
    with hold_lease(store, 3.0, "trains") as lease:
        take(store)
        wait_until(lambda: raises(lease.check_not_taken))
        with pytest.raises(UserError, match=r"lease\.json: was taken by another process"):
            lease.check()
        taken = store.read(LEASE)
    assert store.read(LEASE) == taken  # the lease of the other is not given back


def raises(check: Callable[[], None]) -> bool:
    try:
        check()
    except UserError:
        return True
    return False


def test_a_lease_that_nobody_took_outlives_an_outage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lease that has run out is no lease to publish with, but none that another has either."""
    write_if = type(store).write_if

    def away(*_: object) -> bool:
        raise UserError("store", "does not answer", "wait")

    with hold_lease(store, 0.6, "trains") as lease:
        monkeypatch.setattr(type(store), "write_if", away)
        wait_until(lambda: raises(lease.check))
        lease.check_not_taken()
        monkeypatch.setattr(type(store), "write_if", write_if)
        wait_until(lambda: not raises(lease.check))


@pytest.mark.parametrize("machine", ["this one", "another"])
def test_a_process_may_wait_for_the_end_of_a_holder(
    store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], machine: str
) -> None:
    """Pods of two attempts of a RayJob may overlap (kuberay#5211): the new one waits, and does not fail."""
    monkeypatch.setenv(PATIENCE, "30")
    with hold_lease(store, 3.0, "trains") as first:
        if machine == "another":
            monkeypatch.setattr("jobs.runtime.lease._machine", lambda: machine)
        threading.Timer(2.0, first.release).start()
        with hold_lease(store, 60, "trains") as second:
            second.check()
    assert capsys.readouterr().out.count("waiting for its end, up to 30 s") == 1


def test_patience_with_a_holder_ends(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PATIENCE, "1")
    with (
        hold_lease(store, 60, "trains"),
        pytest.raises(UserError, match=r"trains here.*; wait until"),
        hold_lease(store, 60, "trains"),
    ):
        pass


def test_a_renewal_whose_answer_never_came_is_not_taken_for_one_of_another(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_if, lost = type(store).write_if, threading.Event()

    def losing(store: Store, path: str, data: bytes, tag: str | None) -> bool:
        written = write_if(store, path, data, tag)
        if not lost.is_set():
            lost.set()
            raise UserError("store", "did not answer in time", "wait")
        return written

    with hold_lease(store, 3.0, "trains") as lease:
        monkeypatch.setattr(type(store), "write_if", losing)
        assert lost.wait(30)
        renewed = store.read(LEASE)
        wait_until(lambda: store.read(LEASE) != renewed or raises(lease.check_not_taken))
        lease.check_not_taken()
