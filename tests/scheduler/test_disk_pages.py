# SPDX-License-Identifier: Apache-2.0
"""Pages on disk: whole and checked, or not there; for their owner alone; within a limit."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.scheduler.tiers.disk import load_page, store_page
from kvcomm_vllm.scheduler.tiers.room import make_room

SIZE = 4096


def page(filled_with: int) -> memoryview:
    return memoryview(bytearray([filled_with]) * SIZE)


def test_a_page_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    path = tmp_path / "ab" / "cd_g0" / "abcd.bin"
    store_page(path, page(7))
    found = page(0)
    load_page(path, found)
    assert found == page(7)
    assert os.stat(path).st_mode & 0o777 == 0o600
    assert os.stat(path.parent).st_mode & 0o777 == 0o700


def test_plain_vllm_finds_the_page_at_the_beginning_of_the_file(tmp_path: Path) -> None:
    store_page(tmp_path / "a.bin", page(7))
    assert (tmp_path / "a.bin").read_bytes()[:SIZE] == bytes(page(7))


@given(at=st.integers(0, SIZE + 23), bit=st.integers(0, 7))
def test_no_bit_can_change_unseen(
    tmp_path_factory: pytest.TempPathFactory, at: int, bit: int
) -> None:
    path = tmp_path_factory.mktemp("pages") / "a.bin"
    store_page(path, page(7))
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(OSError, match="not the page that was stored"):
        load_page(path, page(0))
    assert not path.exists(), "and it is not read again"


@pytest.mark.parametrize("size", [0, 1, SIZE - 1, SIZE, SIZE + 23, SIZE + 25])
def test_a_page_of_another_length_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.bin"
    store_page(path, page(7))
    path.write_bytes((path.read_bytes() + b"x")[:size])
    with pytest.raises(OSError, match="not the page"):
        load_page(path, page(0))


def test_a_page_under_anothers_name_is_refused(tmp_path: Path) -> None:
    store_page(tmp_path / "a.bin", page(7))
    os.rename(tmp_path / "a.bin", tmp_path / "b.bin")
    with pytest.raises(OSError, match="not the page"):
        load_page(tmp_path / "b.bin", page(0))


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OSError, match="file"):
        store_page(tmp_path / "file" / "a.bin", page(7))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_was_used_longest_ago_goes_first(tmp_path: Path) -> None:
    for number in range(10):
        store_page(tmp_path / f"{number}.bin", page(number))
        os.utime(tmp_path / f"{number}.bin", (number, number))
    load_page(tmp_path / "0.bin", page(0))  # used now
    make_room(tmp_path, 6 * (SIZE + 24))
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"0.bin", "6.bin", "7.bin", "8.bin", "9.bin"}


def test_pages_of_a_machine_whose_clock_is_ahead_do_not_stay_forever(tmp_path: Path) -> None:
    later = time.time() + 86_400
    for number in range(5):
        store_page(tmp_path / f"{number}.bin", page(number))
        os.utime(tmp_path / f"{number}.bin", (later, later))
    make_room(tmp_path, 6 * (SIZE + 24))
    assert all(os.stat(path).st_mtime < later - 80_000 for path in tmp_path.iterdir())


def test_manifests_go_with_the_last_of_their_pages(tmp_path: Path) -> None:
    for number in range(10):
        store_page(tmp_path / f"{number}.bin", page(number))
        (tmp_path / f"{number}.log").write_bytes(b"")
        for name in (f"{number}.bin", f"{number}.log"):
            os.utime(tmp_path / name, (number, number))
    make_room(tmp_path, 6 * (SIZE + 24))
    assert sorted(path.name for path in tmp_path.glob("*.log")) == [
        f"{n}.log" for n in range(5, 10)
    ]


def test_nothing_goes_while_there_is_room(tmp_path: Path) -> None:
    for number in range(3):
        store_page(tmp_path / f"{number}.bin", page(number))
    make_room(tmp_path, 3 * (SIZE + 24))
    assert len(list(tmp_path.iterdir())) == 3


def test_what_was_never_finished_is_removed_in_the_end(tmp_path: Path) -> None:
    for name, age in (("old.tmp", 1000), ("new.tmp", 0)):
        (tmp_path / name).write_bytes(b"x")
        then = os.stat(tmp_path / name).st_mtime - age
        os.utime(tmp_path / name, (then, then))
    make_room(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["new.tmp"]
