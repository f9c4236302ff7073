"""The killable child: hostile work ends, is named, and leaves the next call unharmed. All work is real."""

import functools
import os
import pickle
import signal
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pymupdf
import pytest

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media import sandbox
from pipelines.media.documents import page_texts, render_page
from pipelines.media.sandbox import Sandbox
from tests.unit.pipelines.sandboxed import (
    MAX_CPU_S,
    answer_wildly,
    hoard,
    import_nothing,
    load_slowly,
    load_slowly_and_then_never_return,
)

LIMITS = MediaConfig(max_cpu_s=MAX_CPU_S, max_memory_bytes=2 << 30)


@pytest.fixture(scope="module")
def shared():
    with Sandbox(LIMITS, wall_s=30) as child:
        yield child


def reason(child: Sandbox, function, *args) -> str:
    with pytest.raises(BadMedia) as caught:
        child.call(function, *args)
    return caught.value.reason


def test_results_are_arrays_bytes_or_json(shared):
    array = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    returned = shared.call(np.flip, array)
    np.testing.assert_array_equal(returned, array[::-1, ::-1, ::-1])
    assert returned.dtype == np.uint8
    assert shared.call(bytes.upper, b"abc") == b"ABC"
    assert shared.call(sorted, [3, 1, 2]) == [1, 2, 3]
    assert shared.call(bytes, 3_000_017) == b"\0" * 3_000_017


def test_one_child_serves_many_calls_outside_this_process(shared):
    first, second = shared.call(os.getpid), shared.call(os.getpid)
    assert first == second != os.getpid()
    assert shared.call(sandbox.in_sandbox) is True
    assert sandbox.in_sandbox() is False


def test_what_the_decoder_says_reaches_the_caller(shared):
    pid = shared.call(os.getpid)
    assert reason(shared, page_texts, b"<html>", LIMITS) == "not_a_pdf"
    with pytest.raises(BadMedia, match=r"decoder_error: ValueError: invalid literal for int.*'x'"):
        shared.call(int, "x")
    assert shared.call(os.getpid) == pid


def test_endless_work_hits_the_cpu_limit_and_the_next_call_works(shared):
    start_s = time.monotonic()
    assert reason(shared, sum, range(10**15)) == "decoder_cpu_limit"
    assert time.monotonic() - start_s < 60
    assert shared.call(abs, -7) == 7


def test_the_cpu_limit_is_per_call_and_not_per_child(shared):
    pid = shared.call(os.getpid)
    while shared.call(time.process_time) < 1.5 * LIMITS.max_cpu_s:
        shared.call(sum, range(10_000_000))  # about 0.3 s
    assert shared.call(os.getpid) == pid


def test_a_memory_hog_hits_the_memory_limit(shared):
    assert reason(shared, bytes, 8 << 30) == "decoder_memory_limit"
    assert shared.call(abs, -7) == 7


def test_a_crash_is_named(shared):
    assert reason(shared, os.abort) == "decoder_crashed"
    assert reason(shared, os._exit, 3) == "decoder_crashed"
    assert shared.call(abs, -7) == 7


def test_work_that_only_waits_hits_the_clock():
    with Sandbox(LIMITS, wall_s=0.5) as child:
        start_s = time.monotonic()
        assert reason(child, time.sleep, 600) == "decoder_time_limit"
        assert time.monotonic() - start_s < 60
        assert child.call(abs, -7) == 7


def test_the_child_ends_with_the_sandbox():
    with Sandbox(LIMITS) as child:
        pid = child.call(os.getpid)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_child_killed_from_outside_costs_no_file():
    with Sandbox(LIMITS) as child:
        pid = child.call(os.getpid)
        os.kill(pid, signal.SIGKILL)
        assert child.call(abs, -7) == 7
        assert child.call(os.getpid) != pid


def test_memory_that_earlier_files_left_occupied_is_not_blamed_on_the_next():
    with Sandbox(LIMITS) as child:
        assert child.call(hoard, 1200 << 20) == 1
        assert child.call(hoard, 1200 << 20) == 1  # refused by the old child, and done by a new one
        assert reason(child, hoard, 2200 << 20) == "decoder_memory_limit"


def test_loading_a_library_does_not_count_and_decoding_after_it_does():
    with Sandbox(LIMITS, wall_s=30) as child:
        assert child.call(load_slowly) >= 1.5 * LIMITS.max_cpu_s
    with Sandbox(LIMITS, wall_s=30) as child:
        assert reason(child, load_slowly_and_then_never_return) == "decoder_cpu_limit"


def test_a_library_that_is_missing_and_a_child_that_cannot_start_are_reported_to_the_user(shared, monkeypatch):
    with pytest.raises(UserError, match=r"No module named 'decord'; install it"):
        shared.call(import_nothing)
    assert shared.call(abs, -7) == 7
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with Sandbox(LIMITS) as child, pytest.raises(UserError, match="exit status 1; check that /bin/false"):
        child.call(abs, -7)


@pytest.mark.parametrize(
    "answer", [struct.pack("<QQ", 1 << 60, 0), struct.pack("<QQ", 0, 1 << 60), struct.pack("<QQ", 5, 0) + b"{'a\xff}"]
)
def test_an_answer_in_disorder_is_a_crash(shared, answer):
    assert reason(shared, answer_wildly, answer) == "decoder_crashed"
    assert shared.call(abs, -7) == 7


def test_the_answer_of_the_child_is_never_unpickled(shared):
    payload = pickle.dumps(print)
    assert shared.call(bytes, payload) == payload


def test_output_of_decoders_does_not_reach_the_answers(shared):
    assert shared.call(os.write, 1, b"noise on the standard output") == 28
    assert shared.call(abs, -7) == 7


def test_a_job_directory_added_at_run_time_is_known_to_the_child(tmp_path, monkeypatch):
    (tmp_path / "late_module.py").write_text("def answer():\n    return 42\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    import late_module

    with Sandbox(LIMITS) as child:
        assert child.call(late_module.answer) == 42


@pytest.mark.parametrize("backend", ["pymupdf", "pypdfium2"])
def test_a_pdf_that_inflates_without_end_is_stopped(backend):
    config = LIMITS.model_copy(update={"document_backend": backend})
    with Sandbox(config, wall_s=30) as child:
        assert reason(child, render_page, endless_pdf(), 0, config) in ("decoder_cpu_limit", "decoder_memory_limit")


@functools.cache
def endless_pdf() -> bytes:
    """A page of 0.2 MB whose content inflates to 200 MB of strokes."""
    document = pymupdf.open()
    page = document.new_page(width=300, height=400)
    page.insert_text((30, 50), "harmless")
    operators = b"0 0 m 300 400 l S\n"
    packer = zlib.compressobj(9)
    block = operators * 100_000
    stream = b"".join(packer.compress(block) for _ in range(110)) + packer.flush()
    xref = page.get_contents()[0]
    document.update_stream(xref, b"x", compress=False)
    document.xref_set_key(xref, "Filter", "/FlateDecode")
    head, mark, tail = document.tobytes().partition(b"stream\nx\nendstream")
    assert mark
    return head + b"stream\n" + stream + b"\nendstream" + tail


def test_the_child_goes_when_its_parent_is_killed():
    script = (
        "import os, time; from pipelines.config import MediaConfig; from pipelines.media.sandbox import Sandbox\n"
        "child = Sandbox(MediaConfig()); print(child.call(os.getpid), flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        parent.kill()
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s and alive(pid):
        time.sleep(0.05)
    assert not alive(pid)


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:  # noqa: PTH123
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
