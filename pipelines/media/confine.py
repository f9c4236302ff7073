"""What a decoding child gives up before it reads an untrusted file: network, programs, writing, signals to others.

    prctl      no new privileges: a set-uid program gives none
    seccomp    a filter of system calls, on Linux for x86-64 and arm64
    Landlock   files cannot be changed, TCP cannot be used; from Linux 5.13 on, TCP from 6.7 on

Each one works without root and cannot be taken back. seccomp covers everything. Landlock is the second lock, and the
only one on other processors. The child can still read files that its user can read: decoders load libraries late.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import sys
from collections.abc import Iterator

_PR_SET_NO_NEW_PRIVS = 38
_SET_MODE_FILTER, _TSYNC = 1, 1
_CLONE_THREAD = 0x10000
_FIRST_X32 = 0x40000000  # numbers of a second table of system calls, which the kernel of x86-64 has, too

# Classic BPF: load a word of the call, jump if equal / greater or equal / any bit is set, return.
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # places in the kernel's description of a call
_ALLOW, _FAIL_WITH = 0x7FFF0000, 0x00050000

# Name -> number on x86-64 and on arm64; None where the processor has no such call.
_NETWORK = {
    **{"socket": (41, 198), "socketpair": (53, 199), "connect": (42, 203), "bind": (49, 200), "listen": (50, 201)},
    **{"accept": (43, 202), "accept4": (288, 242), "sendto": (44, 206), "sendmsg": (46, 211), "sendmmsg": (307, 269)},
}
_PROGRAMS = {
    **{"execve": (59, 221), "execveat": (322, 281), "fork": (57, None), "vfork": (58, None)},
    **{"ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271)},
    **{"tkill": (200, 130), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "rt_sigqueueinfo": (129, 138)},
    "rt_tgsigqueueinfo": (297, 240),
    **{"io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427)},
    **{"bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "keyctl": (250, 219)},
    **{"add_key": (248, 217), "request_key": (249, 218), "unshare": (272, 97), "setns": (308, 268)},
    **{"kexec_load": (246, 104), "init_module": (175, 105), "finit_module": (313, 273), "reboot": (169, 142)},
    # Memory outside of the address space, which max_memory_bytes would not count.
    **{
        "memfd_create": (319, 279),
        "shmget": (29, 194),
        "msgget": (68, 186),
        "semget": (64, 190),
        "mq_open": (240, 180),
    },
}
_WRITING = {
    **{"creat": (85, None), "truncate": (76, 45), "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276)},
    **{"unlink": (87, None), "unlinkat": (263, 35), "rmdir": (84, None), "mkdir": (83, None), "mkdirat": (258, 34)},
    **{"link": (86, None), "linkat": (265, 37), "symlink": (88, None), "symlinkat": (266, 36), "mknod": (133, None)},
    **{"mknodat": (259, 33), "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452)},
    **{"chown": (92, None), "lchown": (94, None), "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None)},
    **{"utimes": (235, None), "utimensat": (280, 88), "futimesat": (261, None), "setxattr": (188, 5)},
    **{"lsetxattr": (189, 6), "fsetxattr": (190, 7), "removexattr": (197, 14), "lremovexattr": (198, 15)},
    **{
        "fremovexattr": (199, 16),
        "mount": (165, 40),
        "umount2": (166, 39),
        "pivot_root": (155, 41),
        "chroot": (161, 51),
    },
    **{"open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "open_by_handle_at": (304, 265)},
    **{"swapon": (167, 224), "sethostname": (170, 161), "settimeofday": (164, 170), "clock_settime": (227, 112)},
}
# Calls that fail as if the kernel were older. The C library then uses the call that the filter can look into.
_UNKNOWN = {"clone3": (435, 435), "openat2": (437, 437)}
_OPEN = {"open": (2, None, 1), "openat": (257, 56, 2)}  # and which argument has the flags
_IOCTL, _TYPE_ON_TERMINAL = (16, 29), (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX: keys as if the user had typed them
_CLONE, _KILL = (56, 220), {"kill": (62, 129), "tgkill": (234, 131), "prlimit64": (302, 261)}
_SECCOMP = (317, 277)
_PROCESSORS = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

_LANDLOCK_CREATE, _LANDLOCK_RESTRICT = 444, 446  # of every processor
_LANDLOCK_VERSION = 1
_LANDLOCK_WRITING = 0b1_1111_1111_0010  # write, remove, make: all rights but to execute and to read
_LANDLOCK_LATER = {2: 1 << 13, 3: 1 << 14, 5: 1 << 15}  # version -> move between folders, truncate, control devices
_LANDLOCK_TCP, _LANDLOCK_SCOPES = 0b11, 0b11  # bind and connect, from version 4; sockets and signals, from 6


def confine() -> tuple[str, ...]:
    """Give up what a decoder never needs, for all threads of this process. Return what the kernel cannot prevent."""
    # A file may be opened for writing where neither lock exists, but not grow. Pipes are not files.
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    if sys.platform != "linux":
        return ("open connections", "start programs", "delete files")
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        return ("open connections", "start programs", "delete files")
    landlock = _use_landlock(libc)
    if _use_seccomp(libc):
        return ()
    missing = [] if landlock >= 4 else ["open connections"]
    return (*missing, "start programs", *(() if landlock else ("delete files",)))


def _use_landlock(libc: ctypes.CDLL) -> int:
    """Return the version of Landlock that is in force, or 0."""
    version: int = libc.syscall(_LANDLOCK_CREATE, None, 0, _LANDLOCK_VERSION)
    if version < 1:
        return 0
    files = _LANDLOCK_WRITING | sum(right for since, right in _LANDLOCK_LATER.items() if version >= since)
    rights = [files] + [_LANDLOCK_TCP] * (version >= 4) + [_LANDLOCK_SCOPES] * (version >= 6)
    rules = struct.pack(f"={len(rights)}Q", *rights)
    descriptor = libc.syscall(_LANDLOCK_CREATE, rules, len(rules), 0)
    if descriptor < 0:
        return 0
    try:
        return 0 if libc.syscall(_LANDLOCK_RESTRICT, descriptor, 0) else version
    finally:
        os.close(descriptor)


class _Program(ctypes.Structure):
    """The kernel's `struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def _use_seccomp(libc: ctypes.CDLL) -> bool:
    """Return whether the filter is in force."""
    if platform.machine() not in _PROCESSORS or sys.maxsize < 1 << 32:
        return False
    column, architecture = _PROCESSORS[platform.machine()]
    code = b"".join(_filter(column, architecture, os.getpid()))
    program = _Program(len(code) // 8, code)
    return not libc.syscall(_SECCOMP[column], _SET_MODE_FILTER, _TSYNC, ctypes.byref(program))


def _filter(column: int, architecture: int, pid: int) -> Iterator[bytes]:
    """Yield the instructions of the filter. `column` is that of the processor in the tables above."""
    yield _instruction(_LOAD, _ARCHITECTURE)
    yield from _fail_unless(_EQUAL, architecture, errno.EPERM)
    yield _instruction(_LOAD, _NUMBER)
    if column == 0:
        yield _instruction(_AT_LEAST, _FIRST_X32, 0, 1)
        yield _fail(errno.ENOSYS)
    for calls, problem in (
        (_NETWORK, errno.EACCES),
        (_PROGRAMS, errno.EPERM),
        (_WRITING, errno.EROFS),
        (_UNKNOWN, errno.ENOSYS),
    ):
        for numbers in calls.values():
            if (number := numbers[column]) is not None:
                yield _instruction(_EQUAL, number, 0, 1)
                yield _fail(problem)
    flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    for *openers, argument in _OPEN.values():
        if (number := openers[column]) is not None:
            yield from _if_called(number, argument, [_instruction(_ANY_BIT, flags, 0, 1), _fail(errno.EROFS)])
    yield from _if_called(_CLONE[column], 0, [*_fail_unless(_ANY_BIT, _CLONE_THREAD, errno.EPERM)])
    for own in _KILL.values():  # 0 is this process for prlimit64, and its whole group for kill
        zero = [_instruction(_EQUAL, 0, 2, 0)] if own is _KILL["prlimit64"] else []
        yield from _if_called(own[column], 0, [*zero, *_fail_unless(_EQUAL, pid, errno.EPERM)])
    first, second = _TYPE_ON_TERMINAL
    typing = [_instruction(_EQUAL, first, 1, 0), _instruction(_EQUAL, second, 0, 1), _fail(errno.EPERM)]
    yield from _if_called(_IOCTL[column], 1, typing)
    yield _instruction(_RETURN, _ALLOW)


def _if_called(number: int, argument: int, body: list[bytes]) -> Iterator[bytes]:
    """Yield `body` for one call, with the low half of an argument loaded. Calls that it does not fail are allowed."""
    yield _instruction(_EQUAL, number, 0, len(body) + 2)
    yield _instruction(_LOAD, _FIRST_ARGUMENT + 8 * argument)
    yield from body
    yield _instruction(_RETURN, _ALLOW)


def _fail_unless(test: int, value: int, problem: int) -> Iterator[bytes]:
    yield _instruction(test, value, 1, 0)
    yield _fail(problem)


def _fail(problem: int) -> bytes:
    return _instruction(_RETURN, _FAIL_WITH | problem)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
