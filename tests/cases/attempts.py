"""What malicious code in a decoder would try. The functions run in the child, so that this module imports little."""

import ctypes
import fcntl
import mmap
import os
import signal
import socket
import termios
import threading
from collections.abc import Callable

_LIBC = ctypes.CDLL(None, use_errno=True)


def prevented(attempt: Callable[..., object], *args: object) -> bool:
    """Return whether an attempt fails with an error of the operating system."""
    try:
        attempt(*args)
    except OSError:
        return True
    return False


def environment() -> list[str]:
    """Return the names of all variables, and those that libraries could read from /proc."""
    with open("/proc/self/environ", "rb") as whole:  # noqa: PTH123
        known = [pair.partition(b"=")[0].decode() for pair in whole.read().split(b"\0") if pair]
    return sorted({*os.environ, *known})


def send_udp(port: int) -> None:
    socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"key", ("127.0.0.1", port))


def connect(port: int) -> None:
    socket.create_connection(("127.0.0.1", port), timeout=5)


def connect_unix(path: str) -> None:
    socket.socket(socket.AF_UNIX).connect(path)


def run(program: str) -> None:
    os.posix_spawn(program, [program], {})


def replace(program: str) -> None:
    os.execv(program, [program])


def fork() -> None:
    if os.fork() == 0:
        os._exit(0)


def call(number: int, *args: object) -> None:
    """A system call of x86-64 by its number, past the C library."""
    if _LIBC.syscall(number, *args) < 0:
        raise OSError(ctypes.get_errno(), "refused")


def openat2(path: bytes) -> None:
    how = ctypes.create_string_buffer(
        (os.O_CREAT | os.O_WRONLY).to_bytes(8, "little") + (0o600).to_bytes(8, "little") + bytes(8)
    )
    call(437, -100, ctypes.c_char_p(path), how, ctypes.c_size_t(24))


def create(path: str) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY))


def truncate_open_file(path: str) -> None:
    with open(path, "r+b") as file:  # noqa: PTH123
        file.truncate(0)


def change_by_mapping(path: str) -> None:
    descriptor = os.open(path, os.O_RDWR)
    mmap.mmap(descriptor, 1)[0:1] = b"x"


def allocate_outside_of_the_address_space() -> None:
    os.memfd_create("x")


def type_on_terminal() -> None:
    """TIOCSTI on any descriptor: the kernel's own refusal (not a terminal) is another error than the filter's."""
    try:
        fcntl.ioctl(0, termios.TIOCSTI, b"x")
    except OSError as error:
        if error.errno != 1:
            return
        raise


def kill_parent() -> None:
    os.kill(os.getppid(), signal.SIGTERM)


def kill_parents_thread() -> None:
    call(234, os.getppid(), os.getppid(), 0)


def limit_parent() -> None:
    import resource

    resource.prlimit(os.getppid(), resource.RLIMIT_NOFILE)


def use_a_thread() -> str:
    """Decoders may use threads."""
    answers: list[str] = []
    thread = threading.Thread(target=answers.append, args=("from a thread",))
    thread.start()
    thread.join()
    return answers[0]


def read(path: str) -> str:
    with open(path) as file:  # noqa: PTH123
        return file.read()
