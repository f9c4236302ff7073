"""Submitting and following a job against a stand-in of Ray's job server. integration/test_submit.py has a real one."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.dashboard.modules.job.pydantic_models import JobDetails

from jobs import hook
from jobs.cli import main
from jobs.runtime.follow import exit_status, follow, outcome, was_lost
from jobs.runtime.job_server import Access, Connection, JobServer, ServerLost, Unreachable
from jobs.runtime.revision import revision
from tests.job_server import StandIn, stand_in

SPEC = "kind: corpus\nout: here\nsubmit: {retries: 1}\n"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A job server, and a spec in the present folder."""
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_HEADERS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("jobs.runtime.follow._PAUSES_S", (0.05,))
    (tmp_path / "a.yaml").write_text(SPEC)
    monkeypatch.chdir(tmp_path)
    with stand_in() as server:
        yield server


def ended(**changes: Any) -> JobDetails:
    known = {"type": "SUBMISSION", "entrypoint": "x", "status": "FAILED", "driver_node_id": "n"}
    return JobDetails(**known | changes)


def test_a_log_without_streams_is_printed_once(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("j", ["", "one\n", "one\ntwo\nth", "one\ntwo\nthree"])
    assert main(["attach", "j", "--address", server.url]) == 0
    out = capsys.readouterr().out
    assert "one\ntwo\nthree\nj succeeded\n" in out
    assert out.count("one") == 1


@pytest.mark.parametrize(
    ("details", "status", "text", "lost"),
    [
        ({"status": "SUCCEEDED", "driver_exit_code": 0}, 0, "succeeded", False),
        ({"status": "STOPPED"}, 1, "stopped, exit status 1", False),
        ({"driver_exit_code": 3, "message": "of the log"}, 3, "failed, exit status 3", False),
        ({"driver_exit_code": -9}, 137, "failed, exit status 137", False),
        ({"message": "node\n died"}, 1, "failed, exit status 1: its process was lost (node died)", True),
        (
            {"driver_node_id": None, "error_type": "JOB_SUPERVISOR_ACTOR_START_TIMEOUT", "message": "no CPUs"},
            1,
            "failed, exit status 1: it could not be placed in time (no CPUs)",
            False,
        ),
        (
            {
                "driver_node_id": None,
                "error_type": "RUNTIME_ENV_SETUP_FAILURE",
                "message": "Traceback (most recent call last):\n  File\nOSError: no pip",
            },
            1,
            "failed, exit status 1: its environment could not be set up (OSError: no pip)",
            False,
        ),
        ({"driver_node_id": None}, 1, "failed, exit status 1: it did not start (Ray gives no reason)", False),
    ],
)
def test_the_end_of_a_job_has_its_status_and_its_reason(
    details: dict[str, Any], status: int, text: str, lost: bool
) -> None:
    """ray#41437: a job without room is not one that was lost."""
    job = ended(**details)
    assert (exit_status(job), outcome(job), was_lost(job)) == (status, text, lost)


def test_an_outage_is_waited_for_with_one_message(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("j", ["one\n"])
    server.faults = [503, 0, 502]
    assert follow(JobServer(Access(server.url)), "j").status == "SUCCEEDED"
    assert capsys.readouterr().out.count(f"{server.url} does not answer (status 503") == 1


def test_an_outage_at_the_start_is_waited_for(server: StandIn) -> None:
    server.add("j", ["one\n"])
    for command in (["attach", "j"], ["submit", "a.yaml", "--submission-id", "k"]):
        server.faults = [503]
        assert main([*command, "--address", server.url]) == 0
    server.faults = [418]
    assert main(["attach", "j", "--address", server.url]) == 1


def test_an_outage_without_end_says_how_to_follow_later(server: StandIn) -> None:
    server.add("j", ["one\n"])
    connected = JobServer(Access(server.url))
    server.faults = [503] * 100
    with pytest.raises(
        ServerLost, match=rf"j may still run there; follow it with: rzen attach j --address {server.url}"
    ):
        follow(connected, "j", patience_s=1.0)
    assert ServerLost("a", "b").status == 75


@pytest.fixture
def signals() -> Iterator[None]:
    """Python's own handlers: a shell that starts the tests in the background has SIGINT ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_says_how_to_go_on(
    number: signal.Signals, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    server.add("j", ["one\n"] * 1000)

    def interrupt() -> None:
        server.is_followed.wait()
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    assert main(["attach", "j", "--address", server.url]) == 130
    option = f"--address {server.url}"
    stop = f"rzen stop j {option}"
    assert f"j continues; follow it with: rzen attach j {option}; stop it with: {stop}\n" in capsys.readouterr().out


@pytest.mark.usefixtures("signals")
def test_an_interruption_counts_where_the_connection_breaks_by_it(
    server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    to_send = [signal.SIGINT]

    async def stream(connection: Connection, job: str) -> AsyncGenerator[str, None]:
        if not to_send:
            return
        try:
            os.kill(os.getpid(), to_send.pop())
            await asyncio.sleep(60)
            yield ""
        except asyncio.CancelledError as error:
            raise Unreachable("connection reset by peer") from error

    server.add("j", ["one\n"] * 5)
    monkeypatch.setattr(Connection, "stream", stream)
    assert main(["attach", "j", "--address", server.url]) == 130


def test_the_address_that_is_given_wins(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ray#41590, ray#36064: Ray prefers its variables, and prints the other address."""
    with stand_in() as other, stand_in() as third:
        monkeypatch.setenv("RAY_ADDRESS", third.url)
        assert main(["submit", "a.yaml"]) == 0
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", other.url)
        assert main(["submit", "a.yaml"]) == 0
        assert main(["submit", "a.yaml", "--address", server.url]) == 0
        host = server.url.removeprefix("http://")
        assert main(["submit", "a.yaml", "--address", host]) == 0
        assert (third.num_submitted, other.num_submitted, server.num_submitted) == (1, 1, 2)
        used = re.findall(r"submitted \S+ to (\S+)", capsys.readouterr().out)
        assert used == [third.url, other.url, server.url, server.url]
    assert os.environ["RAY_API_SERVER_ADDRESS"] == other.url


def test_a_submission_whose_answer_is_lost_is_not_repeated(server: StandIn) -> None:
    server.lost_answers = 1
    assert main(["submit", "a.yaml", "--address", server.url]) == 0
    assert server.num_submitted == 1


def test_of_two_submitters_at_the_same_moment_one_starts_the_job(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["submit", "a.yaml", "--address", server.url, "--submission-id", "j", "--no-wait"]
    assert main(command) == 0
    server.hidden = 1  # the other one has not sent it yet
    assert main(command) == 0
    assert f"j is on {server.url} already: running" in capsys.readouterr().out
    assert server.num_submitted == 1


def test_the_same_id_follows_the_job_that_is_there(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["submit", "a.yaml", "--address", server.url, "--submission-id", "j"]
    assert main([*command, "--no-wait"]) == 0
    server.jobs["j"] |= {"status": "FAILED", "driver_exit_code": 7}
    assert main(command) == 7
    assert server.num_submitted == 1
    (Path.cwd() / "b.yaml").write_text(SPEC)
    capsys.readouterr()
    assert main(["submit", "b.yaml", *command[2:]]) == 1
    assert f"j: is another job on {server.url}: python -m rzen run a.yaml; choose another" in capsys.readouterr().err
    assert main([*command, "--set", "corpus.num_images=3", "--set", "submit.cpus=1"]) == 1
    assert "j: was submitted with other settings of corpus; choose another" in capsys.readouterr().err
    assert main([*command[:-1], "../j"]) == 1
    assert "--submission-id ../j: must be letters" in capsys.readouterr().err


def test_a_base_outside_of_the_folder_is_named(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (Path.cwd() / "here").mkdir()
    (Path.cwd() / "here/b.yaml").write_text("base: ../a.yaml\n")
    monkeypatch.chdir("here")
    assert main(["submit", "b.yaml", "--address", server.url]) == 1
    assert f"a.yaml: is not inside {Path.cwd()}, the folder that is sent" in capsys.readouterr().err


def test_the_last_attempt_says_why_it_failed(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    """Given again, the command goes on with the attempt that is there."""
    server.ends_with = {"status": "FAILED", "message": "the node died"}
    command = ["submit", "a.yaml", "--address", server.url, "--submission-id", "j"]
    assert main(command) == 1
    out = capsys.readouterr().out
    for job in ("j", "j-2"):
        assert f"{job} failed, exit status 1: its process was lost (the node died)" in out
    assert out.count("attempt 2 of 2") == 1
    assert main(command) == 1
    assert "j-2 is on" in capsys.readouterr().out
    assert server.num_submitted == 2


def test_a_head_that_forgot_the_job_counts_as_a_lost_process(
    server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    add = server.add

    def forget(job: str, *args: Any, **details: Any) -> None:
        if job != "j":
            add(job, *args, **details)

    server.add = forget  # type: ignore[method-assign]
    assert main(["submit", "a.yaml", "--address", server.url, "--submission-id", "j"]) == 0
    out = capsys.readouterr().out
    assert "j is no longer known: the head of the cluster was replaced" in out
    assert "j-2 succeeded" in out
    command = ["submit", "a.yaml", "--address", server.url, "--submission-id", "j", "--set", "submit.retries=0"]
    assert main(command) == 1
    assert "head of the cluster was replaced; submit it again" in capsys.readouterr().err


def test_an_unknown_job_is_one_error_that_names_others(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "j", "--address", server.url]) == 1
    assert f"j: is not a job on {server.url}; no job was submitted there" in capsys.readouterr().err
    for number in range(7):
        server.add(f"job{number}", [""], start_time=number)
    assert main(["attach", "j", "--address", server.url]) == 1
    assert "name one of job6, job5, job4, job3, job2 ... (7 in all; ray job list)" in capsys.readouterr().err


def test_a_program_that_was_not_submitted_is_named(server: StandIn, capsys: pytest.CaptureFixture[str]) -> None:
    server.add("01000000", [""], type="DRIVER", submission_id=None)
    assert main(["attach", "01000000", "--address", server.url]) == 1
    assert "01000000: was not submitted, so that Ray has no log of it" in capsys.readouterr().err


def test_a_connection_that_dies_silently_is_replaced(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other end neither sends nor closes, as after a NAT has forgotten a connection (ray#51601)."""
    monkeypatch.setattr("jobs.runtime.job_server._HEARTBEAT_S", 0.5)
    monkeypatch.setattr("jobs.runtime.job_server._SILENCE_S", 60.0)
    server.add("j", ["one\ntwo\n"])
    server.streams = [["one\n", None], ["one\n", "two\n", None]]
    printed: list[str] = []
    details = follow(JobServer(Access(server.url)), "j", write=printed.append)
    assert details.status == "SUCCEEDED"
    assert printed == ["one\n", "two\n"]
    assert server.streams == []


def test_the_end_of_a_job_is_seen_although_its_stream_goes_on(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The node of the job is gone, and the head does not notice (ray#60665)."""
    monkeypatch.setattr("jobs.runtime.job_server._SILENCE_S", 0.2)
    server.add("j", ["one\ntwo\n"])
    server.streams = [["one\n", "pong"]]
    printed: list[str] = []

    def write(text: str) -> None:
        printed.append(text)
        server.jobs["j"] |= {"status": "FAILED", "message": "the node died"}

    assert was_lost(follow(JobServer(Access(server.url)), "j", write=write))
    assert printed == ["one\n", "two\n"]


@pytest.mark.parametrize("mistake", ["large", "loop"])
def test_a_folder_that_cannot_be_sent_is_one_line_at_once(
    mistake: str, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    """ray#45602, ray#38566. Ray walks such a link for more than a minute."""
    deep = Path.cwd()
    for name in "abcdefgh":
        deep = deep / name
        deep.mkdir()
        if mistake == "loop":
            (deep / "up").symlink_to("..")
    with (Path.cwd() / "weights.bin").open("wb") as file:
        file.truncate(120_000_000 if mistake == "large" else 1)
    began_s = time.monotonic()
    assert main(["submit", "a.yaml", "--address", server.url]) == 1
    assert time.monotonic() - began_s < 20  # 0.1 s, when nothing else runs
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    expected = (
        "the largest files are weights.bin (120.0 MB)" if mistake == "large" else "h/up: is a link to .., a folder"
    )
    assert expected in lines[0]
    assert server.num_submitted == 0


@pytest.mark.parametrize("sends_the_code", [True, False])
def test_a_job_knows_its_name_and_the_revision_of_the_code_that_is_sent(
    sends_the_code: bool, server: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A package has no git history, and without a name Ray's dashboard shows ids."""
    if sends_the_code:
        monkeypatch.setattr("jobs.runtime.submit.ROOT", str(Path.cwd()))
    submit = ["submit", "a.yaml", "--address", server.url, "--no-wait", "--submission-id"]
    assert main([*submit, "k"]) == 0
    job = server.jobs["k"]
    assert job["metadata"]["job_name"] == "corpus a"
    variables = job["runtime_env"]["env_vars"]
    assert variables.get("RZEN_REVISION") == (revision() if sends_the_code else None)


def test_headers_of_the_environment_are_sent(server: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("j", ["one\n"])
    monkeypatch.setenv("RAY_JOB_HEADERS", '{"X-Team": "search"}')
    assert main(["attach", "j", "--address", server.url]) == 0
    assert all(headers.get("X-Team") == "search" for headers in server.headers_seen)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runtime_env_json": "{bad"}, "--runtime-env-json: cannot be read"),
        ({"runtime_env": "nowhere.yaml"}, "--runtime-env nowhere.yaml: cannot be read"),
        ({"metadata_json": {"team": 3}}, "--metadata-json team: Input should be a valid string"),
        ({"metadata_json": {"rzen": "x"}}, "--metadata-json rzen: is set by `rzen submit`"),
        ({"working_dir": "s3://bucket/a.zip"}, "--working-dir s3://bucket/a.zip: cannot be passed on to `rzen submit`"),
        ({"of_a_later_ray": 1}, "--of-a-later-ray: cannot be passed on to `rzen submit`"),
    ],
)
def test_the_hook_refuses_by_name_what_has_no_place_in_a_job(
    given: dict[str, Any], message: str, server: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        hook.submit(entrypoint=["a.yaml"], address=server.url, **given)
    assert stop.value.code == 1
    assert f"error: {message}" in capsys.readouterr().err
    assert server.num_submitted == 0
