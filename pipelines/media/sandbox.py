"""A killable child process for untrusted files: nothing inside a process can stop a decoder that never returns.

    parent                                   child (`python -m pipelines.media.sandbox`)
    Sandbox.call(f, *args) --pickle-->       limits CPU and memory, gives up its rights (`confine`), runs f(*args)
          result or BadMedia <--raw data--   answers with bytes or JSON, which the parent never unpickles

The child gets the variables of `_VARIABLES` and no others, so that it holds no keys and tokens of the job.

One child serves many files, so that its start (0.3 s, 2 s with pymupdf) is paid once. It is replaced whenever it breaks
a limit. It is started by `subprocess` and not forked, which is safe inside Ray workers.

Reasons of `BadMedia` that the sandbox adds: decoder_cpu_limit, decoder_memory_limit, decoder_time_limit,
decoder_crashed, and decoder_error for an exception that the decoder does not handle.
"""

from __future__ import annotations

import fcntl
import json
import logging
import math
import os
import pickle
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np

from pipelines.config import MediaConfig
from pipelines.errors import BadMedia, UserError
from pipelines.media.confine import confine

_log = logging.getLogger(__name__)
Result = TypeVar("Result")
_INSIDE = "RZEN_MEDIA_SANDBOX"
_LENGTHS = struct.Struct("<QQ")
# Wall time, for a child that waits instead of computing, gets little CPU from a busy machine, or loads libraries.
_WALL_PER_CPU_S = 4.0
_WALL_EXTRA_S = 15.0
_START_S = 60.0
# What an interpreter and the loader of libraries need from the environment.
_VARIABLES = (
    "PATH",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "PYTHONHOME",
    "PYTHONUTF8",
)
_told: set[str] = set()  # what this process has warned about
_PLACE = "the decoding child"
_CHUNK_BYTES = 1 << 20  # also the size of a pipe: with Linux's 64 KB, the two processes wait for each other often
_DISORDER = (struct.error, ValueError)  # of an answer that a faulty decoder has overwritten
_MAYBE_OF_EARLIER_FILES = ("decoder_crashed", "decoder_memory_limit")


class _NotImported(UserError):
    """A library that the child cannot import: it is not installed, or memory is short."""


def in_sandbox() -> bool:
    """Return whether this process is a sandbox child."""
    return _INSIDE in os.environ


@contextmanager
def exclude_from_cpu_limit() -> Iterator[None]:
    """Do not count the block towards the child's CPU limit: importing pymupdf takes longer than many files.

    Has no effect outside a sandbox child.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_CPU)
    if not in_sandbox() or soft == hard:
        yield
        return
    resource.setrlimit(resource.RLIMIT_CPU, (hard, hard))
    started_s = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_CPU, (soft + math.ceil(time.process_time() - started_s), hard))


class Sandbox:
    """Runs module-level functions in a child under `max_cpu_s` per call and `max_memory_bytes`. Not thread-safe.

    `wall_s` is the limit of a call in wall time. The default is 15 s and four times `max_cpu_s` (our choice).
    """

    def __init__(self, config: MediaConfig, wall_s: float | None = None) -> None:
        self._config = config
        self._wall_s = wall_s if wall_s is not None else _WALL_EXTRA_S + _WALL_PER_CPU_S * config.max_cpu_s
        self._child: subprocess.Popen[bytes] | None = None

    def call(self, function: Callable[..., Result], *args: Any) -> Result:
        """Return `function(*args)`, computed in the child.

        Arguments must pickle. The result is a uint8 array, an array and JSON, bytes, or JSON.

        Passes on a `BadMedia` or `UserError` of the function. Raises `BadMedia` with the reasons above, and `UserError`
        if no child can be started or a library cannot be imported.

        The result depends on this file only. Earlier files may have damaged a child that crashes or runs out of memory,
        so that the call is repeated in a new child.
        """
        request = pickle.dumps((function, args, self._config.max_cpu_s))
        is_new = self._child is None
        try:
            result: Result = self._attempt(request)
        except (BadMedia, _NotImported) as error:
            if is_new or (isinstance(error, BadMedia) and error.reason not in _MAYBE_OF_EARLIER_FILES):
                raise
            self.close()
            result = self._attempt(request)
        return result

    def _attempt(self, request: bytes) -> Any:
        child = self._child = self._child or _start(self._config.max_memory_bytes)
        try:
            header, payload = _exchange(child, request, time.monotonic() + self._wall_s, self._config.max_memory_bytes)
        except TimeoutError as error:
            self.close()
            raise BadMedia("decoder_time_limit", f"no answer in {self._wall_s:g} s") from error
        except (EOFError, BrokenPipeError) as error:
            raise _death(self._end()) from error
        except _DISORDER as error:
            self.close()
            raise BadMedia("decoder_crashed", f"its answer is in disorder: {error}") from error
        except BaseException:
            # The next call would read an answer that is still in the pipe.
            self.close()
            raise
        if header.get("reason") == "decoder_memory_limit":
            self.close()
        return _value(header, payload)

    def close(self) -> None:
        """Kill the child. The next call starts another one."""
        if self._child is not None:
            self._end()

    def _end(self) -> int:
        """Kill the child and return its exit status. A child that has ended already keeps its own status."""
        assert self._child is not None
        child, self._child = self._child, None
        child.kill()
        for pipe in (child.stdin, child.stdout):
            assert pipe is not None
            pipe.close()
        return child.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _start(max_memory_bytes: int) -> subprocess.Popen[bytes]:
    one_thread = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # Not the inherited PYTHONPATH: Ray adds a job's working directory to sys.path inside the process. The folder of
    # this package goes first, because that directory may have another package `pipelines`.
    path = os.pathsep.join([str(Path(__file__).resolve().parents[2]), *sys.path])
    environment = {name: os.environ[name] for name in _VARIABLES if name in os.environ}
    environment |= one_thread | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", _INSIDE: "1"}
    child = subprocess.Popen(
        [sys.executable, "-P", "-m", "pipelines.media.sandbox", str(max_memory_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        env=environment,
    )
    assert child.stdin is not None
    assert child.stdout is not None
    for pipe in (child.stdin, child.stdout):
        with suppress(AttributeError, OSError):  # not Linux, or this user has too many pipes
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _CHUNK_BYTES)
    try:
        header, _ = _receive_answer(child, time.monotonic() + _START_S, max_memory_bytes)
    except (EOFError, TimeoutError, *_DISORDER) as error:
        child.kill()
        problem = f"did not start: exit status {child.wait()}"
        raise UserError(_PLACE, problem, f"check that {sys.executable} can import numpy and pipelines") from error
    _warn_once(header["json"])
    return child


def _warn_once(missing: list[str]) -> None:
    if missing and not _told:
        _told.update(missing)
        _log.warning("%s can %s: this kernel has no lock for it (see pipelines/media)", _PLACE, ", ".join(missing))


def _exchange(
    child: subprocess.Popen[bytes], request: bytes, deadline_s: float, max_bytes: int
) -> tuple[dict[str, Any], memoryview]:
    assert child.stdin is not None
    # The child reads a whole request before it does anything else, so that writing cannot block on its work.
    child.stdin.write(_LENGTHS.pack(len(request), 0))
    unsent = memoryview(request)
    while unsent:
        unsent = unsent[child.stdin.write(unsent) :]
    return _receive_answer(child, deadline_s, max_bytes)


def _receive_answer(
    child: subprocess.Popen[bytes], deadline_s: float, max_bytes: int
) -> tuple[dict[str, Any], memoryview]:
    assert child.stdout is not None
    header_bytes, payload_bytes = _LENGTHS.unpack(_receive(child.stdout.fileno(), _LENGTHS.size, deadline_s))
    if header_bytes + payload_bytes > max_bytes:
        raise ValueError(f"{header_bytes + payload_bytes} bytes, more than its memory")
    header = json.loads(bytes(_receive(child.stdout.fileno(), header_bytes, deadline_s)))
    return header, _receive(child.stdout.fileno(), payload_bytes, deadline_s)


def _receive(descriptor: int, num_bytes: int, deadline_s: float) -> memoryview:
    pixels: Any = np.empty(num_bytes, np.uint8)  # takes memory only where something is read into it
    received = memoryview(pixels)
    missing = received
    while missing:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline_s - time.monotonic()))
        if not ready:
            raise TimeoutError
        count = os.readv(descriptor, [missing[:_CHUNK_BYTES]])
        if not count:
            raise EOFError
        missing = missing[count:]
    return received


def _value(header: dict[str, Any], payload: memoryview) -> Any:
    if "reason" in header:
        raise BadMedia(header["reason"], header["detail"])
    if "user_error" in header:
        raise UserError(*header["user_error"])
    if "import_error" in header:
        raise _NotImported(_PLACE, header["import_error"], "install it, or raise media.max_memory_bytes")
    if "shape" in header:
        array = np.frombuffer(payload, np.uint8).reshape(header["shape"])
        return (array, header["json"]) if "json" in header else array
    return bytes(payload) if "bytes" in header else header["json"]


def _death(returncode: int) -> BadMedia:
    if returncode == -signal.SIGXCPU:
        return BadMedia("decoder_cpu_limit")
    return BadMedia("decoder_crashed", f"exit status {returncode}")


def _answer(request: bytes) -> tuple[dict[str, Any], bytes | memoryview]:
    try:
        with exclude_from_cpu_limit():
            function, args, max_cpu_s = pickle.loads(request)
        _limit_cpu(max_cpu_s)
        result = function(*args)
    except BadMedia as error:
        return {"reason": error.reason, "detail": error.detail}, b""
    except UserError as error:
        return {"user_error": error.args}, b""
    except MemoryError as error:
        return {"reason": "decoder_memory_limit", "detail": str(error)}, b""
    except ImportError as error:
        return {"import_error": str(error)}, b""
    except Exception as error:  # noqa: BLE001  an unexpected error costs one file, not the job
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}, {last.name}"
        return {"reason": "decoder_error", "detail": f"{type(error).__name__}: {error} ({place})"}, b""
    array, *rest = result if isinstance(result, tuple) else (result,)
    if isinstance(array, np.ndarray):
        assert array.dtype == np.uint8
        header = {"shape": array.shape} | ({"json": rest[0]} if rest else {})
        return header, np.ascontiguousarray(array).reshape(-1).data
    return ({"bytes": True}, result) if isinstance(result, bytes) else ({"json": result}, b"")


def _limit_cpu(max_cpu_s: int) -> None:
    """Let SIGXCPU kill the process after this many more seconds. The limit counts from the start of the process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime) + max_cpu_s
    resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))


def _serve(requests: BinaryIO, answers: BinaryIO, missing: list[str]) -> None:
    _send(answers, {"json": missing}, b"")
    while lengths := requests.read(_LENGTHS.size):
        request_bytes, _ = _LENGTHS.unpack(lengths)
        _send(answers, *_answer(requests.read(request_bytes)))


def _send(answers: BinaryIO, header: dict[str, Any], payload: bytes | memoryview) -> None:
    encoded = json.dumps(header).encode()
    answers.write(_LENGTHS.pack(len(encoded), len(payload)) + encoded)
    answers.write(payload)
    answers.flush()


def _main() -> None:
    max_memory_bytes = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Decoders print to descriptor 1: the answers go through a private copy of it.
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)
        _serve(sys.stdin.buffer, answers, list(confine()))


if __name__ == "__main__":
    _main()
