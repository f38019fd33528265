# SPDX-License-Identifier: Apache-2.0
"""Runs code that a model wrote, in a process of its own with as little as possible around it.

What it is for: a model's mistakes. Endless loops, memory that grows without end, processes that
multiply, files written or deleted, and calls to the network end in a failed test, and leave the
machine as it was. In force everywhere: the kernel's limits on CPU time, memory, and sizes of files;
a limit on the wall clock; an empty environment and an empty working folder; and a hook of the
interpreter that refuses sockets, processes, signals to others, foreign libraries, and changes of
files outside that folder. Where the system permits it, the kernel refuses too: the network is taken
away (a namespace without interfaces), and no process can be started (for root this needs a Python
that others can read, as the code then runs as nobody).

What it is not: a wall against an attacker. Whatever the user can read can be read, code that sets
out to can get round the hook, and code that looks for the tests can make them pass. Run models that
you do not trust in a container or a virtual machine.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from kvcomm_vllm.evaluation.workloads.sandbox_child import NOBODY

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """Of one run, all tests together.

    Args:
        test_seconds: CPU time of the code, and of each test.
        cpu_seconds: CPU time of the run.
        wall_seconds: of the run; the code may sleep.
        memory_mb: address space.
        file_kb: size of each file.
    """

    test_seconds: float = 3.0
    cpu_seconds: int = 24
    wall_seconds: float = 60.0
    memory_mb: int = 512
    file_kb: int = 256


def run_tests(code: str, tests: Sequence[str], limits: Limits | None = None) -> list[bool]:
    """Whether each test passes, that is, raises nothing, behind the code.

    Args:
        code: a module; its name is not ``__main__``, and only the standard library is there.
        tests: pieces of Python, such as ``assert f(1) == 2``; each gets the names of the code.
        limits: None = the defaults.

    Returns one bool per test; tests that were not reached have not passed.
    """
    limits = limits or Limits()
    job = json.dumps({"code": code, "tests": list(tests), "limits": asdict(limits)})
    with (
        tempfile.TemporaryDirectory(prefix="kvcomm-sandbox-") as folder,
        # a file, as its size is limited: a pipe could be flooded
        tempfile.TemporaryFile() as report,
    ):
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, NOBODY)
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", str(CHILD)],
            stdin=subprocess.PIPE,
            stdout=report,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            process.communicate(job.encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        report.seek(0)
        passed = set(report.read().split())
    return [str(number).encode() in passed for number in range(len(tests))]
