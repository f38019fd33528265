# SPDX-License-Identifier: Apache-2.0
"""Code of a model does its tests and no harm."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from kvcomm_vllm.evaluation.workloads.sandbox import Limits, run_tests

# Far apart from each other, so that it is never by chance that one of them ends a run.
SHORT = Limits(test_seconds=0.2, cpu_seconds=2, wall_seconds=60)


def test_right_code_passes_and_wrong_code_fails_test_by_test() -> None:
    tests = ["assert double(0) == 0", "assert double(2) == 4", "assert double('a') == 'aa'"]
    assert run_tests("def double(x):\n    return x * 2", tests) == [True, True, True]
    assert run_tests("def double(x):\n    return x ** 2", tests) == [True, True, False]


@pytest.mark.parametrize("code", ["def f(:", "import numpy", "1 / 0", "raise SystemExit", "exit()"])
def test_code_that_does_not_run_passes_nothing(code: str) -> None:
    assert run_tests(code, ["pass"]) == [False]


def test_what_one_test_defines_is_unknown_to_the_next() -> None:
    assert run_tests("n = 1", ["n = 2", "assert n == 1"]) == [True, True]


def test_output_is_swallowed_and_input_is_empty() -> None:
    code = "print('0\\n1\\n' * 9)\nimport sys, os\nos.write(1, b'1')\nleft = sys.stdin.read()"
    assert run_tests(code, ["assert left == ''", "assert False"]) == [True, False]


def test_an_endless_loop_fails_its_own_test_alone() -> None:
    code = "def f(n):\n    while n: pass\n    return n"
    assert run_tests(code, ["assert f(1)", "assert f(0) == 0"], SHORT) == [False, True]


@pytest.mark.slow
def test_code_that_ignores_its_time_is_ended_by_the_kernel() -> None:
    code = "import signal\nsignal.signal(signal.SIGPROF, signal.SIG_IGN)\n"
    code += "def f():\n    while True: pass"
    assert run_tests(code, ["pass", "f()", "pass"], SHORT) == [True, False, False]


@pytest.mark.slow
def test_sleeping_code_is_ended_by_the_wall_clock() -> None:
    start = time.monotonic()
    limits = Limits(wall_seconds=2)
    assert run_tests("import time\ntime.sleep(500)", ["pass"], limits) == [False]
    assert time.monotonic() - start < 400


def test_memory_has_an_end() -> None:
    code = "def f(megabytes):\n    return len(bytearray(megabytes << 20))"
    limits = Limits(memory_mb=256)
    assert run_tests(code, ["assert f(8)", "assert f(512)", "assert f(8)"], limits) == [
        True,
        False,
        True,
    ]


def test_a_crash_of_the_interpreter_keeps_what_passed_before() -> None:
    assert run_tests("import os", ["pass", "os.abort()", "pass"]) == [True, False, False]


REFUSED = {
    "socket": "import socket\nsocket.socket()",
    "connection": "import socket\nsocket.create_connection(('127.0.0.1', 1))",
    "name lookup": "import socket\nsocket.getaddrinfo('example.org', 80)",
    "web page": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:1')",
    "fork": "import os\nif os.fork() == 0:\n    os._exit(0)",
    "subprocess": "import subprocess\nsubprocess.run(['true'])",
    "shell": "import os\nassert os.system('true') == 0",
    "spawn": "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "processes": "import multiprocessing as m\nm.get_context('fork').Process(target=print).start()",
    "signal to the parent": "import os\nos.kill(os.getppid(), 0)",
    "foreign library": "import ctypes\nctypes.CDLL(None)",
    "higher limits": "import resource as r\nr.setrlimit(r.RLIMIT_CPU, (99, 99))",
    "large file": "with open('large', 'wb') as file:\n    file.write(bytes(1 << 20))",
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused(what: str) -> None:
    lines = "".join(f"    {line}\n" for line in REFUSED[what].splitlines())
    # The code goes on after the refusal: it neither hung nor died.
    code = f"try:\n{lines}    done = True\nexcept OSError:\n    done = False\n"
    assert run_tests(code, ["assert done is False", "assert done"]) == [True, False]


def test_no_file_outside_its_folder_is_changed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.write_text("mine")
    tmp_path.chmod(0o777)
    attempts = [
        f"open({str(kept)!r}, 'w')",
        f"open({str(tmp_path / 'new')!r}, 'x')",
        f"import os\nos.open({str(kept)!r}, os.O_WRONLY | os.O_TRUNC)",
        f"import os\nos.remove({str(kept)!r})",
        f"import os\nos.rename({str(kept)!r}, 'here')",
        f"import shutil\nshutil.rmtree({str(tmp_path)!r})",
        f"import os\nos.symlink({str(kept)!r}, 'link')\nopen('link', 'w')",
        f"import pathlib\npathlib.Path({str(kept)!r}).chmod(0)",
    ]
    assert run_tests("", attempts) == [False] * len(attempts)
    assert [file.name for file in tmp_path.iterdir()] == ["kept"]
    assert kept.read_text() == "mine"


def test_the_working_folder_is_empty_writable_and_gone_afterwards(tmp_path: Path) -> None:
    code = "import os\nwith open('note', 'w') as file:\n    file.write('x')\nhere = os.getcwd()"
    tests = ["assert os.listdir() == ['note']", "assert open('note').read() == 'x'"]
    assert run_tests(code, tests) == [True, True]
    left = ["assert os.listdir() == []", f"assert os.path.dirname(os.getcwd()) != {os.getcwd()!r}"]
    assert run_tests("import os", left) == [True, True]


def test_nothing_of_the_environment_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_SECRET", "open sesame")
    tests = ["assert 'SOME_SECRET' not in os.environ", "assert 'HOME' not in os.environ"]
    assert run_tests("import os", tests) == [True, True]
