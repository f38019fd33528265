# SPDX-License-Identifier: Apache-2.0
"""The inside of the sandbox: gives up what it can, then runs the code and its tests.

A script without imports beyond the standard library: the interpreter that runs it has no other.
Reads its job as JSON from standard input, writes the numbers of the tests that passed, one a line
and as soon as they have, to standard output.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

NOBODY = 65534
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
# Events of sys.audit, and whole families of them. Opening for writing is looked at apart.
REFUSED = {
    *("os.fork", "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system", "pty.spawn"),
    *("os.kill", "os.killpg", "signal.pthread_kill", "subprocess.Popen"),
    *("os.chdir", "os.chmod", "os.chown", "os.link", "os.mkdir", "os.remove", "os.rename"),
    *("os.rmdir", "os.setxattr", "os.symlink", "os.truncate", "os.utime"),
    *("resource.setrlimit", "resource.prlimit", "sqlite3.connect", "_posixsubprocess.fork_exec"),
}
REFUSED_FAMILIES = {"socket", "ctypes", "shutil", "tempfile", "urllib", "ftplib", "smtplib"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def set_limits(limits: dict[str, Any]) -> None:
    """Of the kernel, for the rest of the process."""
    cpu, megabytes = limits["cpu_seconds"], limits["memory_mb"]
    resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))
    for kind, most in (
        (resource.RLIMIT_AS, megabytes << 20),
        (resource.RLIMIT_FSIZE, limits["file_kb"] << 10),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 32),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(kind, (most, most))


def leave_network() -> None:
    """Into a namespace without interfaces, where the system permits it."""
    unshare = ctypes.CDLL(None).unshare
    if unshare(CLONE_NEWNET) != 0:
        unshare(CLONE_NEWUSER | CLONE_NEWNET)


def leave_root() -> None:
    """Go on as nobody; stay root if nobody cannot read the standard library."""
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    readable = os.access(os.__file__, os.R_OK, effective_ids=True)
    os.seteuid(0)
    os.setegid(0)
    if readable:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """The hook: raises PermissionError at what is refused; files can be written in ``folder``."""
    inside = os.path.realpath(folder) + os.sep

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & WRITING:
                return
            if not os.path.realpath(os.fsdecode(path)).startswith(inside):
                raise PermissionError(f"not in this sandbox: writing {path!r}")
        elif event in REFUSED or event.partition(".")[0] in REFUSED_FAMILIES:
            raise PermissionError(f"not in this sandbox: {event}")

    return hook


def too_long(number: int, frame: FrameType | None) -> NoReturn:
    raise TimeoutError("too much CPU time")


def passes(piece: str, name: str, names: dict[str, Any], seconds: float) -> bool:
    """Whether a piece of code ends without raising anything, ``SystemExit`` included."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        exec(compile(piece, name, "exec"), names)
    except BaseException:
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return True


def main() -> None:
    job = json.load(sys.stdin)
    # Whatever the code prints goes nowhere; the report has the descriptor to itself.
    report = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1):
        os.dup2(nowhere, stream)
    leave_network()
    set_limits(job["limits"])
    if os.geteuid() == 0:
        leave_root()
    signal.signal(signal.SIGPROF, too_long)
    sys.addaudithook(guard(os.getcwd()))
    seconds = job["limits"]["test_seconds"]
    names: dict[str, Any] = {"__name__": "answer"}
    if passes(job["code"], "answer.py", names, seconds):
        for number, test in enumerate(job["tests"]):
            if passes(test, "test.py", dict(names), seconds):
                os.write(report, b"%d\n" % number)


if __name__ == "__main__":
    main()
