# SPDX-License-Identifier: Apache-2.0
"""Promises of the trace's file: for its owner alone, bounded, and of whole lines, whatever happens
to the disk, to the file, or to the engine.
"""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kvcomm_vllm.scheduler.trace_file import OLD_FILES, TraceFile

WRITER = """
import sys
from pathlib import Path
from kvcomm_vllm.scheduler.trace_file import TraceFile
file, number = TraceFile(Path(sys.argv[1]), 1 << 30), 0
while True:
    file.append(b'{"number": %d, "rest": "%s"}\\n' % (number, b"x" * 200))
    number += 1
    if number == 100:
        print("many", flush=True)
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trace.jsonl"


def line(number: int) -> bytes:
    return b'{"number":%03d}\n' % number  # 15 bytes


def test_it_is_for_its_owner_alone_whatever_it_was(path: Path) -> None:
    before = os.umask(0)
    try:
        TraceFile(path, 100).close()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        path.chmod(0o644)
        TraceFile(path, 100).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_file_that_is_full_is_begun_anew_and_the_last_ones_are_kept(path: Path) -> None:
    file = TraceFile(path, 100)  # six lines
    for number in range(40):
        file.append(line(number))
    old = [path.with_name(f"trace.jsonl.{n}") for n in range(1, OLD_FILES + 1)]
    assert sorted(path.parent.iterdir()) == [path, *old]
    texts = [one.read_bytes() for one in [*reversed(old), path]]
    assert b"".join(texts) == b"".join(map(line, range(18, 40)))
    assert max(map(len, texts)) <= 100
    assert {stat.S_IMODE(one.stat().st_mode) for one in path.parent.iterdir()} == {0o600}


def test_a_line_longer_than_a_file_has_one_of_its_own(path: Path) -> None:
    file, long = TraceFile(path, 100), b"x" * 300 + b"\n"
    for text in (line(1), long, line(2)):
        file.append(text)
    assert [Path(f"{path}.{n}").read_bytes() for n in (2, 1)] == [line(1), long]
    assert path.read_bytes() == line(2)


def test_the_next_engine_goes_on_behind_the_last_line(path: Path) -> None:
    for number in range(2):
        file = TraceFile(path, 100)
        file.append(line(number))
        file.close()
    assert path.read_bytes() == line(0) + line(1)


def test_a_line_that_was_cut_off_takes_no_other_with_it(path: Path) -> None:
    path.write_bytes(line(0) + line(1)[:7])
    file = TraceFile(path, 100)
    file.append(line(2))
    file.append(line(3))
    assert path.read_bytes().split(b"\n") == [
        *(line(0) + line(1)[:7]).split(b"\n"),
        *(line(2) + line(3)).split(b"\n"),
    ]


@pytest.mark.slow
def test_after_a_kill_all_lines_but_the_last_are_whole(path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    file = TraceFile(path, 1 << 30)  # its lock went with it
    file.append(line(1))
    *whole, end = path.read_bytes().split(b"\n")
    assert (end, whole.pop() + b"\n") == (b"", line(1))
    assert len(whole) >= 100
    assert all(text.endswith(b'"}') for text in whole[:-1])


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file grows beyond ``size``: what is written up to there is there, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_on_a_full_disk_lines_are_lost_and_those_behind_them_are_whole(path: Path) -> None:
    file = TraceFile(path, 1000)
    with full_disk(35):
        file.append(line(0))
        file.append(line(1))
        for number in (2, 3):
            with pytest.raises(OSError, match=r"."):
                file.append(line(number))
    file.append(line(4))
    assert path.read_bytes() == line(0) + line(1) + line(2)[:5] + b"\n" + line(4)


def test_a_file_that_somebody_has_moved_away_is_made_anew(path: Path) -> None:
    file = TraceFile(path, 100)
    file.append(line(0))
    path.rename(path.with_name("away"))
    file.append(line(1))
    path.unlink()
    file.append(line(2))
    assert path.read_bytes() == line(2)
    assert path.with_name("away").read_bytes() == line(0)


def test_a_file_that_another_engine_writes_is_left_to_it(path: Path) -> None:
    file = TraceFile(path, 100)
    file.append(line(0))
    with pytest.raises(OSError, match="another engine writes it"):
        TraceFile(path, 100)
    file.close()
    TraceFile(path, 100).append(line(1))
    assert path.read_bytes() == line(0) + line(1)


def test_a_link_is_not_followed_and_a_pipe_not_waited_for(path: Path, tmp_path: Path) -> None:
    target = tmp_path / "other"
    target.write_bytes(b"precious\n")
    path.symlink_to(target)
    with pytest.raises(OSError, match=r"."):
        TraceFile(path, 100)
    assert target.read_bytes() == b"precious\n"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"."):
        TraceFile(pipe, 100)


def test_if_it_cannot_be_begun_anew_lines_are_refused_until_it_can(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = TraceFile(path, 20)
    file.append(line(0))

    def fail(*given: object) -> None:
        raise PermissionError("no")

    with monkeypatch.context() as patched:
        patched.setattr("kvcomm_vllm.scheduler.trace_file.os.replace", fail)
        for number in (1, 2):
            with pytest.raises(PermissionError):
                file.append(line(number))
    file.append(line(3))
    assert path.read_bytes() == line(3)
    assert Path(f"{path}.1").read_bytes() == line(0)
