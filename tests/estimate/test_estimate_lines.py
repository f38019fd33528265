# SPDX-License-Identifier: Apache-2.0
"""A log is read line by line, and no line ends the reading."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcomm_vllm.estimate import lines
from kvcomm_vllm.estimate.flaws import EstimateError, Flaw, SkippedError
from kvcomm_vllm.estimate.lines import entries


def read(path: Path, content: bytes) -> list[object]:
    path.write_bytes(content)
    return [
        (line, entry.flaw if isinstance(entry, SkippedError) else entry)
        for line, entry in entries(path)
    ]


def test_blank_lines_bom_and_crlf_do_no_harm(tmp_path: Path) -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\r\n  \n{"b": 2}'
    assert read(tmp_path / "log", content) == [(1, {"a": 1}), (4, {"b": 2})]


def test_broken_lines_are_named_and_the_next_is_read(tmp_path: Path) -> None:
    deep = b"[" * 100_000
    content = b'{"a": \n\xff\xfe\n' + deep + b"\n" + b"9" * 5000 + b"\n7\n"
    assert read(tmp_path / "log", content) == [
        (1, Flaw.NOT_JSON),
        (2, Flaw.NOT_TEXT),
        (3, Flaw.NOT_JSON),
        (4, Flaw.NOT_JSON),
        (5, 7),
    ]


def test_a_line_that_is_too_long_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "MOST_BYTES", 100)
    monkeypatch.setattr(lines, "PIECE", 7)
    long = b'"' + b"x" * 97 + b'"'
    content = long + b"\n" + b"y" * 101 + b"\n" + b"z" * 1000 + b"\n1"
    found = read(tmp_path / "log", content)
    assert found == [(1, "x" * 97), (2, Flaw.LONG_LINE), (3, Flaw.LONG_LINE), (4, 1)]


def test_a_packed_log_is_unpacked(tmp_path: Path) -> None:
    assert read(tmp_path / "log.gz", gzip.compress(b"1\n2\n")) == [(1, 1), (2, 2)]


@pytest.mark.parametrize(
    "content", [b"no gzip", gzip.compress(b"1\n" * 9999)[:-20]], ids=["none", "cut off"]
)
def test_a_packed_log_that_is_broken_is_an_error_of_one_line(
    tmp_path: Path, content: bytes
) -> None:
    with pytest.raises(EstimateError) as error:
        read(tmp_path / "log.gz", content)
    assert "\n" not in str(error.value)


def test_no_file_and_a_folder_are_errors_of_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, Path("a\0b")):
        with pytest.raises(EstimateError, match="cannot be read"):
            list(entries(path))


@given(st.binary(max_size=300))
def test_any_bytes_are_a_log(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    found = read(tmp_path_factory.mktemp("any") / "log", content)
    assert len(found) <= content.count(b"\n") + 1
